"""What a method is: two functions and the options that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mbq.equalization import POWERS, Choice, TokenRoles
from mbq.errors import MBQError
from mbq.group import Group, Weighing
from mbq.qtensor import QTensor
from mbq.scheme import WeightScheme


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search; each method reads those that it has.

    norm             "mae" or "mse", of awq, fixed and mbq alike, so that only the weights of tokens tell them apart
    objective        of mbq: "released", or "paper" for the weights of eq. 14-17 (mean absolute gradients, no floor)
    vision_weight    of a vision token in the method fixed, where a language token has 1
    smooth_alpha     SmoothQuant's alpha
    floor            the least vision-to-language ratio of mbq's released objective; None is the median over blocks
    gqa_fold         fold o's vector into v under grouped-query attention too
    distorted_input  a block reads what the quantized blocks before it give; the targets stay the float model's outputs
    parity           the released search choice by choice: padding counts in statistics and in awq's loss, and the
                     answer tokens themselves are the language positions (the batches leave the end of turn out)
    tokens           that the first comparison of all candidates looks at; None: every comparison looks at all
    """

    norm: str = "mae"
    objective: str = "released"
    vision_weight: float = 0.1
    smooth_alpha: float = 0.5
    floor: float | None = None
    gqa_fold: bool = False
    distorted_input: bool = False
    parity: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in POWERS:
            raise MBQError(f"The norm is {self.norm!r}; choose one of {', '.join(POWERS)}.")
        if self.objective not in ("released", "paper"):
            raise MBQError(f"The objective is {self.objective!r}; choose released or paper.")
        if self.parity and self.gqa_fold:
            raise MBQError("--parity reproduces a search without the v to o fold; leave --gqa-fold out.")


@dataclass(frozen=True)
class Method:
    """How a group's vector is chosen, and how a weight becomes codes.

    equalize       (group, options) -> the vector, or None to leave the group alone; None: nothing is equalized
    token_weights  (roles, weighing, options) -> [token]: what ``Group.search`` weighs errors by; None: it is not used
    round          (weight [out, in], scheme) -> codes
    weighs         ``token_weights`` needs a Weighing
    """

    name: str
    equalize: Callable[[Group, SearchOptions], Choice | None] | None
    round: Callable[[torch.Tensor, WeightScheme], QTensor]
    token_weights: Callable[[TokenRoles, Weighing | None, SearchOptions], torch.Tensor] | None = None
    weighs: bool = False


def search(group: Group, options: SearchOptions) -> Choice:
    """``equalize`` of the methods that differ in ``token_weights`` alone."""
    return group.search(options.norm)
