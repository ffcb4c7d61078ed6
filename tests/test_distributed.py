"""Several gloo ranks against one process: results, refusals, kills."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close

from kart import checkpoint, distributed, population, runs, train, tree
from kart.train import Ranks
from tests.tiny import TWO_BLOCKS, over

TINY = dataclasses.replace(
    TWO_BLOCKS,
    augment="small",  # with mixup and cutmix over the batch
    epochs=2,
    accumulate=2,
    max_norm=0.5,
    ema=0.9,
)


@pytest.fixture(scope="module")
def splits():
    whole = train.load_data(TINY)
    # more than one batch of evaluation, the last one smaller
    return train.Splits(whole.train, whole.val)


def start(size, command, **environment):
    """The processes of `size` ranks, each running `command(rank)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *command(rank)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes):
    """Exit states and what was said on stderr, by rank."""
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


PROGRAM = """
import sys, torch
from kart import checkpoint, distributed, train, tree
from tests.test_distributed import TINY
with distributed.joined() as ranks:
    value = {"a": torch.arange(3.0) + ranks.rank, "b": [torch.tensor(2.0).double()]}
    value["c"] = torch.ones(2, 2, dtype=torch.int64) * 10 ** ranks.rank
    total, shared = ranks.total(value), ranks.share(value)
    run = train.solo(TINY, train.load_data(TINY), ranks=ranks)
    ends = [list(train.loop(run, donate=donate)) for donate in (False, True)]
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0),
             ends[0][-1][0], ends[1][-1][0])
    records = [record for _, record in ends[0]]
    about = {"records": records, "size": ranks.size}
    checkpoint.save(f"{sys.argv[1]}/{ranks.rank}", ends[0][-1][0].params, about,
                    total=total, shared=shared, average=ends[0][-1][0].average.average)
    try:
        distributed.check_same(ranks, "data", "a" if ranks.rank < ranks.size - 1 else "b")
    except ValueError as error:
        print(error, file=sys.stderr)
"""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ended(request, tmp_path_factory):
    """What `PROGRAM` leaves behind on several ranks."""
    home = tmp_path_factory.mktemp("ranks")
    codes, said = finish(start(request.param, lambda rank: ["-c", PROGRAM, str(home)]))
    assert codes == [0] * request.param, said
    return home, said, request.param


def test_several_ranks_equal_one_process(ended, splits):
    home, _, size = ended
    state, record = list(train.loop(train.solo(TINY, splits)))[-1]

    def near(one, other):  # the sums of gradients round in another order
        tree.map(lambda a, b: assert_close(a, b, rtol=1e-4, atol=2e-6), one, other)

    for rank in range(size):
        params, about = checkpoint.load(home / str(rank))
        average = checkpoint.load_state(home / str(rank), average=state.params)["average"]
        near(params, state.params)
        near(average, state.average.average)
        found = about["records"][-1]
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert_close(found[name], record[name], rtol=1e-4, atol=0)
        assert found["learning_rate"] == record["learning_rate"]
        assert found["step"] == 6 and about["size"] == size


def test_all_ranks_end_with_the_same_bits(ended):
    home, _, size = ended
    first, about = checkpoint.load(home / "0")
    for rank in range(1, size):
        params, own = checkpoint.load(home / str(rank))
        tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), params, first)
        for one, other in zip(about["records"], own["records"], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_trees_are_added_up_and_handed_out(ended):
    home, _, size = ended
    like = {
        "a": torch.zeros(3), "b": [torch.zeros(()).double()],
        "c": torch.zeros(2, 2, dtype=torch.int64),
    }  # fmt: skip
    for rank in range(size):
        found = checkpoint.load_state(home / str(rank), total=like, shared=like)
        wanted = size * torch.arange(3.0) + sum(range(size))
        assert torch.equal(found["total"]["a"], wanted)
        assert float(found["total"]["b"][0]) == 2.0 * size
        assert int(found["total"]["c"][1, 1]) == sum(10**i for i in range(size))
        assert torch.equal(found["shared"]["a"], torch.arange(3.0))
        assert int(found["shared"]["c"][0, 0]) == 1


def test_a_rank_that_sees_other_data_is_named_on_all(ended):
    _, said, size = ended
    for text in said:
        assert f"same data on every rank, got another on rank {size - 1} than" in text


# without processes


def test_buckets_keep_the_order_and_stay_small():
    leaves = [
        torch.zeros(n, dtype=d) for n in (1, 5, 3, 3, 9) for d in (torch.float32, torch.int64)
    ]
    groups = distributed.buckets(leaves, 24)
    assert sorted(i for group in groups for i in group) == list(range(10))
    for group in groups:
        assert len({leaves[i].dtype for i in group}) == 1 and group == sorted(group)
        assert len(group) == 1 or sum(leaves[i].nbytes for i in group) <= 24
    assert len(groups) < 10 and distributed.buckets([]) == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_the_ranks_are_the_batch(size, splits):
    config = dataclasses.replace(TINY, accumulate=1)
    whole = train.batches(config, splits.train).at(3, 5)
    parts = [train.batches(config, splits.train, Ranks(i, size)).at(3, 5) for i in range(size)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_ranks_share_an_evaluation(size, splits):
    config = dataclasses.replace(TINY, operator="softmax", rank=None)
    model = train.build(config, splits.train)
    params = model.init(torch.Generator().manual_seed(0))

    def score(**options):
        return train.evaluate(model.apply, params, splits.val, config, 100, **options)

    whole, parts = score(), [score(ranks=Ranks(i, size)) for i in range(size)]
    for name, value in whole.items():
        assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=0)


def test_what_ranks_cannot_share_is_refused(splits):
    with pytest.raises(ValueError, match="multiple of the processes times `accumulate`, 3 x 2"):
        train.solo(TINY, splits, ranks=Ranks(0, 3))
    with pytest.raises(ValueError, match="multiple of the processes times `accumulate`, 8 x 2"):
        train.solo(TINY, splits, ranks=Ranks(0, 8))
    compiled = dataclasses.replace(TINY, step="compiled")
    with pytest.raises(ValueError, match='needs step="eager" with 2 processes'):
        train.solo(compiled, splits, ranks=Ranks(0, 2))
    with pytest.raises(ValueError, match="one member with 2 processes, got 2"):
        population.run(population.seeds(TINY, [0, 1]), splits, ranks=Ranks(0, 2))


def test_alone_without_torchrun_and_an_environment_of_another_kind_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined() as ranks:
        assert ranks is train.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="environment that torchrun makes"), distributed.joined():
        pass


# by the command line


FLAGS = [
    *("--operator", "G2B", "--batch-size", "8", "--embed-dim", "8", "--depth", "1"),
    *("--num-heads", "1", "--patch-size", "4", "--rank", "3", "--train-limit", "24"),
    *("--threads", "1", "--quiet"),
]


def command(*argv):
    return ["-m", "kart", "train", *map(str, over(FLAGS, *argv))]


def records(home):
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (home / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def kill_one(home, argv, victim, after):
    """Starts two ranks, kills one `after` seconds behind the next record; states, lines."""
    known = len(records(home))
    processes = start(2, lambda rank: command(*argv))
    limit = time.monotonic() + 120
    while len(records(home)) <= known and all(p.poll() is None for p in processes):
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(after)
    processes[victim].send_signal(signal.SIGKILL)
    return finish(processes)


def same_weights(one, other, **tolerance):
    first, second = (checkpoint.load(home / "last.safetensors")[0] for home in (one, other))
    tree.map(lambda a, b: assert_close(a, b, **tolerance), first, second)


@pytest.mark.slow
def test_ranks_that_diverge_stop_together_and_say_where(tmp_path):
    wild = ["--learning-rate", "1e25", "--warmup-epochs", 0, "--max-norm", "1e20"]
    argv = ["--epochs", 2, *wild, "--out", tmp_path / "out"]
    codes, said = finish(start(2, lambda rank: command(*argv)))
    assert codes == [1, 0] and "stopped at step 1: the loss is nan" in said[0]
    assert "first in `" in said[0] and said[1] == ""  # it is told once
    assert runs.diverged(tmp_path / "out") == {0: 1}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_stops_the_others_and_nothing_is_lost(victim, tmp_path):
    argv = ["--epochs", 100, "--out"]
    codes, said = kill_one(tmp_path / "killed", [*argv, tmp_path / "killed"], victim, 0.1)
    other = 1 - victim
    assert codes[victim] == -signal.SIGKILL and codes[other] == 1
    lines = [line for line in said[other].splitlines() if line.startswith("kart:")]
    assert len(lines) == 1 and f"rank {other} lost another rank" in lines[0], said
    done = len(records(tmp_path / "killed"))
    assert 0 < done < 100
    # cut short, so that going on takes seconds: the same run to the bit, with the same ranks
    for name in ("killed", "whole"):
        codes, said = finish(start(2, lambda rank, n=name: command(*argv, tmp_path / n)))
        assert codes == [0, 0], said
    same_weights(tmp_path / "killed", tmp_path / "whole", rtol=0, atol=0)


@pytest.mark.slow
def test_ten_kills_and_another_number_of_ranks(tmp_path):
    argv = ["--epochs", 100, "--out", tmp_path / "killed"]
    draw = torch.Generator().manual_seed(0)
    for kill in range(10):
        wait = float(torch.rand((), generator=draw)) * 0.05
        codes, _ = kill_one(tmp_path / "killed", argv, kill % 2, wait)
        assert -signal.SIGKILL in codes
    # one process ends what two began
    done = subprocess.run([sys.executable, *command(*argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    epochs = [record["epoch"] for record in records(tmp_path / "killed")]
    assert epochs == list(range(1, 101))
    done = subprocess.run([sys.executable, *command(*argv[:-1], tmp_path / "one")])
    assert done.returncode == 0
    # rounding in another order, amplified by 300 steps
    same_weights(tmp_path / "killed", tmp_path / "one", rtol=0.05, atol=0.01)


@pytest.mark.slow
def test_mistakes_are_told_once_and_write_nothing(tmp_path):
    out = tmp_path / "run"
    for argv, words in (
        (["--batch-size", 9], "multiple of the processes"),
        (["--seeds", 0, 1, "--group", 2], "needs to be 1 with 2 processes"),
        (["--model", "vit_tin"], "vit_tiny"),
    ):
        codes, said = finish(start(2, lambda rank, a=argv: command(*a, "--out", out)))
        told = [line for text in said for line in text.splitlines() if "kart: error" in line]
        assert codes == [2, 2] and len(told) == 1 and words in told[0], (argv, said)
        assert not out.exists()
    # rank 1 reads other data
    different = [command("--out", out), command("--out", out, "--train-limit", 16)]
    codes, said = finish(start(2, lambda rank: different[rank]))
    told = [line for text in said for line in text.splitlines() if "kart: error" in line]
    assert codes == [2, 2] and len(told) == 1 and "got another on rank 1" in told[0], said
    assert not out.exists()


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*run, *command("--epochs", 1, "--seeds", 0, 1, "--out", tmp_path / "run")]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    for group in ("group-0", "group-1"):
        assert len(runs.read_metrics(tmp_path / "run" / group)) == 1
