"""What the plots share: Figures without global state, colours for either background, SVG text."""

import io
import re
from typing import Any

# of middle lightness, so that they stand on a light and on a dark page; told apart by the colour
# blind (after Okabe and Ito, 2008)
COLOURS = ("#3b7dd8", "#e0862a", "#1f9d7a", "#c2529d", "#8a6fd1", "#b0a020")
INK = "#2b2f36"  # text and marks; follows the page's text colour in a report
QUIET = "#8b909a"  # axes, reference lines


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
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set(fontsize=8, color=INK)
    return fig, axes


def svg(fig: Any, name: str) -> str:
    """`fig` as an SVG element for a page: its texts stay text in the page's font and colour.

    `name` is put before all ids, since the figures of a page share one name space. The same figure
    gives the same text on every call.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kart"}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # a page of HTML needs none
    text = re.sub(r'\bid="(?:\w+_\d+|patch|text)"', "", text)  # of groups nothing refers to
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font(-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", _page_font, text)
    text = text.replace(INK, "currentColor")
    # the page sets the size; the view box keeps the shape
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)


def _page_font(match: re.Match[str]) -> str:
    return f"font-size: {match[2].strip()}; font-family: inherit" if match[2] else ""
