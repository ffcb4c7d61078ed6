"""Pages of HTML: what is text is escaped, what is markup is not, tables and figures stand alone."""

import re

import pytest

from kart import pages
from kart.analysis import figures


def drawn(width=3.0):
    fig, axes = figures.grid(1, 1, width, 2.0)
    axes[0, 0].plot([0, 1], [0, 1], label="a < b")
    return fig


def test_text_is_escaped_and_markup_is_not():
    assert pages.text("a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert pages.text("see ", pages.tag("code", "x<y")) == "<p>see <code>x&lt;y</code></p>"
    assert pages.tag("a", "x", title='"') == '<a title="&quot;">x</a>'
    assert pages.items(["<", ">"]) == "<ul><li>&lt;</li><li>&gt;</li></ul>"
    assert pages.details("more", pages.code("1 < 2")).count("<pre>") == 1


def test_a_table_names_its_rows_and_scrolls_in_itself():
    found = pages.table(["name", "x"], [["a<b", 1], [pages.Markup("<b>c</b>"), "2"]], "Said.", (1,))
    assert found.startswith('<div class="wide"><table>') and found.count("<tr>") == 3
    assert '<th scope="row">a&lt;b</th>' in found and "<b>c</b>" in found
    assert found.count('class="words"') == 3 and found.endswith('<p class="quiet">Said.</p>')


def test_a_figure_is_named_and_its_ids_are_its_own():
    one = pages.figure(drawn(), "one two", 'says "this"', "A caption")
    assert 'aria-label="says &quot;this&quot;"' in one and "<figcaption>A caption" in one
    ids = re.findall(r'\bid="([^"]*)"', one)
    assert ids and all(name.startswith("one-two-") for name in ids)
    assert 'class="broad"' in pages.figure(drawn(7.0), "x", "y")
    assert "min-width: 216px" in one  # three quarters of 288


def test_a_section_survives_json():
    numbers = [pages.Number("softmax", "x", 1.5, "ms", 0), pages.Number("G3B", "y", float("inf"))]
    stored = pages.Section([pages.text("<")], numbers, "Title").asdict()
    found = pages.Section.fromdict(stored)
    assert found.blocks == ["<p>&lt;</p>"] and isinstance(found.blocks[0], pages.Markup)
    assert found.numbers[0] == numbers[0] and found.numbers[1].value is None
    assert found.title == "Title"


def test_a_page_is_whole_and_needs_nothing():
    section = pages.Section([pages.text("body")], title="Part <1>")
    found = pages.page("A & B", [section, pages.Section(["<p>bare</p>"])], "lead")
    assert found.startswith("<!doctype html>") and found.rstrip().endswith("</html>")
    assert "<title>A &amp; B</title>" in found and "<h2>Part &lt;1&gt;</h2>" in found
    assert found.count("<section>") == 2 and found.count("<h2>") == 1 and "http" not in found


def test_lines_differ_by_more_than_their_colour():
    looks = [figures.look(i) for i in range(12)]
    assert len({(look["color"], look["ls"]) for look in looks}) == 12
    assert (
        len({look["ls"] for look in looks[:6]}) == len({look["color"] for look in looks[:6]}) == 6
    )


@pytest.mark.parametrize(
    "names", [["a"], ["softmax", "G3B"], ["x" * 90, "y", "z"], list("abcdefghijklmnop")]
)
def test_a_legend_stays_within_its_figure(names):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    fig, axes = figures.grid(1, 1, 3.4, 2.4)
    for name in names:
        axes[0, 0].plot([0, 1], [0, 1], label=name)
    figures.legend(fig)
    FigureCanvasAgg(fig).draw()
    box = fig.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width
    # and below the axes, which keep their height
    place = axes[0, 0].get_window_extent()
    assert box.y1 < place.y0 and place.height > 120
