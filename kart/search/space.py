"""Search spaces: pure functions from a trial to a `Config`, and what is known of them before.

    def space(trial):
        return Config(operator=suggest_operator(trial), **suggest_rates(trial))

What fixes shapes (family, grid, rank, sharing) and what does not (`population.FREE`: learning rate,
weight decay, seed) are told apart by fields of the Config: those of one `shape` train together.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from kart import bases, schema
from kart.train import Config

Space = Callable[[optuna.Trial], Config]
Params = dict[str, Any]

# where a trial runs: no part of what is searched, and workers may differ in it
PLACE = {"device": "cpu", "threads": None}
# the free fields are these to name a shape: the peak above any that a schedule begins or ends with
SHAPE = {**PLACE, "seed": 0, "learning_rate": 1e30, "weight_decay": 0.0}

MOST_POINTS = 10_000


def key(config: Config) -> str:
    """Names a configuration whatever its seed and wherever it runs: repeats have the same key."""
    return dataclasses.replace(config, seed=0, **PLACE).hash


def shape(config: Config) -> str:
    """Names what fixes the shapes of a configuration: those of one can train as one population."""
    return dataclasses.replace(config, **SHAPE).hash


def suggest_operator(
    trial: optuna.Trial,
    families: Sequence[str] = ("fourier",),
    *,
    grid: tuple[int, int] = (1, 9),
    degree: tuple[int, int] = (1, 8),
    rank: tuple[int, int] = (4, 32),
    sharing: Sequence[str] = ("blockwise", "universal"),
) -> str:
    """A learnable row operator as a spec string, such as "G3B:rank=12".

    Suggests `family` where there are several, `grid` or `degree` for the families that have one,
    `rank` (logarithmic) and `sharing`; an interval of one value suggests nothing. Grids that are
    too small for the family drawn are left out. The string is what `kart.models.create` and
    `Config` take as `operator`.
    """
    shared = {"blockwise": "B", "universal": "U"}
    for argument, given, known in (
        ("families", families, sorted(bases.FAMILIES)),
        ("sharing", sharing, list(shared)),
    ):
        if isinstance(given, str) or not given or set(given) - set(known):
            raise ValueError(
                f"`suggest_operator` needs `{argument}` among {known}, got {given!r}. List some."
            )
    for argument, pair, least in (("grid", grid, 0), ("degree", degree, 0), ("rank", rank, 1)):
        whole = isinstance(pair, tuple | list) and all(schema.fits(one, int) for one in pair)
        if not whole or len(pair) != 2 or not least <= pair[0] <= pair[1]:
            raise ValueError(
                f"`suggest_operator` needs `{argument}` as two integers, the lower one first and "
                f"at least {least}, got {pair!r}. Write (1, 9)."
            )
    for family in families:
        if bases.NUMBERS.get(family) == ("grid",) and not _takes(family, grid[1]):
            raise ValueError(
                f"`suggest_operator` needs `grid` with one that {family} can have, got {grid!r}. "
                "Write (1, 9)."
            )
    family = choose(trial, "family", families)
    numbers = bases.NUMBERS.get(family, ())
    size = ""
    if numbers == ("grid",):
        least = next((n for n in range(*grid) if _takes(family, n)), grid[1])
        size = str(integer(trial, "grid", least, grid[1]))
    elif numbers == ("degree",):
        size = str(integer(trial, "degree", *degree))
    drawn = integer(trial, "rank", *rank, log=True)
    letter = shared[choose(trial, "sharing", sharing)]
    head = f"G{size}" if family == "fourier" else f"{family}-{size}"
    return f"{head}{letter}:rank={drawn}"


def _takes(family: str, grid: int) -> bool:
    """Whether a family has a grid of this size: some need two places, at both ends of a span."""
    try:
        bases.FAMILIES[family](grid)
    except ValueError:
        return False
    return True


def suggest_rates(
    trial: optuna.Trial,
    learning_rate: tuple[float, float] = (3e-4, 1e-2),
    weight_decay: tuple[float, float] = (1e-3, 0.3),
) -> dict[str, float]:
    """Learning rate and weight decay, both logarithmic: the nuisance parameters of a study."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", *learning_rate, log=True),
        "weight_decay": trial.suggest_float("weight_decay", *weight_decay, log=True),
    }


def choose(trial: optuna.Trial, name: str, choices: Sequence[Any]) -> Any:
    """A categorical suggestion; one choice alone is no parameter."""
    return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, list(choices))


def integer(trial: optuna.Trial, name: str, low: int, high: int, log: bool = False) -> int:
    """An integer suggestion; an interval of one value is no parameter."""
    return low if low == high else trial.suggest_int(name, low, high, log=log)


class Fixed:
    """A trial in which some parameters have been fixed: `suggest_*` returns their values."""

    def __init__(self, trial: Any, values: Mapping[str, Any]):
        self._trial, self._values = trial, values

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._trial, name)
        if not name.startswith("suggest_"):
            return found

        def suggest(name: str, *args: Any, **options: Any) -> Any:
            if name in self._values:
                return self._values[name]
            return found(name, *args, **options)

        return suggest


def fixed(space: Space, values: Mapping[str, Any]) -> Space:
    """`space` with some parameters fixed, so that nothing is suggested for them."""
    if not values:
        return space
    return lambda trial: space(Fixed(trial, values))  # type: ignore[arg-type]


class _Recorder(optuna.trial.FixedTrial):
    """A trial that takes given values, else the first or lowest, and records what was asked."""

    def __init__(self, given: Params):
        super().__init__(given)
        self._given = given
        self._taken: Params = {}
        self._asked: dict[str, BaseDistribution] = {}

    @property
    def params(self) -> Params:
        return self._taken

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return self._asked

    def _take(self, name: str, distribution: BaseDistribution, default: Any) -> Any:
        value = self._given.get(name, default)
        self._taken[name], self._asked[name] = value, distribution
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        for choice in choices:
            if not isinstance(choice, bool | int | float | str | None):
                raise ValueError(
                    f"a search needs choices of None, bool, int, float and str, which a database "
                    f"gives back as they are, got {choice!r:.100} for {name!r}. Suggest a word "
                    "for each, and look it up in a dict."
                )
        distribution = CategoricalDistribution(list(choices))
        return self._take(name, distribution, distribution.choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False):
        return self._take(name, IntDistribution(low, high, log, step), low)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._take(name, FloatDistribution(low, high, log, step), low)


def draw(space: Space, trial: optuna.trial.BaseTrial) -> Config:
    """The config that `space` makes of a trial; raises ValueError where it is none."""
    made = space(trial)  # type: ignore[arg-type]
    if not isinstance(made, Config):
        raise ValueError(
            f"a search needs a `space` that returns a kart.train.Config, got {type(made).__name__} "
            "of a trial. Return `Config(...)`, or the config of an arm with fields replaced."
        )
    return made


def _record(space: Space, given: Params) -> tuple[_Recorder, Config | None]:
    """What was asked for at a point and its config, None where the space prunes it."""
    recorder = _Recorder(given)
    try:
        return recorder, draw(space, recorder)
    except optuna.TrialPruned:
        return recorder, None


def at(space: Space, point: Params) -> Config | None:
    """The config of a point of the space, None where the space prunes it."""
    return _record(space, point)[1]


def first(space: Space) -> Config:
    """The config of the space's first point, first choices and lowest numbers; where it prunes that
    one, of the first that it does not prune.
    """
    for point in itertools.chain([{}], _points(space, 3, {})):
        made = _record(space, point)[1]
        if made is not None:
            return made
    raise ValueError(
        "a search needs a space that can be trained somewhere, got one that raises TrialPruned at "
        "every point that was tried: lowest, middle and highest numbers, every choice."
    )


def probe(space: Space) -> tuple[dict[str, list[BaseDistribution]], list[Config | None]]:
    """Distributions by parameter, and configs (None where it prunes), of a space and its branches.

    Probes the first value of everything, and from there each choice of each categorical parameter
    and both ends of each interval, one at a time; a branch behind two choices at once is not seen.
    """
    found: dict[str, list[BaseDistribution]] = {}
    configs: list[Config | None] = []
    todo: list[Params] = [{}]
    seen: set[tuple[str, Any]] = set()
    while todo:
        given = todo.pop(0)
        recorder, made = _record(space, given)
        configs.append(made)
        for name, distribution in recorder.distributions.items():
            if distribution not in found.setdefault(name, []):
                found[name].append(distribution)
            for value in _values(distribution, 2):
                if (name, value) not in seen:
                    seen.add((name, value))
                    todo.append({**given, name: value})
    return found, configs


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter can take `value`."""
    if isinstance(distribution, CategoricalDistribution):
        # True is 1 to Python, and no number to who wrote the choices
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in distribution.choices
        )
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if not schema.fits(value, int if isinstance(distribution, IntDistribution) else float):
        return False
    steps = (value - distribution.low) / (distribution.step or 1)
    on_grid = distribution.step is None or abs(steps - round(steps)) < 1e-8
    return distribution.low <= value <= distribution.high and on_grid


def fingerprint(space: Space) -> dict[str, Any]:
    """What identifies a space: its distributions, and the configs of some of its points."""
    found, configs = probe(space)
    keys = ["pruned" if made is None else key(made) for made in configs]
    listed = {
        name: sorted({distribution_to_json(one) for one in found[name]}) for name in sorted(found)
    }
    return {"distributions": listed, "points": schema.digest(keys)[:12]}


def _values(distribution: BaseDistribution, levels: int | None) -> list[Any]:
    """The values of a distribution: all of them, or so many `levels` of a continuous one."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if levels is None:
        if step is None:
            raise ValueError("continuous")
        count = int((high - low) / step + 1e-9) + 1
        return [min(low + i * step, high) for i in range(count)]
    shares = [i / (levels - 1) for i in range(levels)] if levels > 1 else [0.5]
    if distribution.log:
        points = [low ** (1 - share) * high**share for share in shares]
    else:
        points = [low + share * (high - low) for share in shares]
    if step is not None:
        points = sorted({low + round((point - low) / step) * step for point in points})
    # powers and steps may leave the interval by a rounding
    return [min(max(point, low), high) for point in points]


def enumerate_space(space: Space, levels: int | None = None) -> list[Params]:
    """All points of a space that it does not prune, parameter by parameter; branches are followed.

    Args:
        levels: how many values to take of each interval; None takes all, which an interval of
            floats has not.
    """
    points = list(itertools.islice(_points(space, levels, {}), MOST_POINTS + 1))
    if len(points) > MOST_POINTS:
        raise ValueError(
            f"`grid` and `brute` need a space of at most {MOST_POINTS} points, got more. Fix some "
            "parameters with `--fix`, lower `--levels`, or use `--sampler tpe`."
        )
    return points


def _points(space: Space, levels: int | None, given: Params) -> Iterator[Params]:
    recorder, made = _record(space, given)
    open_names = [name for name in recorder.params if name not in given]
    if not open_names:
        if made is not None:
            yield dict(recorder.params)
        return
    name = open_names[0]
    try:
        values = _values(recorder.distributions[name], levels)
    except ValueError:
        raise ValueError(
            f"`brute` needs a finite space, got the continuous parameter {name!r}. Fix it with "
            f"`--fix {name}=VALUE`, or use `--sampler grid`, which takes `--levels` values of it."
        ) from None
    for value in values:
        yield from _points(space, levels, {**given, name: value})
