"""Suite-wide settings: one thread, NaN-poisoned `empty`, derandomised Hypothesis."""

import os

import hypothesis
import pytest
import torch

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
