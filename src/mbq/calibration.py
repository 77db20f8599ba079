"""Rows (messages and images) to calibration batches with a role for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CalibrationBatch:
    """One right-padded batch. All tensors are [batch, token] unless the model's processor says otherwise.

    inputs   what the model's forward takes (input_ids, attention_mask, pixel_values, ...), no labels
    labels   the answer tokens' ids, -100 elsewhere
    vision   bool, the vision tokens
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    vision: torch.Tensor
