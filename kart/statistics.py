"""Means over seeds with intervals that say no more than is known.

Three rules hold everywhere. Where nothing varies (one seed, or seeds that are all equal and no
images counted) there is no interval, but the reason for it in words. An interval never leaves the
range of what it is about. What it covers, seeds or seeds and images, the function that makes it
says.
"""

import math
import numbers
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# of an `accuracy` with images, simulated
FEW = (
    "where seeds spread two to eight times as far as the images explain, such an interval of two "
    "seeds covers 88 to 91 %, of three 92 to 94 %, of five or more 94 %"
)


class Interval(NamedTuple):
    """A mean over `n` values and its interval; where none, `why`, and the bounds of the range."""

    mean: float
    low: float
    high: float
    n: int
    why: str = ""

    def text(self, scale: float = 100.0, digits: int = 2, sign: str = "") -> str:
        """`97.12 [96.80, 97.44]`, in per cent by default, or `97.12 (one seed)`; `sign` "+" shows
        the sign of positive numbers too.
        """
        mean, low, high = (f"{scale * x:{sign}.{digits}f}" for x in self[:3])
        return f"{mean} ({self.why})" if self.why else f"{mean} [{low}, {high}]"


def interval(
    values: Sequence[float], *, low: float = -math.inf, high: float = math.inf, level: float = 0.95
) -> Interval:
    """Mean of `values`, one a seed, with Student's interval, cut to the range `low` to `high`.

    Cutting keeps the coverage: what lies outside was impossible. For accuracies `accuracy` is the
    better choice.
    """
    values = _numbers(values, "interval")
    mean, why = _mean(values)
    if why:
        return Interval(mean, low, high, len(values), why)
    half = _student(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(low, mean - half), min(high, mean + half), len(values))


def accuracy(values: Sequence[float], images: int | None = None, level: float = 0.95) -> Interval:
    """Mean of accuracies in [0, 1], one a seed, with an interval that stays in [0, 1].

    Student's interval on the scale of the logit. Over seeds alone; with `images`, the number of
    images that each accuracy was measured on (the same for all seeds), over the choice of the
    images too: to the variance between seeds comes the binomial p(1 - p) / images, as if all seeds
    were right on the same images, which errs to the wide side. So equal seeds have an interval with
    `images` and none without. Degrees of freedom by Welch and Satterthwaite, half an image is added
    on either side for the logit of 0 and 1 (Anscombe, 1956). Few seeds are too few to estimate
    those: `FEW`.
    """
    values = _fractions(values, "accuracy")
    counted = isinstance(images, numbers.Real) and 1 <= images < math.inf and images is not True
    if images is not None and not counted:
        raise ValueError(
            f"`accuracy` needs `images` >= 1, got {images!r}. Pass how many were scored, or None."
        )
    mean, why = _mean(values)
    n = len(values)
    if n == 1 or (why and images is None):
        return Interval(mean, 0.0, 1.0, n, why)
    centre = mean if images is None else (images * mean + 0.5) / (images + 1)
    seeds = statistics.variance(values) / n
    binomial = 0.0 if images is None else centre * (1 - centre) / images
    freedom = math.inf if why else (n - 1) * ((seeds + binomial) / seeds) ** 2
    half = _student(level, freedom) * math.sqrt(seeds + binomial) / (centre * (1 - centre))
    logit = math.log(centre / (1 - centre))
    # the half image may put the bound of an accuracy of 0 or 1 inside of it
    low, high = (0.5 * (1 + math.tanh(0.5 * (logit + side * half))) for side in (-1, 1))
    return Interval(mean, min(low, mean), max(high, mean), n)


def pairs(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """`one - other` over the seeds they share, in order."""
    return [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of `ours - theirs`, two lists of accuracies, seed by seed, with Student's 95 % interval
    over seeds, cut to [-1, 1].

    Pairs belong together: a seed fixes the batches and the backbone's initial weights of both, and
    both are measured on the same images.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(
            f"`difference` needs as many values on both sides, one a seed, got {len(ours)} and "
            f"{len(theirs)}. Train both with the same seeds."
        )
    both = _fractions([*ours, *theirs], "difference")
    found = [a - b for a, b in zip(both, both[len(ours) :], strict=False)]
    return interval(found, low=-1.0, high=1.0)


def ratio(part: Sequence[float], whole: Sequence[float], level: float = 0.95) -> Interval:
    """`mean(part) / mean(whole)` over pairs with Fieller's interval; none where the mean of `whole`
    is not surely different from zero.

    Reference: Fieller, "Some problems in interval estimation", 1954.
    """
    n = len(part)
    if n != len(whole) or n < 2:
        raise ValueError(
            f"`ratio` needs two or more pairs, got {n} and {len(whole)} values. "
            "Confirm with the same seeds, at least two."
        )
    part, whole = _numbers(part, "ratio"), _numbers(whole, "ratio")
    (a, _), (b, _) = _mean(part), _mean(whole)
    found = a / b if b else math.nan
    if _equal(part) and _equal(whole):
        return Interval(found, -math.inf, math.inf, n, f"{n} equal seeds")
    factor = _student(level, n - 1) ** 2 / n
    g_aa, g_bb = factor * statistics.variance(part), factor * statistics.variance(whole)
    g_ab = factor * statistics.covariance(part, whole)
    square = b * b - g_bb
    if square <= 0:
        why = "without bounds: the whole is not surely different from 0"
        return Interval(found, -math.inf, math.inf, n, why)
    middle, constant = a * b - g_ab, a * a - g_aa
    half = max(0.0, middle * middle - square * constant) ** 0.5
    return Interval(found, (middle - half) / square, (middle + half) / square, n)


def verdict(name: str, ours: Sequence[float], other: str, theirs: Sequence[float]) -> str:
    """One sentence on two lists of accuracies by seed: how far apart, and if seeds explain it."""
    found = difference(ours, theirs)
    points = f"{100 * abs(found.mean):.2f} points {'above' if found.mean >= 0 else 'below'} {other}"
    if found.n == 1:
        return f"{name} is {points} with one seed, which says nothing about the spread."
    if found.why:
        return f"{name} is {points} with each of {found.n} seeds: equal seeds show no spread."
    inside = found.low <= 0 <= found.high
    noise = f"not clear of the noise of {found.n} seeds"
    what = noise if inside else f"more than {found.n} seeds explain"
    bounds = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    return f"{name} is {points} (95 % interval {bounds}, paired by seed): {what}."


def left_out(name: str, diverged: Mapping[int, int]) -> list[str]:
    """A sentence on each seed of `name` that `diverged` has, with the step."""
    return [
        f"{name}, seed {seed}, diverged at step {step} and is left out of the means."
        for seed, step in diverged.items()
    ]


def _numbers(values: Sequence[float], function: str) -> list[float]:
    """`values`, a list or an array of one axis, as a list of finite numbers, one at least."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(
            f"`{function}` needs one finite value a seed or more, got {values!r:.200}. "
            "Leave out the seeds that diverged, and say so."
        )
    return found


def _fractions(values: Sequence[float], function: str) -> list[float]:
    found = _numbers(values, function)
    if not 0 <= min(found) <= max(found) <= 1:
        raise ValueError(
            f"`{function}` needs fractions in [0, 1], got {min(found)!r} to {max(found)!r}. "
            "Divide per cents by 100."
        )
    return found


def _mean(values: Sequence[float]) -> tuple[float, str]:
    """The mean, and why there is no interval, "" where there is one."""
    if len(values) == 1:
        return values[0], "one seed"
    return statistics.fmean(values), f"{len(values)} equal seeds" if _equal(values) else ""


def _equal(values: Sequence[float]) -> bool:
    # differences of equal pairs differ by roundings
    return max(values) - min(values) <= 1e-12 * max(1.0, *map(abs, values))


def _student(level: float, freedom: float) -> float:
    if not isinstance(level, numbers.Real) or not 0 < level < 1:
        raise ValueError(
            f"an interval needs 0 < `level` < 1, got {level!r}. Pass 0.95 for 95 per cent."
        )
    try:
        from scipy import stats
    except ImportError as error:
        raise ValueError(
            "an interval needs SciPy, which is not installed. Run "
            '`pip install "kart-attention[plots]"`.'
        ) from error
    return float(stats.t.ppf(0.5 + level / 2, freedom))
