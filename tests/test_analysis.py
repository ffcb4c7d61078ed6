"""Measurements against operators and hand-made cases; plots without global state; the report."""

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch.testing import assert_close

from kart import bases, operators, population, train, tree
from kart.analysis import attention, figures, functions, report, training
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
    assert_close(functions.key_means(values), (X.cos() / 2 + X.sin()).reshape(1, 1, 9))
    assert functions.strongest(values, params, 1).tolist() == [[1]]


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
    assert functions.unit_quantiles(values).shape == (3, 2, 9)
    fig = functions.plot(operator, params, initial=params, scores=torch.randn(3, 2, 5, 5))
    assert [ax.get_title() for ax in fig.axes] == ["head 1", "head 2"]


@pytest.mark.parametrize("spec", ["G3B:rank=4", "morlet-B:rank=4", "G2B:rank=3,scales=true"])
def test_key_means_are_the_hidden_values_of_rows_of_one_score(spec):
    operator, params = drawn(spec)
    for x in (-1.3, 0.0, 0.7):
        values = functions.curves(operator, params, torch.tensor([x]))
        hidden = 5 * functions.key_means(values)  # (H, r, 1)
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


def test_how_far_units_moved():
    values = torch.randn(3, 4, 5, 9, generator=torch.Generator().manual_seed(0))
    assert_close(functions.moved(values, values), torch.zeros(3))
    assert_close(functions.moved(3 * values, values), torch.full((3,), 2.0))


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
            lambda: functions.strongest(torch.ones(1, 2, 3, 9), {}, 7),
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


# plots and the page


def test_plotting_touches_no_global_state():
    program = """
import sys, torch
import kart.analysis.report
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()  # indexing would load pyplot
from kart.analysis import attention, figures, training
figures.svg(training.plot({"a": torch.rand(2, 4)}, "loss", log=True), "one")
figures.svg(attention.plot(torch.rand(1, 1, 4, 4), torch.rand(1, 2, 2, 2)), "two")
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_svg_is_the_same_text_every_time():
    def draw():
        return figures.svg(training.plot({"a": torch.arange(8.0).reshape(2, 4)}, "top-1"), "x")

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
    rank=3,
    threads=1,
)


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


def test_the_report_stands_alone(results, tmp_path):
    splits = train.load_data(TINY)
    path = tmp_path / "report.html"
    report.write(path, results, splits, title="A <title>", command="make this & that")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == len(page.labels) == 2 + 2 * 2 + 1 + 3 and all(page.labels)
    words = " ".join(page.words)
    for one in results:
        assert one.name in words and f"{tree.size(one.params[0]):,}" in words
    for expected in ("A <title>", "make this & that", "50.50 ± 0.71", "50.00, 51.00", "1.2"):
        assert expected in words
    assert "0.00 points above softmax" in words and "test top-1 %" in words
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert text == report.page(results, splits, title="A <title>", command="make this & that")


def test_a_report_without_test_scores_says_validation(results):
    splits = train.load_data(TINY)
    bare = [one._replace(test=None, step_ms=None) for one in results[:2]]
    words = " ".join(Page(report.page(bare, splits, title="t", command="c")).words)
    assert "validation top-1 %" in words and "test top-1" not in words and "step ms" not in words
    top1 = bare[0].records[-1][0]["val_top1"]
    assert f"{100 * top1:.2f}" in words


def test_a_report_that_fails_leaves_the_old_one(results, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = [results[0]._replace(params=[{}])]
    with pytest.raises((KeyError, ValueError)):
        report.write(path, broken, train.load_data(TINY), title="t", command="c")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="at least one result"):
        report.page([], train.load_data(TINY), title="t", command="c")


def test_one_seed_resized_images_and_other_kinds_are_reported():
    splits = train.load_data(TINY)
    one = trained("G2B:order=full_rank", seeds=(3,), test=False)
    words = " ".join(Page(report.page([one], splits, title="t", command="c")).words)
    assert "seed 3" in words and "full rank of fourier units (grid 2)" in words
    config = dataclasses.replace(TINY, image_size=16, operator="morlet-B", depth=5)
    model = train.build(config, splits.train)
    params = model.init(torch.Generator().manual_seed(0))
    big = one._replace(name="morlet-B", configs=[config], params=[params])
    words = " ".join(Page(report.page([big], splits, title="t", command="c")).words)
    assert "block 1," not in words and "morlet-B, block 5" in words and "block 2" not in words
