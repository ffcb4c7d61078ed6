"""Suite-wide settings: one thread, NaN-poisoned `empty`, derandomised Hypothesis."""

import os
from collections import Counter

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=40, database=None
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _one_thread_and_poison(request):
    torch.set_num_threads(1)
    # fills `torch.empty` with NaN, so that an output nobody wrote is seen; on a GPU it refuses
    # operations without a deterministic form there, such as `cumsum`
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None)
    yield
    torch.use_deterministic_algorithms(False)


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
