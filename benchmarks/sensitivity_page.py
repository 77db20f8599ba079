"""docs/sensitivity.md from stored gradients: a table a reference model, and what vision towers have to do with it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.results import SAMPLES
from benchmarks.results_page import FAMILY_NAMES, markdown
from benchmarks.sensitivity_means import MODELS, QUESTIONS, Means, sensitivity_of, shown
from mbq.figures import PART_NAMES
from mbq.world import TASKS

Stored = Mapping[str, tuple[dict[str, Any], dict[str, Means]]]
Draws = Mapping[str, np.ndarray]

HEAD = """# Sensitivity

Written by `python -m benchmarks.sensitivity`, as `mbq sensitivity` measures it: the mean absolute gradient of the
answer's loss with respect to the output of attention (o_proj) and of the MLP (down_proj), over the positions that
predict an answer token ("language") and over the vision tokens, averaged over {samples} calibration samples of the task
"caption". The paper (arXiv 2412.19509) finds the language gradient more than ten times the vision gradient in
LLaVA-OneVision-7B. In the last block vision tokens have none: nothing attends to them any more. Intervals (95 %,
bootstrap) are over the samples: other pictures of the same world would move a ratio by so much.
"""


TOWERS = """## Is the ratio a property of the architecture?

Six models of LLaVA-1.5's class differ in the vision tower alone. The language model is that of LLaVA-OneVision above,
the projector two layers; a picture takes 16 vision tokens (LLaVA-OneVision: 36). Each tower has three blocks: CLIP's
(class token, quick-GELU, a norm before the blocks; LLaVA reads it behind the second last), DINOv2's (class token,
LayerScale) and SigLIP's. Towers come pretrained, and each of these first learned one of

- **cells**: tower and projector name what is in each cell of a picture, 800 steps, as the reference models' towers did;
- **contrastive**, as CLIP: the class token finds the caption of its picture among 512, 800 steps;
- **distillation**, as DINOv2: a student agrees with its moving average on two disturbed copies of a picture, at the
  class token and at every patch, without labels, 800 steps; no crops and no masked patches.

After the last two the projector alone learned to name cells, 400 steps with the tower frozen. Then everything was
trained together, the tower too, by the stages of the reference models, until time was up: six models at once on one
H200, each `python -m training.train FAMILY --seed SEED --pretraining FIRST --steps 10000 --minutes 6.3`. `models/` has
the two whose towers learned as their namesakes do; of the other four the gradients are stored (`--runs` measures such
folders).

{trained}

"Cells" is what the tower (or, with the tower frozen, the projector) got right before; "captions" and "image tasks" are
exact matches on development questions after training; all in per cent. **The control is missing.** SigLIP with two
seeds was to show how far two runs of one recipe are apart, and both stayed at chance, to the end, in everything for
which a model has to find a place in the picture, as runs of this training sometimes do ([design.md](design.md)). The
others know less than the reference models: they had fewer steps.

Ratios on captions, in the blocks whose vision tokens have a gradient:

{blocks}

The geometric mean of these six, on captions and on 128 questions (each about another picture, the {tasks} other image
tasks in turn); and for captions the median over the samples of each one's own mean:

{means}

How many times as large one model's mean ratio on captions is as another's:

{pairs}

{answer}

{others}

{limits}
"""

ANSWER = """**Not of the tower's architecture, as far as these runs can tell.** A decoder block's gradients depend on
the tower only through the features that it gives. Among the four LLaVA models that learned captions, DINOv2's have
{cells} times CLIP's ratio where both towers learned cells, and {own} times where each learned as its namesake; two
models of one tower are {clip} (CLIP) and {dinov2} (DINOv2) apart. At most that is a direction: the difference between
towers is hardly larger than that between two models of one tower, and each is a pair. So the ratio is to be measured on
the model and the data at hand, as `mbq quantize` does."""

OTHERS = """Three other things move the ratio more. What is asked: short questions instead of captions give one and the
same model {least} to {most} times the ratio. What was learned: SigLIP's two models, none of whose captions are right,
have {first} and {second} on captions. And a few samples: where a model is sure of nearly every caption, five of
{samples} have {ov_share:.0%} (LLaVA-OneVision) and {iv_share:.0%} (InternVL) of the language gradient, and the ratio of
the means, which weighs samples by their gradient, hangs on them. By it the two are at {ov} and {iv}; by the median over
samples, at {ov_median} and {iv_median}. Qwen2-VL is surely below both (median {qw_median}); its tower, its language
model (grouped queries, another rope) and its training all differ from theirs, and nothing here tells them apart."""

LIMITS = """What this cannot say. Each row is one run, and no recipe was learned twice, so the spread between seeds
alone is unknown: two models of one tower differ in the seed and in what the tower learned first. The runs ended at
different places ({low:.0f} to {high:.0f} % of the image tasks, without SigLIP), and a ratio moves with that, too.
Contrastive learning and distillation on 512 drawn pictures a step are not CLIP's or DINOv2's pretraining, and the
towers went on learning with the language model, which LLaVA-1.5's does not. All models have four blocks of 128 channels
and know one small world; the intervals are over its pictures alone."""

PAIRS = (
    ("one tower, another start and seed", "llava_clip-cells", "llava_clip"),
    ("one tower, another start and seed", "llava_dinov2-cells", "llava_dinov2"),
    ("one tower, another seed, both at chance", "llava_siglip-0", "llava_siglip-1"),
    ("two towers, same start and seed", "llava_dinov2-cells", "llava_clip-cells"),
    ("two towers, each its own start, same seed", "llava_dinov2", "llava_clip"),
    ("two towers, another start and seed", "llava_dinov2-cells", "llava_clip"),
    ("two towers, another start and seed", "llava_dinov2", "llava_clip-cells"),
    ("reference models", "internvl", "llava_onevision"),
    ("reference models", "internvl", "qwen2_vl"),
    ("reference models", "llava_onevision", "qwen2_vl"),
)


def page(stored: Stored) -> str:
    """Tables of the reference models' gradients, the ratios' range in a sentence, and the towers."""
    parts = [HEAD.format(samples=SAMPLES)]
    for family, title in FAMILY_NAMES.items():
        means = stored[family][1]["caption"]
        parts += [f"## {title}\n", table(means), "", sentence(means), ""]
        parts += [f"![Gradients of {title} a block](sensitivity-{family}.png)", ""]
    return "\n".join([*parts, towers(stored)])


def table(means: Means) -> str:
    """A row a block."""
    columns = [f"{name}, {column}" for name in PART_NAMES.values() for column in ("language", "vision", "ratio")]
    found, ratios, rows = sensitivity_of(means), means.ratios(), []
    for block in range(means.vision.shape[1]):
        row = [str(block)]
        for index, part in enumerate(PART_NAMES):
            ratio = shown(ratios[:, block, index]) if block < ratios.shape[1] else "no vision gradient"
            row += [f"{found.language[part][block]:.2e}", f"{found.vision[part][block]:.2e}", ratio]
        rows.append(row)
    return markdown(["block", *columns], rows)


def sentence(means: Means) -> str:
    ratios = means.ratios()[0]
    return (
        f"Where vision tokens have a gradient, language's is {ratios.min():.1f} to {ratios.max():.1f} times as large."
    )


def towers(stored: Stored) -> str:
    """What was trained, the ratios, comparisons and the answer."""
    caption = {name: means["caption"].mean_ratios() for name, (_, means) in stored.items()}
    median = {name: means["caption"].median_ratios() for name, (_, means) in stored.items()}
    asked = {name: means["questions"].mean_ratios() for name, (_, means) in stored.items()}
    titles = {name: MODELS[name].title for name in stored}
    rows = [[titles[name], *(shown(ratios[name]) for ratios in (caption, median, asked))] for name in stored]
    pairs = [[why, titles[one], titles[other], shown(caption[one] / caption[other])] for why, one, other in PAIRS]
    return TOWERS.format(
        trained=_trained(stored),
        blocks=_blocks(stored),
        tasks=len(QUESTIONS),
        means=markdown(["model", "captions", "captions, median", "questions"], rows),
        pairs=markdown(["", "one", "other", "times"], pairs),
        **{name: textwrap.fill(text, 120) for name, text in _sentences(stored, caption, median, asked).items()},
    )


def _sentences(stored: Stored, caption: Draws, median: Draws, asked: Draws) -> dict[str, str]:
    """The paragraphs behind the tables, by their names in TOWERS."""

    def times(one: str, other: str) -> str:
        return shown(caption[one] / caption[other])

    learned = [name for name in stored if stored[name][0]["accuracy"]["caption"] > 50]
    factors = [asked[name][0] / caption[name][0] for name in learned]
    known = [_image_mean(stored[name][0]) for name in learned if _llava(name)]
    answer = ANSWER.format(
        cells=times("llava_dinov2-cells", "llava_clip-cells"),
        own=times("llava_dinov2", "llava_clip"),
        clip=times("llava_clip-cells", "llava_clip"),
        dinov2=times("llava_dinov2-cells", "llava_dinov2"),
    )
    others = OTHERS.format(
        least=f"{min(factors):.0f}",
        most=f"{max(factors):.0f}",
        samples=SAMPLES,
        first=shown(caption["llava_siglip-0"]),
        second=shown(caption["llava_siglip-1"]),
        ov_share=stored["llava_onevision"][1]["caption"].largest_share(5),
        iv_share=stored["internvl"][1]["caption"].largest_share(5),
        ov=shown(caption["llava_onevision"]),
        iv=shown(caption["internvl"]),
        ov_median=shown(median["llava_onevision"]),
        iv_median=shown(median["internvl"]),
        qw_median=shown(median["qwen2_vl"]),
    )
    return {"answer": answer, "others": others, "limits": LIMITS.format(low=min(known), high=max(known))}


def _llava(name: str) -> bool:
    return MODELS[name].title.startswith("LLaVA,")


def _image_mean(content: Mapping[str, Any]) -> float:
    tasks = [task.name for task in TASKS.values() if task.needs_image]
    return sum(content["accuracy"][task] for task in tasks) / len(tasks)


def _trained(stored: Stored) -> str:
    """A row a model: its tower, what that learned, and what the model knows."""
    rows = []
    for name, (content, _) in stored.items():
        model, first = MODELS[name], content["first"]
        known = [f"{content['accuracy']['caption']:.1f}", f"{_image_mean(content):.1f}"]
        cells = f"{first['cells']:.1f}"
        rows.append([model.title, model.tower, model.first, str(model.seed), cells, f"{content['steps']:,}", *known])
    header = ["model", "tower", "learned first", "seed", "cells", "steps", "captions", "image tasks"]
    return markdown(header, rows)


def _blocks(stored: Stored) -> str:
    """A row a LLaVA model, a column a block and part."""
    rows, columns = [], []
    for name in filter(_llava, stored):
        ratios = stored[name][1]["caption"].ratios()
        places = [(block, index) for index in range(len(PART_NAMES)) for block in range(ratios.shape[1])]
        columns = [f"{list(PART_NAMES.values())[index]} {block}" for block, index in places]
        rows.append([MODELS[name].title, *(shown(ratios[:, block, index]) for block, index in places)])
    return markdown(["model", *columns], rows)
