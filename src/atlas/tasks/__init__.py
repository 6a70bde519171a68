"""The tasks by name. A task is one file and one line here.

May import: config, files, metrics, model, runtime.

A factory is called with the values of all task flags by name, the reader's `tokenizer` and `text_maxlength`, and takes
those it needs; the others go to `_`. `answers_needed` and `passages_needed` are those of `Task`; `training` says
whether the examples are to be learnt.
"""

from collections.abc import Callable

from atlas.tasks.base import Example, Task, example_rng
from atlas.tasks.cloze import Cloze
from atlas.tasks.fever import Fever
from atlas.tasks.kilt import KILT
from atlas.tasks.lm import LM
from atlas.tasks.mlm import MLM
from atlas.tasks.multiple_choice import MultipleChoice
from atlas.tasks.qa import QA
from atlas.tasks.section import Section

__all__ = ["TASKS", "Example", "Task", "example_rng"]

TASKS: dict[str, Callable[..., Task]] = {
    "base": lambda **others: Task(**_needs(**others)),
    "qa": lambda qa_prompt_format, **others: QA(qa_prompt_format, **_needs(**others)),
    "cloze": lambda **others: Cloze(**_needs(**others)),
    "mlm": lambda tokenizer, text_maxlength, mlm_noise_density, mlm_mean_noise_span_length, **others: MLM(
        tokenizer, text_maxlength, mlm_noise_density, mlm_mean_noise_span_length, **_of_texts(**others)
    ),
    "lm": lambda min_lm_context_ratio, max_lm_context_ratio, **others: LM(
        min_lm_context_ratio, max_lm_context_ratio, **_of_texts(**others)
    ),
    "section": lambda **others: Section(**_of_texts(**others)),
    "multiple_choice": lambda tokenizer, text_maxlength, multiple_choice_num_options, **others: MultipleChoice(
        tokenizer, text_maxlength, multiple_choice_num_options, **_orders(**others), **_needs(**others)
    ),
    "fever": lambda **others: Fever(**_needs(**others)),
    "kilt": lambda **others: KILT(**_needs(**others)),
}


def _needs(answers_needed: bool = True, passages_needed: bool = False, **_: object) -> dict:
    return {"answers_needed": answers_needed, "passages_needed": passages_needed}


def _orders(
    multiple_choice_train_permutations: str, multiple_choice_eval_permutations: str, training: bool = False, **_: object
) -> dict:
    permutations = multiple_choice_train_permutations if training else multiple_choice_eval_permutations
    return {"permutations": permutations, "repeats": training}


def _of_texts(min_words_per_lm_instance: int | None = None, passages_needed: bool = False, **_: object) -> dict:
    return {"min_words": min_words_per_lm_instance, "passages_needed": passages_needed}
