"""``mbq bench`` and benchmarks/kernels.py: shapes, bytes, checks, tables, the page. Times are taken on a GPU only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, PretrainedConfig, Qwen2Config
from typer.testing import CliRunner

from benchmarks import kernels as script
from benchmarks import kernels_page
from benchmarks.kernels_peers import marlin_words, peers
from mbq import bench
from mbq.bench import Contender
from mbq.bench_report import CUBLAS, DENSE, READING, STACK, Decoder, Failure, Report, Time, cells, table
from mbq.cli import app
from mbq.errors import MBQError
from mbq.kernels import compiled, reference
from mbq.kernels.packed import pack_weight, unpack_weight
from mbq.scheme import SCHEMES, Scheme

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Decoder({"qkv": (384, 256), "o": (256, 256), "gate_up": (512, 256), "down": (256, 256)}, 3)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# ---- what is measured ----


def test_the_default_shapes_are_those_of_qwen2_7b() -> None:
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    assert bench.decoder_of(config) == bench.QWEN2_7B


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "llava_onevision"])
def test_shapes_are_those_of_the_models_own_linears(family: str) -> None:
    folder = ROOT / "models" / family
    decoder, text = bench.decoder_in(folder), AutoConfig.from_pretrained(folder).get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    assert decoder.layers == text.num_hidden_layers
    assert decoder.shapes == {
        "qkv": (heads * head, text.hidden_size),
        "o": (text.hidden_size, text.num_attention_heads * head),
        "gate_up": (2 * text.intermediate_size, text.hidden_size),
        "down": (text.hidden_size, text.intermediate_size),
    }


def test_a_configuration_of_something_else_is_answered_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MBQError, match="no decoder that mbq bench knows"):
        bench.decoder_of(PretrainedConfig())
    with pytest.raises(MBQError, match=r"has no config\.json"):
        bench.decoder_in(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_random_weights_are_in_the_checkpoints_layout(scheme: Scheme) -> None:
    weight = bench.random_weight(scheme, (64, 256), torch.float16, CPU)
    again = pack_weight(unpack_weight(weight), scheme)
    assert torch.equal(weight.words, again.words)
    assert weight.words.dtype == again.words.dtype
    assert torch.equal(weight.scale, again.scale)
    if again.zero_point is None:
        assert weight.zero_point is None
    else:
        assert weight.zero_point is not None
        assert torch.equal(weight.zero_point, again.zero_point)
    x = torch.randn(3, 256)
    assert bench.relative_error(reference.linear(x, weight, None), bench.expected(x, weight)) < 2e-3


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    with pytest.raises(MBQError, match="192 inputs are no multiple of W3A16's groups of 128; leave W3A16 out"):
        bench.random_weight(SCHEMES["W3A16"], (64, 192), torch.float16, CPU)


@pytest.mark.parametrize(("name", "size"), [("W3A16", 64 * 256 * 3 // 8 + 2 * 64 * 2 + 4 * 6 * 2), ("W8A8", None)])
def test_bytes_are_those_of_codes_scales_and_zeros(name: str, size: int | None) -> None:
    weight = bench.random_weight(SCHEMES[name], (64, 256), torch.float16, CPU)
    assert bench.bytes_of(("kernel", weight)) == (size or 64 * 256 + 2 * 64)
    assert bench.bytes_of([weight.words, (weight.scale, 3)]) == weight.words.nbytes + weight.scale.nbytes


def test_a_copy_has_tensors_of_its_own() -> None:
    weight = bench.random_weight(SCHEMES["W4A16"], (64, 256), torch.float16, CPU)
    name, copied = bench.copy_of(("kernel", weight))
    assert name == "kernel"
    assert (copied.shape, copied.scheme) == (weight.shape, weight.scheme)
    for tensor, other in ((weight.words, copied.words), (weight.scale, copied.scale)):
        assert torch.equal(tensor, other)
        assert tensor.data_ptr() != other.data_ptr()


# ---- measuring, with a clock that counts the calls ----


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the weights of every product that was run; each takes ten microseconds."""
    made: list[int] = []

    def clock(run: Any) -> float:
        before = len(made)
        run()
        return 10.0 * (len(made) - before)

    monkeypatch.setattr(bench, "microseconds", clock)
    return made


def counted(contender: Contender, calls: list[int]) -> Contender:
    def multiply(x: torch.Tensor, prepared: Any) -> torch.Tensor:
        calls.append(x.shape[1])
        return contender.multiply(x, prepared)

    return Contender(contender.name, contender.prepare, multiply, contender.tolerance)


def test_a_shape_is_timed_a_product_and_the_stack_whole(calls: list[int]) -> None:
    scheme = SCHEMES["W3A16"]
    contender = counted(bench.ours("reference", SMALL, scheme, torch.float16, CPU), calls)
    times = bench.measure(contender, scheme, SMALL, [1, 4], torch.float16, CPU)
    assert [(time.rows, time.shape) for time in times] == [
        (rows, shape) for rows in (1, 4) for shape in (*SMALL.shapes, STACK)
    ]
    for time in times:
        assert time.microseconds == (120.0 if time.shape == STACK else 10.0)
        assert (time.by, time.scheme, time.dtype) == ("reference", "W3A16", "float16")
        assert time.error is not None
        assert time.error < 2e-3
    assert times[4].bytes == 3 * sum(time.bytes for time in times[:4])


def test_cublas_has_16_bit_weights(calls: list[int]) -> None:
    times = bench.measure(bench.cublas(), SCHEMES["W4A16"], SMALL, [1], torch.bfloat16, CPU, DENSE)
    assert {time.scheme for time in times} == {DENSE}
    assert times[0].bytes == 2 * 384 * 256


def test_a_wrong_product_is_not_timed(calls: list[int]) -> None:
    wrong = Contender("wrong", lambda weight: weight.shape, lambda x, shape: x.new_full((len(x), shape[0]), torch.nan))
    with pytest.raises(MBQError, match="wrong at 384 x 256, 1 rows: a relative error of nan"):
        bench.measure(wrong, SCHEMES["W3A16"], SMALL, [1], torch.float16, CPU)


def test_reading_takes_its_parts_from_everywhere_in_the_pool() -> None:
    pool = torch.zeros(1000, dtype=torch.uint8)
    seen: list[list[tuple[int, int]]] = []

    class Reader:
        def microseconds(self, parts: list[torch.Tensor]) -> float:
            seen.append([(part.data_ptr() - pool.data_ptr(), part.nbytes) for part in parts])
            return 30.0

    times = bench.times_of_reading(
        Reader(),
        pool,
        SMALL,
        "W3A16",
        torch.float16,
        dict.fromkeys(SMALL.shapes, 200),  # type: ignore[arg-type]
    )
    assert seen[0] == [(0, 208), (256, 208), (512, 208)]
    assert [start for start, _ in seen[-1]] == [0, 256, 512, 768] * 3  # 768 + 208 bytes still fit
    assert [time.microseconds for time in times] == [10.0] * 4 + [30.0]
    assert (times[-1].by, times[-1].rows, times[-1].bytes) == (READING, 0, 3 * 4 * 200)


def test_the_reading_kernel_compiles() -> None:
    try:
        compiled.bindings()
    except compiled.CompilationError as error:
        pytest.skip(str(error))
    source = (ROOT / "src/mbq/kernels/read.cu").read_text()
    for architecture in (75, 80, 90):
        assert compiled.compile_source(source, "read.cu", architecture, {"THREADS": 256, "VECTORS": 4})


# ---- the command ----


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2
    assert done.stderr == (
        "mbq: mbq bench times kernels on a GPU, and torch sees none here; run it on a machine that has one.\n"
    )
    with pytest.raises(SystemExit) as left:
        script.main([])
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ["0"]}, "--rows is 0; give positive numbers"),
        ({"rows": ["one"]}, "--rows is one; give numbers"),
        ({"dtype": "float32"}, "--dtype is float32; mbq bench knows float16 and bfloat16"),
        ({"schemes": ["W5A16"]}, "Unknown scheme 'W5A16'"),
        ({"kernel": "cuda"}, "The kernel 'cuda' cannot run this model: it needs an NVIDIA GPU"),
    ],
)
def test_a_wrong_option_is_answered_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(bench, "check_device", lambda: CPU)
    with pytest.raises(MBQError, match=message):
        bench.bench(**options)


def made_report() -> Report:
    """W3A16 takes 2, 4 .. microseconds by shape, and so on: easy to tell apart."""
    report = Report("NVIDIA H200", "torch 2.11.0, CUDA 13.0", "python -m benchmarks.kernels", bench.QWEN2_7B, 4500.0)
    for by, scheme, factor, size in (
        (CUBLAS, DENSE, 40.0, 2_000_000),
        ("cuda", "W3A16", 10.0, 400_000),
        ("Humming", "W3A16", 20.0, 400_000),
    ):
        shapes = enumerate((*bench.QWEN2_7B.shapes, STACK), start=1)
        report.times += [Time(by, scheme, "float16", 1, shape, factor * i, size * i, 1e-4) for i, shape in shapes]
    report.times.append(Time(READING, "W3A16", "float16", 0, "qkv", 5.0, 400_000))
    report.failures.append(Failure("Marlin", "W4A16", "float16", "no --marlin was given"))
    return report


def test_a_report_comes_back_from_disk_as_it_was() -> None:
    report = made_report()
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_table_has_a_row_a_product_and_says_what_failed() -> None:
    report = made_report()
    qkv = report.find("cuda", "W3A16", "float16", 1, "qkv")
    assert qkv is not None
    assert cells(report, qkv) == ["10.0", "40", "1 %", "5.0", "4.00"]
    console = Console(width=120, record=True)
    console.print(table(report))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["W3A16", "cuda", "1", "qkv", "4608x3584", "10.0", "40", "1", "%", "5.0", "4.00"] in lines
    assert ["W3A16", "cuda", "1", "28", "layers", "50.0", "40", "1", "%", "4.00"] in lines
    assert not any(READING in line for line in text.splitlines()[3:])  # a column, not rows
    assert "Marlin W4A16 float16: no --marlin was given" in text


# ---- the page ----


def test_the_page_shows_runs_bars_peers_and_steps(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    (kernels / "steps").mkdir(parents=True)
    content = made_report().to_json()
    (kernels / "h200.json").write_text(json.dumps(content))
    for name, predicted in (("02-second", 45.0), ("01-first", None)):
        step = content | {"step": name[3:], "predicted": predicted}
        (kernels / "steps" / f"{name}.json").write_text(json.dumps(step))
    text = kernels_page.page(tmp_path)
    assert "`python -m benchmarks.kernels`, torch 2.11.0, CUDA 13.0. It reads 4,500 GB/s." in text
    assert "| 1 | cuda | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 |" in text
    assert "| 1 | Humming | 20.0 | 40.0 | 60.0 | 80.0 | 100 |" in text
    assert text.index("| 1 | cuda | 10.0") < text.index("| 1 | Humming")  # the fastest first
    assert "|  | only reads | 5.0 |  |  |  |  |" in text
    assert "| W3A16 | 1 | qkv 4608x3584 | 4.5 | 3.7 | 10.0 (missed) |" in text
    assert "| W3A16 | 1 | 28 layers | 1,050 | 850 | 50.0 (stretch) |" in text
    assert "- W3A16, float16, 1 row, 28 layers: cuda takes 50.0 µs, Humming 100: 2.00x." in text
    assert "- Marlin W4A16 float16: no --marlin was given" in text
    assert "| first |  | 50.0 |  |\n| second | 45.0 | 50.0 |  |" in text
    assert "as quoted, another run" in text
    assert kernels_page.layout() in text


def test_the_page_can_be_written_before_anything_is_measured(tmp_path: Path) -> None:
    assert kernels_page.page(tmp_path).count("No run is stored here yet.") == 2


def test_the_page_has_a_section_of_a_prompt(tmp_path: Path) -> None:
    """qkv, o, gate_up, down take 1, 2, 3, 4 times what one does."""
    runs = [
        {"way": way, "shape": shape, "rows": rows, "microseconds": factor * i}
        for way, rows, factor in (
            ("16 bit", 2048, 30),
            ("W3A16", 2048, 40),
            ("through 16 bits", 2048, 45),
            ("W4A8", 2048, 16),
            ("its dense weight", 0, 15),
        )
        for i, shape in enumerate(("qkv", "o", "gate_up", "down"), start=1)
    ]
    takeover = [{"rows": 64, "packed": 5.0, "prompt": 7.0, "16 bit": 3.0}]
    takeover.append({"rows": 80, "packed": 8.0, "prompt": 7.0, "16 bit": 3.0})
    report = {"device": "NVIDIA H200", "torch": "2", "dtype": "bfloat16", "command": "this", "runs": runs}
    (tmp_path / "prefill.json").write_text(json.dumps(report | {"takeover": takeover}))
    text = kernels_page.page(tmp_path)
    assert "| 2,048 | 300 | 400 (0.75x) | 450 (0.67x) | 160 (1.88x) |" in text
    assert "| gate_up | 90.0 | 120 | 135 | 48.0 |" in text
    assert "| W3A16, 2,048 rows | 0.95x | 1.0x | 0.75x (missed) |" in text
    assert "| W4A8, 2,048 rows | 1.5x | 1.75x | 1.88x (stretch) |" in text
    assert "by itself takes 150 µs, 466 MB written at 3,107 GB/s. In a prompt of 2,048 rows going through them" in text
    assert "faster from 80 rows on." in text
    (tmp_path / "prefill-humming.json").write_text(json.dumps(report))
    assert kernels_page.page(tmp_path).count("| 2,048 | 300 | 400 (0.75x) | 450 (0.67x) | 160 (1.88x) |") == 2


def test_the_page_has_a_section_of_a_decode_step(tmp_path: Path) -> None:
    def way(recorded: float, compiled: float) -> dict[str, Any]:
        return {"eager": recorded, "compiled": compiled, "generate": {"recorded": {"tokens_a_second": 1e6 / recorded}}}

    w3 = {"gigabytes": 5.0, "mbq": way(4000.0, 2000.0), "ratios": {"compiled": {"over_bf16_sdpa": 2.5}}}
    w3["mbq"]["kernels"] = [{"name": "linear", "count": 112, "microseconds": 1155.8}]  # type: ignore[index]
    families = {"qwen2_vl": {"bf16": {"gigabytes": 15.0, "sdpa": way(8000.0, 5000.0)}, "W3A16": w3}}
    about = {"device": "NVIDIA H200", "torch": "2", "transformers": "5", "positions": 1024, "command": "this"}
    (tmp_path / "decode_step.json").write_text(json.dumps(about | {"families": families}))
    text = kernels_page.page(tmp_path)
    assert "| Qwen2-VL-7B bf16 | sdpa | 15.0 | 8,000 | 1.00x | 5,000 | 1.00x | 125 |  |  |" in text
    assert "| Qwen2-VL-7B W3A16 | mbq | 5.0 | 4,000 | 2.00x | 2,000 | 2.50x | 250 |  |  |" in text
    assert "| Qwen2-VL-7B W3A16 | 2.3x | 3.2x | 2.50x |" in text
    assert "| `linear` | 112 | 1,156 |" in text


# ---- peers ----


def test_the_command_that_is_stored_names_no_folders(tmp_path: Path) -> None:
    args = script.parser().parse_args(["--marlin", str(tmp_path / "marlin.so"), "--output", str(tmp_path / "x.json")])
    command = script.command_of(args)
    assert str(tmp_path) not in command
    assert "--marlin marlin.so" in command
    assert "--schemes W3A16 W4A16 --rows 1 4 16 --dtypes float16 bfloat16 --kernel cuda" in command


def test_marlins_words_hold_every_code_where_its_lanes_look() -> None:
    """A word holds what one lane multiplies at once: one column of two blocks of 8, rows 2t, 2t + 1, 2t + 8, 2t + 9."""
    [marlin] = [peer for peer in peers(Path("marlin.so")) if peer.name == "Marlin"]
    weight = bench.random_weight(marlin.scheme("W4A16"), (128, 128), torch.float16, CPU)
    codes, words = unpack_weight(weight).codes.to(torch.int64) + 8, marlin_words(weight)
    assert words.shape == (8, 256)
    for tile in range(8):
        for lane in range(32):
            for block in range(8):  # of 16 outputs; 64 are permuted together
                word = int(words[tile, 128 * (block // 4) + 4 * lane + block % 4])
                found = [word >> 4 * i & 15 for i in (0, 4, 1, 5, 2, 6, 3, 7)]
                first = 16 * tile + 2 * (lane % 4)
                outputs = [16 * block + lane // 4 + 8 * half for half in (0, 1)]
                assert found == [int(codes[n, first + row]) for n in outputs for row in (0, 1, 8, 9)]


# ---- on a GPU ----


@pytest.mark.gpu
@GPU
def test_the_reading_kernel_reads_every_byte_once() -> None:
    reader = bench.Reader(torch.device("cuda", torch.cuda.current_device()))
    for count in (4, 1000, 10**6, 10**7):
        words = torch.randint(-(2**31), 2**31, (count // 4 * 4,), dtype=torch.int32, device="cuda")
        for blocks in reader.blocks_a_processor:
            read = int(reader.read(words, blocks).sum(dtype=torch.int64))
            assert (read - int(words.sum(dtype=torch.int64))) % 2**32 == 0


@pytest.mark.gpu
@GPU
def test_a_small_decoder_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QWEN2_7B", SMALL)
    report = bench.bench(schemes=["W3A16"], rows=[1, 16], kernel="auto")
    assert not report.failures
    assert {(time.by, time.shape) for time in report.times} >= {(CUBLAS, STACK), (READING, STACK)}
    assert all(time.microseconds > 0 for time in report.times)
