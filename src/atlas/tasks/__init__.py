"""The tasks by name: a file and a line each. `base.py` says what a task is, `data.py` reads files with one.

May import: config, files, metrics, model, runtime.
"""

from atlas.tasks.base import Example, Judged, Task, TaskSetup, example_rng
from atlas.tasks.cloze import Cloze
from atlas.tasks.fever import Fever
from atlas.tasks.kilt import KILT
from atlas.tasks.lm import LM
from atlas.tasks.mlm import MLM
from atlas.tasks.multiple_choice import MultipleChoice
from atlas.tasks.qa import QuestionAnswering
from atlas.tasks.section import Section

__all__ = ["TASKS", "Example", "Judged", "Task", "TaskSetup", "example_rng"]

TASKS: dict[str, type[Task]] = {
    "base": Task,
    "qa": QuestionAnswering,
    "cloze": Cloze,
    "mlm": MLM,
    "lm": LM,
    "section": Section,
    "multiple_choice": MultipleChoice,
    "fever": Fever,
    "kilt": KILT,
}
