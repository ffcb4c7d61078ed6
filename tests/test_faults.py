"""The short form of `make test-faults`."""

from tests import faults


def test_a_few_drawn_faults_lose_and_crash_nothing():
    found = faults.repeat(0, short=True)
    assert not any(sum(bad.values()) for _, bad in found.values()), faults.table(found)
