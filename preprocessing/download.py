"""What download_corpus.py, download_model.py and download_index.py have in common."""

import argparse
import itertools
from collections.abc import Mapping, Sequence

import flags
from fetch import Download, readable
from sources import RELEASED


def main(kind: str, released: Mapping[str, Sequence[str]]) -> None:
    """Fetch the files of the keys given on the command line into `{output_directory}/{key}/`."""
    parser = argparse.ArgumentParser(description=f"Download a released {kind} to {{output_directory}}/{{key}}/.")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="what to fetch, one or several")
    parser.add_argument(f"--{kind}", nargs="+", dest="named", default=[], metavar="KEY", help="the same")
    parser.add_argument("--list", action="store_true", help="print the available keys and exit")
    parser.add_argument("--base_url", type=flags.base_url, default=RELEASED, help=f"a mirror; default: {RELEASED}")
    flags.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.list:
        print(*released, sep="\n")
        return
    keys = list(dict.fromkeys(key.strip("/") for key in arguments.keys + arguments.named))
    if not keys:
        parser.error(f"no --{kind} given; --list shows the available keys")
    if unknown := [key for key in keys if key not in released]:
        parser.error(f"there is no {kind} {unknown[0]}; choose from {', '.join(released)}")
    with flags.exit_on_user_error():
        checksums = flags.Checksums(arguments.checksums)
        files = {
            key: [
                Download(
                    f"{arguments.base_url}/{key}/{file}",
                    arguments.output_directory / key / file,
                    checksums.of(f"{key}/{file}"),
                )
                for file in released[key]
            ]
            for key in keys
        }
        fetched = flags.fetcher(arguments).fetch(list(itertools.chain.from_iterable(files.values())))
        for key, downloads in files.items():
            new = sum(download in fetched for download in downloads)
            size = readable(sum(download.target.stat().st_size for download in downloads))
            print(
                f"{arguments.output_directory / key}: {size}; files: {new} fetched, {len(downloads) - new} up to date"
            )
