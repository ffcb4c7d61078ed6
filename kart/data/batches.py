"""Batches as pure functions: who is in a batch, its images and labels, pixels as floats."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from kart import schema, tree
from kart.data.dataset import Dataset


def generator_for(*keys: int | str) -> Generator:
    """A CPU generator whose seed depends on `keys` alone, the same on every machine.

    >>> generator_for("augment", 0, 7).initial_seed()
    5680788064619122746
    """
    if not keys or not all(schema.fits(key, int | str) for key in keys):
        raise ValueError(f"`generator_for` needs one or more int or str keys, got {keys!r}.")
    return torch.Generator().manual_seed(int(schema.digest(keys)[:16], 16) >> 1)


def batch_indices(n: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True) -> Tensor:
    """Shuffled indices of one epoch, int64 `(steps, batch_size)`, from the arguments alone.

    With `drop_last` the n mod `batch_size` images at the end of the shuffle sit this epoch out;
    else the last batch is filled up from the shuffle's start.
    """
    for argument, value in (("n", n), ("batch_size", batch_size)):
        if not schema.fits(value, int) or value >= 2**31:
            raise ValueError(
                f"`batch_indices` needs integers below 2^31, got `{argument}` = {value!r}."
            )
    if batch_size < 1 or n < (batch_size if drop_last else 1):
        raise ValueError(
            f"`batch_indices` needs 1 <= `batch_size` <= n = {n}, got {batch_size}. "
            "Lower the batch size, or pass `drop_last=False`."
        )
    order = torch.randperm(n, generator=generator_for("batches", seed, epoch))
    steps = n // batch_size if drop_last else -(-n // batch_size)
    return order[torch.arange(steps * batch_size) % n].reshape(steps, batch_size)


def take(dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images, uint8 `(..., C, height, width)`, and labels, int64 `(...)`, at `indices (...)`."""
    if not isinstance(indices, Tensor):
        raise ValueError(
            f"`take` needs integer `indices` as a tensor, got {type(indices).__name__}."
        )
    index = indices.numpy(force=True)
    if index.dtype.kind not in "iu":
        raise ValueError(f"`take` needs integer `indices`, got {indices.dtype}.")
    n = len(dataset.labels)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(
            f"`take` needs indices in 0..{n - 1}, got {index.min()}..{index.max()}. "
            f"Draw them with `batch_indices(n={n}, ...)`."
        )
    return torch.from_numpy(dataset.images[index]), torch.from_numpy(dataset.labels[index])


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], what `kart.augment` takes."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"`as_float` needs uint8 images, got {kind}.")
    return images.float() / 255


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images `(..., C, height, width)`, uint8 or float in [0, 1], less `mean` and over `std`."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"`normalise` needs images as a tensor, got {type(images).__name__}. "
            "Make one by `torch.from_numpy(...)`."
        )
    x = as_float(images) if images.dtype == torch.uint8 else images
    if not x.is_floating_point():
        raise ValueError(f"`normalise` needs uint8 or float images, got {images.dtype}.")
    if images.ndim < 3 or not images.shape[-3] == len(mean) == len(std):
        raise ValueError(
            f"`normalise` needs images (..., C, height, width), C means and C deviations, got "
            f"shape {tuple(images.shape)}, {len(mean)} and {len(std)}. Take both from the data set."
        )
    if not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
        raise ValueError(
            "`normalise` needs finite means and deviations > 0, got "
            f"{mean!r:.100} and {std!r:.100}. Take both from the data set."
        )
    own = torch.tensor([tuple(mean), tuple(std)], dtype=x.dtype, device="cpu")[..., None, None]
    shift, scale = tree.onto(own, x.device)
    return (x - shift) / scale
