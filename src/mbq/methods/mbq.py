"""MBQ (arXiv 2412.19509): vision tokens weigh what the block's sensitivity to them says.

Paper and released code differ. The paper weighs an error by the mean absolute gradient of its modality (eq. 14-17). The
released code, the default here, divides the two gradients, raises the ratio to at least its median over the blocks, and
takes the mean over vision and language tokens together (MAE) or apart (MSE).
"""

from __future__ import annotations

import torch

from mbq.equalization import Choice, gradient_weights, mae_weights, mse_weights
from mbq.group import Group
from mbq.methods.method import Method, SearchOptions
from mbq.qtensor import quantize


def equalize(group: Group, options: SearchOptions) -> Choice | None:
    return group.search(token_weights(group, options.objective, options.norm), options.norm, options.tokens)


def token_weights(group: Group, objective: str, norm: str) -> torch.Tensor:
    """What each token of the calibration set weighs, [token]."""
    weighing = group.weighing
    assert weighing is not None, "equalize_model gives one to a method that weighs"
    if objective == "paper":
        return gradient_weights(group.roles, weighing.language, weighing.vision)
    if norm == "mae":
        return mae_weights(group.roles, weighing.ratio)
    return mse_weights(group.roles, weighing.ratio)


MBQ = Method("mbq", equalize, round=quantize, weighs=True)
