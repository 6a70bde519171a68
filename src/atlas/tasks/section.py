"""Title to section generation: write a section of an article (Izacard et al. 2022, section 2.3)."""

import random
from collections.abc import Mapping

from atlas.tasks.text import TextTask


class Section(TextTask):
    """The query is `{title}, {section}`, the target the text. Lines without a section are skipped."""

    fields = "`id`, `title`, `section` and `text` (strings)"
    skips = f"lines without a `section`, and {TextTask.skips}"

    def check(self, record: Mapping) -> bool:
        long_enough = super().check(record)
        section = self.text(record, "section", optional=True, blank=True)
        if not section or not section.strip():
            return False
        self.text(record, "title", blank=True)
        return long_enough

    def pair(self, record: Mapping, rng: random.Random) -> tuple[str, str]:
        return f"{self.text(record, 'title', blank=True)}, {self.text(record, 'section')}", record["text"]
