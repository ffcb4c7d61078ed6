"""Where a study lives: its settings and their guard, the database, samplers and pruners.

A run directory holds `study.json` (the settings) and `study.db` (SQLite); a database server holds
both as well, the settings as an attribute of its Optuna studies. There is one Optuna study an arm,
named `<study>/<arm>`.
"""

import contextlib
import dataclasses
import fcntl
import json
import sqlite3
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
import torch
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

import kart
from kart import checkpoint, schema
from kart.search import patience
from kart.search.trials import OBJECTIVES

Arms = Mapping[str, optuna.Study]  # by name

SQLITE_WORKERS = 2
MAX_RETRIES = 3


def versions() -> dict[str, str]:
    """Versions that must be the same for all trials of a study."""
    return {"kart": kart.__version__, "torch": torch.__version__, "optuna": optuna.__version__}


@dataclass(frozen=True)
class Settings:
    """What defines a study. Fields in `MAY_CHANGE` may differ when it is continued, no other."""

    study: str
    versions: dict[str, str]
    config: dict[str, Any]  # what all trials share
    spaces: dict[str, Any]  # fingerprint of each arm's space
    dataset: dict[str, Any]
    objectives: list[str]
    limits: dict[str, float]
    fix: dict[str, Any]
    seeds: int
    sampler: str
    sampler_seed: int
    levels: int
    pruner: str
    val_limit: int | None
    named: str  # as the command line named it, for those who read the report
    question: str  # as the study's file asks it: the report shows it without running that file
    source: str  # fingerprint of the file
    trials: int  # wanted, of all arms together
    group: int
    confirm: int
    heartbeat: int  # seconds

    @property
    def per_arm(self) -> int:
        """Trials of each arm: all have the same budget."""
        return self.trials // len(self.spaces)

    @property
    def names(self) -> dict[str, str]:
        """The name of each arm's Optuna study."""
        return {arm: f"{self.study}/{arm}" for arm in self.spaces}

    @property
    def queued(self) -> bool:
        """Whether all points wait in the queue from the start."""
        return self.sampler in ("grid", "brute")

    def asdict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


MAY_CHANGE = ("named", "question", "trials", "group", "confirm", "heartbeat")


def changed(settings: Settings, **fields: Any) -> Settings:
    """`settings` with other `fields`, as JSON has them."""
    return Settings(**{**settings.asdict(), **fields})


def check_same(found: Settings, wanted: Settings, where: str) -> None:
    """Raises ValueError, naming every difference, unless `wanted` continues the study `found`."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for part, inner in value.items():
                yield from flat(inner, f"{name}.{part}" if name else part)
        else:
            yield name, value

    old, new = dict(flat(found.asdict(), "")), dict(flat(wanted.asdict(), ""))
    names = sorted(
        name
        for name in {*old, *new}
        if old.get(name) != new.get(name) and name.split(".")[0] not in MAY_CHANGE
    )
    if {"study", "source"} <= set(names):
        raise ValueError(
            f"`study` needs to be {found.study!r}, which is in {where!r}, got {wanted.study!r}. "
            "Start it in a place of its own."
        )
    if names:
        shown = "; ".join(f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in names)
        raise ValueError(
            f"`study` needs the settings and versions it was started with, got others than those "
            f"in {where!r} ({shown}). Nothing was changed. Start a new study, or go back to those."
        )


# databases


def _quiet(category: type[Warning] = optuna.exceptions.ExperimentalWarning) -> Any:
    return warnings.catch_warnings(action="ignore", category=category)


def retry(max_retry: int | None = MAX_RETRIES) -> Callable[[optuna.Study, FrozenTrial], None]:
    """Puts a trial that died back into the queue; at most `max_retry` times."""
    with _quiet():
        return RetryHeartbeatStaleTrialCallback(max_retry=max_retry)


def open_database(
    url: str, heartbeat: int = 20, create: bool = False, wait_s: float = 0.0
) -> RDBStorage:
    """The storage at `url`, with heartbeats; only `create` makes tables.

    Calls wait up to `wait_s` seconds for a server that goes away later (`patience`).
    """
    sqlite = url.startswith("sqlite")
    if sqlite and create:
        # a property of the file: readers and the writer no longer wait for each other
        path = sqlalchemy.make_url(url).database or ""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    try:
        with _quiet():
            storage = RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}}
                if sqlite
                else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=3 * heartbeat,
                heartbeat_stale_trial_callback=retry(),
                skip_table_creation=not create,
            )
        if wait_s and not sqlite:
            patience.wait_for(storage, hide(url), wait_s)
        return storage
    except ImportError as error:
        raise ValueError(
            "`storage` needs a driver for its database, got none. For PostgreSQL, run "
            '`pip install "kart-attention[postgres]"`.'
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`storage` needs a database that can be reached and has the tables of a study, got "
            f"{hide(url)!r} ({reason}). Check the server, and run `kart study init` once."
        ) from None


@contextlib.contextmanager
def reachable(name: str) -> Iterator[None]:
    """Raises ConnectionError, in one line, where the database `name` is lost in the block."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError) as error:
        raise ConnectionError(
            f"the database {name!r} is gone: {patience.reason(error)}. The same command goes on "
            "when it is back."
        ) from error


def hide(url: str) -> str:
    """A database URL without its password."""
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        raise ValueError(
            "`storage` needs a URL such as postgresql://user@host/database, got another."
        ) from None


def check_url(url: str) -> None:
    """Refuses SQLite by URL: the run directory has one, with the locks it needs."""
    hide(url)
    if url.startswith("sqlite"):
        raise ValueError(
            f"`--storage` needs the URL of a database server, got {url!r}. For SQLite, give "
            "`--out DIR`; for several machines, postgresql://user@host/database."
        )


def directory_url(directory: Path) -> str:
    """The SQLite database of a run directory.

    >>> directory_url(Path("/runs/lr?1"))
    'sqlite:////runs/lr%3F1/study.db'
    """
    path = str(directory / "study.db")
    url = sqlalchemy.URL.create("sqlite", database=path).render_as_string()
    if sqlalchemy.make_url(url).database != path:
        raise ValueError(
            f"`out` needs a path that SQLAlchemy {sqlalchemy.__version__} can write in a URL, got "
            f"{str(directory)!r}. Choose one of letters, digits, - and _."
        )
    return url


def studies(storage: RDBStorage, settings: Settings) -> dict[str, optuna.Study]:
    """The Optuna study of each arm, with its sampler and pruner."""
    there = optuna.get_all_study_names(storage=storage)
    missing = [arm for arm, name in settings.names.items() if name not in there]
    if missing:
        raise ValueError(
            f"`study` needs a database with every arm of {settings.study!r}, got one without "
            f"{', '.join(map(repr, missing))}. Put the right file back, or start a new study."
        )
    make, several = SAMPLERS[settings.sampler], len(settings.objectives) > 1
    return {
        arm: optuna.load_study(
            study_name=name,
            storage=storage,
            sampler=PerTrial(lambda seed: make(seed, several), settings.sampler_seed, arm),
            pruner=_PRUNERS[settings.pruner](settings.config["epochs"]),
        )
        for arm, name in settings.names.items()
    }


def _settings(stored: Any) -> Settings:
    """The settings that were stored, as JSON has them; raises TypeError for what are none."""
    found = Settings(**stored)
    for name, kind in typing.get_type_hints(Settings).items():
        if not schema.fits(getattr(found, name), kind):
            raise TypeError(f"{name} is {getattr(found, name)!r:.60}")
    known = {"objectives": OBJECTIVES, "sampler": SAMPLERS, "pruner": PRUNERS}
    for name, words in known.items():
        value = getattr(found, name)
        if not value or not {*([value] if isinstance(value, str) else value)} <= {*words}:
            raise TypeError(f"{name} is {value!r:.60}")
    least = {"trials": max(1, len(found.spaces)), "seeds": 1, "heartbeat": 1}
    for name, count in least.items():
        if getattr(found, name) < count:
            raise TypeError(f"{name} is {getattr(found, name)}")
    counts = [found.dataset.get(split) for split in ("train", "val")]
    if not found.spaces or not all(schema.fits(count, int) for count in counts):
        raise TypeError(f"spaces are {found.spaces!r:.60}, dataset is {found.dataset!r:.60}")
    return found


def read_settings(directory: Path) -> Settings | None:
    """The settings in a run directory, None where it holds no study."""
    path = directory / "study.json"
    if not path.exists():
        return None
    try:
        return _settings(json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, TypeError) as error:
        raise ValueError(
            f"`study` needs a whole study.json of this version of kart, got another in "
            f"{str(directory)!r} ({error}). Start a new study in another directory."
        ) from None


def read_database(storage: RDBStorage, name: str | None = None) -> dict[str, Settings]:
    """The settings of the studies in a database, by name; of `name` alone if given."""
    found: dict[str, Settings] = {}
    for full in optuna.get_all_study_names(storage=storage):
        study = full.partition("/")[0]  # an arm may have more of them
        if study in found or (name is not None and study != name):
            continue
        text = optuna.load_study(study_name=full, storage=storage).user_attrs.get("settings")
        if text is not None:
            try:
                found[study] = Settings(**text)
            except TypeError as error:
                raise ValueError(
                    f"`study` needs settings of this version of kart, got others in the database "
                    f"of {study!r} ({error}). Start a new study."
                ) from error
    return found


def create(storage: RDBStorage, settings: Settings, points: dict[str, list[dict]] | None) -> None:
    """Creates the studies of all arms; `points` of an arm are put into its queue.

    Their settings are written last: a study has them once it is complete.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: list[Any] = [OBJECTIVES[name] for name in settings.objectives]
    made = []
    for arm, name in settings.names.items():
        study = optuna.create_study(
            study_name=name, storage=storage, directions=directions, load_if_exists=True
        )
        enqueue(study, (points or {}).get(arm, ()))
        made.append(study)
    for study in made:
        study.set_user_attr("settings", settings.asdict())


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Puts those of `points` into the queue of an arm that it has not had."""
    trials = study.get_trials(deepcopy=False)
    known = [trial.system_attrs.get("fixed_params") for trial in trials]
    for point in points:
        if dict(point) not in known:
            study.enqueue_trial(dict(point))


def save_settings(storage: RDBStorage, settings: Settings, directory: Path | None) -> None:
    """Stores changed settings (those in `MAY_CHANGE`)."""
    for name in settings.names.values():
        study = optuna.load_study(study_name=name, storage=storage)
        study.set_user_attr("settings", settings.asdict())
    if directory is not None:
        checkpoint.write_json(directory / "study.json", settings.asdict())


# workers


@contextlib.contextmanager
def worker_slot(directory: Path, recover: Callable[[], None]) -> Iterator[None]:
    """Holds one of the two places that SQLite has for workers; a place is freed by any death.

    Who comes first of all calls `recover()`: whatever runs then has lost its worker.
    """
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(open(directory / ".workers", "w"))
        fcntl.flock(door, fcntl.LOCK_EX)  # one at a time through the door
        places = [
            stack.enter_context(open(directory / f".worker-{i}", "w"))
            for i in range(SQLITE_WORKERS)
        ]
        free = []
        for place in places:
            with contextlib.suppress(OSError):
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(place)
        if not free:
            raise ValueError(
                f"`work` needs at most {SQLITE_WORKERS} workers on the SQLite database of a run "
                f"directory, got one more for {str(directory)!r}. For more, use PostgreSQL: "
                "`kart study init NAME --storage postgresql://user@host/database`."
            )
        if len(free) == SQLITE_WORKERS:
            recover()
        for place in free[1:]:
            fcntl.flock(place, fcntl.LOCK_UN)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


def recover(arms: Arms) -> None:
    """Ends every running trial of a study that has no worker, and puts it back into the queue."""
    again = retry()
    for study in arms.values():
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            again(study, trial)


@contextlib.contextmanager
def beating(storage: RDBStorage, study: optuna.Study, number: int) -> Iterator[None]:
    """Records heartbeats of a trial that was asked for, as Optuna does in `optimize` alone."""
    interval = storage.get_heartbeat_interval()
    stop = threading.Event()
    of = storage.get_study_id_from_name(study.study_name)
    trial = storage.get_trial_id_from_study_id_trial_number(of, number)

    def beat() -> None:
        while True:
            # what stops a heartbeat stops the worker's own calls as well, which say so
            with contextlib.suppress(Exception):
                storage.record_heartbeat(trial)
            if stop.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(interval)  # not for as long as a server is away


def ask(study: optuna.Study) -> optuna.Trial:
    """The next trial, new or from the queue, of a study whose heartbeats we record (`beating`)."""
    with _quiet(UserWarning):  # Optuna warns that `ask` leaves them to the caller
        return study.ask()


def fail_stale_trials(study: optuna.Study) -> None:
    """Ends the trials whose worker has stopped beating; they are retried."""
    with _quiet():
        optuna.storages.fail_stale_trials(study)


# samplers and pruners


def original(trial: FrozenTrial) -> int:
    """The number of the trial that this one retries, else its own."""
    return trial.system_attrs.get("failed_trial", trial.number)


class PerTrial(BaseSampler):
    """A sampler made anew for each trial, seeded by (seed, arm, index of the trial).

    So suggestions do not depend on which worker makes them or on when the study was resumed, and no
    draw is repeated; trials that died and were retried are not counted twice.
    """

    def __init__(self, make: Callable[[int], BaseSampler], *keys: int | str):
        self._make, self._keys = make, keys
        self._now = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        first = original(trial)
        trials = study.get_trials(deepcopy=False)
        index = sum(original(one) == one.number < first for one in trials)
        self._now = self._make(int(schema.digest([*self._keys, index])[:8], 16))
        self._now.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self._now.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self._now.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._now.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        self._now.after_trial(study, trial, state, values)


# options are passed explicitly: their defaults differ between versions of Optuna
SAMPLERS: dict[str, Callable[[int, bool], BaseSampler]] = {
    "tpe": lambda seed, several: optuna.samplers.TPESampler(
        n_startup_trials=8,
        n_ei_candidates=24,
        multivariate=not several,
        group=False,
        constant_liar=True,
        seed=seed,
    ),
    "random": lambda seed, several: optuna.samplers.RandomSampler(seed=seed),
    "nsga2": lambda seed, several: optuna.samplers.NSGAIISampler(
        population_size=12, crossover_prob=0.9, swapping_prob=0.5, seed=seed
    ),
    "gp": lambda seed, several: optuna.samplers.GPSampler(
        n_startup_trials=8, warn_independent_sampling=False, seed=seed
    ),
    # see `Settings.queued`
    "grid": lambda seed, several: optuna.samplers.RandomSampler(seed=seed),
    "brute": lambda seed, several: optuna.samplers.RandomSampler(seed=seed),
}


class Halving(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al. 2020, ASHA) on the reported values alone.

    After `first * factor**i` epochs a trial goes on if it is among the best 1/`factor` of those
    that have come so far. Optuna's `SuccessiveHalvingPruner` keeps its rungs as attributes, which a
    retried trial inherits and which then count twice; this one has no state but the trials.
    """

    def __init__(self, first: int, factor: int = 3):
        self._first, self._factor = first, factor

    def _is_rung(self, epoch: int) -> bool:
        rung = self._first
        while rung < epoch:
            rung *= self._factor
        return rung == epoch

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step
        if epoch is None or not self._is_rung(epoch):
            return False
        value = trial.intermediate_values[epoch]
        others = [
            one.intermediate_values[epoch]
            for one in study.get_trials(deepcopy=False)
            if one.number != trial.number
            and one.state != TrialState.FAIL
            and epoch in one.intermediate_values
        ]
        better = sum(other > value for other in others)
        return better >= max(1, (len(others) + 1) // self._factor)


# each for a number of epochs
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "asha": lambda epochs: Halving(max(1, epochs // 4)),
    "median": lambda epochs: optuna.pruners.MedianPruner(
        n_startup_trials=4, n_warmup_steps=epochs // 2, interval_steps=1, n_min_trials=4
    ),
    "none": lambda epochs: optuna.pruners.NopPruner(),
}
PRUNERS = tuple(_PRUNERS)
