"""The equalized model for quantizers other than this project's: MBQ's vectors folded in, nothing quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mbq import ranks
from mbq.architecture import Binding
from mbq.checkpoint.compressed_tensors import named_for_engines
from mbq.checkpoint.folder import new_folder
from mbq.checkpoint.gguf_file import check_tokenizer, gguf_package, language_model, write_importance, write_model
from mbq.cost import weight_bytes
from mbq.errors import MBQError
from mbq.experts import joined
from mbq.front_matter import base_name, front_matter, inherited_fields, on_the_hub
from mbq.methods import METHODS
from mbq.model_card import METHOD_NAMES, base_link, citation, numbers_text, unmeasured
from mbq.output import Measured, Product, ignored, write_licenses, write_processor, write_records
from mbq.pipeline import make
from mbq.placement import Plan
from mbq.progress import Progress, silent
from mbq.recipe import Recipe
from mbq.rows import Row
from mbq.search import GroupSearch
from mbq.sensitivity import Sensitivity


@dataclass(frozen=True)
class ExportResult:
    """What ``export`` made.

    model        the equalized float model
    processor    the model's processor
    recipe       every option
    format       a name in FORMATS
    folder       what was written
    sensitivity  gradients a block, or None where the method needs none
    search       a row a group: the chosen alpha and the loss at every alpha
    seconds      of each step, by its name

    Under torchrun every rank gets one, but only rank 0's has the model.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    recipe: Recipe
    format: str
    folder: Path
    sensitivity: Sensitivity | None = field(repr=False)
    search: list[GroupSearch] = field(repr=False)
    seconds: dict[str, float]

    def __str__(self) -> str:
        folded = sum(row.skipped is None for row in self.search)
        made = f"Equalized for {self.recipe.numbers.name} by {self.recipe.method} in {sum(self.seconds.values()):.1f} s"
        return f"{made}: {folded} of {len(self.search)} groups.\nWrote {self.folder}"


@ranks.joined()
def export(
    model: str | Path | nn.Module,
    processor: Any = None,
    *,
    output: str | Path,
    format: str = "equalized",
    scheme: str = "W3A16",
    method: str = "mbq",
    data: str | Path | list[Row] | None = None,
    images: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[Plan], None] | None = None,
    **options: Any,
) -> ExportResult:
    """Equalize a vision-language model for ``scheme`` and write it to the new folder ``output``, nothing quantized.

    format  a name in FORMATS

    The other arguments are those of ``mbq.quantize``, with the same search: rounding the written weights to nearest
    gives the codes that ``quantize`` packs.

    Raises MBQError for whatever the caller can mend; ``output`` then does not exist.
    """
    check_format(format, method)
    rows = data if isinstance(data, list) else None
    recipe = Recipe.of(scheme=scheme, method=method, data=None if rows else data, images=images, **options)
    if recipe.needs_data and not (rows or recipe.data):
        raise MBQError(f"{recipe.method} calibrates on image-text pairs; give them with --data.")
    made = make(FORMATS[format], model, processor, recipe, rows, output, resume, progress, announce)
    assert made.folder is not None, "make was given an output"
    return ExportResult(
        made.model, made.processor, recipe, format, made.folder, made.sensitivity, made.search, made.seconds
    )


def check_format(format: str, method: str) -> None:
    """Raise MBQError unless ``export`` can write the format, with a method that equalizes."""
    if format in REFUSED:
        raise MBQError(f"--format {format} {REFUSED[format]}.")
    if format not in FORMATS:
        raise MBQError(f"--format is {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "gguf":
        gguf_package()
    if method in METHODS and METHODS[method].equalize is None:
        equalizing = [name for name, each in METHODS.items() if each.equalize is not None]
        raise MBQError(f"--method {method} equalizes nothing to export; choose one of {', '.join(equalizing)}.")


def write_equalized(output: Path, binding: Binding, processor: Any, recipe: Recipe, name: str, found: Measured) -> Path:
    """Write an ordinary float folder, whole or not at all; arguments and errors as ``write_folder`` has them."""
    model: Any = binding.model
    with new_folder(output, needs=found.bytes_after) as folder:
        with joined(model):
            model.save_pretrained(folder, state_dict=named_for_engines(model), max_shard_size=recipe.max_shard_size)
        write_processor(folder, processor, recipe, name)
        text = write_records(folder, recipe, base_name(name), found)
        card = equalized_card(recipe, text, name, folder_name=output.name, binding=binding)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def write_gguf(output: Path, binding: Binding, processor: Any, recipe: Recipe, name: str, found: Measured) -> Path:
    """Write model.gguf and imatrix.gguf, whole or not at all; arguments and errors as ``write_folder`` has them."""
    assert found.importance is not None, "the product measures it"
    model, base = language_model(binding), base_name(name)
    with new_folder(output, needs=_gguf_bytes(binding, processor, recipe)) as folder:
        write_model(folder / "model.gguf", model, processor, base)
        data = Path(recipe.data).name if recipe.data else "calibration rows"
        write_importance(folder / "imatrix.gguf", model, found.importance, data)
        text = write_records(folder, recipe, base, found)
        write_licenses(folder, name)
        (folder / "README.md").write_text(gguf_card(recipe, text, name, binding), encoding="utf-8")
    return output


def _gguf_bytes(binding: Binding, processor: Any, recipe: Recipe) -> int:
    check_tokenizer(processor.tokenizer)
    return sum(tensor.nbytes for tensor in language_model(binding).tensors.values())


FORMATS = {
    "equalized": Product(
        "equalized", packs=False, size=lambda binding, *_: weight_bytes(binding.model), write=write_equalized
    ),
    "gguf": Product("gguf", packs=False, size=_gguf_bytes, write=write_gguf, measures=True),
}
_REASON = "is made by {0}, which needs an older transformers than mbq, so nothing here has run in it"
_INSTEAD = "export --format equalized, and give that folder to {0} in an environment of its own"
REFUSED = {
    name: f"{_REASON.format(tool)}; {_INSTEAD.format(tool)}"
    for name, tool in (("openvino", "optimum-intel"), ("onnx", "optimum-onnx"))
}

_CARD = """---
{front_matter}---

# {name}, equalized

{base} equalized by {method}, and not quantized: vectors chosen for {numbers} are folded into the weights.
The model computes what {base_name} computes, up to the rounding of the folded weights to {dtype}.

Rounding these weights to nearest in {scheme} gives the integer codes of `mbq quantize` with the recipe below, bit for
bit. A quantizer that equalizes by itself (AWQ, SmoothQuant) does it a second time: choose one that does not, such as
rounding to nearest or GPTQ.

## Load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```

or `mbq.load("{folder}"{trust_argument})` and `mbq.load_processor("{folder}"{trust_argument})`.

Nothing was equalized for these, so leave them in 16 bits: {kept}.

{results}

## How it was made

By `mbq export --format equalized`. Every option, the seed, the versions of the packages and a hash of the calibration
data are in `recipe.yaml`, the alpha of every group and its loss at every alpha in `search.json`{sensitivity}.

```yaml
{recipe}```

{citation}"""


def equalized_card(recipe: Recipe, recipe_yaml: str, name: str, *, folder_name: str, binding: Binding) -> str:
    """README.md of an equalized folder, with the hub's front matter; ``name`` is the float model's folder or hub id."""
    base_model = base_name(name)
    return _CARD.format(
        front_matter=front_matter(
            base_model, inherited_fields(name), library="transformers", tags=["mbq", "equalized"]
        ),
        results=unmeasured(folder_name, base_model),
        citation=citation(recipe, base_model),
        name=on_the_hub(base_model)[0].split("/")[-1],
        base=base_link(base_model),
        base_name=base_model,
        method=METHOD_NAMES.get(recipe.method, recipe.method),
        dtype=_dtype(binding),
        scheme=recipe.numbers.name,
        numbers=numbers_text(recipe),
        folder=folder_name,
        trust_argument=", trust_remote_code=True" if recipe.trust_remote_code else "",
        kept=", ".join(f"`{pattern}`" for pattern in ignored(binding, recipe)[0]),
        sensitivity=", the gradients of the blocks in `sensitivity.json`" if METHODS[recipe.method].weighs else "",
        recipe=recipe_yaml,
    )


_GGUF_CARD = """---
{front_matter}---

# {name}, language model for llama.cpp

`model.gguf` is the language model of {base} with its tokenizer, in {dtype}, equalized by {method} and not quantized:
vectors chosen for {numbers} are folded into the weights.

`imatrix.gguf` is an importance matrix for llama-quantize: means over {samples} calibration samples of the squared input
of every linear{weighed}.

    llama-quantize --imatrix imatrix.gguf model.gguf model-Q4_K_M.gguf Q4_K_M

Pictures need an mmproj file, vision tower and projector, which equalization leaves as they are: take the one of the
original model, or make it with llama.cpp's convert_hf_to_gguf.py --mmproj from the original folder.

    llama-mtmd-cli -m model-Q4_K_M.gguf --mmproj mmproj.gguf --image picture.png -p "What is shown?"

## How it was made

By `mbq export --format gguf`. Every option, the seed, the versions of the packages and a hash of the calibration data
are in `recipe.yaml`, the alpha of every group and its loss at every alpha in `search.json`.

```yaml
{recipe}```

{citation}"""


def gguf_card(recipe: Recipe, recipe_yaml: str, name: str, binding: Binding) -> str:
    """README.md of a folder for llama.cpp, with the hub's front matter; ``name`` as for ``equalized_card``."""
    base_model = base_name(name)
    return _GGUF_CARD.format(
        front_matter=front_matter(
            base_model,
            inherited_fields(name),
            library="gguf",
            tags=["mbq", "equalized", "imatrix"],
            relation="quantized",  # the Hub's word for every GGUF
        ),
        citation=citation(recipe, base_model),
        name=on_the_hub(base_model)[0].split("/")[-1],
        base=base_link(base_model),
        method=METHOD_NAMES.get(recipe.method, recipe.method),
        dtype=_dtype(binding),
        numbers=numbers_text(recipe),
        samples=recipe.num_calibration_samples,
        weighed=", where tokens weigh what the search weighs them by" if METHODS[recipe.method].token_weights else "",
        recipe=recipe_yaml,
    )


def _dtype(binding: Binding) -> str:
    return str(next(binding.blocks.parameters()).dtype).removeprefix("torch.")
