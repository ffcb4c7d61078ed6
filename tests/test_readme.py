"""The README's Python runs as it stands, and its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_functional_example_runs_as_it_stands(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) == 15
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code[1]]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "functions.png").stat().st_size > 1000


def test_every_command_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        assert target in targets, target
    for module in re.findall(r"python -m (studies\.[a-z_]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:kart|studies|tests)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
