"""What a command is, and the types of its flags: one parser for all, one line for every mistake."""

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kart import schema

# products of larger numbers overflow
MOST = 1e30
CODE_HELP = "run this file (or module), which the operator of what is read names; nothing else is"

Call = Callable[[argparse.Namespace], int]


class Command(NamedTuple):
    """A command, or a group of them: `add_flags(parser)` adds its flags, `run(args)` runs it and
    returns the exit status. A group has `commands` and neither of the two.
    """

    name: str
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None
    run: Call | None = None
    description: str | None = None
    epilog: str | None = None
    commands: tuple["Command", ...] = ()
    reads: bool = False  # what others may have written: code that it names runs by `--code` alone


class _Outlasting(io.FileIO):
    """A file whose reader may leave, as `head` does: what it did not wait for is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlast() -> None:
    """Lets this process outlast its output: neither a reader that left nor a sign that the terminal
    has not ends what ran for hours.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            file = _Outlasting(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError):  # closed, or no file, as in a notebook
            continue
        stream.flush()
        text = io.TextIOWrapper(
            io.BufferedWriter(file),
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,  # the last with `-u`
        )
        setattr(sys, name, text)


def standalone(main: Callable[..., int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `main(argv)` as this process; ends with its status, or 2 and a line on a mistake."""
    outlast()
    try:
        sys.exit(main(argv))
    except (ValueError, OSError, ImportError) as error:
        told = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).stem}: error: {told}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a ValueError of one line, and flags are written out."""

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **options)

    def check_once(self, argv: Sequence[str]) -> None:
        """Raises for a flag that is there twice, or with its opposite: the last would hold."""
        before = argv[: argv.index("--")] if "--" in argv else argv
        names = [word.partition("=")[0] for word in before]
        for action in self._actions:
            found = [name for name in names if name in action.option_strings]
            # a switch that is there twice says the same, and what is appended all counts
            if action.nargs == 0:
                found = list(dict.fromkeys(found))
            if len(found) < 2 or isinstance(action, argparse._AppendAction):
                continue
            if len(set(found)) > 1:
                self.error(f"`{'` and `'.join(found)}` are both there: give one of them")
            several = action.nargs in ("+", "*") or action.type is commas
            advice = "give all values to one" if several else "give it once"
            self.error(f"`{found[0]}` is there {len(found)} times: {advice}")

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print over its usage."""
        raise ValueError(f"{message}. See `{self.prog} --help`.")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raises for arguments that nothing has taken, with the flags that are near."""
        flags = set(re.findall(r"--[a-z][a-z-]*", self.format_help()))
        near = schema.near_matches(unknown[0].partition("=")[0], flags)
        self.error(f"`{unknown[0]}` is no argument.{near}".rstrip("."))


def add(parser: Parser, commands: Sequence[Command]) -> None:
    """Adds `commands` below `parser`; the chosen one is `args.call`, its parser `args.parser`."""
    # argparse wants a metavar to list them without their names in braces
    below = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for one in commands:
        sub = below.add_parser(
            one.name, help=one.help, description=one.description or one.help, epilog=one.epilog
        )
        if one.commands:
            add(sub, one.commands)
            continue
        assert one.add_flags is not None and one.run is not None
        one.add_flags(sub)
        if one.reads:
            sub.add_argument("--code", action="append", default=[], metavar="FILE", help=CODE_HELP)
        sub.set_defaults(call=one.run, parser=sub)


def flag(name: str) -> str:
    """What argparse calls `name` as the command line has it."""
    return f"--{name.replace('_', '-')}"


def choice(asked: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`, else a ValueError with the near ones."""
    if value in allowed:
        return value
    near = schema.near_matches(value, allowed)
    raise ValueError(f"`{asked}` needs one of {', '.join(allowed)}, got {value!r}.{near}")


def commas(text: str) -> tuple[str, ...]:
    """The type of a flag that takes several words, separated by commas."""
    return tuple(text.split(","))


def place(text: str) -> str:
    """The type of a flag that names a file or directory to write."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"needs a name, got {text!r}; leave the flag out")
    return text


def file(text: str) -> str:
    """The type of a flag that names a file to write, checked before the work that fills it."""
    path = Path(place(text)).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"needs a file in a directory that exists, got {text!r}. Make it first"
        )
    return text


def integer(least: int | None = None, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of a flag that takes an integer in ASCII digits, `least` to `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,99}", text):
            raise argparse.ArgumentTypeError(f"needs an integer, got {text[:99]!r}")
        value = int(text)
        if (least is not None and value < least) or abs(value) > most:
            bound = f"an integer >= {least}" if least is not None else "a smaller integer"
            if value > most:
                bound = f"an integer <= {most}"
            raise argparse.ArgumentTypeError(f"needs {bound}, got {text}")
        return value

    return parse


def number(least: float | None = None) -> Callable[[str], float]:
    """The type of a flag that takes a finite number, at least `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"needs a number >= {least:g}, got {text}")
        if abs(value) > MOST:
            raise argparse.ArgumentTypeError(f"needs a number of at most {MOST:g}, got {text}")
        return value

    return parse
