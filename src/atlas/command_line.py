"""From the words of a command line, or a checkpoint's options, to a `Config`.

`evaluate.py` takes the flags `OF_THE_MODEL` from the checkpoint where the command line does not give them. Only the
standard library is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from atlas.checks import check, check_installed, check_value
from atlas.config import FIELDS, OF_THE_MODEL, SECTIONS, TO_ASK, TYPES, Config, Origin, Run, say, sentence
from atlas.options import find_checkpoint, latest_checkpoint, reached, read_options


def parse_config(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "train",
    runs_here: bool = True,
    **preset: Any | Callable[[Any], Any],
) -> Config:
    """Read the command line.

    In an evaluation of a checkpoint of ours, the flags `OF_THE_MODEL` that are not given have the checkpoint's values.

    Args:
        arguments: the words after the script's name; None takes them from the process.
        program: "train", "evaluate" or "finetune_qa": which files are needed, which checks apply.
        runs_here: whether the files and libraries that flags name must be there.
        preset: other defaults, which the command line overrides; a function gets the parsed options, and its docstring
            says in `--help` what it gives.

    Raises:
        SystemExit: with status 2 and one sentence on standard error when a flag is wrong, before anything is loaded.
    """
    parser = _make_parser(program, preset)
    # None stays where a flag is not given, because no flag can be given that value.
    options = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(FIELDS))))
    given = {name: value for name, value in options.items() if value is not None}
    try:
        origin = _origin(given) if program == "evaluate" else Origin(given=frozenset(given))
        with origin.explaining():
            config = _make_config(given, preset, origin)
            check(config, program, runs_here)
        if program == "evaluate":
            config = _without_training(config)
        if runs_here:
            check_installed(config.run, asked="report_to" in given)
    except ValueError as error:
        parser.error(sentence(error))
    typed = (f"{program}.py", *arguments) if arguments is not None else (Path(sys.argv[0]).name, *sys.argv[1:])
    return dataclasses.replace(config, command=typed)


def saved_flags(options: Mapping[str, Any], source: str | os.PathLike) -> dict[str, Any]:
    """Those `OF_THE_MODEL` that a checkpoint's options say, flag -> value, of the flag's type and within its bounds.

    Args:
        source: where the options are from, for the message.

    Raises:
        ValueError: a value that the flag cannot have.
    """
    found = {name: _saved_value(name, options[name], source) for name in OF_THE_MODEL if name in options}
    for name, value in found.items():
        try:
            check_value(name, value)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return found


def config_to_ask(saved: Mapping[str, Any], source: str | os.PathLike, given: Mapping[str, Any]) -> Config:
    """The flags with which a saved model answers: the `given` ones, else those that it was saved with, else defaults.

    Args:
        saved: flag -> value, unchecked, as `read_options` finds them. Those that only training needs are left out.
        source: where they are from, for messages.

    Raises:
        ValueError: there is no such flag, or it cannot have this value.
    """
    if unknown := given.keys() - FIELDS.keys():
        raise ValueError(f"there is no flag --{min(unknown)}; `python evaluate.py --help` lists all")
    given = {  # one file may be given as it is
        name: (value,) if isinstance(value, str) and _kind(name)[0] is tuple else value for name, value in given.items()
    }
    given = {name: _saved_value(name, value, "what is given") for name, value in given.items()}
    origin = Origin(Path(source), {name: saved[name] for name in sorted(TO_ASK & saved.keys())}, frozenset(given))
    with origin.explaining(TO_ASK):
        config = _make_config(given, {"task": "qa"}, origin)
        check(config, "ask")
    return config


def flags_parser(program: str, usage: str, description: str, sections: Mapping[str, Sequence[str]]) -> "_Parser":
    """A parser for some of the flags, by headings, to which a program adds its own. What is not given is left out."""
    parser = _Parser(
        prog=program,
        usage=usage,
        description=description,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for heading, names in sections.items():
        group = parser.add_argument_group(heading)
        for name in names:
            _add_flag(group, FIELDS[name], FIELDS[name].metadata["help"])
    return parser


def add_flags(group: Any, names: Iterable[str]) -> None:
    """Give another script some of our flags, as evaluate.py has them; one that is not given is None."""
    for name in names:
        field = FIELDS[name]
        _add_flag(group, field, _help(field.metadata["help"], field.default, name in OF_THE_MODEL))


def check_flags(given: Mapping[str, Any]) -> None:
    """Raises: ValueError for a value that its flag cannot have."""
    for name, value in given.items():
        check_value(name, value)


def quiet_until_started() -> None:
    """Let Ctrl-C end this process at once and without a traceback, until a session handles it: imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Help(argparse.HelpFormatter):
    """One line per flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=46, width=150)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # torchrun and srun start many of us with the same words: one complaint on each machine is enough.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def _make_parser(program: str, preset: dict[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"{program}.py", usage="%(prog)s [flags]", formatter_class=_Help, allow_abbrev=False)
    assert preset.keys() <= FIELDS.keys(), f"no such flags to preset: {preset.keys() - FIELDS.keys()}"
    for section in SECTIONS.values():
        group = parser.add_argument_group(section.__doc__)
        for field in dataclasses.fields(section):
            of_checkpoint = program == "evaluate" and field.name in OF_THE_MODEL
            _add_flag(group, field, _help(field.metadata["help"], preset.get(field.name, field.default), of_checkpoint))
    return parser


def _help(text: str, default: Any, of_checkpoint: bool) -> str:
    """A line of help with its default at the end, which a text may have in parentheses if it depends on the run."""
    first = "the checkpoint's, else " if of_checkpoint else ""
    if callable(default):
        return f"{text} (default: {default.__doc__})"
    if default is None and text.endswith(")"):
        start, _, last = text.rpartition("(")
        return f"{start}(default: {first}{last}"
    return f"{text} (default: {first}{say(default)})"


def _add_flag(group: Any, field: dataclasses.Field, text: str) -> None:
    kind, text = _kind(field.name)[0], text.replace("%", "%%")
    if kind is bool:
        group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text)
    elif kind is tuple:
        group.add_argument(f"--{field.name}", nargs="+", action=_Words, metavar="FILE", help=text)
    else:
        choices = field.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        group.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=metavar, help=text)


def _kind(name: str) -> tuple[type, bool]:
    """The type of a flag's value (bool, int, float, str or tuple), and whether it may be None."""
    parts = get_args(TYPES[name]) if get_origin(TYPES[name]) in (Union, UnionType) else (TYPES[name],)
    kind = next(part for part in parts if part is not NoneType)
    return get_origin(kind) or kind, NoneType in parts


class _Words(argparse.Action):
    """`--train_data a b` and `--train_data "a b"` mean the same, unless a file of that name exists."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [[value] if os.path.exists(value) else value.split() for value in values]
        if not any(words):
            raise argparse.ArgumentError(self, "expected at least one file, found an empty text")
        setattr(namespace, self.dest, tuple(word for part in words for word in part))


def _origin(given: Mapping[str, Any]) -> Origin:
    """The checkpoint that will be evaluated, if it is ours, and what it says. Raises: ValueError."""
    path = given.get("model_path", Run.model_path)
    if path != "none":
        checkpoint = find_checkpoint(Path(path))
    else:
        run = Path(given.get("checkpoint_dir", Run.checkpoint_dir)) / given.get("name", Run.name)
        checkpoint = latest_checkpoint(run)
    options = reached(read_options(checkpoint), checkpoint) if checkpoint else {}
    saved = {name: options[name] for name in OF_THE_MODEL if name in options}
    if given.get("retrieve_only"):
        saved.pop("rerank_by_reader", None)  # what the retriever finds, unless the reader is asked for here
    return Origin(checkpoint, saved, frozenset(given))


def _make_config(given: Mapping[str, Any], preset: Mapping[str, Any], origin: Origin) -> Config:
    """The command line's values, else the checkpoint's, else the preset's, else the defaults. Raises: ValueError."""
    file = origin.checkpoint / "options.json" if origin.checkpoint else ""
    saved = {
        name: _saved_value(name, value, file) for name, value in origin.saved.items() if origin.of(name) == "checkpoint"
    }
    defaults = {name: field.default for name, field in FIELDS.items()} | preset
    values = defaults | saved | given
    computed = {name: function for name, function in values.items() if callable(function)}
    options = argparse.Namespace(**values | dict.fromkeys(computed))
    for name, function in computed.items():
        setattr(options, name, function(options))
    defaults = {name: value(options) if callable(value) else value for name, value in defaults.items()}
    if options.closed_book or options.use_file_passages:
        options.train_retriever = False  # nothing is retrieved, so there is nothing to learn from
    sections = {
        name: section(**{field.name: getattr(options, field.name) for field in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
    }
    return Config(**sections, origin=dataclasses.replace(origin, defaults=defaults))


def _without_training(config: Config) -> Config:
    """The same without what would be taken for a training."""
    run = dataclasses.replace(config.run, train_data=())
    return dataclasses.replace(config, run=run, optimisation=dataclasses.replace(config.optimisation, restart=False))


def _saved_value(name: str, value: Any, source: str | os.PathLike) -> Any:
    """A value from a checkpoint, of the flag's type. Raises: ValueError."""
    (kind, optional), choices = _kind(name), FIELDS[name].metadata["choices"]
    if (value is None and optional) or (type(value) is kind and (not choices or value in choices)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    wanted = (
        f"one of {', '.join(choices)}"
        if choices
        else {str: "a text", int: "an integer"}.get(kind, f"a {kind.__name__}")
    )
    raise ValueError(f"{source}: --{name} is {value!r:.40} there, and must be {wanted}")
