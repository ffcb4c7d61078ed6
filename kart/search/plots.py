"""The figures of a study's report; each returns a matplotlib Figure."""

import collections
import math
import statistics
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from kart import schema
from kart.analysis import figures
from kart.search.storage import Arms, Settings, original
from kart.search.trials import OBJECTIVES, trained
from kart.statistics import Interval

UNITS = {
    "accuracy": "validation top-1, %",
    "parameters": "parameters",
    "flops": "FLOPs an image",
    "memory": "training memory, MiB",
    "step_time": "ms a seed and step",
}


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A Figure of `width x height` inches with its axes in a row, ruled."""
    figure, axes = figures.grid(1, columns, width / columns, height)
    for ax in axes[0]:
        ax.grid(True, color=figures.QUIET, alpha=0.25, linewidth=0.5)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def _plain(name: Any) -> str:
    """A name of the user's as a label: two dollars would make a formula of it."""
    return str(name).replace("$", r"\$")


def _scale(objective: str) -> float:
    return 100.0 if objective == "accuracy" else 1.0


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return trained(study.get_trials(deepcopy=False))


def confirmation_figure(rows: Sequence[tuple[str, Sequence[Interval | None]]]) -> Any:
    """Search, fresh seeds and test of each winner by name, with intervals."""
    figure, (ax,) = _axes(4.8, 1.2 + 0.4 * len(rows))
    marks = {"search seeds, validation": "o", "fresh seeds, validation": "s", "fresh, test": "D"}
    for y, (_, intervals) in enumerate(rows):
        for i, (one, (label, mark)) in enumerate(zip(intervals, marks.items(), strict=True)):
            if one is None:
                continue
            place, colour = y + 0.2 * (i - 1), figures.COLOURS[i]
            if not one.why:
                ax.plot([100 * one.low, 100 * one.high], [place] * 2, color=colour, linewidth=1.6)
            shown = label if y == 0 else None
            ax.plot([100 * one.mean], [place], mark, color=colour, markersize=5, label=shown)
    labels = ["\n".join(textwrap.wrap(_plain(name), 20)) for name, _ in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("top-1, % (line: 95 % interval)")
    figures.legend(figure)
    return figure


def history_figure(arms: Arms, settings: Settings) -> Any:
    """Value of each trial in order, and the best so far."""
    figure, (ax,) = _axes(4.8, 2.9)
    objective = settings.objectives[0]
    scale = _scale(objective)
    pick = max if OBJECTIVES[objective] == "maximize" else min
    for i, (arm, study) in enumerate(arms.items()):
        style, trials = figures.look(i), study.get_trials(deepcopy=False)
        firsts = [t.number for t in trials if original(t) == t.number]
        rank = {number: j for j, number in enumerate(firsts, 1)}
        done = _complete(study)
        stopped = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
        xs = [rank[original(t)] for t in done]
        ys = [scale * t.values[0] for t in done]
        best = [pick(ys[: j + 1]) for j in range(len(ys))]
        ax.plot(xs, ys, "o", color=style["color"], markersize=4, alpha=0.75)
        ax.step(xs, best, where="post", linewidth=1.6, label=_plain(arm), **style)
        xs = [rank[original(t)] for t in stopped]
        ys = [scale * list(t.intermediate_values.values())[-1] for t in stopped]
        ax.plot(xs, ys, "x", color=style["color"], markersize=4, alpha=0.45)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("trial")
    ax.set_ylabel(UNITS[objective])
    figures.legend(figure)
    return figure


def importances(study: optuna.Study) -> dict[str, float]:
    """What each parameter has to do with good values of the first objective, summing to one; empty
    for less than eight complete trials of a finite value.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    complete = [trial for trial in complete if math.isfinite(trial.values[0])]
    if len(complete) < 8 or not complete[0].params:
        return {}
    # PED-ANOVA asks what brings low values, and warns of that whatever it is given
    sign = -1.0 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1.0
    if len({trial.values[0] for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PedAnova", UserWarning)
        return optuna.importance.get_param_importances(
            study, target=lambda trial: sign * trial.values[0]
        )


def importance_figure(values: Mapping[str, float], colour: str) -> Any:
    """The importance of each parameter as a bar."""
    figure, (ax,) = _axes(3.3, 0.8 + 0.28 * len(values))
    names = list(values)[::-1]
    ax.barh(list(map(_plain, names)), [values[name] for name in names], color=colour, height=0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the importance")
    return figure


def slice_figure(study: optuna.Study, settings: Settings) -> Any:
    """The first objective against each parameter of an arm; None where it has none."""
    complete = _complete(study)
    names = list(dict.fromkeys(name for trial in complete for name in trial.params))
    if len(complete) < 3 or not names:
        return None
    scale = _scale(settings.objectives[0])
    figure, axes = _axes(2.1 * len(names) + 0.6, 2.4, len(names))
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        own = [trial for trial in complete if name in trial.params]
        values = [trial.params[name] for trial in own]
        ys = [scale * trial.values[0] for trial in own]
        numbers = all(schema.fits(value, float) for value in values)
        labels = [] if numbers else sorted(set(map(str, values)))
        xs = [labels.index(str(value)) if labels else value for value in values]
        ax.plot(xs, ys, "o", color=figures.COLOURS[0], markersize=4, alpha=0.6)
        groups = collections.defaultdict(list)
        for x, y in zip(xs, ys, strict=True):
            groups[x].append(y)
        if len(groups) <= 12 and not isinstance(values[0], float):
            means = sorted((x, statistics.fmean(group)) for x, group in groups.items())
            style = "_" if labels else "-"
            ax.plot(*zip(*means, strict=True), style, color=figures.COLOURS[1], markersize=22)
        if getattr(own[-1].distributions[name], "log", False):
            ax.set_xscale("log")
            low, high = min(xs), max(xs)
            ticks = sorted({low, high}) if high < 4 * low else [low, (low * high) ** 0.5, high]
            whole = isinstance(values[0], int)
            ax.set_xticks(ticks, [f"{x:.0f}" if whole else f"{x:.2g}" for x in ticks])
            ax.set_xticks([], minor=True)
        if labels:
            ax.set_xticks(range(len(labels)), list(map(_plain, labels)))
            ax.set_xlim(-0.6, len(labels) - 0.4)
        ax.set_xlabel(_plain(name), fontsize=8)
        if i:
            ax.set_yticklabels([])
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    axes[0].set_ylabel(UNITS[settings.objectives[0]], fontsize=8)
    return figure


def pareto_figure(arms: Arms, settings: Settings) -> Any:
    """The first objective against each other one, with the front."""
    first, *others = settings.objectives
    figure, axes = _axes(4.2 * len(others), 3.2, len(others))
    for column, (ax, name) in enumerate(zip(axes, others, strict=True), 1):
        for i, (arm, study) in enumerate(arms.items()):
            front = sorted(trained(study.best_trials), key=lambda t: t.values[column])
            for trials, style in (
                (_complete(study), {"color": figures.COLOURS[i % 6], "ls": "", "alpha": 0.5}),
                (front, {**figures.look(i), "label": f"{_plain(arm)}: front"}),
            ):
                xs = [_scale(name) * t.values[column] for t in trials]
                ys = [_scale(first) * t.values[0] for t in trials]
                ax.plot(xs, ys, marker="o", markersize=4, **style)
        ax.set_xlabel(UNITS[name])
        ax.set_ylabel(UNITS[first])
    figures.legend(figure)
    return figure
