"""Accuracy of models on questions with known answers, with intervals and paired differences."""

from mbq.evaluation.command import run
from mbq.evaluation.greedy import answers
from mbq.evaluation.questions import Questions, prepare, select
from mbq.evaluation.results import Results
from mbq.evaluation.run import evaluate
from mbq.evaluation.runs import Answer, Run, write_run
from mbq.evaluation.scoring import score

__all__ = [
    "Answer",
    "Questions",
    "Results",
    "Run",
    "answers",
    "evaluate",
    "prepare",
    "run",
    "score",
    "select",
    "write_run",
]
