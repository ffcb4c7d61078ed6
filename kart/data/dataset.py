"""The data set of one split as arrays, with the records of what was left out or changed."""

import hashlib
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from kart import schema

if TYPE_CHECKING:
    from kart.data.pictures import Pictures

SPLITS = ("train", "val", "test")


class Unused(NamedTuple):
    """Something found beside the data and not read: a path, a pattern or a column, and why."""

    what: str
    count: int  # files, images or rows
    why: str

    def __str__(self) -> str:
        return f"{self.what}{f' ({self.count})' if self.count else ''}: {self.why}"


class Converted(NamedTuple):
    """A change made to `count` images or labels while reading them."""

    what: str
    count: int


class Dataset(NamedTuple):
    """One split: images and labels as NumPy arrays, images possibly memory-mapped and read-only.

    Images of a large set stay in their files: `Pictures` decode those that are indexed, and `mean`
    and `std` are of a sample (see `kart.data.stream`).

    `mean` and `std` are per channel, of pixels in [0, 1], over the whole training split (whatever
    `train_limit`), and the same on every split; so are `classes`, which are names (the integers as
    text where a source has no names). `unused` is what the source holds and no split has,
    `converted` what was changed in the images of this split (all of it, whatever `train_limit`).
    """

    images: "np.ndarray | Pictures"  # uint8 (n, channels, height, width)
    labels: np.ndarray  # int64 (n,)
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unused: tuple[Unused, ...] = ()
    converted: tuple[Converted, ...] = ()
    masks: np.ndarray | None = None  # bool (n, height, width), True on the object; "masked_digits"

    def check(self) -> None:
        """Raises ValueError, with the field, unless images, labels and statistics are as above."""
        images, labels = self.images, self.labels
        for field, dtype, ndim, wanted in (
            ("images", np.uint8, 4, "uint8 (n, channels, height, width)"),
            ("labels", np.int64, 1, "int64 (n,)"),
        ):
            value = getattr(self, field)
            own = getattr(value, "dtype", type(value).__name__)
            if not isinstance(own, np.dtype) or own != dtype or len(value.shape) != ndim:
                self._refuse(field, f"an array, {wanted}", f"{own} of shape {np.shape(value)}")
        if len(labels) != len(images):
            self._refuse("labels", f"one of each of {len(images)} images", str(len(labels)))
        count = len(set(self.classes)) if schema.fits(self.classes, tuple[str, ...]) else 0
        if count < 2 or count < len(self.classes):
            self._refuse("classes", "two names or more, no one twice", f"{self.classes!r:.200}")
        if not isinstance(self.name, str):
            self._refuse("name", "a string", f"{self.name!r:.50}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < count:
            bounds = f"{labels.min()} to {labels.max()}"
            self._refuse("labels", f"numbers of its {count} classes, 0 to {count - 1}", bounds)
        for name, low in (("mean", 0.0), ("std", 1e-6)):
            given, own = getattr(self, name), images.shape[1]
            values = np.asarray(given)
            fits = values.shape == (own,) and values.dtype.kind in "fiu"
            if not fits or not ((values >= low) & (values <= 1)).all():
                needed = f"{own} numbers in {low:g} to 1, of pixels in [0, 1]"
                self._refuse(name, needed, f"{given!r:.200}")

    def _refuse(self, field: str, needed: str, got: str) -> NoReturn:
        raise ValueError(
            f"`Dataset` needs `{field}` to be {needed}, got {got} in {self.name!r}. Change it."
        )

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.images.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of images of each class, in the order of `classes`."""
        return tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())

    def spread(self, count: int) -> np.ndarray:
        """The indices of `count` images, of all where there are no more: the first ones, or where
        images lie class by class, so that those would be of the first classes, evenly from all.
        """
        whole = len(self.labels)
        index = np.arange(min(count, whole))
        if np.count_nonzero(np.diff(self.labels)) < len(np.unique(self.labels)):
            index = (2 * index + 1) * whole // (2 * max(1, len(index)))
        return index

    def part(self, index: np.ndarray | slice) -> "Dataset":
        """The images at `index`, in its order; those that stay in their files do so."""
        images = self.images
        return self._replace(
            images=images[index] if isinstance(images, np.ndarray) else images.part(index),
            labels=self.labels[index],
            masks=None if self.masks is None else self.masks[index],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes, shape, labels and pixels, in order: equal where the data are.

        Computed at every call, at some 1.5 GB a second. Of `Pictures` names and sizes of the files
        stand for the pixels.
        """
        digest = hashlib.sha256(repr((tuple(self.classes), self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        if not isinstance(self.images, np.ndarray):
            digest.update(self.images.identity)
            return digest.hexdigest()
        step = max(1, 2**24 // max(1, self.images[:1].size))
        for start in range(0, len(self.images), step):
            digest.update(np.ascontiguousarray(self.images[start : start + step]).data)
        return digest.hexdigest()


def mean_and_std(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 images, in units of [0, 1]."""
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, 2**22 // images[0].size)
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        counts += [np.bincount(chunk[:, c].ravel(), minlength=256) for c in range(channels)]
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    # a constant channel has no spread: one grey level keeps `normalise` finite
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1)).clip(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
