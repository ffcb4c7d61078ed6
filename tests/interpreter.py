"""Cases of a test file in Triton's interpreter, chosen before a process imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(file: str, case: str) -> None:
    """Asserts that `python file case` ends well there, with kart of this tree."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, file, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
