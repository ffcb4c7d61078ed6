"""A simple feature pyramid: maps of four resolutions from the last map of a plain backbone (Li et
al. 2022, arXiv:2203.16527, sec. 3).
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kart import layers
from kart.bases import DRAWN
from kart.models import work

Params = dict[str, Any]
SCALES = (4.0, 2.0, 1.0, 0.5)  # of a level's sides, to those of the map


def conv_init(generator: Generator, in_size: int, out_size: int, kernel: int) -> Params:
    """Parameters of `conv`: `weight (out, in, kernel, kernel)`, and the norm behind it."""
    std = math.sqrt(2.0 / (in_size * kernel**2))  # He et al. 2015
    weight = layers.truncated_normal(generator, out_size, in_size, kernel, kernel, std=std)
    return {"weight": weight, "norm": layers.layer_norm_init(out_size)}


def conv(params: Params, x: Tensor) -> Tensor:
    """A convolution that keeps the sides, then a layer norm over channels: `(..., h, w, C)`."""
    weight = params["weight"].to(x.dtype)
    images = x.movedim(-1, -3).reshape(-1, x.shape[-1], *x.shape[-3:-1])
    y = F.conv2d(images, weight, padding=weight.shape[-1] // 2)
    return layers.layer_norm(params["norm"], y.movedim(-3, -1).reshape(*x.shape[:-1], len(weight)))


def double_init(generator: Generator, in_size: int, out_size: int) -> Params:
    """Parameters of `double`, those of the transposed convolution: `weight (in, out, 2, 2)`."""
    return {
        "weight": layers.truncated_normal(generator, in_size, out_size, 2, 2),
        "bias": torch.zeros(out_size, **DRAWN),
    }


def double(params: Params, x: Tensor) -> Tensor:
    """A transposed convolution of 2 x 2 and stride 2: `(..., h, w, C)` to `(..., 2 h, 2 w, C')`.

    A product: each token becomes four, under `vmap` without grouped convolutions.
    """
    weight = params["weight"].to(x.dtype)
    y = (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])  # (..., h, w, C', 2, 2)
    y = y.movedim(-3, -1).transpose(-4, -3)  # (..., h, 2, w, 2, C')
    return y.flatten(-3, -2).flatten(-4, -3) + params["bias"].to(x.dtype)


def halve(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 tokens, channel by channel: `(..., h/2, w/2, C)`."""
    return x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2)).amax((-4, -2))


def pyramid_init(generator: Generator, size: int, out_size: int) -> Params:
    """Parameters of `pyramid`, level by level from the finest."""
    params: Params = {}
    for level, scale in enumerate(SCALES):
        steps, width = {}, size
        for step in range(int(math.log2(scale)) if scale > 1 else 0):
            norm = {"norm": layers.layer_norm_init(width)} if step else {}
            steps[str(step)] = {**norm, **double_init(generator, width, width // 2)}
            width //= 2
        params[str(level)] = {
            **({"up": steps} if steps else {}),
            "lateral": conv_init(generator, width, out_size, 1),
            "smooth": conv_init(generator, out_size, out_size, 3),
        }
    return params


def pyramid(params: Params, x: Tensor) -> list[Tensor]:
    """Maps `(..., C, h', w')` by level, the finest first, of a map `(..., h, w, D)`.

    Two doublings with a layer norm and a GELU between them, one, none, or a halving by maxima; then
    a 1 x 1 and a 3 x 3 convolution, each with a layer norm.
    """
    levels = []
    for level, scale in enumerate(SCALES):
        own, y = params[str(level)], halve(x) if scale < 1 else x
        for step in own.get("up", {}).values():
            y = double(step, F.gelu(layers.layer_norm(step["norm"], y)) if "norm" in step else y)
        levels.append(conv(own["smooth"], conv(own["lateral"], y)).movedim(-1, -3))
    return levels


def work_of(side: int, size: int, out_size: int) -> work.Layers:
    """The layers of `pyramid` on a map of `side` x `side` tokens of width `size`."""
    for scale in SCALES:
        here, width = side if scale >= 1 else side // 2, size
        for step in range(int(math.log2(scale)) if scale > 1 else 0):
            if step:
                yield work.norm(here**2, width)
            yield work.product("head", here**2, width, 4 * (width // 2))
            here, width = 2 * here, width // 2
        for inputs, kernel in ((width, 1), (out_size, 3)):
            yield work.product("head", here**2, kernel**2 * inputs, out_size)
            yield work.norm(here**2, out_size)
