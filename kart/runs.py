"""Run directories: one training run on disk, written so that it can be killed at any moment.

    config.json       config of the run and its members, versions; written once
    metrics.jsonl     one record an epoch, in order
    last.safetensors  weights and the whole state after the last finished epoch
    best.safetensors  weights of the epoch with the best validation top-1
    trajectory/       `Config.trajectory` snapshots of the weights, evenly spaced over the steps

A directory that is opened again with the same config goes on where it stopped, to the same result.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kart import checkpoint, population, train, tree
from kart.train import Config, Record, Run, Splits, State


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second process out of `directory` until the block ends, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"`out` needs a directory no other process trains in, got {str(directory)!r}. "
                "Wait for that process, or choose another directory."
            ) from None
        yield


def _description(configs: Sequence[Config]) -> dict[str, Any]:
    free = [{name: getattr(c, name) for name in population.FREE} for c in configs]
    return {"config": configs[0].asdict(), "members": free}


def claim(directory: Path, configs: Sequence[Config]) -> None:
    """Makes `directory` the run of `configs`, or checks that it already is.

    Raises ValueError where it holds another configuration, or files that are no run.
    """
    path = directory / "config.json"
    wanted = _description(configs)
    if path.exists():
        found = read_config(directory)
        old, new = dict(found["config"]), dict(wanted["config"])
        if found["members"] != wanted["members"] or old != new:
            keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k)) or ["members"]
            shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked" for k in keys)
            raise ValueError(
                f"`out` needs a new directory or one with the same configuration, got "
                f"{str(directory)!r} with another ({shown}). Choose another directory."
            )
        return
    others = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    if others:
        raise ValueError(
            f"`out` needs a new or empty directory, or a run, got {str(directory)!r} with "
            f"{', '.join(sorted(others)[:5])}. Choose another directory."
        )
    checkpoint.write_text(
        path, json.dumps({**wanted, "versions": checkpoint.versions()}, indent=1) + "\n"
    )


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """`{"config", "members", "versions"}` of a run directory."""
    path = Path(directory) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["config"], found["members"], found["versions"]
    except FileNotFoundError:
        raise ValueError(
            f"`run` needs a directory that `kart train` wrote, got {str(directory)!r} without "
            "config.json. Check the path."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`run` needs a whole config.json, got a damaged one in {str(directory)!r} ({error}). "
            "Train into a new directory."
        ) from None
    return found


def members(directory: str | os.PathLike) -> list[Config]:
    """The configs of the members of a run directory."""
    found = read_config(directory)
    base = Config.fromdict(found["config"])
    return [dataclasses.replace(base, **free) for free in found["members"]]


def read_metrics(directory: str | os.PathLike) -> list[Record]:
    """The records of a run directory so far; a line that a kill cut short is left out."""
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only the last line can be cut: nothing is written after it
    return records


def _save(path: Path, run: Run, configs: Sequence[Config], state: State, best: float) -> None:
    # without averaging the weights are the state's own: stored once
    slim = state if state.average else state._replace(params={})
    config = {**_description(configs), "best_val_top1": best}
    checkpoint.save(path, train.weights_for_evaluation(state), config, state=slim)


def restore(path: Path, run: Run) -> tuple[State, float]:
    """The state in a checkpoint of `run`, and the best validation top-1 until then."""
    like = run.init()
    weights, config = checkpoint.load(path, device=run.config.device)
    slim = like if like.average else like._replace(params={})
    state = checkpoint.load_state(path, state=slim)["state"]
    return (state if like.average else state._replace(params=weights)), config["best_val_top1"]


def _mean(value: float | list[float]) -> float:
    return sum(value) / len(value) if isinstance(value, list) else value


def snapshot_steps(count: int, total: int) -> list[int]:
    """The steps after which a run of `total` steps keeps its `count` snapshots; 0 is the start.

    >>> snapshot_steps(5, 100)
    [0, 25, 50, 75, 100]
    """
    if not 2 <= count <= total + 1:
        raise ValueError(
            f"`trajectory` needs at most one snapshot a step, {total + 1} here, got {count}. "
            "Keep fewer of them, or train longer."
        )
    return [round(i * total / (count - 1)) for i in range(count)]


def _snapshot(directory: Path, step: int) -> Path:
    return directory / "trajectory" / f"step-{step:09d}.safetensors"


def execute(
    directory: str | os.PathLike,
    configs: Sequence[Config],
    splits: Splits,
    *,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Iterator[Record]:
    """Trains `configs` together in `directory`, from where it stopped; yields the records.

    Records of earlier epochs are yielded first, as they were. `on_step(step, total, loss)` is
    called after each step. Raises Diverged when no member is left; the last good state is saved
    before.
    """
    directory = Path(directory)
    with locked(directory):
        claim(directory, configs)
        run = population.run(configs, splits)
        total = run.config.epochs * run.steps_per_epoch
        last, log = directory / "last.safetensors", directory / "metrics.jsonl"
        state, best = restore(last, run) if last.exists() else (None, -1.0)
        done = 0 if state is None else int(state.step.max())
        # a kill between record and checkpoint leaves a record that will be made again
        records = [record for record in read_metrics(directory) if record["step"] <= done]
        text = "".join(json.dumps(record) + "\n" for record in records)
        if records or log.exists():
            checkpoint.write_text(log, text)
        spent = records[-1]["seconds"] if records else 0.0
        yield from records
        if done >= total:
            return
        kept = set(snapshot_steps(run.config.trajectory, total) if run.config.trajectory else ())

        def keep(state: State, step: int) -> None:
            if step in kept:
                path = _snapshot(directory, step)
                path.parent.mkdir(exist_ok=True)
                description = {**_description(configs), "step": step}
                checkpoint.save(path, train.weights_for_evaluation(state), description)

        if state is None:
            state = run.init()
            keep(state, 0)
        latest: list[State] = []

        def stepped(state: State, metrics: train.Metrics) -> None:
            latest[:] = [state]
            if kept:
                keep(state, int(state.step.max()))
            if on_step is not None:
                on_step(int(state.step.max()), total, metrics.loss)

        try:
            for current, record in train.loop(run, state, donate=True, on_step=stepped):
                record["seconds"] = round(record["seconds"] + spent, 3)
                top1 = _mean(record["val_top1"])
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                if top1 > best:
                    best = top1
                    _save(directory / "best.safetensors", run, configs, current, best)
                _save(last, run, configs, current, best)
                yield record
        except train.Diverged:
            if latest:
                _save(directory / "diverged.safetensors", run, configs, latest[0], best)
            raise


def load_weights(directory: str | os.PathLike, which: str = "last") -> list[train.Params]:
    """The weights of each member of a run directory, from its "last" or "best" checkpoint."""
    if which not in ("last", "best"):
        raise ValueError(
            f'`which` needs to be "last" or "best", got {which!r}. Choose one of them.'
        )
    path = Path(directory) / f"{which}.safetensors"
    count = len(read_config(directory)["members"])
    if not path.exists():
        raise ValueError(
            f"`run` needs a directory with a finished epoch, got {str(directory)!r} without "
            f"{path.name}. Train it further with the same command."
        )
    params, _ = checkpoint.load(path)
    return [params] if count == 1 else tree.unstack(params)


def load_trajectory(directory: str | os.PathLike) -> list[tuple[int, list[train.Params]]]:
    """The snapshots of a run directory in order: the step, and the weights of each member then.

    The first are the initial weights, the last the final ones, averaged where the run averages.

    Raises ValueError for a run without a trajectory, or with an unfinished one.
    """
    directory = Path(directory)
    configs = members(directory)
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
    found = []
    for path in paths:
        params, config = checkpoint.load(path)
        found.append((config["step"], [params] if len(configs) == 1 else tree.unstack(params)))
    return found
