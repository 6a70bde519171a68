"""The tasks by name. A task is one file and one line here.

A factory is called with the values of all task flags by name, the reader's `tokenizer` and `text_maxlength`, and takes
those it needs; the others go to `_`. `answers_needed` and `passages_needed` are those of `Task`.
"""

from collections.abc import Callable

from src.tasks.base import Example, Task, example_rng
from src.tasks.lm import LM
from src.tasks.mlm import MLM
from src.tasks.qa import QA
from src.tasks.section import Section

__all__ = ["TASKS", "Example", "Task", "example_rng"]

TASKS: dict[str, Callable[..., Task]] = {
    "base": lambda answers_needed=True, passages_needed=False, **_: Task(answers_needed, passages_needed),
    "qa": lambda qa_prompt_format, answers_needed=True, passages_needed=False, **_: QA(
        qa_prompt_format, answers_needed, passages_needed
    ),
    "mlm": lambda tokenizer, text_maxlength, mlm_noise_density, mlm_mean_noise_span_length, **others: MLM(
        tokenizer, text_maxlength, mlm_noise_density, mlm_mean_noise_span_length, **_of_texts(**others)
    ),
    "lm": lambda min_lm_context_ratio, max_lm_context_ratio, **others: LM(
        min_lm_context_ratio, max_lm_context_ratio, **_of_texts(**others)
    ),
    "section": lambda **others: Section(**_of_texts(**others)),
}


def _of_texts(min_words_per_lm_instance: int | None = None, passages_needed: bool = False, **_: object) -> dict:
    return {"min_words": min_words_per_lm_instance, "passages_needed": passages_needed}
