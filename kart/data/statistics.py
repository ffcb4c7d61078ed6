"""Mean and standard deviation of pixels."""

import numpy as np


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
