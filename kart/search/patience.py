"""A database server that is away for a while: every call waits for it, up to a stated time."""

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.storages import RDBStorage

# what the storage is asked for while a study is searched
CALLS = (
    *("set_study_user_attr", "set_study_system_attr", "get_study_id_from_name"),
    *("get_study_name_from_id", "get_study_directions", "get_study_user_attrs"),
    *("get_study_system_attrs", "get_trial_user_attrs", "get_trial_system_attrs"),
    *("get_all_studies", "create_new_trial", "set_trial_param", "get_trial_param"),
    *("set_trial_state_values", "set_trial_intermediate_value", "set_trial_user_attr"),
    *("set_trial_system_attr", "get_trial_id_from_study_id_trial_number", "get_trial"),
    *("get_all_trials", "get_best_trial", "record_heartbeat", "_get_stale_trial_ids"),
    # these Optuna's own cache calls
    *("_create_new_trial", "_get_best_trial_id", "_get_trials", "_set_trial_param"),
)
LONGEST_S = 10.0  # between two tries
AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)


# when the server of a storage was last away, by time.monotonic
_away_until: "weakref.WeakKeyDictionary[RDBStorage, float]" = weakref.WeakKeyDictionary()


def away_until(storage: RDBStorage) -> float:
    """When the server of a storage came back the last time, by time.monotonic; -inf for never."""
    return _away_until.get(storage, float("-inf"))


def is_away(error: BaseException) -> bool:
    """Whether an error of a storage says that its server cannot be reached."""
    if isinstance(error, optuna.exceptions.StorageInternalError):
        error = error.__cause__ or error
    lost = isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated
    waits = (*AWAY, sqlalchemy.exc.PendingRollbackError, sqlalchemy.exc.TimeoutError)
    return lost or isinstance(error, waits)


def reason(error: BaseException) -> str:
    """What a storage's error says, in a line."""
    found = getattr(error, "orig", None) or error.__cause__ or error
    return " ".join(str(getattr(found, "orig", None) or found).split())[:200]


def wait_for(storage: RDBStorage, name: str, seconds: float) -> None:
    """Makes the calls of `storage` wait up to `seconds` for a server that is away, trying again
    after 0.1 s and then ever later; the results of what was trained wait with them.

    Raises ConnectionError from a call when the time is over.
    """
    told = threading.Event()

    def patient(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began, pause, failed = time.monotonic(), 0.1, False
            while True:
                try:
                    found = call(*args, **kwargs)
                    break
                except (
                    optuna.exceptions.StorageInternalError,
                    sqlalchemy.exc.SQLAlchemyError,
                ) as e:
                    if not is_away(e):
                        raise
                    failed = True
                    spent, why = time.monotonic() - began, reason(e)
                    if spent + pause > seconds:
                        raise ConnectionError(
                            f"the database {name!r} has been away for {spent:.0f} s: {why}. The "
                            "same command goes on when it is back; `--storage-timeout` waits "
                            "longer."
                        ) from e
                if not told.is_set():
                    told.set()
                    tell = f"the database {name!r} is away ({why}); waiting up to {seconds:.0f} s"
                    print(f"kart: {tell}", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
            if failed:
                _away_until[storage] = time.monotonic()
                if told.is_set():
                    told.clear()
                    print(f"kart: the database {name!r} is back", file=sys.stderr)
            return found

        return wrapped

    for one in CALLS:
        setattr(storage, one, patient(getattr(storage, one)))
