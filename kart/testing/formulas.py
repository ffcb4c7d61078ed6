"""What a step computes, as the papers write it: AdamW, clipping, schedule and average, in float64.

Written for reading, not for speed, and apart from `kart.optim`, which is held to it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import tree

Params = Any


class AdamW(NamedTuple):
    """The numbers of AdamW, clipped and averaged. Updates are counted i = 0, 1, ..

    `rate(i)` is the learning rate of update i, `decays(path, leaf)` whether a parameter decays,
    `max_norm` the largest global norm of the gradients, None for any; `keeps(i)` the share of the
    average that survives update i; `updates` how many are compared with the step's: past the end of
    the schedule, where it has one, for it is not held to what it does beyond.
    """

    rate: Callable[[int], float]
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_norm: float | None = None
    decays: Callable[[str, Tensor], bool] = lambda path, leaf: True
    keeps: Callable[[int], float] = lambda i: 0.0
    updates: int = 24


def warmup_cosine(
    base: float, warmup: int, total: int, start: float, end: float
) -> Callable[[int], float]:
    """Linear from `start` to `base` over `warmup` updates, then half a cosine to `end`."""

    def rate(i: int) -> float:
        if i < warmup:
            return start + (base - start) * i / warmup
        share = min(1.0, (i - warmup) / (total - warmup))
        return end + (base - end) * (1 + math.cos(math.pi * share)) / 2

    return rate


def adamw(
    formula: AdamW, params: Params, gradients: Params, moments: tuple[Params, Params] | None, i: int
) -> tuple[Params, tuple[Params, Params]]:
    """The parameters after update i, and the two moments; None stands for moments of zero.

    Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019,
        arXiv:1711.05101, Algorithm 2.
    """
    f, p, g = formula, tree.to(params, torch.float64), tree.to(gradients, torch.float64)
    if f.max_norm is not None:
        norm = sum(leaf.square().sum() for leaf in tree.leaves(g)) ** 0.5
        factor = min(1.0, f.max_norm / max(float(norm), 1e-30))
        g = tree.map(lambda g: factor * g, g)
    zero = tree.map(torch.zeros_like, g)
    m, v = moments or (zero, zero)
    m = tree.map(lambda m, g: f.b1 * m + (1 - f.b1) * g, m, g)
    v = tree.map(lambda v, g: f.b2 * v + (1 - f.b2) * g**2, v, g)

    def moved(name: str, p: Tensor) -> Tensor:
        mean = tree.named(m)[name] / (1 - f.b1 ** (i + 1))
        square = tree.named(v)[name] / (1 - f.b2 ** (i + 1))
        decay = f.weight_decay if f.decays(name, p) else 0.0
        return p - f.rate(i) * (mean / (square**0.5 + f.eps) + decay * p)

    return tree.map_named(moved, p), (m, v)


def averaged(formula: AdamW, average: Params, params: Params, i: int) -> Params:
    """The average after update i, which led to `params`."""
    keep = formula.keeps(i)
    return tree.map(lambda a, p: keep * a.double() + (1 - keep) * p.double(), average, params)
