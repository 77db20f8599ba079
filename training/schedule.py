"""How fast a training learns at each step, and how many steps it takes."""

from __future__ import annotations

import torch


def learning_rate(step: int, steps: int, peak: float, decay: float) -> float:
    """Warm up over 200 steps, hold, and fall to a hundredth over the last ``decay`` of the steps."""
    falling = min(1.0, (steps - step) / (decay * steps))
    return peak * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * falling)


def steps_within(minutes: float, seconds: float, step: int, pace: float) -> int:
    """How many steps fit into ``minutes`` when ``step`` of them took ``seconds`` and one more takes ``pace``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return step + max(1, int((60 * minutes - seconds) / pace))
