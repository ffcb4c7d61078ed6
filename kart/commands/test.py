"""`kart test`: the property suites, on an object of your own."""

import argparse

from kart.commands.command import Command, integer, number


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", help="basis, operator, projection, kernel, step or model")
    add("target", help="module:object or file.py:object, such as my_module:hats")
    add("--max-examples", type=integer(1), metavar="INT", help="examples drawn for each property")
    add("--seconds", type=number(0), default=20.0, help="a property begins no example after (20)")
    add("--only", nargs="+", metavar="PROPERTY", help="check these alone")


def _run(args: argparse.Namespace) -> int:
    from kart import testing

    return testing.cli_main(
        args.target, args.kind, max_examples=args.max_examples, only=args.only, seconds=args.seconds
    )


COMMAND = Command(
    "test",
    "put a basis, operator or another object of your own through its property suite",
    _flags,
    _run,
    description="Checks the mathematics of an object of yours. This imports the module, or runs "
    "the file, that you name.",
)
