"""Names of runs and of what belongs to them."""

import re
from collections.abc import Sequence
from pathlib import Path

from kart import operators, schema
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


def homes(configs: Sequence[Config], out: Path) -> list[Path]:
    """The directory of each of several operators below `out`; `out` itself for one."""
    if len(configs) == 1:
        return [out]
    specs = [config.operator for config in configs]
    shown = [operators.shown(spec) for spec in specs]  # one that all blocks have is that one
    if len(set(shown)) < len(specs):
        raise ValueError(f"`operator` needs different operators, got {shown}. Drop the repeats.")
    names = [slug(str(spec)) for spec in specs]
    # heads and blocks of the same operators, for one
    return [
        out / (name if names.count(name) == 1 else f"{name}-{schema.digest(spec)[:6]}")
        for name, spec in zip(names, specs, strict=True)
    ]
