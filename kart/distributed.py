"""One run trained by several processes, on one machine or more: each rank its part of every batch.

    torchrun --nproc-per-node 2 -m kart train --operator G3B --out runs/digits

Gradients are averaged in flat buckets after the backward (they do not overlap with it), so that the
result is that of one process with the same batches up to rounding; with the same number of ranks it
is the same to the bit. Rank 0 alone reads and writes the run directory. A run that was stopped goes
on with any number of ranks that divides its batch.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from kart import train, tree
from kart.train import ALONE, Config, Ranks, Splits

# how long a rank waits for another: as long as one may need to decode its data
TIMEOUT_S = 1800.0
# bytes sent at once: many, to hide latency, and few, to send some while others are gathered
BUCKET_BYTES = 25 * 2**20

Tree = Any


class Lost(RuntimeError):
    """Another rank ended, or did not answer in time."""

    def __init__(self, rank: int):
        super().__init__(
            f"rank {rank} lost another rank, which was killed or hangs. Start the same command "
            "again, with any number of ranks that divides the batch: the run goes on after its "
            "last finished epoch."
        )


@contextlib.contextmanager
def joined(device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """The ranks that torchrun started, of which this process is one, while the block runs; `ALONE`
    without torchrun. NCCL on GPUs, one a rank by its place on its machine, else gloo.

    Where an error ends the block on several ranks, the first one raises it and the others exit: it
    is told once.

    Raises:
        ValueError: an environment that torchrun did not make, or too few GPUs.
        Lost: another rank is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = _rendezvous(timeout_s)
    backend = "gloo"
    if device.startswith("cuda"):
        backend, local = "nccl", int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"`torchrun` needs at most one process a GPU, got number {local + 1} on a machine "
                f"with {torch.cuda.device_count()}. Lower --nproc-per-node."
            )
        torch.cuda.set_device(local)
    try:
        limit = datetime.timedelta(seconds=timeout_s)
        own = PrefixStore("group", store)
        with _watched(rank):
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
        yield Ranks(rank, size, lambda x: _total(rank, x), lambda x: _share(rank, x))
    except BaseException as error:
        if _first(store):
            raise
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    dist.destroy_process_group()


def _rendezvous(timeout_s: float) -> tuple[Any, int, int]:
    limit = datetime.timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "`joined` needs the environment that torchrun makes, got "
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} and {str(error).splitlines()[0]!r}. Start with "
            "`torchrun --nproc-per-node N -m kart train ...`, or unset WORLD_SIZE."
        ) from None
    # a group that torchrun starts again has the store of the first one
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"kart/{attempt}", store), rank, size


def _first(store: Any) -> bool:
    """Whether no other rank has stopped before; also where the store is gone with its rank."""
    try:
        return store.add("stopped", 1) == 1
    except RuntimeError:
        return True


@contextlib.contextmanager
def _watched(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost(rank) from error


def buckets(leaves: list[Tensor], most_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Places in `leaves`, in order and grouped by dtype, at most `most_bytes` or one leaf a group.

    >>> buckets([torch.zeros(2), torch.zeros(3), torch.zeros(4), torch.zeros(1).double()], 20)
    [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = []
    filled: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, leaf in enumerate(leaves):
        group, held = filled.get(leaf.dtype, ([], 0))
        if not group or held + leaf.nbytes > most_bytes:
            group, held = [], 0
            groups.append(group)
        group.append(i)
        filled[leaf.dtype] = group, held + leaf.nbytes
    return groups


def _collective(rank: int, value: Tree, send: Callable[[Tensor], Any]) -> Tree:
    """`value` after `send`, which writes into the flat tensor it is given, on each bucket."""
    leaves = tree.leaves(value)
    with _watched(rank):
        sent = []
        for places in buckets(leaves):
            flat = torch.cat([leaves[i].reshape(-1) for i in places])
            sent.append((places, flat, send(flat)))
        for places, flat, work in sent:
            work.wait()
            parts = flat.split([leaves[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                leaves[i] = part.view(leaves[i].shape)
    return tree.with_leaves(value, leaves)


def _total(rank: int, value: Tree) -> Tree:
    return _collective(rank, value, lambda flat: dist.all_reduce(flat, async_op=True))


def _share(rank: int, value: Tree) -> Tree:
    return _collective(rank, value, lambda flat: dist.broadcast(flat, src=0, async_op=True))


def check_same(ranks: Ranks, what: str, value: str) -> None:
    """Raises ValueError, on every rank, unless `value` is the same on all; says which differ."""
    if ranks.size == 1:
        return
    found: list[Any] = [None] * ranks.size
    with _watched(ranks.rank):
        dist.all_gather_object(found, value)
    odd = [str(rank) for rank, one in enumerate(found) if one != found[0]]
    if odd:
        raise ValueError(
            f"`torchrun` needs the same {what} on every rank, got another on rank "
            f"{', '.join(odd)} than on rank 0. Give all machines the same files and command."
        )


def follow(ranks: Ranks, config: Config, splits: Splits) -> None:
    """The part of a rank other than 0 in a run: rank 0 calls `runs.execute` with `ranks`."""
    run = train.solo(config, splits, ranks=ranks)
    for _ in train.loop(run, ranks.share(run.init()), donate=True):
        pass
