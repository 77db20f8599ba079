"""MBQ (arXiv 2412.19509): vision tokens weigh what the block's sensitivity to them says.

Paper and released code differ. The paper weighs an error by the mean absolute gradient of its modality (eq. 14-17). The
released code, the default here, divides the two gradients, raises the ratio to at least its median over the blocks, and
takes the mean over vision and language tokens together (MAE) or apart (MSE).
"""

from __future__ import annotations

import torch

from mbq.equalization import TokenRoles, gradient_weights, mae_weights, mse_weights
from mbq.group import Weighing
from mbq.methods.method import Method, SearchOptions, search
from mbq.qtensor import quantize


def token_weights(roles: TokenRoles, weighing: Weighing | None, options: SearchOptions) -> torch.Tensor:
    assert weighing is not None, "equalize_model gives one to a method that weighs"
    if options.objective == "paper":
        return gradient_weights(roles, weighing.language, weighing.vision)
    if options.norm == "mae":
        return mae_weights(roles, weighing.ratio)
    return mse_weights(roles, weighing.ratio)


MBQ = Method("mbq", search, quantize, token_weights, weighs=True)
