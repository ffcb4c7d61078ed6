"""Distributions of known tails and moments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import models, operators, pages
from kart.analysis import weights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [1.0, 2.5, 4.0])
def test_hill_of_a_pareto_sample_is_its_alpha(alpha):
    u = torch.rand(3, 40000, generator=seeded()).double()
    signs = torch.where(torch.rand(u.shape, generator=seeded(1)) < 0.5, -1.0, 1.0)
    found = weights.hill(signs * u ** (-1 / alpha))
    # its relative standard error is 1 / sqrt(4000)
    assert_close(found, torch.full((3,), alpha).double(), rtol=4 / 4000**0.5, atol=0)


def test_hill_by_hand():
    # the largest two of ten, over the third: log 4 and log 2
    values = torch.tensor([1.0, -8.0, 4.0, 2.0, 1, 1, 1, 1, 1, 0.0])
    assert float(weights.hill(values, 0.2)) == pytest.approx(2 / math.log(8))
    assert weights.hill(torch.ones(10), 0.2) == math.inf


def test_tails_are_ordered_and_light_ones_seen_as_such():
    normal = torch.randn(20000, generator=seeded()).double()
    student = normal / (torch.randn(3, 20000, generator=seeded(1)).double() ** 2).mean(0).sqrt()
    assert weights.hill(student) < weights.hill(normal)
    assert weights.kurtosis(student) > 1 > abs(weights.kurtosis(normal))


def test_kurtosis_of_known_distributions():
    u = torch.rand(200000, generator=seeded()).double()
    laplace = -torch.log(u) * torch.where(torch.rand(u.shape, generator=seeded(1)) < 0.5, -1, 1)
    normal = torch.randn(200000, generator=seeded(2)).double()
    found = weights.kurtosis(torch.stack([u, normal, laplace]))
    assert_close(found, torch.tensor([-1.2, 0.0, 3.0]).double(), rtol=0, atol=0.2)
    # by hand: (0, 0, 0, 4) has mean 1, variance 3, fourth moment 21
    assert float(weights.kurtosis(torch.tensor([0.0, 0, 0, 4]))) == pytest.approx(21 / 9 - 3)
    assert weights.kurtosis(torch.full((5,), 0.1)) == 0


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(-3, 3))
def test_measures_have_no_unit_and_no_order(seed, factor, shift):
    values = torch.randn(2, 60, generator=seeded(seed)).double()
    shuffled = values[:, torch.randperm(60, generator=seeded(seed))]
    for measure in (weights.hill, weights.kurtosis, weights.near_zero):
        found = measure(values)
        assert found.shape == (2,)
        assert_close(measure(-factor * shuffled), found)
    assert_close(weights.kurtosis(values + shift), weights.kurtosis(values), rtol=1e-6, atol=1e-9)


def test_moments_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = torch.randn(4, 50, generator=seeded()).double() ** 3
    assert_close(weights.kurtosis(values), torch.from_numpy(stats.kurtosis(values.numpy(), axis=1)))


def test_near_zero():
    normal = torch.randn(100000, generator=seeded())
    expected = math.erf(0.1 / math.sqrt(2))
    assert float(weights.near_zero(normal)) == pytest.approx(expected, abs=0.003)
    assert weights.near_zero(torch.zeros(4)) == 1 and weights.near_zero(torch.ones(4)) == 0


@pytest.mark.parametrize("spec", ["G3B:rank=2", "G3U:rank=2", "softmax", "softmax+G3B:rank=2"])
def test_parts_of_a_model(spec):
    model = models.create(
        "vit_nano", spec, embed_dim=8, depth=2, num_heads=2, image_size=8, patch_size=4
    )
    params = model.init(seeded())
    parts = weights.by_part(params)
    if spec == "softmax":
        assert list(parts) == ["all"]
        return
    heads = {"G3B:rank=2": 4, "G3U:rank=2": 2, "softmax+G3B:rank=2": 2}[spec]
    assert parts["coefs"].shape == (heads, 2 * 5 * 6) and parts["mix"].shape == (heads, 10)
    found = weights.summary(parts["coefs"])
    assert all(x.shape == (heads,) for x in found)
    assert_close(found.rms, parts["coefs"].double().square().mean(-1).sqrt())


def test_parts_of_blocks_that_differ():
    params = {
        str(i): {"operator": operators.parse(spec).operator.init(seeded(), 2, 5)}
        for i, spec in enumerate(["G1B:rank=2", "G3B:rank=2"])
    }
    shapes = {name: tuple(v.shape) for name, v in weights.by_part(params).items()}
    assert shapes == {
        "all": (1, 2 * (20 + 60 + 20)),
        "coefs (20)": (2, 20),
        "coefs (60)": (2, 60),
        "mix": (4, 10),
    }


@pytest.mark.parametrize("spec", ["tempered", "gated"])
def test_parts_of_operators_of_one_number_a_head(spec):
    operator = operators.parse(spec).operator.init(seeded(), 2, 5)
    parts = weights.by_part({"operator": operator, "alone": {"operator": torch.ones(())}})
    assert all(
        len(rows) == (1 if name in ("all", "operator") else 2) for name, rows in parts.items()
    )


def test_a_mix_of_zeros_has_no_tail():
    values = torch.zeros(2, 40)
    values[0] = torch.randn(40, generator=seeded())
    found = weights.summary(values)
    assert found.hill[1] == math.inf and found.hill[0] == weights.hill(values[0])
    assert found.near_zero[1] == 1 and found.kurtosis[1] == 0


def test_histograms_share_bins():
    drawn = seeded()
    stages = {
        title: {name: scale * torch.randn(5, 100, generator=drawn) for name in ("softmax", "G3B")}
        for title, scale in (("start", 0.1), ("half way", 1.0), ("end", 3.0))
    }
    fig = weights.plot(stages)
    assert [ax.get_title() for ax in fig.axes] == list(stages)
    assert len({ax.get_xlim() for ax in fig.axes}) == len({ax.get_ylim() for ax in fig.axes}) == 1
    for ax in fig.axes:
        for patch in ax.patches:
            heights, edges, _ = patch.get_data()
            assert float((heights * (edges[1:] - edges[:-1])).sum()) == pytest.approx(1)
    assert "<svg" in pages.svg(fig, "x")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: weights.hill(torch.ones(())), r"\(\.\.\., n\)"),
        (lambda: weights.hill(torch.ones(100), 0.0), "0 < `share` < 1"),
        (lambda: weights.hill(torch.ones(100), torch.nan), "0 < `share` < 1"),
        (lambda: weights.hill(torch.ones(5), 0.1), "one value in it"),
        (lambda: weights.hill(torch.zeros(50)), "got zeros among them"),
        (lambda: weights.kurtosis(torch.tensor([1.0, torch.nan])), "1 nan or inf"),
        (lambda: weights.kurtosis(torch.ones(5).long()), "int64"),
        (lambda: weights.near_zero(torch.ones(5), 2.0), "`fraction` < 1"),
        (lambda: weights.plot({}), "got none"),
    ],
)
def test_what_weights_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
