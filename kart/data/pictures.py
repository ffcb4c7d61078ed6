"""Image files that can be indexed like an array of their pixels."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kart.data import images


@dataclass(frozen=True, eq=False)
class Pictures:
    """`n` image files as a uint8 array `(n, channels, height, width)` that is decoded when indexed.

    A slice is another `Pictures`; anything else that indexes a NumPy array gives the pixels as one,
    decoded by `workers` threads, the same as the cache of small sets has them. `np.asarray` decodes
    all.
    """

    root: str
    names: np.ndarray  # bytes (n,): paths below the root
    sizes: np.ndarray  # int64 (n,): bytes of the files
    channels: int
    height: int
    width: int
    scaled: bool  # whether images are cut to the shape; else they have it
    workers: int

    ndim = 4
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(n, channels, height, width)`."""
        return len(self), self.channels, self.height, self.width

    @property
    def size(self) -> int:
        """Number of pixels and channels, as of an array."""
        return len(self) * self.channels * self.height * self.width

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels, decoded."""
        return self.size

    @property
    def identity(self) -> bytes:
        """SHA-256 over the names and sizes of the files and whether they are cut."""
        digest = hashlib.sha256(repr((self.shape, self.scaled)).encode())
        digest.update(b"\0".join(self.names.tolist()))
        digest.update(self.sizes.tobytes())
        return digest.digest()

    def path(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))

    def part(self, index: np.ndarray | slice) -> "Pictures":
        """The files at `index`."""
        return replace(self, names=self.names[index], sizes=self.sizes[index])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.part(index)
        chosen = np.arange(len(self))[index]
        if chosen.ndim == 0:
            return self._decode(int(chosen))
        if self.workers > 1 and chosen.size > 1:
            with ThreadPoolExecutor(self.workers) as pool:
                pixels = list(pool.map(self._decode, chosen.ravel().tolist()))
        else:
            pixels = [self._decode(i) for i in chosen.ravel().tolist()]
        return np.array(pixels, dtype=np.uint8).reshape(*chosen.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("`Pictures` need a copy to become an array. Leave `copy=False` out.")
        pixels = self[np.arange(len(self))]
        return pixels if dtype is None else pixels.astype(dtype)

    def cut(self, index: int, box: images.Box, size: int) -> np.ndarray:
        """The part `box(height, width)` of image `index`, as large as it is in its file, scaled to
        `(channels, size, size)`: see `kart.data.images.cut`.
        """
        where = self.path(index)
        return images.channels_first(np.asarray(images.cut(where, where, box, size)), self.channels)

    def _decode(self, index: int) -> np.ndarray:
        where = self.path(index)
        image, _ = images.decode(where, where)
        if self.scaled:
            image = images.resize(image, self.width)
        if image.size != (self.width, self.height):
            raise ValueError(
                f"`load` needs images as they were when it began, got {where} of size {image.size} "
                f"in place of {(self.width, self.height)}. Put the file back."
            )
        return images.channels_first(np.asarray(image), self.channels)
