"""Add, replace and delete passages of a saved index, without building it again.

INDEX is an index of ours, compressed or not. Each passage of --passages replaces those of the same id, or is added; one
that the index has word for word stays as it is, so the whole of a corpus can be given, and only what has changed
is embedded. What was replaced or deleted is found by no search any more.

New passages are embedded by the retriever that the index was made with, and encoded with the quantizer that the
index has. It is compared beforehand: another encoder is refused, and so are lengths and formats with which passages of
the index come out otherwise than they are stored.

The update is there as a whole or not at all. One that was stopped or killed goes on with the same command. It works in
any number of processes (torchrun).

What was replaced or deleted still takes room on the disk. --compact writes the index as one piece, without it.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas import command_line, config

if TYPE_CHECKING:
    import torch

    from atlas.embedding import CorpusEmbedder

EXAMPLES = """examples:
  python preprocessing/update_index.py my_index --passages changed.jsonl --delete 17 4711 \\
      --model_path experiments/my_experiment
  python preprocessing/update_index.py my_index --delete_file gone.txt
  python preprocessing/update_index.py my_index --compact
"""
# How passages are embedded, and on what.
OF_THE_RETRIEVER = (
    *("retriever_model_path", "retriever_pooling", "retriever_normalize", "retriever_passage_prefix"),
    *("retriever_format", "text_maxlength"),
)
OF_THE_RUN = ("device", "embedder_precision", "per_gpu_embedder_batch_size")
OF_THE_MODEL = ("model_path", *OF_THE_RETRIEVER, *OF_THE_RUN)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises: SystemExit with status 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s INDEX [--passages FILE ...] [--delete ID ...] [--compact] [flags]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", metavar="INDEX", type=Path, help="directory of an index of ours")
    parser.add_argument(
        "--passages",
        metavar="FILE",
        nargs="+",
        type=Path,
        default=[],
        help="new and changed passages: Atlas, BEIR, Tevatron or FlashRAG jsonl, DPR tsv, also .gz",
    )
    parser.add_argument("--delete", metavar="ID", nargs="+", default=[], help="ids of passages to delete")
    parser.add_argument("--delete_file", metavar="FILE", type=Path, help="a file of such ids, one on each line")
    parser.add_argument("--compact", action="store_true", help="leave out what was replaced or deleted, at the end")
    model = parser.add_argument_group("the retriever that the index was made with, for --passages")
    model.add_argument(
        "--model_path",
        metavar="DIR",
        help="checkpoint or run of ours, or published checkpoint (the weights of --retriever_model_path)",
    )
    command_line.add_flags(model, OF_THE_RETRIEVER + OF_THE_RUN)
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in OF_THE_MODEL if getattr(options, name) is not None}
    if not (options.passages or options.delete or options.delete_file or options.compact):
        parser.error("nothing is to be done: give --passages, --delete, --delete_file or --compact")
    if given and not options.passages:
        parser.error(f"--{next(iter(given))} is about embedding new passages: give --passages, or leave it out")
    if options.passages and options.model_path is None and options.retriever_model_path is None:
        parser.error("--passages needs the retriever that made the index: give --model_path or --retriever_model_path")
    if options.delete_file and not options.delete_file.is_file():
        what = "is a directory" if options.delete_file.is_dir() else "is not there"
        parser.error(f"--delete_file {options.delete_file} {what}: give a file of ids, one on each line")
    try:
        command_line.check_flags(given)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Parse, update; a mistake of the user's ends it with one sentence and status 1."""
    options = parse_options(arguments)
    # These import torch: a wrong flag is answered before that.
    from atlas.runtime import device as devices
    from atlas.runtime import distributed
    from atlas.runtime.tracking import report_error, start_log

    start_log(None)
    try:
        own_gpus = distributed.sees_own_gpus()
        device = devices.pick_device(options.device or "auto", distributed.local_rank(), sees_own_gpus=own_gpus)
        distributed.start(device.type)
        update(options, device)
        distributed.wait_for_all("the end of the update")
    except (ValueError, OSError, distributed.LostRankError) as error:
        report_error(error, config.sentence(error))
        sys.exit(1)
    distributed.stop()


def update(options: argparse.Namespace, device: "torch.device") -> None:
    """Update and compact, as far as it is asked for. Collective. Raises: ValueError, OSError."""
    from atlas.index.passages import open_passages
    from atlas.index.store import check_is_index
    from atlas.index.update import compact_index
    from atlas.runtime import distributed
    from atlas.update import update_index

    distributed.on_main("looking for the index", lambda: check_is_index(options.index))  # before a model is loaded
    delete = options.delete + (read_ids(options.delete_file) if options.delete_file else [])
    passages = embedder = None
    if options.passages:
        with distributed.main_first("opening the new passages"):
            passages = open_passages(options.passages)
        if not len(passages):
            raise ValueError(f"--passages {' '.join(map(str, options.passages))}: there is no passage in it")
        embedder = load_embedder(options, device)
    if passages is not None or delete:
        update_index(options.index, embedder, passages, delete)
    if options.compact:
        compact_index(options.index)


def read_ids(file: Path) -> list[str]:
    """The ids in a file, one on each line; blank lines are skipped. Raises: ValueError, OSError."""
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--delete_file {file}: not UTF-8 (at byte {error.start})") from error
    if not found:
        raise ValueError(f"--delete_file {file}: there is no id in it")
    return found


def load_embedder(options: argparse.Namespace, device: "torch.device") -> "CorpusEmbedder":
    """The retriever, which embeds as the flags say, else as the checkpoint says. Collective."""
    from atlas.checkpoint import check_tensors, open_checkpoint
    from atlas.embedding import CorpusEmbedder
    from atlas.index.directory import has_index, read_description
    from atlas.model.load import Model

    checkpoint, values = None, {}
    if options.model_path is not None:
        checkpoint = open_checkpoint(options.model_path)
        # published checkpoints name paths on the machine that they were trained on
        values = {} if checkpoint.published else command_line.saved_flags(checkpoint.options, checkpoint.path)
    given: dict[str, Any] = {name: getattr(options, name) for name in OF_THE_RETRIEVER}
    values = {name: value for name, value in values.items() if name in OF_THE_RETRIEVER}
    values |= {name: value for name, value in given.items() if value is not None}
    settings = config.Model(**values, retrieve_only=True)
    learning, optimisation = config.RetrieverTraining(), config.Optimisation()
    model = Model.load(settings, learning, optimisation, checkpoint, None, device, training=False)
    batch_size = options.per_gpu_embedder_batch_size or config.Run.per_gpu_embedder_batch_size
    embedder = CorpusEmbedder(model.retriever, model.inputs, device, options.embedder_precision, batch_size)
    made_by = read_description(options.index).retriever if has_index(options.index) else None
    before = checkpoint.index_encoder() if checkpoint and made_by != embedder.fingerprint() else None
    if before is not None:  # the encoder has learned since its run built the index
        check_tensors(checkpoint.file("index_encoder"), before, model.retriever.passage_encoder.state_dict())
        model.retriever.passage_encoder.load_state_dict(before)
    return embedder


if __name__ == "__main__":
    command_line.quiet_until_started()
    main()
