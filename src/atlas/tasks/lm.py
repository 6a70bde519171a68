"""Prefix language modelling: continue a text (Izacard et al. 2022, section 2.3)."""

import random
import re
from collections.abc import Mapping

from atlas.tasks.base import TaskSetup
from atlas.tasks.text import TextTask


class LM(TextTask):
    """The query is the beginning of a text, the target the rest; flags set the query's least and largest share."""

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        self.min_ratio, self.max_ratio = setup.flags.min_lm_context_ratio, setup.flags.max_lm_context_ratio

    def pair(self, record: Mapping, rng: random.Random) -> tuple[str, str]:
        words = re.findall(r"\s*\S+", record["text"])  # each with the white space before it
        cut = rng.randint(int(self.min_ratio * len(words)), int(self.max_ratio * len(words)))
        cut = min(cut, len(words) - 1)  # the target has at least one word
        return "".join(words[:cut]), "".join(words[cut:])
