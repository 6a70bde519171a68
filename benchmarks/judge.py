"""Let a language model judge the passages of many questions beforehand, for runs that learn from that.

    python -m benchmarks.judge RESULTS K FLAGS OF train.py, or of evaluate.py with --rerank_by_reader

Fills --cache_judgements with what the script will ask about the first K passages of each question in a result file of
evaluate.py. Pairs of both come passage by passage, because what is computed of a passage serves all of its questions:
several times as fast as in training, where the questions of a batch share little. It ends with writing RESULTS with the
ending `.judged`, a line for each pair: the ids, and the mean log-likelihoods of the question and, if there is one, of
the answer.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from atlas.command_line import parse_config, quiet_until_started
from atlas.config import Config
from atlas.files.jsonl import JsonlCorpus, replacing
from atlas.model.load import Model
from atlas.model.signals import likelihoods_of_question_and_answer, reading_of
from atlas.model.tokenization import load_reader_tokenizer
from atlas.runtime.device import autocast

TOGETHER = 256  # pairs of question and passage
CPU = torch.device("cpu")


def judge(config: Config, lines: Sequence[dict], k: int) -> Iterator[dict[str, str | float]]:
    """Judge the first k passages of each line of a result file as a frozen reader does: what is found of each pair."""
    files = [line for path in config.run.train_data for line in JsonlCorpus(path)]
    targets = {line["id"]: f"<extra_id_0> {line['target']}" for line in files}
    tokenizer = load_reader_tokenizer(config.model.reader_model_type)
    model = Model.load(
        config.model, config.retriever_training, config.optimisation, None, tokenizer, CPU, training=bool(targets)
    )
    by_answers = targets and config.retriever_training.judges_by_answers  # not in an evaluation
    pairs = [(line, passage) for line in lines for passage in line["passages"][:k]]
    pairs.sort(key=lambda pair: (len(pair[1]["text"]), pair[1]["id"]))
    started = time.monotonic()
    for at in range(0, len(pairs), TOGETHER):
        some = pairs[at : at + TOGETHER]
        rows = [[]] * len(some)
        if by_answers:
            rows = model.inputs.target_tokens([targets[line["id"]] for line, _ in some])
        queries, passages = [line["query"] for line, _ in some], [[passage] for _, passage in some]
        judged = model.inputs.judging(queries, passages, rows, "question")
        with torch.no_grad(), autocast(CPU, config.optimisation.precision):
            found = likelihoods_of_question_and_answer(reading_of(model.reader, judged, 1.0, model.known))
        names = ("question", "answer") if by_answers else ("question",)
        for (line, passage), *of_pair in zip(some, *(part.flatten().tolist() for part in found), strict=True):
            yield {"id": line["id"], "passage": passage["id"], **dict(zip(names, of_pair, strict=False))}
        seconds = time.monotonic() - started
        print(f"{at + len(some)} of {len(pairs)} passages, {seconds:.0f} s", flush=True)


def main() -> None:
    results, k, *flags = sys.argv[1:]
    program = "train" if "--train_data" in flags else "evaluate"
    judged = judge(parse_config(flags, program=program), list(JsonlCorpus(Path(results))), int(k))
    with replacing(Path(results).with_suffix(".judged")) as beside, open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in judged)


if __name__ == "__main__":
    quiet_until_started()
    main()
