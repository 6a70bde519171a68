"""Does a command fit the GPUs that you have? `python plan.py --gpus 8 --card a100-80gb finetune_qa.py FLAGS`

It needs no GPU and none of the files, and says what each GPU would hold, about how long a step would take, and which
flags would make the command fit, cheapest first.
"""

import argparse
import sys
from typing import TYPE_CHECKING

import finetune_qa
from atlas.command_line import parse_config, quiet_until_started
from atlas.config import Config, sentence

if TYPE_CHECKING:
    from benchmarks.planner import Need, Planner

GIB = 2**30
PRESETS = {"train.py": {}, "finetune_qa.py": finetune_qa.PRESET, "evaluate.py": {}}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print the plan. Exits with status 1 if the command does not fit."""
    from benchmarks.cards import CARDS

    options = _parser(CARDS).parse_args(arguments)
    program = options.script.removesuffix(".py")
    config = parse_config(options.flags, program=program, runs_here=False, **PRESETS[options.script])
    from benchmarks.planner import Machine, Planner, shapes_of  # imports torch

    card = CARDS[options.card]
    machine = Machine(card._replace(gigabytes=options.gigabytes or card.gigabytes), options.gpus)
    try:
        planner = Planner(shapes_of(config, options.passages_in_index), machine, training=program != "evaluate")
        need = planner.need(config)
    except (OSError, ValueError) as error:
        sys.exit(f"plan.py: {sentence(error)}")
    print(f"{options.script} on {options.gpus} x {options.card} of {machine.card.gigabytes:g} GB, GiB on each GPU:\n")
    print(parts(need, planner, config))
    print(times(need))
    if need.bytes > machine.bytes:
        print(advice(planner, config))
        sys.exit(1)


def _parser(cards: dict) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        usage="%(prog)s [flags] {train.py,finetune_qa.py,evaluate.py} flags of that script",
        description=__doc__.partition("\n\n")[2],
    )
    parser.add_argument("--gpus", type=_at_least_one, default=1, help="number of GPUs, on all machines together (1)")
    parser.add_argument("--card", choices=cards, default="a100-80gb", help="what kind (a100-80gb)")
    parser.add_argument("--gigabytes", type=float, help="memory of each, in GB of 10^9 bytes (that of the card)")
    parser.add_argument(
        "--passages_in_index", type=_at_least_one, help="if neither index nor corpus is on this machine"
    )
    parser.add_argument("script", choices=PRESETS, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text!r}")
    return int(text)


def parts(need: "Need", planner: "Planner", config: Config) -> str:
    """A line for each part, the sum, and whether it fits."""
    notes = {"index": f"  {planner.shapes.passages:,} passages on all GPUs"} if "index" in need.parts else {}
    lines = [f"{name:>20} {size / GIB:8.1f}{notes.get(name, '')}" for name, size in need.parts.items()]
    if config.model.retrieves and planner.shapes.passages is None:
        lines.append(f"{'index':>20} not counted: say how many passages it has with --passages_in_index")
    has, fits = planner.machine.bytes / GIB, need.bytes <= planner.machine.bytes
    verdict = "it fits" if fits else "it does not fit"
    if config.model.retrieves and planner.shapes.passages is None:
        verdict += " without the index" if fits else ", even without the index"
    return "\n".join([*lines, f"{'sum':>20} {need.bytes / GIB:8.1f} of {has:.1f}: {verdict}"])


def times(need: "Need") -> str:
    """What arithmetic says of time."""
    from benchmarks.planner import REACHED

    said = [f"a step about {_time(need.step)}"] if need.step else []
    if need.refresh is not None:
        said.append(f"embedding the corpus, all passages of --text_maxlength, about {_time(need.refresh)}")
    if not said:
        return ""
    return f"\nBy arithmetic, at {REACHED:.0%} of what the maker states: {', '.join(said)}"


def _time(seconds: float) -> str:
    units: list[tuple[float, str]] = [(86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")]
    for size, unit in units:
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.2g} s"


def advice(planner: "Planner", config: Config) -> str:
    """Which flags would make it fit, one on top of the other."""
    from benchmarks.planner import to_make_it_fit

    lines, last = ["\nWhat helps, one on top of the other, cheapest first (GiB then; its price):"], None
    for change, last in to_make_it_fit(planner, config):
        lines.append(f"{last.bytes / GIB:8.1f}  {change.flags}  ({change.cost})")
    if last is None:
        return "\nNo flag helps: use a smaller reader, or a larger GPU"
    if last.bytes > planner.machine.bytes:
        lines.append("That is still too much: use a smaller reader, more GPUs, or larger ones")
    return "\n".join(lines)


if __name__ == "__main__":
    quiet_until_started()
    main()
