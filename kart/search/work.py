"""What a study does: it is set up, worked on by any number of processes, and its best confirmed."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from kart import data, population, tables, train
from kart.search import journal, patience
from kart.search import storage as store
from kart.search.question import Question, Study
from kart.search.space import PLACE, Space, enumerate_space, fingerprint, first
from kart.search.storage import Arms, Settings
from kart.search.trials import (
    Evaluation,
    Outcome,
    Task,
    evaluation,
    loader,
    scores_of,
    train_members,
    trained,
)
from kart.train import Config, Splits

# the first of the seeds that winners are confirmed with, unless trials have used it
FRESH_SEED = 10_000


class Home(NamedTuple):
    """Where a study is kept: a run directory, or the URL of a database server."""

    directory: Path | None
    url: str

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.directory or store.hide(self.url))


def home(out: str | None, url: str | None) -> Home:
    """The home that `--out` and `--storage` name."""
    if url is not None:
        store.check_url(url)
        return Home(None, url)
    if out is None:
        raise ValueError(
            "`kart study` needs `--out DIR`, or `--storage URL` for a database server, got neither."
        )
    return Home(Path(out), store.directory_url(Path(out).resolve()))


def describe_data(splits: Splits) -> dict[str, Any]:
    """What the settings of a study say of its data: equal where the images and labels are."""
    images = splits.train.images
    return {
        "train": len(images),
        "val": len(splits.val.images),
        "image": list(images.shape[1:]),
        "classes": len(splits.train.classes),
        "mean": [round(value, 6) for value in splits.train.mean],
        "images": {name: one.fingerprint[:16] for name, one in splits._asdict().items()},
    }


def settings_for(asked: Question, splits: Splits, options: Mapping[str, Any]) -> Settings:
    """The settings of a study that is to start; `options` are the fields that `Study` has not."""
    study = asked.study
    spaces = study.spaces(study.config, options["fix"])
    return Settings(
        study=asked.name,
        named=asked.named,
        question=asked.text,
        source=asked.source,
        versions=store.versions(),
        config=dataclasses.replace(study.config, **PLACE).asdict(),
        spaces={arm: fingerprint(space) for arm, space in spaces.items()},
        dataset=describe_data(splits),
        seeds=study.seeds,
        trials=study.trials,
        confirm=study.confirm,
        sampler=study.sampler,
        pruner=study.pruner,
        **options,
    )


def points_of(settings: Settings, spaces: Mapping[str, Space]) -> dict[str, list[dict]] | None:
    """The queue of each arm for the samplers that try all points, in shuffled order."""
    if not settings.queued:
        return None
    levels = settings.levels if settings.sampler == "grid" else None
    queues = {}
    for arm, space in spaces.items():
        points = enumerate_space(space, levels)
        generator = data.generator_for("points", settings.sampler_seed, arm)
        order = torch.randperm(len(points), generator=generator).tolist()
        queues[arm] = [points[i] for i in order][: settings.per_arm]
        if len(points) > settings.per_arm:
            told = f"{settings.per_arm} of its {len(points)} points, drawn"
            print(f"{arm}: {told}; --trials gives it more")
        elif len(points) < settings.per_arm:
            print(f"{arm}: all of its {len(points)} points, fewer than {settings.per_arm} trials")
    return queues


def mend(where: Home, settings: Settings, study: Study) -> None:
    """Makes the SQLite file of a run directory again from its journal, where it is lost."""
    directory = where.directory
    if directory is None:
        return
    with open(directory / ".workers", "w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)  # one at a time
        if not journal.problem(directory, settings.names.values(), journal.read(directory)):
            return
        journal.put_aside(directory)
        storage = store.open_database(where.url, settings.heartbeat, create=True)
        store.create(storage, settings, None)
        spaces = study.spaces(Config.fromdict(settings.config), settings.fix)
        points = points_of(settings, spaces)
        journal.restore(directory, store.studies(storage, settings), points)
        storage.engine.dispose()


def set_up(
    where: Home, settings: Settings, study: Study, measure: Callable[[], int], wait_s: float = 0.0
) -> tuple[RDBStorage, Settings]:
    """Creates the study, or goes on with it where it is the same; else raises and changes nothing.

    `measure()` gives the group size of a new study; `wait_s` is how long a server may be away.
    """
    directory, storage = where.directory, None
    if directory is None:
        storage = store.open_database(where.url, settings.heartbeat, create=True, wait_s=wait_s)
        found = store.read_database(storage, settings.study).get(settings.study)
    else:
        found = store.read_settings(directory)
        if found is None and directory.exists():
            others = [e.name for e in directory.iterdir() if not e.name.startswith((".", "study"))]
            if others:
                raise ValueError(
                    f"`out` needs a new or empty directory, or a study, got {str(directory)!r} "
                    f"with {', '.join(sorted(others)[:5])}. Choose another directory."
                )
    if found is not None:
        store.check_same(found, settings, where.name)
        mend(where, found, study)
    # measured before anything is written
    group = settings.group or (measure() if found is None else found.group)
    settings = dataclasses.replace(settings, group=group)
    if storage is None:
        assert directory is not None
        directory.mkdir(parents=True, exist_ok=True)
        storage = store.open_database(where.url, settings.heartbeat, create=found is None)
    spaces = study.spaces(study.config, settings.fix)
    if found is None:
        store.create(storage, settings, points_of(settings, spaces))
        store.save_settings(storage, settings, directory)
    elif settings != found:
        points = points_of(settings, spaces) or {}
        for arm, one in store.studies(storage, settings).items():
            store.enqueue(one, points.get(arm, ()))
        store.save_settings(storage, settings, directory)
    return storage, settings


def fastest_group(
    study: Study, settings: Settings, load: Callable[[Config], Splits], place: Mapping[str, Any]
) -> int:
    """How many of a trial's seeds to train at once: measured on the last arm's first point."""
    config = first(study.spaces(study.config, settings.fix)[list(study.arms)[-1]])
    config = dataclasses.replace(config, **place)
    members = population.seeds(config, range(settings.seeds))
    size, seconds = population.fastest_group(members, load(config))
    shown = ", ".join(f"{k}: {1000 * s:.1f} ms" for k, s in seconds.items())
    print(f"{size} of {settings.seeds} seeds at a time (ms per seed and step: {shown})")
    return size


# the loop


def counts(study: optuna.Study) -> collections.Counter[TrialState]:
    """How many trials are in each state."""
    return collections.Counter(trial.state for trial in study.get_trials(deepcopy=False))


class Candidate(NamedTuple):
    """A configuration that a search has trained: all its seeds, over all trials that drew it."""

    key: str
    config: dict[str, Any]
    scores: dict[int, float]
    mean: float
    trial: FrozenTrial  # the last one


def candidates(study: optuna.Study) -> list[Candidate]:
    """The configurations with a value, best first."""
    trials = trained(study.get_trials(deepcopy=False))
    last = {trial.user_attrs["key"]: trial for trial in trials}
    found = []
    for name, trial in last.items():
        scores = scores_of(trials, name)
        mean = statistics.fmean(scores.values())
        found.append(Candidate(name, trial.user_attrs["config"], scores, mean, trial))
    return sorted(found, key=lambda one: (-one.mean, one.trial.number))


def winners(study: optuna.Study) -> list[Candidate]:
    """The best configuration; with several objectives those that no other dominates."""
    found = candidates(study)
    if len(study.directions) == 1:
        return found[:1]
    front = {trial.user_attrs["key"] for trial in trained(study.best_trials)}
    return [one for one in found if one.key in front]


def _next(arms: Arms, settings: Settings) -> tuple[str, int] | None:
    """The arm that is furthest behind, and how many trials it may start; None if none may."""
    found = []
    for place, (arm, study) in enumerate(arms.items()):
        state = counts(study)
        taken = sum(state[s] for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
        waiting = state[TrialState.WAITING]
        room = waiting if settings.queued else max(waiting, settings.per_arm - taken)
        if room > 0:
            found.append((taken, place, arm, room))
    return min(found)[2:] if found else None


def _patience(arms: Arms, grace: float) -> float:
    """Seconds after which a trial of another worker is not waited for: it may be long dead."""
    finished = [
        trial.duration.total_seconds()
        for study in arms.values()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.duration is not None
    ]
    return 2 * grace + 3 * max(finished, default=0.0)


def trial_batch(
    study: optuna.Study, storage: RDBStorage, todo: Evaluation, count: int, worker: str
) -> None:
    """Asks for `count` trials, trains them, tells their results.

    An interrupt ends them and puts them back into the queue; an error puts back those that came
    from it, `store.MAX_RETRIES` times at most.
    """
    trials: list[optuna.Trial] = []
    ready: list[tuple[optuna.Trial, Task | Outcome]] = []
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                trials.append(store.ask(study))
                stack.enter_context(store.beating(storage, study, trials[-1].number))
                trials[-1].set_user_attr("worker", worker)
                # parameters are drawn before the next trial is asked for, which must see them
                ready.append((trials[-1], todo.prepare(trials[-1])))
            tasks = [task for _, task in ready if isinstance(task, Task)]
            trained = iter(todo.run(tasks))
            for trial, task in ready:
                outcome = next(trained) if isinstance(task, Task) else task
                if outcome.values is None:
                    trial.set_user_attr("reason", outcome.reason)
                    study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
                else:
                    study.tell(trial, list(outcome.values), skip_if_finished=True)
    except BaseException as error:
        if isinstance(error, ConnectionError):
            raise  # nothing can be told now: the heartbeats end, which puts the trials back
        # another worker has taken this one for dead, or the user has stopped it: try again
        again = isinstance(error, KeyboardInterrupt | optuna.exceptions.UpdateFinishedTrialError)
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in {trial.number for trial in trials}:
                study.tell(frozen.number, state=TrialState.FAIL)
                if again or "fixed_params" in frozen.system_attrs:
                    store.retry(None if again else store.MAX_RETRIES)(study, frozen)
        if not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
            raise


def work(
    where: Home,
    storage: RDBStorage,
    settings: Settings,
    study: Study,
    *,
    place: Mapping[str, Any],
    pool: int = 1,
    worker: str = "0",
    quiet: bool = False,
    timeout: float | None = None,
) -> bool:
    """Works on a study until each arm has its trials; returns whether it has.

    Any number of processes may do so at once on a database server, two on SQLite. The last ones
    wait for the trials of the others, to retry those of workers that die.
    """
    # of a server that is away, Optuna warns at every try
    level = optuna.logging.WARNING if where.directory is not None else optuna.logging.ERROR
    optuna.logging.set_verbosity(level)
    arms = store.studies(storage, settings)
    load = loader(settings.val_limit)
    config = Config.fromdict(settings.config)
    todo = {
        arm: evaluation(
            space,
            load,
            seeds=settings.seeds,
            objectives=settings.objectives,
            limits=settings.limits,
            group=settings.group * pool,
            place=place,
        )
        for arm, space in study.spaces(config, settings.fix).items()
    }
    began = time.monotonic()
    slot: Any = contextlib.nullcontext()
    if where.directory is not None:
        slot = store.worker_slot(where.directory, lambda: store.recover(arms))
    with slot, _bar(arms, settings, quiet) as update:
        waited = time.monotonic()
        while True:
            # a worker that could not beat while the server was away is not dead
            if time.monotonic() - patience.away_until(storage) > 3 * settings.heartbeat:
                for one in arms.values():
                    store.fail_stale_trials(one)
            if timeout is not None and time.monotonic() - began > timeout:
                return False
            chosen = _next(arms, settings)
            if chosen is not None:
                arm, room = chosen
                with _kept(where, arms, settings):
                    trial_batch(arms[arm], storage, todo[arm], min(pool, room), worker)
                waited = time.monotonic()
            elif all(counts(one)[TrialState.RUNNING] == 0 for one in arms.values()):
                return True
            elif time.monotonic() - waited > _patience(arms, 3 * settings.heartbeat):
                return False
            else:
                time.sleep(min(1.0, settings.heartbeat / 2))
            update()


@contextlib.contextmanager
def _kept(where: Home, arms: Arms, settings: Settings) -> Iterator[None]:
    """Writes the trials of the block into the journal of a run directory, and raises ValueError
    where its SQLite file was lost, whatever the block raised.
    """
    directory = where.directory
    if directory is None:
        yield
        return
    least = journal.size(directory)
    try:
        yield
        journal.append(directory, arms)
    except Exception:
        journal.check(directory, settings.names.values(), least)
        raise
    journal.check(directory, settings.names.values(), least)


def summary(arms: Arms) -> str:
    """The best of each arm so far, in one line."""
    best = {arm: winners(study) for arm, study in arms.items()}
    shown = [
        f"{arm} {100 * max(one.mean for one in found):.2f} %"
        for arm, found in best.items()
        if found
    ]
    return ", ".join(shown[:4])


@contextlib.contextmanager
def _bar(arms: Arms, settings: Settings, quiet: bool) -> Iterator[Callable[[], None]]:
    def done() -> int:
        states = map(counts, arms.values())
        return sum(state[TrialState.COMPLETE] + state[TrialState.PRUNED] for state in states)

    total = settings.per_arm * len(arms)
    if settings.queued:
        total = sum(one.total() - one[TrialState.FAIL] for one in map(counts, arms.values()))
    with tables.bar(
        total=total, initial=done(), desc=settings.study, unit="trial", disable=quiet
    ) as bar:

        def update() -> None:
            bar.set_postfix_str("best: " + (summary(arms) or "none yet"), refresh=False)
            bar.update(done() - bar.n)

        yield update


# confirmation


class Confirmed(NamedTuple):
    """A winner trained again with fresh seeds: what the search said of it, and what it is worth.

    `val` and `test` are the accuracies by seed, on images that chose it and on images that did not.
    """

    key: str
    config: dict[str, Any]
    search: list[float]
    val: dict[int, float]
    test: dict[int, float]
    diverged: list[int]
    seconds: float
    images: int | None = None  # how many the test split has


def confirmed(study: optuna.Study) -> dict[str, Confirmed]:
    """What has been confirmed of an arm, by key."""
    found = {}
    for one in study.user_attrs.get("confirmed", []):
        numbers = {
            split: {int(seed): value for seed, value in one[split].items()}
            for split in ("val", "test")
        }
        found[one["key"]] = Confirmed(**{**one, **numbers})
    return found


def best_confirmed(study: optuna.Study) -> Confirmed | None:
    """The confirmation of an arm's best configuration, where there is one."""
    stored = confirmed(study)
    return next((stored[one.key] for one in winners(study) if one.key in stored), None)


def fresh_seeds(arms: Arms, count: int) -> range:
    """The seeds that winners are confirmed with, the same for all arms: none that chose any."""
    used = (seed for study in arms.values() for one in candidates(study) for seed in one.scores)
    first = max(FRESH_SEED, 1 + max(used, default=0))
    return range(first, first + count)


def confirm(
    arms: Arms, settings: Settings, seeds: int, place: Mapping[str, Any], quiet: bool = False
) -> None:
    """Trains the best of each arm again with `seeds` fresh seeds, the same for all arms, and scores
    them on the test split; what has been confirmed is not touched again.
    """
    load, fresh = loader(settings.val_limit), fresh_seeds(arms, seeds)

    def seeds_of(study: optuna.Study, one: Candidate) -> set[int]:
        found = confirmed(study).get(one.key)
        return set() if found is None else {*found.val, *found.diverged}

    todo = [
        (study, one)
        for study in arms.values()
        for one in winners(study)
        if not seeds_of(study, one) >= set(fresh)
    ]
    for study, one in tables.bar(
        todo, desc="fresh seeds", unit="winner", disable=quiet or not todo
    ):
        began = time.perf_counter()
        config = dataclasses.replace(Config.fromdict(one.config), **place)
        members = population.seeds(config, fresh)
        splits = load(config)
        results = train_members(members, splits, settings.group)
        test = data.load(config.data, "test", image_size=config.decode_size, stream=config.stream)
        model = train.build(config, splits.train)
        val_scores, test_scores, bad = {}, {}, []
        for member, result in zip(members, results, strict=True):
            if result.params is None:
                bad.append(member.seed)
                continue
            scores = train.evaluate(model.apply, result.params, test, config)
            val_scores[member.seed] = result.record["val_top1"]
            test_scores[member.seed] = float(scores["top1"])
        entry = Confirmed(
            one.key,
            one.config,
            list(one.scores.values()),
            val_scores,
            test_scores,
            bad,
            round(time.perf_counter() - began, 1),
            len(test.labels),
        )
        others = {k: v._asdict() for k, v in confirmed(study).items() if k != one.key}
        study.set_user_attr("confirmed", [*others.values(), entry._asdict()])


def _results_digest(arms: Arms) -> str:
    found = [(arm, best_confirmed(study)) for arm, study in arms.items()]
    text = json.dumps([(arm, None if one is None else one._asdict()) for arm, one in found])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_answer(arms: Arms, text: str) -> None:
    """Stores what a study concludes from the confirmed results that there are."""
    first = next(iter(arms.values()))
    first.set_user_attr("answer", {"text": text, "results": _results_digest(arms)})


def stored_answer(arms: Arms) -> str | None:
    """What the study's own code concluded; None where it has not, or from other results."""
    stored = next(iter(arms.values())).user_attrs.get("answer")
    if stored is None or stored["results"] != _results_digest(arms):
        return None
    return stored["text"]
