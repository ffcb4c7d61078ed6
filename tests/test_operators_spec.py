"""Spec strings: what they name, and that nothing in one is accepted without effect."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kart import operators

EXAMPLES = [
    *operators.EXAMPLES,
    *(
        "G1B",
        "G1U",
        "polynomial-0B",
        "polynomial-1B",
        "bspline-G8B",
        "gaussian_rbf-G8B",
        "fourier-3U",
    ),
    *("G3B:rank=24", "G3B:project=simplex", "G3B:base=softmax", "G3B:base=gelu", "2*softmax+G3B"),
    *("G3B:scales=true,init=smooth", "morlet-B:omega=3,rank=2", "chebyshev-4B:span=-2..2.5"),
    *(
        "fourier-3U",
        "meyer:reading=direct",
        "bspline:grid=4,degree=2",
        "G3B:base=softmax,unit_base=silu",
    ),
    *("polynomial-1:order=full_rank", "G2:order=two_stage,rank=3", "G3:mix=zero,engine=torch"),
]


@pytest.mark.parametrize("spec", EXAMPLES)
def test_an_example_parses_to_an_operator_of_that_name(spec):
    parsed = operators.parse(spec)
    assert parsed.operator.name == spec
    letter = spec.split(":")[0][-1]
    assert parsed.sharing == {"B": "blockwise", "U": "universal"}.get(letter)
    heads = 3 if "*" in spec else 2
    params = parsed.operator.init(torch.Generator().manual_seed(0), heads, 5)
    assert bool(params) == parsed.operator.traits["learned"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sofmax", "Near matches: softmax"),
        ("Softmax", "Near matches: softmax"),
        ("g3b", "Near matches: G3B"),
        ("G3X", "Near matches: G3"),
        ("", "needs a spec"),
        ("furier-G3B", "Near matches: fourier"),
        ("Morlet-B", "Near matches: morlet"),
        ("G0B", "`grid` >= 1"),
        ("fourier", "fourier needs"),
        ("B", "there is no operator"),
        ("rational-5B", "needs numerator (5)/denominator (4)"),
        ("morlet-3B", "morlet needs no numbers"),
        ("softmax-3", "softmax takes no numbers"),
        ("softmax-B", "softmax has no parameters to share"),
        ("G3B:rnk=3", "Near matches: rank"),
        ("G3B:Rank=3", "Near matches: rank"),
        ("G3B:rank=0", "`rank` >= 1"),
        ("G3B:rank=-1", "`rank` >= 1"),
        ("G3B:rank=1.5", "'rank' must be like 12"),
        ("G3B:rank=many", "'rank' must be like 12"),
        ("G3B:rank=true", "'rank' must be like 12"),
        ("G3B:rank", "name=value"),
        ("G3B:", "name=value"),
        ("G3B:rank=2,", "name=value"),
        ("G3B:rank=", "name=value"),
        ("G3B:rank=1,rank=2", "'rank' is given twice"),
        ("G3B:rank=1,rank=1", "'rank' is given twice"),
        ("G3B:base=silu,unit_base=gelu", "'unit_base' is given twice"),
        ("G3B:grid=4", "grid is given twice"),
        ("G3B:order=sideways", "order must be one of"),
        ("G3B:order=fullrank", "Near matches: full_rank"),
        ("G3B:order=full_rank,rank=3", "'rank' has no effect on"),
        ("G3B:order=two_stage,mix=zero", "'mix' has no effect on"),
        ("morlet-B:span=-1..1", "'span' has no effect on morlet"),
        ("chebyshev-4B:span=a..b", "'span' must be like"),
        ("chebyshev-4B:span=3", "'span' must be like"),
        ("G3B:scales=maybe", "'scales' must be like False"),
        ("G3B:scales=1", "'scales' must be like False"),
        ("G3B:project=ball", "`project`"),
        ("G3B:project=Simplex", "Near matches: simplex"),
        ("G3B:base=Softmax", "Near matches: softmax"),
        ("G3B:base=SiLU", "Near matches: silu"),
        ("G3B:init=warm", "`init`"),
        ("softmax:rank=3", "takes no options"),
        ("softmax:base=softmax", "takes no options"),
        ("sigmoid:project=simplex", "takes no options"),
        ("x*G3B", "number of heads"),
        ("0*softmax+2*G3B", "at least 1"),
        ("-1*softmax+2*G3B", "at least 1"),
        ("9999999*softmax", "more than 6 digits"),
        ("softmax+", "there is no operator ''"),
        ("G3B+G3U", "all blockwise or all universal"),
        ("G\uff13B", "ASCII"),
        ("G3B:rank=\uff11\uff12", "ASCII"),
        ("\u00b2*G3B", "ASCII"),
        ("G3B:rank=1_0", "'rank' must be like 12"),
        ("G1000000B", "more than 6 digits"),
        ("G" + "9" * 5000 + "B", "more than 6 digits"),
        ("G3B:rank=1" + "0" * 30, "more than 6 digits"),
        ("polynomial-B:degree=1" + "0" * 9, "more than 6 digits"),
        ("G3B:rank=nan", "'rank' must be like 12"),
        ("morlet-B:omega=inf", "'omega' must be like 5.0"),
        ("G3B\nrank", "there is no operator"),
    ],
)
def test_a_bad_spec_says_what_is_wrong_in_one_line(spec, words):
    with pytest.raises(ValueError, match="needs") as caught:
        operators.parse(spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@given(st.text("G3BU:rank=1,base*+softmxpoly-_ /.0\uff13", max_size=24))
def test_any_text_is_an_operator_or_one_line(text):
    try:
        parsed = operators.parse(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert parsed.operator.name == text


@pytest.mark.parametrize("spec", [None, 3, ["G3B"], b"G3B"])
def test_what_is_no_string_is_refused(spec):
    with pytest.raises(ValueError, match="`operator` needs a spec"):
        operators.parse(spec)


@pytest.mark.parametrize(
    ("spec", "overrides", "words"),
    [
        ("softmax", {"rank": 3}, "'rank' has no effect on softmax"),
        ("softmax", {"project": "simplex"}, "'project' has no effect on softmax"),
        ("softmax", {"base": "softmax"}, "'base' has no effect on softmax"),
        ("softmax", {"mix": "zero"}, "'mix' has no effect on softmax"),
        ("softmax+relu", {"rank": 3}, "rank=3, given beside it, has no effect"),
        ("G3B:order=full_rank", {"rank": 3}, "'rank' has no effect on"),
        ("G3B:rank=4", {"rank": 3}, "rank=3, given beside it, has no effect"),
        ("G3B", {"grid": 4}, "grid=4, given beside it, has no effect"),
        ("G3B", {"rnk": 3}, "Near matches: rank"),
        ("G3B+softmax", {"rnk": 3}, "Near matches: rank"),
        ("G3B", {"base": "Softmax"}, "Near matches: softmax"),
        ("G3B", {"project": "Simplex"}, "Near matches: simplex"),
        ("G3B", {"rank": "12"}, "'rank' must be like 12"),
        ("G3B", {"rank": -1}, "`rank` >= 1"),
        ("G3B", {"order": "fullrank"}, "Near matches: full_rank"),
        ("softmax", {"order": "full_rank"}, "order='full_rank', given beside it, has no effect"),
        ("G3B:order=two_stage", {"order": "full_rank"}, "given beside it, has no effect"),
        ("G3B", {"order": "full_rank", "rank": 3}, "'rank' has no effect on"),
    ],
)
def test_an_override_without_effect_is_refused(spec, overrides, words):
    with pytest.raises(ValueError, match="needs") as caught:
        operators.parse(spec, **overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_reach_every_head_that_leaves_them_open():
    op = operators.parse("softmax+G3B:rank=4+G2B", rank=7, base="gelu", project=None).operator
    _, (first, _), (second, _) = op.options["groups"]
    assert (first.options["rank"], second.options["rank"]) == (4, 7)
    assert first.basis.options["base"] == second.basis.options["base"] == "gelu"
    assert operators.parse("G3B:rank=4", rank=4).operator.options["rank"] == 4
    orders = operators.parse("softmax+G3B+G2B:order=two_stage", order="full_rank").operator
    kinds = [op.options["kind"] for op, _ in orders.options["groups"]]
    assert kinds == ["softmax", "full_rank", "two_stage"]
    assert operators.parse("softmax", rank=None, base=None).operator.name == "softmax"


def test_the_docstring_of_parse_names_every_order():
    orders = {spec.split("order=")[1] for spec in operators.EXAMPLES if "order=" in spec}
    assert orders <= set(re.findall(r"\w+", operators.parse.__doc__ or ""))


def test_open_options_are_those_that_an_override_may_give():
    assert operators.options("softmax") == set()
    assert {"rank", "project", "base", "unit_base", "scales", "mix", "order"} <= operators.options(
        "G3B"
    )
    assert "rank" not in operators.options("G3B:rank=3")
    assert "rank" not in operators.options("G3B:order=full_rank")
    assert "rank" in operators.options("softmax+G3B:rank=3+G2B")


@pytest.mark.parametrize("spec", ["G3B", "dog-B:order=two_stage", "softmax", "softmax+G3B"])
def test_a_new_operator_is_read_off_its_signature(spec, monkeypatch):
    def entmax(alpha: float = 1.5) -> operators.Operator:
        return operators.softmax()._replace(name=f"entmax {alpha}")

    monkeypatch.setattr(operators, "OPERATORS", (*operators.OPERATORS, entmax))
    assert operators.options("entmax") == {"alpha"}
    parsed = operators.parse(f"entmax:alpha=2+{spec}")
    assert parsed.operator.name == f"entmax:alpha=2+{spec}"
    with pytest.raises(ValueError, match="Near matches: alpha"):
        operators.parse("entmax:alhpa=2")
    with pytest.raises(ValueError, match="Near matches: entmax"):
        operators.parse("entmx")


@pytest.mark.parametrize(
    ("text", "blocks", "specs"),
    [
        ("G3B", 4, "G3B"),
        ("softmax|G3B", 2, ("softmax", "G3B")),
        ("softmax|...|G3B", 4, ("softmax", "softmax", "softmax", "G3B")),
        ("softmax | G3B:rank=8 | ...", 3, ("softmax", "G3B:rank=8", "G3B:rank=8")),
        ("softmax|...|G3B", 2, ("softmax", "G3B")),
        ("G1B|softmax|...|G3U|G3U", 4, ("G1B", "softmax", "G3U", "G3U")),
    ],
)
def test_specs_of_all_blocks(text, blocks, specs):
    assert operators.each_block(text, blocks) == specs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("softmax|G3B", "names 2 blocks, and the model has 3"),
        ("a|b|...|c|d", "names 4 blocks, and the model has 3"),
        ("softmax|", "a block between two | has none"),
        ("|softmax|G3B", "a block between two | has none"),
        ("...|softmax|G3B", "stands once, and behind what it repeats"),
        ("softmax|...|...", "stands once, and behind what it repeats"),
    ],
)
def test_bad_specs_of_all_blocks(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        operators.each_block(text, 3)


@given(st.lists(st.sampled_from(["softmax", "G3B", "2*softmax+G1U"]), min_size=2, max_size=9))
def test_what_is_shown_of_all_blocks_is_read_back(specs):
    wanted = tuple(specs) if len(set(specs)) > 1 else specs[0]
    assert operators.each_block(operators.shown(specs), len(specs)) == wanted
