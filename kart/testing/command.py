"""The suites from the command line: an object by its name, progress, a table, an exit status."""

import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from kart import code
from kart.testing import core
from kart.testing.api import SUITES
from kart.testing.core import Result, Suite
from kart.testing.kernel import Kernel

# what tells an object of a kind from a factory of it; a projection is itself a function
MARKS = {"basis": "init", "operator": "init", "kernel": "fast", "step": "step", "model": "init"}
WORDS = {True: "holds", False: "FAILS", None: "-"}


def load(target: str, kind: str = "basis") -> Any:
    """The object that `module:name` (or `file.py:name`) names; a factory is called first."""
    module_name, colon, path = target.rpartition(":")
    if not colon or not module_name or not path:
        raise ValueError(
            f"`target` needs the form module:name, got {target!r}. "
            "Pass for example my_module:my_basis, or my_file.py:my_basis."
        )
    value: Any = code.run(module_name)
    for part in path.split("."):
        if not hasattr(value, part):
            known = [name for name in dir(value) if not name.startswith("_")]
            raise ValueError(
                f"`target` needs a name that {module_name} has, got {target!r} without {part!r}. "
                f"It has {', '.join(known) or 'no names'}."
            )
        value = getattr(value, part)
    mark = MARKS.get(kind)
    if mark is None or hasattr(value, mark) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:
        raise ValueError(
            "`target` needs an object, or a function that makes one without arguments, got "
            f"{target!r}, which raised {code.where(error, module_name)}. Mend it, or give it "
            "defaults."
        ) from error


def suite_of(kind: str, target: str) -> Suite:
    """The suite of the object that `target` names; a kernel is a `kart.testing.Kernel`."""
    if kind not in SUITES:
        raise ValueError(
            f"`kind` needs to be one of {', '.join(SUITES)}, got {kind!r}. Choose one of them."
        )
    obj = load(target, kind)
    if kind != "kernel":
        return SUITES[kind](obj, name=target)
    if not isinstance(obj, Kernel):
        raise ValueError(
            f"`target` needs a `kart.testing.Kernel`, got {obj!r:.200}. Put the fast form, the "
            "plain one, their inputs and sizes into one."
        )
    return SUITES[kind](*obj[:4], traits=obj.traits, name=target)


def cli_main(
    target: str,
    kind: str = "basis",
    *,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    seconds: float | None = 20.0,
) -> int:
    """Checks the object that `target` names, with a line on each property as soon as it is known
    and the failures in full at the end; 0 if all holds, 1 if something fails, 2 if there is no
    such object.

    Args:
        target: `module:name` or `file.py:name`; a factory without required arguments is called.
        kind: "basis", "operator", "projection", "kernel", "step" or "model".
        max_examples, only: as in `check_basis`.
        seconds: a property begins no new example after so many; None for no limit.
    """
    try:
        suite = suite_of(kind, target)
        asked = [p.name for p in suite.properties if only is None or p.name in only]
        width = max(map(len, asked), default=0)
        done: list[Result] = []
        start = time.monotonic()
        for result in core.results(suite, None, max_examples, only, seconds):
            text = "see below" if result.passed is False else result.message
            line = f"{len(done) + 1:3}/{len(asked)}  {WORDS[result.passed]:5}  "
            line += f"{result.name:{width}}  {textwrap.shorten(text, 100)}"
            print(line, flush=True)
            done.append(result)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for result in done:
        if result.passed is False:
            print(f"\n{result.message}")
    hold, fail, skip = (sum(r.passed is word for r in done) for word in (True, False, None))
    took = time.monotonic() - start
    print(f"\n{hold} hold, {fail} fail, {skip} not checked, in {took:.0f} s")
    return int(fail > 0)
