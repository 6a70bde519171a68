"""`python -m atlas.report RUN`: the report of a run that is over, also of an older one, or of two runs side by side."""

import argparse
import sys
from pathlib import Path

from atlas.config import sentence


def make_parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m atlas.report",
        description="Write the report of a run, or of two side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's directory: {checkpoint_dir}/{name}")
    parser.add_argument("--compare", metavar="OTHER_RUN", type=Path, help="another run, to stand beside it")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the page to write (default: report.html in RUN, or report-beside-OTHER_RUN.html)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Write the report and print where it is.

    Raises:
        SystemExit: with status 2 for a wrong flag, with status 1 for files that cannot be read or written.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, path in (("RUN", options.run), ("--compare", options.compare)):
        if path is not None and not path.is_dir():
            parser.error(f"{name}: there is no directory {path}")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no directory {options.output.parent}")
    from atlas.report.page import write_report  # numpy is imported: `--help` and a wrong flag are answered before that

    try:
        written = write_report(options.run, options.compare, options.output)
    except (ValueError, OSError) as error:
        sys.exit(sentence(error))
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
