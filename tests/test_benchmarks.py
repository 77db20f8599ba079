"""What the GPU benchmarks do besides timing."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import decode_models, decode_step, engines_page, prefill, scaling_page, search
from mbq.kernels.packed import pack_weight
from mbq.kernels.reference import linear
from mbq.qtensor import QTensor
from mbq.scheme import SCHEMES


@pytest.mark.parametrize("name", prefill.QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wrong_products_are_counted(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    half = 2 ** (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, (40, 256), dtype=torch.int8)
    q = QTensor(codes, torch.full((40, 1), 0.01, dtype=dtype), None, scheme.weights)
    x = torch.randn(150, 256, dtype=dtype)
    y = linear(x, pack_weight(q, scheme), None)
    assert prefill.wrong(y, x, q) == 0
    y[0, 3] += y[0].abs().max()
    y[149, 39] = torch.nan
    assert prefill.wrong(y, x, q) == 2
    assert prefill.wrong(y * (1 + 2 * torch.finfo(dtype).eps), x, q) > 1000
    assert prefill.wrong(y * (1 + 2 * torch.finfo(dtype).eps), x, q, roundings=8) == 2


def test_a_prompts_table_sums_the_layer() -> None:
    found = [
        {"way": way, "shape": shape, "rows": 128, "microseconds": time}
        for way, time in (("16 bit", 30.0), ("W4A8", 20.0))
        for shape in prefill.LAYER
    ]
    lines = [line.split() for line in prefill.table(found)]
    assert ["M=128", "layer", "120.0", "80.0"] in lines
    assert ["M=128", "16", "bit", "/", "it", "1.00", "1.50"] in lines


def test_copies_are_larger_than_the_cache_together() -> None:
    tensor = torch.arange(2**20)
    copies = prefill.copies_of(tensor)
    assert sum(each.nbytes for each in copies) > prefill.ROTATE_BYTES
    assert len({each.data_ptr() for each in copies}) == len(copies)
    assert all(torch.equal(each, tensor) for each in copies)


def test_the_command_of_a_prompt_can_be_typed_again() -> None:
    args = argparse.Namespace(tune=False, rows=list(prefill.ROWS), dtype="bfloat16", peers=["humming"])
    assert prefill.command_of(args) == "python -m benchmarks.prefill --dtype bfloat16 --peers humming"
    args = argparse.Namespace(tune=True, rows=[1, 2], dtype="float16", peers=[])
    assert prefill.command_of(args) == "python -m benchmarks.prefill --tune --dtype float16 --rows 1 2"


def test_a_step_is_compared_with_both_kinds_of_16_bits() -> None:
    found = {"bf16": {"sdpa": {"eager": 60.0, "compiled": 50.0}, "mbq": {"eager": 40.0}}, "W3A16": {}}
    found["W3A16"]["mbq"] = {"eager": 20.0, "compiled": 10.0}
    decode_step.compare("qwen2_vl", "W3A16", found)
    ratios = found["W3A16"]["ratios"]
    assert ratios == {"eager": {"over_bf16_sdpa": 3.0, "over_bf16_mbq": 2.0}, "compiled": {"over_bf16_sdpa": 5.0}}


def test_the_models_of_a_step_have_their_published_sizes() -> None:
    """Parameters in billions, as the model cards give them: 8.03 and 8.29, without weights."""
    for family, billions in (("llava_onevision", 8.03), ("qwen2_vl", 8.29)):
        made, config = decode_models.FAMILIES[family]()
        with torch.device("meta"):
            model = made(config)
        assert sum(each.numel() for each in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.02)


def test_a_race_is_judged_by_the_exhaustive_losses() -> None:
    """Two groups; the race that begins with 128 tokens misses one by a candidate whose loss is 5 % above the least."""
    losses = [2.0] * 20
    losses[4], losses[5] = 1.0, 1.05

    def row(alpha: float) -> dict[str, object]:
        return {"alphas": dict.fromkeys(map(str, (*search.FIRST, None)), 0.2) | {"128": alpha}, "losses": losses}

    seconds = dict.fromkeys(map(str, search.FIRST), 2.0) | {"None": 16.0}
    made = search.summary([row(0.2), row(0.25)], seconds)
    expected = {"equal": 0.5, "worse, mean %": 2.5, "worse, most %": 5.0, "seconds": 2.0, "times faster": 8.0}
    assert made["128"] == pytest.approx(expected)
    assert made["512"]["equal"] == made["None"]["equal"] == 1


def test_the_page_of_scaling_shows_what_is_stored() -> None:
    shown = scaling_page.PAGE.read_text(encoding="utf-8").partition(scaling_page.BEGIN)
    assert shown[1] + shown[2] == scaling_page.page()


def test_the_page_of_engines_shows_what_is_stored() -> None:
    shown = engines_page.PAGE.read_text(encoding="utf-8").partition(engines_page.BEGIN)
    assert shown[1] + shown[2] == engines_page.page()
