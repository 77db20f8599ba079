"""The kernel of prompts: what compiles, how tiles are laid out, and, on a Hopper GPU, products against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mbq.kernels import compiled, cuda, prompt
from mbq.kernels.operator import linear
from mbq.scheme import SCHEMES, Scheme
from tests.products import COMBINATIONS, check_result, random_weight, weight_only

HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "tile"),
    [
        (2, None, torch.float16, 64),
        (3, 128, torch.bfloat16, 256),
        (3, 64, torch.float16, 240),
        (4, 32, torch.bfloat16, 192),
        (8, 128, torch.float16, 96),
    ],
)
def test_the_source_for_prompts_compiles(
    kernel_cache: Path, bits: int, group_size: int | None, dtype: torch.dtype, tile: int
) -> None:
    _, packed = random_weight(weight_only(bits, group_size, False), 8, 128, dtype)
    options = dict(prompt.options(packed, dtype, tile))
    assert compiled.cubin_of(compiled.read_source("prompt.cu"), "prompt.cu", "90a", options).startswith(b"\x7fELF")


@pytest.mark.parametrize("tile", prompt.ROWS)
def test_a_prompt_kernel_fits_a_multiprocessor(tile: int) -> None:
    _, packed = random_weight(SCHEMES["W3A16"], 8, 128, torch.float16)
    stages = dict(prompt.options(packed, torch.float16, tile))["STAGES"]
    assert stages >= 4
    assert prompt.shared_bytes(tile, stages) <= prompt.SHARED_BYTES


@pytest.mark.parametrize(
    ("rows", "outputs", "tile"), [(2048, 37888, 256), (2048, 4608, 192), (2048, 3584, 240), (81, 8, 64)]
)
def test_tiles_of_a_prompt_fill_the_gpu(rows: int, outputs: int, tile: int) -> None:
    """On 66 clusters: 18 rounds of 1,184 pairs of tiles, 3 of 198, 2 of 126; one of two."""
    assert prompt.rows_of_tile(rows, outputs, 66) == tile


@pytest.mark.parametrize("rows", [81, 2048, 8192, 8193, 100_000])
def test_bands_of_a_prompt_are_equal(rows: int) -> None:
    order = prompt.order_of(rows, 4608, 240)
    assert order.row_tiles == -(-rows // 240)
    assert order.total == order.row_tiles * order.pairs
    assert order.band <= prompt.BAND
    assert -(-order.row_tiles // order.band) * order.band - order.row_tiles < order.band


def test_a_prompt_goes_on_where_its_kernel_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise compiled.CompilationError("NVRTC cannot compile prompt.cu for sm_90a: no such architecture")

    monkeypatch.setattr(compiled, "library", failing)
    prompt._function.cache_clear()
    with pytest.warns(
        UserWarning, match=r"through a 16-bit weight, slower: NVRTC cannot compile .* architecture"
    ) as told:
        found = [prompt._function((("ROWS", 64), ("STAGES", 4)), 0) for _ in range(2)]
    prompt._function.cache_clear()
    assert found == [None, None]
    assert len(told) == 1


# ---- on a GPU ----


def check_prompt(scheme: Scheme, rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> None:
    """Its own kernel, on memory that was not a number before, and no row or output beside its own."""
    q, packed = random_weight(scheme, outputs, inputs, dtype, "cuda", seed=rows)
    weight = cuda.prepare(packed)
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    offset = torch.randn(outputs, dtype=dtype, device="cuda") if bias else None
    found = []
    for _ in range(2):
        torch.full((rows, outputs), torch.nan, dtype=dtype, device="cuda")  # freed at once, and taken for the result
        found.append(prompt.linear(x, weight, offset))
    assert found[0] is not None
    check_result(found[0], q, x, offset)
    assert torch.equal(*found), "not the same from run to run"


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), COMBINATIONS)
def test_prompts_are_products_of_the_dense_weight(
    bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = weight_only(bits, group_size, symmetric)
    reason = cuda.supports(scheme, (8, 128), torch.device("cuda"), dtype)
    if reason:
        pytest.skip(reason)
    shapes = [(8, 128), (1000, 384), (4104, 1024)]
    shapes += [(72, 160)] if group_size == 32 else [(72, 200)] if group_size is None else []
    for rows, (outputs, inputs) in zip((81, 201, 129, 256), shapes, strict=False):
        check_prompt(scheme, rows, outputs, inputs, dtype, bias=rows % 2 == 1)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("tile", prompt.ROWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prompts_in_tiles_of_every_size(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: int) -> None:
    """Fewer and more tiles than clusters, several bands, and tiles that are cut off."""
    monkeypatch.setattr(prompt, "ROWS", (tile,))
    for rows, outputs, inputs in ((81, 40, 2176), (333, 4608, 1152), (1027, 8200, 256), (4095, 264, 128)):
        check_prompt(SCHEMES["W3A16"], rows, outputs, inputs, dtype, bias=rows == 333)


@HOPPER
@pytest.mark.gpu
def test_prompts_of_real_models() -> None:
    for outputs, inputs in ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)):
        check_prompt(SCHEMES["W3A16"], 2048, outputs, inputs, torch.bfloat16, bias=False)


@HOPPER
@pytest.mark.gpu
def test_prompts_in_graphs_strided_and_with_outputs_that_do_not_fit() -> None:
    q, packed = random_weight(SCHEMES["W3A16"], 644, 512, torch.float16, "cuda")
    weight, wide = cuda.prepare(packed), torch.randn(3, 100, 1026, dtype=torch.float16, device="cuda")
    assert prompt.linear(wide[0, :, :512].contiguous(), weight, None) is None  # 644 outputs are no multiple of 8
    check_result(linear(wide[0, :, 1:513], weight, None, "cuda"), q, wide[0, :, 1:513], None)
    q, packed = random_weight(SCHEMES["W3A16"], 648, 512, torch.float16, "cuda")
    weight, x = cuda.prepare(packed), wide[..., 1:513]
    y = linear(x, weight, None, "cuda")
    assert y.shape == (3, 100, 648)
    check_result(y.view(300, 648), q, x.reshape(300, 512), None)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros(300, 512, dtype=torch.float16, device="cuda")
    with torch.cuda.graph(graph):
        replayed = linear(linear(static, weight, None, "cuda")[:, :512].contiguous(), weight, None, "cuda")
    static.copy_(x.reshape(300, 512))
    graph.replay()
    assert torch.equal(replayed, linear(y.view(300, 648)[:, :512].contiguous(), weight, None, "cuda"))
