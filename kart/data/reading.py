"""Batches of a split as a pure function of (seed, step), read ahead by worker processes."""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Indexed

from kart.data.batches import batch_indices, generator_for, take
from kart.data.dataset import Dataset
from kart.data.pictures import Pictures

_AHEAD = 4  # batches that each worker has ready or in work


class Cut(NamedTuple):
    """A random part of each image: `box(generator, height, width)` says which, in whole pixels
    `(top, left, height, width)`, and it is scaled to `size` x `size`.

    `box` goes to worker processes: a function of a module.
    """

    box: Callable[[Generator, int, int], tuple[int, int, int, int]]
    size: int


class Reader(NamedTuple):
    """Batches as a pure function of (seed, step): `at(seed, step)` gives images `(B, C, height,
    width)`, uint8 where they are as they were read, and their labels, int64 `(B,)`, or targets.
    """

    steps_per_epoch: int
    at: Callable[[int, int], tuple[Tensor, Tensor]]


def reader(dataset: Dataset, batch_size: int, cut: Cut | None = None) -> Reader:
    """Batches of `dataset` in the order of `batch_indices`, the images whole or `cut` at random.

    Batch and boxes are functions of (seed, epoch, position) and of nothing else. `Pictures` can be
    cut, in the resolution of their files; when one step is asked for after the other, their worker
    processes decode what comes next. A step out of turn is decoded here, with the same result.
    """
    pictures = isinstance(dataset.images, Pictures)
    if cut is not None and not pictures:
        raise ValueError(
            "`reader` needs images that stream (`Pictures`) to `cut` them, got an array. Leave "
            "`cut` out, and crop the batch."
        )
    drawn = _Drawn(dataset, batch_size, cut)
    workers = dataset.images.workers if isinstance(dataset.images, Pictures) else 0
    # of each seed: the step that comes next, and the workers that have begun with it
    running: dict[int, tuple[int, Iterator[Any] | None]] = {}

    def at(seed: int, step: int) -> tuple[Tensor, Tensor]:
        following, ahead = running.pop(seed, (-1, None))
        if step != following:
            ahead, batch = None, drawn[seed, step]
        else:
            # a worker of somebody's own loader may have none itself
            if ahead is None and workers and not multiprocessing.current_process().daemon:
                # seeds that train together share them
                ahead = _ahead(drawn, max(1, workers // (1 + len(running))), seed, step)
            batch = drawn[seed, step] if ahead is None else next(ahead)
        if isinstance(batch, str):
            raise ValueError(batch)
        running[seed] = (step + 1, ahead)
        images, labels = batch
        return images, labels

    return Reader(drawn.steps_per_epoch, at)


def _ahead(drawn: "_Drawn", workers: int, seed: int, step: int) -> Iterator[Any]:
    # a server that forks the workers: a fork of this process could copy locks that its threads hold
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return iter(
        DataLoader(
            drawn,
            batch_size=None,
            sampler=zip(itertools.repeat(seed), itertools.count(step)),
            num_workers=workers,
            prefetch_factor=_AHEAD,
            multiprocessing_context=context,
            worker_init_fn=_leave_with_parent,
        )
    )


def _leave_with_parent(worker: int) -> None:
    # a worker's own watch is on the server, which outlives a process that is killed
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Drawn(Indexed):
    """The batches by (seed, step); in place of a batch with a bad image the message about it."""

    def __init__(self, dataset: Dataset, batch_size: int, cut: Cut | None):
        self.dataset, self.batch_size, self.cut = dataset, batch_size, cut
        self.count = len(dataset.labels)
        self.steps_per_epoch = len(batch_indices(self.count, batch_size, 0, 0))
        self.order: dict[tuple[int, int], Tensor] = {}  # the current epoch's of each seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | str:
        seed, step = key
        epoch, position = divmod(step, self.steps_per_epoch)
        if (seed, epoch) not in self.order:
            self.order.pop((seed, epoch - 1), None)
            self.order[seed, epoch] = batch_indices(self.count, self.batch_size, seed, epoch)
        index = self.order[seed, epoch][position]
        try:
            if self.cut is None:
                return take(self.dataset, index)
            return self._cut(self.cut, index, seed, step)
        # an exception of a worker would come with its traceback
        except ValueError as err:
            return str(err)

    def _cut(self, cut: Cut, index: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        pixels = np.empty((len(index), self.dataset.channels, cut.size, cut.size), dtype=np.uint8)
        for i, image in enumerate(index.tolist()):
            generator = generator_for("cut", seed, step, i)

            def box(height: int, width: int, generator: Generator = generator) -> Any:
                return cut.box(generator, height, width)

            pixels[i] = self.dataset.images.cut(image, box, cut.size)  # pyright: ignore
        return torch.from_numpy(pixels), torch.from_numpy(self.dataset.labels[index.numpy()])
