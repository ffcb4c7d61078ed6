"""A trial as K seeds of one configuration, trained together; its value is their mean.

    study = optuna.create_study(direction="maximize")
    study.optimize(objective(space), n_trials=20)

`train_members` trains and drops members, `evaluation` makes trials of it, `objective` is for
`optuna.Study.optimize`.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from kart import operators, population, schema, train, tree
from kart.search.space import Space, draw, key, shape
from kart.train import Config, Record, Splits, State

OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "parameters": "minimize",
    "flops": "minimize",
    "memory": "minimize",
    "step_time": "minimize",
}
LIMITS = ("parameters", "flops", "memory")  # what is known before training
DATA = ("data", "train_limit", "decode_size", "stream")  # fields of Config that name the data


class Member(NamedTuple):
    """What became of one seed: epochs trained, its last record, the step at which it diverged (else
    -1), and its weights if it went through all epochs.
    """

    epochs: int
    record: Record
    diverged: int
    params: train.Params | None


def _keep(indices: list[int], state: State, stop: set[int]) -> tuple[list[int], State | None]:
    places = [place for place, i in enumerate(indices) if i not in stop]
    left = [indices[place] for place in places]
    if not left or len(left) == len(indices):
        return left, state if left else None
    if len(left) == 1:  # the run of one config has no axis of members
        return left, population.member(state, places[0])
    return left, tree.map(lambda leaf: leaf[places], state)


def train_members(
    configs: Sequence[Config],
    splits: Splits,
    group: int,
    after_epoch: Callable[[int, dict[int, Record]], Iterable[int]] = lambda epoch, records: (),
) -> list[Member]:
    """Trains configs of one shape in step, epoch by epoch, at most `group` in one vmapped program.

    After each epoch `after_epoch(epoch, records)` gets the records of the members still there, by
    index, and returns those to stop. A member that diverges is dropped; the others go on as if
    nothing had happened.
    """
    model = train.build(configs[0], splits.train)
    order = iter(range(len(configs)))
    parts: list[tuple[list[int], State | None]] = [
        ([next(order) for _ in part], None) for part in population.groups(configs, group)
    ]
    members = [Member(0, {}, -1, None) for _ in configs]
    for epoch in range(1, configs[0].epochs + 1):
        records: dict[int, Record] = {}
        trained: list[tuple[list[int], State]] = []
        for indices, state in parts:
            run = population.run([configs[i] for i in indices], splits, model)
            try:
                state, record = next(train.loop(run, state, donate=True))
            except train.Diverged as error:  # all of the group
                for i in indices:
                    members[i] = members[i]._replace(diverged=error.step)
                continue
            trained.append((indices, state))
            for i, one in zip(indices, population.split_record(record, len(indices)), strict=True):
                members[i] = Member(epoch, one, one["diverged"], None)
                if one["diverged"] < 0:
                    records[i] = one
        stop = set(range(len(configs))) - records.keys() | set(after_epoch(epoch, records))
        kept = [_keep(indices, state, stop) for indices, state in trained]
        parts = [part for part in kept if part[0]]
    for indices, state in parts:
        assert state is not None  # each part has been through an epoch
        weights = population.members(train.weights_for_evaluation(state), len(indices))
        for i, own in zip(indices, weights, strict=True):
            members[i] = members[i]._replace(params=own)
    return members


def costs(config: Config, splits: Splits, members: int = 1) -> dict[str, float]:
    """What a configuration costs, before it is trained: `parameters`, `flops` of one image forward,
    where its operators tell them, and `memory`, the MiB in which `members` of it train, part of a
    batch by part, and in the precision, that it says.
    """
    from kart.analysis import cost

    model = train.build(config, splits.train)
    parameters = cost.parameters(model).total
    # weights, gradients, AdamW's two moments and an average stay; activations come and go
    copies, width = 5 if config.ema else 4, 4 if config.precision == "float32" else 2
    part = config.batch_size // config.accumulate
    held = 4 * copies * parameters + cost.activation_memory(model, part, bytes_each=width)
    counted = {} if cost.uncounted(model) else {"flops": float(cost.flops(model).total)}
    return {"parameters": float(parameters), **counted, "memory": members * held / 2**20}


class Outcome(NamedTuple):
    """How a trial ended: its values, or None and the reason why it was pruned."""

    values: tuple[float, ...] | None
    reason: str = ""


class Task(NamedTuple):
    """A trial that is ready to train: its members (one config a seed), the scores that earlier
    trials of the same configuration have, and its costs.
    """

    trial: optuna.Trial
    members: list[Config]
    earlier: dict[int, float]
    cost: dict[str, float]


class Evaluation(NamedTuple):
    """`prepare(trial)` draws its configuration, or says why it is not trained; `run(tasks)` trains
    tasks together, those of one shape as one population.
    """

    prepare: Callable[[optuna.Trial], Task | Outcome]
    run: Callable[[list[Task]], list[Outcome]]


def trained(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The complete trials that were trained here: what was added to an Optuna study by hand tells
    its sampler something, but has no config and no seeds.
    """
    return [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE and "scores" in trial.user_attrs
    ]


def scores_of(trials: Iterable[FrozenTrial], name: str) -> dict[int, float]:
    """Validation accuracy by seed over all complete trials of the configuration named `name`."""
    found: dict[int, float] = {}
    for trial in trained(trials):
        if trial.user_attrs["key"] == name:
            found |= {int(seed): score for seed, score in trial.user_attrs["scores"].items()}
    return found


def _claim(trial: optuna.Trial, name: str, low: int, count: int) -> tuple[range, dict[int, float]]:
    """`count` seeds from `low` on for `trial`, noted in it, that no other trial of the
    configuration `name` has trained or trains now; and the scores of those that are complete.

    Others may choose at the same time, in other processes: so each looks again once its own seeds
    can be seen, and where they clash those of the later trial come behind those of the earlier.
    """
    own = range(0)
    while True:
        every = trial.study.get_trials(deepcopy=False)
        earlier, taken = scores_of(every, name), dict[int, list[int]]()
        for other in every:
            alive = other.state in (TrialState.RUNNING, TrialState.COMPLETE)
            if alive and other.number != trial.number and other.user_attrs.get("key") == name:
                taken[other.number] = other.user_attrs.get("seeds", [])
        clashes = [number for number, seeds in taken.items() if set(own) & set(seeds)]
        if own and not clashes:
            return own, earlier
        before = sum(number < trial.number for number in clashes)
        first = 1 + max({low - 1, *earlier}.union(*taken.values())) + before * count
        own = range(first, first + count)
        trial.set_user_attr("seeds", list(own))


def _untrained(trial: optuna.Trial, error: ValueError) -> ValueError:
    return ValueError(
        f"trial {trial.number} of {trial.study.study_name!r} with {trial.params}: {error} If this "
        "point cannot be trained, prune it in its space: `raise optuna.TrialPruned(why)`."
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # the allocator of the CPU raises a bare RuntimeError
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def loader(val_limit: int | None = None) -> Callable[[Config], Splits]:
    """Loads the data of configs, each once; `val_limit` images to validate, by `Dataset.spread`."""

    @functools.lru_cache
    def load(of_data: Config) -> Splits:
        splits = train.load_data(of_data)
        if val_limit is None:
            return splits
        whole = len(splits.val.labels)
        if val_limit > whole:
            raise ValueError(
                f"`val_limit` needs at most the {whole} validation images, got {val_limit}. Leave "
                "it out to use them all."
            )
        return splits._replace(val=splits.val.part(splits.val.spread(val_limit)))

    return lambda config: load(_of_data(config))


def _of_data(config: Config) -> Config:
    """A config that names the data of `config`, and nothing else."""
    return Config(**{name: getattr(config, name) for name in DATA})


def _check_images(trial: optuna.Trial, config: Config, images: Mapping[str, str]) -> None:
    """Raises ValueError where an earlier trial of the study had other `images` by the same name:
    neither their values nor the seeds of one configuration could be taken together.
    """
    named = {name: getattr(config, name) for name in DATA}
    for other in trial.study.get_trials(deepcopy=False):
        attrs = other.user_attrs
        if not {"key", "config", "images"} <= attrs.keys():
            continue
        same = {name: attrs["config"].get(name) for name in DATA} == named
        if same and attrs["images"] != images:
            raise ValueError(
                f"`objective` needs the images that the other trials of {trial.study.study_name!r} "
                f"had as {config.data!r}, got others than those of trial {other.number}. Start a "
                "new study."
            )


def check_objectives(names: Sequence[str]) -> None:
    """Raises ValueError unless `names` are different ones of `OBJECTIVES`, accuracy among them."""
    given = [names] if isinstance(names, str) else list(names)
    if isinstance(names, str) or set(given) - set(OBJECTIVES) or len(set(given)) < len(given):
        raise ValueError(
            f"`objectives` needs a list of different ones of {list(OBJECTIVES)}, got {names!r}."
        )
    if "accuracy" not in given:
        raise ValueError(
            f"`objectives` needs accuracy among them, by which trials are stopped early and "
            f"winners chosen, got {given}. Add it: accuracy,{','.join(given)}."
        )


def _settle(
    task: Task, found: dict[int, Member], seconds: float, stopped: str, objectives: Sequence[str]
) -> Outcome:
    """The outcome of a task whose members are `found` by seed, noted in its trial."""
    fine = {seed: member for seed, member in found.items() if member.diverged < 0}
    bad = {str(seed): member.diverged for seed, member in found.items() if member.diverged >= 0}
    epochs = sum(member.epochs for member in found.values())
    note = {"seconds": round(seconds, 3), "epochs": epochs, "diverged": bad}
    task.trial.set_user_attr("spent", note)
    if stopped:
        return Outcome(None, stopped)
    # one survivor of many says little of the configuration, and flatters it
    if 2 * len(fine) < len(found):
        steps = ", ".join(str(step) for step in bad.values())
        return Outcome(None, f"{len(bad)} of {len(found)} seeds diverged, at step {steps}")
    scores = {seed: member.record["val_top1"] for seed, member in fine.items()}
    pooled = list({**task.earlier, **scores}.values())
    mean, n = statistics.fmean(pooled), len(pooled)
    error = statistics.stdev(pooled) / math.sqrt(n) if n > 1 else None
    task.trial.set_user_attr("scores", {str(seed): score for seed, score in scores.items()})
    task.trial.set_user_attr("n", n)
    task.trial.set_user_attr("standard_error", error)
    steps = sum(member.record["step"] for member in fine.values())
    measured = {**task.cost, "accuracy": mean, "step_time": 1000 * seconds / steps}
    return Outcome(tuple(measured[name] for name in objectives))


def evaluation(
    space: Space,
    load: Callable[[Config], Splits],
    *,
    seeds: int = 3,
    objectives: Sequence[str] = ("accuracy",),
    limits: Mapping[str, float] | None = None,
    group: int | None = None,
    place: Mapping[str, Any] | None = None,
) -> Evaluation:
    """What a trial of `space` does; see `objective` for the arguments.

    `load(config)` gives the data of a config; `place` are fields of Config that say where to train
    and where the data is here (`device`, `threads`, `data`).
    """
    limits = dict(limits or {})
    schema.check_integer("objective", "seeds", seeds, 1, "Use 3.")
    size = seeds if group is None else group
    schema.check_integer("objective", "group", size, 1, "Leave it out to train all at once.")
    check_objectives(objectives)
    if set(limits) - set(LIMITS) or not all(schema.fits(one, float) for one in limits.values()):
        raise ValueError(
            f"`objective` needs `limits` of {list(LIMITS)}, a number each, got {limits}. Leave out "
            "what has none."
        )
    several = len(objectives) > 1

    @functools.lru_cache
    def images_of(of_data: Config) -> dict[str, str]:
        return {name: one.fingerprint[:16] for name, one in load(of_data)._asdict().items()}

    def prepare(trial: optuna.Trial) -> Task | Outcome:
        try:
            chosen = draw(space, trial)
            name = key(chosen)
            trial.set_user_attr("config", chosen.asdict())
            trial.set_user_attr("key", name)
            here = dataclasses.replace(chosen, **(place or {}))
            cost = costs(here, load(here), min(size, seeds))
        except optuna.TrialPruned as error:
            return Outcome(None, f"pruned by its space: {error}")
        except ValueError as error:
            raise _untrained(trial, error) from error
        trial.set_user_attr("cost", cost)
        images = images_of(_of_data(here))
        _check_images(trial, chosen, images)
        trial.set_user_attr("images", images)
        if "flops" in (*limits, *objectives) and "flops" not in cost:
            raise ValueError(
                "`objective` needs operators whose operations are known for `flops`, got "
                f"{operators.shown(chosen.operator)}, whose are not. Leave `flops` out."
            )
        over = []
        for limited, limit in limits.items():
            if limited not in trial.constraints:  # a retried trial brings its own
                trial.set_constraint(limited, cost[limited] - limit)
            if cost[limited] > limit:
                over.append(f"{limited} {cost[limited]:,.0f} > {limit:,.0f}")
        if over:
            return Outcome(None, "over the limit: " + ", ".join(over))
        own, earlier = _claim(trial, name, chosen.seed, seeds)
        return Task(trial, population.seeds(here, own), earlier, cost)

    def run(tasks: list[Task]) -> list[Outcome]:
        buckets: dict[str, list[int]] = {}
        for i, task in enumerate(tasks):
            buckets.setdefault(shape(task.members[0]), []).append(i)
        outcomes: dict[int, Outcome] = {}
        for bucket in buckets.values():
            outcomes |= zip(bucket, train_together([tasks[i] for i in bucket]), strict=True)
        return [outcomes[i] for i in range(len(tasks))]

    def train_together(tasks: list[Task]) -> list[Outcome]:
        owner = [i for i, task in enumerate(tasks) for _ in task.members]
        began = time.perf_counter()
        stopped: dict[int, str] = {}
        configs = [member for task in tasks for member in task.members]
        epochs = configs[0].epochs

        def after_epoch(epoch: int, records: dict[int, Record]) -> list[int]:
            if several or epoch == epochs:
                return []
            for i, task in enumerate(tasks):
                scores = [record["val_top1"] for m, record in records.items() if owner[m] == i]
                if i in stopped or not scores:
                    continue
                task.trial.report(statistics.fmean(scores), epoch)
                # the mean over all seeds of a configuration would lack those that did badly
                if not task.earlier and task.trial.should_prune():
                    stopped[i] = f"stopped after epoch {epoch} of {epochs} by the pruner"
            return [m for m, i in enumerate(owner) if i in stopped]

        try:
            members = train_members(configs, load(configs[0]), size, after_epoch)
        except ValueError as error:  # it says what is wrong with all that have this shape
            raise _untrained(tasks[0].trial, error) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return [Outcome(None, "out of memory") for _ in tasks]
        seconds = (time.perf_counter() - began) / len(configs)
        outcomes = []
        for i, task in enumerate(tasks):
            found = {configs[m].seed: members[m] for m, of in enumerate(owner) if of == i}
            spent, why = seconds * len(found), stopped.get(i, "")
            outcomes.append(_settle(task, found, spent, why, objectives))
        return outcomes

    return Evaluation(prepare, run)


def objective(
    space: Space,
    splits: Splits | None = None,
    *,
    seeds: int = 3,
    objectives: Sequence[str] = ("accuracy",),
    limits: Mapping[str, float] | None = None,
    group: int | None = None,
) -> Callable[[optuna.Trial], float | tuple[float, ...]]:
    """An objective for `optuna.Study.optimize`: trains `seeds` seeds of the config `space(trial)`.

    The value is the mean validation accuracy (a fraction) after the last epoch; its standard error,
    the scores of the seeds, the costs and the config (`Config.fromdict` reads it) are user
    attributes, and so are fingerprints of the images: others by the same name are refused in one
    study. The mean over the seeds is reported after each epoch but the last. A configuration
    that has been tried trains further seeds, none of which is stopped early, and its value is the
    mean over all; one that another trial trains at the same time (`n_jobs`, other workers) gets
    other seeds than that. Divergence of more than half of the seeds, a lack of memory, a cost over
    a limit and `optuna.TrialPruned` from the space prune the trial, with the reason as the user
    attribute `reason`.

    Args:
        space: maps a trial to the config to train; the config's seed is the first of the seeds.
        splits: the data; by default those that the config names.
        seeds: K, the members of a trial.
        objectives: "accuracy" alone, or with "parameters", "flops", "memory" (MiB) and "step_time"
            (ms a member); the study needs their directions (`OBJECTIVES`). Several objectives have
            no pruning in Optuna.
        limits: hard limits of "parameters", "flops" or "memory": what exceeds them is not trained.
            They are constraints of the trial, so that the sampler learns from them.
        group: how many seeds train as one vmapped program; None for all.
            `population.fastest_group` measures what is fastest.
    """
    load = loader() if splits is None else lambda config: splits
    prepare, run = evaluation(
        space, load, seeds=seeds, objectives=objectives, limits=limits, group=group
    )

    wanted = [OBJECTIVES[name] for name in objectives]

    def call(trial: optuna.Trial) -> float | tuple[float, ...]:
        study = getattr(trial, "study", None)
        if study is None:
            raise ValueError(
                f"`objective` needs a trial of a study, whose other trials it counts, got a "
                f"{type(trial).__name__}. Call `study.enqueue_trial(params)`, then optimize."
            )
        found = [direction.name.lower() for direction in study.directions]
        if found != wanted:
            raise ValueError(
                f"`objective` needs a study of directions {wanted} for {list(objectives)}, got "
                f"{found}. Pass them to `optuna.create_study`, whose default is to minimize."
            )
        ready = prepare(trial)
        outcome = ready if isinstance(ready, Outcome) else run([ready])[0]
        if outcome.values is None:
            trial.set_user_attr("reason", outcome.reason)
            raise optuna.TrialPruned(outcome.reason)
        return outcome.values if len(objectives) > 1 else outcome.values[0]

    return call
