"""A question as a file: what `studies/*.py` define, and how `kart study` finds them."""

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import CategoricalDistribution

import kart
from kart import code, schema
from kart.search.space import Space, contains, fixed, probe
from kart.train import Config

Arm = Callable[[optuna.Trial, Config], Config]

# what code raises that is wrong; other errors are of databases and devices
MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError),
    *(LookupError, NameError, TypeError),
)

# a setting in which a run takes a blink, for the `tiny` of a study
TINY: dict[str, Any] = {
    "data": "digits",
    "augment": "none",
    "train_limit": 64,
    "image_size": 8,
    "patch_size": 4,
    "embed_dim": 8,
    "num_heads": 1,
    "depth": 1,
    "epochs": 1,
    "confirm": 0,
}


@dataclass(frozen=True)
class Study:
    """One question: the arms to compare, each searched with the same budget.

    Args:
        config: what all trials share; flags change it before the arms see it.
        arms: by name, a search space `(trial, config) -> Config` each. The first is the baseline.
        trials: of all arms together, shared equally.
        seeds: K, the seeds of a trial.
        confirm: fresh seeds with which the best of each arm is trained again.
        sampler: "tpe", "random", "gp", "nsga2", "grid" or "brute".
        pruner: "asha", "median" or "none".
        tiny: fields of Config, or of this class, for a setting that runs in seconds.
        answer: what the study concludes, as text, from the confirmed results by arm.
    """

    config: Config
    arms: Mapping[str, Arm]
    trials: int = 24
    seeds: int = 3
    confirm: int = 5
    sampler: str = "tpe"
    pruner: str = "median"
    tiny: Mapping[str, Any] = field(default_factory=lambda: TINY)
    answer: Callable[[Mapping[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ValueError(
                f"`Study` needs a kart.train.Config as `config`, got {self.config!r:.100}. Write "
                "Config(...)."
            )
        named = isinstance(self.arms, Mapping) and all(isinstance(n, str) for n in self.arms)
        if not named or not self.arms:
            raise ValueError(
                f"`Study` needs `arms` as a dict of search spaces by name, got {self.arms!r:.100}. "
                'Write {"softmax": space, ...}, the baseline first.'
            )
        for name, arm in self.arms.items():
            try:
                inspect.signature(arm).bind(None, self.config)
            except TypeError as error:
                raise ValueError(
                    f"`Study` needs `arms` of functions (trial, config) -> Config, got {arm!r:.100}"
                    f" as {name!r} ({error}). Change it."
                ) from None
        if self.answer is not None and not callable(self.answer):
            raise ValueError(
                f"`Study` needs `answer` as a function of the confirmed results by arm, or None, "
                f"got {self.answer!r:.100}. Change it."
            )
        fields = set[str]().union(*changeable())
        for name in self.tiny if isinstance(self.tiny, Mapping) else [self.tiny]:
            if name not in fields:
                raise ValueError(
                    f"`Study` needs `tiny` as a dict of fields of Config, or of its own, got "
                    f"{name!r:.100}.{schema.near_matches(name, fields)}"
                )
        for name, kind in typing.get_type_hints(Study).items():
            if kind in (int, str):
                schema.check_type("Study", name, getattr(self, name), kind)

    def spaces(self, config: Config, fix: Mapping[str, Any]) -> dict[str, Space]:
        """The space of each arm over `config`, with the parameters in `fix` fixed. A mistake in the
        code of an arm is a ValueError that says where it is.
        """

        def space(name: str, arm: Arm) -> Space:
            def made(trial: optuna.Trial) -> Config:
                try:
                    return arm(trial, config)
                except MISTAKES as error:
                    raise ValueError(
                        f"`arms` needs functions that make a Config of a trial, got {name!r}, "
                        f"which failed: {code.where(error, '')}. Mend it."
                    ) from error

            return made

        return {name: fixed(space(name, arm), fix) for name, arm in self.arms.items()}


def folder() -> Path:
    """Where kart's own studies are: beside its source tree, or installed as `kart_studies`."""
    tree = Path(kart.__file__).resolve().parents[1]
    if (tree / "pyproject.toml").is_file() and (tree / "studies").is_dir():
        return tree / "studies"
    spec = importlib.util.find_spec("kart_studies")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "`kart study` needs the studies that are installed with kart, got none. Install "
            "kart-attention again, or name a file of your own."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def available() -> dict[str, tuple[Path, str]]:
    """File and question (the first line of its docstring) of each study that is found, by name."""
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder().glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
        if any(isinstance(target, ast.Name) and target.id == "STUDY" for target in targets):
            text = ast.get_docstring(tree) or ""
            found[path.stem] = (path, text.split("\n")[0])
    return found


def locate(name: str) -> Path:
    """The file of a study: a path, or a name such as "grid_rank_sharing"."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"`study` needs a file, got {name!r}, which is none. Check the path.")
        return Path(name).resolve()
    found = available()
    if name not in found:
        near = schema.near_matches(name, found)
        raise ValueError(f"`study` needs a file or one of {list(found)}, got {name!r}.{near}")
    return found[name][0]


class Question(NamedTuple):
    """A study with its name, its question as text, and the fingerprint of its source."""

    name: str
    named: str  # what `load` was given
    study: Study
    text: str
    source: str


def load(name: str) -> Question:
    """The question that a study's file asks, by name or path. This runs the file."""
    path = locate(name)
    module = code.run(str(path))
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ValueError(
            f"`study` needs a file that defines STUDY = search.Study(...), got {str(path)!r} "
            "without. See studies/grid_rank_sharing.py."
        )
    source = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Question(path.stem, name, study, (module.__doc__ or "").strip(), source)


def changeable() -> tuple[set[str], set[str]]:
    """The fields of a study, and those of its config, that flags and `tiny` may change."""
    own = {f.name for f in dataclasses.fields(Study)} - {"config", "arms", "tiny", "answer"}
    return own, {f.name for f in dataclasses.fields(Config)}


def with_changes(study: Study, changes: Mapping[str, Any]) -> Study:
    """`study` with some of its own fields, and fields of its config, changed."""
    own, shared = changeable()
    unknown = sorted(set(changes) - own - shared)
    if unknown:
        near = schema.near_matches(unknown[0], own | shared)
        raise ValueError(f"`--set` needs fields of Config, got {unknown[0]!r}.{near}")
    for cls in (Config, Study):
        hints = typing.get_type_hints(cls)
        for name, value in changes.items():
            if name in hints and not schema.fits(value, hints[name]):
                raise ValueError(
                    f"`--set` needs a value of the type of {name!r}, {hints[name]}, got {value!r}."
                )
    config = dataclasses.replace(
        study.config, **{name: value for name, value in changes.items() if name in shared}
    )
    mine = {name: value for name, value in changes.items() if name in own}
    return dataclasses.replace(study, config=config, **mine)


# fields of Config that say nothing of a trial, and what to do instead
IDLE = {
    **dict.fromkeys(("start", "attention_from", "trajectory"), "Train in directories instead"),
    "recipe": "It names what a config was made of: set the fields of the recipe",
    "device": "It is of each process: give `--device`",
    "threads": "It is of each process: give `--threads`",
}


def _parameters(study: Study, fix: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The parameters of all arms, with those in `fix` fixed, and what each may be."""
    known: dict[str, list[Any]] = {}
    for arm in study.spaces(study.config, fix).values():
        for name, found in probe(arm)[0].items():
            known.setdefault(name, []).extend(found)
    return known


def has_intervals(study: Study, fix: Mapping[str, Any]) -> bool:
    """Whether an arm searches an interval, of which a grid takes some values."""
    found = itertools.chain(*_parameters(study, fix).values())
    return not all(isinstance(one, CategoricalDistribution) for one in found)


def check_effects(
    before: Study, study: Study, changes: Mapping[str, Any], fix: Mapping[str, Any]
) -> None:
    """Raises ValueError for a change of the config, from `before` to `study`, that says nothing of
    a trial or that every arm overrides or searches, and for a fixed parameter that no arm has, or
    not with this value.
    """
    for name in changes:
        if name in IDLE:
            raise ValueError(
                f"`--set` needs fields that a trial has a use for, got {name!r}. {IDLE[name]}."
            )
    known = _parameters(study, {})
    for name, value in fix.items():
        if name not in known:
            raise ValueError(
                f"`--fix` needs one of {list(known)}, parameters of the study, got {name!r}."
                + schema.near_matches(name, known)
            )
        if not any(contains(one, value) for one in known[name]):
            raise ValueError(
                f"`--fix` needs a value that {name!r} can take, {known[name][0]}, got {value!r}."
            )
    for name in fix:
        others = {one: value for one, value in fix.items() if one != name}
        if name not in _parameters(study, others):
            raise ValueError(
                f"`--fix` needs parameters that are asked for, got {name!r}, which no arm asks for "
                f"with {', '.join(f'{one}={value}' for one, value in others.items())}. Leave it "
                "out."
            )
    made, was = (
        [
            [c for c in probe(arm)[1] if c is not None]
            for arm in one.spaces(one.config, fix).values()
        ]
        for one in (study, before)
    )
    for name, value in changes.items():
        if not hasattr(study.config, name):
            continue
        now, then = ([[getattr(c, name) for c in arm] for arm in arms] for arms in (made, was))
        if now == then and not any(all(one == value for one in arm) for arm in now):
            raise ValueError(
                f"`--set` and other flags need fields that the arms leave alone, got {name!r}, "
                "which they set themselves. Leave it out, or write a study of your own."
            )
