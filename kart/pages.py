"""Self-contained pages of HTML: style, text, tables, figures; the one writer for runs and studies.

A page is one file without any outside resource. It follows the reader's light or dark setting and
the width of the screen, and prints on white. What a page says is a list of `Section`: blocks of
HTML, made by the functions below, and the numbers in them, for machines.
"""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

INK = "#2b2f36"  # of text and marks in figures; follows the page's text colour


class Markup(str):
    """Text that is HTML already."""


class Number(NamedTuple):
    """One number of a page: of one seed, or the mean over `n` seeds with its interval."""

    operator: str
    measure: str
    value: float | None
    unit: str = ""
    seed: int | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Section(NamedTuple):
    """A part of a page under its title; `blocks` are HTML, `numbers` what they show."""

    blocks: Sequence[str]
    numbers: Sequence[Number] = ()
    title: str = ""

    def asdict(self) -> dict[str, Any]:
        """The section as JSON has it, numbers that are not finite as None; `fromdict` reads it."""
        numbers = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in one}
            for one in (number._asdict().items() for number in self.numbers)
        ]
        return {"title": self.title, "blocks": [*map(str, self.blocks)], "numbers": numbers}

    @classmethod
    def fromdict(cls, found: dict[str, Any]) -> "Section":
        """The section of `asdict`."""
        blocks = [Markup(block) for block in found["blocks"]]
        return cls(blocks, [Number(**number) for number in found["numbers"]], found["title"])


def escape(value: Any) -> str:
    """`value` as text of HTML; a `Markup` stays as it is."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def tag(name: str, *parts: Any, **attributes: Any) -> Markup:
    """`<name attributes>parts</name>`, all escaped; a trailing `_` of an attribute is dropped."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{shown}>{''.join(map(escape, parts))}</{name}>")


def text(*parts: Any) -> Markup:
    """A paragraph."""
    return tag("p", *parts)


def note(*parts: Any) -> Markup:
    """A quiet paragraph: how something was measured."""
    return tag("p", *parts, class_="quiet")


def warning(*parts: Any) -> Markup:
    """A paragraph that must not be overlooked."""
    return tag("p", *parts, class_="warning")


def items(sentences: Iterable[Any]) -> Markup:
    """A list of sentences."""
    return tag("ul", *(tag("li", sentence) for sentence in sentences))


def code(content: Any) -> Markup:
    """Commands or settings, as they are."""
    return tag("pre", content)


def details(summary: str, *blocks: Any) -> Markup:
    """Blocks that are shown when the reader asks for them."""
    return tag("details", tag("summary", summary), *blocks)


def table(
    header: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    caption: Any = "",
    words: Sequence[int] = (),
) -> Markup:
    """A table whose first column names rows and stays in sight; columns in `words` are prose."""

    def row(cells: Sequence[Any], first: str, other: str) -> Markup:
        shown = []
        for i, cell in enumerate(cells):
            scope = {"scope": "col" if other == "th" else "row"} if i == 0 or other == "th" else {}
            kind = {"class_": "words"} if i in words else {}
            shown.append(tag(other if i else first, cell, **scope, **kind))
        return tag("tr", *shown)

    body = tag("tbody", *(row(cells, "th", "td") for cells in rows))
    wide = tag("div", tag("table", tag("thead", row(header, "th", "th")), body), class_="wide")
    return Markup(wide + (note(caption) if caption else ""))


def figure(fig: Any, name: str, alt: str, caption: Any = "") -> Markup:
    """A matplotlib Figure below its caption; `name` is unique, `alt` is for who cannot see it."""
    width = fig.get_size_inches()[0] * 96
    # texts stay legible: a narrow screen scrolls a figure that it would shrink by a quarter
    place = f"min-width: {0.75 * width:.0f}px; max-width: {1.4 * width:.0f}px"
    lead = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" style="{place}" '
    image = Markup(svg(fig, name).replace("<svg ", lead, 1))
    above = [tag("figcaption", caption)] if caption else []
    kind = {"class_": "broad"} if width > 560 else {}
    return tag("figure", *above, tag("div", image, class_="scroll"), **kind)


def beside(*figures: Markup) -> Markup:
    """Figures next to each other where the screen is wide enough."""
    return tag("div", *figures, class_="beside")


def page(title: str, sections: Iterable[Section], lead: Any = "") -> str:
    """A whole page: the title, `lead` below it, the sections."""
    shown = [
        tag("section", *([tag("h2", one.title)] if one.title else []), *map(Markup, one.blocks))
        for one in sections
    ]
    body = "\n".join([tag("h1", title), *([note(lead)] if lead else []), *shown])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def svg(fig: Any, name: str) -> str:
    """`fig` as an SVG element for a page: its texts stay text in the page's font and colour.

    `name` is put before all ids, since the figures of a page share one name space. The same figure
    gives the same text on every call.
    """
    import matplotlib

    name = re.sub(r"\W+", "-", name)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kart"}):
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(buffer, format="svg", transparent=True, metadata=empty)
    found = buffer.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r' xmlns(:\w+)?="[^"]*"', "", found)  # a page of HTML needs none
    # of groups and images, which nothing refers to
    found = re.sub(r'\bid="(?:\w+_\d+|patch|text|image\w+)"', "", found)
    found = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", found)
    found = re.sub(r"font(-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", _page_font, found)
    found = found.replace(INK, "currentColor")
    # the page sets the size; the view box keeps the shape
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", found, count=1)


def _page_font(match: re.Match[str]) -> str:
    return f"font-size: {match[2].strip()}; font-family: inherit" if match[2] else ""


STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #22262c; --quiet: #5f6570;
  --line: #dcdee2; --code: #f1f2f3; --mark: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e4e6e9; --quiet: #9aa0a9;
  --line: #34383e; --code: #1e2125; --mark: #f0a04b; } }
@media print { :root { color-scheme: light; --page: #fff; --ink: #000; --quiet: #444;
  --line: #bbb; --code: #f4f4f4; --mark: #8a3d00; } figure, tr { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; font-weight: 650; }
p, ul { max-width: 46rem; margin: .6rem 0; overflow-wrap: break-word; }
ul { padding-left: 1.2rem; }
.quiet, figcaption, small { color: var(--quiet); font-size: .875rem; }
figcaption { color: var(--ink); margin-bottom: .3rem; overflow-wrap: anywhere; }
.warning { border-left: 3px solid var(--mark); padding-left: .7rem; }
.wide, .scroll { overflow-x: auto; }
.wide { margin: 1.2rem 0 .6rem; }
table { border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; white-space: nowrap; font-weight: 400;
  vertical-align: top; }
thead th { color: var(--quiet); border-bottom: 1px solid var(--ink); font-size: .8125rem; }
tbody th { font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 6rem; max-width: 11rem; overflow-wrap: break-word; }
.words { text-align: left; white-space: normal; min-width: 13rem; }
.beside { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: .4rem 0; min-width: 0; }
.broad { grid-column: 1 / -1; }
figure svg { width: 100%; height: auto; display: block; }
pre { background: var(--code); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto;
  font-size: .8125rem; line-height: 1.4; }
@media (max-width: 40rem) { table { font-size: .8125rem; } th, td { padding-right: .6rem; } }
summary { cursor: pointer; margin: .6rem 0; }
"""
