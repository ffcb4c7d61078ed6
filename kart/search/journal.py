"""The trials of a run directory as lines of JSON beside its SQLite file, which they can rebuild."""

import contextlib
import datetime
import functools
import json
import os
import sqlite3
import sys
import time
from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from kart import checkpoint, schema
from kart.search.storage import Arms

NAME = "study.jsonl"
HEADER = b"SQLite format 3\0"
LOCKED_S = 60  # how long another program may keep the SQLite file to itself


def entry(arm: str, trial: FrozenTrial) -> dict[str, Any]:
    """A finished trial as JSON has it."""
    return {
        "arm": arm,
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "distributions": {k: distribution_to_json(v) for k, v in trial.distributions.items()},
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
        "reports": {str(step): value for step, value in trial.intermediate_values.items()},
        "times": [str(trial.datetime_start or ""), str(trial.datetime_complete or "")],
    }


def read(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The entries of a directory by arm and number; a line that a kill cut short is left out."""
    path = directory / NAME
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            one = json.loads(line)
            found[str(one["arm"]), int(one["number"])] = one
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _lines(arms: Arms, known: Container[tuple[str, int]]) -> str:
    """The finished trials that are not `known`, one a line."""
    return "".join(
        f"{schema.dumps(entry(arm, trial))}\n"
        for arm, study in arms.items()
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and (arm, trial.number) not in known
    )


def append(directory: Path, arms: Arms) -> None:
    """Adds the finished trials that the journal has not yet."""
    text = _lines(arms, read(directory))
    if not text:
        return
    path = directory / NAME
    with open(path, "a", encoding="utf-8") as file:
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            file.write("\n")  # after a line that a kill cut short
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def _held(path: Path, device: int, inode: int) -> int:
    """A descriptor of a file that stays open: closing any one drops all locks that the process has
    on the file (POSIX), SQLite's too, and the next process that leaves takes the log away.
    """
    return os.open(path, os.O_RDONLY)


def problem(directory: Path, names: Collection[str], known: Mapping[tuple[str, int], Any]) -> str:
    """What is wrong with the SQLite file of a directory, which must hold the Optuna studies `names`
    and all trials that are `known`; empty if nothing is. Raises ValueError where it is locked.

    It is read from the disk: what another connection still has in memory does not count.
    """
    path = directory / "study.db"
    if not path.is_file():
        return "is gone"
    try:
        info = path.stat()
        if os.pread(_held(path, info.st_dev, info.st_ino), len(HEADER), 0) != HEADER:
            return "is no SQLite file any more"
        url = f"{path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(url, LOCKED_S, uri=True)) as db:
            rows = db.execute(
                "SELECT s.study_name, t.number, t.state FROM trials t JOIN studies s "
                "ON s.study_id = t.study_id"
            ).fetchall()
            there = {name for (name,) in db.execute("SELECT study_name FROM studies")}
            whole = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            # whoever holds it has the trials: a new file in its place would lose them
            raise ValueError(
                f"`study` needs the database {str(path)!r}, which another program has locked for "
                f"{LOCKED_S} s. End that program, and start the same command again."
            ) from None
        return f"cannot be read ({error})"
    if whole != "ok":
        return f"is damaged ({' '.join(str(whole).split())[:100]})"
    if not there >= set(names):
        return "is another study's"
    finished = {(name.partition("/")[2], number): state for name, number, state in rows}
    if any(finished.get(key) != one["state"] for key, one in known.items()):
        return "lacks trials that were finished"
    return ""


def size(directory: Path) -> int:
    """Bytes of the SQLite file, which never shrinks; 0 where there is none."""
    path = directory / "study.db"
    return path.stat().st_size if path.is_file() else 0


def check(directory: Path, names: Collection[str], least: int = 0) -> None:
    """Raises ValueError where the SQLite file was deleted, cut or overwritten since it had `least`
    bytes.
    """
    known = read(directory)
    wrong = problem(directory, names, known)
    if not wrong and size(directory) < least:
        wrong = f"was cut, from {least:,} bytes to {size(directory):,}"
    if wrong:
        raise ValueError(
            f"the database {str(directory / 'study.db')!r} {wrong}. {len(known)} finished trials "
            f"are kept in {NAME} beside it: the same command rebuilds it and goes on."
        )


def put_aside(directory: Path) -> None:
    """Renames the SQLite file and what belongs to it, so that a new one can take its place."""
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{time.monotonic_ns() % 1000}"
    for suffix in ("", "-wal", "-shm"):
        path = directory / f"study.db{suffix}"
        if path.exists():
            path.rename(directory / f"study.damaged-{stamp}.db{suffix}")


def _renumbered(attrs: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """The system attributes of a trial whose retries are called by other `numbers` now; those that
    have none were never finished.
    """
    retried = {"retry_history", "failed_trial"}
    history = [numbers[n] for n in attrs.get("retry_history", ()) if n in numbers]
    again = {"failed_trial": history[0], "retry_history": history} if history else {}
    return {name: value for name, value in attrs.items() if name not in retried} | again


def restore(
    directory: Path, arms: Arms, points: Mapping[str, Sequence[Mapping[str, Any]]] | None
) -> int:
    """Adds the trials of the journal to new, empty studies, and the `points` of their queues that
    no finished trial has; returns how many trials there are.
    """
    known = read(directory)
    for arm, study in arms.items():
        mine = [one for (of, _), one in sorted(known.items()) if of == arm]
        numbers = {one["number"]: new for new, one in enumerate(mine)}
        done = []
        for one in mine:
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState[one["state"]],
                    values=one["values"],
                    params=one["params"],
                    distributions={
                        name: json_to_distribution(text)
                        for name, text in one["distributions"].items()
                    },
                    user_attrs=one["user_attrs"],
                    system_attrs=_renumbered(one["system_attrs"], numbers),
                    intermediate_values={int(k): v for k, v in one["reports"].items()},
                )
            )
            if one["state"] != "FAIL":
                done.append(one["system_attrs"].get("fixed_params"))
        for point in (points or {}).get(arm, ()):
            if dict(point) not in done:
                study.enqueue_trial(dict(point))
    if known:
        place = directory / "study.db"
        print(f"kart: {place} is rebuilt, {len(known)} finished trials in it", file=sys.stderr)
    # the numbers are those of the new file from here on
    checkpoint.write_text(directory / NAME, _lines(arms, ()))
    return len(known)
