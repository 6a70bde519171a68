"""Runs that never ran: the files that one leaves, with made-up questions, answers and passages."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    a + b for a in ("ba", "ko", "ri", "nu", "sel", "tam", "vor", "eth") for b in ("lin", "gra", "dus", "mon", "pel")
]


def make_run(
    directory: Path, n: int = 40, steps: int = 20, every: int = 10, k: int = 5, corpus: int = 200, seed: int = 0
) -> Path:
    """A training of `qa`, evaluated on `dev` and `test` every so many steps: n questions each, with k passages."""
    rng = random.Random(seed)
    directory.mkdir(parents=True)
    passages = [_passage(i, rng) for i in range(corpus)]
    questions = [_question(i, rng.choice(passages)) for i in range(n)]
    command = ["train.py", "--name", directory.name, "--task", "qa"]
    start = {"command": command, "versions": {"atlas": "1", "torch": "2", "faiss": None}, "device": "cpu, 2 threads"}
    lines = [{"kind": "start", "time": 1e9, "step": 0, "ranks": 2} | start]
    lines.append({"kind": "refresh", "time": 1e9 + 5, "step": 0, "seconds": 4.0, "passages": corpus})
    for step in range(5, steps + 1, 5):
        losses = {
            "loss/reader_loss": 4 / step,
            "loss/retriever_loss": 1 / step,
            "loss/train_loss": 5 / step,
            "lr": 1e-4,
        }
        times = {"runtime/retrieve": 0.1, "runtime/train_step": 0.5, "tokens_per_second": 900, "peak_memory_gib": 1.5}
        lines.append({"kind": "train", "time": 1e9 + 10 * step, "step": step} | losses | times)
        for file in ("dev", "test") if step % every == 0 else ():
            name = f"{file}-step-{step}.jsonl"
            chosen = random.Random(f"{seed} {file} {step}")
            metrics = _write_results(directory / name, questions, passages, k, step / steps, chosen)
            of_file = {"file": file, "seconds": 2.5, "examples": n, "metrics": metrics, "results": name}
            lines.append({"kind": "evaluation", "time": 1e9 + 10 * step + 3, "step": step} | of_file)
    write_lines(directory / "metrics.jsonl", lines)
    flags = "task: qa    [default: None]\nqa_prompt_format: question: {question} answer: <extra_id_0>\nseed: 0"
    (directory / "opt.log").write_text(f"# from step 1 on\n{flags}\nname: {directory.name}\n", encoding="utf-8")
    return directory


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _passage(number: int, rng: random.Random) -> dict[str, Any]:
    place, thing = (rng.choice(WORDS).capitalize() for _ in range(2))
    filling = " ".join(rng.choice(WORDS) for _ in range(60))
    text = f"The river of {place}{number} is {thing}{number}. {filling}."
    return {"id": f"p{number}", "title": f"{place}{number}: River", "section": "River", "text": text}


def _question(number: int, passage: dict[str, Any]) -> dict[str, Any]:
    subject, _, answer = passage["text"].partition(". ")[0].removeprefix("The river of ").partition(" is ")
    query = f"question: what is the river of {subject}? answer: <extra_id_0>"
    return {"query": query, "answers": [answer], "id": f"q{number}", "passage": passage}


def _write_results(
    path: Path,
    questions: list[dict[str, Any]],
    passages: list[dict[str, Any]],
    k: int,
    skill: float,
    rng: random.Random,
) -> dict[str, float]:
    right = found = 0
    rows = []
    for question in questions:
        row = {name: value for name, value in question.items() if name != "passage"}
        chosen = rng.sample(passages, k)
        if rng.random() < 0.9:
            chosen[int(k * rng.random() ** 2)] = question["passage"]
        shares = sorted((rng.random() for _ in chosen), reverse=True)
        row["passages"] = [
            passage | {"score": round(5 * share, 3), "judgement": round(share / sum(shares), 4)}
            for passage, share in zip(chosen, shares, strict=True)
        ]
        answer = question["answers"][0]
        knows = rng.random() < 0.4 + 0.4 * skill
        row["generation"] = answer if knows else rng.choice([f"the {answer} river", rng.choice(WORDS), ""])
        right += knows
        found += question["passage"] in chosen
        rows.append(row)
    write_lines(path, rows)
    shares = {"exact_match": right, "f1": right, "recall@1": found / 3, f"recall@{k}": found}
    return {name: 100 * share / len(questions) for name, share in shares.items()} | {"mrr": 0.5, "eval_loss": 2 - skill}
