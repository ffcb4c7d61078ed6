"""Names of runs and of what belongs to them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kart import operators, schema
from kart.operators.sums import meaning
from kart.train import Config

# fields of Config that belong to the operator
OPTIONS = {"rank", "project", "base"}


def options_of(operator: str | tuple[str, ...]) -> set[str]:
    """Those of `OPTIONS` that the spec of an operator, or one of the blocks', leaves open."""
    specs = [operator] if isinstance(operator, str) else operator
    return OPTIONS & set[str]().union(*map(operators.options, specs))


def slug(text: str) -> str:
    """A directory name for a spec string, or the name of a data set."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def default_directory(configs: Sequence[Config], seeds: Sequence[int]) -> Path:
    """Where runs go that name no directory: it depends on all that they are."""
    digest = schema.digest([[config.asdict() for config in configs], list(seeds)])[:12]
    return Path("runs") / f"{slug(Path(configs[0].data).name)}-{digest}"


def _meaning(config: Config) -> list[Any]:
    """What the operators of a config are, however they are written; one that all blocks have is
    that one.
    """
    each: list[Any] = []
    for spec in [config.operator] if isinstance(config.operator, str) else config.operator:
        given = {name: getattr(config, name) for name in options_of(spec)}
        read = operators.parse(spec, **given)
        # of code of the user's own only its name tells what it makes
        own = spec if operators.sources(spec) else ""
        sharing = read.sharing or config.sharing or "blockwise"
        each.append([meaning(read.operator), sharing, own])
    return each[:1] if all(one == each[0] for one in each) else each


def homes(configs: Sequence[Config], out: Path) -> list[Path]:
    """The directory of each of several operators below `out`; `out` itself for one."""
    if len(configs) == 1:
        return [out]
    specs = [config.operator for config in configs]
    shown = [operators.shown(spec) for spec in specs]  # one that all blocks have is that one
    meant = [_meaning(config) for config in configs]
    if any(one in meant[:i] for i, one in enumerate(meant)):
        raise ValueError(f"`operator` needs different operators, got {shown}. Drop the repeats.")
    names = [slug(str(spec)) for spec in specs]
    # heads and blocks of the same operators, for one
    return [
        out / (name if names.count(name) == 1 else f"{name}-{schema.digest(spec)[:6]}")
        for name, spec in zip(names, specs, strict=True)
    ]
