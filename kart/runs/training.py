"""Training in a run directory, so that it can be killed at any moment."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kart import checkpoint, population, train, tree
from kart.runs import donors, identity, records, room, weights
from kart.train import Config, Record, Run, Splits, State

# of the versions that a run notes, those that change the last bits of a step
ROUNDING = ("torch", "cpu_capability")


def _about(owner: str, best: list[float]) -> dict[str, Any]:
    # as in a record: of a run of one the value itself
    return {"run": owner, "best_val_top1": best[0] if len(best) == 1 else best}


def _save(path: Path, owner: str, state: State, best: list[float]) -> None:
    # without averaging the weights are the state's own: stored once
    slim = state if state.average else state._replace(params={})
    about = {**_about(owner, best), "step": int(state.step.max())}
    about["diverged"] = state.bad_step.tolist()
    checkpoint.save(path, train.weights_for_evaluation(state), about, state=slim)


def restore(path: Path, run: Run, owner: str) -> tuple[State, list[float]]:
    """The state in a checkpoint of `run`, and the best validation top-1 of each member until then.

    Raises ValueError for a checkpoint of another run than the one whose id is `owner`.
    """
    like = run.init()
    params, config = weights.read(path, owner, run.config.device)
    slim = like if like.average else like._replace(params={})
    state = checkpoint.load_state(path, state=slim)["state"]
    best = weights.best_by_member(path, config, run.size)
    return (state if like.average else state._replace(params=params)), best


def _bytes(node: Any) -> int:
    return sum(leaf.nbytes for leaf in tree.leaves(node))


def _best(path: Path, owner: str, state: State, ahead: list[bool]) -> train.Params:
    """The weights of the members that are `ahead` of their best epoch in `path`, and those of that
    epoch of the others: each member has its own, as it would alone.
    """
    new = train.weights_for_evaluation(state)
    if all(ahead):
        return new
    old, _ = weights.read(path, owner)

    def choose(a: Tensor, b: Tensor) -> Tensor:
        flags = torch.tensor(ahead).reshape(-1, *[1] * (a.dim() - 1))
        return torch.where(flags, a.cpu(), b)

    return tree.map(choose, new, old)


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


def execute(
    directory: str | os.PathLike,
    configs: Sequence[Config],
    splits: Splits,
    *,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    space_timeout: float = 0.0,
    ranks: train.Ranks = train.ALONE,
) -> Iterator[Record]:
    """Trains `configs` together in `directory`, from where it stopped; yields the records.

    Records of earlier epochs are yielded first, as they were. `on_step(step, total, loss)` is
    called after each step. Where the disk is full it waits up to `space_timeout` seconds for room.
    With several ranks this is rank 0's part, and the state from which it goes on that of all of
    them: see `kart.distributed.follow`.

    Raises Diverged when no member is left; the last good state is saved before. Raises OSError
    where there is no room: the last finished epoch is kept, and the same call goes on from it.
    """
    directory = Path(directory)
    run = population.run(configs, splits, ranks=ranks)
    total = run.config.epochs * run.steps_per_epoch
    kept = set(snapshot_steps(run.config.trajectory, total) if run.config.trajectory else ())
    identity.check_place(directory)
    last, better = directory / "last.safetensors", directory / "best.safetensors"
    log = directory / "metrics.jsonl"
    # before anything is written: a donor may not fit, nor what is to be written the disk
    fresh = None if last.exists() else donors.begin(run, configs, splits)
    first = run.init() if fresh is None else fresh[0]
    size, snapshot = _bytes(first), _bytes(first.params)
    del first
    if fresh is not None:
        # the old and the new last one, the best, and the trajectory
        room.check(directory, 3 * size + len(kept) * snapshot)

    def write(call: Callable[[], None]) -> None:
        room.wait_for(directory, size, space_timeout, call)

    with identity.locked(directory):
        own = identity.claim(directory, configs, splits)
        owner = own.id
        donors.check_same(directory, configs)
        state, best = restore(last, run, owner) if last.exists() else (None, [])
        done = 0 if state is None else int(state.step.max())
        # a kill between record and checkpoint leaves a record that will be made again
        earlier = [one for one in records.read_metrics(directory) if one["step"] <= done]
        if len(earlier) * run.steps_per_epoch != done:
            raise ValueError(
                f"`run` needs a record of every epoch in metrics.jsonl, got {len(earlier)} in "
                f"{str(directory)!r} with weights after {done // run.steps_per_epoch}. Put the "
                "right file back, or train into a new directory."
            )
        text = "".join(records.line(owner, record) for record in earlier)
        if earlier or log.exists():
            checkpoint.write_text(log, text)
        spent = earlier[-1]["seconds"] if earlier else 0.0
        if state is None:
            state, told = fresh or donors.begin(run, configs, splits)
            if told:
                checkpoint.write_json(directory / "start.json", told)
        state = ranks.share(state)
        yield from earlier
        if done >= total:
            return
        now = checkpoint.versions()
        others = [
            f"{name} {own.versions.get(name)}, now {now[name]}"
            for name in ROUNDING
            if own.versions.get(name) != now[name]
        ]
        if done and others:
            begun = f"{str(directory)!r} was begun with {'; '.join(others)}"
            print(f"kart: {begun}: it goes on, rounded otherwise", file=sys.stderr)

        def keep(state: State, step: int) -> None:
            if step in kept:
                path = weights.snapshot(directory, step)
                path.parent.mkdir(exist_ok=True)
                about = {"run": owner, "step": step}
                write(lambda: checkpoint.save(path, train.weights_for_evaluation(state), about))

        if done == 0:
            keep(state, 0)
        latest: list[State] = []
        counter = itertools.count(done + 1)  # the state's own is on its device

        def stepped(state: State, metrics: train.Metrics) -> None:
            latest[:] = [state]
            step = next(counter)
            keep(state, step)
            if on_step is not None:
                on_step(step, total, metrics.loss)

        steps = train.loop(run, state, donate=True, on_step=stepped)
        # the first state would be held beside the last one
        del state, fresh
        try:
            for current, record in steps:
                record["seconds"] = round(record["seconds"] + spent, 3)
                top1 = records.by_member(record["val_top1"])
                line = records.line(owner, record)
                write(lambda line=line: room.append(log, line))
                ahead = [a > b for a, b in zip(top1, best or [-1.0] * run.size, strict=True)]
                if any(ahead):
                    best = [max(pair) for pair in zip(top1, best or top1, strict=True)]
                    own, about = _best(better, owner, current, ahead), _about(owner, best)
                    write(lambda own=own, about=about: checkpoint.save(better, own, about))
                write(lambda now=current, best=best: _save(last, owner, now, best))
                yield record
        except train.Diverged:
            if latest:
                path, top1 = directory / records.DIVERGED, best or [-1.0] * run.size
                write(lambda: _save(path, owner, latest[0], top1))
            raise
