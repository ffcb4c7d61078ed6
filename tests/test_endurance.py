"""A long run and a long study take no more memory at their end than in their middle."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = ["train", "--operator", "G3B", "--epochs", "94", "--batch-size", "32", "--embed-dim", "16"]
TRAIN += ["--depth", "2", "--num-heads", "2", "--patch-size", "2", "--train-limit", "1024"]
STUDY = ["study", "run", "grid_rank_sharing", "--tiny", "--trials", "300", "--seeds", "1"]
STUDY += ["--confirm", "0", "--group", "1", "--val-limit", "100"]


def watched(folder: Path, argv: list[str], journal: str) -> list[tuple[int, int]]:
    """Lines of `journal` that a `kart` process had written, and its resident bytes, along it."""
    path = folder / "out" / journal  # looked for, it would meet files that are being replaced
    call = [sys.executable, "-m", "kart", *argv, "--quiet", "--threads", "1", "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    process = subprocess.Popen(call, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    seen = [(0, 0)]
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        numbers = Path(f"/proc/{process.pid}/statm").read_text().split()
        # a process that has ended has no pages
        if lines > seen[-1][0] and int(numbers[1]):
            seen.append((lines, int(numbers[1]) * page))
        time.sleep(0.02)
    assert process.returncode == 0
    return seen[1:]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read in /proc"
)
@pytest.mark.parametrize(
    ("argv", "journal", "total"),
    [(TRAIN, "metrics.jsonl", 94), (STUDY, "study.jsonl", 300)],
    ids=["3,000 steps", "300 trials"],
)
def test_resident_memory_is_flat(argv, journal, total, tmp_path):
    seen = watched(tmp_path, argv, journal)
    third = [size for lines, size in seen if total / 3 <= lines <= 2 * total / 3]
    last = [size for lines, size in seen if lines > 2 * total / 3]
    assert len(third) > 5 and len(last) > 5
    shown = [f"{lines}: {size / 2**20:.1f} MiB" for lines, size in seen]
    assert max(last) <= 1.05 * min(third), shown
