"""Folders made to harm: each is refused in one sentence, and before what it wants to happen happens."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

import mbq
from mbq import chat, hub, limits
from mbq.checkpoint import compressed_tensors, safety
from mbq.errors import MBQError
from mbq.generation import generate
from mbq.images import image_bytes, open_image
from mbq.inspection import inspect
from mbq.loading import load_model, load_processor, model_folder, read_config
from tests.tiny import FAMILY_NAMES, question, save, tiny

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789" * 4
KINDS = ("float", "W3A16", "W8A8", "code")
LAYER = "model.layers.0.mlp.down_proj."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A float folder, the same with packed words and zero points or with int8 codes, or a float one with code."""
    root = tmp_path_factory.mktemp("made")

    def make(kind: str) -> Path:
        folder = root / kind
        if folder.exists():
            return folder
        if kind in ("float", "code"):
            return save({"float": "qwen2_vl", "code": "internvl2_internlm2"}[kind], folder)
        mbq.quantize(make("float"), output=folder, scheme=kind, method="rtn", device="cpu")
        return folder

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(made(kind), tmp_path / kind)


@pytest.fixture(params=["float", "W3A16"])
def folder(request: pytest.FixtureRequest, copied: Callable[[str], Path]) -> Path:
    """What both kinds of folder must refuse."""
    return copied(request.param)


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(MBQError) as error:
        action(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(file: Path, entries: dict[str, Any], data: bytes) -> None:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.fixture
def nothing_built(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as transformers' loading fails the test."""
    for kind in KINDS:
        made(kind)

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("transformers loads the folder")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", built)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ["a"], 7])
@pytest.mark.usefixtures("nothing_built")
def test_an_index_that_leads_elsewhere(folder: Path, place: Any) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": place}}))
    assert f"names {place!r}, which is no safetensors file beside it" in refused(mbq.load, folder)


@pytest.mark.usefixtures("nothing_built")
def test_an_index_that_says_what_is_not_so(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    two = {name: "a.safetensors" if number else "b.safetensors" for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": two}))
    assert "twice, in a.safetensors and b.safetensors" in refused(mbq.load, folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"gone.weight": "a.safetensors"}}))
    assert "says that gone.weight is in a.safetensors, where it is not" in refused(mbq.load, folder)
    (folder / "a.safetensors").rename(folder / WEIGHTS)  # transformers would read it, and leave the index alone
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {names[0]: "b.safetensors"}}))
    assert "holds model.safetensors and an index of other files" in refused(mbq.load, folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.usefixtures("nothing_built")
def test_a_link_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")
    message = f"{folder / name} is a link out of its folder; put a copy of the file in its place."
    assert refused(mbq.load, folder) == message
    assert refused(load_processor, folder) == message


@pytest.fixture
def in_hub_cache(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Path]]:
    """Put a folder where the Hub's cache would keep owner/KIND: snapshots/COMMIT/* lead to blobs. No network."""

    def put(kind: str) -> Path:
        cache = tmp_path / f"models--owner--{kind}"
        snapshot = cache / "snapshots" / COMMIT
        for each in (snapshot, cache / "blobs", cache / "refs"):
            each.mkdir(parents=True)
        for number, file in enumerate(sorted(made(kind).iterdir())):
            shutil.copy(file, cache / "blobs" / str(number))
            (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
        (cache / "refs" / "main").write_text(COMMIT)
        return snapshot

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._settings.cache_clear()
    yield put
    hub._settings.cache_clear()


def test_links_of_the_hubs_cache(in_hub_cache: Callable[[str], Path], tmp_path: Path) -> None:
    snapshot = in_hub_cache("W3A16")
    pinned = f"owner/W3A16@{COMMIT}"
    assert model_folder("owner/W3A16") == model_folder(pinned) == snapshot
    assert type(mbq.load("owner/W3A16")).__name__ == "Qwen2VLForConditionalGeneration"
    assert load_processor(pinned).chat_template
    assert "neither a folder here nor a model that the Hub gives" in refused(read_config, "owner/W3A16@v2")
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "extra.json").symlink_to(tmp_path / "secret.json")
    assert "extra.json is a link out of its folder" in refused(read_config, pinned)


def test_one_commit_is_checked_and_loaded(in_hub_cache: Callable[[str], Path]) -> None:
    """A branch that moves between the look at the settings and the load changes nothing."""
    snapshot = in_hub_cache("float")
    read_config("owner/float")
    (snapshot.parents[1] / "refs" / "main").write_text("f" * 40)
    assert model_folder("owner/float") == snapshot


def test_code_from_the_hub_travels_with_the_quantized_model(
    in_hub_cache: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    snapshot, out = in_hub_cache("code"), tmp_path / "out"
    mbq.quantize("owner/code", output=out, scheme="W4A16", method="rtn", device="cpu", trust_remote_code=True)
    assert f"lets these files of {snapshot} run" in capsys.readouterr().err  # the path ends in the commit
    assert {file.name for file in snapshot.glob("*.py")} == {file.name for file in out.glob("*.py")}
    assert type(mbq.load(out, trust_remote_code=True)).__name__ == "InternVLChatModel"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_a_file_that_never_ends(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "generation_config.json.tmp")
    assert "is neither a file nor a folder" in refused(read_config, folder)
    os.mkfifo(tmp_path / "picture.png")
    assert "picture.png is no ordinary file" in refused(image_bytes, tmp_path / "picture.png", "rows.jsonl, line 1")


def test_a_picture_of_gigapixels() -> None:
    """Its header alone is looked at."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "png")
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + file.getvalue()[24:29]
    bomb = file.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + file.getvalue()[33:]
    assert "exceeds limit" in refused(open_image, bomb, "rows.jsonl, line 1")


def test_a_text_of_gigabytes(folder: Path) -> None:
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(2**33)  # a hole: it takes no room
    assert "tokenizer.json has more than 100 MiB" in refused(load_processor, folder)


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"n": ' + "9" * 10_000 + "}"])
def test_json_made_to_break_parsers(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'} is not JSON" in refused(mbq.load, folder)


@pytest.mark.usefixtures("nothing_built")
@pytest.mark.parametrize("harm", ["truncated", "overlapping", "beyond the end", "negative", "a header of terabytes"])
def test_damaged_safetensors(folder: Path, harm: str) -> None:
    file = folder / WEIGHTS
    entries, data = header(file)
    names = sorted(name for name in entries if name != "__metadata__")
    first, second = (entries[name] for name in sorted(names, key=lambda name: entries[name]["data_offsets"])[:2])
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "a header of terabytes":
        file.write_bytes(struct.pack("<Q", 2**42) + data)
    else:
        if harm == "overlapping":
            second["data_offsets"] = first["data_offsets"]
            second["shape"], second["dtype"] = first["shape"], first["dtype"]
        elif harm == "beyond the end":
            first["shape"][0] = 10**15
        else:
            first["data_offsets"] = [-8, 0]
        write_header(file, entries, data)
    assert f"{file} is damaged (" in refused(mbq.load, folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_loaded(folder: Path, name: str) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (folder / "harm").mkdir, ()

    (folder / WEIGHTS).unlink()
    torch.save({"lm_head.weight": Harm()}, folder / name)
    message = refused(mbq.load, folder)
    assert f"holds no weights (*.safetensors) but {name}, a pickle, which can run code and is never loaded" in message
    assert not (folder / "harm").exists()


def test_pickles_are_not_downloaded() -> None:
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "model.pt", "sub/x.pth", "a.pkl", "modeling.py"]
    assert list(filter_repo_objects(files, allow_patterns=hub.SETTINGS)) == ["config.json", "modeling.py"]


@pytest.mark.usefixtures("nothing_built")
def test_an_adapter_leads_to_another_model(folder: Path) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path="/somewhere/else")
    assert "holds an adapter" in refused(mbq.load, folder)


@pytest.mark.parametrize("file", ["processor_config.json", "audio_tokenizer_config.json"])
def test_a_processor_that_loads_another_model(folder: Path, file: str) -> None:
    other = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": str(folder.parent)}
    edit(folder / file, **({"audio_tokenizer": other} if file == "processor_config.json" else other))
    assert "loads another model for audio" in refused(load_processor, folder)


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key"), [("text_config", "num_hidden_layers"), ("vision_config", "depth"), (None, "num_labels")]
)
@pytest.mark.usefixtures("nothing_built")
def test_a_billion_layers(folder: Path, part: str | None, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)[key] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    for action in (mbq.load, inspect, load_processor):
        assert f"claims {key} = 1000000000, and no model has more than" in refused(action, folder)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_config", {"vocab_size": 10**12}),
        ("text_config", {"intermediate_size": 10**9}),
        ("text_config", {"num_hidden_layers": 90, "intermediate_size": 10**6}),
        ("vision_config", {"embed_dim": 2**20}),
    ],
)
@pytest.mark.usefixtures("nothing_built")
def test_sizes_that_the_files_do_not_hold(folder: Path, part: str, changes: dict[str, int]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].pop("layer_types", None)
    config[part] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(mbq.load, folder)
    assert "describes a model of" in message or "makes no model" in message
    assert str(folder) in message


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tied_weights_are_counted_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a large vocabulary would look like numbers that the files do not hold."""
    monkeypatch.setattr(safety, "SPARE", 100)  # what these models make themselves: the frequencies of positions
    save(family, tmp_path / "float", tied=True)
    mbq.quantize(tmp_path / "float", output=tmp_path / "out", scheme="W3A16", method="rtn", device="cpu")
    mbq.load(tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": {"num_hidden_layers": "many"}},
        {"text_config": {"num_attention_heads": 0}},
        {"text_config": [1, 2]},
        {"text_config": {"hidden_size": -1}},
        {"vision_config": {"patch_size": 0}},
        {"model_type": ["qwen2_vl"]},
        {"architectures": "Qwen2VLForConditionalGeneration"},
        {"quantization_config": "compressed-tensors"},
        {"auto_map": [1]},
        {"architectures": ["pipeline"]},
        {"dtype": "load"},
    ],
)
def test_a_config_of_nonsense_is_a_sentence_or_a_model(folder: Path, changes: dict[str, Any]) -> None:
    """transformers ignores some of it; what it does not take must not become a traceback."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        mbq.load(folder)
    except MBQError as error:
        assert str(error).endswith(".") and "\n" not in str(error)  # noqa: PT017, PT018


@pytest.mark.usefixtures("nothing_built")
def test_a_class_that_reads_pickles_by_itself(copied: Callable[[str], Path]) -> None:
    """Qwen2.5-Omni looks for speakers in a .pt file beside its weights; only vision-language classes load."""
    folder = copied("W3A16")
    edit(folder / "config.json", architectures=["Qwen2_5OmniForConditionalGeneration"])
    assert "no vision-language models of transformers" in refused(mbq.load, folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.usefixtures("nothing_built")
def test_a_kernel_from_the_hub_is_code(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = "owner/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    assert f"asks for code from the Hub ({key} = 'owner/kernel')" in refused(mbq.load, folder)


@pytest.mark.usefixtures("nothing_built")
def test_weights_that_the_config_names(folder: Path) -> None:
    edit(folder / "config.json", transformers_weights="other.safetensors")
    assert "names weights of its own ('other.safetensors')" in refused(mbq.load, folder)


# ---- quantized tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["W3A16", "W8A8"])
def test_scales_that_are_not_finite(copied: Callable[[str], Path], scheme: str, value: float) -> None:
    folder = copied(scheme)
    change_tensor(folder, LAYER + "weight_scale", lambda scale: scale.index_fill(0, torch.tensor([3]), value))
    assert "down_proj.weight_scale holds" in refused(mbq.load, folder)


@pytest.mark.parametrize(
    ("scheme", "name", "dtype"),
    [
        ("W3A16", "weight_zero_point", torch.int8),
        ("W3A16", "weight_zero_point", torch.float32),
        ("W3A16", "weight_packed", torch.int64),
        ("W3A16", "weight_shape", torch.float32),
        ("W8A8", "weight", torch.float32),
        ("W8A8", "weight_scale", torch.int32),
    ],
)
@pytest.mark.usefixtures("nothing_built")
def test_numbers_that_could_be_out_of_range(
    copied: Callable[[str], Path], scheme: str, name: str, dtype: torch.dtype
) -> None:
    folder = copied(scheme)
    change_tensor(folder, LAYER + name, lambda tensor: tensor.to(dtype))
    assert f"{LAYER}{name} is " in refused(mbq.load, folder)


def test_packed_zero_points_are_in_range_whatever_the_words(copied: Callable[[str], Path]) -> None:
    """Three bits hold 0 .. 7: no word in the file makes another zero point, and all weights stay finite."""
    from mbq.kernels.packed import unpack_weight

    folder = copied("W3A16")
    name = LAYER + "weight_zero_point"
    words = torch.randint(-(2**31), 2**31 - 1, load_file(folder / WEIGHTS)[name].shape).to(torch.int32)
    change_tensor(folder, name, lambda _: words)
    layer = mbq.load(folder, kernel="reference").get_submodule("model.language_model.layers.0.mlp.down_proj")
    zero_point = unpack_weight(layer.packed).zero_point
    assert zero_point is not None
    assert (int(zero_point.min()), int(zero_point.max())) == (0, 7)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_packed_shapes_that_do_not_match(copied: Callable[[str], Path], name: str) -> None:
    folder = copied("W3A16")
    change_tensor(folder, LAYER + name, lambda tensor: tensor[:-1])
    assert f"of the wrong shape, model.language_model.layers.0.mlp.down_proj.{name}" in refused(mbq.load, folder)


@pytest.mark.parametrize("shape", [[128, 255], [2**62, 2**62], [-1, -1]])
def test_a_shape_that_is_not_the_layers(copied: Callable[[str], Path], shape: list[int]) -> None:
    folder = copied("W3A16")
    change_tensor(folder, LAYER + "weight_shape", lambda _: torch.tensor(shape))
    assert f"down_proj is {shape}, not [128, 256]" in refused(mbq.load, folder)


@pytest.mark.parametrize(
    "weights",
    [{"group_size": 0}, {"group_size": -128}, {"group_size": "many"}, {"num_bits": None}, {"num_bits": 10**9}],
)
def test_a_quantization_of_nonsense(copied: Callable[[str], Path], weights: dict[str, Any]) -> None:
    folder = copied("W3A16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (folder / "config.json").write_text(json.dumps(config))
    refused(mbq.load, folder)


@pytest.mark.parametrize("pattern", ["re:(m|mo|mod|o|d|e|l|.)*[!]$", "re:("])
def test_patterns_that_match_for_ever(
    copied: Callable[[str], Path], pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_tensors, "SECONDS", 0.3)
    folder = copied("W3A16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = [pattern]
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(mbq.load, folder)
    assert ("take more than 0.3 seconds" if "!" in pattern else "cannot be read") in message


# ---- chat templates --------------------------------------------------------------------------------------------------

NESTED = "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3


def processor_with(template: str) -> Any:
    _, processor = tiny("qwen2_vl")
    processor.chat_template = template
    return processor


@pytest.mark.parametrize("template", [NESTED, "{% set l = range(90000)|list %}{% for i in l if i in l %}{% endfor %}"])
def test_a_chat_template_that_loops(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    assert "the chat template does not end within 0.3 seconds" in refused(
        chat.render, processor_with(template), question(), "--prompt"
    )


def test_a_chat_template_of_a_billion_turns() -> None:
    """jinja2's sandbox itself bounds a single range()."""
    processor = processor_with("{% for i in range(10**9) %}{% endfor %}")
    assert "Range too big" in refused(chat.render, processor, question(), "--prompt")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2**34 }}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    ],
)
def test_a_chat_template_that_fills_the_memory(template: str) -> None:
    assert "takes more than 512 MiB" in refused(chat.render, processor_with(template), question(), "--prompt")
    assert "What is shown" in chat.render(tiny("qwen2_vl")[1], question(), "--prompt")  # the limit is gone


def test_a_chat_template_that_calls_itself() -> None:
    template = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    assert "recursion depth exceeded" in refused(chat.render, processor_with(template), question(), "--prompt")


@pytest.mark.parametrize("command", ["generate", "evaluate", "quantize"])
def test_commands_render_within_the_limits(
    command: str,
    copied: Callable[[str], Path],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    folder = copied("float")
    (folder / "chat_template.jinja").write_text(NESTED)
    if command == "generate":
        message = refused(generate, mbq.load(folder), load_processor(folder), "What is shown?")
    elif command == "quantize":
        message = refused(mbq.quantize, folder, output=tmp_path / "out", **options)
    else:
        from mbq.evaluation import run

        message = refused(run, str(folder), data=str(options["data"]), images=str(options["images"]), device="cpu")
    assert "the chat template does not end within 0.3 seconds" in message
    assert not (tmp_path / "out").exists()


def test_limits_leave_no_trace() -> None:
    import resource
    import signal

    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    for block in ("1", "[0] * 2**40", "1 / 0", "while True: pass"):
        try:
            with limits.memory_limit(2**28, "Large."), limits.time_limit(0.1, "Slow."):
                exec(block)
        except (MBQError, ZeroDivisionError):
            pass
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# ---- generation_config.json ------------------------------------------------------------------------------------------


def test_the_folder_does_not_choose_how_much_is_generated(copied: Callable[[str], Path]) -> None:
    folder = copied("float")
    greedy = generate(mbq.load(folder), load_processor(folder), "What is shown?", max_new_tokens=2)
    GenerationConfig(num_beams=10**6, num_return_sequences=10**5, max_new_tokens=10**9).save_pretrained(folder)
    assert generate(mbq.load(folder), load_processor(folder), "What is shown?", max_new_tokens=2) == greedy


# ---- remote code -----------------------------------------------------------------------------------------------------


def test_code_is_printed_before_it_runs(copied: Callable[[str], Path], capsys: pytest.CaptureFixture) -> None:
    folder = copied("code")
    file = folder / "configuration_internvl_chat.py"
    file.write_text("import sys\nprint('the code runs', file=sys.stderr)\n" + file.read_text())
    load_processor(folder, trust_remote_code=True)
    load_model(folder, trust_remote_code=True)
    told = capsys.readouterr().err
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    listed = f"configuration_internvl_chat.py  {file.stat().st_size} bytes  sha256 {digest}"
    assert told.index(listed) < told.index("the code runs")
    assert told.count(listed) == 1
    for other in folder.glob("*.py"):
        assert f"  {other.name}  " in told


@pytest.mark.parametrize("kind", ["float", "W3A16"])
def test_code_does_not_run_unasked(copied: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture) -> None:
    """Not even where transformers has the class itself."""
    folder = copied(kind)
    (folder / "harm.py").write_text("raise SystemExit('this code ran')")
    names = {"AutoConfig": "harm.C", "AutoModelForImageTextToText": "harm.M", "AutoProcessor": "harm.P"}
    edit(folder / "config.json", auto_map=names)
    edit(folder / "processor_config.json", auto_map=names)
    for action in (mbq.load, load_processor, inspect):
        try:
            action(folder)
        except MBQError as error:
            assert str(error).endswith(".")  # noqa: PT017
    assert "harm.py" not in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("owner/other--modeling.Model", "runs code of another repository (owner/other--modeling.Model)"),
        ("/elsewhere/modeling.Model", "names code outside its folder (/elsewhere/modeling.Model)"),
        ("../modeling.Model", "names code outside its folder (../modeling.Model)"),
    ],
)
@pytest.mark.usefixtures("nothing_built")
def test_code_of_other_places_does_not_run(
    copied: Callable[[str], Path], file: str, reference: str, sentence: str
) -> None:
    folder = copied("code")
    edit(folder / file, auto_map={"AutoModel": reference, "AutoTokenizer": [reference, None]})
    assert sentence in refused(load_model, folder, trust_remote_code=True)
    assert sentence in refused(load_processor, folder, trust_remote_code=True)


def test_code_behind_a_link_does_not_run(copied: Callable[[str], Path]) -> None:
    folder = copied("code")
    (folder / "modeling_internvl_chat.py").rename(folder.parent / "modeling.py")
    (folder / "modeling_internvl_chat.py").symlink_to(folder.parent / "modeling.py")
    assert "is a link out of its folder" in refused(load_model, folder, trust_remote_code=True)
