"""Evaluate a model, or with --retrieve_only its retriever: `torchrun ... evaluate.py --task ...`, or plain `python`."""

from typing import TYPE_CHECKING

from atlas.command_line import parse_config, quiet_until_started
from atlas.config import OF_THE_JUDGEMENT, TOKENIZING_TASKS, Config

if TYPE_CHECKING:
    from atlas.runtime.session import Session


def evaluate(config: Config) -> None:
    """Retrieve, read, generate and score for every evaluation file; write the results with --write_results."""
    from atlas.runtime.session import session  # imports torch: `--help` and a wrong flag are answered before that

    # Ranks join, the log starts. A user's mistake in the block ends the run with one sentence and status 1.
    with session(config.run, "evaluate") as run, config.origin.explaining():
        measure(config, run)


def measure(config: Config, run: "Session") -> None:
    """What happens in between, from top to bottom."""
    from atlas import preflight
    from atlas.checkpoint import open_checkpoint, own_checkpoint
    from atlas.evaluation.evaluator import Evaluator
    from atlas.model.load import Model
    from atlas.model.tokenization import load_reader_tokenizer
    from atlas.retrieval import Retrieval
    from atlas.tasks.data import Data

    preflight.check(config, run.device)

    # What to evaluate: --model_path, a run of this name, or the models' own weights.
    given = config.run.model_path != "none"
    checkpoint = open_checkpoint(config.run.model_path) if given else own_checkpoint(run.directory)
    if checkpoint is None:
        preflight.report_no_checkpoint(config)
    else:
        run.verification.check(str(checkpoint.path), checkpoint.recorded)  # against its checksums; the index likewise
    step = checkpoint.step if checkpoint and not given else 0
    if checkpoint and checkpoint.published:
        preflight.report_differences(config, checkpoint.options, str(checkpoint.path))
    elif checkpoint and config.run.write_evidence:
        preflight.report_differences(config, checkpoint.options, str(checkpoint.path), names=OF_THE_JUDGEMENT)
    trained_here = (run.directory / "checkpoint").exists()  # opt.log has the flags of the training then
    run.write_options("opt.evaluate.log" if trained_here else "opt.log", "evaluate.py", config.describe())
    run.reports.start(config, run.device, step)

    # Data: every line is read once, so that a bad one is found before anything expensive starts.
    reads = config.model.uses_reader or config.tasks.task in TOKENIZING_TASKS
    tokenizer = load_reader_tokenizer(config.model.reader_model_type) if reads else None
    preflight.check_reader(config, tokenizer)
    data = Data.open_each(config, tokenizer, run.device)
    preflight.check_prompts(config.model, tokenizer, data)

    # Model and index: the index is opened if it was saved, else built of the corpus.
    learning = config.retriever_training
    model = Model.load(config.model, learning, config.optimisation, checkpoint, tokenizer, run.device, training=False)
    retrieval = Retrieval.open(config.index, config.run, learning, model, run)
    if retrieval is not None and config.index.evaluates_by_embeddings:
        retrieval.refresh(step=step)  # builds one if none was opened

    Evaluator(config, model, retrieval, data, run).evaluate_all(step)
    run.log_places(step)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and evaluate."""
    evaluate(parse_config(arguments, program="evaluate"))


if __name__ == "__main__":
    quiet_until_started()
    main()
