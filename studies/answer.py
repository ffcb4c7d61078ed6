"""Is learnable attention better than softmax, and which part of it: a table over sizes and data.

    python -m studies.answer plan                                       # what there is to train
    python -m studies.answer work --data uoft-cs/cifar10 --out runs/answer --minutes 30
    python -m studies.answer report --out runs/answer                   # answer.html, answer.csv

Factors: what mixes the tokens (`ARMS`), in `CELLS` that change one thing each (width, depth,
training images, epochs, patches) from a common centre, and three that change two. Every arm has the
same tuning budget: in the centre, and again in the cells of `RATES_IN`, the same learning rates,
one seed each, chosen by validation. Then fresh seeds are trained at that rate in every cell and
scored once on the test split; nothing is chosen by the test split. First every arm gets `--seeds`
seeds; then, while there is time, the arms whose interval against softmax holds 0 get more, up to
`MOST_SEEDS`, which makes it clear of 0 more often than 95 % say (`LOOKS_WORDS`).

Work is cut into units of seconds to minutes, each a file below `--out` that is written whole or not
at all: it can be killed and started again, and any number of processes may share the directory.
Expected, in points of test top-1 over softmax: G3 +7.2 [+6.3, +8.0] and its control without scores
+6.8 [+6.2, +7.4] after 1,250 steps (n = 5), -0.1 [-0.7, +0.5] and -1.0 [-1.5, -0.5] after 7,500
(n = 6). All cells take some 34 hours on one core.
"""

import argparse
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kart import checkpoint, data, pages, schema, statistics, tables, train
from kart.analysis import cost, figures
from kart.commands.command import number, standalone
from kart.statistics import Interval
from kart.train import Config

RATES: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
TUNING_SEED = 1000
SEEDS, MOST_SEEDS = 3, 8

CENTRE = Config(
    train_limit=8000,
    augment="flip_crop",
    model="vit_nano",
    image_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    epochs=10,
    batch_size=64,
    threads=1,
)

# one factor at a time; more tokens with more steps, and more images with more epochs
CENTRE_CELL = "centre"
CELLS: dict[str, dict[str, Any]] = {
    CENTRE_CELL: {},
    "width 32": {"embed_dim": 32},
    "width 128": {"embed_dim": 128},
    "2,000 images": {"train_limit": 2000},
    "4,000 images": {"train_limit": 4000},
    "16,000 images": {"train_limit": 16000},
    "45,000 images": {"train_limit": 45000},
    "depth 4": {"depth": 4},
    "30 epochs": {"epochs": 30},
    "60 epochs": {"epochs": 60},
    "patch 4": {"patch_size": 4},
    "patch 4, 30 epochs": {"patch_size": 4, "epochs": 30},
    "patch 4, 45,000 images": {"patch_size": 4, "train_limit": 45000},
    "45,000 images, 30 epochs": {"train_limit": 45000, "epochs": 30},
}


# cells with rates of their own: those of the centre are too high for a wider model, and
# too low for many more steps
RATES_IN: dict[str, tuple[float, ...]] = {
    "width 128": (7.5e-4, 1.5e-3),
    "16,000 images": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "45,000 images": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "30 epochs": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "60 epochs": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "patch 4": (1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "patch 4, 30 epochs": (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "patch 4, 45,000 images": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "45,000 images, 30 epochs": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
}


def tuned_in(cell: str) -> str:
    """The cell in which the rates of `cell` are chosen."""
    return cell if cell in RATES_IN else CENTRE_CELL


class Arm(NamedTuple):
    """What mixes the tokens: fields of Config, and what it sees of the scores."""

    fields: Mapping[str, Any]
    sees: str


# (K + 1) r is 84 for every low-rank arm: K parameters a unit and one of the mix; tables have fewer
ARMS: dict[str, Arm] = {
    "softmax": Arm({"operator": "softmax"}, "exp"),
    "relative": Arm({"operator": "relative"}, "nothing"),
    "softmax + relative": Arm({"operator": "relative", "base": "softmax"}, "exp"),
    "softmax(S + relative)": Arm({"operator": "relative:inside=true"}, "exp"),
    "static": Arm({"operator": "static"}, "nothing"),
    "polynomial-0": Arm({"operator": "polynomial-0B", "rank": 42}, "nothing"),
    "polynomial-1": Arm({"operator": "polynomial-1B", "rank": 28}, "an affine function"),
    "G3": Arm({"operator": "G3B", "rank": 12}, "a learned function"),
    "softmax + polynomial-0": Arm(
        {"operator": "polynomial-0B", "rank": 42, "base": "softmax"}, "exp"
    ),
    "softmax + polynomial-1": Arm(
        {"operator": "polynomial-1B", "rank": 28, "base": "softmax"}, "exp and an affine function"
    ),
    "softmax + G3": Arm(
        {"operator": "G3B", "rank": 12, "base": "softmax"}, "exp and a learned function"
    ),
    "softmax + relative + G3": Arm(
        {"operator": "G3B:order=beside_relative", "rank": 12}, "exp and a learned function"
    ),
    "relative + phi(S, offset)": Arm({"operator": "G3B:order=by_offset"}, "a learned function"),
}


class Unit(NamedTuple):
    """A piece of work: one arm in one cell at one rate, trained with a seed."""

    cell: str
    arm: str
    rate: float
    seed: int

    @property
    def tuning(self) -> bool:
        """Whether it chooses the rate: such a unit never reads the test split."""
        return self.seed == TUNING_SEED

    def path(self, out: Path) -> Path:
        """Its file; units of the same name are the same work."""
        return (
            out / _name(self.cell) / _name(self.arm) / f"rate-{self.rate:g}-seed-{self.seed}.json"
        )

    def config(self, source: str) -> Config:
        """What is trained."""
        fields = {**CELLS[self.cell], **ARMS[self.arm].fields}
        return dataclasses.replace(
            CENTRE, data=source, learning_rate=self.rate, seed=self.seed, **fields
        )


Records = Sequence[Mapping[str, Any]]  # of units, as `execute` gives them
Scores = Mapping[tuple[str, str], Mapping[int, float]]  # test top-1 of (cell, arm), by seed


def _name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-+" else "-" for c in text)


def read(out: Path) -> list[dict[str, Any]]:
    """The finished units below `out`."""
    found = []
    for path in sorted(out.glob("*/*/rate-*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`answer` needs whole records, got a damaged {str(path)!r} ({error}). Remove it: "
                "`work` trains that unit again."
            ) from None
    return found


def best_rates(records: Records, cell: str = CENTRE_CELL) -> dict[str, float]:
    """The rate of each arm whose tuning in `cell` is finished: highest validation top-1, the lower
    rate where two are equal. Others than the cell's, tried afterwards, are not chosen.
    """
    rates = RATES_IN.get(cell, RATES)
    scores: dict[str, dict[float, float]] = {}
    for one in records:
        if one["tuning"] and one["cell"] == cell and one["rate"] in rates:
            scores.setdefault(one["arm"], {})[one["rate"]] = one["val_top1"]
    return {
        arm: max(sorted(own), key=lambda rate, own=own: own[rate])
        for arm, own in scores.items()
        if len(own) == len(rates)
    }


def tested(records: Records, own: bool = True) -> dict[tuple[str, str], dict[int, float]]:
    """Test top-1 by seed of each (cell, arm) at the rate that was chosen, in the cell where it has
    rates of its `own`, or in the centre; where none has been, of runs at one rate alone. A diverged
    seed counts with what it scored.
    """
    rates = {cell: best_rates(records, cell) for cell in (CENTRE_CELL, *RATES_IN)}
    runs: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for one in records:
        if not one["tuning"]:
            by_rate = runs.setdefault((one["cell"], one["arm"]), {})
            by_rate.setdefault(one["rate"], {})[one["seed"]] = one["test_top1"]
    found = {}
    for (cell, arm), by_rate in runs.items():
        chosen = rates[tuned_in(cell) if own else CENTRE_CELL].get(arm)
        if chosen is None and len(by_rate) == 1:
            chosen = next(iter(by_rate))
        if chosen in by_rate:
            found[cell, arm] = by_rate[chosen]
    return found


def planned(
    records: Records,
    cells: Sequence[str],
    arms: Sequence[str] | None = None,
    seeds: int = SEEDS,
) -> Iterator[Unit]:
    """What is left to do and can be done now, in order: the tuning of an arm and its first `seeds`,
    cell by cell, then more where the interval of the difference to softmax holds 0.
    """
    arms = list(ARMS) if arms is None else arms
    scores = tested(records)
    done = {(one["cell"], one["arm"], one["rate"]) for one in records if one["tuning"]}
    for place in dict.fromkeys([CENTRE_CELL, *map(tuned_in, cells)]):
        for arm, rate in itertools.product(arms, RATES_IN.get(place, RATES)):
            if (place, arm, rate) not in done:
                yield Unit(place, arm, rate, TUNING_SEED)
    rates = {cell: best_rates(records, tuned_in(cell)) for cell in cells}
    for cell, seed, arm in itertools.product(cells, range(seeds), arms):
        if arm in rates[cell] and seed not in scores.get((cell, arm), {}):
            yield Unit(cell, arm, rates[cell][arm], seed)
    for n, cell in itertools.product(range(seeds, MOST_SEEDS), cells):
        open_arms = [arm for arm in arms if undecided(scores, cell, arm, n)]
        # pairs need the same seeds of softmax
        for arm in ["softmax", *open_arms] if open_arms else []:
            if arm in rates[cell] and len(scores.get((cell, arm), {})) == n:
                yield Unit(cell, arm, rates[cell][arm], n)


def undecided(scores: Scores, cell: str, arm: str, n: int) -> bool:
    """Whether an arm with `n` seeds may be better or worse than softmax in `cell`."""
    if arm == "softmax" or len(scores.get((cell, arm), {})) != n:
        return False
    found = gain(scores, cell, arm)
    return found is not None and not found.why and found.low < 0 < found.high


def gain(scores: Scores, cell: str, arm: str, over: str = "softmax") -> Interval | None:
    """The difference in test top-1 to the arm `over` in a cell, over the seeds that both have."""
    both = scores.get((cell, arm), {}), scores.get((cell, over), {})
    shared = sorted(both[0].keys() & both[1].keys())
    if len(shared) < 2:
        return None
    return statistics.difference(*([one[i] for i in shared] for one in both))


# how the gain of KArAt over softmax is split: what ignores the scores, what an affine function of
# them adds, what a nonlinear one adds; alone and beside softmax
PARTS = {
    "static mixing": ("polynomial-0", "softmax"),
    "affine in the score": ("polynomial-1", "polynomial-0"),
    "nonlinear in the score (G3)": ("G3", "polynomial-1"),
    "beside softmax: static mixing": ("softmax + polynomial-0", "softmax"),
    "beside softmax: affine": ("softmax + polynomial-1", "softmax + polynomial-0"),
    "beside softmax: nonlinear (G3)": ("softmax + G3", "softmax + polynomial-1"),
}
# what cells change: a field of Config, and the words for it
FACTORS = {
    "train_limit": "images",
    "embed_dim": "width",
    "depth": "depth",
    "epochs": "epochs",
    "patch_size": "side of a patch",
}


def by_factor(cells: Sequence[str]) -> dict[str, list[str]]:
    """The cells of each factor in the order of its values, the centre among them; then those that
    change more than one.
    """
    found = {}
    for field, words in FACTORS.items():
        own = [cell for cell in cells if set(CELLS[cell]) == {field}]
        if own:
            own += [CENTRE_CELL] * (CENTRE_CELL in cells)
            found[words] = sorted(own, key=lambda c: CELLS[c].get(field, getattr(CENTRE, field)))
    for cell in cells:
        if len(CELLS[cell]) > 1:
            words = " and ".join(FACTORS[field] for field in FACTORS if field in CELLS[cell])
            found.setdefault(words, []).append(cell)
    return found or {"the centre": list(cells)}


def score_share(scores: Scores, cell: str) -> Interval | None:
    """The share of G3's gain over softmax that polynomial-0 does not have: a function of the
    scores, with Fieller's interval.
    """
    static, learned, base = (scores.get((cell, a), {}) for a in ("polynomial-0", "G3", "softmax"))
    shared = sorted(static.keys() & learned.keys() & base.keys())
    if len(shared) < 2:
        return None
    rest, whole = ([learned[i] - other[i] for i in shared] for other in (static, base))
    return statistics.ratio(rest, whole)


def tuning(records: Records) -> tuple[list[str], list[list[str]]]:
    """What the choice of rates did, as head and rows: of each arm in the centre and in the cells
    with rates of their own validation top-1 by rate, `*` at the best and whether it is the lowest
    or highest tried, and the gain over softmax there and, where it was run too, with every arm at
    the rate of the centre.
    """
    tried = sorted({one["rate"] for one in records if one["tuning"]})
    own, centre = tested(records), tested(records, own=False)
    rows = []
    for cell, arm in itertools.product((CENTRE_CELL, *RATES_IN), ARMS):
        found = {
            one["rate"]: one["val_top1"]
            for one in records
            if one["tuning"] and (one["cell"], one["arm"]) == (cell, arm)
        }
        if not found:
            continue
        best = best_rates(records, cell).get(arm)
        ends = {min(found): " lowest", max(found): " highest"}
        marks = {best: "*" + ends.get(best, "")} if best else {}
        scores = [
            f"{100 * found[rate]:.1f}{marks.get(rate, '')}" if rate in found else ""
            for rate in tried
        ]
        gains = [gain(one, cell, arm) if arm != "softmax" else None for one in (own, centre)]
        rows.append([cell, arm, *scores, *map(shown, gains)])
    return ["cell", "arm", *(f"{rate:g}" for rate in tried), "gain", "at the centre's"], rows


class Trend(NamedTuple):
    """Of one arm: the gain at the centre and its change for a doubling of each factor, in points,
    each (estimate, low, high), and the number of runs.
    """

    centre: tuple[float, float, float]
    slopes: Mapping[str, tuple[float, float, float]]
    runs: int


LOOKS_WORDS = (
    f"Arms whose interval holds 0 after {SEEDS} seeds are given more, one by one, up to "
    f"{MOST_SEEDS}: one that is no better or worse than softmax is then clear of 0 in 14 of 100 "
    "cells, not in 5."
)
TREND_WORDS = (
    "Of each arm the plane nearest to the mean gains of its cells over softmax: an intercept at "
    "the centre and a slope for each factor in doublings, by least squares, with Student's 95 % "
    "intervals by how far the cells lie from it, which is farther than seeds explain. Arms with "
    "no more cells than numbers are left out. Straight lines are a summary: over training steps "
    "the gains bend (above)."
)


def trends(records: Records) -> dict[str, Trend]:
    """`TREND_WORDS`."""
    import numpy as np
    from scipy import stats

    scores = tested(records)
    found: dict[str, Trend] = {}
    for arm in ARMS:
        gains = {
            cell: own
            for cell in CELLS
            if arm != "softmax" and (own := gain(scores, cell, arm)) is not None
        }
        places = [{**dataclasses.asdict(CENTRE), **CELLS[cell]} for cell in gains]
        columns = {
            factor: np.log2([one[factor] / getattr(CENTRE, factor) for one in places])
            for factor in FACTORS
        }
        factors = [factor for factor, column in columns.items() if column.any()]
        design = np.stack([np.ones(len(gains)), *(columns[factor] for factor in factors)], 1)
        left = len(gains) - design.shape[1]
        if left < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
            continue
        points = np.array([100 * own.mean for own in gains.values()])
        fitted = np.linalg.pinv(design) @ points
        variance = ((points - design @ fitted) ** 2).sum() / left
        errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
        halves = stats.t.ppf(0.975, left) * errors
        lines = [
            (float(one), float(one - half), float(one + half))
            for one, half in zip(fitted, halves, strict=True)
        ]
        found[arm] = Trend(
            lines[0],
            dict(zip(factors, lines[1:], strict=True)),
            sum(own.n for own in gains.values()),
        )
    return found


def execute(unit: Unit, source: str) -> dict[str, Any]:
    """Trains a unit and scores it, one that diverges with its last good weights; the test split is
    read for fresh seeds alone.
    """
    config = unit.config(source)
    splits = train.load_data(config)
    model = train.build(config, splits.train)
    began, spent = time.perf_counter(), time.process_time()
    run = train.solo(config, splits)
    latest = [run.init()]
    last: dict[str, Any] = {}

    def follow(state: train.State, metrics: train.Metrics) -> None:
        latest[:] = [state]

    try:
        for _, record in train.loop(run, latest[0], donate=True, on_step=follow):
            last = record
    except train.Diverged as error:
        found = run.evaluate(train.weights_for_evaluation(latest[0]))
        last = {f"val_{name}": float(value) for name, value in found.items()}
        last |= {"train_loss": None, "diverged": error.step}
    scores = {name: last[name] for name in ("val_top1", "val_loss", "train_loss", "diverged")}
    if not unit.tuning:
        weights = train.weights_for_evaluation(latest[0])
        found = train.evaluate(model.apply, weights, data.load(source, "test"), config)
        scores |= {f"test_{name}": float(value) for name, value in found.items()}
    return {
        **unit._asdict(),
        **scores,
        "tuning": unit.tuning,
        "config": config.asdict(),
        "images": splits.val.fingerprint,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - spent, 2),
        "versions": checkpoint.versions(),
    }


def work(
    source: str,
    out: Path,
    minutes: float,
    cells: Sequence[str],
    arms: Sequence[str] | None = None,
    seeds: int = SEEDS,
) -> int:
    """Does units until none is left or the time is up; returns how many it did."""
    torch.set_num_threads(1)
    until, count = time.monotonic() + 60 * minutes, 0
    own = data.load(source, "val").fingerprint
    busy: set[Path] = set()  # claimed by other processes when last seen
    with tables.bar(desc="answer", unit="unit") as bar:
        while time.monotonic() < until:
            records = read(out)
            other = next((one for one in records if one.get("images", own) != own), None)
            if other is not None:
                raise ValueError(
                    f"`answer` needs `--data` of the images that the units below {str(out)!r} are "
                    f"of, {other['config']['data']!r}, got {source!r}. Choose another `--out`."
                )
            known = planned(records, cells, arms, seeds)
            todo = [unit for unit in known if unit.path(out) not in busy]
            if not todo:
                break
            unit = todo[0]
            path = unit.path(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    busy.add(path)
                    continue
                if not path.exists():
                    bar.set_postfix_str(f"{unit.cell}, {unit.arm}, {unit.rate:g}, {unit.seed}")
                    record = execute(unit, source)
                    checkpoint.write_text(path, schema.dumps(record, indent=1) + "\n")
                    count += 1
                    bar.update(1)
                path.with_suffix(".lock").unlink(missing_ok=True)
            busy.clear()
    return count


def shown(found: Interval | None, factor: float = 100.0, sign: str = "+") -> str:
    """An interval as text: mean, bounds, n."""
    if found is None:
        return ""
    return found.text(factor, sign=sign) + ("" if found.why else f" n={found.n}")


def stacked(found: Interval | None, factor: float = 100.0, above: str = "") -> pages.Markup:
    """An interval for a narrow column of the page: what is `above`, the mean, its bounds."""
    lines = [pages.tag("small", above)] if above else []
    if found is not None:
        mean, _, rest = shown(found, factor).partition(" ")
        lines += [mean, pages.tag("small", "no bounds" if found.why else rest)]
    return pages.Markup("<br>".join(lines))


SIGHTS = ("ignores the scores", "a function of the scores", "softmax, alone or beside more")


def forest(scores: Scores, cells: Sequence[str]) -> Any:
    """The gain of each arm over softmax in each cell, with its interval, on one axis of points."""
    arms = [arm for arm in ARMS if arm != "softmax" and any(gain(scores, c, arm) for c in cells)]
    columns = min(5, len(cells))
    shape = -(-len(cells) // columns), columns
    fig, axes = figures.grid(*shape, 2.1, 0.28 * len(arms) + 0.9, sharey=True, sharex=True)
    named: set[int] = set()
    for ax in axes.flat[len(cells) :]:
        ax.remove()
    for ax, cell in zip(axes.flat, cells, strict=False):
        for i, arm in enumerate(arms):
            found = gain(scores, cell, arm)
            if found is None:
                continue
            sees = 0 if ARMS[arm].sees == "nothing" else 1 + ("exp" in ARMS[arm].sees)
            colour = figures.COLOURS[sees]
            if not found.why:
                ax.plot([100 * found.low, 100 * found.high], [i, i], color=colour, lw=1.4)
            label = "" if sees in named else SIGHTS[sees]
            named.add(sees)
            ax.plot(100 * found.mean, i, "os^"[sees], color=colour, ms=4, label=label)
        ax.axvline(0, color=figures.QUIET, lw=0.8)
        ax.set_title(cell, fontsize=8, color=figures.INK)
        ax.set_xlabel("points over softmax")
    axes[0, 0].set_yticks(range(len(arms)), arms)
    axes[0, 0].invert_yaxis()
    figures.legend(fig)
    return fig


def shares(scores: Scores, cells: Sequence[str]) -> Any:
    """The parts of KArAt's gain in each cell, beside each other."""
    fig, axes = figures.grid(1, 1, 1.5 + 0.95 * max(6, len(cells)), 3.0)
    ax = axes[0, 0]
    for k, (part, (arm, over)) in enumerate(PARTS.items()):
        for i, cell in enumerate(cells):
            found = gain(scores, cell, arm, over)
            if found is None:
                continue
            x = i + (k - len(PARTS) / 2) * 0.12
            style = {"color": figures.COLOURS[k % len(figures.COLOURS)]}
            if not found.why:
                ax.plot([x, x], [100 * found.low, 100 * found.high], lw=1.4, **style)
            ax.plot(x, 100 * found.mean, "os^Dv<"[k], ms=5, label="" if i else part, **style)
    ax.axhline(0, color=figures.QUIET, lw=0.8)
    ax.set_xticks(range(len(cells)), cells)
    ax.set_ylabel("points of test top-1")
    figures.legend(fig)
    return fig


def steps(cell: str) -> int:
    """Updates of the weights in a cell."""
    fields = {**dataclasses.asdict(CENTRE), **CELLS[cell]}
    return fields["epochs"] * (fields["train_limit"] // fields["batch_size"])


def lasting(scores: Scores, cells: Sequence[str]) -> Any:
    """The gain of each arm over softmax by the number of training steps, be they of more images
    (filled) or of more epochs (hollow); arms in fewer than four such cells are left out.
    """
    cells = sorted(
        (one for one in cells if CELLS[one].keys() <= {"train_limit", "epochs"}), key=steps
    )
    fig, axes = figures.grid(1, 1, 7.5, 3.6)
    ax = axes[0, 0]
    lines = {
        arm: [(cell, one) for cell in cells if (one := gain(scores, cell, arm))]
        for arm in ARMS
        if arm != "softmax"
    }
    lines = {arm: found for arm, found in lines.items() if len(found) >= 4}
    for k, (arm, found) in enumerate(lines.items()):
        # side by side where they would hide each other
        x = [steps(cell) * 1.02 ** (k - len(lines) / 2) for cell, _ in found]
        style = figures.look(k)
        ax.plot(x, [100 * one.mean for _, one in found], lw=1, label=arm, **style)
        for at, (cell, one) in zip(x, found, strict=True):
            if not one.why:
                ax.plot([at, at], [100 * one.low, 100 * one.high], lw=1, color=style["color"])
            face = "none" if "epochs" in CELLS[cell] else style["color"]
            ax.plot(at, 100 * one.mean, "o", ms=5, mec=style["color"], mfc=face)
    ax.axhline(0, color=figures.QUIET, lw=0.8)
    ax.set_xscale("log", base=2)
    ticks: list[int] = []
    for one in map(steps, cells):
        if not ticks or one > 1.2 * ticks[-1]:  # labels closer than that would overlap
            ticks.append(one)
    ax.set_xticks(ticks, [f"{one:,}" for one in ticks])
    ax.set_xlabel("training steps")
    ax.set_ylabel("points over softmax")
    figures.legend(fig)
    return fig


def report(out: Path) -> list[str]:
    """Writes answer.html, answer.csv, runs.csv (every run) and the pictures; returns the lines
    of the answer.
    """
    records = read(out)
    scores = tested(records)
    known = [cell for cell in CELLS if any(key[0] == cell for key in scores)]
    cells = list(dict.fromkeys(cell for group in by_factor(known).values() for cell in group))
    if not known:
        raise ValueError(
            f"`report` needs confirmed runs, got none below {str(out)!r}. Run `python -m "
            f"studies.answer work --out {out}` first."
        )
    configs = {(one["cell"], one["arm"]): Config.fromdict(one["config"]) for one in records}
    rows, numbers, undecided_ones = [], [], []
    stacks: dict[str, dict[str, pages.Markup]] = {}
    for cell, arm in itertools.product(cells, ARMS):
        own = scores.get((cell, arm), {})
        if not own:
            continue
        model = train.build(configs[cell, arm], train.load_data(configs[cell, arm]).train)
        size = cost.parameters(model).total
        found = gain(scores, cell, arm) if arm != "softmax" else None
        mean = statistics.accuracy(list(own.values()))
        above = f"{100 * mean.mean:.2f} %" + (f" n={len(own)}" if arm == "softmax" else "")
        stacks.setdefault(arm, {})[cell] = stacked(found, above=above)
        rows.append([cell, arm, ARMS[arm].sees, f"{size:,}", shown(mean, sign=""), shown(found)])
        numbers.append([cell, arm, size, len(own), mean.mean, *(found or [None] * 3)[:3]])
        if found is not None and (found.why or found.low <= 0 <= found.high):
            undecided_ones.append(f"{arm} against softmax in the cell {cell}: {shown(found)}")
    gains = {part: {c: gain(scores, c, *pair) for c in cells} for part, pair in PARTS.items()}
    parts = [[part, *map(shown, found.values())] for part, found in gains.items()]
    shares_found = {cell: score_share(scores, cell) for cell in cells}
    fitted = trends(records)
    trend_rows = [
        [
            arm,
            *map(_line, (one.centre, *map(one.slopes.get, FACTORS))),
            crossing(one),
            str(one.runs),
        ]
        for arm, one in fitted.items()
    ]
    tuned, tuned_rows = tuning(records)
    groups = by_factor(cells).items()
    arms_by_factor = [
        pages.table(
            ["arm", *group],
            [
                [arm, *(own.get(c, "") for c in group)]
                for arm, own in stacks.items()
                if own.keys() & set(group)
            ],
            f"By {words}: test top-1, and the points over softmax with their interval.",
        )
        for words, group in groups
    ]
    parts_by_factor = []
    for words, group in groups:
        lines = [
            [part, *(stacked(found[c]) for c in group)]
            for part, found in gains.items()
            if any(found[c] for c in group)
        ]
        share_row = [
            "unclear" if one and one.why else stacked(one, 1.0)
            for one in map(shares_found.get, group)
        ]
        lines.append(["share of G3's gain that polynomial-0 has not", *share_row])
        told = (
            f"By {words}. The share has Fieller's interval, and is unclear where the gain itself "
            "is not clear of 0."
        )
        parts_by_factor.append(pages.table(["part, in points", *group], lines, told))
    head = ["cell", "arm", "sees", "parameters", "test top-1 %", "over softmax"]
    doublings = [f"a doubling of {word}" for word in FACTORS.values()]
    sections = {
        "Every arm in every cell": [
            pages.text(
                "Test top-1, mean over seeds with 95 % intervals, and the difference to softmax "
                "paired by seed. Rates were chosen by validation, in the centre and in the cells "
                "with rates of their own; the test split was read once a run. " + LOOKS_WORDS
            ),
            pages.figure(
                forest(scores, cells),
                "forest",
                "gain of each arm over softmax in each cell",
                "Right of the line: better than softmax. Lines are 95 % intervals.",
            ),
            *arms_by_factor,
            pages.details(
                "With parameters, and what an arm sees of the scores", pages.table(head, rows)
            ),
        ],
        "What part is a function of the scores": [
            pages.figure(
                shares(scores, cells),
                "parts",
                "parts of the gain in each cell",
                "What ignoring the scores gives, and what each step towards a learned function "
                "adds.",
            ),
            *parts_by_factor,
        ],
        "How long the gain lasts": [
            pages.figure(
                lasting(scores, cells),
                "lasting",
                "gain over softmax by training steps",
                "Gain over softmax by training steps, with 95 % intervals: filled where the images "
                "differ, hollow where the epochs do.",
            )
        ],
        "Rates": [
            pages.text(
                "Validation top-1 in per cent by learning rate, one seed each, * the best, lowest "
                "or highest where better ones may lie beyond those tried; the gain over softmax "
                "with every arm at its best rate of that cell, and, where it was run, with every "
                "arm at its best rate of the centre."
            ),
            pages.table(tuned, tuned_rows),
        ],
        "Trends": [
            pages.text(TREND_WORDS),
            pages.table(["arm", "at the centre", *doublings, "would cross 0", "runs"], trend_rows),
        ],
        "Undecided": [
            pages.items(undecided_ones or ["nothing: every interval is clear of 0"]),
        ],
    }
    title = "Is learnable attention better than softmax?"
    left = len(records) - sum(one["tuning"] for one in records) - sum(map(len, scores.values()))
    spare = f", {left} of them at rates that were not chosen and left out" if left else ""
    lead = f"{len(records)} runs{spare}; python -m studies.answer report --out {out.name}"
    shown_sections = [pages.Section(blocks, title=name) for name, blocks in sections.items()]
    checkpoint.write_text(out / "answer.html", pages.page(title, shown_sections, lead))
    header = ("cell", "arm", "parameters", "n", "top1", "gain", "low", "high")
    _write_table(out / "answer.csv", [header, *numbers])
    fields = ("cell", "arm", "rate", "seed", "val_top1", "test_top1", "cpu_seconds")
    kept = [[one.get(field) for field in fields] for one in records]
    _write_table(out / "runs.csv", [fields, *kept])
    forest(scores, cells).savefig(out / "answer.png", dpi=130)
    shares(scores, cells).savefig(out / "parts.png", dpi=130)
    lasting(scores, cells).savefig(out / "lasting.png", dpi=130)
    said = [tables.table(rows, ["cell", "arm", "sees", "parameters", "top-1 %", "over softmax"])]
    said += [tables.table(parts, ["part", *cells])]
    said += [
        f"share of G3's gain that is a function of the scores, {cell}: {shown(found, 1.0)}"
        for cell, found in shares_found.items()
    ]
    at_centre = tested(records, own=False)
    said += [
        f"the same with every arm at the rate of the centre, {cell}: {shown(found, 1.0)}"
        for cell in RATES_IN
        if (found := score_share(at_centre, cell))
    ]
    said += [tables.table(tuned_rows, tuned)]
    said += [tables.table(trend_rows, ["arm", "centre", *FACTORS.values(), "crosses 0", "runs"])]
    return said


def _line(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)


def _write_table(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)  # a cell may have a comma in its name
    checkpoint.write_text(path, text.getvalue())


def crossing(trend: Trend) -> str:
    """Where the fitted line of an arm would cross zero, by each factor that lowers its gain."""
    words = []
    for field, (slope, _, high) in trend.slopes.items():
        if trend.centre[0] > 0 and slope < 0:
            doublings = -trend.centre[0] / slope
            if doublings < 20:
                at = getattr(CENTRE, field) * 2**doublings
                sure = "" if high < 0 else " (slope not clear of 0)"
                words.append(f"{FACTORS[field]} {at:,.0f}{sure}")
    return "; ".join(words) or "not on these lines"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    for verb, words in (
        ("plan", "list the units that are known to be left"),
        ("work", "train and score units until none is left or the time is up"),
        ("report", "write answer.html, answer.csv and the pictures"),
    ):
        one = verbs.add_parser(verb, help=words, description=words, allow_abbrev=False)
        one.add_argument("--out", type=Path, default=Path("runs/answer"), help="where units are")
        if verb == "report":
            continue
        for what, known in (("cell", list(CELLS)), ("arm", list(ARMS))):
            one.add_argument(
                f"--{what}s",
                nargs="+",
                metavar=what.upper(),
                choices=known,
                default=known,
                help="which of: " + "; ".join(known),
            )
        one.add_argument(
            "--seeds",
            type=int,
            metavar="N",
            choices=range(1, MOST_SEEDS + 1),
            default=SEEDS,
            help=f"seeds of every arm, 1 to {MOST_SEEDS} ({SEEDS})",
        )
        if verb == "work":
            one.add_argument("--data", default="uoft-cs/cifar10", help="as kart train takes it")
            one.add_argument("--minutes", type=number(0), default=30.0, help="begin no unit later")
    args = parser.parse_args(argv)
    if args.what == "report":
        print("\n\n".join(report(args.out)))
        print(f"written to {args.out / 'answer.html'}")
        return 0
    if "softmax" not in args.arms:
        parser.error("`--arms` needs softmax among them: the others are paired with its seeds")
    if args.what == "plan":
        units = list(planned(read(args.out), args.cells, args.arms, args.seeds))
        for unit in units:
            print(unit.path(args.out))
        print(f"{len(units)} units known to be left")
        return 0
    done = work(args.data, args.out, args.minutes, args.cells, args.arms, args.seeds)
    print(f"{done} units done")
    return 0


if __name__ == "__main__":
    standalone(main)
