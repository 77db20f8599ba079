"""Load a model to use it, quantized or not, and ask it one question about images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from mbq import quantized
from mbq.images import open_image
from mbq.loading import load_model, read_config, torch_device, torch_dtype


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    kernel: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """The model of a folder or hub id in eval mode, ready to ``generate``; quantized weights stay packed.

    device  "auto" is the GPU if there is one
    dtype   of float parameters and activations; "auto" is the folder's own
    kernel  of quantized linears: "auto" or a name of ``mbq.kernels.KERNELS``

    Raises MBQError where there is no model, and for one that is damaged or quantized in another way.
    """
    if "quantization_config" not in read_config(path):
        return load_model(path, device, dtype, trust_remote_code)
    folder = path if Path(path).is_dir() else snapshot_download(str(path))
    return quantized.load(folder, torch_device(device), torch_dtype(dtype), kernel, trust_remote_code)


@torch.inference_mode()
def generate(
    model: Any, processor: Any, prompt: str, images: Sequence[str | Path] = (), max_new_tokens: int = 128
) -> str:
    """The model's greedy answer to ``prompt``, with the images before it, through the chat template.

    Raises MBQError for an image that is missing or corrupt.
    """
    pictures = [open_image(Path(image), "--image") for image in images]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()
