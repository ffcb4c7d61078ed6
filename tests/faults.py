"""Faults with drawn seeds, and what became of them: `make test-faults`.

Kills of training, a full disk, command lines, worthless arguments, code that the files of others
name, damaged checkpoints, damaged caches of images and of engines, and lost databases; a table says
how often each was drawn and how many were lost, crashed, showed a traceback, ran code of others or
passed in silence: all of them 0, else the status is 1.

A process is one of Python's fork server, which has imported kart already.
"""

import argparse
import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch

from kart import bases, checkpoint, cli, data, kernels, runs, tables
from kart.kernels import plain
from kart.kernels.cpp import build
from tests import test_fuzz, test_trust
from tests.tiny import over

BAD = ("lost", "crashed", "traceback", "code run", "silent")
RUN = [*("train", "--operator", "G1B", "--epochs", "4", "--batch-size", "8", "--embed-dim", "8")]
RUN += ["--depth", "1", "--num-heads", "1", "--patch-size", "2", "--train-limit", "96"]
RUN += ["--threads", "1", "--quiet", "--out"]
SMALL = [*(part for item in test_fuzz.TRAIN.items() for part in item), "--quiet", "--out", "run"]
STUDY = [*("study", "run", "grid_rank_sharing", "--tiny", "--trials", "2", "--seeds", "1")]
STUDY += ["--confirm", "0", "--group", "1", "--quiet", "--out", "study"]
OWN_IMAGES = over(SMALL, "--out", "other", "--data", "images", "--train-limit", "8")

Found = Counter[str]


class Ended(NamedTuple):
    """How a process ended: its status, that of a signal negative, what it wrote on standard error,
    and how many seconds it computed.
    """

    status: int
    error: str
    seconds: float


def _call(connection: Connection, folder: str, call: Callable[[], int], after_s: float) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    status, error = 1, io.StringIO()
    if after_s:
        # ends the process as SIGKILL would, once it has computed for so long
        signal.setitimer(signal.ITIMER_PROF, after_s)
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            status = call()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.send((status, error.getvalue(), time.process_time() - began))


class Kart(NamedTuple):
    """`kart` with these arguments, where no file can be larger than `limit` bytes."""

    argv: tuple[str, ...]
    limit: int | None = None

    def __call__(self) -> int:
        if self.limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            checkpoint.FULL = (*checkpoint.FULL, errno.EFBIG)  # type: ignore[assignment]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        return cli.main(self.argv)


def process(folder: Path, call: Callable[[], int], after_s: float = 0.0) -> Ended:
    """Waits for a process that calls in `folder`, killed after `after_s` seconds of computing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults", "kart.train", "kart.runs", "sklearn.datasets"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(sender, str(folder), call, after_s))
    child.start()
    sender.close()
    try:
        status, error, seconds = receiver.recv()
    except EOFError:
        status, error, seconds = 1, "", after_s
    child.join()
    return Ended(child.exitcode or status, error, seconds)


def ended(one: Ended, found: Found) -> Ended:
    """Counts a crash or a traceback."""
    found["crashed"] += one.status < 0
    found["traceback"] += "Traceback" in one.error or "unforeseen" in one.error
    return one


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs have the same weights, states and records, bit for bit."""

    def records(run: Path) -> list[dict[str, Any]]:
        return [one | {"seconds": 0} for one in runs.read_metrics(run)]

    for name in ("last.safetensors", "best.safetensors"):
        if not (a / name).exists():
            return False
        ours, theirs = (safetensors.torch.load_file(run / name) for run in (a, b))
        if ours.keys() != theirs.keys():
            return False
        if not all(torch.equal(x, theirs[key]) for key, x in ours.items()):
            return False
    return records(a) == records(b)


def kills(draw: random.Random, count: int, folder: Path) -> Found:
    """Training killed at drawn moments, each time to be bitwise the run that was not."""
    found: Found = Counter()
    took = ended(process(folder, Kart((*RUN, "whole"))), found).seconds
    for i in range(count):
        again = Kart((*RUN, f"killed-{i}"))
        while process(folder, again, draw.uniform(0.02, 1.0) * took).status != -signal.SIGPROF:
            shutil.rmtree(folder / f"killed-{i}")  # it was over before
        found["lost"] += ended(process(folder, again), found).status != 0 or not same_run(
            folder / f"killed-{i}", folder / "whole"
        )
    return found


def full_disks(draw: random.Random, count: int, folder: Path) -> Found:
    """Training with a limit on the size of files, which stands for a full disk: it stops in one
    line, and goes on to the same result without the limit.
    """
    found: Found = Counter()
    ended(process(folder, Kart((*RUN, "whole"))), found)
    largest = (folder / "whole" / "last.safetensors").stat().st_size
    for i in range(count):
        argv = (*RUN, f"full-{i}")
        full = Kart((*argv, "--space-timeout", "0"), draw.randrange(largest))
        stopped = ended(process(folder, full), found)
        found["silent"] += stopped.status == 0 or stopped.error.count("\n") != 1
        found["lost"] += ended(process(folder, Kart(argv)), found).status != 0 or not same_run(
            folder / f"full-{i}", folder / "whole"
        )
    return found


def called(argv: list[str], found: Found) -> tuple[int, str]:
    """Status and standard error of `kart` in this process; counts a crash or a traceback."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            status = int(stop.code or 0)
    found["crashed"] += status not in (0, 2) and not diverged(status, error.getvalue())
    found["traceback"] += "Traceback" in error.getvalue() or "unforeseen" in error.getvalue()
    return status, error.getvalue()


def diverged(status: int, error: str) -> bool:
    """Whether training stopped, in one line, at a loss that is not finite, and kept its state."""
    return status == 1 and "training stopped at step" in error and error.count("\n") == 1


def command_lines(draw: random.Random, count: int, folder: Path) -> Found:
    """Drawn command lines: an effect and status 0, or one line, status 2 and nothing half-made."""
    found: Found = Counter()
    with contextlib.chdir(folder):
        called(["train", *SMALL], found)
        trains = [test_fuzz.drawn_train] * 9
        kinds = [*trains, *[test_fuzz.drawn_other] * 20, test_fuzz.drawn_study]
        for _ in range(count):
            argv = draw.choice(kinds)(draw)
            status, error = called(argv, found)
            found["silent"] += status == 2 and error.count("\n") != 1
            if argv[0] == "train":
                kept = status == 0 or diverged(status, error)
                found["silent"] += Path("out").exists() != kept
            shutil.rmtree("out", ignore_errors=True)
    return found


def arguments(draw: random.Random, count: int, folder: Path) -> Found:
    """Calls of the public functions with worthless arguments."""
    with contextlib.chdir(folder):
        wrong = test_trust.wrong_calls(draw.random(), count)
    return Counter({"traceback": len(wrong)})


class Evil(NamedTuple):
    """Writes the file `ran` where it is unpickled."""

    ran: str

    def __reduce__(self):
        return open, (self.ran, "w")


def plant(draw: random.Random, evil: Path, ran: Path) -> None:
    """Lets one drawn record of the run or the study in this folder name `evil`, or hold a pickle
    that makes the file `ran`.
    """

    def rewrite(path: str, *names: str) -> None:
        about = json.loads(Path(path).read_text())
        inner = about
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = f"{evil}:basis-B" if names[-1] == "operator" else str(evil)
        Path(path).write_text(json.dumps(about))

    kind = draw.choice(["study", "database", "config", "checkpoint", "pickle", "data"])
    if kind == "study":
        names = (["named"], ["question"], ["study"], ["config", "operator"], ["config", "data"])
        rewrite("study/study.json", *draw.choice(names))
    elif kind == "database":
        old = draw.choice(["grid_rank_sharing", "softmax", "digits"])
        new = draw.choice([str(evil), f"{evil}:basis-B"])
        with contextlib.closing(sqlite3.connect("study/study.db")) as database:
            for table in ("study_user_attributes", "trial_user_attributes"):
                change = f"UPDATE {table} SET value_json = replace(value_json, ?, ?)"
                database.execute(change, (old, new))
            database.commit()
    elif kind == "config":
        text = Path("run/config.json").read_text()
        old = draw.choice(['"softmax"', '"digits"', '"vit_nano"'])
        Path("run/config.json").write_text(text.replace(old, json.dumps(f"{evil}:basis-B")))
    elif kind == "checkpoint":
        path = draw.choice(["run/last.safetensors", "run/best.safetensors"])
        raw = Path(path).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        own = json.loads(header["__metadata__"]["kart"])
        key = draw.choice(sorted(own["config"]))
        own["config"][key] = f"{evil}:basis-B"
        own["config"]["operator"] = f"{evil}:basis-B"
        header["__metadata__"]["kart"] = json.dumps(own)
        text = json.dumps(header).encode()
        Path(path).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    elif kind == "pickle":
        files = [p for name in ("run", "study", "cache") for p in Path(name).rglob("*")]
        path = draw.choice(sorted(p for p in files if p.is_file()))
        content, load = io.BytesIO(), Evil(str(ran))
        writers = [lambda: torch.save(load, content), lambda: pickle.dump(load, content)]
        writers += [lambda: np.save(content, np.array([load], dtype=object), allow_pickle=True)]
        draw.choice(writers)()
        path.write_bytes(content.getvalue())
    else:
        for name in ("images.py", "__init__.py", "conftest.py", "dataset.py"):
            shutil.copy(evil, Path("images") / name)
        Path("images/README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: {evil}\n---\n"
        )


READING = [
    *(["study", "report", "--out", "study"], ["study", "status", "--out", "study"]),
    *(["study", "list"], ["eval", "run"], ["predict", "run", "images/a/0.png"]),
    *(["export", "run", "--out", "m.safetensors"], ["analyse", "run", "--images", "1"]),
    *(["data", "images"], ["study", "work", "grid_rank_sharing", "--out", "study", "--quiet"]),
    ["train", *OWN_IMAGES],
]


def draw_images(folder: Path) -> None:
    """Two classes of ten images of noise each."""
    from PIL import Image

    random_pixels = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = random_pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def foreign_code(draw: random.Random, count: int, folder: Path) -> Found:
    """Records and data that name code of others, or hold it: what reads them runs none of it."""
    found: Found = Counter()
    evil, ran = folder / "evil.py", folder / "ran"
    evil.write_text(f"open({str(ran)!r}, 'w').write('x')\nbasis = None\n")
    good = folder / "good"
    good.mkdir()
    draw_images(good / "images")
    with contextlib.chdir(good), pytest.MonkeyPatch.context() as patch:
        patch.setenv("KART_CACHE", "cache")
        for argv in (["train", *SMALL], STUDY, ["train", *OWN_IMAGES]):
            status, error = called(argv, found)
            assert status == 0, error
        shutil.rmtree("other")
        for _ in range(count):
            here = folder / "here"
            shutil.copytree(good, here)
            with contextlib.chdir(here):
                plant(draw, evil, ran)
                for argv in draw.sample(READING, 3):
                    called(argv, found)
            found["code run"] += ran.exists()
            ran.unlink(missing_ok=True)
            shutil.rmtree(here)
    return found


def checkpoints(draw: random.Random, count: int, folder: Path) -> Found:
    """Damaged checkpoints: a ValueError of one line."""
    ways = [how for _, how in test_trust.damaged_checkpoints(draw.random(), count, folder)]
    found: Found = Counter()
    for pair in zip(ways[::2], ways[1::2], strict=True):
        found["traceback"] += any(how not in ("refused", "silent") for how in pair)
        found["silent"] += all(how == "silent" for how in pair)
    return found


def damage(draw: random.Random, path: Path) -> bool:
    """Cuts a file, or fills a part of it with zeros or noise; returns whether it differs then."""
    old = path.read_bytes()
    raw = bytearray(old)
    start = draw.randrange(len(raw))
    kind = draw.choice(["cut", "zeros", "noise"])
    if kind == "cut":
        raw = raw[:start]
    else:
        length = draw.randint(1, len(raw) - start)
        patch = bytes(length) if kind == "zeros" else draw.randbytes(length)
        raw[start : start + length] = patch
    path.write_bytes(raw)
    return raw != old


def caches(draw: random.Random, count: int, folder: Path) -> Found:
    """Damaged caches of decoded images: built again, never believed."""
    draw_images(folder / "images")
    cache = folder / "cache"

    def prints() -> list[str]:
        with contextlib.redirect_stderr(io.StringIO()):
            return [data.load(folder / "images", s, cache=cache).fingerprint for s in data.SPLITS]

    good = prints()
    found: Found = Counter()
    for _ in range(count):
        files = sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size)
        damage(draw, draw.choice(files))
        try:
            found["silent"] += prints() != good
        except Exception:
            found["traceback"] += 1
    return found


class Product(NamedTuple):
    """A product by the compiled engine, from the cache `home`."""

    home: str

    def __call__(self) -> int:
        os.environ["KART_CACHE"] = self.home
        basis, generator = bases.polynomial(1), torch.Generator().manual_seed(0)
        shapes = ((2, 3, 4, 2), (2, 5, 3), (2, 4, 3))
        c, q, k = (torch.randn(shape, generator=generator) for shape in shapes)
        y = kernels.contract(basis, c, q, k, engine="cpp")
        return int(not torch.allclose(y, plain.contract(basis, c, q, k), atol=1e-5))


def engines(draw: random.Random, count: int, folder: Path) -> Found:
    """Damaged libraries of the compiled engine: seen, and, one of forty, built again."""
    found: Found = Counter()
    home = folder / "cache"
    ended(process(folder, Product(str(home))), found)
    (library,) = (home / "engines").glob("*.so")
    whole = library.read_bytes()
    for i in range(count):
        library.write_bytes(whole)
        differs = damage(draw, library)
        found["silent"] += build._intact(library) == differs
        if i % 40 == 0:
            again = ended(process(folder, Product(str(home))), found)
            found["silent"] += again.status != 0 or (again.error.count("\n") == 1) != differs
    return found


class Outcomes:
    """How many tests were run, and how many failed."""

    def __init__(self) -> None:
        self.count = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.when == "call" and not report.skipped
        self.failed += report.failed


def databases() -> tuple[int, Found]:
    """SQLite files lost in six ways under a search, PostgreSQL restarted, a worker of it killed."""
    seen = Outcomes()
    names = ["tests/test_journal.py", "tests/test_studies.py", "-k", "lost or postgresql"]
    flags = ["-q", "-m", "not nightly", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*flags, *names], plugins=[seen])
    return seen.count, Counter({"lost": seen.failed or int(status != 0)})


FAULTS: dict[str, tuple[Callable[[random.Random, int, Path], Found], int, int]] = {
    # what, how many, and how many in the short form
    "kills of training": (kills, 30, 1),
    "full disks": (full_disks, 20, 1),
    "command lines": (command_lines, 500, 10),
    "worthless arguments": (arguments, 2000, 100),
    "code of others": (foreign_code, 60, 3),
    "damaged checkpoints": (checkpoints, 500, 20),
    "damaged caches": (caches, 200, 5),
    "damaged engines": (engines, 200, 0),
}


def repeat(seed: int, short: bool = False, log: Callable[[str], object] = str) -> Any:
    """Every fault, drawn from `seed`: by its name how often, and what was found."""
    found = {}
    for name, (fault, many, few) in FAULTS.items():
        count = few if short else many
        if not count:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kart-faults-") as folder:
            found[name] = (count, fault(random.Random(f"{name} {seed}"), count, Path(folder)))
        log(f"{name}: {count} in {time.monotonic() - began:.0f} s")
    return found


def table(found: dict[str, tuple[int, Found]]) -> str:
    """What was found, as text."""
    rows = [[name, str(n), *(str(bad[k]) for k in BAD)] for name, (n, bad) in found.items()]
    return tables.table(rows, ["fault", "drawn", *BAD])


def main() -> int:
    """Repeats all faults, those of the databases last, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    found = repeat(args.seed, args.short, lambda line: print(line, flush=True))
    if not args.short:
        found["databases"] = databases()
    print(table(found))
    return int(any(sum(bad.values()) for _, bad in found.values()))
