"""Training runs side by side: curves over epochs, and whether they have come to rest.

training.trend(training.history(records, "val_top1"))
training.plot({"softmax": training.history(records, "val_top1")}, "validation top-1, %", 100.0)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import pages, statistics
from kart.analysis import figures
from kart.analysis.section import Analysis, Context, Result
from kart.train import Record

RISE = 0.01  # of top-1 from one third of the epochs to the next: less counts as at rest
LEAST_EPOCHS = 6


def history(records: Sequence[Sequence[Record]], key: str) -> Tensor:
    """Entry `key` of `records[epoch][member]` of `population.fit`: float64 `(members, epochs)`."""
    if not records or any(key not in record for row in records for record in row):
        raise ValueError(
            f"`history` needs records with {key!r}, got {len(records)} epochs of them. "
            "Pass those of finished epochs."
        )
    return torch.tensor([[record[key] for record in row] for row in records]).double().mT


class Trend(NamedTuple):
    """How much a curve still rose: its mean over the last third of the epochs over that of the
    third before, and the standard error of that which its jitter from epoch to epoch explains.
    """

    rise: float
    error: float
    epochs: int

    @property
    def at_rest(self) -> bool:
        """Whether it rose by a point at most, or twice the error; never with under six epochs."""
        return self.epochs >= LEAST_EPOCHS and self.rise <= max(RISE, 2 * self.error)


def trend(curves: Tensor) -> Trend:
    """The trend of the mean over members of `curves (members, epochs)`, such as top-1."""
    mean = curves.double().mean(0)
    third = len(mean) // 3
    if third < 2:
        return Trend(float("nan"), float("nan"), len(mean))
    before, last = mean[-2 * third : -third], mean[-third:]
    # second differences: they see the jitter and not the slope; their variance is 6 of the noise's
    noise = mean[-2 * third :].diff(n=2).square().mean() / 6
    return Trend(float(last.mean() - before.mean()), float((2 * noise / third).sqrt()), len(mean))


def warnings(results: Sequence[Result]) -> list[str]:
    """A sentence for each operator whose validation top-1 had not come to rest, the first being the
    baseline; one for all where the epochs are too few; one for each seed that diverged.
    """
    trends = {one.name: trend(history(one.records, "val_top1")) for one in results}
    short = {name: one.epochs for name, one in trends.items() if one.epochs < LEAST_EPOCHS}
    lines = []
    if short:
        fewest, names = min(short.values()), ", ".join(short)
        lines.append(f"Too few epochs ({fewest}) to show whether {names} converged.")
    for i, (name, one) in enumerate(trends.items()):
        if one.at_rest or name in short:
            continue
        line = (
            f"{name} has not converged: its validation top-1 still rose by {100 * one.rise:.1f} "
            "points from one third of the epochs to the next."
        )
        if i == 0 and len(results) > 1:
            line += " Differences to it are about how fast each learns, too. Train it longer."
        lines.append(line)
    for one in results:
        lines += statistics.left_out(one.name, one.diverged or {})
    for name, seeds in (results[0].lost or {}).items():
        lines += statistics.left_out(name, seeds)
    return lines


def plot(
    series: Mapping[str, Tensor], label: str, scale: float = 1.0, log: bool = False, start: int = 0
) -> Any:
    """A matplotlib Figure of each `(members, epochs)`: the mean over members as a line, over the
    band from the lowest to the highest; nothing is cut off.

    Args:
        series: by name, all with as many epochs.
        label: of the values, with their unit.
        scale: what they are multiplied by; 100 for shares, whose axis ends at 100.
        log: whether the axis may be logarithmic; it is where they span more than a decade.
        start: how many epochs to leave out, for a closer look at the others.
    """
    fig, (ax,) = figures.panels(1, 1, 4.4, 2.9)
    low, high = float("inf"), -float("inf")
    for i, (name, values) in enumerate(series.items()):
        shown = scale * values[:, start:].numpy()
        low, high = min(low, shown.min()), max(high, shown.max())
        x = range(start + 1, values.shape[1] + 1)
        style = figures.look(i)
        ax.fill_between(x, shown.min(0), shown.max(0), color=style["color"], alpha=0.2, lw=0)
        marker = "o" if len(x) == 1 else None
        curve = {"lw": 1.5, "label": name, "marker": marker, "ms": 3, "clip_on": False, **style}
        ax.plot(x, shown.mean(0), **curve)
    if scale == 100.0 and high <= 100.0:  # no axis of a share goes beyond the whole
        ax.set_ylim(top=min(100.0, ax.get_ylim()[1]))
    if log and low > 0 and high > 10 * low:
        ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch")
    ax.grid(axis="y", color=figures.QUIET, alpha=0.25, lw=0.5)
    ax.set_title(label, loc="left", fontsize=9, color=figures.INK)
    figures.legend(fig)
    return fig


def section(context: Context) -> pages.Section:
    """Curves of validation top-1 and training loss, and who had not converged."""
    shown, numbers = [], []
    for key, label, scale, log in (
        ("val_top1", "validation top-1, %", 100.0, False),
        ("train_loss", "training loss, nats", 1.0, True),
    ):
        series = {result.name: history(result.records, key) for result in context.results}
        ends = ", ".join(f"{n} {scale * float(v[:, -1].mean()):.3g}" for n, v in series.items())
        alt = f"{label} over epochs; mean over seeds at the end: {ends}"
        shown.append(pages.figure(plot(series, label, scale, log), key, alt))
        half = len(context.results[0].records) // 2
        if 2 * half >= LEAST_EPOCHS:
            close = f"{label}: the last half, enlarged"
            fig = plot(series, close, scale, log, half)
            shown.append(pages.figure(fig, f"{key}-end", f"{close}; {alt}"))
    for result in context.results:
        found = trend(history(result.records, "val_top1"))
        if found.epochs >= LEAST_EPOCHS:
            numbers.append(pages.Number(result.name, "rise", 100 * found.rise, "points"))
    rule = (
        "Line: mean over seeds. Band: lowest to highest seed. A curve counts as at rest when its "
        "mean over the last third of the epochs is no more than a point of top-1 above that over "
        "the third before, or no more than twice the standard error of that difference by its "
        "jitter from epoch to epoch. A cosine schedule flattens every curve at its end, so this "
        "finds the clear cases only."
    )
    blocks = [
        *map(pages.warning, warnings(context.results)),
        pages.beside(*shown),
        pages.note(rule),
    ]
    return pages.Section(blocks, numbers)


ANALYSIS = Analysis("training", "Training", section)
