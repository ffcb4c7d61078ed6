"""Room on the disk: what a run needs, and waiting for it where there is none."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kart import checkpoint

PAUSE_S = 1.0
LONGEST_S = 30.0


def check(directory: Path, needed: int) -> None:
    """Raises ValueError where the disk of `directory`, be it there or not, lacks `needed` bytes."""
    there = next(p for p in (directory, *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"`out` needs room for its checkpoints, about {needed / 2**20:,.1f} MiB in "
            f"{str(directory)!r}, got {free / 2**20:,.1f} MiB. Make room, or choose another disk."
        )


def check_writable(directory: Path) -> None:
    """Raises ValueError where nothing can be written to `directory`, which may not be there yet."""
    there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"`run` needs a directory that can be written to, got {str(directory)!r}. Copy the "
            "run to one, or choose another."
        )


def wait_for(directory: Path, needed: int, seconds: float, write: Callable[[], None]) -> None:
    """Calls `write`, and calls it again while the disk of `directory` is full, up to `seconds`.

    Raises OSError, in one line, when the time is over. `write` must leave nothing behind where it
    fails.
    """
    began, pause, told = time.monotonic(), PAUSE_S, False
    while True:
        try:
            write()
            break
        except OSError as error:
            if error.errno not in checkpoint.FULL:
                raise
            free = shutil.disk_usage(directory).free
            what = (
                f"the disk is full: {needed / 2**20:,.1f} MiB are needed in {str(directory)!r}, "
                f"{free / 2**20:,.1f} MiB are free"
            )
            if time.monotonic() - began + pause > seconds:
                raise OSError(
                    f"{what}. The last finished epoch is kept; make room, and the same command "
                    "goes on from it."
                ) from error
        if not told:
            print(f"kart: {what}; waiting for room up to {seconds:.0f} s", file=sys.stderr)
            told = True
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_S)
    if told:
        print(f"kart: there is room again in {str(directory)!r}", file=sys.stderr)


def append(path: Path, text: str) -> None:
    """Adds `text` to a file, whole or not at all, and forces it to disk."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        # a full disk says no name
        raise OSError(error.errno, error.strerror, str(path)) from error
