"""Whole runs of tiny models: what they must compute whatever the number of ranks, and what they must leave alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from atlas.checkpoint import latest_checkpoint, load_checkpoint
from atlas.command_line import parse_config
from atlas.config import Optimisation
from atlas.runtime import distributed
from atlas.runtime.parallel import local_part
from atlas.training.trainer import Trainer
from tests.kit import command_line, last_metrics, logged, read_jsonl, recorded, run, run_on, slow, world, write_jsonl
from tests.ranks import run_on_ranks
from train import train

pytestmark = pytest.mark.processes

RETRIEVER = {"train_retriever": True, "query_side_retriever_training": True}


def losses_of(directory):
    return {name: logged(directory, f"loss/{name}_loss") for name in ("train", "reader", "retriever")}


@pytest.mark.parametrize("query_side", [slow(True), False])
def test_two_ranks_equal_accumulation(tmp_path, query_side):
    """2 ranks with batch 2 see in one step what 1 rank sees in two accumulated ones."""
    flags = {"train_retriever": True, "query_side_retriever_training": query_side}
    two = run_on(2, tmp_path / "two", total_steps=5, **flags)
    one = run(tmp_path / "one", total_steps=10, accumulation_steps=2, log_freq=2, **flags)
    for name, values in losses_of(one).items():
        assert len(values) == 5
        assert values == pytest.approx(losses_of(two)[name], abs=1e-5), name
    first, second = read_jsonl(one / "dev-step-10.jsonl"), read_jsonl(two / "dev-step-5.jsonl")
    assert len(first) == 11
    for a, b in zip(first, second, strict=True):
        assert (a["query"], a["generation"]) == (b["query"], b["generation"])
        assert [p["id"] for p in a["passages"]] == [p["id"] for p in b["passages"]]


def test_three_ranks_evaluate_like_one(tmp_path):
    run_on(3, tmp_path / "three", "evaluate", train_data=None, write_evidence=True)
    one = run(tmp_path / "one", "evaluate", train_data=None, write_evidence=True)
    a, b = (d / "run" / "dev-step-0.jsonl" for d in (tmp_path / "one", tmp_path / "three"))
    assert [row["id"] for row in read_jsonl(a)] == [row["id"] for row in read_jsonl(world() / "dev.jsonl")]
    for x, y in zip(read_jsonl(a), read_jsonl(b), strict=True):
        for name in ("score", "judgement"):
            found, expected = ([passage.pop(name) for passage in row["passages"]] for row in (x, y))
            assert found == pytest.approx(expected, rel=1e-4)
            assert name == "score" or sum(found) == pytest.approx(1, abs=1e-5)  # of six digits each
        assert x == y
    assert last_metrics(one) == last_metrics(tmp_path / "three/run")


def test_answers_do_not_depend_on_the_batch_size_of_evaluations(tmp_path):
    flags = {"train_data": None, "per_gpu_batch_size": 1, "write_evidence": True}
    sizes = {"default": None, "four": 4, "all": 100}
    rows = {
        name: read_jsonl(
            run(tmp_path, "evaluate", name=name, per_gpu_eval_batch_size=size, **flags) / "dev-step-0.jsonl"
        )
        for name, size in sizes.items()
    }
    for name in ("four", "all"):
        for found, expected in zip(rows[name], rows["default"], strict=True):
            assert (found["id"], found["generation"]) == (expected["id"], expected["generation"])
            assert [p["id"] for p in found["passages"]] == [p["id"] for p in expected["passages"]]
            of_both = ([p["judgement"] for p in row["passages"]] for row in (found, expected))
            assert next(of_both) == pytest.approx(next(of_both), rel=1e-3)
    assert last_metrics(tmp_path / "four") == last_metrics(tmp_path / "all") == last_metrics(tmp_path / "default")


def test_result_files_are_the_same_to_the_byte(tmp_path):
    """From one index, at any number of ranks."""
    search = {"train_data": None, "reader_model_type": None, "retrieve_only": True}
    run(tmp_path, "evaluate", name="first", save_index_path=tmp_path / "index", **search)
    flags = {"train_data": None, "passages": None, "load_index_path": tmp_path / "index"}
    one = run(tmp_path, "evaluate", name="one", **flags) / "dev-step-0.jsonl"
    for ranks in (2, 3):
        many = run_on(ranks, tmp_path, "evaluate", name=f"{ranks}", **flags) / "dev-step-0.jsonl"
        assert many.read_bytes() == one.read_bytes()


def test_query_side_training_moves_the_query_encoder_only(tmp_path):
    unmoved = {"lr": 0, "lr_retriever": 0, "weight_decay": 0}
    run(tmp_path, name="start", total_steps=1, train_retriever=True, eval_data=None, **unmoved)
    directory = run(tmp_path, total_steps=3, eval_data=None, **RETRIEVER)
    start = load_checkpoint(tmp_path / "start").retriever
    end = load_checkpoint(directory).retriever
    assert {name.split(".")[0] for name in end} == {"query_contriever", "passage_contriever"}
    for name, tensor in start.items():
        name = name.removeprefix("contriever.")
        assert torch.equal(end[f"passage_contriever.{name}"], tensor), name
        assert not torch.equal(end[f"query_contriever.{name}"], tensor), name


def test_without_retriever_training_only_the_reader_moves(tmp_path):
    run(tmp_path, name="start", total_steps=1, lr=0, weight_decay=0, eval_data=None)
    run(tmp_path, total_steps=2, eval_data=None)
    start, end = load_checkpoint(tmp_path / "start"), load_checkpoint(tmp_path / "run")
    assert all(torch.equal(end.retriever[name], tensor) for name, tensor in start.retriever.items())
    assert not any(torch.equal(end.reader[name], tensor) for name, tensor in start.reader.items())


def test_tied_training_moves_everything_and_refreshes(tmp_path):
    directory = run(tmp_path, total_steps=4, train_retriever=True, refresh_index=2, eval_data=None)
    log = (directory / "run.log").read_text()
    assert log.count("Embedding 300 passages") == 2 and "Refreshing the index after step 2" in log
    retriever = load_checkpoint(directory).retriever
    assert {name.split(".")[0] for name in retriever} == {"contriever"}


def test_freezing_the_retriever_at_first(tmp_path):
    directory = run(tmp_path, total_steps=4, freeze_retriever_steps=2, eval_data=None, **RETRIEVER)
    assert len(logged(directory, "loss/reader_loss")) == 4
    assert len(logged(directory, "loss/retriever_loss")) == 2


def test_freezing_at_first_on_two_ranks(tmp_path):
    run_on(2, tmp_path, train_retriever=True, total_steps=3, freeze_retriever_steps=2, eval_data=None)
    assert len(logged(tmp_path / "run", "loss/retriever_loss")) == 1


def test_bf16_tracks_fp32(tmp_path):
    flags = {"total_steps": 3, "eval_data": None, **RETRIEVER}
    exact = losses_of(run(tmp_path, name="fp32", **flags))
    rounded = losses_of(run(tmp_path, name="bf16", precision="bf16", **flags))
    assert rounded["reader"] == pytest.approx(exact["reader"], rel=0.02)
    assert rounded["reader"] != exact["reader"]


def test_updates_below_the_resolution_of_bf16_are_learnt(tmp_path):
    """60 updates, each of which a weight in bf16 would lose, bring the loss down as far as they do in fp32."""
    flags = {"eval_data": None, "dropout": 0, "weight_decay": 0, "total_steps": 60, "lr": 5e-6, "clip": 0}
    flags |= {"n_context": 1, "retriever_n_context": 1, "text_maxlength": 32}  # in bf16, a processor may be slow
    train = write_jsonl(tmp_path / "one.jsonl", read_jsonl(world() / "train.jsonl")[:2])
    exact, rounded = (
        run(tmp_path, name=precision, precision=precision, train_data=train, **flags) for precision in ("fp32", "bf16")
    )
    run(tmp_path, name="start", train_data=train, **flags | {"lr": 0, "total_steps": 1})
    start = load_checkpoint(tmp_path / "start").reader
    lost = [((weight.bfloat16() + 5e-6).bfloat16() == weight.bfloat16()).float().mean() for weight in start.values()]
    assert sum(lost) / len(lost) > 0.95  # an update of AdamW is about as large as the learning rate
    (first, *_, last), (first_bf16, *_, last_bf16) = (logged(d, "loss/reader_loss") for d in (exact, rounded))
    assert first - last > 0.02 and first_bf16 - last_bf16 == pytest.approx(first - last, rel=0.2)


@pytest.mark.slow
def test_moments_in_8_bits_learn_as_much(tmp_path):
    """60 updates bring the loss down as far as they do with moments in fp32."""
    flags = {"eval_data": None, "total_steps": 60}
    exact, rounded = (
        logged(run(tmp_path, name=optimizer, optimizer=optimizer, **flags), "loss/reader_loss")
        for optimizer in ("adamw", "adamw8bit")
    )
    assert rounded != exact and rounded[0] == exact[0]
    fallen, fallen_in_8_bits = (sum(losses[:10]) / 10 - sum(losses[-10:]) / 10 for losses in (exact, rounded))
    assert fallen > 0.1 and fallen_in_8_bits == pytest.approx(fallen, rel=0.01)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    flags = {"total_steps": 3, "eval_data": None, "train_retriever": True}
    plain = losses_of(run(tmp_path, name="plain", **flags))
    checkpointing = {"use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True}
    assert losses_of(run(tmp_path, name="again", **flags, **checkpointing)) == plain


def test_dropout_is_reproducible_and_does_something(tmp_path):
    flags = {"total_steps": 2, "eval_data": None, **RETRIEVER}
    without = losses_of(run(tmp_path, name="a", **flags))
    with_dropout = losses_of(run(tmp_path, name="b", dropout=0.2, **flags))
    assert with_dropout["reader"] != without["reader"]
    assert losses_of(run(tmp_path, name="c", dropout=0.2, **flags)) == with_dropout


def test_closed_book(tmp_path):
    directory = run(tmp_path, passages=None, closed_book=True, train_retriever=True, total_steps=2)
    rows = read_jsonl(directory / "dev-step-2.jsonl")
    assert all("passages" not in row for row in rows)
    assert not load_checkpoint(directory).retriever


def test_passages_of_the_file(tmp_path):
    """A result file of a run with retrieval can be read again, with the passages that it holds."""
    searched = run(tmp_path, "evaluate", name="searched", train_data=None)
    dev = {row["id"]: row for row in read_jsonl(world() / "dev.jsonl")}
    rows = [dev[row["id"]] | {"passages": row["passages"]} for row in read_jsonl(searched / "dev-step-0.jsonl")]
    file = write_jsonl(tmp_path / "with.jsonl", rows)
    given = run(
        tmp_path, "evaluate", name="given", train_data=None, passages=None, use_file_passages=True, eval_data=file
    )
    again = read_jsonl(given / "with-step-0.jsonl")
    assert [row["generation"] for row in again] == [
        row["generation"] for row in read_jsonl(searched / "dev-step-0.jsonl")
    ]
    flags = {"passages": None, "use_file_passages": True, "eval_data": None}
    trained = run(tmp_path, name="train", train_data=file, total_steps=2, **flags)
    assert len(logged(trained, "loss/reader_loss")) == 2


def test_retrieve_only(tmp_path):
    """No reader is loaded, and questions need no answers."""
    questions = [{"question": row["question"]} for row in read_jsonl(world() / "dev.jsonl")]
    file = write_jsonl(tmp_path / "questions.jsonl", questions)
    directory = run(
        tmp_path, "evaluate", train_data=None, reader_model_type=None, retrieve_only=True, eval_data=file, n_context=7
    )
    rows = read_jsonl(directory / "questions-step-0.jsonl")
    assert [set(row) for row in rows] == [{"query", "answers", "passages", "metadata"}] * len(questions)
    assert all(len(row["passages"]) == 7 for row in rows)


def test_more_passages_asked_for_than_there_are(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", read_jsonl(world() / "passages.jsonl")[:3])
    directory = run(tmp_path, passages=few, n_context=6, retriever_n_context=6, total_steps=2, **RETRIEVER)
    assert all(len(row["passages"]) == 3 for row in read_jsonl(directory / "dev-step-2.jsonl"))


def test_fewer_passages_read_than_learnt_from(tmp_path):
    directory = run(tmp_path, n_context=2, retriever_n_context=5, total_steps=2, **RETRIEVER)
    assert all(len(row["passages"]) == 2 for row in read_jsonl(directory / "dev-step-2.jsonl"))


def test_reranking_with_an_unchanged_encoder_changes_nothing(tmp_path):
    flags = {"train_data": None, "reader_model_type": None, "retrieve_only": True}
    plain = run(tmp_path, "evaluate", name="plain", **flags)
    reranked = run(
        tmp_path,
        "evaluate",
        name="reranked",
        retrieve_with_rerank=True,
        n_to_rerank_with_retrieve_with_rerank=20,
        **flags,
    )
    for a, b in zip(read_jsonl(plain / "dev-step-0.jsonl"), read_jsonl(reranked / "dev-step-0.jsonl"), strict=True):
        assert [p["score"] for p in a["passages"]] == pytest.approx([p["score"] for p in b["passages"]], rel=1e-2)


def test_decoder_prompt(tmp_path):
    """The prompt is no part of the loss nor of the answers, and the decoder is led by it."""
    plain = run(tmp_path, name="plain", total_steps=1, eval_data=None)
    flags = {"decoder_prompt_format": "{query} ", "generation_max_length": 64}
    flags["eval_data"] = write_jsonl(tmp_path / "dev.jsonl", read_jsonl(world() / "dev.jsonl")[:4])
    prompted = run(tmp_path, name="prompted", total_steps=1, **flags)
    assert losses_of(plain)["reader"] != losses_of(prompted)["reader"]
    assert not any(row["query"] in row["generation"] for row in read_jsonl(prompted / "dev-step-1.jsonl"))


def test_a_step_with_gradients_that_are_not_finite_is_skipped(tmp_path):
    from atlas.training.optim import Optimizers

    weight = torch.nn.Parameter(torch.ones(3))
    other = torch.nn.Parameter(torch.ones(2))
    flags = Optimisation(lr=0.1, lr_retriever=0.1, weight_decay=0.0, scheduler="fixed", warmup_steps=0, total_steps=10)
    optimizers = Optimizers(flags, {"reader": [("w", weight)], "retriever": [("o", other)]})
    optimizers.backward((weight * torch.tensor([1.0, float("nan"), 1.0])).sum() + other.sum())
    assert not optimizers.step(0).moved
    assert torch.equal(weight, torch.ones(3)) and torch.equal(other, torch.ones(2)) and optimizers.skipped == 1
    assert weight.grad is None
    optimizers.backward((2 * weight).sum() + other.sum())
    assert optimizers.step(1).moved and (weight < 1).all() and (other < 1).all()


def _poison(monkeypatch, step, rank=0):
    """After this step a weight of the reader, or of a rank's part of it, is not a number."""
    update = Trainer.update

    def poisoned(trainer, at, losses):
        update(trainer, at, losses)
        if at == step and distributed.rank() == rank:
            with torch.no_grad():
                local_part(trainer.model.reader.shared.weight)[0, 0] = torch.nan

    monkeypatch.setattr(Trainer, "update", poisoned)


@pytest.mark.parametrize("step", [1, 3])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys, step):
    _poison(monkeypatch, step)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=9, save_freq=2, eval_data=None)
    assert ended.value.code == 1
    good = f"the last good checkpoint is {tmp_path}/run/checkpoint/step-2" if step == 3 else "no checkpoint was saved"
    sentence = capsys.readouterr().err
    assert f"diverged: reader.shared.weight is not finite after step {step + 1}; {good}" in sentence
    names = [path.name for path in (tmp_path / "run/checkpoint").glob("*")]
    assert sorted(names) == (["latest", "step-2"] if step == 3 else [])


def _statuses_where_a_part_is_not_finite(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop", lambda: None)  # the process group goes on living
        _poison(patch, 1, rank=1)
        try:
            train(parse_config(arguments, program="train"))
        except SystemExit as ended:
            return ended.code
    return 0


def test_all_ranks_know_that_the_weights_are_not_finite(tmp_path):
    line = command_line(tmp_path, total_steps=4, save_freq=2, eval_data=None, shard_grads=True)
    assert run_on_ranks(2, _statuses_where_a_part_is_not_finite, line) == [1, 1]
    assert "reader.shared.weight is not finite after step 2" in (tmp_path / "run/run.log").read_text()


def test_a_run_that_skips_every_update_ends(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, total_steps=100, save_freq=1, lr=1e30, log_freq=100, eval_data=None)
    assert ended.value.code == 1
    log, sentence = (tmp_path / "run/run.log").read_text(), capsys.readouterr().err
    assert log.count("is skipped") == 20 and "the last 20 updates had gradients that are not finite" in sentence
    assert str(latest_checkpoint(tmp_path / "run")) in sentence


def test_the_last_step_is_evaluated_and_saved(tmp_path):
    directory = run(tmp_path, total_steps=3, eval_freq=2, save_freq=2)
    assert sorted(path.name for path in directory.glob("dev-*")) == ["dev-step-2.jsonl", "dev-step-3.jsonl"]
    assert sorted(path.name for path in (directory / "checkpoint").iterdir()) == ["latest", "step-2", "step-3"]
    assert not (directory / "checkpoint/step-2/optimizer.safetensors").exists()
    assert load_file(directory / "checkpoint/latest/optimizer.safetensors")
    assert "Done: " in (directory / "run.log").read_text().splitlines()[-1]
    assert "total_steps: 3    [default: 1000]" in (directory / "opt.log").read_text()
    assert list(directory.glob("events.out.tfevents.*"))


def test_going_on_where_a_run_stopped(tmp_path):
    """10 steps at once, and 10 steps in two goes with the same total, are the same."""
    flags = {"eval_data": None, "save_freq": 4, **RETRIEVER}
    straight = run(tmp_path, name="straight", total_steps=8, **flags)
    first = run(tmp_path, name="stopped", total_steps=4, scheduler_steps=8, **flags)
    again = run(tmp_path, name="stopped", total_steps=8, **flags)
    assert first == again
    assert losses_of(again) == losses_of(straight)
    for half in ("reader", "retriever"):
        a, b = getattr(load_checkpoint(straight), half), getattr(load_checkpoint(again), half)
        assert all(torch.equal(a[name], b[name]) for name in a)
    run(tmp_path, name="stopped", total_steps=8, **flags)
    assert "This run is finished" in (again / "run.log").read_text()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        slow({"query_side_retriever_training": True}, 4),
        ({"query_side_retriever_training": True, "accumulation_steps": 2, "save_freq": 3}, 4),  # 3 is within an update
        ({}, 4),  # tied: the index was built by an encoder that has moved on
        slow({"refresh_index": 3}, 5),
        ({"refresh_index": 4}, 4),  # a refresh is due right where the run stopped
        ({"dropout": 0.1, "shuffle": True}, 4),
    ],
)
def test_going_on_computes_what_would_have_been(tmp_path, changes, first):
    flags = {"eval_data": None, "train_retriever": True, "save_freq": 100, "scheduler_steps": 8} | changes
    straight = losses_of(run(tmp_path, name="straight", total_steps=8, **flags))
    run(tmp_path, name="stopped", total_steps=first, **flags)
    again = run(tmp_path, name="stopped", total_steps=8, **flags)
    assert losses_of(again) == straight
    builds = (again / "run.log").read_text().count("Embedding 300 passages")
    # at the start and after the stop; besides after steps 3 and 6; the one after step 4 is that after the stop
    assert builds == 2 + {3: 2, 4: 0}.get(changes.get("refresh_index"), 0)


def test_saved_only_between_updates(tmp_path):
    directory = run(tmp_path, total_steps=7, accumulation_steps=2, save_freq=3, eval_data=None)
    names = sorted(path.name for path in (directory / "checkpoint").iterdir())
    assert names == ["latest", "step-4", "step-6", "step-7"]


def test_restart_sets_the_earlier_run_aside(tmp_path):
    run(tmp_path, total_steps=6, eval_data=None)
    directory = run(tmp_path, total_steps=4, save_freq=1, keep_checkpoints=2, restart=True, eval_data=None)
    assert sorted(path.name for path in (directory / "checkpoint").iterdir()) == ["latest", "step-3", "step-4"]
    assert load_checkpoint(directory / "checkpoint.before-restart").step == 6


def test_a_job_that_is_requeued_starts_over_once(tmp_path, monkeypatch):
    run(tmp_path, total_steps=2, eval_data=None)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    flags = {"total_steps": 3, "eval_data": None, "restart": True, "scheduler_steps": 3}
    directory, steps = tmp_path / "run", []
    for job, again in (("17", "1"), ("17", "2"), ("18", "0"), ("18", "1"), ("18", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", again)
        run(tmp_path, **flags)
        flags["total_steps"] += 1
        steps.append([line["step"] for line in recorded(directory, "train")][-1])
        assert recorded(directory, "start")[-1]["restart"] == (again == "0" or len(steps) == 1)
        aside = len(list(directory.glob("checkpoint.before-restart*")))
        assert aside == {("17", "1"): 1, ("17", "2"): 1}.get((job, again), 2 + (len(steps) == 5)), (job, again)
    assert "Resuming after step 3" in (directory / "run.log").read_text()  # that of job 17, and of job 18 after step 5


def test_a_run_does_not_set_aside_what_it_starts_from(tmp_path, capsys):
    directory = run(tmp_path, total_steps=1, eval_data=None)
    with pytest.raises(SystemExit):
        run(tmp_path, total_steps=2, eval_data=None, restart=True, model_path=directory)
    assert "step-1 aside, from which --model_path starts: give the new run another --name" in capsys.readouterr().err
    assert load_checkpoint(directory).step == 1


def test_a_closed_book_run_passes_the_retriever_on(tmp_path):
    start = run(tmp_path, name="start", total_steps=1, eval_data=None)
    config = start / "checkpoint/latest/retriever_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"uncentered_layer_norm": True}))
    closed = {"closed_book": True, "passages": None, "eval_data": None, "verify": "off"}  # the file was edited
    directory = run(tmp_path, name="closed", model_path=start, total_steps=1, **closed)
    a, b = load_checkpoint(start), load_checkpoint(directory)
    assert b.retriever_config["uncentered_layer_norm"] is True
    assert a.retriever and all(torch.equal(b.retriever[name], tensor) for name, tensor in a.retriever.items())


def test_evaluating_a_run_leaves_its_options_alone(tmp_path):
    directory = run(tmp_path, total_steps=1, eval_data=None)
    options = (directory / "opt.log").read_text()
    run(tmp_path, "evaluate", train_data=None)
    assert (directory / "opt.log").read_text() == options
    assert "train_data: \n" in (directory / "opt.evaluate.log").read_text()
    assert (directory / "dev-step-1.jsonl").exists()  # named after the step of the checkpoint that was found


def test_no_clipping(tmp_path):
    flags = {"total_steps": 3, "eval_data": None}
    assert losses_of(run(tmp_path, name="0", clip=0, **flags)) == losses_of(run(tmp_path, name="9", clip=1e9, **flags))


def test_flags_without_effect_say_so(tmp_path):
    directory = run(tmp_path, total_steps=1, eval_data=None, save_index_n_shards=4)
    log = (directory / "run.log").read_text()
    assert "--save_index_n_shards has no effect" in log
    assert (
        "--save_index_n_shards" not in (run(tmp_path, name="b", total_steps=1, eval_data=None) / "run.log").read_text()
    )


def test_going_on_with_a_loaded_index_that_was_refreshed(tmp_path):
    """The passages come with the index; its embeddings are those of the last refresh."""
    search = {"train_data": None, "reader_model_type": None, "retrieve_only": True}
    run(tmp_path, "evaluate", name="first", save_index_path=tmp_path / "index", **search)
    flags = {"eval_data": None, "passages": None, "load_index_path": tmp_path / "index", "train_retriever": True}
    flags |= {"refresh_index": 2, "scheduler_steps": 6}
    straight = losses_of(run(tmp_path, name="straight", total_steps=6, **flags))
    run(tmp_path, name="stopped", total_steps=3, **flags)
    assert losses_of(run(tmp_path, name="stopped", total_steps=6, **flags)) == straight


def test_a_run_resumes_with_the_index_that_it_loaded_although_its_encoder_has_moved_on(tmp_path, capsys):
    """And nobody else takes that index for one of the trained encoder; query-side training needs no flag."""
    search = {"train_data": None, "reader_model_type": None, "retrieve_only": True}
    run(tmp_path, "evaluate", name="made", save_index_path=tmp_path / "index", **search)
    flags = {"eval_data": None, "passages": None, "load_index_path": tmp_path / "index", "train_retriever": True}
    directory = run(tmp_path, total_steps=2, save_freq=1, **flags)
    assert "was made by retriever" not in (directory / "run.log").read_text()
    run(tmp_path, total_steps=3, save_freq=1, **flags)
    assert "Resuming after step 2" in (log := (directory / "run.log").read_text()) and "was made by retriever" in log
    given = {"passages": None, "load_index_path": tmp_path / "index", "model_path": directory} | search
    with pytest.raises(SystemExit):
        run(tmp_path, "evaluate", name="refused", **given)
    assert "insist with --allow_other_index" in capsys.readouterr().err.splitlines()[-1]
    run(tmp_path, "evaluate", name="insisting", allow_other_index=True, **given)
    for steps in (1, 2):  # the second one resumes
        query_side = run(tmp_path, name="query", total_steps=steps, query_side_retriever_training=True, **flags)
    assert "was made by retriever" not in (query_side / "run.log").read_text()
    run(tmp_path, "evaluate", name="tuned", **given | {"model_path": query_side})
