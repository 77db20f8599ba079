"""How likely a model finds answers that are given to it."""

from __future__ import annotations

from typing import Any

import torch

from mbq.evaluation.questions import Questions
from mbq.evaluation.scoring import answer_logits


@torch.inference_mode()
def likelihoods(model: Any, questions: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """[row] the mean negative log-likelihood of the reference answer's tokens, in nats, and whether they are greedy.

    The token that ends the turn is not counted.
    """
    means, greedy = torch.zeros(len(questions)), torch.zeros(len(questions), dtype=torch.bool)
    for batch, logits in answer_logits(model, questions):
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none")
        wrong = (logits.max(-1).indices != batch.labels).float()
        counted = torch.stack([loss, wrong, torch.ones_like(loss)]) * ~batch.ends
        losses, misses, tokens = loss.new_zeros(3, len(batch.rows)).index_add_(1, batch.question, counted)
        means[batch.rows.cpu()] = (losses / tokens).cpu()
        greedy[batch.rows.cpu()] = (misses == 0).cpu()
    return means, greedy
