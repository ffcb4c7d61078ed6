"""Compiled families: from the private cache, or by the machine's own compiler.

A library carries the hash of its own bytes at its end, which is compared before it is loaded: the
loader dies of a truncated or damaged one. The cache directory `engines` is of mode 0700 and this
user's, and nobody else can write to the directories above it; where it is not so, or cannot be
written, what is built is kept for this process alone.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kart.kernels.transforms import for_good

try:
    import fcntl
except ImportError:  # no such locks, and no such compiler flags, on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("kart.kernels")

ROOT = Path(__file__).parent
HEADERS = ("vector.h", "amx.h", "tile.h", "operands.h", "unit.h", "linear.h")
SOURCES = (*HEADERS, "product.cpp", "units.cpp", "weights.cpp", "mix.cpp", "dense.cpp")
# what names the processor and its instructions to a compiler for Arm
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
# no -ffast-math: it deletes the rounding by a magic number and gives wrong sines
FLAGS = ("-O3", NATIVE, "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
# comparisons of vectors of another size than the registers' warn of their calling convention
FLAGS += ("-Wno-psabi",)
DIGEST = hashlib.sha256().digest_size


def _processor() -> str:
    """What NATIVE depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() + platform.machine()


def _trusted(path: Path) -> str:
    """Why somebody else could put files into a directory, or ""."""
    for place in (path, *path.parents):
        found = place.lstat() if place == path else place.stat()
        if not stat.S_ISDIR(found.st_mode):
            return f"{place} is not a directory"
        if found.st_uid not in (0, os.geteuid()) or (
            place == path and found.st_uid == 0 != os.geteuid()
        ):
            return f"{place} is another user's"
        writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if place == path and found.st_mode & 0o077:
            return f"{place} is open to others (mode {stat.S_IMODE(found.st_mode):o})"
        if writable and not found.st_mode & stat.S_ISVTX:
            return f"{place} is writable by others (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


@functools.cache
def _of_this_process() -> Path:
    path = Path(tempfile.mkdtemp(prefix="kart-engines-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _directory(base: str) -> Path:
    """Where compiled libraries are kept; one line where it cannot be below `base`."""
    try:
        path = Path(base).expanduser().absolute() / "engines"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        path = path.resolve()
        reason = _trusted(path)
        if not reason and not os.access(path, os.W_OK):
            reason = f"{path} cannot be written"
    except OSError as error:
        reason = f"{error.filename or base}: {error.strerror}"
    except RuntimeError as error:  # of a user who has no home
        reason = f"{base}: {error}"
    if reason:
        log.warning("kart's C++ engine is not kept between processes: %s", reason)
        return _of_this_process()
    return path


def _intact(path: Path) -> bool:
    """Whether a library is as it was written: its last bytes are the hash of the others."""
    content = path.read_bytes()
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


@contextlib.contextmanager
def _workshop(directory: Path) -> Iterator[Path]:
    """A directory to build in, locked for as long; those of killed builds are removed first."""
    for left in directory.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < 600:
                continue  # it may be about to be locked
            with (left / "lock").open("a") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=directory))
    try:
        with (folder / "lock").open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(command: list[str], source: str, path: Path) -> None:
    # built aside and renamed, so that another process sees all of it or nothing
    with _workshop(path.parent) as folder:
        part = folder / path.name
        result = subprocess.run(
            [*command, "-o", str(part), "-"],
            input=source,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        if result.returncode:
            lines = [x for x in result.stderr.splitlines() if "error" in x] or ["no message"]
            raise RuntimeError(f"{command[0]} failed: {lines[0].strip()}")
        content = part.read_bytes()
        whole = folder / "whole"
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        whole.replace(path)


def library(name: str, source: str) -> ctypes.CDLL:
    """The library of a source that includes SOURCES; RuntimeError says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++ or c++) was found")
    command = [*compiler.split(), *FLAGS, f"-I{ROOT}", "-x", "c++"]
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, timeout=60
    ).stdout
    texts = [(ROOT / file).read_text() for file in SOURCES]
    parts = (source, *texts, *FLAGS, compiler, version, _processor(), platform.platform())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    directory = _directory(os.environ.get("KART_CACHE") or "~/.cache/kart")
    path = directory / f"{name}-{key}.so"
    if path.exists() and not _intact(path):
        log.warning("kart's C++ engine builds %s again: the file is damaged", path.name)
        path.unlink()
    if not path.exists():
        _compile(command, source, path)
    return ctypes.CDLL(str(path))


def checked(
    label: str, source: str, make: Callable[[ctypes.CDLL], Any], check: Callable[[Any], None]
) -> tuple[Any, str]:
    """What `make` makes of the library of a source, once `check` has held it against the plain
    expression, and "", or None and why, which is logged.
    """
    try:
        # asked under any transform, mode or default device; the check is on plain tensors
        with for_good(), torch.device("cpu"):
            engine = make(library(label, source))
            if engine is not None:
                check(engine)
            return engine, ""
    except Exception as error:
        log.warning("kart's C++ engine is off for %s, torch runs instead: %s", label, error)
        return None, str(error)


def compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], width: int) -> None:
    """RuntimeError unless results agree with those in float64 up to a few hundred roundings, of
    terms whose error grows with the number of features, `width`. What is zero in float64, since its
    terms cancel, is so up to roundings of the largest result.
    """
    sizes = {name: expected.abs().max().item() for name, expected in wanted.items()}
    largest = max(sizes.values())
    for name, expected in wanted.items():
        size = sizes[name] if sizes[name] > 1e-12 * largest else largest
        tolerance = 1e-5 * (1 + width) * size
        difference = (found[name].double() - expected).abs().max().item()
        if not difference <= tolerance:
            raise RuntimeError(
                f"its self-check failed: {name} differs by {difference:.1e}, more than "
                f"{tolerance:.1e}"
            )
