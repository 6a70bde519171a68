"""Questions with options, read in several orders so that no letter is preferred (Izacard et al. 2022)."""

import hashlib
import json
import math
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import islice, permutations
from string import ascii_uppercase as LETTERS

from atlas.tasks.base import Example, Task, TaskSetup

PROMPT_TOKENS = 356  # as published: with --text_maxlength 512 that leaves room for a passage


class MultipleChoice(Task):
    """Lines `{"question": ..., "options": {"A": ..., "B": ..., ...}, "answer": "B"}`, with an example for each order.

    The first order is that of the line. A long question is truncated on the left. In training, a line with fewer
    options repeats its orders, so that every line has equally many examples; in evaluation it has fewer.
    """

    fields = "`question` (a string), `options` (an object of strings: A, B, ...) and `answer` (the letter of one)"
    joins = True

    def __init__(self, setup: TaskSetup) -> None:
        super().__init__(setup)
        flags = setup.flags
        self.tokenizer, self.repeats = setup.tokenizer, setup.training
        self.num_options = flags.multiple_choice_num_options
        self.permutations = (
            flags.multiple_choice_train_permutations if setup.training else flags.multiple_choice_eval_permutations
        )
        # One token for </s>: truncating the reader's input must not remove the options at the end of the prompt.
        most = setup.text_maxlength - 1
        self.prompt_tokens = sorted({min(PROMPT_TOKENS, most), most})  # more where the options leave no room
        self.examples_per_line = self.n_orders(self.num_options)
        self.tokens = dict(zip(LETTERS[: self.num_options], self._letter_tokens(self.num_options), strict=True))

    def n_orders(self, n_options: int) -> int:
        return {"single": 1, "cyclic": n_options, "all": math.factorial(n_options)}[self.permutations]

    def order(self, n_options: int, number: int) -> tuple[int, ...]:
        """The option at each place: order 0 is 0, 1, 2, ..."""
        if self.permutations == "all":
            return next(islice(permutations(range(n_options)), number, None))
        return tuple((place + number) % n_options for place in range(n_options))

    def question_field(self, record: Mapping) -> str:
        return "question"

    def process(self, record: Mapping, rng: random.Random) -> Example:
        return self.example(record, rng, 0)

    def example(self, record: Mapping, rng: random.Random, number: int) -> Example | None:
        """The line as it is for `number` 0; with its options in another order for other numbers."""
        question, options, answer = self._read(record)
        n_orders = self.n_orders(len(options))
        if number >= n_orders and not self.repeats:
            return None
        order = self.order(len(options), number % n_orders)
        letters, texts = list(options), list(options.values())
        options = {letter: texts[option] for letter, option in zip(letters, order, strict=True)}
        if answer is not None:
            answer = letters[order.index(letters.index(answer))]
        # Identifies the question and its options, wherever the line is and whatever its answer.
        uid = hashlib.blake2b(json.dumps([question, texts]).encode(), digest_size=8).hexdigest()
        line = {key: value for key, value in record.items() if key != "passages"}
        changed = {"question": question, "options": options, "answer": answer, "is_original": number == 0, "uid": uid}
        return Example(
            query=self._query(question, options),
            words=" ".join([question, *texts]),
            target="" if answer is None else f"<extra_id_0> {answer}",
            answers=[] if answer is None else [answer],
            metadata=line | changed,
            id=self.identifier(record),
            passages=self.passages(record),
            choices={letter: self.tokens[letter] for letter in options},
            first_of_line=number == 0,
        )

    def check(self, record: Mapping) -> bool:
        question, options, _ = self._read(record)
        self._query(question, options)
        self.passages(record)
        return True

    def join(self, rows: list[dict]) -> tuple[dict, dict[str, float]]:
        """The row of the line's own order, with each option's probability: the mean over the orders.

        As published, its `generation` is the letter of the most probable option; `rows` have what the reader wrote.
        In each order, an option's probability is the softmax over the letters' logits at the letter of its text.
        Options with the same text share their probability.
        """
        joined = {key: value for key, value in rows[0].items() if key != "choice_logits"}
        values = {}
        if "choice_logits" in rows[0]:
            by_text = defaultdict(list)
            for row in rows:
                of_letter = softmax(row["choice_logits"])
                for letter, text in row["metadata"]["options"].items():
                    by_text[text].append(of_letter[letter])
            options = rows[0]["metadata"]["options"]
            of_all = {letter: by_text[text] for letter, text in options.items()}
            means = {letter: sum(shares) / len(shares) for letter, shares in of_all.items()}
            chosen = max(means, key=means.get)
            joined |= {"generation": chosen, "choice_probs": means, "all_probs": of_all}
            values = {"debiased_accuracy": float(options[chosen] == options[rows[0]["metadata"]["answer"]])}
        return joined | {"permutations": rows}, values

    def _read(self, record: Mapping) -> tuple[str, dict[str, str], str | None]:
        """Question, options in the order of their letters, answer. Raises: ValueError."""
        question = self.text(record, "question", end=True)
        options = record.get("options")
        if options is None:
            raise self.missing(record, "options")
        if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
            raise ValueError(f"`options` must be an object of strings by letter, found {options!r:.60}")
        letters = sorted(options)
        if letters != list(LETTERS[: len(letters)]) or len(letters) < 2:
            found = ", ".join(letters)
            raise ValueError(f"`options` must be lettered A, B, and so on, at least two; found {found!r:.60}")
        if len(letters) > self.num_options:
            raise ValueError(
                f"{len(letters)} `options` are more than --multiple_choice_num_options {self.num_options}: raise it"
            )
        answer = self.text(record, "answer", optional=not self.answers_needed)
        if answer is not None and answer not in options:
            raise ValueError(f"`answer` must be one of {', '.join(letters)}, found {answer!r:.40}")
        return question, {letter: self.cut(options[letter]) for letter in letters}, answer

    def _query(self, question: str, options: dict[str, str]) -> str:
        """The prompt, with the longest end of the question that fits."""
        choices = " ".join(f"({letter}) {text}" for letter, text in options.items())

        def query(start: int) -> str:
            return f"question: {question[start:]} options: {choices} answer: <extra_id_0>"

        def fits(most: int, start: int) -> bool:
            return len(self.tokenizer.encode([query(start)], eos=False)[0]) <= most

        if fits(self.prompt_tokens[0], 0):
            return query(0)
        starts = (bisect_left(range(len(question)), True, key=partial(fits, most)) for most in self.prompt_tokens)
        start = next((start for start in starts if start < len(question)), len(question))
        if start:
            self.cuts[f"a question that does not fit into {self.prompt_tokens[0]} tokens with its options"] += 1
        return query(start)

    def _letter_tokens(self, n: int) -> list[int]:
        """The token that the reader generates after `<extra_id_0>` for each letter. Raises: ValueError."""
        rows = self.tokenizer.encode([f"<extra_id_0> {letter}" for letter in LETTERS[:n]], eos=False)
        if any(len(row) != 2 for row in rows) or len({row[1] for row in rows}) < n:
            raise ValueError(
                f"--reader_model_type: its vocabulary has no token for every letter from A to {LETTERS[n - 1]}"
            )
        return [row[1] for row in rows]


def softmax(logits: dict[str, float]) -> dict[str, float]:
    largest = max(logits.values())
    powers = {name: math.exp(logit - largest) for name, logit in logits.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}
