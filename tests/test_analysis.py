"""Measurements against operators and hand-made cases; plots without global state; the report."""

import csv
import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.testing import assert_close

from kart import bases, operators, pages, population, train, tree
from kart.analysis import attention, functions, report, section, training
from kart.train import Config

X = torch.linspace(-2, 2, 9)


def drawn(spec, heads=2, tokens=5):
    operator = operators.parse(spec).operator
    return operator, operator.init(torch.Generator().manual_seed(0), heads, tokens)


# functions


def test_curves_of_a_known_unit():
    operator = operators.low_rank(bases.fourier(1), rank=1)
    coefs = torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
    params = {"units": {"coefs": coefs}, "mix": torch.ones(1, 2, 1)}
    values = functions.curves(operator, params, X)
    assert_close(values, torch.stack([X.cos(), 2 * X.sin()]).reshape(1, 1, 2, 9))
    assert_close(values.mean(-2), (X.cos() / 2 + X.sin()).reshape(1, 1, 9))
    assert functions.strongest(values, params["mix"], 1).tolist() == [[1]]


def test_the_strongest_units_after_a_mix_are_the_largest_alone():
    # of `project_first` W comes before the units, and its columns are of other keys
    operator = operators.project_first(bases.fourier(1), rank=1)
    coefs = torch.tensor([[[[1.0, 0.0]], [[2.0, 0.0]]]])
    params = {"units": {"coefs": coefs}, "mix": torch.tensor([[[9.0, 1.0]]])}
    (ax,) = functions.plot(operator, params, X, count=1).axes
    assert_close(torch.tensor(ax.lines[-1].get_ydata()), 2 * X.cos())


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("G3B:rank=4", (2, 4, 5, 9)),
        ("bspline-G4B:rank=4,base=silu", (2, 4, 5, 9)),
        ("morlet-B:rank=4,scales=true", (2, 4, 5, 9)),
        ("G2B:order=full_rank", (2, 5, 5, 9)),
        ("G2B:rank=4,order=project_first", (2, 5, 4, 9)),
        ("rational-2/1B:rank=4,order=two_stage", (2, 4, 5, 9)),
    ],
)
def test_curves_of_every_kind_and_their_plot(spec, shape):
    operator, params = drawn(spec)
    values = functions.curves(operator, params, X)
    assert values.shape == shape
    fig = functions.plot(operator, params, initial=params, scores=torch.randn(3, 2, 5, 5))
    assert [ax.get_title() for ax in fig.axes] == ["head 1", "head 2"]


@pytest.mark.parametrize("spec", ["G3B:rank=4", "morlet-B:rank=4", "G2B:rank=3,scales=true"])
def test_means_over_keys_are_the_hidden_values_of_rows_of_one_score(spec):
    operator, params = drawn(spec)
    for x in (-1.3, 0.0, 0.7):
        values = functions.curves(operator, params, torch.tensor([x]))
        hidden = 5 * values.mean(-2)  # (H, r, 1)
        weights = operator.weights(params, torch.full((2, 1, 5), x))
        assert_close(weights.mT, params["mix"] @ hidden)


@pytest.mark.parametrize("spec", ["G3B:rank=4", "dog-B:rank=4"])
def test_the_response_is_how_a_weight_follows_its_own_score(spec):
    operator, params = drawn(spec)
    x = torch.tensor([-0.8, 0.4])
    found = functions.response(operator, params, x)
    assert_close(found.mean(-1), torch.zeros(2, 5))
    base = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(1))
    for m in range(5):
        own = []
        for value in x:
            scores = base.clone()
            scores[..., m] = value
            own.append(operator.weights(params, scores)[:, 0, m])
        assert_close(own[1] - own[0], found[:, m, 1] - found[:, m, 0])
    with pytest.raises(ValueError, match="low-rank operator"):
        functions.response(*drawn("G2B:order=full_rank"), X)


def test_the_response_includes_the_softmax_that_the_operator_is_added_to():
    operator, params = drawn("G3B:rank=4,base=softmax")
    x = torch.tensor([-0.8, 0.4])
    found = functions.response(operator, params, x)
    for m in range(5):
        rows = torch.zeros(2, 1, 1, 5)
        rows[..., m] = x[:, None, None]
        own = operator.weights(params, rows.expand(2, 2, 1, 5))[:, :, 0, m].mT  # (H, X)
        assert_close(own[:, 1] - own[:, 0], found[:, m, 1] - found[:, m, 0])
    bare = functions.response(drawn("G3B:rank=4")[0], params, x)
    assert_close(found - bare, functions.softmax_response(x, 5)[:, None].expand(2, 5, 2))
    # scores of log 3 weigh three times as much as zeros: e^x / (e^x + 12)
    high = functions.softmax_response(x, 5, torch.full((1, 2, 3, 5), math.log(3.0)))
    expected = x.exp() / (x.exp() + 12)
    assert_close(high, (expected - expected.mean()).expand(2, 2))


def test_how_far_units_moved():
    values = torch.randn(3, 4, 5, 9, generator=torch.Generator().manual_seed(0))
    assert_close(functions.moved(values, values), torch.zeros(3))
    assert_close(functions.moved(3 * values, values), torch.full((3,), 2.0))
    assert functions.moved(values, 0 * values).isposinf().all()
    assert_close(functions.moved(0 * values, 0 * values), torch.zeros(3))


def test_hybrid_heads_keep_their_numbers():
    operator, params = drawn("softmax+2*G1B:rank=3", heads=3)
    (group,) = functions.learned_groups(operator, params)
    assert group.first == 1
    assert functions.curves(group.operator, group.params, X).shape == (2, 3, 5, 9)
    fig = functions.plot(operator, params, scores=torch.randn(1, 3, 5, 5))
    assert [ax.get_title() for ax in fig.axes] == ["head 2", "head 3"]


def test_where_to_look():
    assert functions.score_range(None, drawn("G3B")[0])[-1] == pytest.approx(torch.pi)
    assert functions.score_range(None, drawn("dog-B")[0])[-1] == 4
    scores = torch.linspace(-10, 10, 2001)
    assert functions.score_range(scores, drawn("G3B")[0])[-1] == pytest.approx(9.9, abs=0.1)
    assert functions.score_range(scores / 100, drawn("G3B")[0])[0] == -1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: functions.curves(*drawn("softmax"), X), "learnable units, got 'softmax'"),
        (lambda: functions.curves(drawn("G3B")[0], {"mix": X}, X), "parameters of one operator"),
        (lambda: functions.curves(*drawn("G3B"), X[None]), "one axis"),
        (lambda: functions.curves(*drawn("G3B"), torch.arange(3)), "floating-point"),
        (lambda: functions.plot(*drawn("relu")), "learnable units, got 'relu'"),
        (
            lambda: functions.strongest(torch.ones(1, 2, 3, 9), None, 7),
            "1 <= `count` <= 6 units a head, got 7",
        ),
    ],
)
def test_what_functions_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# attention


def test_class_maps_by_hand():
    weights = torch.zeros(2, 1, 5, 5)
    weights[0, 0, 0] = torch.tensor([9.0, 1.0, -2.0, 3.0, 0.0])
    assert attention.class_maps(weights).tolist() == [[[[1, 0], [3, 0]]], [[[0, 0], [0, 0]]]]


def test_dominant_head_and_region():
    maps = torch.tensor([[[5.0, 3.0], [1.0, 1.0]], [[20.0, 0.0], [0.0, 0.0]]])
    assert attention.dominant_head(maps) == 1
    assert attention.region(maps).tolist() == [[[True, False], [False, False]]] * 2
    assert attention.region(maps, 0.51)[0].tolist() == [[True, True], [False, False]]
    assert attention.region(maps, 1.0)[0].all() and attention.region(maps, 1.0)[1].sum() == 1
    assert not attention.region(torch.zeros(2, 2)).any()


def test_static_share_at_its_ends():
    one = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert_close(attention.static_share(one.expand(4, 3, 5, 5)), torch.ones(3).double())
    apart = torch.eye(25).reshape(25, 1, 5, 5)  # orthogonal
    assert_close(attention.static_share(apart), torch.tensor([1 / 25]).double())


def test_weights_of_the_control_do_not_depend_on_the_image():
    operator, params = drawn("polynomial-0B", tokens=5)
    weights = operator.weights(params, torch.randn(6, 2, 5, 5))
    assert_close(attention.static_share(weights), torch.ones(2).double())


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_plot(channels):
    images = torch.rand(2, channels, 8, 8)
    fig = attention.plot(images, torch.rand(2, 3, 4, 4))
    assert len(fig.axes) == 2 * 5 and fig.axes[1].get_title() == "head 1"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention.class_maps(torch.ones(1, 4, 4)), "N - 1 a square"),
        (lambda: attention.class_maps(torch.ones(1, 1, 1)), "N - 1 a square"),
        (lambda: attention.class_maps(torch.ones(1, 4, 5)), "weights"),
        (lambda: attention.region(torch.ones(2, 2), 0.0), "0 < `share` <= 1"),
        (lambda: attention.static_share(torch.ones(2, 5, 5)), "B, H, N, M"),
        (lambda: attention.plot(torch.ones(1, 2, 8, 8), torch.ones(1, 1, 2, 2)), "1 or 3"),
    ],
)
def test_what_attention_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# training


def test_history_is_members_by_epochs():
    records = [[{"a": 1.0}, {"a": 2.0}], [{"a": 3.0}, {"a": 4.0}], [{"a": 5.0}, {"a": 6.0}]]
    assert training.history(records, "a").tolist() == [[1, 3, 5], [2, 4, 6]]
    with pytest.raises(ValueError, match="records with 'b'"):
        training.history(records, "b")


def test_a_trend_by_hand():
    # thirds of 2 epochs: 0.5 and 0.5 + 0.04, without jitter, over two members
    found = training.trend(torch.tensor([[0.1, 0.2, 0.5, 0.5, 0.56, 0.56]] * 2) - 0.0)
    assert found.rise == pytest.approx(0.06) and found.epochs == 6 and not found.at_rest
    line = training.trend(torch.linspace(0, 0.9, 9)[None])
    assert line.error == pytest.approx(0, abs=1e-6) and not line.at_rest
    assert training.trend(torch.full((1, 9), 0.7)).at_rest
    assert not training.trend(torch.full((1, 5), 0.7)).at_rest  # too few epochs to tell


def test_jitter_alone_counts_as_rest():
    generator = torch.Generator().manual_seed(0)
    flat = 0.5 + 0.05 * torch.randn(500, 1, 30, generator=generator)
    found = [training.trend(curve) for curve in flat]
    assert sum(one.at_rest for one in found) / 500 > 0.9
    error = torch.tensor([one.error for one in found]).mean()
    assert error == pytest.approx(float(torch.tensor([one.rise for one in found]).std()), rel=0.15)
    rising = flat + torch.linspace(0, 0.6, 30)
    assert sum(training.trend(curve).at_rest for curve in rising) / 500 < 0.05


def test_who_has_not_converged_is_named():
    def result(name, values):
        return section.Result(name, [TINY], [[{"val_top1": value}] for value in values], [{}])

    rising, flat = [i / 12 for i in range(12)], [0.9] * 12
    lines = training.warnings([result("softmax", rising), result("G3B", flat)])
    assert len(lines) == 1 and "softmax has not converged" in lines[0]
    assert "rose by 33.3 points" in lines[0] and "how fast each learns" in lines[0]
    assert training.warnings([result("softmax", flat), result("G3B", flat)]) == []
    lines = training.warnings([result("softmax", flat), result("G3B", rising)])
    assert "how fast" not in lines[0] and "G3B" in lines[0]
    (line,) = training.warnings([result("a", flat[:3]), result("b", flat[:3])])
    assert "Too few epochs (3) to show whether a, b converged" in line


def test_curves_cut_nothing_off():
    low = torch.linspace(0.05, 0.3, 12)[None]
    high = torch.linspace(0.2, 0.99, 12)[None]
    series = {"softmax": low, "G3B": high}
    (whole,) = training.plot(series, "top-1, %", 100.0).axes
    assert whole.get_ylim()[0] <= 5 and 99 <= whole.get_ylim()[1] <= 100
    (part,) = training.plot(series, "top-1, %", 100.0, start=6).axes
    assert part.get_ylim()[0] <= 100 * float(low[0, 6]) and part.get_xlim()[0] > 6
    assert [line.get_linestyle() for line in whole.lines] == ["-", "--"]


# plots and the page


def test_plotting_touches_no_global_state():
    program = """
import sys, torch
import kart.analysis.report
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()  # indexing would load pyplot
from kart import pages
from kart.analysis import attention, training
pages.svg(training.plot({"a": torch.rand(2, 4)}, "loss", log=True), "one")
pages.svg(attention.plot(torch.rand(1, 1, 4, 4), torch.rand(1, 2, 2, 2)), "two")
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_svg_is_the_same_text_every_time():
    def draw():
        return pages.svg(training.plot({"a": torch.arange(8.0).reshape(2, 4)}, "top-1"), "x")

    text = draw()
    assert text == draw() and text.startswith("<svg") and "http" not in text
    assert "top-1" in text and "currentColor" in text and "DejaVu" not in text
    assert all(name.startswith("x-") for name in re.findall(r'\bid="([^"]*)"', text))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]*)', text))
    assert used and used <= set(re.findall(r'\bid="([^"]*)"', text))


class Page(HTMLParser):
    """Tags, references, ids and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.labels, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "aria-label":
                self.labels.append(value)

    def handle_data(self, data):
        self.words.append(data)


TINY = Config(
    epochs=2,
    train_limit=64,
    batch_size=32,
    embed_dim=8,
    depth=2,
    num_heads=2,
    patch_size=4,
    threads=1,
)


QUICK = ("scores", "training", "functions", "attention")


def trained(operator, seeds=(0, 1), test=True):
    configs = population.seeds(dataclasses.replace(TINY, operator=operator), seeds)
    splits = train.load_data(TINY)
    records, params = [], {}
    for state, record in train.loop(population.run(configs, splits)):
        records.append(population.split_record(record, len(configs)))
        params = state.params
    scores = [{"top1": 0.5 + 0.01 * i, "top5": 1.0, "loss": 0.1} for i in range(len(configs))]
    weights = tree.unstack(params) if len(configs) > 1 else [params]
    return report.Result(operator, configs, records, weights, scores if test else None, 1.25)


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    return [trained(operator) for operator in ("softmax", "G2B", "softmax+G1U")]


def analysed(results, folder, **options):
    """What `analyse` returned, and the text of its page."""
    asked = {"title": "t", "command": "c", "sections": report.select(QUICK)}
    asked |= {name: options.pop(name) for name in options.keys() & {*asked, "minutes"}}
    context = section.Context(results, train.load_data(TINY), **options)
    done = report.analyse(context, out=folder / "report.html", **asked)
    return done, (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["page.json", "page.csv"])
def test_a_page_does_not_take_the_place_of_its_numbers(name, results, tmp_path):
    with pytest.raises(ValueError, match="needs a file that ends in .html"):
        context = section.Context(results, train.load_data(TINY))
        report.analyse(context, (), out=tmp_path / name, title="t", command="c")


def words_of(text):
    return " ".join(Page(text).words)


def test_the_report_stands_alone(results, tmp_path):
    done, text = analysed(results, tmp_path, title="A <title>", command="make this & that")
    assert [one.problem for one in done] == [""] * 4
    page = Page(text)
    assert "http" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == len(page.labels) and all(page.labels)
    # shapes of functions are shown where the few scores here are not all at one point
    labels = [label for label in page.labels if not label.startswith("Groups of alike")]
    # training; curves and harmonics of functions; maps, scored maps and areas
    assert len(labels) == 2 + (2 * 2 + 1 + 1) + (3 + 3 + 1)
    words = " ".join(page.words)
    for one in results:
        assert one.name in words and f"{tree.size(one.params[0]):,}" in words
    for expected in ("A <title>", "make this & that", "50.50 ± 0.71", "50.00, 51.00", "1.2"):
        assert expected in words
    assert "0.00 points above softmax with each of 2 seeds" in words and "test top-1 %" in words
    assert "Too few epochs (2) to show whether softmax, G2B, softmax+G1U converged" in words
    names = ["report.csv", "report.html", "report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert text == analysed(results, tmp_path, title="A <title>", command="make this & that")[1]


def test_the_numbers_stand_beside_the_page(results, tmp_path):
    analysed(results, tmp_path, sections=report.select(["training", "scores"]))
    stored = json.loads((tmp_path / "report.json").read_text())
    assert list(stored["sections"]) == ["scores", "training"]
    assert stored["members"][1] == {"operator": "G2B", "seeds": [0, 1]}
    numbers = stored["sections"]["scores"]["numbers"]
    own = [one for one in numbers if one["operator"] == "G2B" and one["measure"] == "test_top1"]
    assert [one["value"] for one in own] == pytest.approx([0.5, 0.51, 0.505])
    assert [one["seed"] for one in own] == [0, 1, None] and own[-1]["n"] == 2
    assert 0 < own[-1]["low"] < 0.505 < own[-1]["high"] < 1
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(one["numbers"]) for one in stored["sections"].values())
    (row,) = (r for r in rows if r["measure"] == "parameters" and r["operator"] == "G2B")
    assert row["section"] == "scores" and int(row["value"]) == tree.size(results[1].params[0])


def test_a_report_without_test_scores_says_validation(results, tmp_path):
    bare = [one._replace(test=None, step_ms=None) for one in results[:2]]
    words = words_of(analysed(bare, tmp_path, sections=report.select(["scores"]))[1])
    assert "validation top-1 %" in words and "test top-1" not in words and "step ms" not in words
    assert f"the choice of the {len(train.load_data(TINY).val.labels)} images" in words
    top1 = bare[0].records[-1][0]["val_top1"]
    assert f"{100 * top1:.2f}" in words


def test_a_report_that_fails_leaves_the_old_one(results, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = [results[0]._replace(records=[[{}]])]
    with pytest.raises(KeyError):
        analysed(broken, tmp_path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="at least one result"):
        analysed([], tmp_path)


def test_one_seed_resized_images_and_other_kinds_are_reported(tmp_path):
    splits = train.load_data(TINY)
    one = trained("G2B:order=full_rank", seeds=(3,), test=False)
    words = words_of(analysed([one], tmp_path)[1])
    assert "seed 3" in words and "full rank of fourier units (grid 2)" in words
    assert "one seed" in words
    config = dataclasses.replace(TINY, image_size=16, operator="morlet-B", depth=5, eval_crop=0.9)
    model = train.build(config, splits.train)
    params = model.init(torch.Generator().manual_seed(0))
    big = one._replace(name="morlet-B", configs=[config], params=[params])
    words = words_of(analysed([big], tmp_path)[1])
    assert "block 1," not in words and "morlet-B, block 5" in words and "block 2" not in words


# sections


def counted(results, tmp_path, analysis, **options):
    done, text = analysed(
        results, tmp_path, sections=[analysis], cache=tmp_path / "kept", **options
    )
    return done[0], words_of(text)


def test_a_section_is_computed_once_for_the_same_weights_and_version(results, tmp_path):
    calls = []

    def made(context):
        calls.append([member.seed for member in context.members()])
        number = pages.Number("softmax", "x", float("nan"))
        return pages.Section([pages.text("A < B")], [number])

    one = section.Analysis("one", "One", made)
    first = counted(results[:1], tmp_path, one)
    assert counted(results[:1], tmp_path, one) == first and calls == [[0, 1]]
    assert "A < B" in first[1] and "One" in first[1]
    counted(results[:1], tmp_path, one._replace(version=2))
    assert len(calls) == 2
    params = [tree.map(lambda x: x + 1e-3, p) for p in results[0].params]
    counted([results[0]._replace(params=params)], tmp_path, one)
    counted([results[0]._replace(test=None)], tmp_path, one)
    assert len(calls) == 4
    analysed(results[:1], tmp_path, sections=[one])  # without a cache
    assert len(calls) == 5


def test_what_a_killed_section_kept_is_not_computed_again(results, tmp_path):
    calls = []

    def made(context):
        total = 0.0
        for member in context.members():
            if len(calls) == 1:
                raise KeyboardInterrupt

            def compute(seed=member.seed):
                calls.append(seed)
                return {"x": torch.tensor(seed + 1.0).double()}

            total += float(context.kept("x=1", member, compute)["x"])
        return pages.Section([pages.text(f"total {total}")])

    one = section.Analysis("one", "One", made, minutes=1.0)
    with pytest.raises(KeyboardInterrupt):
        counted(results[:1], tmp_path, one)
    calls.append("killed")
    assert "total 3.0" in counted(results[:1], tmp_path, one)[1]
    assert calls == [0, "killed", 1]
    homes = [tmp_path / "a", tmp_path / "b"]
    counted([results[0]._replace(homes=homes)], tmp_path, one._replace(version=2))
    assert [len(list((home / "analysis").iterdir())) for home in homes] == [1, 1]


def test_a_section_that_cannot_be_is_one_line_among_the_others(results, tmp_path):
    def refused(context):
        raise ValueError("`one` needs a mask,\n got none.")

    def late(context):
        context.check()
        raise AssertionError("it has time")

    sections = [
        section.Analysis("one", "One", refused),
        section.Analysis("two", "Two", late, minutes=1.0),
        section.Analysis("three", "Three", late, needs=section.trajectories),
        *report.select(["training"]),
    ]
    done, text = analysed(results[:1], tmp_path, sections=sections, minutes=0.0)
    assert [bool(one.problem) for one in done] == [True] * 3 + [False]
    words = words_of(text)
    assert "Not shown: `one` needs a mask, got none." in words
    assert "Not shown: its minutes are used up" in words
    assert "Not shown: it needs three snapshots" in words and "--trajectory 60" in words
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["sections"]["one"] == {"problem": "`one` needs a mask, got none.", "numbers": []}


def test_slow_sections_share_the_minutes(results, tmp_path):
    seen = {}

    def made(context):
        seen[context.name] = context.left()
        return pages.Section([])

    parts = [section.Analysis(name, name, made, minutes=m) for name, m in (("a", 1), ("b", 3))]
    parts.append(section.Analysis("quick", "quick", made))
    analysed(results[:1], tmp_path, sections=parts, minutes=2.0)
    assert seen["a"] == pytest.approx(30, abs=1) and seen["b"] == pytest.approx(120, abs=2)
    assert seen["quick"] == float("inf")
    analysed(results[:1], tmp_path, sections=parts)
    assert seen["b"] == pytest.approx(180, abs=1)


def test_sections_are_chosen_by_name():
    assert [one.name for one in report.select(["attention", "scores"])] == ["scores", "attention"]
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        report.select(["atention"])


def test_a_context_gives_the_same_images_and_draws_to_all(results):
    context = section.Context(results, train.load_data(TINY), name="x")
    images, labels = context.images(TINY, 5)
    again, _ = context.images(TINY, 7)
    assert len(labels) == 5 and torch.equal(images, again[:5])
    assert torch.equal(torch.rand(3, generator=context.generator("a")),
                       torch.rand(3, generator=context.generator("a")))  # fmt: skip
    members = list(context.members())
    assert [(m.name, m.seed) for m in members[:3]] == [("softmax", 0), ("softmax", 1), ("G2B", 0)]
    assert len({member.key for member in members}) == 6
    with pytest.raises(ValueError, match="--trajectory"):
        members[0].snapshots()
    found, numbers = section.over_seeds("G2B", "x", {0: 1.0, 1: 3.0}, "ms")
    assert found.mean == 2 and [one.seed for one in numbers] == [0, 1, None]
    assert numbers[-1].low == found.low and numbers[0].unit == "ms"
