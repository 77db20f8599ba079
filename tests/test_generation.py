"""Decoding with a static cache, compiled and as a recorded step, gives the tokens of the plain way."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig
from typer.testing import CliRunner

import mbq
from mbq.cli import app
from mbq.errors import MBQError
from mbq.generation import DecodeStep, cuda_graph, generate
from mbq.kernels import KERNELS, attention, reference
from mbq.world import write
from tests import tiny

TOKENS = 8
MODELS = Path(__file__).parents[1] / "models"


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on the CPU: recording changes no tensor that was there before, replaying runs the same operators on
    the same tensors, and no Python in between."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and id(value) not in self.before:
                self.before[id(value)] = (value, value.clone())
        out = func(*args, **kwargs)
        self.operators.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, content in reversed(self.before.values()):
            tensor.copy_(content)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operators:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recording(graph: RecordedGraph, stream: None) -> Iterator[None]:
    with graph:
        yield
    graph.undo()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    made: list[RecordedGraph] = []

    def new() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    return made


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("generation")

    def make(family: str) -> Path:
        if not (root / f"{family}-W3A16").exists():
            tiny.save(family, root / family)
            mbq.quantize(root / family, method="rtn", output=root / f"{family}-W3A16")
        return root / f"{family}-W3A16"

    return make


@pytest.fixture
def model_of(quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A family's tiny model with fused layers, in float32, which never stops early."""
    monkeypatch.setitem(KERNELS, "twin", reference)
    monkeypatch.setattr(attention, "INTERPRETED", False)  # a stand-in for a graph cannot record what it does

    def load(family: str) -> Any:
        model = mbq.load(quantized(family), dtype="float32", kernel="twin")
        model.generation_config.eos_token_id = None
        return model

    return load


def static(**options: Any) -> dict[str, Any]:
    """What makes ``generate`` take its static, compiled way, on a CPU too."""
    config = CompileConfig(**options)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def tokens_of(model: Any, given: Any, **options: Any) -> list[int]:
    options = {"max_new_tokens": TOKENS, "do_sample": False} | options
    return model.generate(**given, **options)[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_a_recorded_step_gives_the_same_tokens(family: str, model_of: Any, graphs: list[RecordedGraph]) -> None:
    model, processor = model_of(family), tiny.tiny(family)[1]
    for images in (1, 2):  # another prompt: another cache, another graph
        given = tiny.inputs(processor, images=images)
        expected = tokens_of(model, given)
        assert len(expected) == TOKENS
        with cuda_graph(model):
            assert tokens_of(model, given, **static()) == expected
        # The prompt gives the first token, a plain step the second, then the step is recorded and replayed.
        assert graphs[-1].replays == TOKENS - 2
    assert len(graphs) == 2
    assert "get_compiled_call" not in vars(model)


def test_hidden_states_of_every_step_are_its_own(model_of: Any, graphs: list[RecordedGraph]) -> None:
    """``generate`` keeps them by reference, and a replay would overwrite them: such steps are not recorded."""
    model, processor = model_of("qwen2_vl"), tiny.tiny("qwen2_vl")[1]
    given = tiny.inputs(processor, images=1)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": TOKENS}
    with cuda_graph(model):
        made = model.generate(**given, **options, **static(), do_sample=False)
    assert not graphs
    last = [step[-1][0, -1] for step in made.hidden_states]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(last[1:]))


def test_a_step_that_cannot_be_recorded_runs_plainly(
    model_of: Any, graphs: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def failing(graph: Any, stream: None) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", failing)
    model, given = model_of("qwen2_vl"), tiny.inputs(tiny.tiny("qwen2_vl")[1])
    expected = tokens_of(model, given)
    with cuda_graph(model), pytest.warns(UserWarning, match="without a CUDA graph, slower: operation not") as told:
        assert tokens_of(model, given, **static()) == expected
    assert len([each for each in told if "CUDA graph" in str(each.message)]) == 1


def test_a_cache_that_counts_in_python_is_not_recorded(graphs: list[RecordedGraph]) -> None:
    class Cache:
        layers = (object(),)

    calls: list[dict[str, Any]] = []
    step = DecodeStep(lambda **arguments: calls.append(arguments))
    cache = Cache()
    for _ in range(4):
        step(input_ids=torch.ones(1, 1), past_key_values=cache)
    assert len(calls) == 4
    assert not graphs


@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_transformers_compiles_the_step_without_a_break(family: str, model_of: Any) -> None:
    model, given = model_of(family), tiny.inputs(tiny.tiny(family)[1])
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        products.append(sum("mbq.linear" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    options = static(backend=backend, mode=None, fullgraph=True, dynamic=False)
    assert tokens_of(model, given, **options) == tokens_of(model, given)
    assert products == [8]  # qkv, o, gate_up and down of two blocks; compiled once


def test_the_plain_way_on_a_cpu(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("internvl")
    picture = tmp_path / "picture.png"
    tiny.picture().save(picture)
    model, processor = mbq.load(folder), mbq.load_processor(folder)
    answer = generate(model, processor, "What?", [picture], 4)
    asked = ["generate", str(folder), "--image", str(picture), "--prompt", "What?", "--max-new-tokens", "4"]
    for options in ([], ["--kernel", "reference"]):
        assert CliRunner().invoke(app, [*asked, *options], catch_exceptions=False).stdout.strip() == answer
    refused = CliRunner().invoke(app, [*asked, "--kernel", "marlin"], catch_exceptions=False)
    assert refused.exit_code == 2
    assert "Unknown kernel 'marlin'" in refused.stderr
    with pytest.raises(MBQError, match="--compile needs a GPU"):
        generate(model, processor, "What?", [picture], 4, compiled=True)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, str]]]:
    """The demo's model at W4A16, and questions about pictures with their answers: (question, picture, answer)."""
    root = tmp_path_factory.mktemp("asked")
    mbq.quantize(MODELS / "internvl", scheme="W4A16", method="rtn", output=root / "W4A16")
    rows = map(json.loads, write(root / "data", "test", per_task=2).read_text().splitlines())
    found = []
    for row in rows:
        if row["task"] == "house":
            picture, question = row["messages"][0]["content"]
            answer = row["messages"][1]["content"][0]["text"]
            found.append((question["text"], str(root / "data" / picture["image"]), answer))
    return root / "W4A16", found


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_says_the_same(kernel: str, asked: Any) -> None:
    """On a GPU through the recorded step; on a CPU where the kernel runs there."""
    folder, questions = asked
    assert questions
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    try:
        model = mbq.load(folder, device, dtype, kernel)
    except MBQError as error:
        pytest.skip(str(error))
    processor = mbq.load_processor(folder)
    for question, picture, answer in questions:
        assert generate(model, processor, question, [picture], 12) == answer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", tiny.FAMILY_NAMES)
def test_a_recorded_step_on_a_gpu(family: str, tmp_path: Path) -> None:
    """The same kernels in the same order: the same tokens, whatever they are."""
    mbq.quantize(MODELS / family, method="rtn", output=tmp_path / "out")
    processor = mbq.load_processor(tmp_path / "out")
    given = processor(text=["a b c"], return_tensors="pt").to("cuda")
    options = {"max_new_tokens": 24, "eos_token_id": None, "cache_implementation": "static"}
    for kernel in ("reference", "cuda"):
        model = mbq.load(tmp_path / "out", "cuda", kernel=kernel)
        plain = tokens_of(model, given, **options, disable_compile=True)
        assert len(plain) == 24
        with warnings.catch_warnings(), cuda_graph(model):
            warnings.simplefilter("error", UserWarning)  # a step that could not be recorded
            for _ in range(2):
                assert tokens_of(model, given, **options) == plain
