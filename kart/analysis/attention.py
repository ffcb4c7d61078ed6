"""What the class token attends to, as maps over the image (paper, sec. 7), and how much of the
attention depends on the image at all.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kart import pages
from kart.analysis import figures
from kart.analysis.functions import some_blocks
from kart.analysis.section import Analysis, Context

HEAT = "#ff7a1a"  # seen on black and on white


def class_maps(weights: Tensor) -> Tensor:
    """The class token's row of `weights (..., H, N, N)` as maps `(..., H, rows, columns)` over the
    patches, negative values dropped as in the paper.

    Of a model take `intermediates(params, images)["blocks.<last>.weights"]`.
    """
    patches = weights.shape[-1] - 1
    side = round(max(patches, 0) ** 0.5)
    if weights.dim() < 3 or weights.shape[-2] != patches + 1 or side * side != patches or not side:
        raise ValueError(
            f"`class_maps` needs weights (..., H, N, N) with N - 1 a square, got shape "
            f"{tuple(weights.shape)}. The first token is the class token, the others the patches."
        )
    return weights[..., 0, 1:].clamp(min=0).unflatten(-1, (side, side))


def dominant_head(maps: Tensor) -> Tensor:
    """Index `(...)` of the head with the largest sum, of `maps (..., H, rows, columns)`."""
    return maps.sum((-2, -1)).argmax(-1)


def region(maps: Tensor, share: float = 0.5) -> Tensor:
    """The fewest patches that hold `share` of each map's sum, boolean `(..., rows, columns)`.

    The paper shows a region without saying how it is cut; half of the mass is kart's choice. A map
    of zeros has none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`region` needs 0 < `share` <= 1, got {share!r}. The default is 0.5.")
    flat = maps.flatten(-2)
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # mass of the patches that go first
    taken = (before < share * flat.sum(-1, keepdim=True)) & (values > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken).unflatten(-1, maps.shape[-2:])


def static_share(weights: Tensor) -> Tensor:
    """How much of each head's attention is the same for all images, `(B, H, N, M)` to `(H,)`.

    The squared norm of the weights averaged over images, over the average of their squared norms:
    1 where the weights do not depend on the image (the control `polynomial(0)`), 1/B for weights
    of independent sign.
    """
    if weights.dim() != 4:
        raise ValueError(
            f"`static_share` needs weights (B, H, N, M), got shape {tuple(weights.shape)}. Pass "
            'those of a batch, intermediates(params, images)["blocks.0.weights"].'
        )
    mean = weights.double().mean(0).square().sum((-2, -1))
    return mean / weights.double().square().sum((-2, -1)).mean(0)


def plot(images: Tensor, maps: Tensor, share: float = 0.5) -> Any:
    """A matplotlib Figure: a row an image, with its maps by head as heat over it, each from 0 to
    its own maximum, and the region of its dominant head.

    Args:
        images: in [0, 1], `(B, C, height, width)`, C = 1 or 3.
        maps: `(B, H, rows, columns)` of `class_maps`.
        share: as in `region`.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or maps.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"`plot` needs images (B, 1 or 3, height, width) and maps (B, H, rows, columns), got "
            f"{tuple(images.shape)} and {tuple(maps.shape)}. Pass the images the maps are of."
        )
    count, heads = maps.shape[:2]
    height, width = images.shape[-2:]
    fig, axes = figures.grid(count, heads + 2, 0.95, 0.95 * height / width)
    from matplotlib.colors import to_rgb

    place = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    pictures = images.detach().cpu().movedim(1, -1).squeeze(-1).clamp(0, 1).numpy()
    maps = maps.detach().float().cpu()
    # a map of zeros, with no head of weight, stays without any colour
    heats = (maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-30)).numpy()
    regions = region(maps, share).float().numpy()
    for i, (row, best) in enumerate(zip(axes, dominant_head(maps).tolist(), strict=True)):
        for ax in row:
            ax.set_axis_off()
            ax.imshow(pictures[i], cmap="gray", vmin=0, vmax=1, **place)
        # one colour, the denser the heavier: the image shows through where the weight is small
        for ax, heat in zip(row[1:], [*heats[i], regions[i, best]], strict=True):
            colour = np.ones((*heat.shape, 1)) * to_rgb(HEAT)
            ax.imshow(np.concatenate([colour, 0.85 * heat[..., None]], -1), **place)
        label = {"ha": "center", "va": "top", "fontsize": 7, "color": figures.INK}
        row[-1].text(0.5, -0.04, f"head {best + 1}", transform=row[-1].transAxes, **label)
    titles = ["image", *(f"head {h + 1}" for h in range(heads)), "region"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8, color=figures.INK)
    return fig


def section(context: Context) -> pages.Section:
    """Maps of the class token's attention, and how much of it is the same for all images."""
    looks = [context.look(result) for result in context.results]
    pictures, rows, numbers = [], [], []
    blocks = some_blocks(max(look.model.config.depth for look in looks))
    for i, look in enumerate(looks):
        name, last = look.result.name, look.model.config.depth - 1
        maps = class_maps(look.aux[f"blocks.{last}.weights"][: context.shown])
        alt = f"Attention maps of {name}, last block, over {len(maps)} images"
        fig = plot(look.pixels[: context.shown], maps)
        pictures.append(pages.figure(fig, f"attention-{i}", alt, name))
        shares = [static_share(look.aux[f"blocks.{b}.weights"]) for b in blocks]
        rows.append([name, *(", ".join(f"{100 * s:.0f}" for s in share) for share in shares)])
        numbers += [
            pages.Number(name, f"static_share_block_{b + 1}_head_{h + 1}", s, "", look.seed)
            for b, share in zip(blocks, shares, strict=True)
            for h, s in enumerate(share.tolist())
        ]
    count = len(looks[0].pixels)
    caption = (
        "Share of the attention weights that is the same for all images, %, head by head: the "
        f"squared norm of their mean over {count} images, over the mean of their squared norms. "
        "100 would be attention that ignores the image."
    )
    told = (
        f"The class token's row of the last block over the first {min(context.shown, count)} "
        f"validation images, seed {looks[0].seed}; negative weights count as none, and "
        "every map is scaled to its own maximum. Region: the fewest patches that hold half of the "
        "weight of the head with the most."
    )
    table = pages.table(["operator", *(f"block {i + 1}" for i in blocks)], rows, caption)
    return pages.Section([pages.text(told), pages.beside(*pictures), table], numbers)


ANALYSIS = Analysis("attention", "Attention", section)
