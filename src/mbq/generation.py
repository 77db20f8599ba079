"""One answer to one question about images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mbq.errors import MBQError
from mbq.images import open_image


@torch.inference_mode()
def generate(
    model: Any, processor: Any, prompt: str, images: Sequence[str | Path] = (), max_new_tokens: int = 128
) -> str:
    """The model's greedy answer to ``prompt``, with the images before it, through the chat template.

    Raises MBQError for an image that is missing or corrupt.
    """
    for image in images:
        if not Path(image).is_file():
            raise MBQError(f"--image {image} does not exist; check the path.")
    pictures = [open_image(Path(image), "--image") for image in images]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()
