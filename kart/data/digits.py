"""Handwritten digits that come with scikit-learn: as they are, and on photographs with masks."""

import numpy as np

from kart.data import images as decoding
from kart.data import splits
from kart.data.dataset import Dataset, mean_and_std
from kart.data.source import library

LARGEST = 512  # pixels a side: 1797 colour images of it take 1.4 GB
_MASKED_SIZE = 32
_MASKED_SEED = 1906  # places, sizes, inks and backgrounds, never a user's choice


def load(name: str, split: str, image_size: int | None) -> Dataset:
    """One split of "digits" or "masked_digits"; both cut the same digits in the same way."""
    datasets = library("sklearn.datasets", f"scikit-learn for {name!r}")
    digits = datasets.load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    masks = None
    if name == "masked_digits":
        photographs = datasets.load_sample_images().images
        images, masks = _paste(levels, photographs, image_size or _MASKED_SIZE)
    elif image_size in (None, 8):
        images = levels[:, None]
    else:
        pillow = decoding.pillow()
        resized = [decoding.resize(pillow.fromarray(level), image_size) for level in levels]
        images = np.stack([np.asarray(image) for image in resized])[:, None]
    parts = splits.partition(labels, splits.cuts(()))
    mean, std = mean_and_std(images[parts["train"]])
    classes = tuple(str(name) for name in digits.target_names)
    whole = Dataset(images, labels, classes, name, mean, std, masks=masks)
    return whole.part(parts[split])


def _paste(
    levels: np.ndarray, photographs: list[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Digits in ink on crops of photographs: images `(n, 3, size, size)`, masks `(n, size, size)`.

    A digit takes 35 to 55 % of the side, anywhere; the crop is 1 to 3 times as wide as the image,
    the most textured (by its deviation) of three. The ink is a colour drawn on the far side of the
    mean brightness around it. The mask is where the ink covers half or more.
    """
    pillow = decoding.pillow()
    # the raw stream is the same in every version of NumPy
    draws = np.random.PCG64(_MASKED_SEED).random_raw(len(levels) * 15) / 2.0**64
    images = np.empty((len(levels), 3, size, size), dtype=np.uint8)
    masks = np.zeros((len(levels), size, size), dtype=bool)
    grounds = [pillow.fromarray(photograph) for photograph in photographs]
    for i, (level, draw) in enumerate(zip(levels, draws.reshape(-1, 15), strict=True)):
        ground = grounds[int(draw[0] * len(grounds))]
        width, height = ground.size
        side = int(min(size * (1 + 2 * draw[1]), width, height))
        crops = []
        for across, down in draw[2:8].reshape(3, 2):
            left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
            box = (left, top, left + side, top + side)
            crop = ground.resize((size, size), pillow.Resampling.BICUBIC, box=box)
            crops.append(np.asarray(crop).astype(np.float64))
        pixels = max(crops, key=np.std)
        span = max(1, round(size * (0.35 + 0.2 * draw[8])))
        row, column = (int(u * (size - span + 1)) for u in draw[9:11])
        place = (slice(row, row + span), slice(column, column + span))
        glyph = pillow.fromarray(level).resize((span, span), pillow.Resampling.BICUBIC)
        cover = np.zeros((size, size))
        cover[place] = np.asarray(glyph) / 255.0
        ink = draw[11:14] * 80 + (175 if pixels[place].mean() < 128 else 0)
        mixed = pixels + cover[..., None] * (ink - pixels)
        images[i] = np.rint(mixed).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
        masks[i] = cover >= 0.5
    return images, masks
