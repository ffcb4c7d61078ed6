"""What was changed in the images of a split while they were read."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kart.data import images
from kart.data.dataset import Converted


def tally(
    changes: Sequence[tuple[str, ...]],
    grey: np.ndarray,
    index: np.ndarray,
    channels: int,
    renumbered: int = 0,
) -> tuple[Converted, ...]:
    """The changes at `index`, counted by kind, of images that come out with `channels`.

    `changes` and `grey`, bool `(n,)`, are those of each image's `Header`.
    """
    counts: Counter[str] = Counter()
    for i in index:
        counts.update(changes[i])
    turned = int(grey[index].sum())
    counts[images.TO_COLOUR if channels == 3 else images.TO_GREY] += (
        turned if channels == 3 else len(index) - turned
    )
    counts["labels renumbered to agree by name"] += renumbered
    return tuple(Converted(what, count) for what, count in sorted(counts.items()) if count)
