"""README.md of a quantized folder: what it is, which calls load it, how it was made, what to cite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mbq.front_matter import front_matter, on_the_hub
from mbq.recipe import Recipe

RESULTS = "## Results"  # the section that ``card_results`` fills
METHOD_NAMES = {
    "rtn": "rounding to nearest (RTN)",
    "awq": "AWQ's channel-wise equalization",
    "smoothquant": "SmoothQuant",
    "fixed": "channel-wise equalization with a fixed factor for vision tokens",
    "mbq": "MBQ, modality-balanced quantization ([arXiv:2412.19509](https://arxiv.org/abs/2412.19509))",
}
_MBQ = """@inproceedings{li2025mbq,
  title = {{MBQ}: Modality-Balanced Quantization for Large Vision-Language Models},
  author = {Li, Shiyao and Hu, Yingchun and Ning, Xuefei and Liu, Xihui and Hong, Ke and Jia, Xiaotao and Li, Xiuhong
            and Yan, Yaqi and Ran, Pei and Dai, Guohao and Yan, Shengen and Yang, Huazhong and Wang, Yu},
  booktitle = {Proceedings of the Computer Vision and Pattern Recognition Conference (CVPR)},
  pages = {4167--4177},
  year = {2025}
}"""
_AWQ = """@inproceedings{lin2024awq,
  title = {{AWQ}: Activation-aware Weight Quantization for On-Device {LLM} Compression and Acceleration},
  author = {Lin, Ji and Tang, Jiaming and Tang, Haotian and Yang, Shang and Chen, Wei-Ming and Wang, Wei-Chen and Xiao,
            Guangxuan and Dang, Xingyu and Gan, Chuang and Han, Song},
  booktitle = {Proceedings of Machine Learning and Systems (MLSys)},
  year = {2024}
}"""
_SMOOTHQUANT = """@inproceedings{xiao2023smoothquant,
  title = {{SmoothQuant}: Accurate and Efficient Post-Training Quantization for Large Language Models},
  author = {Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and Wu, Hao and Demouth, Julien and Han, Song},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning (ICML)},
  year = {2023}
}"""
_PAPERS = {"mbq": [_MBQ], "fixed": [_MBQ], "awq": [_AWQ], "smoothquant": [_SMOOTHQUANT]}

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

### transformers

{transformers}

### vLLM

{vllm}

{results}

## How it was made

Every option, the seed, the versions of the packages and a hash of the calibration data are in `recipe.yaml`.
{files}

```yaml
{recipe}```

{citation}"""

_PLAIN_CALL = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```

"""


_UNBALANCED = """Pictures are no tokens of this model, so there was nothing to balance: only the positions that predict
answers weighed anything, and `sensitivity.json` has no vision side.
"""


def model_card(
    recipe: Recipe,
    recipe_yaml: str,
    *,
    base_model: str,
    inherited: dict[str, Any],
    folder_name: str,
    transformers: str,
    vllm: str,
    kept: tuple[str, ...],
    files: tuple[str, ...],
    megabytes: tuple[float, float],
    balanced: bool = True,
) -> str:
    """The card as Markdown with the hub's front matter.

    ``inherited`` are the front matter's fields of the float model's card, ``transformers`` and ``vllm`` what the
    sections on these engines say, ``kept`` the patterns of what stays in 16 bits, ``files`` the names of the files
    beside the card, ``megabytes`` the sizes of the weights before and after. ``balanced`` is False for a method that
    weighs modalities and a model without vision tokens.
    """
    tower = f"The vision tower's blocks are {recipe.vision_tower}, by SmoothQuant.\n" if recipe.vision_tower else ""
    return _CARD.format(
        front_matter=front_matter(
            base_model,
            inherited,
            library="transformers",
            tags=["compressed-tensors", "mbq", recipe.numbers.name.lower()],
            relation="quantized",
        ),
        name=on_the_hub(base_model)[0].split("/")[-1],
        base=base_link(base_model),
        scheme=recipe.numbers.name,
        method=METHOD_NAMES.get(recipe.method, recipe.method),
        weights=_weights(recipe),
        activations=_activations(recipe),
        tower=tower if balanced else tower + _UNBALANCED,
        before=megabytes[0],
        after=megabytes[1],
        kept="In 16 bits: " + ", ".join(f"`{pattern}`" for pattern in kept) + "." if kept else "",
        folder=folder_name,
        trust_argument=", trust_remote_code=True" if recipe.trust_remote_code else "",
        trust_option=_trust_option(recipe),
        transformers=transformers.strip(),
        vllm=vllm.strip("\n"),
        results=unmeasured(folder_name, base_model),
        files="".join(f"{text}\n" for name, text in _FILES.items() if name in files).strip(),
        recipe=recipe_yaml,
        citation=citation(recipe, base_model),
    )


def with_plain_call(recipe: Recipe, folder_name: str, note: str) -> str:
    """transformers' call, unless the model brings its own code, and ``note`` on it."""
    # Which class a model's own code has for it is the code's affair.
    return note if recipe.trust_remote_code else _PLAIN_CALL.format(folder=folder_name) + note


def with_serve_command(recipe: Recipe, folder_name: str, note: str) -> str:
    """vLLM's command, and ``note`` on it."""
    return f"    vllm serve {folder_name}{_trust_option(recipe)}\n\n{note}"


def _trust_option(recipe: Recipe) -> str:
    return " --trust-remote-code" if recipe.trust_remote_code else ""


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


def unmeasured(folder_name: str, base_model: str) -> str:
    """The section of a model that nobody has evaluated, with the commands that evaluate it and fill the section."""
    run, baseline = (f"runs/{Path(name).name}" for name in (folder_name, base_model.partition("@")[0]))
    return f"""{RESULTS}

Not measured yet. The first command asks this model and the one that it was made from the same questions (`--tasks` or
`--data` says which), the second writes here what it found:

    mbq evaluate {folder_name} --baseline {base_model} --output runs
    mbq card {folder_name} --results {run} --baseline {baseline}"""


def citation(recipe: Recipe, base_model: str) -> str:
    """The section that says what to cite: the float model, and the papers of what was done to it."""
    papers = list(_PAPERS.get(recipe.method, []))
    if recipe.vision_tower and _SMOOTHQUANT not in papers:
        papers.append(_SMOOTHQUANT)
    model = f"{base_link(base_model)}, as its own card asks"
    if not papers:
        return f"## Citation\n\nCite {model}.\n"
    entries = "\n\n".join(papers)
    return f"## Citation\n\nCite {model}, and how it was quantized:\n\n```bibtex\n{entries}\n```\n"


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
