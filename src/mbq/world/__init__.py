"""A synthetic world of heraldry that the reference models are trained on and tested with."""

from mbq.world.questions import questions, write
from mbq.world.tasks import TASKS, Task

__all__ = ["TASKS", "Task", "questions", "write"]
