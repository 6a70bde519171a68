"""Masked language modelling: fill in spans that were removed from a text (Raffel et al. 2020, section 3.1.4)."""

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from atlas.tasks.base import Example, TaskSetup
from atlas.tasks.text import TextTask


class MLM(TextTask):
    """The query is the text with sentinels in place of some spans; the target is each sentinel followed by its span.

    A text is truncated to `--text_maxlength` tokens first, and skipped if nothing but sentinels is left of it.
    """

    skips = f"{TextTask.skips}, or consist of sentinels"

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        self.tokenizer, self.text_maxlength = setup.tokenizer, setup.text_maxlength
        self.noise_density = setup.flags.mlm_noise_density
        self.mean_span_length = setup.flags.mlm_mean_noise_span_length
        self._marks = {self.tokenizer.pad_id, self.tokenizer.eos_id, *self.tokenizer.sentinel_ids}

    def check(self, record: Mapping) -> bool:
        if not super().check(record):
            return False
        text = self.text(record, "text")
        # No sentinel begins with a letter or a digit, so nearly all lines need no tokenizer here.
        return text.lstrip()[0].isalnum() or bool(self._tokens(text))

    def pair(self, record: Mapping, rng: random.Random) -> tuple[str, str]:
        tokens = self._tokens(record["text"])
        sentinels = self.tokenizer.sentinel_ids
        query, target, start = [], [], 0
        for sentinel, (kept, noise) in zip(sentinels, self._spans(len(tokens), len(sentinels), rng), strict=False):
            query += [*tokens[start : start + kept], sentinel]
            target += [sentinel, *tokens[start + kept : start + kept + noise]]
            start += kept + noise
        query, target = self.tokenizer.decode([query, target], skip_special_tokens=False)
        return query, target

    def _tokens(self, text: str) -> list[int]:
        """The tokens that may be masked. A sentinel in the text would look like a masked span."""
        tokens = self.tokenizer.encode([text], self.text_maxlength, eos=False)[0]
        return [token for token in tokens if token not in self._marks]

    def metadata(self, record: Mapping) -> dict:
        return dict(record)

    def score(self, generation: str, example: Example) -> dict[str, float]:
        answers = [self._without_sentinels(answer) for answer in example.answers]
        return super().score(self._without_sentinels(generation), replace(example, answers=answers))

    def _without_sentinels(self, text: str) -> str:
        """The text without sentinels, through the tokenizer: cutting them out of the string would keep extra spaces."""
        return self.tokenizer.decode(self.tokenizer.encode([text]))[0] if "<extra_id_" in text else text

    def _spans(self, n: int, most: int, rng: random.Random) -> list[tuple[int, int]]:
        """Pairs of lengths, a kept span and the noise span after it, that add up to n tokens; at most `most` pairs."""
        noise = min(max(1, round(n * self.noise_density)), max(1, n - 1))  # keeps a token unless there is only one
        kept = n - noise
        pairs = min(max(1, round(noise / self.mean_span_length)), max(1, kept), most)
        return list(zip(_composition(kept, pairs, rng), _composition(noise, pairs, rng), strict=True))


def _composition(total: int, parts: int, rng: random.Random) -> list[int]:
    """Positive numbers that add up to `total` (or [0]), each such sequence with equal probability."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [end - start for start, end in pairwise([0, *cuts, total])]
