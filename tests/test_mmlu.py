"""MMLU from its archive to accuracies by category: prepare_mmlu.py, the task, evaluate_mmlu_predictions.py."""

import itertools
import re

import pytest

import prepare_mmlu
from evaluation_scripts.evaluate_mmlu_predictions import CATEGORIES, SUBCATEGORY, SUBJECTS, result_files
from tests.kit import last_metrics, lettered_models, read_jsonl, run, slow, write_jsonl
from tests.programs import run_program
from tests.test_prepare_scripts import mmlu_archive, mmlu_files

pytestmark = pytest.mark.processes


def evaluate(*words):
    """What the script prints, or its sentence."""
    done = run_program(["evaluation_scripts/evaluate_mmlu_predictions.py", *words])
    if done.returncode:
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def accuracies(printed):
    """Name to questions, debiased, standard."""
    lines = [re.fullmatch(r" *(.+?) +(\d+) +([\d.]+|-) +([\d.]+|-)", line) for line in printed.splitlines()[1:]]
    return {line[1]: (int(line[2]), *(None if n == "-" else float(n) for n in line.groups()[2:])) for line in lines}


def result(dataset, debiased, standard, **changes):
    """A row of a result file with two options, whose answer is A."""
    line = {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "A", "dataset": dataset, "is_original": True}
    turned = line | {"options": {"A": "y", "B": "x"}, "answer": "B", "is_original": False}
    rows = [{"generation": "AB"[1 - standard], "metadata": line}, {"generation": "A", "metadata": turned}]
    probabilities = {"A": 0.6, "B": 0.4} if debiased else {"A": 0.4, "B": 0.6}
    return {"query": "q", "answers": ["A"], "choice_probs": probabilities, "permutations": rows} | changes


def test_the_table_of_subjects():
    """57 subjects, 17 subcategories and 4 categories, each in one place (Hendrycks et al. 2021)."""
    assert len(SUBCATEGORY) == sum(map(len, SUBJECTS.values())) == 57 and len(SUBJECTS) == 17
    assert sorted(itertools.chain(*CATEGORIES.values())) == sorted(SUBJECTS) and len(CATEGORIES) == 4
    sizes = {category: sum(len(SUBJECTS[name]) for name in names) for category, names in CATEGORIES.items()}
    assert list(sizes.values()) == [18, 13, 12, 14]


def test_questions_count_the_same(tmp_path):
    rows = [result("anatomy_test", 1, 0)] * 3 + [result("virology_test", 0, 0)] + [result("marketing", 0, 1)] * 4
    printed = evaluate(write_jsonl(tmp_path / "all-step-9.jsonl", rows[:4]))
    found = accuracies(printed)
    assert found["anatomy"] == (3, 100.0, 0.0) and found["virology"] == (1, 0.0, 0.0)
    assert found["health"] == found["other (business, health, misc.)"] == (4, 75.0, 0.0)
    assert found["all (2 of 57 subjects)"] == (4, 75.0, 0.0) and len(found) == 5
    without = [{key: value for key, value in row.items() if key != "choice_probs"} for row in rows[4:]]
    assert accuracies(evaluate(write_jsonl(tmp_path / "plain.jsonl", without)))["marketing"] == (4, None, 100.0)
    without[0]["permutations"][0].pop("generation")  # all four are made of this one
    assert accuracies(evaluate(write_jsonl(tmp_path / "plain.jsonl", without)))["marketing"] == (4, None, None)


def test_a_directory_of_runs(tmp_path):
    """The last step of each file, test questions unless --split says otherwise."""
    for subject, suffix, split, step, hit in (
        ("anatomy", "test", "test", 9, 0),
        ("anatomy", "test", "test", 10, 1),
        ("anatomy", "val", "valid", 10, 0),
        ("astronomy", "test", "test", 2, 0),
    ):
        (tmp_path / "runs" / subject).mkdir(parents=True, exist_ok=True)
        name = f"runs/{subject}/{subject}.{split}-step-{step}.jsonl"
        write_jsonl(tmp_path / name, [result(f"{subject}_{suffix}", hit, 1)])
    write_jsonl(tmp_path / "runs/anatomy/questions.jsonl", [{"question": "q"}])  # no result file
    found = accuracies(evaluate(tmp_path / "runs"))
    assert found["anatomy"] == (1, 100.0, 100.0) and found["astronomy"] == (1, 0.0, 100.0)
    assert found["all (2 of 57 subjects)"] == (2, 50.0, 100.0)
    assert accuracies(evaluate(tmp_path / "runs", "--split", "valid"))["anatomy"] == (1, 0.0, 100.0)
    write_jsonl(tmp_path / "runs/other-step-3.jsonl", [result("anatomy_test", 1, 1)])
    assert "anatomy is both in " in evaluate(tmp_path / "runs") and len(result_files(tmp_path / "runs")) == 4


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "contains no results"),
        (
            [{"query": "q", "answers": []}],
            "line 1: no `permutations`, so not a result of --task multiple_choice; found query",
        ),
        (
            [result("anatomy_test", 1, 1), result("cooking_test", 1, 1)],
            "line 2: `dataset` 'cooking_test' is not one of MMLU's",
        ),
        ([result(None, 1, 1)], "line 1: no `dataset` in the `metadata` of `permutations`; found question, options"),
        ([result("anatomy", 1, 1, permutations=[])], "line 1: 0 of its `permutations` have `is_original` set"),
        ([result("anatomy", 1, 1, permutations=3)], "line 1: no `permutations`"),
        (
            [result("anatomy", 1, 1, choice_probs={"A": 1.0})],
            "line 1: `answer` and `choice_probs` must have the letters",
        ),
        ([result("anatomy_val", 1, 1)], "no results for the split test, only for valid"),
    ],
)
def test_sentences(tmp_path, rows, sentence):
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    assert sentence in evaluate(file, *(["--split", "test"] if "split" in sentence else []))


def test_sentences_about_paths(tmp_path):
    assert "there is no file or directory" in evaluate(tmp_path / "nowhere")
    assert "no result files NAME-step-N.jsonl in it" in evaluate(tmp_path)
    (tmp_path / "a-step-1.jsonl").write_text('{"question": \n')
    assert "a-step-1.jsonl, line 1: not JSON" in evaluate(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    home = tmp_path_factory.mktemp("mmlu")
    (home / "data.tar").write_bytes(mmlu_archive(mmlu_files()))
    for name, rows in prepare_mmlu.prepare({"data.tar": home / "data.tar"}):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(home / name, rows)
    return home / "data/mmlu_data"


def flags(directory, train, evaluate_on):
    return {
        "task": "multiple_choice",
        "train_data": directory / train,
        "eval_data": directory / evaluate_on,
        "reader_model_type": lettered_models() / "reader",
        "multiple_choice_train_permutations": "cyclic",
        "multiple_choice_eval_permutations": "cyclic",
        "total_steps": 1,
        "n_context": 2,
    }


def expected(rows):
    """Debiased and standard accuracy, told from the rows the plain way."""
    debiased = [max(row["choice_probs"], key=row["choice_probs"].get) in row["answers"] for row in rows]
    standard = [row["permutations"][0]["generation"] in row["answers"] for row in rows]
    return [pytest.approx(100 * sum(hits) / len(rows), abs=0.06) for hits in (debiased, standard)]


def test_a_run_per_subject(prepared, tmp_path):
    for subject in ("anatomy", "college_physics"):
        train, test = (f"5-shot/{split}/{subject}.{split}.jsonl" for split in ("train", "test"))
        run(tmp_path, name=subject, **flags(prepared, train, test))
    found = accuracies(evaluate(tmp_path))
    together = []
    for subject, n in (("anatomy", 8), ("college_physics", 6)):
        rows = read_jsonl(tmp_path / subject / f"{subject}.test-step-1.jsonl")
        assert found[subject] == (n, *expected(rows)) and len(rows) == n
        together += rows
    assert found["all (2 of 57 subjects)"] == (14, *expected(together))


@pytest.mark.parametrize("setting", [slow("5-shot-multitask"), "full"])
def test_one_run_for_all_subjects(prepared, tmp_path, setting):
    directory = run(tmp_path, **flags(prepared, f"{setting}/train.jsonl", f"{setting}/combined_test.jsonl"))
    rows = read_jsonl(directory / "combined_test-step-1.jsonl")
    found = accuracies(evaluate(directory / "combined_test-step-1.jsonl"))
    assert found["all (2 of 57 subjects)"] == (14, *expected(rows))
    assert found["STEM"] == found["physics"] == found["college_physics"] == (6, *expected(rows[8:]))
    assert last_metrics(directory)["debiased_accuracy"] == pytest.approx(found["all (2 of 57 subjects)"][1], abs=0.06)
