"""Train a reader and a retriever together: `torchrun --standalone --nproc_per_node N train.py --task ...`, or `python`.

For each batch of questions (or of texts with gaps) the retriever finds passages in an index of the whole corpus, the
reader reads them and learns the answer, and the retriever learns which of the passages the reader found useful. The
index is refreshed now and then if the encoder of passages learns too.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from atlas.command_line import parse_config, quiet_until_started
from atlas.config import Config

if TYPE_CHECKING:
    from atlas.runtime.session import Session


def train(config: Config) -> None:
    """Train, evaluate on the way, save checkpoints; resume if a run of this name was stopped."""
    from atlas.runtime.session import session  # imports torch: `--help` and a wrong flag are answered before that

    # Ranks join, the log starts. A user's mistake in the block ends the run with one sentence and status 1.
    with session(config.run, "train") as run:
        learn(config, run)


def learn(config: Config, run: "Session") -> None:
    """What happens in between, from top to bottom. All models are freed at its end, before the ranks part."""
    from atlas import preflight
    from atlas.checkpoint import already_restarted, open_checkpoint, own_checkpoint, set_aside
    from atlas.evaluation.evaluator import Evaluator
    from atlas.model.load import Model
    from atlas.model.tokenization import load_reader_tokenizer
    from atlas.retrieval import Retrieval
    from atlas.runtime.tracking import log
    from atlas.tasks.data import Data
    from atlas.training.optim import Optimizers
    from atlas.training.trainer import Trainer

    preflight.check(config, run.device)

    # Start: where a run of this name was stopped, from --model_path, or from the models' own weights.
    if config.optimisation.restart and already_restarted(run.directory):
        config = replace(config, optimisation=replace(config.optimisation, restart=False))
    resumed = None if config.optimisation.restart else own_checkpoint(run.directory)
    if resumed and resumed.step >= config.optimisation.total_steps and not resumed.evaluation_due:
        log.info("This run is finished: %s holds step %d. Use --restart to start over", run.directory, resumed.step)
        return
    start = resumed or (open_checkpoint(config.run.model_path) if config.run.model_path != "none" else None)
    preflight.report_plan(config)
    if start and config.optimisation.restart:
        preflight.check_start(start.path, run.directory)
    if start:
        run.verification.check(str(start.path), start.recorded)  # against its checksums; the index likewise, below
        preflight.report_differences(config, start.options, str(start.path), resumed=resumed is not None)
    run.write_options("opt.log", f"from step {resumed.step + 1 if resumed else 1} on", config.describe())
    run.reports.start(config, run.device, resumed.step if resumed else 0)

    # Data: every line is read once, so that a bad one is found before anything expensive starts.
    tokenizer = load_reader_tokenizer(config.model.reader_model_type)
    preflight.check_reader(config, tokenizer)
    evaluation_data = Data.open_each(config, tokenizer, run.device)
    preflight.check_prompts(config.model, tokenizer, evaluation_data)
    data = Data.open(config.run.train_data, config, tokenizer, training=True)

    # Model: T5 as Fusion-in-Decoder (or a language model) reads, Contriever retrieves. Each has its own optimizer.
    learning = config.retriever_training
    model = Model.load(config.model, learning, config.optimisation, start, tokenizer, run.device, training=True)
    optimizers = Optimizers(config.optimisation, {"reader": model.reader, "retriever": model.retriever})
    if resumed:
        log.info("Resuming after step %d of %s", resumed.step, resumed.path)
        optimizers.resume(resumed)

    # Index: opened if it was saved, else built of the corpus before the first step. None for a closed book.
    retrieval = Retrieval.open(config.index, config.run, learning, model, run, resumed)

    evaluator = Evaluator(config, model, retrieval, evaluation_data, run)
    trainer = Trainer(config, model, optimizers, retrieval, data, evaluator, run)
    if resumed:
        trainer.resume(resumed)
    elif config.optimisation.restart:
        set_aside(run.directory)

    # The loop. SIGTERM and SIGUSR1 end it with a checkpoint and status 143.
    for step in trainer.steps():
        trainer.refresh_index(step)  # embed the corpus with the current encoder, if that is due
        batch = trainer.retrieve(step)  # examples -> queries -> passages -> tensors
        losses = trainer.forward_backward(batch, step)  # of the reader, and of the retriever as the reader judges
        trainer.update(step, losses)  # both move together
        trainer.report(step)
        trainer.save(step)
        trainer.evaluate(step)
    run.log_places(config.optimisation.total_steps)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    train(parse_config(arguments, program="train"))


if __name__ == "__main__":
    quiet_until_started()
    main()
