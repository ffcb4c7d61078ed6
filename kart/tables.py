"""Plain text tables, numbers with their spread, progress bars."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Rows of text under a header, columns aligned; see `aligned`."""
    head, *body = _printed([header, *rows])
    rule = ["-" * max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(aligned([head, rule, *body]))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line of text a row, the first column to the left, the others to the right. What does not
    print, as a line break in the name of a class, is shown as Python escapes it.
    """
    rows = _printed(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _printed(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [
        ["".join(c if c.isprintable() else repr(c)[1:-1] for c in cell) for cell in row]
        for row in rows
    ]


def spread(values: Sequence[float], digits: int = 2, scale: float = 100.0) -> str:
    """Mean and standard deviation (n - 1) of `values`, in per cent by default; nan where a value is
    not finite.
    """
    mean = statistics.fmean(values) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    # `stdev` has an error of its own for values that are not finite
    deviation = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean:.{digits}f} ± {deviation * scale:.{digits}f}"


def scores(records: Sequence[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """The `spread` over seeds of "top1" and "top5", in per cent, and of "loss", of records in which
    `prefix` stands before these names.
    """
    forms = {"top1": (2, 100.0), "top5": (2, 100.0), "loss": (3, 1.0)}
    return [spread([one[prefix + name] for one in records], *form) for name, form in forms.items()]


def bar(*args: Any, **options: Any) -> Any:
    """tqdm's progress bar; into a file it writes a line every half minute."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 30, "ascii": True}
    return tqdm(*args, dynamic_ncols=True, **options)
