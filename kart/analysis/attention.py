"""What attention attends to: maps over the image (paper, sec. 7) and how well they find the object,
how its weights are spread, and how much of it depends on the image at all.

    maps = attention.class_maps(model.intermediates(params, images)["blocks.3.weights"])
    attention.pointing_game(attention.enlarge(maps, 32, 32), masks[:, None])
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kart import augment, data, pages, schema
from kart.analysis import figures, scenes
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Member,
    differences,
    percent,
    samples,
    scalars,
    seeds_table,
    some_blocks,
    some_images,
    windowed,
)
from kart.models import Model, windows

HEAT = "#ff7a1a"  # seen on black and on white
OUTLINE = "#22d3ee"  # beside it

SCENES = 64  # images that maps are scored on
STEPS = 8  # of deletion and insertion


def class_maps(weights: Tensor) -> Tensor:
    """The class token's row of `weights (..., H, N, N)` as maps `(..., H, rows, columns)` over the
    patches, negative values dropped as in the paper.

    Of a model take `intermediates(params, images)["blocks.<last>.weights"]`.
    """
    schema.check_type("class_maps", "weights", weights, Tensor)
    patches = weights.shape[-1] - 1 if weights.dim() else 0
    side = round(max(patches, 0) ** 0.5)
    if weights.dim() < 3 or weights.shape[-2] != patches + 1 or side * side != patches or not side:
        raise ValueError(
            f"`class_maps` needs weights (..., H, N, N) with N - 1 a square, got shape "
            f"{tuple(weights.shape)}. The first token is the class token, the others the patches."
        )
    return weights[..., 0, 1:].clamp(min=0).unflatten(-1, (side, side))


def window_maps(weights: Tensor, cut: windows.Cut) -> Tensor:
    """Weights `(..., n, H, N, M)` of windows as maps `(..., H, rows, columns)` over the grid before
    it was rolled and cut: the weight that each token is given, mean over the queries of its window;
    negative values dropped as in `class_maps`.

    A model without a class token averages what its tokens are at the end, so that the mean over
    queries is what the class token's row is elsewhere. Every window has weights of its own: where
    there are several, a map compares places within one.

    >>> weights = torch.tensor([[[0.0, 1.0, 0.0, 0.0]] * 4]).expand(4, 1, 4, 4)  # the upper right
    >>> window_maps(weights, windows.Cut(4, 2))[0].int().tolist()
    [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    """
    if weights.dim() < 4 or weights.shape[-4] != cut.count or weights.shape[-1] != cut.window**2:
        raise ValueError(
            f"`window_maps` needs weights (..., {cut.count}, H, {cut.window**2}, {cut.window**2}) "
            f"for this cut, got shape {tuple(weights.shape)}. Take those of "
            'intermediates(params, images)["blocks.<i>.weights"] and the `cut` of the same site.'
        )
    given = weights.clamp(min=0).mean(-2).mT  # (..., n, M, H)
    padded = cut.side + -cut.side % cut.window
    grid = windows.merge(given, padded, padded).roll((cut.shift, cut.shift), (-3, -2))
    return grid[..., : cut.side, : cut.side, :].movedim(-1, -3)


def last_maps(model: Model, aux: Mapping[str, Tensor]) -> Tensor:
    """Maps `(..., H, rows, columns)` of the last block: of its class token, or `window_maps`."""
    weights, cut = aux[f"blocks.{len(model.sites) - 1}.weights"], model.sites[-1].cut
    return class_maps(weights) if cut is None else window_maps(weights, cut)


def dominant_head(maps: Tensor) -> Tensor:
    """Index `(...)` of the head with the largest sum, of `maps (..., H, rows, columns)`."""
    schema.check_type("dominant_head", "maps", maps, Tensor)
    if maps.dim() < 3:
        raise ValueError(
            f"`dominant_head` needs maps (..., H, rows, columns), got shape {tuple(maps.shape)}. "
            "Take those of `class_maps`."
        )
    return maps.sum((-2, -1)).argmax(-1)


def region(maps: Tensor, share: float = 0.5) -> Tensor:
    """The fewest patches that hold `share` of each map's sum, boolean `(..., rows, columns)`.

    The paper shows a region without saying how it is cut; half of the mass is kart's choice. A map
    of zeros has none.
    """
    if not schema.fits(share, float) or not 0 < share <= 1:
        raise ValueError(f"`region` needs 0 < `share` <= 1, got {share!r}. The default is 0.5.")
    schema.check_type("region", "maps", maps, Tensor)
    if maps.dim() < 2 or not bool(maps.isfinite().all()):
        raise ValueError(
            f"`region` needs finite maps (..., rows, columns), got shape {tuple(maps.shape)} with "
            f"{int((~maps.isfinite()).sum())} values nan or inf. Leave diverged runs out."
        )
    flat = maps.flatten(-2)
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # mass of the patches that go first
    taken = (before < share * flat.sum(-1, keepdim=True)) & (values > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken).unflatten(-1, maps.shape[-2:])


def rollout(weights: Sequence[Tensor] | Tensor) -> Tensor:
    """Where information flowed through all blocks, `(..., N, N)`, float64, rows of sum 1 (Abnar and
    Zuidema 2020, arXiv:2005.00928).

    `weights` are those of each block, first to last, `(..., H, N, N)`. Of each, the mean over heads
    is averaged with the identity, for the residual stream, and the products are taken. The source
    knows no negative weights: as in the maps of the paper they are dropped, head by head, and the
    rows scaled to sum 1; a row without any is the identity alone. As maps:
    `class_maps(rollout(weights)[..., None, :, :])`.

    >>> rollout([torch.tensor([[[0.0, 1.0], [-1.0, 3.0]]])]).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    blocks = list(weights)
    for block in blocks:
        schema.check_type("rollout", "weights", block, Tensor)
    shapes = {tuple(block.shape) for block in blocks}
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(shape) < 3 or shape[-1] != shape[-2]:
        raise ValueError(
            f"`rollout` needs the weights (..., H, N, N) of each block, got shapes "
            f"{[tuple(block.shape) for block in blocks]}. Pass those of one batch, first to last."
        )
    if not all(bool(block.isfinite().all()) for block in blocks):
        raise ValueError("`rollout` needs finite weights, got nan or inf. Leave diverged runs out.")
    tokens = shape[-1]
    identity = torch.eye(tokens, dtype=torch.float64, device=blocks[0].device)
    flow = identity
    for block in blocks:
        mean = block.double().clamp(min=0).mean(-3)
        total = mean.sum(-1, keepdim=True)
        rows = torch.where(total > 0, mean / _nonzero(total), identity)
        flow = (rows + identity) / 2 @ flow
    return flow


def _nonzero(total: Tensor) -> Tensor:
    # what is divided by: where it is zero the quotient is not used
    return torch.where(total == 0, 1.0, total)


# --- maps against object masks --------------------------------------------------------------------


def enlarge(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps over patches, `(..., rows, columns)`, as maps over pixels, `(..., height, width)`: every
    patch is repeated over its pixels.

    >>> enlarge(torch.tensor([[1, 2]]), 2, 4).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    schema.check_type("enlarge", "maps", maps, Tensor)
    rows, columns = maps.shape[-2:] if maps.dim() > 1 and maps.numel() else (0, 0)
    whole = rows and schema.fits(height, int) and schema.fits(width, int)
    if not whole or height % rows or width % columns:
        raise ValueError(
            f"`enlarge` needs a height and width divisible by the map's {rows} x {columns}, got "
            f"{height!r} x {width!r}. Pass the size of the images the model saw."
        )
    return maps.repeat_interleave(height // rows, -2).repeat_interleave(width // columns, -1)


def _scored(name: str, maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps without their negative values, float64, and masks, both `(..., rows * columns)`."""
    for argument, given in (("maps", maps), ("masks", masks)):
        schema.check_type(name, argument, given, Tensor)
    if masks.dtype != torch.bool or maps.dim() < 2 or masks.shape[-2:] != maps.shape[-2:]:
        raise ValueError(
            f"`{name}` needs maps and boolean masks (..., rows, columns) of one size, got "
            f"{tuple(maps.shape)} and {masks.dtype} {tuple(masks.shape)}. Bring the maps to the "
            "masks with `enlarge`."
        )
    if not bool(masks.flatten(-2).any(-1).all()) or not bool(maps.isfinite().all()):
        raise ValueError(
            f"`{name}` needs finite maps and masks with an object, got "
            f"{int((~masks.flatten(-2).any(-1)).sum())} empty masks and "
            f"{int((~maps.isfinite()).sum())} values nan or inf. Leave them out."
        )
    try:
        both = torch.broadcast_tensors(maps.double().clamp(min=0), masks)
    except RuntimeError as error:
        raise ValueError(
            f"`{name}` needs maps and masks whose leading axes broadcast, got {tuple(maps.shape)} "
            f"and {tuple(masks.shape)}. Masks of maps by head are masks[:, None]."
        ) from error
    return both[0].flatten(-2), both[1].flatten(-2)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest value of a map lies on the object, `(..., rows, columns)` maps and
    boolean masks to `(...)`, float64: 1 or 0; where several are largest, the share that does.

    Negative values count as none, as in the paper's maps; a map without any value points nowhere
    and has 0. By chance it is the share of the image that the mask covers.

    Reference: Zhang et al., "Top-down neural attention by excitation backprop", 2018.

    >>> pointing_game(torch.tensor([[0.1, 0.9]]), torch.tensor([[False, True]])).item()
    1.0
    """
    values, inside = _scored("pointing_game", maps, masks)
    largest = values.amax(-1, keepdim=True)
    peaks = (values == largest) & (largest > 0)
    return (peaks & inside).sum(-1).double() / peaks.sum(-1).clamp(min=1)


def mass_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of a map's sum that lies on the object, `(..., rows, columns)` maps and boolean
    masks to `(...)`, float64.

    Negative values count as none; a map without any value has 0. Of a map that is the same
    everywhere it is the share of the image that the mask covers.

    >>> mass_inside(torch.tensor([[1.0, 3.0]]), torch.tensor([[False, True]])).item()
    0.75
    """
    values, inside = _scored("mass_inside", maps, masks)
    return (values * inside).sum(-1) / _nonzero(values.sum(-1))


def best_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """The best overlap of the object with {map >= t} over all thresholds t > 0, intersection over
    union, `(..., rows, columns)` maps and boolean masks to `(...)`, float64.

    Negative values count as none, and what is zero is in no region; a map without any value has 0.

    >>> best_iou(torch.tensor([[0.2, 0.7, 0.9]]), torch.tensor([[False, True, True]])).item()
    1.0
    """
    values, inside = _scored("best_iou", maps, masks)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    hits = inside.gather(-1, order).cumsum(-1).double()
    size = torch.arange(1, values.shape[-1] + 1, device=values.device)
    overlap = hits / (size + inside.sum(-1, keepdim=True) - hits)
    # a threshold takes all values that are equal, or none of them
    last = torch.cat([values[..., :-1] > values[..., 1:], torch.ones_like(inside[..., :1])], -1)
    return torch.where(last & (values > 0), overlap, 0.0).amax(-1)


class Curve(NamedTuple):
    """Probabilities of a class `(B, S + 1)` as the shares `(S + 1,)` of an image are taken away or
    given, and the area under each, `(B,)`; float64.
    """

    shares: Tensor
    values: Tensor
    area: Tensor


def deletion(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    fill: Tensor | float = 0.0,
    *,
    labels: Tensor | None = None,
    steps: int | None = None,
) -> Curve:
    """How the probability of a class falls as the patches of an image are taken away, those with
    the largest values of its map first; the better the map, the smaller the area (RISE, Petsiuk et
    al. 2018, arXiv:1806.07421).

    Args:
        predict: images `(B, C, height, width)` to probabilities `(B, classes)`.
        images: `(B, C, height, width)`.
        maps: `(B, rows, columns)`, one an image, each value a patch of it. Equal values go from
            the top left.
        fill: what stands where a patch was, such as 0 for normalised images, or blurred images;
            broadcasts to the images.
        labels: the class of each image, `(B,)`; default the one predicted for the whole image.
        steps: S, in how many steps of as many patches each, or as near to it as whole patches
            come; default a patch at a time.

    >>> maps = torch.tensor([[[2.0, 1.0]]])
    >>> curve = deletion(lambda x: x.mean((1, 2, 3))[:, None], torch.ones(1, 1, 2, 2), maps)
    >>> curve.values.tolist(), curve.area.tolist()
    ([[1.0, 0.5, 0.0]], [0.5])
    """
    return _curve("deletion", predict, images, maps, fill, labels, steps)


def insertion(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    fill: Tensor | float = 0.0,
    *,
    labels: Tensor | None = None,
    steps: int | None = None,
) -> Curve:
    """How the probability of a class rises as the patches of an image are given back to `fill`,
    those with the largest values of its map first; the better the map, the larger the area. Args
    and reference as of `deletion`.

    >>> maps = torch.tensor([[[2.0, 1.0]]])
    >>> curve = insertion(lambda x: x.mean((1, 2, 3))[:, None], torch.ones(1, 1, 2, 2), maps)
    >>> curve.values.tolist(), curve.area.tolist()
    ([[0.0, 0.5, 1.0]], [0.5])
    """
    return _curve("insertion", predict, images, maps, fill, labels, steps)


def _curve(
    name: str,
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    fill: Tensor | float,
    labels: Tensor | None,
    steps: int | None,
) -> Curve:
    if images.dim() != 4 or maps.dim() != 3 or len(maps) != len(images):
        raise ValueError(
            f"`{name}` needs images (B, C, height, width) and maps (B, rows, columns), got "
            f"{tuple(images.shape)} and {tuple(maps.shape)}. Choose a head of the maps."
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{name}` needs the labels ({len(images)},) of these images, got shape "
            f"{tuple(labels.shape)}. Pass one an image, or none."
        )
    if not bool(maps.isfinite().all()):
        raise ValueError(f"`{name}` needs finite maps, got nan or inf. Leave them out.")
    height, width = images.shape[-2:]
    patches = maps[0].numel()
    count = patches if steps is None else steps
    if not schema.fits(count, int) or not 1 <= count <= patches:
        raise ValueError(
            f"`{name}` needs 1 <= `steps` <= {patches}, the number of patches, got {steps!r}. "
            "Leave it out."
        )
    order = maps.flatten(1).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1).reshape(maps.shape)  # of each patch among those of its map
    blank = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
    numbers = [round(step * patches / count) for step in range(count + 1)]
    values = []
    with torch.no_grad():
        if labels is None:
            labels = predict(images).argmax(-1)
        for number in numbers:
            taken = enlarge(place < number, height, width)[:, None]
            kept = taken if name == "insertion" else ~taken
            shown = predict(torch.where(kept, images, blank))
            values.append(shown.double().gather(-1, labels[:, None])[:, 0])
    found = torch.stack(values, dim=-1)
    shares = torch.tensor(numbers, dtype=torch.float64, device=images.device) / patches
    return Curve(shares, found, torch.trapezoid(found, shares))


# --- how weights are spread -----------------------------------------------------------------------


def _check_weights(name: str, weights: Tensor, least: int = 2) -> None:
    schema.check_type(name, "weights", weights, Tensor)
    if weights.dim() < least or not weights.dtype.is_floating_point:
        shape = "(..., N, M)" if least == 2 else "(..., H, N, M)"
        raise ValueError(
            f"`{name}` needs floating-point weights {shape}, got {weights.dtype} of shape "
            f'{tuple(weights.shape)}. Take intermediates(params, images)["blocks.0.weights"].'
        )


def row_sums(weights: Tensor) -> Tensor:
    """The sum of each row, `(..., N, M)` to `(..., N)`, float64: 1 for softmax, anything else for
    an operator without a projection.

    >>> row_sums(torch.tensor([[0.5, 1.0], [1.0, -1.0]])).tolist()
    [1.5, 0.0]
    """
    _check_weights("row_sums", weights)
    return weights.double().sum(-1)


def negative_share(weights: Tensor) -> Tensor:
    """The share of the weight that is negative, by absolute values, `(..., N, M)` to `(...)`,
    float64; 0 for weights of zero.

    >>> negative_share(torch.tensor([[0.5, 1.0], [1.0, -0.5]])).round(decimals=3).item()
    0.167
    """
    _check_weights("negative_share", weights)
    wide = weights.double()
    return wide.clamp(max=0).abs().sum((-2, -1)) / _nonzero(wide.abs().sum((-2, -1)))


def entropy(weights: Tensor) -> Tensor:
    """Entropy of each row in nats, `(..., N, M)` to `(..., N)` in [0, log M], float64, of the
    absolute values scaled to sum 1: how many keys a query attends to is its exp. A row of zeros has
    0.

    >>> entropy(torch.tensor([[1.0, -1.0], [0.0, 3.0]])).round(decimals=4).tolist()
    [0.6931, 0.0]
    """
    _check_weights("entropy", weights)
    size = weights.double().abs()
    return torch.special.entr(size / _nonzero(size.sum(-1, keepdim=True))).sum(-1)


def head_diversity(weights: Tensor) -> Tensor:
    """How different the heads are, `(..., H, N, M)` to `(...)`, float64: 1 less the mean cosine
    between two heads' weights. 0 where all attend alike, 1 where they have nothing in common, above
    where they oppose each other; a head of zeros has nothing in common with any.

    >>> head_diversity(torch.eye(4).reshape(4, 2, 2)).item()
    1.0
    """
    _check_weights("head_diversity", weights, 3)
    heads = weights.shape[-3]
    if heads < 2:
        raise ValueError(
            f"`head_diversity` needs two heads or more, got shape {tuple(weights.shape)}. "
            "One head has none to differ from."
        )
    flat = weights.double().flatten(-2)
    flat = flat / _nonzero(flat.norm(dim=-1, keepdim=True))
    # sum over pairs of cosines: the square of the sum, less each with itself
    alike = flat.sum(-2).square().sum(-1) - flat.square().sum((-2, -1))
    return 1 - alike / (heads * (heads - 1))


def static_share(weights: Tensor, values: Tensor | None = None, *, fitted: bool = True) -> Tensor:
    """How much of each head's output the best operator that is the same for all images gives,
    weights `(B, H, N, M)` to `(H,)` in [0, 1], float64: the share of its variance over images.

    With `values (B, H, M, d)` the output is `weights @ values`, and the best constant `(N, M)` for
    each head is fitted to it by least squares, both centred over images. Without, the values are
    taken for white noise, for which it is the mean of the weights: the share is then the squared
    norm of the mean over the mean of the squared norms. Either way 1 is attention that does not
    depend on the image (the control `polynomial(0)`); 1/B without values is for weights of
    independent sign. `score_share` is the rest.

    The fit sees B d numbers for each of M unknowns and explains about M / (B d) by chance, so that
    at least 4 M of them are asked for. A head whose output does not vary has 1.

    With `fitted=False` the constant operator is the mean of the weights over images instead, which
    is what position alone gives: at most the fitted share, below 0 where it is further from the
    output than the output's mean, and about 1 / B by chance.

    >>> one = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(5, 1, 2, 2)
    >>> static_share(one).tolist(), static_share(one * torch.ones(5, 1, 1, 1)).tolist()
    ([1.0], [1.0])
    >>> values = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    >>> static_share(one, values, fitted=False).tolist()
    [1.0]
    """
    schema.check_type("static_share", "weights", weights, Tensor)
    if weights.dim() != 4:
        raise ValueError(
            f"`static_share` needs weights (B, H, N, M), got shape {tuple(weights.shape)}. Pass "
            'those of a batch, intermediates(params, images)["blocks.0.weights"].'
        )
    if not all(bool(x.isfinite().all()) for x in (weights, values) if x is not None):
        raise ValueError(
            "`static_share` needs finite weights and values, got nan or inf. Leave diverged runs "
            "out."
        )
    wide = weights.double()
    if values is None:
        mean = wide.mean(0).square().sum((-2, -1))
        whole = wide.square().sum((-2, -1)).mean(0)
        return torch.where(whole > 0, mean / _nonzero(whole), 1.0)
    count, heads, _, keys = weights.shape
    if values.dim() != 4 or values.shape[:3] != (count, heads, keys):
        raise ValueError(
            f"`static_share` needs values ({count}, {heads}, {keys}, d) for these weights, got "
            f"{tuple(values.shape)}. Take both of the same batch and block."
        )
    if fitted and count * values.shape[-1] < 4 * keys:
        raise ValueError(
            f"`static_share` needs B d >= 4 M = {4 * keys} to fit a constant operator, got B "
            f"{count} images of d {values.shape[-1]}. Pass more images."
        )
    out = wide @ values.double()
    size = out.square().sum((0, 2, 3))
    out = out - out.mean(0)
    inputs = values.double() - values.double().mean(0)
    constant = wide.mean(0)
    if fitted:
        across = torch.einsum("bhnd,bhmd->hnm", out, inputs)
        within = torch.einsum("bhmd,bhkd->hmk", inputs, inputs)
        constant = across @ torch.linalg.pinv(within, hermitian=True)
    whole = out.square().sum((0, 2, 3))
    left = (out - constant @ inputs).square().sum((0, 2, 3))
    varies = whole > 1e-24 * size  # or it is the mean's rounding
    return torch.where(varies, 1 - left / _nonzero(whole), 1.0).clamp(0 if fitted else None, 1)


def score_share(weights: Tensor, values: Tensor | None = None) -> Tensor:
    """How much of each head's output comes from its scores, weights `(B, H, N, M)` and values
    `(B, H, M, d)` to `(H,)` in [0, 1], float64: the share of the variance of `weights @ values`
    over images that the best constant operator leaves, 1 - `static_share`.

    0 is an operator that does not look at the scores, whatever its functions look like.

    >>> score_share(torch.ones(4, 1, 2, 2)).tolist()
    [0.0]
    """
    return 1 - static_share(weights, values)


# --- pictures -------------------------------------------------------------------------------------


def plot(images: Tensor, maps: Tensor, masks: Tensor | None = None) -> Any:
    """A matplotlib Figure: a row an image, with its maps by head as heat over it, each from 0 to
    its own maximum, and the `region` of its dominant head.

    Args:
        images: in [0, 1], `(B, C, height, width)`, C = 1 or 3.
        maps: `(B, H, rows, columns)` of `class_maps`.
        masks: of the objects, boolean `(B, height, width)`; their outline is drawn.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or maps.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"`plot` needs images (B, 1 or 3, height, width) and maps (B, H, rows, columns), got "
            f"{tuple(images.shape)} and {tuple(maps.shape)}. Pass the images the maps are of."
        )
    if masks is not None and (masks.shape != (len(images), *images.shape[-2:])):
        raise ValueError(
            f"`plot` needs masks {(len(images), *images.shape[-2:])} for these images, got "
            f"{tuple(masks.shape)}. Pass those of the same images."
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
    regions = region(maps).float().numpy()
    centres = np.arange(width) + 0.5, np.arange(height) + 0.5
    for i, (row, best) in enumerate(zip(axes, dominant_head(maps).tolist(), strict=True)):
        for ax in row:
            ax.set_axis_off()
            ax.imshow(pictures[i], cmap="gray", vmin=0, vmax=1, **place)
        # one colour, the denser the heavier: the image shows through where the weight is small
        for ax, heat in zip(row[1:], [*heats[i], regions[i, best]], strict=True):
            colour = np.ones((*heat.shape, 1)) * to_rgb(HEAT)
            ax.imshow(np.concatenate([colour, 0.85 * heat[..., None]], -1), **place)
        if masks is not None:
            outline = {"levels": [0.5], "colors": [OUTLINE], "linewidths": 0.8}
            for ax in row:
                ax.contour(*centres, masks[i].cpu().numpy().astype(float), **outline)
        label = {"ha": "center", "va": "top", "fontsize": 7, "color": figures.INK}
        row[-1].text(0.5, -0.04, f"head {best + 1}", transform=row[-1].transAxes, **label)
    titles = ["image", *(f"head {h + 1}" for h in range(heads)), "region"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8, color=figures.INK)
    return fig


def plot_curves(deleted: Mapping[str, Curve], inserted: Mapping[str, Curve]) -> Any:
    """A matplotlib Figure of `deletion` and of `insertion` by name: the mean over images, over the
    band of a standard error over them to either side, with both mean areas in the legend; of one
    image there is no band.
    """
    if not deleted or deleted.keys() != inserted.keys():
        raise ValueError(
            f"`plot_curves` needs curves of the same names, got {sorted(deleted)} and "
            f"{sorted(inserted)}. Pass {{name: curve}} twice."
        )
    fig, axes = figures.grid(1, 2, 2.9, 2.6, sharey=True)
    for ax, title, curves in (
        (axes[0, 0], "deletion: lower is better", deleted),
        (axes[0, 1], "insertion: higher is better", inserted),
    ):
        for i, (name, curve) in enumerate(curves.items()):
            style = figures.look(i)
            x, mean = 100 * curve.shares.cpu(), curve.values.mean(0).cpu()
            if len(curve.values) > 1:  # one image has no spread to tell of
                error = curve.values.std(0).cpu() / len(curve.values) ** 0.5
                band = x.numpy(), (mean - error).numpy(), (mean + error).numpy()
                ax.fill_between(*band, color=style["color"], alpha=0.2, lw=0)
            areas = [f"{float(one[name].area.mean()):.3f}" for one in (deleted, inserted)]
            label = f"{name}, area {' and '.join(areas)}"
            ax.plot(x.numpy(), mean.numpy(), lw=1.3, label=label, **style)
        ax.set_title(title, fontsize=8, color=figures.INK)
        ax.set_xlabel("share of the patches, %")
    axes[0, 0].set_ylabel("probability of the class")
    figures.legend(fig)
    return fig


# --- the section ----------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Images with a known object, in [0, 1] `(B, C, size, size)`, their masks and labels."""

    pixels: Tensor
    masks: Tensor
    labels: Tensor
    own: bool  # whether the masks came with the data


def _scenes(context: Context) -> Scenes:
    """Validation images with the masks of the data, where shown whole, else `scenes.pasted`."""
    config = context.results[0].configs[0]
    size = context.model(config).config.image_size
    whole = context.splits.val
    pixels, labels = some_images(whole, SCENES)
    pixels = augment.center_crop(pixels, size, config.eval_crop)
    shown_whole = config.eval_crop == 1 and whole.images.shape[-1] == size
    if whole.masks is not None and shown_whole:
        masks = torch.from_numpy(whole.masks[whole.spread(SCENES)])
        return Scenes(pixels, masks, labels, True)
    return Scenes(*scenes.pasted(context.generator("scenes"), pixels), labels, False)


def _one_row(model: Model) -> bool:
    """Whether all blocks have the same tokens, uncut, as `rollout` needs it."""
    whole = all(site.cut is None for site in model.sites)
    return whole and len({site.tokens for site in model.sites}) == 1


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """How well the maps of a member find the object, what taking away what they show does, and how
    its weights are spread.
    """
    model = context.model(member.config)
    count = min(SCENES, context.few(model))

    def compute() -> dict[str, Tensor]:
        own = _scenes(context)
        size = own.masks.shape[-2:]
        shown = data.normalise(own.pixels, context.splits.val.mean, context.splits.val.std)
        images, labels = context.images(member.config, count)
        depth = len(model.sites)
        with torch.no_grad():
            seen = model.intermediates(member.params, shown)
            aux = model.intermediates(member.params, images)
        heads = enlarge(last_maps(model, seen), *size)
        found = {"scene_top1": (seen["logits"].argmax(-1) == own.labels).double().mean()}
        scores = {"pointing": pointing_game, "mass": mass_inside, "iou": best_iou}
        for name, score in scores.items():
            by_head = score(heads, own.masks[:, None]).mean(0)
            found |= {name: by_head.mean(), f"{name}_best": by_head.max()}
        if _one_row(model):
            flow = rollout([seen[f"blocks.{i}.weights"] for i in range(depth)])
            rolled = enlarge(class_maps(flow[..., None, :, :])[..., 0, :, :], *size)
            for name, score in scores.items():
                found[f"rollout_{name}"] = score(rolled, own.masks).mean()
        found["covered"] = own.masks.double().mean()

        def predict(batch: Tensor) -> Tensor:
            return model.apply(member.params, batch).softmax(-1)

        maps = last_maps(model, aux).sum(-3)
        noise = torch.rand(maps.shape, generator=context.generator("random"))
        steps = min(STEPS, maps[0].numel())
        for name, curve in (("deletion", deletion), ("insertion", insertion)):
            for which, order in (("", maps), ("_random", noise)):
                drawn = curve(predict, images, order, labels=labels, steps=steps)
                found[f"{name}{which}"] = drawn.area.mean()
                found[f"{name}{which}_shares"] = drawn.shares
                found[f"{name}{which}_values"] = drawn.values
        every = [samples(site, aux[f"blocks.{i}.weights"]) for i, site in enumerate(model.sites)]

        def mean(blocks: list[Tensor], score: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.stack([score(block).mean() for block in blocks]).mean()

        found["keys"] = mean(every, lambda block: entropy(block).exp())
        found["negative"] = mean(every, negative_share)
        found["row_sums"] = mean(every, lambda block: row_sums(block).abs())
        found["static"] = mean(every, static_share)
        if several := [block for block in every if block.shape[-3] > 1]:
            found["diversity"] = mean(several, head_diversity)
        return found

    return context.kept(f"maps images={count} scenes={SCENES}", member, compute)


def section(context: Context) -> pages.Section:
    """Maps of the class token's attention and how well they find objects, how the weights are
    spread, and how much of them is the same for all images.
    """
    found = scalars(context, measure)
    first = {one.name: measure(context, Member(one, 0)) for one in context.results}
    own = _scenes(context)
    covered = f"{100 * float(own.masks.double().mean()):.0f}"
    columns = [
        percent("pointing", "pointing game %"),
        percent("mass", "mass inside %"),
        percent("iou", "best IoU %"),
        percent("pointing_best", "best head, pointing %"),
        percent("rollout_mass", "rollout, mass %"),
        percent("scene_top1", "top-1 here %"),
    ]
    if not any("rollout_mass" in own for seeds in found.values() for own in seeds.values()):
        columns = [column for column in columns if column.measure != "rollout_mass"]
    origin = (
        "validation images and the masks that came with them"
        if own.own
        else "validation images, each shrunk to half its size and pasted at a random place on a "
        "crop of a photograph; the mask is the square that was pasted"
    )
    scored, numbers = seeds_table(
        found,
        columns,
        f"On {len(own.labels)} {origin}. The mask covers {covered} % of the image, which is what a "
        f"map that knows nothing scores. {_row(context)} of the last block, mean over heads. "
        "Top-1 here: how often the model still knows the object. Mean, 95 % interval over seeds.",
    )
    areas = [
        Column("deletion", "deletion", 3, low=0.0, high=1.0),
        Column("deletion_random", "in random order", 3, low=0.0, high=1.0),
        Column("insertion", "insertion", 3, low=0.0, high=1.0),
        Column("insertion_random", "in random order", 3, low=0.0, high=1.0),
    ]
    curves, more = seeds_table(
        found,
        areas,
        "Area under the probability of the right class as patches are taken away (deletion: lower "
        "is better) or given (insertion: higher is better), those of the largest weight first, "
        "beside a random order. Whole validation images; what is taken away is the mean colour.",
    )
    spread, rest = seeds_table(
        found,
        [
            Column("keys", "keys attended to", 1, low=1.0, high=context.most_keys),
            Column("diversity", "head diversity", 2, low=0.0, high=2.0),
            percent("negative", "negative weight %"),
            Column("row_sums", "size of row sums", 2, low=0.0),
            percent("static", "same for all images %"),
        ],
        "Mean over blocks, heads and rows. Keys: exp of the entropy of the absolute weights. "
        "Diversity: 1 less the mean cosine between two heads. Same for all images: squared norm of "
        "the mean weights over the mean of squared norms.",
    )
    lines = [
        *differences(found, "pointing", "Pointing game (%)", columns[0]),
        *differences(found, "mass", "Mass inside (%)", columns[1]),
        *differences(found, "deletion", "Deletion area", areas[0]),
    ]
    drawn = {
        kind: {
            name: Curve(
                one[f"{kind}_shares"],
                one[f"{kind}_values"],
                torch.trapezoid(one[f"{kind}_values"], one[f"{kind}_shares"]),
            )
            for name, one in first.items()
        }
        for kind in ("deletion", "insertion")
    }
    fig = pages.figure(
        plot_curves(drawn["deletion"], drawn["insertion"]),
        "attention-curves",
        f"Deletion and insertion curves of {', '.join(first)}",
        f"Mean over {len(next(iter(drawn['deletion'].values())).values)} images, "
        f"{context.first_seeds}, band of a standard error over them.",
    )
    pictured, statics = _maps(context)
    blocks = [
        *_notes(context),
        *pictured,
        scored,
        pages.items(lines),
        *_scene_pictures(context, own),
        fig,
        curves,
        spread,
    ]
    return pages.Section(blocks, [*numbers, *more, *rest, *statics])


def _scene_pictures(context: Context, own: Scenes) -> list[pages.Markup]:
    """Maps over images with known objects."""
    if not context.shown:
        return []
    shown, masks = own.pixels[: context.shown], own.masks[: context.shown]
    ready = data.normalise(shown, context.splits.val.mean, context.splits.val.std)
    pictures = []
    for i, result in enumerate(context.results):
        look = context.look(result)
        with torch.no_grad():
            aux = look.model.intermediates(look.params, ready)
        fig = plot(shown, last_maps(look.model, aux), masks=masks)
        alt = f"Attention maps of {result.name} over images with known objects"
        pictures.append(pages.figure(fig, f"attention-scenes-{i}", alt, result.name))
    told = "Outlined: the object. Orange: the weight, as above."
    return [pages.text(told), pages.beside(*pictures)]


def _row(context: Context) -> str:
    """What maps show, the start of a sentence."""
    if all(model.sites[-1].cut is None for model in context.models):
        return "The class token's row"
    return "The weight that each token is given, mean over the queries of its window,"


def _notes(context: Context) -> list[pages.Markup]:
    """What has no meaning, or another one, in the models of the page."""
    models, lines = context.models, []
    if not all(map(_one_row, models)):
        lines.append("No rollout: it multiplies the weights of blocks that have the same tokens.")
    if any(model.sites[-1].windows > 1 for model in models):
        lines.append("The last block has several windows: a map compares places within one.")
    return windowed(context, " ".join(lines)) or [pages.note(line) for line in lines]


def _maps(context: Context) -> tuple[list[pages.Markup], list[pages.Number]]:
    """Maps of the class token's attention, and how much of it is the same for all images."""
    looks = [context.look(result) for result in context.results]
    pictures, rows, numbers = [], [], []
    blocks = some_blocks(max(look.model.config.depth for look in looks))
    for i, look in enumerate(looks):
        name = look.result.name
        if context.shown:
            seen = context.look(look.result, context.shown)
            alt = f"Attention maps of {name}, last block, over {len(seen.pixels)} images"
            fig = plot(seen.pixels, last_maps(seen.model, seen.aux))
            pictures.append(pages.figure(fig, f"attention-{i}", alt, name))
        shares = [static_share(look.seen("weights", b)) for b in blocks]
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
        f"{_row(context)} of the last block over {context.available(context.shown)} "
        f"validation images, {context.first_seeds}; negative weights count as none, and "
        "every map is scaled to its own maximum. Region: the fewest patches that hold half of the "
        "weight of the head with the most."
    )
    table = pages.table(["operator", *(f"block {i + 1}" for i in blocks)], rows, caption)
    pictured = [pages.text(told), pages.beside(*pictures)] if pictures else []
    return [*pictured, table], numbers


ANALYSIS = Analysis(
    "attention", "Attention", section, version=3, minutes=2.5, measure=measure, uses=("shown",)
)
