"""The report of a study: one self-contained HTML page, and a CSV with a row a trial."""

import collections
import csv
import html
import io
import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from kart import checkpoint
from kart.search.storage import Settings, original
from kart.search.trials import OBJECTIVES
from kart.search.work import (
    Candidate,
    Confirmed,
    best_confirmed,
    candidates,
    confirmed,
    interval,
    paired_difference,
    winners,
)

Arms = Mapping[str, optuna.Study]
COLOURS = ("#5b6472", "#c2410c", "#1d6fb8", "#2f855a", "#8b5cf6", "#b7791f", "#be185d", "#0e7490")
UNITS = {
    "accuracy": "validation top-1, %",
    "parameters": "parameters",
    "flops": "FLOPs an image",
    "memory": "training memory, MiB",
    "step_time": "ms a seed and step",
}
TOP = 8

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; } p.note { color: #5b6472; font-size: .88rem; }
table { border-collapse: collapse; font-size: .86rem; margin: .4rem 0; }
th, td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid #e3e7ec;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #5b6472; font-weight: 600; }
th:first-child, td:first-child, th.text { text-align: left; }
td { vertical-align: top; } td.text { text-align: left; white-space: normal; min-width: 13rem; }
.wide { overflow-x: auto; }
code, pre { font: .84rem/1.45 ui-monospace, monospace; background: #f4f6f8; border-radius: 3px; }
code { padding: .1rem .25rem; }
pre { padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; }
small { color: #5b6472; font-size: .78rem; } details { margin: 1rem 0; }
svg { max-width: 100%; height: auto; display: block; margin: .3rem 0; }
"""


def describe(params: Mapping[str, Any]) -> str:
    """Parameters of a trial in a few characters: `grid 3, rank 12`."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    )


def percent(value: float, digits: int = 2) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.{digits}f}"


def with_interval(values: Sequence[float], template: str = "{} [{}, {}]") -> str:
    """Mean and 95 % interval in per cent, `97.12 [96.80, 97.44]`."""
    if not values:
        return "-"
    mean, low, high = interval(values)
    return percent(mean) if len(values) < 2 else template.format(*map(percent, (mean, low, high)))


class Markup(str):
    """Text that is HTML already."""


def _two_lines(values: Sequence[float]) -> Markup:
    return Markup(with_interval(values, "{}<br><small>[{}, {}]</small>"))


def results(arms: Arms) -> dict[str, Confirmed]:
    """The confirmed best of each arm that has one."""
    found = {arm: best_confirmed(study) for arm, study in arms.items()}
    return {arm: one for arm, one in found.items() if one is not None}


# figures


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e8ebef", linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, list(axes)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    text = io.StringIO()
    # ids are hashed with the salt: without it those of two figures in one page collide
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _colours(arms: Iterable[str]) -> dict[str, str]:
    return {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}


def confirmation_figure(arms: Arms) -> str:
    """Search, fresh seeds and test of each arm's winner, with intervals."""
    rows = [(arm, one) for arm, one in results(arms).items() if one.val]
    figure, (ax,) = _figure(8.4, 0.9 + 0.48 * len(rows))
    marks = {"search seeds, validation": "o", "fresh seeds, validation": "s", "fresh, test": "D"}
    shades = ("#9aa5b4", "#1d6fb8", "#c2410c")
    for row, (_, one) in enumerate(rows):
        groups = (one.search, list(one.val.values()), list(one.test.values()))
        for i, (values, (label, mark)) in enumerate(zip(groups, marks.items(), strict=True)):
            mean, low, high = (100 * x for x in interval(values))
            y = row + 0.2 * (i - 1)
            if len(values) > 1:
                ax.plot([low, high], [y, y], color=shades[i], linewidth=1.6)
            shown = label if row == 0 else None
            ax.plot([mean], [y], mark, color=shades[i], markersize=5, label=shown)
    ax.set_yticks(range(len(rows)), [arm for arm, _ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("top-1, % (95 % interval over seeds)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=8, frameon=False)
    return _svg(figure, "confirmation")


def history_figure(arms: Arms, settings: Settings) -> str:
    """Value of each trial in order, and the best so far."""
    figure, (ax,) = _figure(8.4, 3.0)
    maximize = OBJECTIVES[settings.objectives[0]] == "maximize"
    scale = 100 if settings.objectives[0] == "accuracy" else 1
    for (arm, study), colour in zip(arms.items(), _colours(arms).values(), strict=True):
        rank = {t.number: i + 1 for i, t in enumerate(_originals(study))}
        done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        stopped = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.state == TrialState.PRUNED and t.intermediate_values
        ]
        xs = [rank[original(t)] for t in done]
        ys = [scale * t.values[0] for t in done]
        pick = max if maximize else min
        best = [pick(ys[: i + 1]) for i in range(len(ys))]
        ax.plot(xs, ys, "o", color=colour, markersize=4, alpha=0.75)
        ax.step(xs, best, where="post", color=colour, linewidth=1.6, label=arm)
        ax.plot(
            [rank[original(t)] for t in stopped],
            [scale * list(t.intermediate_values.values())[-1] for t in stopped],
            "x",
            color=colour,
            markersize=4,
            alpha=0.45,
        )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("trial (x: stopped early, at its last value)")
    ax.set_ylabel(UNITS[settings.objectives[0]])
    ax.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    return _svg(figure, "history")


def _originals(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if original(t) == t.number]


def importances(study: optuna.Study) -> dict[str, float]:
    """What each parameter has to do with good values of the first objective, summing to one; empty
    for less than eight complete trials.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
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


def importance_figure(arms: Arms) -> str:
    """Importance of each parameter for the first objective, an arm a panel; "" if not known."""
    found = {arm: values for arm, study in arms.items() if (values := importances(study))}
    found = dict(list(found.items())[:4])
    if not found:
        return ""
    rows = max(len(values) for values in found.values())
    figure, axes = _figure(8.4, 1.0 + 0.3 * rows, len(found))
    for ax, (arm, values), colour in zip(axes, found.items(), COLOURS, strict=False):
        names = list(values)[::-1]
        ax.barh(names, [values[name] for name in names], color=colour, height=0.6)
        ax.set_title(arm, fontsize=9)
        ax.set_xlim(0, 1)
        ax.tick_params(labelsize=8)
    return _svg(figure, "importance")


def slice_figure(arm: str, study: optuna.Study, settings: Settings) -> str:
    """The first objective against each parameter of an arm; "" where it has none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = list(dict.fromkeys(name for trial in complete for name in trial.params))
    if len(complete) < 3 or not names:
        return ""
    scale = 100 if settings.objectives[0] == "accuracy" else 1
    figure, axes = _figure(min(10.0, 2.1 * len(names) + 0.6), 2.4, len(names))
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        own = [trial for trial in complete if name in trial.params]
        values = [trial.params[name] for trial in own]
        ys = [scale * trial.values[0] for trial in own]
        labels = sorted(set(values), key=str) if isinstance(values[0], str | bool) else []
        xs = [labels.index(value) if labels else value for value in values]
        ax.plot(xs, ys, "o", color="#1d6fb8", markersize=4, alpha=0.6)
        groups = collections.defaultdict(list)
        for x, y in zip(xs, ys, strict=True):
            groups[x].append(y)
        if len(groups) <= 12 and not isinstance(values[0], float):
            means = sorted((x, statistics.fmean(group)) for x, group in groups.items())
            style = "_" if labels else "-"
            ax.plot(*zip(*means, strict=True), style, color="#c2410c", markersize=22)
        if getattr(own[-1].distributions[name], "log", False):
            ax.set_xscale("log")
            low, high = min(xs), max(xs)
            ticks = sorted({low, high}) if high < 4 * low else [low, (low * high) ** 0.5, high]
            whole = isinstance(values[0], int)
            ax.set_xticks(ticks, [f"{x:.0f}" if whole else f"{x:.1g}" for x in ticks])
            ax.set_xticks([], minor=True)
        if labels:
            ax.set_xticks(range(len(labels)), [str(label) for label in labels], fontsize=8)
            ax.set_xlim(-0.6, len(labels) - 0.4)
        ax.set_xlabel(name, fontsize=9)
        ax.tick_params(labelsize=8)
        if i:
            ax.set_yticklabels([])
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
    axes[0].set_ylabel(UNITS[settings.objectives[0]], fontsize=9)
    return _svg(figure, f"slices {arm}")


def pareto_figure(arms: Arms, settings: Settings) -> str:
    """The first objective against each other one, with the front."""
    others = settings.objectives[1:]
    figure, axes = _figure(4.2 * len(others), 3.2, len(others))
    scales = [100 if name == "accuracy" else 1 for name in settings.objectives]
    for column, (ax, name) in enumerate(zip(axes, others, strict=True), 1):
        for (arm, study), colour in zip(arms.items(), _colours(arms).values(), strict=True):
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            front = sorted(study.best_trials, key=lambda t: t.values[column])
            xs = [scales[column] * t.values[column] for t in done]
            ax.plot(xs, [scales[0] * t.values[0] for t in done], "o", color=colour, ms=4, alpha=0.5)
            xs = [scales[column] * t.values[column] for t in front]
            ys = [scales[0] * t.values[0] for t in front]
            ax.plot(xs, ys, "-o", color=colour, markersize=5, label=f"{arm}: front")
        ax.set_xlabel(UNITS[name])
        ax.set_ylabel(UNITS[settings.objectives[0]])
        ax.legend(fontsize=8, frameon=False)
    return _svg(figure, "pareto")


# tables


def _cell(value: Any, text: bool = False) -> str:
    shown = value if isinstance(value, Markup) else html.escape(str(value))
    return f'<td class="text">{shown}</td>' if text else f"<td>{shown}</td>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[int] = ()) -> str:
    """An HTML table; the columns in `text` are words."""
    head = "".join(
        f'<th class="text">{html.escape(name)}</th>'
        if i in text
        else f"<th>{html.escape(name)}</th>"
        for i, name in enumerate(header)
    )
    body = "".join(
        "<tr>" + "".join(_cell(value, i in text) for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def result_rows(arms: Arms) -> list[dict[str, Any]]:
    """What each arm's winner is worth: the numbers of the report's first table."""
    base = next(iter(arms))
    reference = best_confirmed(arms[base])
    rows = []
    for arm, study in arms.items():
        stored = confirmed(study)
        for one in winners(study):
            fresh = stored.get(one.key)
            row: dict[str, Any] = {
                "arm": arm,
                "configuration": describe(one.trial.params) or "nothing to choose",
                "operator": one.config["operator"],
                "parameters": one.trial.user_attrs["cost"]["parameters"],
                "search": list(one.scores.values()),
                "val": list(fresh.val.values()) if fresh else [],
                "test": list(fresh.test.values()) if fresh else [],
                "diverged": fresh.diverged if fresh else [],
                "difference": [],
            }
            if fresh and reference and arm != base:
                row["difference"] = paired_difference(fresh.test, reference.test)
            rows.append(row)
    return rows


def _results(arms: Arms) -> str:
    header = ["arm", "best found", "parameters", "search: val", "fresh seeds: val", "test"]
    header += ["n", "search - fresh", "test - baseline"]
    cells = []
    for row in result_rows(arms):
        optimism = "-"
        if row["val"]:
            optimism = percent(statistics.fmean(row["search"]) - statistics.fmean(row["val"]))
        operator = row["operator"]
        if not isinstance(operator, str):  # one a block
            operator = " | ".join(operator)
        best = f"<code>{html.escape(operator)}</code><br>{html.escape(row['configuration'])}"
        n = f"{len(row['search'])}, {len(row['test'])}" if row["test"] else len(row["search"])
        bad = f"<br>{len(row['diverged'])} diverged" if row["diverged"] else ""
        cells.append(
            [
                row["arm"],
                Markup(best),
                f"{row['parameters']:,.0f}",
                _two_lines(row["search"]),
                _two_lines(row["val"]),
                _two_lines(row["test"]),
                Markup(f"{n}{bad}"),
                optimism,
                _two_lines(row["difference"]),
            ]
        )
    return table(header, cells, text=(1,))


def _top(found: Sequence[Candidate]) -> str:
    names = list(dict.fromkeys(name for one in found for name in one.trial.params))
    rows = []
    for one in found[:TOP]:
        params = [one.trial.params.get(name, "") for name in names]
        shown = [f"{value:.3g}" if isinstance(value, float) else value for value in params]
        cost = one.trial.user_attrs["cost"]
        rows.append(
            [
                one.trial.number,
                *shown,
                with_interval(list(one.scores.values())),
                len(one.scores),
                f"{cost['parameters']:,.0f}",
                f"{cost['flops'] / 1e6:.2f}",
            ]
        )
    header = ["trial", *names, "val top-1, % [95 %]", "n", "parameters", "MFLOPs an image"]
    return table(header, rows)


def reason_kind(reason: str) -> str:
    """The kind of a reason for pruning."""
    for kind in ("pruner", "diverged", "memory", "limit"):
        if kind in reason:
            return {"limit": "over a limit", "memory": "out of memory"}.get(kind, kind)
    return "other"


def tally(study: optuna.Study) -> dict[str, float]:
    """Counts of an arm's trials, and what they cost."""
    trials = study.get_trials(deepcopy=False)
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    kinds = collections.Counter(reason_kind(t.user_attrs.get("reason", "")) for t in pruned)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    failed = [t for t in trials if t.state == TrialState.FAIL]
    lost = sum(t.duration.total_seconds() for t in failed if t.duration is not None)
    spent = [t.user_attrs.get("spent", {}) for t in trials if t.state != TrialState.FAIL]
    return {
        "complete": len(complete),
        "stopped early": kinds["pruner"],
        "diverged": kinds["diverged"],
        "out of memory": kinds["out of memory"],
        "over a limit": kinds["over a limit"],
        "retried": sum(original(t) != t.number for t in trials),
        "lost for good": len(failed) - sum(original(t) != t.number for t in trials),
        "repeats": sum(t.user_attrs["n"] > len(t.user_attrs["scores"]) for t in complete),
        "epochs of one seed": sum(one.get("epochs", 0) for one in spent),
        "minutes": round(sum(one.get("seconds", 0.0) for one in spent) / 60, 1),
        "minutes lost": round(lost / 60, 1),
        "minutes to confirm": round(sum(c.seconds for c in confirmed(study).values()) / 60, 1),
    }


# the page


def rerun(settings: Settings, where: str) -> str:
    """How to go on with the study and to look at it."""
    return f"""\
kart study run {settings.study} {where} ...   # the same command goes on where it stopped
kart study report {where}        # writes this page again
pip install optuna-dashboard; optuna-dashboard sqlite:///DIR/study.db   # or the URL of the server
"""


def page(
    arms: Arms,
    settings: Settings,
    question: str,
    where: str,
    answer: Callable[[Mapping[str, Any]], str] | None = None,
) -> str:
    """The report as one HTML page that needs nothing else."""
    title, _, rest = question.partition("\n")
    is_confirmed = bool(results(arms))
    parts = [f"<h1>{html.escape(title or settings.study)}</h1>"]
    unit = "seed" if settings.seeds == 1 else "seeds"
    parts.append(
        f"<p>Study <code>{html.escape(settings.study)}</code>: {len(arms)} arms, "
        f"{settings.per_arm} trials each, {settings.seeds} {unit} a trial, "
        f"{settings.config['epochs']} epochs, data "
        f"{html.escape(Path(settings.config['data']).name)} "
        f"({settings.dataset['train']:,} training and {settings.dataset['val']:,} validation "
        f"images), sampler {settings.sampler}, pruner {settings.pruner}.</p>"
    )
    parts.append("<h2>What the search found, and what it is worth</h2>")
    if answer is not None and is_confirmed:
        parts.append(f"<pre>{html.escape(answer(results(arms)))}</pre>")
    parts.append(_results(arms))
    if is_confirmed:
        parts.append(
            '<p class="note">Top-1 in per cent, mean and 95 % interval (Student) over seeds. '
            "The search chose by the first number; the winners were then trained again with fresh "
            "seeds, the same for every arm, and scored once on the test split. "
            'n: seeds of the search, fresh seeds. "search - fresh" is the optimism of searching; '
            "the last column pairs seeds with the first arm's.</p>"
        )
        readings = {arm: len(confirmed(study)) for arm, study in arms.items()}
        if max(readings.values()) > 1:
            shown = ", ".join(f"{arm} {count}" for arm, count in readings.items())
            parts.append(
                '<p class="note">Configurations that have been scored on the test split, earlier '
                f"winners of this study included: {html.escape(shown)}.</p>"
            )
        parts.append(confirmation_figure(arms))
    else:
        parts.append(
            '<p class="note">Not confirmed yet: the search chose these, so they look better than '
            f"they are. <code>kart study report {html.escape(where)} --confirm "
            f"{settings.confirm or 5}</code> trains them again with fresh seeds.</p>"
        )
    if len(settings.objectives) > 1:
        parts += ["<h2>Accuracy against cost</h2>", pareto_figure(arms, settings)]
    if any(candidates(study) for study in arms.values()):
        parts += ["<h2>History</h2>", history_figure(arms, settings)]
    importances = importance_figure(arms)
    if importances:
        parts += [
            "<h2>What matters most</h2>",
            importances,
            '<p class="note">Importance of each parameter for the value (PED-ANOVA over the '
            "complete trials, summing to one). With few trials it is a hint, no more.</p>",
        ]
    for arm, study in arms.items():
        shown = candidates(study)
        if shown:
            parts.append(f"<h2>{html.escape(arm)}: best configurations</h2>")
            parts.append(_top(shown))
        figure = slice_figure(arm, study, settings)
        if figure:
            parts.append(figure)
            parts.append(
                '<p class="note">Each complete trial against each parameter; the others vary too. '
                "Lines and dashes are means.</p>"
            )
    tallies = {arm: tally(study) for arm, study in arms.items()}
    parts.append("<h2>Trials and compute</h2>")
    names = list(next(iter(tallies.values())))
    parts.append(
        table(["", *tallies], [[n, *(f"{t[n]:g}" for t in tallies.values())] for n in names])
    )
    parts.append("<h2>How it was run</h2>")
    parts.append(f"<pre>{html.escape(rerun(settings, where))}</pre>")
    if rest.strip():
        parts.append(f"<pre>{html.escape(rest.strip())}</pre>")
    stored = json.dumps(settings.asdict(), indent=1)
    parts.append(
        f"<details><summary>All settings</summary><pre>{html.escape(stored)}</pre></details>"
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(settings.study)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def rows(arms: Arms) -> list[dict[str, Any]]:
    """One row a trial, for the CSV."""
    found = []
    for arm, study in arms.items():
        for trial in study.get_trials(deepcopy=False):
            attrs = trial.user_attrs
            scores = attrs.get("scores", {})
            found.append(
                {
                    "arm": arm,
                    "trial": trial.number,
                    "retry_of": original(trial) if original(trial) != trial.number else "",
                    "state": trial.state.name.lower(),
                    "reason": attrs.get("reason", ""),
                    "values": " ".join(f"{v:.6g}" for v in trial.values or []),
                    "standard_error": attrs.get("standard_error"),
                    "n": attrs.get("n"),
                    "key": attrs.get("key"),
                    **{f"param.{name}": value for name, value in trial.params.items()},
                    **{f"cost.{k}": f"{v:.6g}" for k, v in attrs.get("cost", {}).items()},
                    "seconds": attrs.get("spent", {}).get("seconds"),
                    "epochs": attrs.get("spent", {}).get("epochs"),
                    "scores": " ".join(f"{seed}:{v:.6f}" for seed, v in scores.items()),
                }
            )
    return found


def write(
    directory: Path,
    arms: Arms,
    settings: Settings,
    question: str,
    where: str,
    answer: Callable[[Mapping[str, Confirmed]], str] | None = None,
) -> tuple[Path, Path]:
    """Writes `report.html` and `trials.csv` into a directory; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    found = rows(arms)
    columns = list(dict.fromkeys(name for row in found for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(found)
    paths = directory / "report.html", directory / "trials.csv"
    checkpoint.write_text(paths[0], page(arms, settings, question, where, answer))
    checkpoint.write_text(paths[1], text.getvalue())
    return paths
