"""Convert, compress, export or check a saved index without any model.

SOURCE is a published index (embeddings.0.pt, passages.0.pt, ...) or an index of ours; TARGET is

  a directory                          for an index of ours, made of a published one or of one in an older format
  a directory, with --faiss_index_type for a compressed index of ours, made of a published or a flat one
  a file that ends in .faiss           for what `faiss.read_index` reads, made of a flat or compressed index of ours

Indices of ours are what --load_index_path takes, at any number of processes. --check reads an index of ours from its
first byte to its last and says where it is damaged.

Reading a published index can be stopped at any moment: the same command resumes after the shards that it
has finished. On the way to a compressed index there is a flat one in TARGET, so there must be room for
both. A compressed index shares the files of the flat one that it is made of where they are on one file system.

Row i of a .faiss file, from 0, is line i of the index's passages.*.jsonl (blank lines are not counted). A flat
index becomes an IndexScalarQuantizer of fp16 numbers: the values of an IndexFlatIP in half the bytes. Of an
index with lists Faiss searches all, unless its nprobe is set. An export takes as much memory as the file is
long; all else takes that of one shard, or 4 bytes a number of the rows that the quantizer is trained on.
"""

import argparse
import sys
from pathlib import Path

from atlas.command_line import add_flags, check_flags

EXAMPLES = """examples:
  python preprocessing/convert_index.py indices/atlas/wiki/xl my_index
  python preprocessing/convert_index.py my_index my_pq --faiss_index_type pq --faiss_code_size 64
  python preprocessing/convert_index.py my_pq my_pq.faiss
  python preprocessing/convert_index.py --check my_index
"""


HOW = ("faiss_code_size", "faiss_nlist", "faiss_train_size", "save_index_codes_only")  # to compress


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises: SystemExit with status 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s SOURCE TARGET [flags]\n       %(prog)s --check DIRECTORY",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, nargs="?", help="directory of an index")
    parser.add_argument("target", metavar="TARGET", type=Path, nargs="?", help="new directory, or new .faiss file")
    parser.add_argument("--check", metavar="DIRECTORY", type=Path, help="read this index and look for damage")
    compressed = parser.add_argument_group("to compress")
    kinds = "ivfflat, ivfsq, ivfpq, pq, or a Faiss factory string like OPQ64,PQ64"
    compressed.add_argument("--faiss_index_type", metavar="TYPE", help=kinds)
    add_flags(compressed, HOW)
    options = parser.parse_args(arguments)
    missing = [name for name in ("source", "target") if getattr(options, name) is None]
    if options.check:
        if len(missing) < 2 or options.faiss_index_type:
            parser.error("--check takes one directory and nothing else")
    elif missing:
        parser.error(f"the following arguments are required: {', '.join(map(str.upper, missing))}")
    given = {name: value for name in HOW if (value := getattr(options, name)) is not None and value is not False}
    try:
        check_flags(given)
    except ValueError as error:
        parser.error(str(error))
    if given and options.faiss_index_type in (None, "flat", "Flat"):
        parser.error(f"--{next(iter(given))} says how to compress: give a --faiss_index_type that does")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Parse, convert; a mistake of the user's ends it with one sentence and status 1."""
    options = parse_options(arguments)
    # These import torch: a wrong flag is answered before that.
    from atlas.config import sentence
    from atlas.index.codec import Compression
    from atlas.index.convert import check_index, convert
    from atlas.runtime.tracking import report_error, start_log

    start_log(None)
    compression = Compression(
        kind=options.faiss_index_type,
        code_size=options.faiss_code_size,
        nlist=options.faiss_nlist,
        train_size=options.faiss_train_size,
    )
    codes_only = bool(options.save_index_codes_only)
    try:
        if options.check:
            check_index(options.check)
        else:
            convert(options.source, options.target, compression, codes_only=codes_only)
    except (ValueError, OSError) as error:
        report_error(error, sentence(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
