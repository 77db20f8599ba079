"""Experts in a checkpoint one by one, as vLLM reads quantized ones: ``mlp.experts.7.up_proj.weight_packed``.

transformers 5 has all experts of a block in two tensors, and merges single ones when it loads most families. Where a
model has linears for them (``experts.split_experts``), nothing is to be merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_utils

from mbq.kernels.packed import is_packed
from mbq.scheme import Scheme

# Published with all experts of a block in a tensor, so that transformers knows no names of single ones.
WITHOUT_NAMES = ("qwen3_vl_moe",)

_LACKS = (
    "transformers alone must not load this folder: 5.23 {what}, and a plain `from_pretrained` {outcome}. "
    "Use `mbq.load`."
)
_REGISTER = """

```python
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

register_checkpoint_conversion_mapping("{0}", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
```

"""


def transformers_note(model_type: str, scheme: Scheme) -> str:
    """Markdown for the model card of a mixture of experts: whether transformers alone loads it, and how."""
    nameless = model_type in WITHOUT_NAMES
    if not scheme.weights.symmetric or not is_packed(scheme):
        what = "reads single experts from packed symmetric weights only"
        outcome = "makes up random experts, with no more than a report" if nameless else "ends with an error"
        return _LACKS.format(what=what, outcome=outcome)
    call = "`from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))`"
    exact = "to exactly the weights that `mbq.load` runs, unpacked to 16 bit, and leaves activations in 16 bit"
    if not nameless:
        return f"transformers 5.23 alone loads this folder with {call}, {exact}."
    return (
        f"transformers 5.23 alone loads this folder with {call}, {exact}, once it has been told the names of single "
        f"experts:{_REGISTER.format(model_type)}Without these lines it makes up random experts, with no more than a "
        "report."
    )


def vllm_note(scheme: Scheme) -> str:
    """Markdown for the model card of a mixture of experts: what vLLM makes of it.

    From ``compressed_tensors_moe.py`` at vLLM's 0043d6b, and the classes that it chooses from.
    """
    read = "read in its source, not run"
    if scheme.weights.symmetric and (scheme.weights.bits == 8 or (scheme.weights.bits == 4 and not scheme.activations)):
        return f"vLLM reads the experts under these names, and has kernels for such weights ({read})."
    return (
        f"vLLM reads the experts under these names, but has no kernels for such weights ({read}): W4A16_SYM and W8A8 "
        "are those to serve."
    )


@contextmanager
def unmerged() -> Iterator[None]:
    """Inside, transformers' loading leaves single experts as they are."""
    before = modeling_utils.get_model_conversion_mapping

    def without(*args: Any, **kwargs: Any) -> list[Any]:
        return [each for each in before(*args, **kwargs) if not any(".experts." in t for t in each.target_patterns)]

    modeling_utils.get_model_conversion_mapping = without
    try:
        yield
    finally:
        modeling_utils.get_model_conversion_mapping = before
