"""The `kart` command: parsing and calling, and one line for whatever goes wrong."""

import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kart
from kart import code, distributed, train
from kart.commands import COMMANDS
from kart.commands.command import Parser, add, outlast

DESCRIPTION = """\
Train, evaluate and study vision transformers with learnable attention (KArAt).

  kart train --operator softmax G3B G3U --seeds 0 1 2 --out runs/digits
  kart eval runs/digits
  kart analyse runs/digits
  kart info --model vit_tiny --operator G3B
"""


def parser() -> Parser:
    """The parser of the whole command."""
    top = Parser("kart", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"kart {kart.__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add(top, COMMANDS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for a failed run, 2 for a mistake, 130 after Ctrl-C."""
    if argv is None:
        outlast()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = None
    try:
        args, rest = parser().parse_known_args(argv)
        if rest:
            args.parser.refuse(rest)
        args.parser.check_once(argv)
        args.given = argv
        for name in getattr(args, "code", ()):
            code.use(name)
        return args.call(args)
    except KeyboardInterrupt:
        print("\nkart: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (train.Diverged, distributed.Lost) as error:
        print(f"kart: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if "--debug" in argv:
            raise
        print(f"kart: error: {_one_line(error, _place(args))}", file=sys.stderr)
        return 2


def _place(args: Any) -> Path | None:
    """The run or study that the command works on, None where there is none yet."""
    named = (getattr(args, "out", None), getattr(args, "run", None))
    places = [Path(name) for name in named if isinstance(name, str) and "\0" not in name]
    marks = ("config.json", "study.json")
    return next((p for p in places if any((p / mark).is_file() for mark in marks)), None)


def _one_line(error: Exception, place: Path | None) -> str:
    """What went wrong, in a line; the traceback of what nobody foresaw goes to a file."""
    # whatever a library says of a connection, without its password
    text = re.sub(r"(://[^\s:/@]*):[^\s/]*@", r"\1:***@", " ".join(str(error).split()))
    if isinstance(error, ValueError | OSError | ImportError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return f"this needs more memory than there is ({text[-200:]}). Choose a smaller model."
    with tempfile.NamedTemporaryFile(
        "w", dir=place, prefix="traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    kind = type(error).__name__
    return f"{kind}: {text[:300]} (unforeseen; the traceback is in {Path(file.name)})"


if __name__ == "__main__":
    sys.exit(main())
