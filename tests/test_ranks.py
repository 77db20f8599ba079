"""Several processes on one run: the same choices and bytes as one process, and one sentence for whatever ends them.

Most tests fork the processes and play torchrun's part (the store, the signals), which saves importing torch each time;
one goes through torchrun itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from mbq import cli, pipeline, ranks
from mbq.calibration import CalibrationBatch
from mbq.errors import MBQError
from mbq.loading import load_model
from mbq.search import _Search, token_roles
from tests import tiny, tiny_families
from tests.conftest import ANSWERS, row, write_rows

pytestmark = pytest.mark.forks
SAMPLES = "7"
LOST = "A process of this run died, or all were told to end; start it again"


@dataclass(frozen=True)
class Ended:
    """How a process of a run ended, and what it wrote."""

    status: int
    out: str
    err: str

    def told(self) -> list[str]:
        """What it says to the user, without the progress."""
        return [line for line in self.err.splitlines() if line.startswith("mbq: ")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen2_vl", tmp_path_factory.mktemp("model") / "qwen2_vl", blocks=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Rows of different lengths, one of them without a picture."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(8):
        tiny.picture(index, 56 + 28 * (index % 3)).save(folder / f"{index}.png")
    rows = [row(None if index == 3 else f"{index}.png", ANSWERS[index % 4]) for index in range(8)]
    return ["--data", str(write_rows(folder / "calib.jsonl", rows)), "--images", str(folder)]


@pytest.fixture(scope="module")
def default(model: Path, data: list[str]) -> list[str]:
    return ["quantize", str(model), *data, "--num-calibration-samples", SAMPLES]


@pytest.fixture
def command(default: list[str], tmp_path: Path) -> list[str]:
    """``mbq quantize`` to tmp_path/out by mbq, W3A16."""
    return [*default, "--group-size", "32", "--output", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def alone(default: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that one process writes with some options, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*options: str) -> Path:
        if options not in made:
            home = tmp_path_factory.mktemp("alone")
            (ended,) = run(1, [*default, *options, "--output", str(home / "out")], home)
            assert ended.status == 0, ended.err
            made[options] = home / "out"
        return made[options]

    return folder


@pytest.fixture
def wanted(alone: Callable[..., Path]) -> str:
    """The hash of what one process makes of ``command``."""
    return weights(alone("--group-size", "32"))


def run(count: int, arguments: list[str], folder: Path, prepare: Callable[[int], None] | None = None) -> list[Ended]:
    """``mbq arguments`` in ``count`` processes; as under torchrun, one that fails has the others terminated.

    ``prepare(rank)`` is called in each before it starts.
    """
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {_start(rank, count, port, arguments, folder, prepare): rank for rank in range(count)}
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    statuses: dict[int, int] = {}
    while len(statuses) < count:
        child, status = os.wait()
        if child not in children:
            continue
        statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        for other in children if status else ():
            os.kill(other, signal.SIGTERM)
    del store
    return [Ended(statuses[rank], *(_written(folder, rank, name) for name in ("out", "err"))) for rank in range(count)]


def _start(
    rank: int, count: int, port: int, arguments: list[str], folder: Path, prepare: Callable[[int], None] | None
) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(180)  # ends it where it hangs
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for descriptor in (1, 2))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        sys.argv = ["mbq", *arguments]
        disable_progress_bar()  # transformers read what the command sets when it was imported
        if prepare is not None:
            prepare(rank)
        cli.main()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _written(folder: Path, rank: int, name: str) -> str:
    return (folder / f"{name}-{rank}").read_text(encoding="utf-8")


def before_each_block(act: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    search = _Search.block
    monkeypatch.setattr(_Search, "block", lambda self, index, *args: (act(index), search(self, index, *args))[1])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def alphas(folder: Path) -> list[tuple[int, str, float | None]]:
    return [(r["block"], r["group"], r["alpha"]) for r in json.loads((folder / "search.json").read_text("utf-8"))]


def losses(folder: Path) -> list[float]:
    return [loss for r in json.loads((folder / "search.json").read_text("utf-8")) for loss in r["losses"]]


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, ("--group-size", "32")),
        (3, ("--group-size", "32")),
        (3, ("--scheme", "W4A8", "--method", "awq", "--distorted-input", "--norm", "mse")),
        (2, ("--scheme", "W4A8", "--method", "smoothquant", "--vision-tower", "W8A8", "--batch-size", "2")),
    ],
)
def test_the_same_as_one_process(
    count: int, options: tuple[str, ...], default: list[str], alone: Callable[..., Path], tmp_path: Path
) -> None:
    wanted, made = alone(*options), tmp_path / "made"
    first, *others = run(count, [*default, *options, "--output", str(made)], tmp_path)
    assert first.status == 0, first.err
    assert f"Wrote {made}" in first.out
    assert "search: 6/6" in first.err
    assert all((each.status, each.out, each.err) == (0, "", "") for each in others), others
    assert alphas(made) == alphas(wanted)
    assert weights(made) == weights(wanted)
    assert losses(made) == pytest.approx(losses(wanted), rel=1e-6)
    assert not made.with_name("made.unfinished").exists()
    if (wanted / "sensitivity.json").exists():
        assert_equal_sensitivity(made, wanted)


def test_experts_get_the_tokens_of_all_processes(data: list[str], tmp_path: Path) -> None:
    made, processor = tiny_families.tiny("qwen3_vl_moe")
    made.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), *data, "--num-calibration-samples", SAMPLES, "--group-size", "32"]
    for count in (1, 3):
        first, *others = run(count, [*command, "--output", str(tmp_path / str(count))], tmp_path)
        assert (first.status, [each.err for each in others]) == (0, [""] * (count - 1)), first.err
    alone, shared = tmp_path / "1", tmp_path / "3"
    rows = [json.loads((folder / "search.json").read_text("utf-8")) for folder in (alone, shared)]
    assert [row.get("tokens") for row in rows[0]] == [row.get("tokens") for row in rows[1]]
    assert alphas(alone) == alphas(shared)
    assert weights(alone) == weights(shared)


def assert_equal_sensitivity(made: Path, wanted: Path) -> None:
    found, expected = (json.loads((each / "sensitivity.json").read_text("utf-8")) for each in (made, wanted))
    for side in ("vision", "language"):
        for part in ("attn", "mlp"):
            assert found[side][part] == pytest.approx(expected[side][part], rel=1e-6)


def test_sensitivity(model: Path, data: list[str], alone: Callable[..., Path], tmp_path: Path) -> None:
    command = ["sensitivity", str(model), *data, "--num-calibration-samples", SAMPLES]
    first, *others = run(3, [*command, "--output", str(tmp_path / "made")], tmp_path)
    assert "Wrote" in first.out
    assert all((each.status, each.out, each.err) == (0, "", "") for each in others)
    assert_equal_sensitivity(tmp_path / "made", alone("--group-size", "32"))


@pytest.mark.parametrize("dead", [0, 2])
def test_a_killed_rank_ends_the_run_and_other_numbers_go_on(
    dead: int, command: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(index: int) -> None:
        if index == 3 and ranks.rank() == dead:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        before_each_block(die, patch)
        ended = run(3, command, tmp_path)
    unfinished = tmp_path / "out.unfinished"
    kept = f"{LOST}; what is done is kept in {unfinished}: --resume goes on with it."
    assert ended[dead].status == -signal.SIGKILL
    assert sorted(each.status for each in ended) == [-signal.SIGKILL, 2, 2]
    assert [line for each in ended for line in each.told()] == [f"mbq: {kept}"]
    assert all("Traceback" not in each.err for each in ended)
    assert len(list(unfinished.glob("block-*.safetensors"))) == 3
    before_each_block(lambda index: print(f"block {index}", flush=True), monkeypatch)
    more = run(1 if dead else 2, [*command, "--resume"], tmp_path)
    assert [each.status for each in more] == [0] * len(more), more
    assert re.findall(r"^block \d", more[-1].out, re.MULTILINE) == ["block 3", "block 4", "block 5"]
    assert weights(tmp_path / "out") == wanted
    assert not unfinished.exists()


def test_torchrun(command: list[str], wanted: str, tmp_path: Path) -> None:
    """A kill -9 from outside."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mbq", *command]
    process = subprocess.Popen(torchrun, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    unfinished = tmp_path / "out.unfinished"
    while process.poll() is None and not (unfinished / "block-0001.safetensors").exists():
        time.sleep(0.01)
    for each in psutil.Process(process.pid).children():
        if each.environ().get("RANK") == "1":
            each.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    kept = f"{LOST}; what is done is kept in {unfinished}: --resume goes on with it."
    assert [line for line in err.splitlines() if line.startswith("mbq:")] == [f"mbq: {kept}"]
    more = run(3, [*command, "--resume"], tmp_path)
    assert [each.status for each in more] == [0, 0, 0], more
    assert weights(tmp_path / "out") == wanted


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_told_once(
    failing: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(index: int) -> None:
        if index == 2 and ranks.rank() == failing:
            raise MBQError("Block 2 is broken; mend it.")

    before_each_block(fail, monkeypatch)
    ended = run(3, command, tmp_path)
    assert [each.status for each in ended] == [2, 2, 2]
    told = (
        f"mbq: Block 2 is broken; mend it; what is done is kept in {tmp_path}/out.unfinished: --resume goes on with it."
    )
    assert [each.told() for each in ended] == [[told] if rank == failing else [] for rank in range(3)]
    assert not (tmp_path / "out").exists()


def test_an_interrupt_of_all_is_told_once(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    before_each_block(interrupt, monkeypatch)
    ended = run(3, command, tmp_path)
    kept = f"what is done is kept in {tmp_path}/out.unfinished: --resume goes on with it."
    assert [line for each in ended for line in each.told()] == [f"mbq: Interrupted; {kept}"]
    assert all("Traceback" not in each.err for each in ended)


def test_what_is_wrong_everywhere_is_told_once(command: list[str], tmp_path: Path) -> None:
    def told(*options: str) -> str:
        ended = run(3, [*command, *options], tmp_path)
        assert {each.status for each in ended} <= {2, 128 + signal.SIGTERM}
        (line,) = [line for each in ended for line in each.told()]
        assert all("Traceback" not in each.err for each in ended)
        return line

    few = told("--num-calibration-samples", "2")
    assert few.startswith("mbq: The calibration data make 2 batches for 3 processes; start at most 2, or give more")
    assert told("--batch-size", "4").startswith("mbq: The calibration data make 2 batches for 3 processes")
    assert told("--scheme", "W9").startswith("mbq: Unknown scheme")
    assert "of the group size 100" in told("--group-size", "100")
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == []


def test_hosts_with_other_data_are_refused(command: list[str], tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        if rank == 1:
            pipeline.data_hash = lambda rows: "other"

    first, second = run(2, command, tmp_path, prepare)
    assert first.status == second.status == 2
    assert second.told() == [
        "mbq: Rank 1 has another data than rank 0; give every host the same files and the same command."
    ]
    assert first.told() == []


def test_other_commands_are_rank_0s(model: Path, tmp_path: Path) -> None:
    first, second = run(2, ["inspect", str(model), "--group-size", "32"], tmp_path)
    assert first.status == second.status == 0
    assert "Activations: every block's inputs" in first.out
    assert (second.out, second.err) == ("", "")


@pytest.mark.parametrize(("count", "batches"), [(1, 1), (2, 7), (3, 3), (3, 8)])
def test_every_batch_has_one_rank(count: int, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    given = []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        given.append(list(range(batches))[ranks.part(batches)])
    assert [each for own in given for each in own] == list(range(batches))
    assert max(map(len, given)) - min(map(len, given)) <= 1


def test_own_tokens_are_those_of_the_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(tokens: int) -> CalibrationBatch:
        ids = torch.full((1, tokens), tokens)
        return CalibrationBatch({"attention_mask": ids > 0}, ids, ids < 0)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    roles = token_roles([batch(tokens) for tokens in (3, 5, 2, 4)])
    assert roles.own == slice(8, 14)
    assert len(roles.counted) == 14


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("family", tiny.ALL_FAMILY_NAMES)
def test_weights_are_views_of_the_file(family: str, float_folder: Callable[[str], Path]) -> None:
    """So that all processes of a host share one copy of them, the system's."""
    folder = float_folder(family)
    parameters = list(load_model(folder, trust_remote_code=True).parameters())
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]
    regions = [[int(each, 16) for each in region.split("-")] for region in mapped]
    assert len(parameters) > 20
    for each in parameters:
        assert any(start <= each.data_ptr() and each.data_ptr() + each.nbytes <= end for start, end in regions)


def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.own_device("auto") == "auto"
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert [ranks.own_device(name) for name in ("auto", "cuda", "cpu", "cuda:0")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
        "cuda:0",
    ]
    assert chosen == [1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MBQError, match="2 GPUs for more processes on a host; start --nproc-per-node 2"):
        ranks.own_device("auto")
