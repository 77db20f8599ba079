"""Stored gradients of the reference models and of those by which towers are compared; ratios with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbq.evaluation.statistics import Interval
from mbq.sensitivity import PARTS, Sensitivity
from mbq.world import TASKS

QUESTIONS = tuple(task.name for task in TASKS.values() if task.needs_image and task.name != "caption")
RESAMPLES = 2_000


@dataclass(frozen=True)
class Model:
    """One model of the page; those in models/ have its name as their folder.

    first  what its tower learned before the language model was asked anything (training/pretraining.py)
    """

    title: str
    tower: str
    first: str
    seed: int


MODELS = {
    "llava_onevision": Model("LLaVA-OneVision", "SigLIP", "cells", 0),
    "internvl": Model("InternVL", "InternViT", "cells", 0),
    "qwen2_vl": Model("Qwen2-VL", "Qwen2-VL's", "cells", 0),
    "llava_clip": Model("LLaVA, CLIP", "CLIP", "contrastive", 1),
    "llava_clip-cells": Model("LLaVA, CLIP, cells", "CLIP", "cells", 0),
    "llava_dinov2": Model("LLaVA, DINOv2", "DINOv2", "distillation", 1),
    "llava_dinov2-cells": Model("LLaVA, DINOv2, cells", "DINOv2", "cells", 0),
    "llava_siglip-0": Model("LLaVA, SigLIP, first", "SigLIP", "cells", 0),
    "llava_siglip-1": Model("LLaVA, SigLIP, second", "SigLIP", "cells", 1),
}


@dataclass(frozen=True)
class Means:
    """Mean |dL/dY| of each sample over its vision tokens and over its language positions, [sample, block, part]."""

    vision: np.ndarray
    language: np.ndarray

    @classmethod
    def of(cls, vision: list[list[float]], language: list[list[float]]) -> Means:
        """From a list a sample, parts side by side within a block."""
        return cls(*(np.array(side).reshape(len(side), -1, len(PARTS)) for side in (vision, language)))

    def ratios(self) -> np.ndarray:
        """[1 + RESAMPLES, block, part] language / vision, but for the last block: of all samples, and resampled.

        Samples are drawn alike for all models, so that two models' ratios may be compared draw by draw.
        """
        samples = len(self.vision)
        drawn = np.random.default_rng(0).multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)
        counts = np.vstack([np.ones(samples), drawn])
        language, vision = (np.tensordot(counts, side[:, :-1], axes=1) for side in (self.language, self.vision))
        return language / vision

    def mean_ratios(self) -> np.ndarray:
        """[1 + RESAMPLES] the geometric mean of ``ratios`` over blocks and parts."""
        return np.exp(np.log(self.ratios()).mean(axis=(1, 2)))

    def median_ratios(self) -> np.ndarray:
        """[1 + RESAMPLES] the median over samples of the sample's own geometric mean."""
        logs = np.log(self.language[:, :-1] / self.vision[:, :-1]).mean(axis=(1, 2))
        drawn = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs)))
        return np.exp(np.median(np.vstack([logs, drawn]), axis=1))

    def largest_share(self, samples: int) -> float:
        """How much of the language gradient, over all blocks and parts, is that of the ``samples`` largest."""
        totals = np.sort(self.language.sum(axis=(1, 2)))[::-1]
        return float(totals[:samples].sum() / totals.sum())


def interval(draws: np.ndarray) -> Interval:
    """Of draws whose first is the estimate."""
    return Interval(float(draws[0]), *(float(bound) for bound in np.quantile(draws[1:], [0.025, 0.975])))


def shown(draws: np.ndarray) -> str:
    """``10.3 (9.9 to 10.7)``, three digits."""
    found = interval(draws)
    return "{} ({} to {})".format(*(_digits(value) for value in (found.estimate, found.low, found.high)))


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def sensitivity_of(means: Means) -> Sensitivity:
    sides = [side.mean(0) for side in (means.vision, means.language)]
    return Sensitivity(*({part: tuple(side[:, i].tolist()) for i, part in enumerate(PARTS)} for side in sides))
