"""Training runs side by side: curves over epochs, and whether seeds explain a difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.analysis import figures

Record = Mapping[str, Any]


def history(records: Sequence[Sequence[Record]], key: str) -> Tensor:
    """Entry `key` of `records[epoch][member]`, as `population.fit` yields them: float64 `(members,
    epochs)`.
    """
    if not records or any(key not in record for row in records for record in row):
        raise ValueError(
            f"`history` needs records with {key!r}, got {len(records)} epochs of them. "
            "Pass those of finished epochs."
        )
    return torch.tensor([[record[key] for record in row] for row in records]).double().mT


class Difference(NamedTuple):
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float


# Student's t at 0.975 for 1 to 10 degrees of freedom; beyond, its expansion is good to 0.001
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of `ours - theirs`, seed by seed, with its 95 % interval by Student's t.

    Pairs belong together: a seed fixes the batches and the backbone's initial weights of both. One
    pair has no spread, and the interval is the whole line.
    """
    n = len(ours)
    if n != len(theirs) or not n:
        raise ValueError(
            f"`difference` needs as many values on both sides, one a seed, got {n} and "
            f"{len(theirs)}. Train both with the same seeds."
        )
    deltas = torch.tensor(list(ours)).double() - torch.tensor(list(theirs)).double()
    mean = float(deltas.mean())
    if n == 1:
        return Difference(mean, -math.inf, math.inf)
    df = n - 1
    t = _T[df - 1] if df <= 10 else 1.95996 + 2.3722 / df + 2.8225 / df**2 + 2.556 / df**3
    half = t * float(deltas.std()) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half)


def verdict(name: str, ours: Sequence[float], other: str, theirs: Sequence[float]) -> str:
    """One sentence on two lists of top-1 fractions, seed by seed: how far apart, and whether that
    is more than the seeds explain.
    """
    found = difference(ours, theirs)
    points, low, high = (100 * value for value in found)
    way = f"{abs(points):.2f} points {'above' if points >= 0 else 'below'} {other}"
    if len(ours) == 1:
        return f"{name} is {way} with one seed, which says nothing about the spread."
    inside = low <= 0 <= high
    noise = f"not clear of the noise of {len(ours)} seeds"
    what = noise if inside else f"more than {len(ours)} seeds explain"
    return f"{name} is {way} (95 % interval {low:+.2f} to {high:+.2f}, paired by seed): {what}."


def plot(series: Mapping[str, Tensor], label: str, scale: float = 1.0, log: bool = False) -> Any:
    """A matplotlib Figure of each `(members, epochs)`: the mean over members as a line, over the
    band from the lowest to the highest.
    """
    fig, axes = figures.grid(1, 1, 4.4, 2.7)
    ax = axes[0, 0]
    for colour, (name, values) in zip(figures.COLOURS, series.items(), strict=False):
        values = scale * values.numpy()
        epochs = range(1, values.shape[1] + 1)
        ax.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        marker = "o" if values.shape[1] == 1 else None
        ax.plot(epochs, values.mean(0), color=colour, lw=1.5, label=name, marker=marker, ms=3)
    ends = [float(values.min()) for values in series.values()] + [
        float(values.max()) for values in series.values()
    ]
    if log and min(ends) > 0 and max(ends) > 10 * min(ends):
        ax.set_yscale("log")
    elif log:  # within a decade a logarithmic axis has no ticks worth reading
        ax.set_ylim(scale * min(ends) * 0.95, scale * max(ends) * 1.02)
    else:
        # the first fifth, where curves are steep, may leave the picture: the end is what counts
        early = min(float(values[:, values.shape[1] // 5].min()) for values in series.values())
        ax.set_ylim(bottom=scale * early)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch")
    ax.set_title(label, loc="left", fontsize=9, color=figures.INK)
    legend = ax.legend(frameon=False, fontsize=8, labelcolor=figures.INK)
    legend.set_zorder(5)
    ax.grid(axis="y", color=figures.QUIET, alpha=0.25, lw=0.5)
    return fig
