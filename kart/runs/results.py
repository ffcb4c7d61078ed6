"""The runs below a directory: which there are, and what they say together."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kart import operators, population, train
from kart.runs import identity, records, weights
from kart.runs.names import OPTIONS, options_of
from kart.train import Config, Record

if TYPE_CHECKING:
    from kart.analysis import report


class _Member(NamedTuple):
    """A member of a run: its records by epoch, its weights and scores, the directory of the run,
    and which of the records is that of the weights.
    """

    config: Config
    epochs: list[Record]
    params: train.Params
    scores: Any
    home: Path
    at: int


def find(*paths: str) -> list[Path]:
    """The run directories at or below `paths`, in their order, those of one sorted."""
    every: dict[Path, None] = {}
    for path in paths:
        try:
            found = {config.parent for config in identity.place_of(path).glob("**/config.json")}
        except OSError:
            found = set[Path]()
        if not found:
            raise ValueError(
                "`run` needs a directory that `kart train` wrote, got "
                f"{str(path)!r:.200} without any config.json. Check the path."
            )
        every |= dict.fromkeys(sorted(found))
    return list(every)


def distinct(*paths: str) -> list[Path]:
    """The run directories at or below `paths`, the baseline's first, as every table has them; no
    two may hold the same run or member.
    """
    seen: dict[tuple[str, str], Path] = {}
    found: list[tuple[str, Path]] = []
    for directory in find(*paths):
        own = identity.read(directory)
        found.append((operators.shown(own.configs[0].operator), directory))
        for config in own.configs:
            # wherever the data lay and it was trained, and however its operator is written
            place: dict[str, Any] = {"data": "", "threads": None, "device": "cpu"}
            spec = place["operator"] = operators.shown(config.operator)
            name = (dataclasses.replace(config, **place).hash, own.data["fingerprint"]["train"])
            if name in seen:
                raise ValueError(
                    f"`run` needs different runs, got the same one, {spec} seed {config.seed}, in "
                    f"{str(seen[name])!r} and {str(directory)!r}. Remove the "
                    "copy: it would be counted twice."
                )
            seen[name] = directory
    return [directory for _, directory in sorted(found, key=baseline_first)]


def baseline_first(row: Sequence[Any]) -> bool:
    """The key that sorts rows which begin with the name of their operator: softmax first."""
    return row[0] != "softmax"


def compare(*paths: str, which: str = "last") -> "list[report.Result]":
    """The runs at or below `paths` as results, one an operator, with test scores where all have
    been scored by `kart eval`. Seeds that diverged are left out of them, and named, as are
    operators of which no seed is left.

    Raises ValueError for runs that differ in more than operator and seed, are unfinished, or were
    scored on other test images than one another.
    """
    from kart.analysis import report

    found: dict[str, list[_Member]] = {}
    diverged: dict[str, dict[int, int]] = {}
    images: dict[Any, tuple[int, Path]] = {}  # by what they are
    for directory in distinct(*paths):
        configs = identity.members(directory)
        metrics = records.read_metrics(directory)
        name, bad = operators.shown(configs[0].operator), records.diverged(directory)
        diverged.setdefault(name, {}).update(bad)
        if len(bad) == len(configs):
            continue
        records.check_finished(directory, metrics)
        epochs = [population.split_record(one, len(configs)) for one in metrics]
        stored = records.read_scores(directory, "test", which)
        scores: list[Any] = [None] * len(configs)
        if stored is not None:
            scores = stored["members"]
            images.setdefault(stored.get("fingerprint"), (stored["images"], directory))
        for i, params in enumerate(weights.load_weights(directory, which)):
            if configs[i].seed not in bad:
                own = [epoch[i] for epoch in epochs]
                at = len(own) - 1 if which == "last" else _best(own)
                one = _Member(configs[i], own, params, scores[i], directory, at)
                found.setdefault(name, []).append(one)
    every = [one for members in found.values() for one in members]
    if not every:
        raise ValueError(
            f"`run` needs runs that did not diverge, got {', '.join(map(repr, paths))}, of which "
            "none is left. Train with a lower learning rate."
        )
    varied = _varied([one.config for one in every])
    if varied:
        raise ValueError(
            f"`run` needs runs that differ in operator and seed alone, got others below "
            f"{', '.join(map(repr, paths))}, which differ in {', '.join(varied)}. "
            "Analyse them one by one."
        )
    tested = all(one.scores is not None for one in every)
    if tested and len(images) > 1:
        others = ", ".join(repr(str(home)) for _, home in images.values())
        raise ValueError(
            f"`run` needs scores on the same test images, got those on others in {others}. Run "
            "`kart eval` on all of them again."
        )
    results = []
    for operator, members in found.items():
        members.sort(key=lambda one: one.config.seed)
        configs, series, params, scores, homes, at = (list(c) for c in zip(*members, strict=True))
        by_epoch = [list(epoch) for epoch in zip(*series, strict=True)]
        results.append(
            report.Result(
                operator,
                configs,
                by_epoch,
                params,
                test=scores if tested else None,
                test_images=next(iter(images.values()))[0] if tested else None,
                homes=homes,
                snapshots=functools.partial(_snapshots, homes, [c.seed for c in configs]),
                epochs=at if which == "best" else None,
                diverged=diverged[operator],
                lost={name: seeds for name, seeds in diverged.items() if name not in found},
            )
        )
    return results


def _varied(configs: Sequence[Config]) -> list[str]:
    """The fields that differ between configs, but for the operator, its options and the seed."""
    given = {(name, getattr(one, name)) for one in configs for name in options_of(one.operator)}
    alike = OPTIONS | {"operator", "seed"}
    given |= {pair for one in configs for pair in vars(one).items() if pair[0] not in alike}
    counts = Counter(name for name, _ in given)
    return sorted(name for name, count in counts.items() if count > 1)


def _best(own: Sequence[Record]) -> int:
    """Which of a member's records is that of best.safetensors, the first with the best top-1."""
    scores = [one["val_top1"] for one in own]
    return scores.index(max(scores))


def _snapshots(
    homes: Sequence[Path], seeds: Sequence[int], index: int
) -> list[tuple[int, train.Params]]:
    own = [config.seed for config in identity.members(homes[index])].index(seeds[index])
    return [(step, params[own]) for step, params in weights.load_trajectory(homes[index])]


def group_size(home: Path) -> int | None:
    """How many members train together in the run that was begun in `home`; None if none was."""
    first = home / "group-0"
    return len(identity.members(first)) if (first / "config.json").exists() else None


def parts(configs: Sequence[Config], size: int, home: Path) -> list[tuple[list[Config], Path]]:
    """The members that train together, at most `size` of them, each group with its directory:
    `home` itself for a single member, else `home/group-0` and so on, however large groups are.
    """
    if len(configs) == 1:
        return [(list(configs), home)]
    found = population.groups(configs, size)
    return [(part, home / f"group-{i}") for i, part in enumerate(found)]
