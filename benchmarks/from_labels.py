"""train.py with the question's own paragraph in the place of the reader's judgement: the bar for what that is worth.

    python -m benchmarks.from_labels FLAGS OF train.py

Questions are those of prepare_real.py, which name their paragraph. A paragraph that is not found teaches nothing.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from atlas.command_line import parse_config, quiet_until_started
from atlas.files.jsonl import JsonlCorpus
from atlas.model import signals
from atlas.model.inputs import JudgingRows
from atlas.model.prompts import PromptInputs
from train import train

CERTAIN = 100.0  # the gold score of the right paragraph; any temperature below 10 leaves the others nothing


class Labelled:
    """Keeps which of a batch's passages are right from where they are prepared to where they would be judged."""

    def __init__(self, gold: dict[str, str]) -> None:
        self.gold, self.right = gold, torch.empty(0)

    def install(self) -> None:
        """For this process: every gold-score mode becomes this one."""
        prepare = PromptInputs.judging

        def judging(
            inputs: PromptInputs, queries: Sequence[str], passages: Sequence[Sequence[dict[str, Any]]], *others: Any
        ) -> JudgingRows:
            ids = [[passage["id"] for passage in of_query] for of_query in passages]
            self.right = torch.tensor(
                [[i == self.gold[query] for i in row] for query, row in zip(queries, ids, strict=True)]
            )
            return prepare(inputs, queries, passages, *others)

        PromptInputs.judging = judging
        signals.PROMPT_MODES["ppmean"] = signals.Mode(self.signal, self.loss)

    def signal(self, reading: signals.Reading) -> torch.Tensor:  # (B, K)
        return CERTAIN * self.right.to(reading.mask.device)

    def loss(self, scores: torch.Tensor, gold: torch.Tensor, reading: signals.Reading, *others: Any) -> torch.Tensor:
        """Of the questions whose paragraph was found."""
        there = reading.mask & (gold > 0).any(1)[:, None, None]
        return signals.MODES["ppmean"].loss(scores, gold, reading._replace(mask=there), *others)


def main() -> None:
    config = parse_config(sys.argv[1:], program="train")
    lines = [line for path in config.run.train_data for line in JsonlCorpus(path)]
    Labelled({line["question"]: line["metadata"]["passage"] for line in lines}).install()
    train(config)


if __name__ == "__main__":
    quiet_until_started()
    main()
