"""Quantized activations in Triton against exact integers: in the interpreter here, with real shapes on a GPU."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from mbq.kernels import KERNELS, int8
from mbq.kernels import triton as kernel
from mbq.kernels.int8 import HOPPER, PORTABLE, Tiles
from mbq.kernels.operator import linear
from mbq.kernels.packed import pack_weight, unpack_weight
from mbq.qtensor import QTensor, quantize_activations
from mbq.scheme import SCHEMES, ActivationScheme, Scheme, WeightScheme

pytest.importorskip("triton")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])

INTEGER_SCHEMES = [scheme for scheme in SCHEMES.values() if scheme.activations is not None]
TABLES = [tiles for table in (*HOPPER.values(), PORTABLE) for _, tiles in table]
# W2A8 is no named scheme, and runs.
INTEGER_SCHEMES.append(Scheme("W2A8", WeightScheme(2, True, None), ActivationScheme(8)))
SMALL = Tiles(16, 16, 128)


def random_weight(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> QTensor:
    """Codes over their whole range, the ends among them; some scales zero."""
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (scheme.weights.bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), generator=generator).to(torch.int8)
    codes[0], codes[1] = -half, half - 1
    scale = torch.rand(outputs, 1, generator=generator) * 0.02
    scale[torch.rand(outputs, 1, generator=generator) < 0.05] = 0
    return QTensor(codes.to(DEVICE), scale.to(dtype).to(DEVICE), None, scheme.weights)


def random_x(rows: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of several magnitudes; many halves of steps, where a quotient decides which way a code goes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    x[::3] = torch.randint(-254, 255, (len(x[::3]), inputs), generator=generator) / 254.0
    x *= 10 ** torch.linspace(-3, 1, rows).unsqueeze(1)
    if rows > 3:
        x[3] = 0
    return x.to(dtype).to(DEVICE)


def exact(codes: torch.Tensor, q: QTensor) -> torch.Tensor:
    """The int64 sums; a float64 holds them."""
    return (codes.double() @ q.codes.double().T).long()


def check(scheme: Scheme, rows: int, outputs: int, inputs: int, dtype: torch.dtype, tiles: Tiles | None) -> None:
    """Products through ``tiles`` (None: those that the operator picks) are the integers', within one rounding."""
    q, x = random_weight(scheme, outputs, inputs, dtype, seed=rows), random_x(rows, inputs, dtype)
    weight = kernel.prepare(pack_weight(q, scheme))
    bias = torch.randn(outputs).to(dtype).to(DEVICE) if outputs % 16 else None
    assert scheme.activations is not None
    codes, scale = quantize_activations(x, scheme.activations)
    expected = exact(codes, q) * scale.double() * q.scale.double().T + (0 if bias is None else bias.double())
    if tiles is None:
        got = linear(x, weight, bias, "triton")
        assert torch.equal(got, linear(x, weight, bias, "triton")), "not the same from run to run"
    else:
        poisoned = torch.full((rows + 2, outputs), torch.nan, dtype=dtype, device=DEVICE)
        got = poisoned[1:-1]
        int8.products(x, weight, bias, got, tiles)
        assert poisoned[0].isnan().all()
        assert poisoned[-1].isnan().all()
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny * eps  # the last place of the smallest numbers
    terms = expected.abs() + (0 if bias is None else bias.double().abs())
    assert ((got.double() - expected).abs() <= eps / 2 * expected.abs() * 1.001 + 2e-7 * terms + tiny).all()


# ---- quantization ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [8, 64, 72, 1152, 3584])
def test_codes_and_scales_are_the_references(inputs: int, bits: int, dtype: torch.dtype) -> None:
    from mbq.kernels import int8_source as source

    x = random_x(7, inputs, dtype)
    cleared = torch.full((2 * source.ZEROS,), 7, dtype=torch.int32, device=DEVICE)
    codes, scales = source.quantize(x, bits, cleared)
    expected_codes, expected_scale = quantize_activations(x, ActivationScheme(bits))
    assert torch.equal(scales, expected_scale.squeeze(1))
    assert torch.equal(codes, expected_codes)
    assert codes.stride(0) % 16 == 0
    assert not cleared.any()


def test_strided_and_misaligned_rows_are_quantized() -> None:
    from mbq.kernels import int8_source as source

    wide = random_x(5, 300, torch.float16)
    for x in (wide[:, 1:200], wide[1:4, 3:75], wide[::2, 8:136]):
        codes, _ = source.quantize(x, 8)
        assert torch.equal(codes, quantize_activations(x, ActivationScheme(8))[0])


# ---- the layout ----


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES, ids=lambda scheme: scheme.name)
def test_prepared_codes_are_read_back(scheme: Scheme) -> None:
    q = random_weight(scheme, 24, 200, torch.float16)
    packed = pack_weight(q, scheme)
    words = int8.prepare(packed).words
    if scheme.weights.bits > 4:
        assert words.shape == (24, 208)
        assert torch.equal(words[:, :200], q.codes)
        return
    assert words.shape == (24, 128), "half a byte an input"
    runs = words.unflatten(1, (2, 64))
    read = torch.stack([(runs << 4) >> 4, runs >> 4], 2).flatten(1)
    assert torch.equal(read[:, :200], q.codes)
    assert not read[:, 200:].any()
    assert torch.equal(unpack_weight(packed).codes, q.codes)


# ---- products ----


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 8, 8), (5, 40, 72), (37, 24, 200), (3, 16, 1152)])
def test_the_operator_is_exact(scheme: Scheme, rows: int, outputs: int, inputs: int) -> None:
    check(scheme, rows, outputs, inputs, torch.float16, None)


@pytest.mark.parametrize("tiles", TABLES, ids=lambda tiles: f"{tiles.rows}x{tiles.outputs}x{tiles.depth}")
def test_every_tiling_is_exact(tiles: Tiles) -> None:
    schemes = ["W4A8", "W8A8"] if tiles.weight_first else ["W8A8"]
    for name in schemes:
        check(SCHEMES[name], tiles.rows + 3, tiles.outputs + 8, 264, torch.float16, tiles)


@pytest.mark.parametrize("name", ["W4A8", "W8A8"])
@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("depth", [128, 256])
def test_tiles_are_shared_along_the_inputs(
    name: str, weight_first: bool, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles and shared ones, with as many programs as the interpreter pretends to have and others."""
    if name == "W4A8" and not weight_first:
        return
    monkeypatch.setattr(int8, "SPLIT_GAIN", 1)
    for processors, (rows, outputs) in itertools.product((1, 2, 5, 7), ((9, 24), (40, 56))):
        monkeypatch.setattr(int8, "multiprocessors", lambda device, count=processors: count)
        tiles = replace(SMALL, depth=depth, weight_first=weight_first, group=2)
        check(SCHEMES[name], rows, outputs, 1000, torch.float32, tiles)


def test_every_step_of_every_tile_is_dealt_out_once() -> None:
    """The arithmetic of ``_products`` in plain Python: whole tiles, and runs of steps of the shared ones."""
    for rows, outputs, inputs, processors in itertools.product(
        (1, 130, 2048), (128, 4608), (128, 3584, 18944), (3, 132)
    ):
        for tiles in TABLES:
            programs, whole, shared = int8.plan(rows, outputs, inputs, tiles, processors)
            count = -(-rows // tiles.rows) * -(-outputs // tiles.outputs)
            steps = -(-inputs // tiles.depth)
            assert whole + shared == count
            assert 1 <= programs <= processors * tiles.programs
            done = [0] * count
            for program in range(programs):
                mine = -(-(whole - program) // programs)
                first, last = (place * shared * steps // programs for place in (program, program + 1))
                parts = (last - 1) // steps - first // steps + 1 if last > first else 0
                for item in range(mine + parts):
                    part = first // steps + item - mine
                    begin, end = (
                        (0, steps) if item < mine else (max(first - part * steps, 0), min(last - part * steps, steps))
                    )
                    assert 0 <= begin < end <= steps
                    done[program + item * programs if item < mine else whole + part] += end - begin
            assert done == [steps] * count


@pytest.mark.parametrize("name", ["W4A8", "W8A8"])
def test_strided_and_misaligned_inputs(name: str) -> None:
    scheme = SCHEMES[name]
    packed = pack_weight(random_weight(scheme, 24, 128, torch.float16), scheme)
    weight = kernel.prepare(packed)
    wide = random_x(6, 300, torch.float16)
    for x in (
        wide[:, 1:129],
        wide[:, ::2][:, :128],
        wide[2:3, 3:131],
        wide[0, 5:133],
        wide[:, :256].view(3, 2, 256)[..., 128:],
    ):
        expected = KERNELS["reference"].linear(x, packed, None)
        torch.testing.assert_close(linear(x, weight, None, "triton"), expected, rtol=1e-3, atol=1e-6)
    assert linear(wide[:0, :128], weight, None, "triton").shape == (0, 24)


def test_what_it_does_not_know_is_said() -> None:
    cpu = torch.device("cpu")
    grouped = Scheme("W4A8", WeightScheme(4, True, 128), ActivationScheme(8))
    assert "one symmetric scale a row" in (kernel.supports(grouped, (8, 128), cpu, torch.float16) or "")
    reason = kernel.supports(SCHEMES["W8A8"], (8, 2**17), cpu, torch.float16)
    assert reason == "the sums of 131072 inputs do not fit 32 bits; it takes up to 131071"


# ---- on a GPU ----


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", INTEGER_SCHEMES, ids=lambda scheme: scheme.name)
def test_real_shapes(scheme: Scheme, dtype: torch.dtype) -> None:
    for outputs, inputs in ((4608, 3584), (3584, 18944), (4304, 1152), (1152, 4304), (1000, 1096)):
        for rows in (1, 16, 17, 64, 130, 729, 2048):
            check(scheme, rows, outputs, inputs, dtype, None)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_humming_gives_the_same_products(dtype: torch.dtype) -> None:
    """The codes and scales of x are mbq's, the sums exact: what differs is rounded twice, before and after the bias."""
    pytest.importorskip("humming")
    kernel = KERNELS["humming"]
    for outputs, inputs in ((640, 512), (4608, 3584), (3584, 18944)):
        q = random_weight(SCHEMES["W4A8"], outputs, inputs, dtype)
        packed = pack_weight(q, SCHEMES["W4A8"])
        assert kernel.supports(SCHEMES["W4A8"], (outputs, inputs), packed.words.device, dtype) is None
        prepared, bias = kernel.prepare(packed), torch.randn(outputs, dtype=dtype, device=DEVICE)
        for rows in (1, 16, 17, 130, 2048):
            x = random_x(rows, inputs, dtype)
            for offset in (None, bias):
                found = linear(x, prepared, offset, "humming")
                wanted = linear(x, int8.prepare(packed), offset, "triton")
                terms = wanted.abs() + (0 if offset is None else 2 * offset.abs())
                assert ((found.float() - wanted.float()).abs() <= 2 * torch.finfo(dtype).eps * terms + 1e-5).all()


@GPU
@pytest.mark.gpu
def test_graphs_streams_and_devices() -> None:
    for index in range(torch.cuda.device_count()):
        scheme = SCHEMES["W4A8"]
        packed = pack_weight(random_weight(scheme, 640, 512, torch.bfloat16), scheme)
        packed = replace(packed, words=packed.words.to(f"cuda:{index}"), scale=packed.scale.to(f"cuda:{index}"))
        weight = kernel.prepare(packed)
        x = random_x(100, 512, torch.bfloat16).to(f"cuda:{index}")
        expected = linear(x, weight, None, "triton")
        with torch.cuda.device(index):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                assert torch.equal(linear(x, weight, None, "triton"), expected)
            torch.cuda.synchronize()
            graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
            with torch.cuda.graph(graph, stream=stream):
                y = linear(static, weight, None, "triton")
            static.copy_(x)
            for _ in range(3):
                graph.replay()
            assert torch.equal(y, expected)
