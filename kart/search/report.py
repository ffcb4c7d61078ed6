"""The report of a study: one self-contained HTML page, and a CSV with a row a trial."""

import collections
import csv
import io
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from kart import checkpoint, operators, pages, schema, statistics
from kart.analysis import figures
from kart.search import plots
from kart.search.storage import Arms, Settings, directory_url, original
from kart.search.trials import trained
from kart.search.work import Candidate, Confirmed, best_confirmed, candidates, confirmed, winners
from kart.statistics import Interval

TOP = 8


class View(NamedTuple):
    """What the sections of the page are made of; `where` are the flags that name the study's home,
    quoted for a shell, `directory` holds the page, `answer` is what the study concludes.
    """

    arms: Arms
    settings: Settings
    where: str
    directory: Path
    answer: str | None = None


def _end(value: Any, searched: BaseDistribution) -> str:
    """Which end of what was searched a number is at, as in `ENDS`."""
    if isinstance(searched, FloatDistribution | IntDistribution):
        places = searched.low, value, searched.high
    else:
        assert isinstance(searched, CategoricalDistribution)
        numbers: list[Any] = [x for x in searched.choices if schema.fits(x, float)]
        if len(numbers) < len(searched.choices):
            return ""
        places = min(numbers), value, max(numbers)
    if searched.single():
        return ""
    if getattr(searched, "log", False):
        places = map(math.log, places)
    low, place, high = places
    drawn = isinstance(searched, FloatDistribution) and searched.step is None
    near = 0.05 * (high - low) if drawn else 0.0
    return " (lower end)" * (place <= low + near) or " (upper end)" * (place >= high - near)


ENDS = (
    "Lower, upper end: of what was searched, or within a twentieth of it; better ones may lie "
    "beyond."
)


def describe(trial: FrozenTrial) -> str:
    """Parameters of a trial in a few characters: `grid 3, rank 12 (upper end)`."""
    shown = [
        (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
        + _end(value, trial.distributions[name])
        for name, value in trial.params.items()
    ]
    return ", ".join(shown) or "nothing to choose"


def results(arms: Arms) -> dict[str, Confirmed]:
    """The confirmed best of each arm that has one."""
    found = {arm: best_confirmed(study) for arm, study in arms.items()}
    return {arm: one for arm, one in found.items() if one is not None}


class Row(NamedTuple):
    """What an arm's winner is worth; accuracies over seeds, None where there are none."""

    arm: str
    best: Candidate
    search: Interval
    val: Interval | None
    test: Interval | None
    difference: Interval | None  # to the first arm's test accuracy, seed by seed
    diverged: int


def result_rows(arms: Arms, settings: Settings) -> list[Row]:
    """The rows of the report's first table."""

    def interval(values: Mapping[int, float], images: int | None) -> Interval | None:
        return statistics.accuracy(list(values.values()), images) if values else None

    images = settings.dataset["val"]
    base = next(iter(arms))
    reference = best_confirmed(arms[base])
    rows = []
    for arm, study in arms.items():
        stored = confirmed(study)
        for best in winners(study):
            search = statistics.accuracy(list(best.scores.values()), images)
            fresh = stored.get(best.key)
            if fresh is None:
                rows.append(Row(arm, best, search, None, None, None, 0))
                continue
            gains = statistics.pairs(fresh.test, reference.test) if reference else []
            difference = None
            if gains and arm != base:
                difference = statistics.interval(gains, low=-1.0, high=1.0)
            val, test = interval(fresh.val, images), interval(fresh.test, fresh.images)
            rows.append(Row(arm, best, search, val, test, difference, len(fresh.diverged)))
    return rows


def lines(arms: Arms, settings: Settings) -> list[str]:
    """The best of each arm in a line of text, or why it has none."""
    found: dict[str, list[str]] = {arm: [] for arm in arms}
    for row in result_rows(arms, settings):
        parts = {"search": row.search, "fresh seeds": row.val, "test": row.test}
        shown = ", ".join(f"{name} {one.text()}" for name, one in parts.items() if one)
        bad = f"; {row.diverged} of the fresh seeds diverged" if row.diverged else ""
        found[row.arm].append(f"{row.arm}: {describe(row.best.trial)}: {shown} %{bad}")
    for arm, study in arms.items():
        if not found[arm]:
            found[arm].append(f"{arm}: no value yet, {_why_none(study)}")
    return [line for of_arm in found.values() for line in of_arm]


def _why_none(study: optuna.Study) -> str:
    trials = study.get_trials(deepcopy=False)
    states = collections.Counter(trial.state.name.lower() for trial in trials)
    told = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none"
    reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
    return f"of its trials {told}" + (f"; the last {reasons[-1]}" if reasons else "")


# the sections


def _two_lines(found: Interval | None, sign: str = "") -> str:
    """An interval below its mean, which makes a narrow column."""
    if found is None:
        return "-"
    mean, _, rest = found.text(sign=sign).partition(" ")
    return pages.Markup(f"{mean}<br>{pages.tag('small', rest)}")


def _outcome(view: View) -> pages.Section:
    rows = result_rows(view.arms, view.settings)
    done = results(view.arms)
    header = ["arm", "test", "test - baseline", "fresh seeds: val", "search: val", "n"]
    header += ["search - fresh", "parameters", "best found"]
    cells = []
    for row in rows:
        operator = operators.shown(row.best.config["operator"])
        params = describe(row.best.trial)
        n = f"{row.search.n}, {row.test.n}" if row.test else f"{row.search.n}"
        bad = pages.Markup(f"<br>{row.diverged} diverged") if row.diverged else ""
        optimism = f"{100 * (row.search.mean - row.val.mean):.2f}" if row.val else "-"
        cells.append(
            [
                row.arm,
                _two_lines(row.test),
                _two_lines(row.difference, "+"),
                _two_lines(row.val),
                _two_lines(row.search),
                pages.Markup(n + bad),
                optimism,
                f"{row.best.trial.user_attrs['cost']['parameters']:,.0f}",
                # long ones break between blocks, and are copied as they are
                pages.Markup(
                    pages.tag("code", operator).replace("|", "|<wbr>")
                    + f"<br>{pages.escape(params)}"
                ),
            ]
        )
    blocks: list[str] = []
    if view.answer is not None and done:
        blocks.append(pages.code(view.answer))
    # a column that nothing fills, as before winners are confirmed, would push others off a phone
    filled = [i for i in range(len(header)) if not cells or any(row[i] != "-" for row in cells)]
    shown = [[row[i] for i in filled] for row in cells]
    blocks.append(pages.table([header[i] for i in filled], shown, words=(len(filled) - 1,)))
    if any(" end)" in describe(row.best.trial) for row in rows):
        blocks.append(pages.note(ENDS))
    if not done:
        command = _command("report", view, "--confirm", str(view.settings.confirm or 5))
        told = (
            "Not confirmed yet: the search chose these, so they look better than they are. This "
            "trains them again with fresh seeds:"
        )
        blocks += [pages.warning(told), pages.code(command)]
    else:
        blocks.append(
            pages.note(
                "Top-1 in per cent, mean and 95 % interval: Student's on the scale of the logit, "
                f"over seeds and the choice of the images; {statistics.FEW}. The search chose by "
                "its validation accuracy; the winners were then trained again with fresh seeds, "
                "the same for every arm, and scored once on the test split. n: seeds of the "
                'search, fresh seeds. "search - fresh" is the optimism of searching; "test - '
                "baseline\" pairs seeds with the first arm's, and its interval is over seeds alone."
            )
        )
        readings = {arm: len(confirmed(study)) for arm, study in view.arms.items()}
        if max(readings.values()) > 1:
            shown = ", ".join(f"{arm} {count}" for arm, count in readings.items())
            told = "Configurations that have been scored on the test split, earlier winners of "
            blocks.append(pages.note(f"{told}this study included: {shown}."))
        alt = "Accuracy of each arm's winner in search, with fresh seeds and on the test split"
        several = len({row.arm for row in rows}) < len(rows)
        shown = [
            (
                f"{row.arm}, trial {row.best.trial.number}" if several else row.arm,
                (row.search, row.val, row.test),
            )
            for row in rows
            if row.val
        ]
        if shown:
            blocks.append(pages.figure(plots.confirmation_figure(shown), "confirmation", alt))
    return pages.Section(blocks, title="What the search found, and what it is worth")


def _pareto(view: View) -> pages.Section | None:
    if len(view.settings.objectives) < 2:
        return None
    alt = "Every complete trial by its cost and accuracy, and the front of each arm"
    figure = pages.figure(plots.pareto_figure(view.arms, view.settings), "pareto", alt)
    return pages.Section([figure], title="Accuracy against cost")


def _history(view: View) -> pages.Section | None:
    if not any(map(candidates, view.arms.values())):
        return None
    alt = "Value of every trial in order, and the best so far, arm by arm"
    figure = pages.figure(plots.history_figure(view.arms, view.settings), "history", alt)
    told = "Dot: value of a trial. Line: the best so far. Cross: stopped early, its last value."
    return pages.Section([figure, pages.note(told)], title="History")


def _importance(view: View) -> pages.Section | None:
    shown = []
    for (arm, study), colour in zip(view.arms.items(), itertools.cycle(figures.COLOURS)):
        values = plots.importances(study)
        if values:
            alt = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            figure = plots.importance_figure(values, colour)
            shown.append(pages.figure(figure, f"importance-{len(shown)}", alt, arm))
    if not shown:
        return None
    told = (
        "Importance of each parameter for the value (PED-ANOVA over the complete trials, summing "
        "to one). With few trials it is a hint, no more."
    )
    return pages.Section([pages.beside(*shown), pages.note(told)], title="What matters most")


def _best(view: View, arm: str, study: optuna.Study) -> pages.Section | None:
    found = candidates(study)
    if not found:
        return None
    names = list(dict.fromkeys(name for one in found for name in one.trial.params))
    rows = []
    for one in found[:TOP]:
        params = [one.trial.params.get(name, "") for name in names]
        shown = [f"{value:.3g}" if isinstance(value, float) else value for value in params]
        cost = one.trial.user_attrs["cost"]
        scores = statistics.accuracy(list(one.scores.values()), view.settings.dataset["val"])
        numbers = [len(one.scores), *shown, f"{cost['parameters']:,.0f}"]
        number = f"{one.trial.number}"
        mflops = f"{cost['flops'] / 1e6:.2f}" if "flops" in cost else "not counted"
        rows.append([number, _two_lines(scores), *numbers, mflops])
    header = ["trial", "val top-1, %", "n", *names, "parameters", "MFLOPs an image"]
    blocks = [pages.table(header, rows, "Mean and 95 % interval, as above.")]
    figure = plots.slice_figure(study, view.settings)
    if figure is not None:
        told = (
            "Each complete trial against each parameter; the others vary too. Lines and dashes are "
            "means."
        )
        alt = f"{arm}: value of every trial against each parameter"
        blocks += [pages.figure(figure, f"slices-{arm}", alt), pages.note(told)]
    return pages.Section(blocks, title=f"{arm}: best configurations")


def _tally(view: View) -> pages.Section:
    tallies = {arm: tally(study) for arm, study in view.arms.items()}
    names = list(next(iter(tallies.values())))
    rows = [[name, *(f"{one[name]:g}" for one in tallies.values())] for name in names]
    return pages.Section([pages.table(["", *tallies], rows)], title="Trials and compute")


def _command(name: str, view: View, *flags: str) -> str:
    """A command of `kart study` on this study that runs when it is pasted."""
    if name == "report" and not view.where.startswith("--out"):
        flags = ("--out", str(view.directory), *flags)
    # its code runs where the command line names it, and nowhere else
    where = view.where
    if name == "work":
        home = shlex.join(shlex.split(where)[-2:])
        where = f"{shlex.quote(view.settings.named)} {home}"
    return " ".join(["kart study", name, where, *map(shlex.quote, flags)])


def rerun(view: View) -> str:
    """How to go on with the study and to look at it."""
    found = {
        _command("work", view): "goes on where it stopped",
        _command("report", view): "writes this page again",
    }
    if view.where.startswith("--out"):
        url = directory_url(Path(shlex.split(view.where)[1]))
        found[f"optuna-dashboard {shlex.quote(url)}"] = "after: pip install optuna-dashboard"
    width = max(map(len, found))
    return "\n".join(f"{command:{width}}  # {why}" for command, why in found.items())


def _how(view: View) -> pages.Section:
    rest = view.settings.question.partition("\n")[2].strip()
    blocks = [pages.code(rerun(view)), *([pages.code(rest)] if rest else [])]
    stored = json.dumps(view.settings.asdict(), indent=1)
    return pages.Section(
        [*blocks, pages.details("All settings", pages.code(stored))], title="How it was run"
    )


def sections(view: View) -> Iterator[pages.Section]:
    """The sections of the page, those that have something to show."""
    made = [_outcome(view), _pareto(view), _history(view), _importance(view)]
    made += [_best(view, arm, study) for arm, study in view.arms.items()]
    made += [_tally(view), _how(view)]
    yield from (one for one in made if one is not None)


def page(view: View) -> str:
    """The report as one HTML page that needs nothing else."""
    settings = view.settings

    def counted(count: int, unit: str) -> str:
        return f"{count} {unit}{'s' * (count != 1)}"

    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    counts = sorted(
        len(study.get_trials(deepcopy=False, states=ended)) for study in view.arms.values()
    )
    # those that there are: fewer than were asked for where a grid has fewer points, or so far
    trials = f"{counts[0]} to " * (counts[0] < counts[-1]) + counted(counts[-1], "trial")
    lead = (
        f"Study {settings.study}: {counted(len(view.arms), 'arm')}, "
        f"{trials} each, {counted(settings.seeds, 'seed')} a trial, "
        f"{counted(settings.config['epochs'], 'epoch')}, data "
        f"{Path(settings.config['data']).name} ({settings.dataset['train']:,} training and "
        f"{settings.dataset['val']:,} validation images), sampler {settings.sampler}, pruner "
        f"{settings.pruner}."
    )
    title = settings.question.partition("\n")[0] or settings.study
    return pages.page(title, sections(view), lead)


# how the reasons for pruning are told apart, in the order of the table
KINDS = {
    "stopped early": "stopped after epoch",
    "pruned by the space": "pruned by its space",
    "diverged": " seeds diverged, at step",
    "out of memory": "out of memory",
    "over a limit": "over the limit",
}


def reason_kind(reason: str) -> str:
    """The kind of a reason for pruning."""
    # what follows the colon may be the user's own
    words = reason.partition(":")[0]
    return next((kind for kind, mark in KINDS.items() if mark in words), "other")


def tally(study: optuna.Study) -> dict[str, float]:
    """Counts of an arm's trials, and what they cost."""
    trials = study.get_trials(deepcopy=False)
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    kinds = collections.Counter(reason_kind(t.user_attrs.get("reason", "")) for t in pruned)
    complete = trained(trials)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    lost = sum(t.duration.total_seconds() for t in failed if t.duration is not None)
    spent = [t.user_attrs.get("spent", {}) for t in trials if t.state != TrialState.FAIL]
    return {
        "complete": len(complete),
        **{kind: kinds[kind] for kind in KINDS},
        "added by hand": sum(t.state == TrialState.COMPLETE for t in trials) - len(complete),
        "retried": sum(original(t) != t.number for t in trials),
        "lost for good": len(failed) - sum(original(t) != t.number for t in trials),
        "repeats": sum(t.user_attrs["n"] > len(t.user_attrs["scores"]) for t in complete),
        "epochs of one seed": sum(one.get("epochs", 0) for one in spent),
        "minutes": round(sum(one.get("seconds", 0.0) for one in spent) / 60, 1),
        "minutes lost": round(lost / 60, 1),
        "minutes to confirm": round(sum(c.seconds for c in confirmed(study).values()) / 60, 1),
    }


# the table of trials


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


def write(view: View) -> tuple[Path, Path]:
    """Writes `report.html` and `trials.csv` into the directory of a view; returns their paths."""
    view.directory.mkdir(parents=True, exist_ok=True)
    found = rows(view.arms)
    columns = list(dict.fromkeys(name for row in found for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(found)
    paths = view.directory / "report.html", view.directory / "trials.csv"
    checkpoint.write_text(paths[0], page(view))
    checkpoint.write_text(paths[1], text.getvalue())
    return paths
