"""Augmentation as pure functions of (generator, batch): crops, colour, RandAugment, mixup, cutmix.

Images are float tensors `(..., B, C, height, width)` in [0, 1] on any device. Draws are independent
for each image (for each batch of B where said) and come from an explicit CPU generator, so one seed
gives the same draws on every device. Inputs are never written to; dtypes are kept.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kart import schema, tree

Pipeline = Callable[[Generator, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
_Range = tuple[float, float]
# of a random box: shares of the area, and width / height
_SCALE, _RATIO = (0.08, 1.0), (0.67, 1.5)


def flip(generator: Generator, images: Tensor, p: float = 0.5) -> Tensor:
    """Mirrors each image left to right with probability `p`; shape `(..., B, C, height, width)`."""
    _check("flip", generator, images)
    _check_probability("flip", "p", p)
    mirrored = _uniform(generator, images.shape[:-3]) < p
    return torch.where(_per_image(mirrored, images), images.flip(-1), images)


def crop(generator: Generator, images: Tensor, padding: int = 4, mode: str = "zero") -> Tensor:
    """Shifts each image by up to `padding` pixels a side: pads, then crops to the same shape.

    `mode` pads by "zero" or by "reflect", the mirrored image, with `padding` below each side.
    """
    _check("crop", generator, images)
    height, width = images.shape[-2:]
    if mode not in ("zero", "reflect"):
        raise ValueError(f"`crop` needs `mode` 'zero' or 'reflect', got {mode!r}.")
    schema.check_integer("crop", "padding", padding, 0)
    if mode == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"`crop` needs `padding` below the sides {height} x {width} to reflect, got {padding}. "
            "Lower it."
        )
    flat = images.flatten(0, -4)
    shift = torch.randint(0, 2 * padding + 1, (2, len(flat)), generator=generator)
    padded = F.pad(flat, (padding,) * 4, mode="constant" if mode == "zero" else "reflect")
    windows = padded.unfold(-2, height, 1).unfold(-2, width, 1)  # every crop, as a view
    image = torch.arange(len(flat), device=images.device)
    y, x = tree.onto(shift, images.device)
    return windows[image, :, y, x].reshape(images.shape)


def random_resized_crop(
    generator: Generator,
    images: Tensor,
    scale: _Range = _SCALE,
    ratio: _Range = _RATIO,
    size: int | None = None,
) -> Tensor:
    """Scales a random box of each image, bilinearly, to `size` x `size`, or to the image's own
    shape.

    The box covers a share of the area uniform in `scale` with log(width / height) uniform in
    log `ratio`; whole pixels, the first of ten draws that fits, else the largest centred box (as
    torchvision). Pixels outside of the box have no weight but rounding.
    """
    _check("random_resized_crop", generator, images)
    height, width = images.shape[-2:]
    if size is not None:
        schema.check_integer("random_resized_crop", "size", size, 1)
    rows, columns = (height, width) if size is None else (size, size)
    flat = images.flatten(0, -4)
    corner, box = _boxes(generator, len(flat), height, width, scale, ratio)

    def coordinates(axis: int, size: int) -> Tensor:
        start, length = corner[axis], box[axis]  # (N, 1)
        at = start + (torch.arange(size) + 0.5) * length / size
        # half a pixel inside of the box, where interpolation reads the box alone
        at = at.maximum(start + 0.5).minimum(start + length - 0.5)
        return tree.onto(at, images.device)

    y, x = coordinates(0, rows)[:, :, None], coordinates(1, columns)[:, None, :]
    out = _sample(flat, *torch.broadcast_tensors(x, y))
    return out.reshape(*images.shape[:-2], rows, columns)


def random_box(generator: Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """The box, `(top, left, height, width)`, that `random_resized_crop` takes of one such image."""
    corner, box = _boxes(generator, 1, height, width, _SCALE, _RATIO)
    top, left, rows, columns = (int(value) for value in (*corner[:, 0, 0], *box[:, 0, 0]))
    return top, left, rows, columns


def _boxes(
    generator: Generator, count: int, height: int, width: int, scale: _Range, ratio: _Range
) -> tuple[Tensor, Tensor]:
    """Upper left corners and sides of random boxes, each `(2, count, 1)`: down, then across."""
    pairs = all(schema.fits(one, tuple[float, ...]) and len(one) == 2 for one in (scale, ratio))
    if not pairs or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            f"`random_resized_crop` needs 0 < low <= high in `scale` (at most 1) and `ratio`, got "
            f"{scale} and {ratio}."
        )
    draws = _uniform(generator, (4, count, 10))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * draws[1]).exp()
    box = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()])
    side = torch.tensor([height, width])[:, None, None]
    fits = ((box >= 1) & (box <= side)).all(0)
    chosen = fits.int().argmax(-1, keepdim=True)  # the first that fits
    box = box.gather(-1, chosen.expand(2, -1, -1))
    corner = (draws[2:].gather(-1, chosen.expand(2, -1, -1)) * (side - box + 1)).floor()
    # none fits: the whole image, cut to the nearest allowed aspect
    centre_aspect = min(max(width / height, ratio[0]), ratio[1])
    whole = torch.tensor([min(height, width / centre_aspect), min(width, height * centre_aspect)])
    whole = whole.round()[:, None, None]
    none = ~fits.any(-1, keepdim=True)
    return torch.where(none, ((side - whole) / 2).floor(), corner), torch.where(none, whole, box)


def color_jitter(generator: Generator, images: Tensor, strength: float = 0.4) -> Tensor:
    """Brightness, then contrast, then saturation of each image, by factors in 1 -+ `strength`.

    The order is fixed (torchvision draws it). Images that are not RGB have no saturation to change.
    """
    _check("color_jitter", generator, images)
    _check_probability("color_jitter", "strength", strength)
    factors = 1 + strength * (2 * _uniform(generator, (3, *images.shape[:-3])) - 1)
    for operation, factor in zip((_brightness, _contrast, _color), factors, strict=True):
        images = operation(images, _per_image(factor, images))
    return images


def rand_augment(
    generator: Generator,
    images: Tensor,
    magnitude: float = 15,
    layers: int = 2,
    std: float = 1.0,
    p: float = 0.5,
    fill: float = 0.5,
) -> Tensor:
    """RandAugment as timm's `rand-m15-n2-mstd1.0-inc1`: `layers` random operations on each image.

    Each layer picks one of `OPERATIONS` per image, with replacement, and applies it with
    probability `p` at a level drawn from N(`magnitude`, `std`) and clipped to [0, 10], 10 being
    full strength: so magnitude 15 is nearly always full strength, black by posterize and a negative
    by solarize included, as in timm. Geometric operations fill with `fill`.

    Departures: bilinear sampling alone (timm also draws bicubic); 8-bit rounding only where an
    operation is defined on grey levels (equalize, posterize); the same fill for every channel.

    Reference: Cubuk et al., "RandAugment", 2020, arXiv:1909.13719.
    """
    _check("rand_augment", generator, images)
    _check_probability("rand_augment", "p", p)
    _check_probability("rand_augment", "fill", fill)
    schema.check_integer("rand_augment", "layers", layers, 0)
    if not all(schema.fits(one, float) and 0 <= one < math.inf for one in (magnitude, std)):
        raise ValueError(
            f"`rand_augment` needs finite `magnitude` and `std` >= 0, got {magnitude!r} and "
            f"{std!r}."
        )
    flat = images.flatten(0, -4).clone()
    shape = (layers, len(flat))
    operations = list(OPERATIONS.values())
    choice = torch.randint(len(operations), shape, generator=generator)
    choice[_uniform(generator, shape) >= p] = -1
    level = magnitude + std * torch.randn(shape, generator=generator, dtype=torch.float64)
    share = level.clamp(0, 10) / 10
    sign = torch.where(_uniform(generator, shape) < 0.5, -1.0, 1.0)
    for layer in range(layers):
        # a loop over operations, each on the images that drew it; the draws are on the CPU: no sync
        for number, operation in enumerate(operations):
            index = (choice[layer] == number).nonzero()[:, 0]
            if len(index) == 0:
                continue
            here = tree.onto(index, images.device)
            at = (layer, index, None, None, None)
            flat[here] = operation(flat[here], share[at], sign[at], fill).clamp(0, 1)
    return flat.reshape(images.shape)


def mixup(
    generator: Generator, images: Tensor, labels: Tensor, alpha: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Blends each image and its soft label `(..., B, classes)` with the batch in reverse order.

    One share, from Beta(`alpha`, `alpha`), per batch of B (timm's batch mode).

    Reference: Zhang et al., "mixup", 2018, arXiv:1710.09412.
    """
    _check("mixup", generator, images, labels)
    share = _beta("mixup", generator, alpha, images.shape[:-4])
    return (
        _blend(images, images.flip(-4), share[..., None, None, None, None]),
        _blend(labels, labels.flip(-2), share[..., None, None]),
    )


def cutmix(
    generator: Generator, images: Tensor, labels: Tensor, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Pastes a box of the reversed batch into each image; labels `(..., B, classes)` mix by area.

    One box per batch of B: sides sqrt(1 - share) of the image's, share from Beta(`alpha`, `alpha`),
    its centre uniform, cut at the border; labels follow the area that remains (timm's batch mode).

    Reference: Yun et al., "CutMix", 2019, arXiv:1905.04899.
    """
    _check("cutmix", generator, images, labels)
    height, width = images.shape[-2:]
    share = _beta("cutmix", generator, alpha, images.shape[:-4])
    centre = _uniform(generator, (2, *share.shape))

    def inside(at: Tensor, size: int) -> Tensor:  # (...) -> (..., size)
        half = ((1 - share).sqrt() * size).floor() // 2
        middle = (at * size).floor()
        pixel = torch.arange(size)
        return (pixel >= (middle - half)[..., None]) & (pixel < (middle + half)[..., None])

    box = inside(centre[0], height)[..., :, None] & inside(centre[1], width)[..., None, :]
    kept = 1 - box.double().mean((-2, -1))
    mask = tree.onto(box[..., None, None, :, :], images.device)
    return (
        torch.where(mask, images.flip(-4), images),
        _blend(labels, labels.flip(-2), kept[..., None, None]),
    )


def mixup_or_cutmix(
    generator: Generator,
    images: Tensor,
    labels: Tensor,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    p: float = 1.0,
    switch: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """With probability `p` mixes the batch: by `cutmix` with probability `switch`, or `mixup`."""
    _check("mixup_or_cutmix", generator, images, labels)
    _check_probability("mixup_or_cutmix", "p", p)
    _check_probability("mixup_or_cutmix", "switch", switch)
    mixed, cut = (_uniform(generator, (2,)) < torch.tensor([p, switch])).tolist()
    if not mixed:
        return images, labels
    if cut:
        return cutmix(generator, images, labels, cutmix_alpha)
    return mixup(generator, images, labels, mixup_alpha)


def one_hot(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Soft labels, float32 `(..., B, num_classes)`, that sum to 1, of integer `labels (..., B)`.

    `smoothing` is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise ValueError(f"`one_hot` needs int64 labels, got {kind}.")
    schema.check_integer("one_hot", "num_classes", num_classes, 1)
    _check_probability("one_hot", "smoothing", smoothing)
    # on a GPU the test would stall every step; `data.load` has made it once
    if labels.device.type == "cpu" and labels.numel():
        low, high = labels.min(), labels.max()
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"`one_hot` needs labels in 0..{num_classes - 1}, got {low}..{high}. "
                "Set `num_classes` to that of the data set."
            )
    exact = (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()
    return exact * (1 - smoothing) + smoothing / num_classes


def pipeline(name: str) -> Pipeline:
    """The augmentation `name`, `fn(generator, images, labels, num_classes, size)` -> (images,
    targets).

    Images `(..., B, C, height, width)` in [0, 1] come out as `size` x `size`; labels are int64
    `(..., B)`, targets `(..., B, num_classes)`.

    * "none": nothing.
    * "crop": shifts by up to an eighth of the side, zeros outside (for digits and other signs).
    * "flip_crop": the same and flips, the standard for CIFAR (4 pixels at 32).
    * "paper": the recipe of Maity et al. 2025 (arXiv:2503.10632), Table 5: `random_resized_crop` to
      `size`, `flip`, `rand_augment`, `color_jitter`, then `mixup_or_cutmix` on labels smoothed by
      0.1. "mixup/cutmix with probability 0.5/0.5" is read as timm has it: every batch is mixed, by
      either of them with probability 0.5. (timm leaves the jitter out beside RandAugment; the
      recipe lists both, and here both run.)
    * "paper_half": the same with the other reading, in which a batch is mixed with probability 0.5.
    * "small": for images of 32 pixels: shifts and flips, RandAugment of magnitude 9, every batch
      mixed, labels smoothed by 0.1.
    """
    if not isinstance(name, str) or name not in _PIPELINES:
        near = ", ".join(schema.near(name, _PIPELINES) or _PIPELINES)
        raise ValueError(f"`pipeline` needs one of {[*_PIPELINES]}, got {name!r}. Near: {near}.")
    return _PIPELINES[name].run


def smoothing(name: str) -> float:
    """The label smoothing that the pipeline `name` does itself."""
    pipeline(name)
    return _PIPELINES[name].smoothing


def after_crop(name: str) -> Pipeline | None:
    """What follows the `random_resized_crop` of the pipeline `name`, for images cut already by
    `random_box`; None for a pipeline that does not begin with it.
    """
    pipeline(name)
    steps = _PIPELINES[name]
    placed = steps._replace(place=lambda generator, images, size: images)
    return placed.run if steps.place is _boxed else None


def resize(images: Tensor, size: int) -> Tensor:
    """Images `(..., C, height, width)` to `size` x `size`, bilinear, antialiased when smaller."""
    schema.check_integer("resize", "size", size, 1)
    if not _is_float(images, 3):
        raise ValueError(
            f"`resize` needs float images (..., C, height, width), got {_shown(images)}. Turn "
            "bytes into floats by `data.as_float`."
        )
    if images.shape[-2:] == (size, size):
        return images
    # the CPU has no half precision here; along a side that grows antialiasing changes nothing
    flat = images.reshape(-1, *images.shape[-3:])
    flat = flat.to(torch.promote_types(images.dtype, torch.float32))
    out = F.interpolate(flat, (size, size), mode="bilinear", antialias=size < max(flat.shape[-2:]))
    return out.reshape(*images.shape[:-2], size, size).to(images.dtype)


def center_crop(images: Tensor, size: int, ratio: float = 0.9) -> Tensor:
    """The centre `size` x `size` of images `(..., C, side, side)` scaled to floor(size / ratio), as
    timm evaluates with a crop ratio; a ratio of 1 only scales.
    """
    shape = images.shape[-3:] if isinstance(images, Tensor) else ()
    square = len(shape) == 3 and shape[1] == shape[2]
    if not square or not schema.fits(ratio, float) or not 0 < ratio <= 1:
        raise ValueError(
            f"`center_crop` needs square images and `ratio` in (0, 1], got {_shown(images)} and "
            f"{ratio!r}."
        )
    scaled = resize(images, math.floor(size / ratio))
    start = (scaled.shape[-1] - size) // 2
    return scaled[..., start : start + size, start : start + size]


# enhancements of images (..., C, height, width) by a factor (..., 1, 1, 1); 1 changes nothing


def _like(values: Tensor, images: Tensor) -> Tensor:
    return tree.onto(values.to(images.dtype), images.device)


def _blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    share = _like(share, first)
    return share * first + (1 - share) * second


def _grey(images: Tensor) -> Tensor:
    if images.shape[-3] != 3:
        return images.mean(-3, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device="cpu")
    return (images * _like(weights, images)[:, None, None]).sum(-3, keepdim=True)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _like(factor, images)).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((-2, -1), keepdim=True), factor).clamp(0, 1)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor).clamp(0, 1) if images.shape[-3] == 3 else images


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    # Pillow's SMOOTH filter: weight 5 in the centre, 1 around; the border stays
    smooth = images.clone()
    if min(images.shape[-2:]) > 2:
        inner = images[..., 1:-1, 1:-1]
        smooth[..., 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13
    return _blend(images, smooth, factor).clamp(0, 1)


# operations of `rand_augment` on images (N, C, height, width); level (1 is full strength) and sign:
# float64 (N, 1, 1, 1) on the CPU, so that what is cut to an integer is the same on all devices


def _levels(images: Tensor) -> Tensor:
    return (images.float() * 255).round().long().clamp(0, 255)


def _autocontrast(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    flat = high <= low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1, high - low))


def _equalize(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
    levels = _levels(images).flatten(-2)  # (N, C, pixels)
    rows = torch.arange(levels[..., 0].numel(), device=levels.device).reshape(*levels.shape[:2], 1)
    place = (levels + 256 * rows).flatten()
    # `bincount` would ask a GPU for the largest
    counts = place.new_zeros(256 * rows.numel()).index_add(0, place, torch.ones_like(place))
    counts = counts.reshape(*levels.shape[:2], 256)
    brightest = counts.gather(-1, levels.amax(-1, keepdim=True))
    step = (levels.shape[-1] - brightest) // 255
    before = counts.cumsum(-1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    new = table.gather(-1, levels).to(images.dtype).reshape(images.shape) / 255
    return torch.where(step[..., None] == 0, images, new)  # too few pixels to spread


def _posterize(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
    bits = 4 - (level * 4).long()
    mask = 256 - 2 ** (8 - bits)
    return (_levels(images) & tree.onto(mask, images.device)).to(images.dtype) / 255


def _solarize(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
    # half a grey level below the threshold: no doubt about bytes turned into floats
    threshold = (256 - (level * 256).floor() - 0.5) / 255
    return torch.where(images < _like(threshold, images), images, 1 - images)


def _solarize_add(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
    more = _like((level * 110).floor() / 255, images)
    return torch.where(images < 0.5, images + more, images)


def _enhance(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda images, level, sign, fill: change(images, (1 + 0.9 * level * sign).clamp(min=0.1))


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images `(N, C, h, w)` read bilinearly at `x`, `y (N, h, w)`, pixels from the corner."""
    height, width = images.shape[-2:]
    # the CPU has no half precision here, and coordinates need float32
    dtype = torch.promote_types(images.dtype, torch.float32)
    grid = torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=-1).to(dtype)
    out = F.grid_sample(images.to(dtype), grid, padding_mode="border", align_corners=False)
    return out.clamp(0, 1).to(images.dtype)


def _warp(places: Callable[..., tuple[Tensor, Tensor]], strength: float) -> Callable[..., Tensor]:
    """The operation that reads at `places(x, y, amount, width, height)`, `fill` outside."""

    def apply(images: Tensor, level: Tensor, sign: Tensor, fill: float) -> Tensor:
        height, width = images.shape[-2:]
        dtype = torch.promote_types(images.dtype, torch.float32)
        amount = (strength * level * sign)[:, 0].to(dtype)  # (N, 1, 1)
        amount = tree.onto(amount, images.device)
        x = (torch.arange(width, device=images.device, dtype=dtype) + 0.5)[None, None, :]
        y = (torch.arange(height, device=images.device, dtype=dtype) + 0.5)[None, :, None]
        x, y = torch.broadcast_tensors(*places(x, y, amount, width, height))
        outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
        return torch.where(outside[:, None], fill, _sample(images, x, y))

    return apply


def _rotated(x: Tensor, y: Tensor, angle: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    cos, sin, x, y = angle.cos(), angle.sin(), x - width / 2, y - height / 2
    return cos * x - sin * y + width / 2, sin * x + cos * y + height / 2


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda images, level, sign, fill: 1 - images,
    "rotate": _warp(_rotated, math.radians(30)),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(_color),
    "contrast": _enhance(_contrast),
    "brightness": _enhance(_brightness),
    "sharpness": _enhance(_sharpness),
    "shear_x": _warp(lambda x, y, amount, width, height: (x + amount * y, y), 0.3),
    "shear_y": _warp(lambda x, y, amount, width, height: (x, y + amount * x), 0.3),
    "translate_x": _warp(lambda x, y, amount, width, height: (x + amount * width, y), 0.45),
    "translate_y": _warp(lambda x, y, amount, width, height: (x, y + amount * height), 0.45),
}


# pipelines


class _Steps(NamedTuple):
    """A pipeline: `place(generator, images, size)` gives images of that size, `change(generator,
    images)` what follows; a batch is mixed with probability `mixed`.
    """

    place: Callable[[Generator, Tensor, int], Tensor]
    change: Callable[[Generator, Tensor], Tensor] = lambda generator, images: images
    smoothing: float = 0.0
    mixed: float = 0.0

    def run(
        self, generator: Generator, images: Tensor, labels: Tensor, num_classes: int, size: int
    ) -> tuple[Tensor, Tensor]:
        images = self.change(generator, self.place(generator, images, size))
        targets = one_hot(labels, num_classes, self.smoothing)
        if not self.mixed:
            return images, targets
        return mixup_or_cutmix(generator, images, targets, p=self.mixed)


def _scaled(generator: Generator, images: Tensor, size: int) -> Tensor:
    _check("pipeline", generator, images)
    return resize(images, size)


def _shifted(generator: Generator, images: Tensor, size: int, flips: bool = True) -> Tensor:
    _check("pipeline", generator, images)
    images = crop(generator, images, padding=max(1, min(images.shape[-2:]) // 8))
    return resize(flip(generator, images) if flips else images, size)


def _boxed(generator: Generator, images: Tensor, size: int) -> Tensor:
    return random_resized_crop(generator, images, size=size)


def _painted(generator: Generator, images: Tensor) -> Tensor:
    return color_jitter(generator, rand_augment(generator, flip(generator, images)))


_PIPELINES: dict[str, _Steps] = {
    "none": _Steps(_scaled),
    "crop": _Steps(functools.partial(_shifted, flips=False)),
    "flip_crop": _Steps(_shifted),
    "paper": _Steps(_boxed, _painted, smoothing=0.1, mixed=1.0),
    "paper_half": _Steps(_boxed, _painted, smoothing=0.1, mixed=0.5),
    "small": _Steps(_shifted, functools.partial(rand_augment, magnitude=9), 0.1, mixed=1.0),
}


# draws and checks


def _uniform(generator: Generator, shape: Sequence[int]) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _beta(name: str, generator: Generator, alpha: float, shape: Sequence[int]) -> Tensor:
    """Beta(alpha, alpha): torch's own sampler takes no generator, NumPy's is seeded from it."""
    if not schema.fits(alpha, float) or not 0 < alpha < math.inf:
        raise ValueError(f"`{name}` needs a finite `alpha` > 0, got {alpha!r}.")
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.as_tensor(np.random.Generator(np.random.PCG64(seed)).beta(alpha, alpha, shape))


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return tree.onto(values[..., None, None, None], images.device)


def _check_probability(name: str, argument: str, value: float) -> None:
    if not schema.fits(value, float) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` needs `{argument}` in [0, 1], got {value!r}.")


def _check(name: str, generator: Generator, images: Tensor, labels: Tensor | None = None) -> None:
    if not isinstance(generator, Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"`{name}` needs a torch.Generator on the CPU, got {generator!r}. "
            "Make one by `data.generator_for(...)`."
        )
    if not _is_float(images, 4):
        raise ValueError(
            f"`{name}` needs float images (..., B, C, height, width) in [0, 1], got "
            f"{_shown(images)}. Turn bytes into floats by `data.as_float`."
        )
    if labels is not None and (not _is_float(labels, 1) or labels.shape[:-1] != images.shape[:-3]):
        raise ValueError(
            f"`{name}` needs soft labels {(*images.shape[:-3], 'classes')}, got {_shown(labels)}. "
            "Make them by `augment.one_hot`."
        )


def _is_float(value: Any, axes: int) -> bool:
    """Whether a value is a tensor of floats with so many axes, or more."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= axes


def _shown(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
