"""One answer to one question about images, and a decode step without the time between its kernels.

On a GPU, Python takes longer to launch the hundreds of kernels of a step than the GPU takes to run them. ``cuda_graph``
records one step and replays it; transformers' ``generate(..., cache_implementation="static")`` compiles it, which takes
long at the start and makes fewer kernels. Both keep keys and values at fixed addresses (``StaticCache``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from mbq.chat import render
from mbq.errors import MBQError, MBQWarning
from mbq.experts import has_experts
from mbq.images import open_image


def generate(
    model: Any,
    processor: Any,
    prompt: str,
    images: Sequence[str | Path] = (),
    max_new_tokens: int = 128,
    compiled: bool = False,
) -> str:
    """The model's greedy answer to ``prompt``, with the images before it, through the chat template.

    On a GPU the steps are replayed as a CUDA graph, or, if ``compiled``, by torch.compile: slow for the first tokens.

    Raises MBQError for an image that is missing or corrupt, for a question that the processor refuses, and where a
    model cannot be compiled.
    """
    for image in images:
        if not Path(image).is_file():
            raise MBQError(f"--image {image} does not exist; check the path.")
    pictures = [open_image(Path(image), "--image") for image in images]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
    text = render(processor, [{"role": "user", "content": content}], "--prompt", add_generation_prompt=True)
    try:
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt").to(model.device, model.dtype)
    except ValueError as error:
        raise MBQError(f"The model's processor refuses the question ({error}); mend --prompt or --image.") from error
    # Which experts run is decided on the CPU, step by step.
    fixed = getattr(model, "_can_compile_fullgraph", False) and not has_experts(model)
    static = model.device.type == "cuda" and fixed
    if compiled and not static:
        raise MBQError("--compile needs a GPU, and a model that transformers can compile; leave it out.")
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    options |= {"num_beams": 1, "num_return_sequences": 1}  # whatever the folder's generation_config.json asks for
    with cuda_graph(model) if static and not compiled else nullcontext():
        tokens = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@contextmanager
def cuda_graph(model: Any) -> Iterator[None]:
    """Inside, ``model.generate(..., cache_implementation="static")`` replays a CUDA graph and compiles nothing.

    It takes the place of what transformers would compile (``get_compiled_call``): the step of one token that
    ``generate`` repeats after the prompt.
    """
    step = DecodeStep(model)
    model.get_compiled_call = lambda config: step
    try:
        # Graphs are recorded on the current device.
        with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        del model.get_compiled_call


# What positions are computed from. With positions given they say nothing, and one grows with every token (5.17).
POSITIONS_ONLY = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
# Outputs that ``generate`` keeps of every step by reference; a replay would overwrite them.
KEPT = ("output_hidden_states", "output_attentions")


class DecodeStep:
    """``model``'s forward pass for arguments of the same shapes, again and again, as one CUDA graph.

    The first pass runs as it is, and warms up. The second is recorded, and replayed at once: recording computes
    nothing. From then on arguments are copied to where the graph reads them. Other shapes or another cache start anew.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.shapes: dict[tuple[str, str], Any] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tensors: dict[tuple[str, str], torch.Tensor] = {}
        self.outputs: Any = None
        self.failed = False

    def __call__(self, **arguments: Any) -> Any:
        if arguments.get("position_ids") is not None:
            arguments = {name: value for name, value in arguments.items() if name not in POSITIONS_ONLY}
        cache, tensors = arguments.get("past_key_values"), _tensors(arguments)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if any(arguments.get(name) for name in KEPT):
            return self.model(**arguments)
        if cache is not self.cache or shapes != self.shapes:
            self.cache, self.shapes, self.graph = cache, shapes, None
            return self.model(**arguments)
        if self.graph is None and not self.failed and _fixed(cache):
            self._record(arguments, tensors)
        if self.graph is None:
            return self.model(**arguments)
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.graph.replay()
        return self.outputs

    def _record(self, arguments: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]) -> None:
        """Record the pass; where that fails, why is told once, and the steps run one kernel at a time."""
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            # A stream of its own: the one that torch keeps is on the device of the process's first recording.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                self.outputs = self.model(**_replaced(arguments, self.tensors))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"The decode step runs without a CUDA graph, slower: {reason}.", MBQWarning, stacklevel=2)
            self.failed = True
            return
        self.graph = graph


def _fixed(cache: Any) -> bool:
    """Whether all that a step changes in ``cache`` it changes on the GPU, so that a replay changes it, too.

    A sliding window's layer counts in Python.
    """
    return cache is not None and all(type(layer) is StaticLayer for layer in cache.layers)


def _tensors(arguments: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors among ``arguments``, and in dictionaries among them (masks by kind of layer)."""
    found = {}
    for name, value in arguments.items():
        for key, each in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(each, torch.Tensor):
                found[name, key] = each
    return found


def _replaced(arguments: dict[str, Any], tensors: dict[tuple[str, str], torch.Tensor]) -> dict[str, Any]:
    """``arguments`` with ``tensors`` in their places."""
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in arguments.items()}
    for (name, key), tensor in tensors.items():
        if key:
            made[name][key] = tensor
        else:
            made[name] = tensor
    return made
