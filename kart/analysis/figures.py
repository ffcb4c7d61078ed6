"""What the plots share: Figures without global state, colours for either background."""

import textwrap
from typing import Any

from kart.pages import INK

# of middle lightness, so that they stand on a light and on a dark page; told apart by the colour
# blind (after Okabe and Ito, 2008). In grey they are alike: lines differ by `DASHES` as well
COLOURS = ("#3b7dd8", "#e0862a", "#1f9d7a", "#c2529d", "#8a6fd1", "#b0a020")
DASHES = (
    *("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5))),
    *((0, (8, 3)), (0, (3, 1, 1, 1, 1, 1))),
)
QUIET = "#8b909a"  # axes, reference lines


def look(i: int) -> dict[str, Any]:
    """Colour and dash of line i for `Axes.plot`; dashes move on when the colours are used up."""
    return {"color": COLOURS[i % len(COLOURS)], "ls": DASHES[(i + i // len(COLOURS)) % len(DASHES)]}


def grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A Figure of `rows x columns` axes, each `width x height` inches, and the axes, an array.

    A `matplotlib.figure.Figure` of its own, without pyplot: nothing is registered anywhere, and it
    is freed like any object. `options` go to `Figure.subplots`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "a plot needs matplotlib, which is not installed. Run "
            '`pip install "kart-attention[plots]"`.'
        ) from error
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(QUIET)
        ax.tick_params(labelsize=7, labelcolor=INK, color=QUIET, width=0.6, length=2.5)
        # of a logarithmic axis shorter than a decade
        ax.tick_params(which="minor", labelsize=5, labelcolor=INK, color=QUIET, width=0.6)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set(fontsize=8, color=INK)
    return fig, axes


def panels(
    count: int, most: int, width: float, height: float, **options: Any
) -> tuple[Any, list[Any]]:
    """A Figure of `count` axes, at most `most` in a row, and these axes; as of `grid`."""
    columns = min(most, count)
    fig, axes = grid(-(-count // columns), columns, width, height, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def wrapped(name: str) -> str:
    """A name on lines of 40 characters, so that a long one stays within its panel."""
    return "\n".join(textwrap.wrap(name, 40))


def legend(fig: Any) -> None:
    """Names the labelled lines of the first axes below them, in as many columns as fit, and makes
    the figure higher by the rows beyond two; nothing where there are none.
    """
    handles, labels = fig.axes[0].get_legend_handles_labels()
    if not labels:
        return
    labels = [wrapped(label) for label in labels]
    # an entry is about as wide as its text, in characters of 8 points, and its line
    widest = 0.7 + 0.07 * max(min(40, len(label)) for label in labels)
    columns = max(1, min(len(labels), int(fig.get_size_inches()[0] / widest)))
    lines = sum(1 + label.count("\n") for label in labels) / columns
    fig.set_figheight(fig.get_figheight() + 0.17 * max(0.0, lines - 2))
    fig.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=3,
    )
