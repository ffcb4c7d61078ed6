"""A wheel, installed beside nothing of the source tree and used as a new user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kart

ROOT = Path(kart.__file__).parents[1]
TINY = ["--epochs", "1", "--batch-size", "8", "--embed-dim", "4", "--depth", "1", "--num-heads"]
TINY += ["1", "--patch-size", "4", "--train-limit", "24", "--threads", "1", "--quiet"]
OWN = """
import torch
from kart import bases

def bumps(grid: int = 4):
    centres = torch.linspace(-3, 3, grid)
    return bases.linear(lambda x: (-((x[..., None] - centres.to(x)) ** 2)).exp(), grid)
"""


def call(*argv, cwd, env=None):
    done = subprocess.run([str(a) for a in argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_wheel_works_for_a_new_user(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # of a copy: a build leaves its folders in the source tree
    source = tmp_path / "source"
    source.mkdir()
    names = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "kart", "studies"]
    call("cp", "-r", *names, source, cwd=ROOT)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path / "wheels"]
    call(*pip, "wheel", source, *flags, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("kart_attention-*.whl")
    home, user = tmp_path / "site", tmp_path / "user"
    user.mkdir()
    call(*pip, "install", "--no-deps", "--no-index", "--target", home, wheel, cwd=tmp_path)
    env = {**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1", "HOME": str(user)}

    def run(*argv):
        return call(sys.executable, "-m", "kart", *argv, cwd=user, env=env)

    where = call(sys.executable, "-c", "import kart; print(kart.__file__)", cwd=user, env=env)
    assert Path(where.strip()).is_relative_to(home)
    assert "grid_rank_sharing" in run("study", "list")
    (user / "waves.py").write_text(OWN)
    assert "waves.py:bumps-B" in run("train", "--operator", "G1B", "waves.py:bumps-B", *TINY,
                                    "--out", "run")  # fmt: skip
    assert "test top-1" in run("eval", "run", "--code", "waves.py")
    run("analyse", "run", "--code", "waves.py", "--sections", "training")
    assert (user / "run" / "report.html").exists()
    assert " 0 fail" in run("test", "basis", "waves.py:bumps", "--max-examples", "2")
    study = ["study", "run", "grid_rank_sharing", "--tiny", "--quiet", "--val-limit", "16"]
    assert "report.html" in run(*study, "--trials", "4", "--out", "study")
    assert "digits" in run("data", "digits")
