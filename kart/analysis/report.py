"""One page that takes trained runs apart, side by side: a list of sections, one file each.

    context = section.Context(results, splits)
    report.analyse(context, out="report.html", title="...", command="...")

Beside the page its numbers are written as JSON and CSV. What a section found is kept below `cache`,
named by the content it was found in, so a second call is quick and one that was killed goes on.
"""

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kart import checkpoint, pages, schema
from kart.analysis import (
    attention,
    cost,
    curvature,
    functions,
    landscape,
    mechanism,
    scores,
    spectra,
    training,
    weights,
)
from kart.analysis.section import Analysis, Context, OutOfTime, Result

# in the order of the page; to add an analysis, add its line
SECTIONS: tuple[Analysis, ...] = (
    scores.ANALYSIS,
    training.ANALYSIS,
    functions.ANALYSIS,
    attention.ANALYSIS,
    mechanism.ANALYSIS,
    spectra.ANALYSIS,
    weights.ANALYSIS,
    landscape.ANALYSIS,
    curvature.ANALYSIS,
    cost.ANALYSIS,
)


class Done(NamedTuple):
    """A section of a written page: what it shows, or in `problem` why there is nothing."""

    name: str
    section: pages.Section
    problem: str = ""


def select(names: Sequence[str]) -> tuple[Analysis, ...]:
    """The sections called `names`, in the order of the page."""
    known = [one.name for one in SECTIONS]
    for name in names:
        if name not in known:
            near = schema.near(name, known)
            raise ValueError(
                f"`sections` needs names among {', '.join(known)}, got {name!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    return tuple(one for one in SECTIONS if one.name in names)


def check_out(out: str | os.PathLike) -> None:
    """Raises ValueError unless a page can be written to `out`, with its numbers beside it: a name
    that ends in .html, beside which nothing but the numbers of an earlier page is replaced.
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"`report` needs a file that ends in .html, got {str(path)!r}. Rename it.")
    beside = path.with_suffix(".json")
    own = path.with_suffix(".csv")
    checkpoint.check_replaced("report", beside, lambda found: "sections" in found, own)


def analyse(
    context: Context,
    sections: Sequence[Analysis] = SECTIONS,
    minutes: float = float("inf"),
    out: str | os.PathLike = "report.html",
    *,
    title: str,
    command: str,
) -> list[Done]:
    """Computes `sections` of the results of `context`, and writes the page to `out`, whole or not
    at all, and its numbers beside it with the suffixes `.json` and `.csv`; see `check_out`.

    Args:
        sections: which, see `select`.
        minutes: for all slow sections together. Each may use its share of what is left, or its own
            limit where none are given; one that does not get done says so on the page.
        out: the page.
        title: its headline.
        command: what a reader would run to make it again.
    """
    results = context.results
    if not results:
        raise ValueError("`report` needs at least one result, got none. Train something first.")
    check_out(out)
    end = time.monotonic() + 60 * minutes
    done = [_run(one, context, _deadline(sections[i:], end)) for i, one in enumerate(sections)]
    configs = [config for result in results for config in result.configs]
    settings = {
        "title": title,
        "command": command,
        "members": [
            {"operator": result.name, "seeds": [config.seed for config in result.configs]}
            for result in results
        ],
        "config": dataclasses.asdict(configs[0]),
        "versions": checkpoint.versions(),
    }
    shown_sections = [*(one.section for one in done), _making(results, command, settings)]
    page = pages.page(title, shown_sections, _setting(context))
    found = {
        one.name: {"problem": one.problem, "numbers": one.section.asdict()["numbers"]}
        for one in done
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, ["section", *pages.Number._fields], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"section": name, **number} for name, one in found.items() for number in one["numbers"]
    )
    out = Path(out)
    numbers = json.dumps({**settings, "sections": found}, indent=1, allow_nan=False)
    checkpoint.write_text(out.with_suffix(".json"), numbers + "\n")
    checkpoint.write_text(out.with_suffix(".csv"), text.getvalue())
    checkpoint.write_text(out, page)
    return done


def measure(
    context: Context, sections: Sequence[Analysis], minutes: float, part: int, parts: int
) -> None:
    """Computes and keeps what `sections` need of every `parts`-th member, from `part` on: the work
    of one of `parts` processes, after which `analyse` finds all of it. `minutes` as there.
    """
    end = time.monotonic() + 60 * minutes
    slow = [one for one in sections if one.measure is not None]
    for i, one in enumerate(slow):
        own = _of(one, context, _deadline(slow[i:], end))
        if one.needs is not None and one.needs(own):
            continue
        try:
            for member in list(own.members())[part::parts]:
                assert one.measure is not None
                one.measure(own, member)
        except (ValueError, OutOfTime):
            continue  # `analyse` meets it again, and says so on the page


def _deadline(sections: Sequence[Analysis], end: float) -> float:
    """When the first of the sections to come should be done, for all to be done at `end`."""
    now, first = time.monotonic(), sections[0]
    if not first.minutes:
        return float("inf")
    if end == float("inf"):
        return now + 60 * first.minutes
    return now + (end - now) * first.minutes / sum(one.minutes for one in sections)


def _of(one: Analysis, context: Context, deadline: float) -> Context:
    return dataclasses.replace(context, name=one.name, version=one.version, deadline=deadline)


def _run(one: Analysis, context: Context, deadline: float) -> Done:
    """A section, read if it was kept, else computed and kept; its problem where it has one."""
    context = _of(one, context, deadline)
    missing = one.needs(context) if one.needs is not None else None
    if missing:
        return _problem(one, missing)
    path = None if context.cache is None else context.cache / f"{one.name}-{_key(context)}.json"
    if path is not None and path.exists():
        return Done(one.name, pages.Section.fromdict(json.loads(path.read_text(encoding="utf-8"))))
    context.say(f"{one.name} ...")
    try:
        found = one.section(context)
    except ValueError as error:
        return _problem(one, str(error))
    except OutOfTime:
        return _problem(one, "its minutes are used up. What it computed is kept: call it again.")
    stored = found._replace(title=one.title).asdict()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(stored) + "\n")
    return Done(one.name, pages.Section.fromdict(stored))


def _problem(one: Analysis, line: str) -> Done:
    line = " ".join(line.split())
    shown = [pages.warning(f"Not shown: {line}")]
    return Done(one.name, pages.Section(shown, title=one.title or one.name), line)


def _key(context: Context) -> str:
    """Twelve hex digits that name all that a section depends on."""
    parts: list[Any] = [context.data_key, context.version, checkpoint.versions()]
    parts += [context.shown, context.examples, context.points, context.retrain]
    for one in context.results:
        parts += [one.name, one.records, one.test, one.test_images, one.step_ms, one.epochs]
        parts += [one.diverged, one.lost]
    return schema.digest([*parts, *(member.key for member in context.members())])[:12]


def _setting(context: Context) -> str:
    config = context.results[0].configs[0]
    counts = sorted({len(result.configs) for result in context.results})
    seeds = " to ".join(dict.fromkeys(str(count) for count in (counts[0], counts[-1])))
    model = context.model(config)
    c, heads = model.config, ", ".join(dict.fromkeys(str(site.heads) for site in model.sites))
    window = "" if model.sites[0].cut is None else " a window"
    return (
        f"{os.path.basename(config.data)}, {len(context.splits.train.labels):,} training images of "
        f"{c.image_size} x {c.image_size}. {config.model}: {c.depth} block{'s' * (c.depth > 1)}, "
        f"{heads} heads, width {c.embed_dim}, patches of {c.patch_size}, {c.tokens} tokens{window}."
        f" {config.epochs} epochs in batches of {config.batch_size}, AdamW at "
        f"{config.peak_learning_rate:g} with warm-up and cosine, weight decay "
        f"{config.weight_decay:g}. {seeds} seed{'s' * (counts[-1] > 1)} each; all operators with "
        "the same recipe."
    )


def _making(results: Sequence[Result], command: str, settings: dict) -> pages.Section:
    rows = [
        [
            f"{result.name}, seed {config.seed}",
            f"{100 * last['val_top1']:.2f}",
            f"{last['val_loss']:.3f}",
            f"{last['train_loss']:.3f}",
            *([f"{100 * result.test[i]['top1']:.2f}"] if result.test else []),
        ]
        for result in results
        for i, (config, last) in enumerate(zip(result.configs, result.own_records, strict=True))
    ]
    last = all(result.epochs is None for result in results)
    caption = "After the last epoch." if last else "After the epoch whose weights are shown."
    header = ["run", "val top-1 %", "val loss", "train loss"]
    header += ["test top-1 %"] * (results[0].test is not None)
    blocks = [
        pages.code(command),
        pages.details("Every run", pages.table(header, rows, caption)),
        pages.details("Configuration and versions", pages.code(json.dumps(settings, indent=1))),
    ]
    return pages.Section(blocks, title="How this was made")
