"""Populations: K seeds (or learning rates, weight decays) of one configuration as one vmapped
program.

The members share shapes, schedule and data set; each has its own parameters, batches, learning rate
and weight decay. Every operation then works on K models at once, which pays while one model is too
small to fill the machine: `fastest_group` measures where that ends.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from kart import schema, train, tree
from kart.models import Model
from kart.train import Config, Hyper, Record, Run, Splits, State

# what may differ between members: nothing that fixes a shape, a schedule or a data set
FREE = ("seed", "learning_rate", "weight_decay")


def _check(configs: Sequence[Config]) -> None:
    if not configs:
        raise ValueError("`population` needs at least one config, got none. Pass a list of them.")
    first = configs[0].asdict()
    for config in configs[1:]:
        other = config.asdict()
        odd = [name for name in first if first[name] != other[name] and name not in FREE]
        if odd:
            raise ValueError(
                f"`population` needs configs that differ in {', '.join(FREE)} alone, got different "
                f"{', '.join(odd)}. Train those as runs of their own."
            )


def stacked(configs: Sequence[Config], splits: Splits, model: Model | None = None) -> Run:
    """One run of all `configs`; state, batches and records have a leading axis of K members.

    Member i equals the run of `configs[i]` alone up to rounding: the same operations in another
    order, relative differences of 1e-5 after a step in float32 (1e-12 in float64), which training
    then amplifies as it does any rounding.
    """
    _check(configs)
    splits.check()
    config = configs[0]
    model = model or train.build(config, splits.train)
    source = train.batches(config, splits.train)
    functions = train.program(config, model, source.steps_per_epoch)
    apply = vmap(model.apply, in_dims=(0, None))

    def init() -> State:
        seeds = [torch.Generator().manual_seed(member.seed) for member in configs]
        return tree.stack([functions.init(generator) for generator in seeds])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        pairs = [source.at(member.seed, step) for member in configs]
        return torch.stack([x for x, _ in pairs]), torch.stack([t for _, t in pairs])

    def diagnose(state: State, member: int) -> train.Diverged:
        own = tree.unstack(state)[member]
        return train.diagnose(functions, own, *source.at(configs[member].seed, int(own.bad_step)))

    rates = [member.peak_learning_rate for member in configs]
    decays = [member.weight_decay for member in configs]
    hyper = Hyper(*(torch.tensor(values, device=config.device) for values in (rates, decays)))
    step = vmap(functions.step)
    return Run(
        config,
        len(configs),
        init,
        hyper,
        train.whole(config, step),
        train.whole(config, step, donate=True),
        batch,
        lambda params: train.evaluate(apply, params, splits.val, config),
        diagnose,
        source.steps_per_epoch,
    )


def run(
    configs: Sequence[Config],
    splits: Splits,
    model: Model | None = None,
    ranks: train.Ranks = train.ALONE,
) -> Run:
    """The run of `configs`: plain for one of them, stacked for more."""
    if len(configs) == 1:
        return train.solo(configs[0], splits, model, ranks)
    if ranks.size > 1:
        raise ValueError(
            f"`run` needs one member with {ranks.size} processes, got {len(configs)}. Train the "
            "seeds one by one, with --group 1."
        )
    return stacked(configs, splits, model)


def member(value: tree.Tree, index: int) -> tree.Tree:
    """The state, or parameters, of one member of a stacked one."""
    return tree.map(lambda leaf: leaf[index], value)


def members(value: tree.Tree, count: int) -> list[tree.Tree]:
    """The state, or parameters, of each of `count` members; of one alone there is no axis."""
    return [value] if count == 1 else tree.unstack(value)


def together(found: Sequence[tree.Tree]) -> tree.Tree:
    """The state, or parameters, of all members, of which `members` gives each."""
    return found[0] if len(found) == 1 else tree.stack(found)


def fastest_group(
    configs: Sequence[Config], splits: Splits, repeats: int = 3
) -> tuple[int, dict[int, float]]:
    """How many members to train at once: measures a step at 1, 2, 4, .. and all members.

    Returns the group size with the lowest time a member, and the seconds per member and step of
    each size that was tried. A size is taken to have lost, and larger ones are not tried, once it
    is 1.3 times slower than the best.
    """
    _check(configs)
    if repeats < 1:
        raise ValueError(f"`fastest_group` needs `repeats` >= 1, got {repeats}. Use 3.")
    sizes = sorted({1, len(configs)} | {2**i for i in range(1, 7) if 2**i < len(configs)})
    seconds: dict[int, float] = {}
    for size in sizes:
        trial = run(configs[:size], splits)
        state = trial.init()
        pair = trial.batch(0)
        best = float("inf")
        for attempt in range(repeats + 1):
            began = time.perf_counter()
            state, metrics = trial.advance(state, trial.hyper, *pair)
            metrics.loss.sum().item()  # waits for the device
            if attempt:  # the first call warms up
                best = min(best, time.perf_counter() - began)
        seconds[size] = best / size
        if seconds[size] > 1.3 * min(seconds.values()):
            break
    return min(seconds, key=lambda size: seconds[size]), seconds


def groups(configs: Sequence[Config], size: int) -> list[list[Config]]:
    """`configs` in groups of at most `size`, in order, as even as can be.

    >>> [len(group) for group in groups([Config(seed=i) for i in range(5)], 3)]
    [3, 2]
    """
    schema.check_integer("groups", "size", size, 1, "Use 1 to train one by one.")
    if not configs:
        raise ValueError("`groups` needs one config or more, got none.")
    count = -(-len(configs) // size)
    base, extra = divmod(len(configs), count)
    cuts = [i * base + min(i, extra) for i in range(count + 1)]
    return [list(configs[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def seeds(config: Config, values: Sequence[int]) -> list[Config]:
    """`config` once for each seed."""
    if len(set(values)) != len(values) or not values:
        raise ValueError(
            f"`seeds` needs one or more different seeds, got {list(values)}. Drop the repeats."
        )
    return [dataclasses.replace(config, seed=value) for value in values]


def split_record(record: Record, size: int) -> list[Record]:
    """The records of the `size` members of a record whose values are lists."""
    if size == 1:
        return [record]
    return [
        {key: value[i] if isinstance(value, list) else value for key, value in record.items()}
        for i in range(size)
    ]


def fit(
    configs: Sequence[Config], splits: Splits | None = None, group: int | Literal["auto"] = "auto"
) -> Iterator[list[Record]]:
    """Trains all `configs`; yields, after each epoch of a group, one record a member of it.

    `group` is the number of members trained at once, or "auto" to measure it (`fastest_group`). A
    record has also `member`, its index in `configs`, and in the last epoch `params`. A member that
    diverges stands still, with the step in `diverged`, and leaves the others alone.

    Raises Diverged, once the other groups are trained, where of a group no member is left.
    """
    _check(configs)
    splits = splits or train.load_data(configs[0])
    size = fastest_group(configs, splits)[0] if group == "auto" else group
    first, lost = 0, []
    for part in groups(configs, size):
        count = len(part)
        try:
            for state, record in train.loop(run(part, splits)):
                records = split_record(record, count)
                weights = members(train.weights_for_evaluation(state), count)
                for i, one in enumerate(records):
                    one["member"] = first + i
                    if one["epoch"] == part[0].epochs:
                        one["params"] = weights[i]
                yield records
        except train.Diverged as error:
            lost.append(error)
        first += count
    if lost:
        raise lost[0]
