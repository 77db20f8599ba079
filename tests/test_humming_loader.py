"""A folder's packed tensors in humming-kernels' own loader, called as vLLM calls it for 3- and 4-bit weights on CUDA.

As in vLLM 0.32's ``kernels/linear/mixed_precision/humming.py`` and ``quantization/utils/humming/linear.py``: words,
scales and zero points of the linears that it fuses lie one below the other, filled up to 256 outputs and 128 inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mbq
from mbq.kernels import KERNELS
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, unpack_weight
from mbq.qtensor import dequantize
from mbq.scheme import scheme_named
from tests.tiny import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
UP = "mlp.up_proj.weight_packed"
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@pytest.mark.parametrize("linears", FUSED, ids=["qkv", "gate_up"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["W3A16", "W4A16"])
def test_humming_multiplies_a_folders_tensors_as_we_do(
    scheme: str, dtype: torch.dtype, linears: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("humming")
    model = save("llava_onevision", tmp_path / "float", hidden=256, dtype=dtype)
    folder = mbq.quantize(model, scheme=scheme, method="rtn", output=tmp_path / "packed").folder
    assert folder is not None
    tensors = load_file(folder / "model.safetensors", device="cuda")
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    words, scale, zero_point = (
        torch.cat([tensors[f"{_stored(tensors)}{path}.{name}"] for path in linears]) for name in names
    )
    weight = PackedWeight(words, scale, zero_point, (len(words), 256), scheme_named(scheme))
    multiply = as_vllm(weight, dtype)
    exact = dequantize(unpack_weight(weight)).double()
    ours = KERNELS["cuda"].prepare(weight)
    for rows in (1, 5, 16, 100):
        x = torch.randn(rows, 256, dtype=dtype, device="cuda")
        wanted, found = x.double() @ exact.T, multiply(x)[:, : len(words)]
        terms = x.abs().double() @ exact.abs().T
        bound = 2 * torch.finfo(dtype).eps * terms
        assert ((found.double() - wanted).abs() <= bound).all()
        assert ((found.double() - linear(x, ours, None, "cuda").double()).abs() <= bound).all()


def _stored(tensors: dict[str, torch.Tensor]) -> str:
    """What stands before the second block's linears in the file."""
    return next(name for name in tensors if name.endswith(".layers.1.mlp.up_proj.weight_packed"))[: -len(UP)]


def as_vllm(weight: PackedWeight, dtype: torch.dtype) -> Any:
    """x -> its products, by Humming."""
    from humming.forward import humming_forward
    from humming.schema import BaseWeightSchema, HummingInputSchema
    from humming.transform import prepare_and_transform_humming_tensors

    (outputs, inputs), numbers = weight.shape, weight.scheme.weights
    schema = BaseWeightSchema.from_config(
        {
            "quant_method": "humming",
            "dtype": f"int{numbers.bits}",
            "group_size": numbers.group_size,
            "has_zero_point": not numbers.symmetric,
        }
    )
    given = {"weight": weight.words, "weight_scale": weight.scale, "zero_point": weight.zero_point}
    stacks = {"shape_n_stacks": [outputs], "shape_k_stacks": [inputs], "param_dtype": dtype}
    schema, tensors = schema.convert_humming(tensors=given, **stacks)
    input_schema, _ = HummingInputSchema().convert_humming(tensors=given, **stacks)
    config, tensors = prepare_and_transform_humming_tensors(
        tensors=tensors,
        shape_n=outputs,
        shape_k=inputs,
        weight_schema=schema,
        input_schema=input_schema,
        pad_n_to_multiple=256,
        pad_k_to_multiple=128,
        torch_dtype=dtype,
        device=weight.words.device,
    )
    locks = torch.zeros(2048, dtype=torch.int32, device="cuda")
    return lambda x: humming_forward(config, inputs=x, **tensors, locks=locks)
