"""The tasks by name. A task is one file and one line here.

A factory is called with the values of all task flags by name, and takes those it needs; the others go to `_`.
`answers_needed` and `passages_needed` are those of `Task`.
"""

from collections.abc import Callable

from src.tasks.base import Example, Task, example_rng
from src.tasks.qa import QA

__all__ = ["TASKS", "Example", "Task", "example_rng"]

TASKS: dict[str, Callable[..., Task]] = {
    "base": lambda answers_needed=True, passages_needed=False, **_: Task(answers_needed, passages_needed),
    "qa": lambda qa_prompt_format, answers_needed=True, passages_needed=False, **_: QA(
        qa_prompt_format, answers_needed, passages_needed
    ),
}
