"""The weights that a run directory holds: its checkpoints and its trajectory."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from kart import checkpoint, population, schema, train
from kart.models import Model
from kart.runs import identity, owned, records
from kart.train import Config


def snapshot(directory: Path, step: int) -> Path:
    """The file of a run's snapshot after `step` steps."""
    return directory / "trajectory" / f"step-{step:09d}.safetensors"


def best_by_member(path: Path, config: dict[str, Any], members: int) -> list[float]:
    """The best validation top-1 of each member, by the config of a checkpoint of their run."""
    found = records.by_member(config["best_val_top1"])
    if len(found) != members:
        raise ValueError(
            f"`run` needs the best epoch of each of its {members} members, got {str(path)!r} with "
            "one for all, by an earlier kart. Take the last weights, or train it again."
        )
    return found


def read(path: Path, run: str, device: str = "cpu") -> tuple[train.Params, dict[str, Any]]:
    """Parameters and config of a checkpoint, which must be one of the run whose id is `run`."""
    params, config = checkpoint.load(path, device=device)
    identity.check_owner(path, config, run)
    return params, config


def load_weights(directory: str | os.PathLike, which: str = "last") -> list[train.Params]:
    """The weights of each member of a run directory, from its "last" or "best" checkpoint; each
    member has its own best epoch.
    """
    schema.check_choice("load_weights", "which", which, ("last", "best"))
    own = identity.read(directory)
    path = Path(directory) / f"{which}.safetensors"
    if not path.exists():
        raise ValueError(
            f"`run` needs a directory with a finished epoch, got {str(directory)!r} without "
            f"{path.name}. Train it further with the same command."
        )
    params, config = read(path, own.id)
    if which == "best":
        best_by_member(path, config, len(own.configs))
    return population.members(params, len(own.configs))


def load_trajectory(directory: str | os.PathLike) -> list[tuple[int, list[train.Params]]]:
    """The snapshots of a run directory in order: the step, and the weights of each member then.

    The first are the initial weights, the last the final ones, averaged where the run averages.

    Raises ValueError for a run without a trajectory, or with an unfinished one.
    """
    directory = Path(directory)
    own = identity.read(directory)
    configs = own.configs
    if not configs[0].trajectory:
        raise ValueError(
            f"`run` needs a trajectory, got {str(directory)!r} without one. Train it into a new "
            "directory with `kart train ... --trajectory 60`."
        )
    paths = sorted((directory / "trajectory").glob("step-*.safetensors"))
    if len(paths) < configs[0].trajectory:
        raise ValueError(
            f"`run` needs a finished trajectory, got {len(paths)} of {configs[0].trajectory} "
            f"snapshots in {str(directory)!r}. Train it further with the same command."
        )
    found = (read(path, own.id) for path in paths)
    return [(config["step"], population.members(params, len(configs))) for params, config in found]


class Trained(NamedTuple):
    """One member of a finished run, with its model."""

    identity: identity.Identity
    config: Config
    model: Model
    params: train.Params


def below(directory: str | os.PathLike) -> list[tuple[Path, int]]:
    """The members of the runs at or below a directory: the directory of the run, and the seed."""
    top = identity.place_of(directory)
    homes = [top]
    if not (top / "config.json").is_file():
        homes = sorted(path.parent for path in top.glob("**/config.json"))
    return [(home, config.seed) for home in homes for config in identity.members(home)]


def only(directory: str | os.PathLike, which: str = "last", seed: int | None = None) -> Trained:
    """The one member of the finished runs at or below a directory, or that of `seed` where there
    are several.

    Raises ValueError where it is not finished or has diverged.
    """
    home, known = identity.place_of(directory), below(directory)
    found = [one for one, own in known if seed in (None, own)]
    if len({*found}) == 1:
        home = found[0]
    elif known and not found:
        raise ValueError(
            f"`seed` needs to be one of {sorted({own for _, own in known})}, those of "
            f"{str(directory)!r}, got {seed}. Name one of them."
        )
    own = identity.read(home)
    seeds = [config.seed for config in own.configs]
    if seed is None and len(seeds) > 1:
        raise ValueError(
            f"`seed` needs to be one of {seeds}, those of {str(home)!r}, got {seed}. "
            "Name it with `--seed`."
        )
    index = 0 if seed is None else seeds.index(seed)
    gone = records.diverged(home)
    if seeds[index] in gone:
        raise ValueError(
            f"`seed` needs a member that did not diverge, got {seeds[index]} of {str(home)!r}, "
            f"which did at step {gone[seeds[index]]}. Choose another of "
            f"{[one for one in seeds if one not in gone]}, or train with a lower learning rate."
        )
    records.check_finished(home, records.read_metrics(home))
    params = load_weights(home, which)[index]
    config = own.configs[index]
    return Trained(own, config, train.build(config, owned.empty(own.data)), params)
