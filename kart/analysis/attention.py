"""Where the class token looks: attention maps over the image grid (paper, sec. 7)."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_maps(weights: Tensor) -> Tensor:
    """The class token's row per head on the patch grid, `(..., H, N, N)` to `(..., H, g, g)`.

    Negative weights, which KArAt has, are dropped, as in the paper; each map is scaled to a largest
    value of 1, and is zero where no weight is positive.
    """
    if weights.dim() < 3 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(
            f"`class_maps` needs weights (..., H, N, N), got shape {tuple(weights.shape)}. "
            "Pass an entry blocks.<i>.weights of `intermediates`."
        )
    side = math.isqrt(weights.shape[-1] - 1)
    if side * side != weights.shape[-1] - 1 or not side:
        raise ValueError(
            f"`class_maps` needs a class token and a square grid of patches, got "
            f"{weights.shape[-1]} tokens. Images must be square."
        )
    rows = weights[..., 0, 1:].clamp(min=0).unflatten(-1, (side, side))
    largest = rows.amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, rows / largest.clamp(min=1e-30), 0.0)


def dominant_head(weights: Tensor) -> Tensor:
    """The head with the most positive weight on patches, `(..., H, N, N)` to `(...)`."""
    return weights[..., 0, 1:].clamp(min=0).sum(-1).argmax(-1)


def plot(images: Tensor, maps: Mapping[str, Tensor], labels: list[str] | None = None) -> "Figure":
    """A figure with a row per model and a column per image: the dominant map over the image.

    Args:
        images: in [0, 1], `(B, C, height, width)`.
        maps: by model, `(B, g, g)` in [0, 1], one map an image.
        labels: a title for each image.
    """
    from matplotlib.figure import Figure

    count, side = len(images), images.shape[-1]
    figure = Figure(figsize=(1.05 * count + 0.9, 1.1 * (len(maps) + 1)), layout="constrained")
    panels = figure.subplots(len(maps) + 1, count, squeeze=False)
    shown = images.movedim(1, -1).squeeze(-1)
    for column in range(count):
        panels[0][column].imshow(shown[column], cmap="gray", vmin=0, vmax=1)
        if labels:
            panels[0][column].set_title(labels[column], fontsize=8)
        for row, values in enumerate(maps.values(), start=1):
            panels[row][column].imshow(shown[column], cmap="gray", vmin=0, vmax=1)
            grid = values[column].float().cpu()
            extent = (-0.5, side - 0.5, side - 0.5, -0.5)
            panels[row][column].imshow(
                grid, cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=extent
            )
    for row, name in enumerate(["image", *maps]):
        panels[row][0].set_ylabel(name, fontsize=8)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
