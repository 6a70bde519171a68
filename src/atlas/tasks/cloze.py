"""Cloze questions: statements in which a salient span, such as a name or a number, is to be filled in.

Made from a corpus, this is salient span masking (Guu et al. 2020, arXiv 2002.08909, section 3.4); mlm masks at random.
"""

from collections.abc import Mapping

from atlas.tasks.base import TaskSetup
from atlas.tasks.qa import QuestionAnswering


class Cloze(QuestionAnswering):
    """Lines `{"id": ..., "query": ..., "answers": [...]}`, with `<extra_id_0>` in place of the answer in the query.

    A line with the `id` of a passage was made from that passage, so the passage is not retrieved for it.
    """

    fields = "`query` (a string with <extra_id_0>), `answers` (a list of strings)"
    filters_by_id = True

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        self.prompt_format = "{question}"  # the line is the query

    def question_field(self, record: Mapping) -> str:
        return "query"

    def question(self, record: Mapping) -> str:
        query = super().question(record)
        if "<extra_id_0>" not in query:
            raise ValueError(f"`query` has no <extra_id_0> in place of the answer: {query!r:.60}")
        return query
