"""Accuracy of models on questions with known answers, with intervals and paired differences."""

from mbq.evaluation.questions import Questions, prepare, select
from mbq.evaluation.results import Results
from mbq.evaluation.run import evaluate, run
from mbq.evaluation.scoring import answers, score

__all__ = ["Questions", "Results", "answers", "evaluate", "prepare", "run", "score", "select"]
