"""README.md of a quantized folder: what it is, how it was made, which calls load it."""

from __future__ import annotations

import yaml

from mbq.recipe import Recipe

METHOD_NAMES = {
    "rtn": "rounding to nearest (RTN)",
    "awq": "AWQ's channel-wise equalization",
    "smoothquant": "SmoothQuant",
    "fixed": "channel-wise equalization with a fixed factor for vision tokens",
    "mbq": "MBQ, modality-balanced quantization (arXiv:2412.19509)",
}

_CARD = """---
{front_matter}---

# {name}, {scheme}

{base} quantized to {scheme} by {method}: {weights}{activations}.
{tower}{before:.1f} MB before, {after:.1f} MB on disk now.
{kept}

## Load it

With mbq, which keeps the weights packed:

```python
import mbq

model = mbq.load("{folder}"{trust_argument})
processor = mbq.load_processor("{folder}"{trust_argument})
```

or on the command line:

    mbq generate {folder} --image picture.png --prompt "What is shown?"{trust_option}

{loading_note}

## How it was made

Every option, the seed, the versions of the packages and a hash of the calibration data are in `recipe.yaml`.
{files}

```yaml
{recipe}```
"""


def model_card(
    recipe: Recipe,
    recipe_yaml: str,
    *,
    base_model: str,
    folder_name: str,
    loading_note: str,
    kept: tuple[str, ...],
    files: tuple[str, ...],
    megabytes: tuple[float, float],
) -> str:
    """The card as Markdown with the hub's front matter.

    ``kept`` are the patterns of what stays in 16 bits, ``files`` the names of the files beside the card, ``megabytes``
    the sizes of the weights before and after.
    """
    repository, _ = on_the_hub(base_model)
    front_matter = {
        "base_model": repository,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["compressed-tensors", "mbq", recipe.numbers.name.lower()],
    }
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        name=repository.split("/")[-1],
        base=base_link(base_model),
        scheme=recipe.numbers.name,
        method=METHOD_NAMES.get(recipe.method, recipe.method),
        weights=_weights(recipe),
        activations=_activations(recipe),
        tower=f"The vision tower's blocks are {recipe.vision_tower}, by SmoothQuant.\n" if recipe.vision_tower else "",
        before=megabytes[0],
        after=megabytes[1],
        kept="In 16 bits: " + ", ".join(f"`{pattern}`" for pattern in kept) + "." if kept else "",
        folder=folder_name,
        trust_argument=", trust_remote_code=True" if recipe.trust_remote_code else "",
        trust_option=" --trust-remote-code" if recipe.trust_remote_code else "",
        loading_note=loading_note.strip(),
        files="".join(f"{text}\n" for name, text in _FILES.items() if name in files).strip(),
        recipe=recipe_yaml,
    )


_FILES = {
    "sensitivity.json": "`sensitivity.json` holds the loss gradient of each block for vision and for language tokens.",
    "search.json": "`search.json` holds the chosen alpha and the loss at every alpha, a group of linears a row.",
    "measurements.json": "`measurements.json` holds what the run took: seconds a step, bytes, memory.",
    "report.html": "`report.html` shows all of it, in any browser.",
}


def base_link(base_model: str) -> str:
    """The float model's name, a link where it is on the hub."""
    address = on_the_hub(base_model)[1]
    return f"[{base_model}]({address})" if address else base_model


def on_the_hub(base_model: str) -> tuple[str, str | None]:
    """The repository of "owner/model" or "owner/model@revision", and its address; a folder's name has none."""
    if "/" not in base_model:
        return base_model, None
    repository, _, revision = base_model.partition("@")
    return repository, f"https://huggingface.co/{repository}" + (f"/tree/{revision}" if revision else "")


def numbers_text(recipe: Recipe) -> str:
    """ "W4A8: 4-bit symmetric integer weights with ..." """
    return f"{recipe.numbers.name}: {_weights(recipe)}{_activations(recipe)}"


def _weights(recipe: Recipe) -> str:
    weights = recipe.numbers.weights
    kind = "symmetric" if weights.symmetric else "asymmetric"
    span = "output row" if weights.group_size is None else f"{weights.group_size} input channels"
    return f"{weights.bits}-bit {kind} integer weights with one scale per {span}"


def _activations(recipe: Recipe) -> str:
    activations = recipe.numbers.activations
    return "" if activations is None else f", {activations.bits}-bit activations with one dynamic scale per token"
