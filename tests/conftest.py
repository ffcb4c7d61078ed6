"""Suite-wide settings: one thread, NaN-poisoned `empty`, derandomised Hypothesis."""

import os
from collections import Counter

import hypothesis
import pytest
import torch

# what a deterministic cuBLAS needs, before CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=40, database=None
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _one_thread_and_poison():
    torch.set_num_threads(1)
    # fills `torch.empty` with NaN, so that an output nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))


def pytest_terminal_summary(terminalreporter):
    """Says how many of the planted bugs their suites caught, after a run of those tests."""
    runs, caught = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            _, planted, name = report.nodeid.partition("::test_the_suite_catches_the_planted_bug[")
            if planted:
                runs[name.split(":")[0]] += 1
                caught[name.split(":")[0]] += outcome == "passed"
    if runs:
        kinds = ", ".join(f"{kind} {caught[kind]} of {count}" for kind, count in runs.items())
        total = f"planted bugs caught: {caught.total()} of {runs.total()} ({kinds})"
        terminalreporter.write_line(total)
