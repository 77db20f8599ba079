"""The operator's contract, the CUDA kernel's layout, and, on a GPU, its products against float64."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mbq.errors import MBQError
from mbq.kernels import KERNELS, choose, compiled, cuda
from mbq.kernels.operator import linear
from mbq.kernels.packed import PackedWeight, Pointers, pack_weight
from mbq.qtensor import dequantize, quantize
from mbq.scheme import SCHEMES, Scheme
from tests.products import COMBINATIONS, check_result, random_weight, weight_only

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# ---- the operator ----


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_the_operator_keeps_its_contract(scheme: Scheme) -> None:
    packed = pack_weight(quantize(torch.randn(24, 256), scheme.weights), scheme)
    weights, activations = scheme.weights, scheme.activations
    arguments = (
        *(torch.randn(2, 3, 256), packed.words, packed.scale, packed.zero_point, torch.randn(24), 24, 256, "reference"),
        *(weights.bits, weights.symmetric, weights.group_size, activations and activations.bits),
    )
    torch.library.opcheck(torch.ops.mbq.linear.default, arguments)


def test_the_operator_is_compiled_without_a_break() -> None:
    packed = pack_weight(quantize(torch.randn(24, 256), SCHEMES["W3A16"].weights), SCHEMES["W3A16"])
    x = torch.randn(5, 256)

    def two(x: torch.Tensor) -> torch.Tensor:
        return linear(x, packed, None, "reference").relu()

    assert torch.equal(torch.compile(two, fullgraph=True, backend="aot_eager")(x), two(x))


def test_a_wrong_input_is_answered_in_a_sentence() -> None:
    packed = pack_weight(quantize(torch.randn(24, 256), SCHEMES["W3A16"].weights), SCHEMES["W3A16"])
    with pytest.raises(MBQError, match="x has 128 inputs, and the weight has 256"):
        linear(torch.randn(2, 128), packed, None, "reference")
    with pytest.raises(MBQError, match="x is on meta, and the weight on cpu"):
        linear_on(torch.empty(2, 256, device="meta"), packed)
    with pytest.raises(MBQError, match="x is int64; a quantized linear takes floats"):
        linear(torch.ones(2, 256, dtype=torch.int64), packed, None, "reference")


def linear_on(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """The operator's implementation itself: for a meta tensor torch would ask the fake one."""
    from mbq.kernels.operator import _linear

    weights = weight.scheme.weights
    return _linear(
        *(x, weight.words, weight.scale, weight.zero_point, None, *weight.shape, "reference"),
        *(weights.bits, weights.symmetric, weights.group_size, None),
    )


# ---- the CUDA kernel without a GPU ----


def codes_as_the_kernel_reads_them(words: torch.Tensor, bits: int, mantissa: int) -> torch.Tensor:
    """int32 words [tiles, units, bits, 32, 4] to codes [tiles * 32, units * 128], by the rules of decode.cu."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    tiles, units = words.shape[:2]
    per_word, in_place = 16 // bits, (mantissa - bits) // bits + 1
    codes = torch.zeros(tiles, 4, 8, units, 4, 4, 4, 2, dtype=torch.int64)  # tile, row, g, unit, run, t, p, odd
    read_at = [slot % per_word % in_place * bits for slot in range(16)]
    if bits == 3:
        read_at[15] = 6 if mantissa == 10 else 0
    for q, slot in enumerate(sorted(range(16), key=read_at.__getitem__)):
        bit = read_at[slot]
        assert bit + bits <= mantissa
        if bits == 3 and slot == 15:
            pair = sum((words[:, :, j] >> 15 - j - bit) & (0x10001 << j + bit) for j in range(3))
        else:
            shift = slot % per_word // in_place * in_place * bits
            pair = (words[:, :, slot // per_word] >> shift) & ((2**bits - 1) * 0x10001 << bit)
        for odd in range(2):
            code = (pair >> 16 * odd & 0xFFFF) >> bit  # [tile, unit, lane, row]
            codes[:, :, :, :, q // 4, :, q % 4, odd] = code.view(tiles, units, 8, 4, 4).permute(0, 4, 2, 1, 3)
    return codes.reshape(tiles * 32, units * 128)


@pytest.mark.parametrize(("bits", "mantissa"), [(2, 10), (2, 7), (3, 10), (3, 7), (4, 10), (4, 7), (8, 10)])
def test_the_packed_words_are_read_back(bits: int, mantissa: int) -> None:
    codes = torch.randint(2**bits, (45, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = cuda.pack_units(codes, bits, torch.float16 if mantissa == 10 else torch.bfloat16)
    assert words.shape == (2, 3, bits, 32, 4)
    read = codes_as_the_kernel_reads_them(words, bits, mantissa)
    assert torch.equal(read[:45, :300], codes.long())
    assert not read[45:].any()
    assert not read[:, 300:].any()


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_scales_lie_beside_their_units(group_size: int | None) -> None:
    q, packed = random_weight(weight_only(3, group_size, False), 40, 384, torch.float16)
    made = cuda.prepare(packed)
    for row, unit in itertools.product(range(40), range(3)):
        for place in range(128 // group_size if group_size else 1):
            at = (row // 32, unit, place, row % 8, row % 32 // 8) if group_size else (row // 32, row % 8, row % 32 // 8)
            group = unit * 128 // group_size + place if group_size else 0
            assert made.scale[at].tolist() == [q.scale[row, group], q.zero_point[row, group]]


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "columns", "split"),
    [
        (2, 64, torch.float16, 8, 4),
        (3, 128, torch.float16, 16, 2),
        (4, None, torch.bfloat16, 8, 1),
        (8, 32, torch.float16, 8, 1),
    ],
)
def test_the_source_compiles(
    kernel_cache: Path,
    architecture: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    columns: int,
    split: int,
) -> None:
    if architecture < 80:
        dtype = torch.float16
    if architecture < 90:
        split = 1
    source = compiled.read_source("decode.cu")
    options = dict(cuda._options(weight_only(bits, group_size, False), dtype, columns, 512, split))
    cubin = compiled.cubin_of(source, "decode.cu", architecture, options)
    assert cubin.startswith(b"\x7fELF")
    [kept] = kernel_cache.iterdir()
    kept.write_bytes(b"from disk")
    assert compiled.cubin_of(source, "decode.cu", architecture, options) == b"from disk"


def test_an_unwritable_cache_is_done_without(kernel_cache: Path) -> None:
    kernel_cache.write_text("a file where the folder should be")
    assert compiled.cubin_of('extern "C" __global__ void k() {}', "k.cu", 80, {}).startswith(b"\x7fELF")


def test_a_compilation_that_fails_says_why(kernel_cache: Path) -> None:
    with pytest.raises(compiled.CompilationError, match=r"NVRTC cannot compile k\.cu for sm_90: .*error"):
        compiled.cubin_of("what is this", "k.cu", 90, {})


def test_a_gpu_without_a_compiler_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto then goes on to the next kernel."""

    def missing(*args: object) -> None:
        raise compiled.CompilationError("NVIDIA's cuda-bindings or NVRTC are not installed (ImportError)")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_function", missing)
    monkeypatch.setattr(cuda, "_architecture", lambda index: 90)
    monkeypatch.setattr(cuda, "_processors", lambda index: 132)
    cuda._warn.cache_clear()
    place = (SCHEMES["W3A16"], (64, 256), torch.device("cuda", 0), torch.float16)
    with pytest.warns(UserWarning, match=r"without the CUDA kernel, slower: .* not installed \(ImportError\)") as told:
        chosen = [choose("auto", *place) for _ in range(3)]
    assert set(chosen) <= {"triton", "reference"}
    assert len(told) == 1
    with pytest.raises(MBQError, match="The kernel 'cuda' cannot run this model: NVIDIA's cuda-bindings"):
        choose("cuda", *place)


@pytest.mark.parametrize(
    ("architecture", "tiles", "units", "columns", "split"),
    [
        (90, 112, 148, 16, 2),
        (100, 792, 64, 16, 2),
        (90, 793, 64, 16, 1),  # a warp of the 66th cluster would meet three tiles
        (90, 112, 147, 16, 1),
        (90, 112, 28, 16, 1),
        (90, 112, 148, 8, 1),
        (89, 112, 148, 16, 1),
    ],
)
def test_blocks_share_tiles_where_they_can(
    monkeypatch: pytest.MonkeyPatch, architecture: int, tiles: int, units: int, columns: int, split: int
) -> None:
    monkeypatch.setattr(cuda, "_architecture", lambda index: architecture)
    monkeypatch.setattr(cuda, "_processors", lambda index: 132)
    assert cuda.split_of(tiles, units, columns, 0) == split


# ---- the CUDA kernel in emulation ----

EMULATED = [
    (2, 64, False, torch.float16, 1, 1),
    (3, 128, False, torch.float16, 1, 1),
    (3, 128, False, torch.bfloat16, 5, 1),
    (3, 32, False, torch.bfloat16, 12, 1),
    (4, None, True, torch.float16, 8, 1),
    (8, 128, False, torch.float16, 16, 1),
    (3, None, False, torch.bfloat16, 2, 1),
    (3, 128, False, torch.float16, 1, 2),
    (3, 32, False, torch.bfloat16, 12, 2),
    (4, None, True, torch.float16, 8, 2),
    (2, 64, False, torch.float16, 3, 4),
    (3, None, False, torch.bfloat16, 16, 4),
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "dtype", "rows", "split"), EMULATED)
def test_the_source_multiplies_on_the_cpu(
    tmp_path: Path, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype, rows: int, split: int
) -> None:
    """decode.cu itself, a thread for every CUDA thread: what its lanes read, add and write, and nothing beside it."""
    torch.manual_seed(0)
    scheme = weight_only(bits, group_size, symmetric)
    outputs, inputs = (264, 128) if rows == 2 else (72, 384 if group_size == 128 else 320)
    if split > 1:  # 3 units a block and tile, or 1 of 4 blocks; the last is not full where it need not be
        inputs = 128 * (6 if split == 2 else 4) - (0 if group_size == 128 else 64)
    q, packed = random_weight(scheme, outputs, inputs, dtype)
    weight = cuda.prepare(packed)
    tiles, units = weight.words.shape[:2]
    options = cuda._options(scheme, dtype, 8 if rows <= 8 else 16, inputs, split)
    library = emulated(tmp_path, {**dict(options), "WARPS": 2})
    pointers = Pointers.of(weight)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    for clusters in (5, 9) if rows == 2 else (1, 2, 3):
        y = torch.full((rows + 1, outputs), 7.0).to(dtype)
        library.run_linear(
            *(clusters * split, pointer(x), pointers, pointer(bias), pointer(y), rows, outputs, inputs),
            cuda.plan(tiles, units, clusters, rows, split),
        )
        check_result(y[:rows], q, x, bias)
        assert (y[rows] == 7).all()
    dense = torch.full((outputs + 1, inputs), 7.0).to(dtype)
    library.run_dense(-(-tiles * units // 8), pointers, pointer(dense), outputs, inputs, tiles, units)
    assert torch.equal(dense[:outputs], dequantize(q))
    assert (dense[outputs] == 7).all()


@pytest.mark.parametrize("architecture", [80, 90])
def test_rows_beyond_a_launch_and_other_inputs_find_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: int
) -> None:
    """What the host does before and between launches, the launches in emulation: chunks of rows, strides, bias."""
    torch.manual_seed(0)
    monkeypatch.setattr(cuda, "WARPS", 2)
    monkeypatch.setattr(cuda, "SPLIT_UNITS", 2)
    monkeypatch.setattr(cuda, "_processors", lambda index: 4)
    monkeypatch.setattr(cuda, "_architecture", lambda index: architecture)
    libraries: dict[tuple, ctypes.CDLL] = {}
    launched: set[int] = set()

    class Function:
        def __init__(self, name: str, options: tuple[tuple[str, int], ...], index: int) -> None:
            if options not in libraries:
                libraries[options] = emulated(tmp_path, dict(options))
            self.run = getattr(libraries[options], f"run_{name}")

        def launch(
            self, device: torch.device, blocks: int, threads: int, arguments: list, early: bool, cluster: int = 1
        ) -> None:
            assert blocks % cluster == 0
            launched.add(cluster)
            self.run(blocks, *arguments)

    monkeypatch.setattr(cuda, "_function", Function)
    q, packed = random_weight(SCHEMES["W3A16"], 72, 256, torch.bfloat16)
    weight, bias = cuda.prepare(packed), torch.randn(72).bfloat16()
    for rows in (0, 1, 40, cuda.PACKED_ROWS + 1):
        x = torch.randn(rows, 2, 260).bfloat16()[:, 1, 3:259]  # rows apart, and not at a multiple of 16 bytes
        y = cuda.linear(x, weight, bias)
        assert y.shape == (rows, 72)
        check_result(y, q, x, bias)
    assert {dict(options)["COLUMNS"] for options in libraries} == {8, 16}
    assert launched == ({1, 2} if architecture >= 90 else {1})


def emulated(folder: Path, options: dict[str, int]) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    macros = [f"-D{name}={value}" for name, value in options.items()]
    include = f"-I{Path(cuda.__file__).parent}"
    made = folder / f"emulated-{len(list(folder.iterdir()))}.so"  # another name, or the loader gives the first again
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-x", "c++"]
    subprocess.run(
        [compiler, *flags, include, *macros, "-o", made, Path(__file__).with_name("emulation.h")], check=True
    )
    return ctypes.CDLL(str(made))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---- on a GPU ----


def check_products(scheme: Scheme, rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> None:
    q, packed = random_weight(scheme, outputs, inputs, dtype, "cuda", seed=rows)
    weight = cuda.prepare(packed)
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    offset = torch.randn(outputs, dtype=dtype, device="cuda") if bias else None
    got = linear(x, weight, offset, "cuda")
    assert got.dtype == dtype
    check_result(got, q, x, offset)
    assert torch.equal(got, linear(x, weight, offset, "cuda")), "not the same from run to run"


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), COMBINATIONS)
def test_products_are_those_of_the_dense_weight(
    bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = weight_only(bits, group_size, symmetric)
    reason = cuda.supports(scheme, (8, 128), torch.device("cuda"), dtype)
    if reason:
        pytest.skip(reason)
    for rows in (1, 2, 7, 8, 9, 16, 17, 40, 60):
        for outputs, inputs in ((8, 128), (64, 256), (1000, 384), (40, 2176), (4104, 1024), (4608, 128), (38000, 256)):
            check_products(scheme, rows, outputs, inputs, dtype, bias=rows % 2 == 1)
    for rows in (3, 12):
        if group_size == 32:
            check_products(scheme, rows, 72, 160, dtype, bias=True)
        if group_size is None:
            check_products(scheme, rows, 72, 200, dtype, bias=True)


@GPU
@pytest.mark.gpu
def test_large_and_small_shapes_of_real_models() -> None:
    for outputs, inputs in ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (59136, 8192)):
        for dtype in (torch.float16, torch.bfloat16):
            for rows in (1, 4, 16):
                check_products(SCHEMES["W3A16"], rows, outputs, inputs, dtype, bias=False)


@GPU
@pytest.mark.gpu
def test_strided_and_misaligned_inputs_graphs_and_streams() -> None:
    q, packed = random_weight(SCHEMES["W3A16"], 640, 512, torch.float16, "cuda")
    weight = cuda.prepare(packed)
    dense = dequantize(q)
    wide = torch.randn(3, 1026, dtype=torch.float16, device="cuda")
    for x in (wide[:, 1:513], wide[:, ::2][:, :512], wide[:1, 3:515], wide[0, 5:517]):
        expected = (x.double() @ dense.double().T).half()
        torch.testing.assert_close(linear(x, weight, None, "cuda"), expected, rtol=4e-3, atol=4e-3)
    x = torch.randn(1, 512, dtype=torch.float16, device="cuda")
    expected = linear(x, weight, None, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.equal(linear(x, weight, None, "cuda"), expected)
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = linear(linear(static, weight, None, "cuda")[:, :512].contiguous(), weight, None, "cuda")
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, linear(expected[:, :512].contiguous(), weight, None, "cuda"))
    compiled_linear = torch.compile(lambda x: linear(x, weight, None, "cuda").relu(), fullgraph=True)
    assert torch.equal(compiled_linear(x), expected.relu())


@GPU
@pytest.mark.gpu
def test_another_dtype_than_the_scales_is_answered_in_a_sentence() -> None:
    _, packed = random_weight(SCHEMES["W3A16"], 64, 256, torch.float16, "cuda")
    weight, x = cuda.prepare(packed), torch.randn(2, 256, dtype=torch.float16, device="cuda")
    with pytest.raises(MBQError, match="x is bfloat16, and the weight's scales are float16; load the model with one"):
        linear(x.bfloat16(), weight, None, "cuda")
    with pytest.raises(MBQError, match="The bias is float32, and the weight's scales are float16"):
        linear(x, weight, torch.zeros(64, device="cuda"), "cuda")


@GPU
@pytest.mark.gpu
def test_all_devices() -> None:
    for index in range(torch.cuda.device_count()):
        _, packed = random_weight(SCHEMES["W3A16"], 64, 256, torch.float16, f"cuda:{index}")
        x = torch.randn(2, 256, dtype=torch.float16, device=f"cuda:{index}")
        got = linear(x, cuda.prepare(packed), None, "cuda")
        torch.testing.assert_close(got, KERNELS["reference"].linear(x, packed, None), rtol=4e-3, atol=4e-3)
