"""The int8 kernel of prompts: what it reads where, what compiles, and, on a Hopper GPU, the bits of Triton's kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mbq.kernels import compiled, int8, prompt, prompt_int8
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, pack_weight
from mbq.qtensor import QTensor, quantize_activations
from mbq.scheme import SCHEMES, ActivationScheme, Scheme, WeightScheme

HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
DTYPES = [torch.float16, torch.bfloat16]
NAMES = ["W8A8", "W4A8", "W3A8", "W4A4"]


def random_weight(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu") -> QTensor:
    """Codes over their whole range; some scales zero."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    half = 2 ** (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), generator=generator).to(torch.int8)
    scale = torch.rand(outputs, 1, generator=generator) * 0.02
    scale[torch.rand(outputs, 1, generator=generator) < 0.05] = 0
    return QTensor(codes.to(device), scale.to(dtype).to(device), None, scheme.weights)


def random_x(rows: int, inputs: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of several magnitudes, a row of zeros, and quotients between two codes."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    x[::3] = torch.randint(-254, 255, (len(x[::3]), inputs), generator=generator) / 254.0
    x *= 10 ** torch.linspace(-3, 1, rows).unsqueeze(1)
    x[rows // 2] = 0
    return x.to(dtype).to(device)


# ---- what lanes read, in the terms of prompt_int8.cu ----


def swizzled(box: torch.Tensor) -> torch.Tensor:
    """A box of bytes [rows, 64 or 128] as the copy engine leaves it: 16-byte chunks change places by the row."""
    rows, width = box.shape
    chunk, row = torch.arange(width // 16), torch.arange(rows)[:, None]
    places = chunk ^ (row % 8 if width == 128 else row // 2 % 4)
    return box.view(rows, -1, 16).gather(1, places[..., None].expand(-1, -1, 16)).reshape(-1)


def operands(memory: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [step, 16 rows, 32 inputs] of a warp's wgmmas, put together from ``unpack_stage`` lane by lane."""
    width = 16 * bits
    steps = torch.empty(4, 16, 32, dtype=torch.int8)

    def load_blocks(half: int, first: int) -> torch.Tensor:
        """ldmatrix: lane 8i + j says where row j of block i lies; lane 4g + t gets word t of rows g of all blocks."""
        rows, blocks = torch.arange(8)[None, :], torch.arange(4)[:, None]
        turn = rows if bits == 8 else rows // 2
        at = (rows + 8 * half) * width + 16 * ((first + blocks) ^ turn)
        return memory[at[..., None] + torch.arange(16)].view(4, 8, 4, 4).permute(1, 2, 0, 3)

    for half in range(2):  # rows g, then rows g + 8
        low = load_blocks(half, 0)
        low, high = (low, load_blocks(half, 4)) if bits == 8 else (low << 4, low & -16)
        for g, t, j in itertools.product(range(8), range(4), range(4)):
            inputs = slice(16 * (j % 2) + 4 * t, 16 * (j % 2) + 4 * t + 4)  # of A's fragment, w0, w1 or w2, w3
            steps[j // 2, 8 * half + g, inputs] = low[g, t, j]
            steps[2 + j // 2, 8 * half + g, inputs] = high[g, t, j]
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_lanes_read_the_codes_of_their_rows(name: str) -> None:
    """The words that are prepared for Triton's kernel, as the copy engine and ldmatrix hand them to wgmma."""
    scheme = SCHEMES[name]
    bits = 8 if scheme.weights.bits == 8 else 4
    q = random_weight(scheme, 16, 256, torch.float16)
    words = int8.prepare(pack_weight(q, scheme)).words
    assert prompt_int8.weight_row(PackedWeight(words, q.scale, None, (16, 256), scheme)) == 16 * bits
    for stage in range(2):
        box = words[:, stage * 16 * bits : (stage + 1) * 16 * bits]
        steps = operands(swizzled(box.contiguous()), bits)
        expected = q.codes[:, stage * 128 : (stage + 1) * 128].view(16, 4, 32).transpose(0, 1)
        assert torch.equal(steps, expected if bits == 8 else expected * 16)


# ---- plans ----


@pytest.mark.parametrize(("bits", "dtype", "tile"), [(4, torch.bfloat16, 256), (8, torch.float16, 240)])
def test_the_source_compiles(kernel_cache: Path, bits: int, dtype: torch.dtype, tile: int) -> None:
    scheme = SCHEMES["W4A8" if bits == 4 else "W8A8"]
    options = dict(prompt_int8.options(PackedWeight(*3 * [torch.empty(0)], (8, 128), scheme), dtype, tile))
    source = compiled.read_source("prompt_int8.cu")
    assert compiled.cubin_of(source, "prompt_int8.cu", "90a", options).startswith(b"\x7fELF")


@pytest.mark.parametrize(("inputs", "gated"), [(1152, False), (18944, True)])
def test_the_source_of_quantization_compiles(kernel_cache: Path, inputs: int, gated: bool) -> None:
    threads, vectors = prompt_int8.block_of(inputs)
    options = {"BITS": 8, "GROUP": 0, "BF16": 1, "MOST": 127, "GATED": int(gated), "THREADS": threads}
    source = compiled.read_source("quantize.cu")
    cubin = compiled.cubin_of(source, "quantize.cu", "90a", options | {"VECTORS": vectors})
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("inputs", [8, 72, 1152, 3584, 18944, 32768, 65536])
def test_a_block_has_every_input_of_a_row(inputs: int) -> None:
    threads, vectors = prompt_int8.block_of(inputs)
    assert threads % 32 == 0
    assert threads <= 1024
    assert threads * vectors * 8 >= inputs
    assert threads * (vectors - 1) * 8 < inputs
    assert vectors <= prompt_int8.MOST_VECTORS


@pytest.mark.parametrize("tile", prompt_int8.ROWS)
@pytest.mark.parametrize("name", ["W4A8", "W8A8"])
def test_it_fits_a_multiprocessor(name: str, tile: int) -> None:
    weight = PackedWeight(*3 * [torch.empty(0)], (8, 128), SCHEMES[name])
    chosen = dict(prompt_int8.options(weight, torch.float16, tile))
    assert chosen["STAGES"] >= 4
    assert chosen["BUFFERS"] >= 3
    row = prompt_int8.weight_row(weight)
    assert prompt_int8.shared_bytes(tile, row, chosen["STAGES"], chosen["BUFFERS"]) <= prompt.SHARED_BYTES
    assert tile % prompt_int8.chunk_of(tile) == 0
    assert prompt_int8.chunk_of(tile) % 16 == 0


def test_prompts_go_on_where_the_kernel_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise compiled.CompilationError("NVRTC cannot compile prompt_int8.cu for sm_90a: no such architecture")

    monkeypatch.setattr(compiled, "library", failing)
    prompt_int8._compiled.cache_clear()
    with pytest.warns(UserWarning, match=r"run in Triton, slower: NVRTC cannot compile .* architecture") as told:
        found = [prompt_int8._function((("BITS", 4), ("ROWS", 64), ("STAGES", 4), ("BUFFERS", 3)), 0) for _ in range(2)]
    prompt_int8._compiled.cache_clear()
    assert found == [None, None]
    assert len(told) == 1


# ---- on a GPU ----


def check(
    scheme: Scheme, rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool, gated: bool = False
) -> None:
    """The integers' products within a rounding, bit for bit what Triton's kernel gives, and nothing beside them."""
    q = random_weight(scheme, outputs, inputs, dtype, "cuda")
    weight = int8.prepare(pack_weight(q, scheme))
    offset = torch.randn(outputs, dtype=dtype, device="cuda") if bias else None
    x = random_x(rows, inputs * (2 if gated else 1), dtype, "cuda")
    poisoned = torch.full((rows + 16, outputs), torch.nan, dtype=dtype, device="cuda")
    y = poisoned[8:-8]
    assert prompt_int8.takes(x, weight, offset)
    found = []
    for _ in range(2):
        y.fill_(torch.nan)
        int8.prompt_products(x, weight, offset, y, gated)
        found.append(y.clone())
    assert torch.equal(*found), "not the same from run to run"
    assert poisoned[:8].isnan().all()
    assert poisoned[-8:].isnan().all()
    by_triton = torch.empty_like(y)
    tiles = int8.tiles_for(rows, int8.has_nibbles(scheme), x.device)
    int8.products(x, weight, offset, by_triton, tiles, gated)
    assert torch.equal(y, by_triton)
    if gated:
        return
    assert scheme.activations is not None
    codes, scale = quantize_activations(x, scheme.activations)
    expected = (codes.double() @ q.codes.double().T) * scale.double() * q.scale.double().T
    terms = expected.abs()
    if offset is not None:
        expected, terms = expected + offset.double(), terms + offset.double().abs()
    kind = torch.finfo(dtype)
    bound = kind.eps / 2 * expected.abs() * 1.001 + 2e-7 * terms + kind.tiny * kind.eps
    assert ((y.double() - expected).abs() <= bound).all()


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_of_prompts_are_exact(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(prompt_int8, "PROMPT_ROWS", 0)
    shapes = [(8, 8), (40, 128), (1000, 384), (264, 1160), (4304, 1152), (1152, 4304)]
    for rows, (outputs, inputs) in itertools.product((5, 81, 333, 729), shapes):
        check(SCHEMES[name], rows, outputs, inputs, dtype, bias=rows % 2 == 1 and outputs % 16 == 8)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("tile", prompt_int8.ROWS)
def test_tiles_of_every_size(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Fewer and more tiles than clusters, several bands, odd numbers of stages, and tiles that are cut off."""
    monkeypatch.setattr(prompt_int8, "ROWS", (tile,))
    for name, dtype in itertools.product(("W4A8", "W8A8"), DTYPES):
        for rows, outputs, inputs in ((333, 4608, 1152), (1027, 8200, 256), (4095, 264, 136)):
            check(SCHEMES[name], rows, outputs, inputs, dtype, bias=rows == 333)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["W4A8", "W8A8"])
def test_prompts_of_real_models(name: str) -> None:
    for outputs, inputs in ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)):
        check(SCHEMES[name], 2048, outputs, inputs, torch.bfloat16, bias=False)
    check(SCHEMES[name], 1000, 3584, 18944, torch.bfloat16, bias=True, gated=True)
    check(SCHEMES[name], 515, 640, 1896, torch.float16, bias=True, gated=True)


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_tritons(dtype: torch.dtype) -> None:
    from mbq.kernels import int8_source as source

    for inputs, bits, gated in itertools.product((8, 72, 1152, 3584, 18944, 40000), (8, 4), (False, True)):
        x = random_x(77, inputs * (2 if gated else 1), dtype, "cuda")
        (codes, scales), (wanted, wanted_scales) = (
            prompt_int8.quantize(x, bits, gated),
            source.quantize(x, bits, gated=gated),
        )
        assert torch.equal(codes, wanted)
        assert torch.equal(scales, wanted_scales)
        if not gated:
            assert torch.equal(codes, quantize_activations(x, ActivationScheme(bits))[0])


@HOPPER
@pytest.mark.gpu
def test_codes_that_a_norm_made_are_taken() -> None:
    weight = int8.prepare(
        pack_weight(random_weight(SCHEMES["W4A8"], 640, 1152, torch.float16, "cuda"), SCHEMES["W4A8"])
    )
    x = random_x(100, 1152, torch.float16, "cuda")
    y, codes = int8.rms_norm(x, torch.rand(1152, dtype=torch.float16, device="cuda"), 1e-6, 8)
    assert torch.equal(int8.linear(y, weight, None, quantized=codes), int8.linear(y, weight, None))


@HOPPER
@pytest.mark.gpu
def test_prompts_in_graphs_strided_and_of_other_types() -> None:
    scheme = SCHEMES["W4A8"]
    packed = pack_weight(random_weight(scheme, 648, 512, torch.float16, "cuda"), scheme)
    weight, wide = int8.prepare(packed), random_x(900, 1030, torch.float16, "cuda").view(3, 300, 1030)
    x = wide[..., 1:513]
    y = linear(x, weight, None, "triton")
    assert y.shape == (3, 300, 648)
    assert torch.equal(linear(x.contiguous(), weight, None, "triton"), y)
    parts = [linear(part, weight, None, "triton") for part in x.reshape(900, 512).split(100)]
    assert torch.equal(torch.cat(parts), y.view(900, 648)), "few rows give other bits than many"
    graph, static = torch.cuda.CUDAGraph(), torch.zeros(900, 512, dtype=torch.float16, device="cuda")
    with torch.cuda.graph(graph):
        replayed = linear(linear(static, weight, None, "triton")[:, :512].contiguous(), weight, None, "triton")
    static.copy_(x.reshape(900, 512))
    graph.replay()
    assert torch.equal(replayed, linear(y.view(900, 648)[:, :512].contiguous(), weight, None, "triton"))
    assert not prompt_int8.takes(static.float(), weight, None)
    assert not prompt_int8.takes(static, weight, torch.zeros(648, device="cuda"))
    odd = replace(packed, words=packed.words[:644], scale=packed.scale[:644], shape=(644, 512))
    assert not prompt_int8.takes(static, int8.prepare(odd), None)


@HOPPER
@pytest.mark.gpu
def test_two_bit_weights_are_multiplied_too() -> None:
    check(Scheme("W2A8", WeightScheme(2, True, None), ActivationScheme(8)), 600, 264, 1160, torch.float16, bias=True)
