"""Intervals against scipy, by hand, and by how often they cover."""

import math
import random
import subprocess
import sys
from functools import partial
from statistics import stdev

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kart import statistics
from kart.statistics import Interval

fractions = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_intervals_are_students():
    found = statistics.interval([1.0, 2.0, 4.0])
    half = 4.302653 * stdev([1.0, 2.0, 4.0]) / 3**0.5
    assert found[:3] == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert found.n == 3 and found.why == ""
    low, high = stats.t.interval(0.9, 2, 7 / 3, stdev([1.0, 2.0, 4.0]) / 3**0.5)
    assert statistics.interval([1.0, 2.0, 4.0], level=0.9)[1:3] == pytest.approx((low, high))
    assert statistics.interval([1.0, 2.0, 4.0], low=0.0, high=5.0)[1:3] == (0.0, 5.0)


@pytest.mark.parametrize("call", [statistics.interval, statistics.accuracy])
def test_one_seed_and_equal_seeds_have_no_interval_but_words(call):
    assert call([0.9]).text() == "90.00 (one seed)"
    assert call([0.9, 0.9]).text() == "90.00 (2 equal seeds)"
    assert call([0.1 + 0.2, 0.3, 0.3]).why == "3 equal seeds"  # but for a rounding
    with pytest.raises(ValueError, match="one finite value a seed"):
        call([])
    with pytest.raises(ValueError, match=r"finite|fractions"):
        call([0.5, math.nan])


def test_an_accuracy_by_hand():
    # logits of 0.8 and 0.9 are not averaged: the mean 0.85 is, with 0.05 / (0.85 * 0.15) on a logit
    found = statistics.accuracy([0.8, 0.9])
    half = 12.706205 * 0.05 / (0.85 * 0.15)
    centre = math.log(0.85 / 0.15)
    expected = [1 / (1 + math.exp(-(centre + side * half))) for side in (-1, 1)]
    assert found[1:3] == pytest.approx(expected, rel=1e-6) and found.mean == pytest.approx(0.85)
    # equal seeds: the images alone, 36.5 of 41 right, whose standard error of a logit is 0.5048
    found = statistics.accuracy([0.9, 0.9], images=40)
    p = 36.5 / 41
    half = 1.959964 / math.sqrt(40 * p * (1 - p))
    expected = [1 / (1 + math.exp(-(math.log(p / (1 - p)) + side * half))) for side in (-1, 1)]
    assert found[1:3] == pytest.approx(expected, rel=1e-6) and not found.why


@given(fractions, st.none() | st.integers(1, 10_000))
def test_an_accuracy_never_leaves_its_range_and_holds_its_mean(values, images):
    found = statistics.accuracy(values, images)
    assert 0 <= found.low <= found.mean + 1e-12 and found.mean - 1e-12 <= found.high <= 1
    assert found.why or found.low < found.high
    other = statistics.accuracy([1 - value for value in values], images)
    assert 1 - other.high == pytest.approx(found.low, abs=1e-6)


@pytest.mark.parametrize(("seeds", "images"), [(2, 100), (3, 360), (5, 1000)])
def test_an_accuracy_covers_the_accuracy_on_other_seeds_and_images(seeds, images):
    """Each image has a difficulty of its own that all seeds share, each seed a skill."""
    rng = np.random.default_rng(0)

    def right(skill, hard):
        return rng.random(np.broadcast_shapes(skill.shape, hard.shape)) < 1 / (
            1 + np.exp(-(1.5 + skill + hard))
        )

    truth = right(rng.normal(0, 0.3, 10**6), rng.normal(0, 2, 10**6)).mean()
    hits = []
    for _ in range(1000):
        skill, hard = rng.normal(0, 0.3, (seeds, 1)), rng.normal(0, 2, images)
        found = statistics.accuracy(right(skill, hard).mean(1).tolist(), images)
        hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) > 0.94


@pytest.mark.parametrize(("seeds", "least", "most"), [(2, 0.88, 0.91), (3, 0.92, 0.94)])
def test_an_accuracy_of_few_seeds_covers_what_it_says(seeds, least, most):
    """All images alike, so that seeds are right on others each time, and spread of their own."""
    rng, image = np.random.default_rng(0), math.sqrt(0.5 * 0.5 / 10_000)
    covered = []
    for times in (2, 4, 8):
        hits = []
        for _ in range(1000):
            shared = 0.5 + rng.normal(0, image)
            found = statistics.accuracy(shared + rng.normal(0, times * image, seeds), 10_000)
            hits.append(found.low <= 0.5 <= found.high)
        covered.append(np.mean(hits))
    assert min(covered) == pytest.approx(least, abs=0.02)
    assert max(covered) == pytest.approx(most, abs=0.02)
    assert f"{round(100 * least)} to {round(100 * most)} %" in statistics.FEW


def test_a_difference_by_hand():
    # differences 1, 2, 3 hundredths: mean 2, deviation 1, t(2) = 4.303
    found = statistics.difference([0.02, 0.04, 0.06], [0.01, 0.02, 0.03])
    assert found.mean == pytest.approx(0.02)
    assert found.high - 0.02 == pytest.approx(0.0430265 / 3**0.5, rel=1e-5)
    assert statistics.difference([0.9, 0.1], [0.1, 0.2])[1:3] == (-1.0, 1.0)
    with pytest.raises(ValueError, match="one a seed"):
        statistics.difference([1.0], [1.0, 2.0])
    assert statistics.pairs({2: 0.5, 0: 0.75}, {0: 0.25, 1: 1.0}) == [0.5]


def test_a_verdict_says_whether_seeds_explain_it():
    base = [0.90, 0.91, 0.92]
    assert "more than 3 seeds explain" in statistics.verdict("A", [0.95, 0.97, 0.97], "B", base)
    text = statistics.verdict("A", [0.90, 0.95, 0.89], "B", base)
    assert "not clear of the noise of 3 seeds" in text and "0.33 points above B" in text
    assert "2.00 points below B with one seed" in statistics.verdict("A", [0.9], "B", [0.92])
    text = statistics.verdict("A", [0.95, 0.96, 0.97], "B", base)
    assert "5.00 points above B with each of 3 seeds" in text and "[" not in text


def test_fiellers_interval_covers_and_opens():
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        whole = [rng.gauss(1.0, 0.3) for _ in range(5)]
        part = [0.4 * b + rng.gauss(0.0, 0.1) for b in whole]
        found = statistics.ratio(part, whole)
        assert found.low <= found.mean <= found.high
        hits += found.low <= 0.4 <= found.high
    assert abs(hits / 400 - 0.95) < 0.03
    found = statistics.ratio([1.0, 2.0], [-1.0, 1.1])
    assert found[1:3] == (-math.inf, math.inf) and "not surely different from 0" in found.why
    assert statistics.ratio([0.5, 0.5], [1.0, 1.0]) == Interval(
        0.5, -math.inf, math.inf, 2, "2 equal seeds"
    )
    with pytest.raises(ValueError, match="pairs"):
        statistics.ratio([1.0], [1.0])


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_is_a_probability(level):
    # which used to give bounds that are infinite or nan
    values = [0.5, 0.6, 0.7]
    for call in (statistics.interval, statistics.accuracy, partial(statistics.ratio, values)):
        with pytest.raises(ValueError, match=r"needs 0 < `level` < 1, got .* Pass 0.95"):
            call(values, level=level)


def test_what_no_interval_can_be_of_is_refused():
    with pytest.raises(ValueError, match=r"`difference` needs fractions in \[0, 1\], got 90"):
        statistics.difference([95.0, 93.0], [90.0, 91.0])  # cut to [-1, 1], below its mean of 3.5
    with pytest.raises(ValueError, match=r"`accuracy` needs `images` >= 1, got 0"):
        statistics.accuracy([0.5, 0.6], images=0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="`ratio` needs one finite value a seed"):
            statistics.ratio([1.0, 2.0], [1.0, bad])


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_values_may_be_an_array(kind):
    # which used to be an ambiguous truth value
    values, others = [0.5, 0.625, 0.75], [0.25, 0.5, 0.5]
    one, other = kind(values), kind(others)
    assert statistics.interval(one) == statistics.interval(values)
    assert statistics.accuracy(one, 8) == statistics.accuracy(values, 8)
    assert statistics.difference(one, other) == statistics.difference(values, others)
    assert statistics.ratio(one, other) == statistics.ratio(values, others)


def test_what_is_not_a_number_is_named_as_such():
    for bad in (math.nan, math.inf, "100"):  # of which inf used to give bounds of nan
        with pytest.raises(ValueError, match=f"`accuracy` needs `images` >= 1, got {bad!r}"):
            statistics.accuracy([0.5, 0.6], images=bad)
    with pytest.raises(ValueError, match="`difference` needs one finite value a seed"):
        statistics.difference([0.5, math.nan], [0.1, 0.2])


def test_texts():
    assert Interval(0.5, 0.25, 0.75, 3).text() == "50.00 [25.00, 75.00]"
    assert Interval(0.5, -0.25, 0.75, 3).text(1.0, 1, "+") == "+0.5 [-0.2, +0.8]"


def test_the_absence_of_scipy_is_explained():
    code = """
import sys
sys.modules["scipy"] = None
from kart import statistics
assert statistics.interval([1.0]).why == "one seed"
try:
    statistics.interval([1.0, 2.0])
except ValueError as error:
    assert "kart-attention[plots]" in str(error)
else:
    raise SystemExit("an interval without scipy")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
