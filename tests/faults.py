"""Faults with drawn seeds, and what became of them: `make test-faults` (`python -m tests.faults`).

Kills of training, a full disk, command lines, worthless arguments, damaged checkpoints, damaged
caches and lost databases; a table says how often each was drawn and how many were lost, crashed,
showed a traceback, ran code of others or passed in silence: all of them 0, else the status is 1.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from kart import cli, data, tables
from tests import test_fuzz, test_trust

BAD = ("lost", "crashed", "traceback", "code run", "silent")
RUN = [*("train", "--operator", "G1B", "--epochs", "6", "--batch-size", "8", "--embed-dim", "8")]
RUN += ["--depth", "1", "--num-heads", "1", "--patch-size", "2", "--train-limit", "320"]
RUN += ["--threads", "1", "--quiet", "--out"]

Found = Counter[str]


def kart(folder: Path, *argv: str, **options) -> subprocess.Popen:
    """A `kart` process in `folder`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(cli.__file__).parents[1])
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    call = [sys.executable, "-m", "kart", *argv]
    return subprocess.Popen(call, cwd=folder, env=env, **pipes, **options)


def finish(process: subprocess.Popen, found: Found) -> str:
    """Waits for a process; counts a crash or a traceback."""
    _, error = process.communicate()
    found["crashed"] += process.returncode < 0
    found["traceback"] += "Traceback" in error or "unforeseen" in error
    return error


def kills(draw: random.Random, count: int, folder: Path) -> Found:
    """Training killed at drawn moments, each time to be bitwise the run that was not."""
    found: Found = Counter()
    began = time.monotonic()
    finish(kart(folder, *RUN, "whole"), found)
    took = time.monotonic() - began
    whole = safetensors.torch.load_file(folder / "whole" / "last.safetensors")
    for i in range(count):
        process = kart(folder, *RUN, f"killed-{i}")
        time.sleep(draw.uniform(0.3, 1.0) * took)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finish(kart(folder, *RUN, f"killed-{i}"), found)
        path = folder / f"killed-{i}" / "last.safetensors"
        same = path.exists() and all(
            torch.equal(x, whole[name]) for name, x in safetensors.torch.load_file(path).items()
        )
        found["lost"] += not same
    return found


def full_disks(draw: random.Random, count: int, folder: Path) -> Found:
    """Training with a limit on the size of files, which stands for a full disk: it stops in one
    line, and goes on to the same result without the limit.
    """
    found: Found = Counter()
    finish(kart(folder, *RUN, "whole-disk"), found)
    whole = safetensors.torch.load_file(folder / "whole-disk" / "last.safetensors")
    largest = (folder / "whole-disk" / "last.safetensors").stat().st_size
    program = (
        "import resource, signal, sys, errno, os\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from kart import checkpoint, cli\n"
        "checkpoint.FULL = (*checkpoint.FULL, errno.EFBIG)\n"
        "limit = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    for i in range(count):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(cli.__file__).parents[1])
        limit, out = draw.randrange(largest), f"full-{i}"
        call = [sys.executable, "-c", program, str(limit), *RUN, out, "--space-timeout", "0"]
        done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True)
        found["traceback"] += "Traceback" in done.stderr or "unforeseen" in done.stderr
        found["crashed"] += done.returncode < 0
        found["silent"] += done.returncode == 0 or done.stderr.count("\n") != 1
        finish(kart(folder, *RUN, out), found)
        path = folder / out / "last.safetensors"
        found["lost"] += not path.exists() or any(
            not torch.equal(x, whole[name]) for name, x in safetensors.torch.load_file(path).items()
        )
    return found


def command_lines(draw: random.Random, count: int, folder: Path) -> Found:
    """Drawn command lines: an effect and status 0, or one line and status 2."""
    found: Found = Counter()
    with contextlib.chdir(folder):
        flags = [part for item in test_fuzz.TRAIN.items() for part in item]
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["train", *flags, "--quiet", "--out", "run"])
        kinds = (test_fuzz.drawn_train, test_fuzz.drawn_other, test_fuzz.drawn_other)
        for _ in range(count):
            argv = draw.choice(kinds)(draw)
            out, error = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                try:
                    code = cli.main(argv)
                except SystemExit as stop:
                    code = stop.code
            text = error.getvalue()
            found["traceback"] += "Traceback" in text or "unforeseen" in text
            found["crashed"] += code not in (0, 2)
            found["silent"] += code == 2 and text.count("\n") != 1
            shutil.rmtree("out", ignore_errors=True)
    return found


def arguments(draw: random.Random, count: int, folder: Path) -> Found:
    """Calls of the public functions with worthless arguments."""
    with contextlib.chdir(folder):
        wrong = test_trust.wrong_calls(draw.random(), count)
    return Counter({"traceback": len(wrong)})


def checkpoints(draw: random.Random, count: int, folder: Path) -> Found:
    """Damaged checkpoints: a ValueError of one line."""
    ways = [how for _, how in test_trust.damaged_checkpoints(draw.random(), count, folder)]
    found: Found = Counter()
    for pair in zip(ways[::2], ways[1::2], strict=True):
        found["traceback"] += any(how not in ("refused", "silent") for how in pair)
        found["silent"] += all(how == "silent" for how in pair)
    return found


def caches(draw: random.Random, count: int, folder: Path) -> Found:
    """Damaged caches of decoded images: built again, never believed."""
    from PIL import Image

    random_pixels = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random_pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    cache = folder / "cache"
    good = data.load(folder / "images", "train", cache=cache).fingerprint
    found: Found = Counter()
    for _ in range(count):
        path = draw.choice(sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size))
        raw = bytearray(path.read_bytes())
        start = draw.randrange(len(raw))
        kind = draw.choice(["cut", "zeros", "noise"])
        if kind == "cut":
            raw = raw[:start]
        else:
            length = draw.randint(1, len(raw) - start)
            patch = bytes(length) if kind == "zeros" else draw.randbytes(length)
            raw[start : start + length] = patch
        path.write_bytes(raw)
        try:
            found["silent"] += (
                data.load(folder / "images", "train", cache=cache).fingerprint != good
            )
        except Exception:
            found["traceback"] += 1
    return found


FAULTS: dict[str, tuple[Callable[[random.Random, int, Path], Found], int, int]] = {
    # what, how many, and how many in the short form
    "kills of training": (kills, 30, 1),
    "full disks": (full_disks, 20, 1),
    "command lines": (command_lines, 500, 10),
    "worthless arguments": (arguments, 2000, 100),
    "damaged checkpoints": (checkpoints, 500, 20),
    "damaged caches": (caches, 200, 5),
}


def repeat(seed: int, short: bool = False) -> dict[str, tuple[int, Found]]:
    """Every fault, drawn from `seed`: how often, and what was found."""
    found = {}
    for name, (fault, many, few) in FAULTS.items():
        count = few if short else many
        with tempfile.TemporaryDirectory(prefix="kart-faults-") as folder:
            found[name] = (count, fault(random.Random(f"{name} {seed}"), count, Path(folder)))
    return found


def table(found: dict[str, tuple[int, Found]]) -> str:
    """What was found, as text."""
    rows = [[name, str(n), *(str(bad[k]) for k in BAD)] for name, (n, bad) in found.items()]
    return tables.table(rows, ["fault", "drawn", *BAD])


def main() -> int:
    """Repeats all faults and prints the table; then the tests of the databases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    found = repeat(args.seed, args.short)
    print(table(found))
    databases = 0
    if not args.short:
        names = ["tests/test_journal.py", "tests/test_studies.py", "-k", "lost or postgresql"]
        call = [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", *names]
        databases = subprocess.run(call).returncode
    return int(any(sum(bad.values()) for _, bad in found.values()) or databases != 0)


if __name__ == "__main__":
    sys.exit(main())
