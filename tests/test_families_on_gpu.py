"""Every family on a GPU, in the kernels that ``mbq.load`` picks there: the logits and a recorded generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mbq
from mbq.generation import generate
from mbq.qlinear import QuantLinear
from tests.tiny import inputs, picture
from tests.tiny_families import BUILDERS, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("scheme", ["W3A16", "W4A8"])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_folder_says_the_same_on_a_gpu(family: str, scheme: str, tmp_path: Path) -> None:
    model, processor = tiny(family)
    size = 32 if scheme == "W3A16" else None
    mbq.quantize(model, processor, scheme=scheme, method="rtn", group_size=size, output=tmp_path / "out", device="cpu")
    plain = mbq.load(tmp_path / "out", device="cuda", dtype="float16", kernel="reference")
    fast = mbq.load(tmp_path / "out", device="cuda", dtype="float16")
    kernels = {layer.kernel for layer in fast.modules() if isinstance(layer, QuantLinear)}
    assert kernels == {"cuda" if scheme == "W3A16" else "triton"}
    given = inputs(processor).to("cuda")
    with torch.no_grad():
        expected, found = plain(**given).logits.float(), fast(**given).logits.float()
    # Half-precision sums in other orders; a code of an activation that is a step away is 1/127 of a row's largest.
    assert (found - expected).norm() <= (0.01 if scheme == "W3A16" else 0.03) * expected.norm()
    picture().save(tmp_path / "picture.png")
    said = [generate(fast, processor, "What is shown?", [tmp_path / "picture.png"], 12) for _ in range(2)]
    assert said[0] == said[1]
