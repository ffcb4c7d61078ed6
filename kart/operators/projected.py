"""Attention together with the projections before and after it.

Weights that are a product `L R^T` of J columns, `L (..., H, N, J)` and `R (H, M, J)`, as those of
KArAt are, need no values and no output of a head: with values `X Wv^T` and the projection Wo of
what the heads found,

    sum_h L_h R_h^T (X Wv_h^T) Wo_h^T = sum_h L_h ((R_h^T X) Wv_h^T Wo_h^T)

and both projections act on J rows a head instead of on every token. Nothing of the size of X is
kept for the backward but X.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kart.kernels.transforms import autocasting
from kart.operators.contract import Factored, Factors, Operator

GAIN = 2  # multiply-adds saved over those left, from which on smaller products are faster


def factors_of(operator: Operator) -> Factors | None:
    """The factors of the weights of an operator, None where they are no product of few columns, or
    `attend` was replaced.
    """
    found = operator.factors
    return found if found is not None and found.attend is operator.attend else None


def pays(factors: Factors | None, x: Tensor, heads: int) -> bool:
    """Whether `projected` is the faster way for tokens `x (..., M, D)`: by count, in float32 and
    float64. Half precision, which would round J terms that cancel, keeps to values and outputs.
    """
    if factors is None or x.dtype not in (torch.float32, torch.float64):
        return False
    if autocasting(x):
        return False
    tokens, size = x.shape[-2:]
    rank, width = factors.rank, size // heads
    # by token and head: R^T X and L P, their products with the weights; values, output, and theirs
    here, there = 2 * rank * (1 + width / tokens), 2 * (width + rank / heads)
    return GAIN * here <= there


def projected(factors: Factored, x: Tensor, value: dict[str, Any], out: dict[str, Any]) -> Tensor:
    """`(..., N, D)`: the weights of `factors` on the values of `x (..., M, D)`, all heads joined
    and projected.

    Args:
        factors: `left (..., H, N, J)` and `right (H, M, J)`.
        value: `weight (H d, D)` and maybe `bias (H d,)` of the values, those of a head together.
        out: `weight (D, H d)` and maybe `bias (D,)` of the projection.
    """
    left, right = factors
    lead, (heads, queries, rank) = left.shape[:-3], left.shape[-3:]
    tokens, size = x.shape[-2:]
    batch, right = math.prod(x.shape[:-2]), right.to(x.dtype)
    x = x.reshape(batch, tokens, size)
    # R^T X, (H, B J, D): one product a head and sample, then one a head
    sums = torch.bmm(right.mT.flatten(0, 1).expand(batch, -1, -1), x)
    sums = sums.unflatten(1, (heads, rank)).transpose(0, 1).flatten(1, 2)
    weight = value["weight"].to(x.dtype).unflatten(0, (heads, -1))
    hidden = torch.bmm(sums, weight.mT)
    if "bias" in value:
        # every value has the bias: R sums to how often it counts
        bias = value["bias"].to(x.dtype).unflatten(0, (heads, 1, -1))
        share = (right.sum(1)[..., None] * bias)[:, None]  # (H, 1, J, d)
        hidden = (hidden.unflatten(1, (batch, rank)) + share).flatten(1, 2)
    weight = out["weight"].to(x.dtype).unflatten(1, (heads, -1)).permute(1, 2, 0)
    found = torch.bmm(hidden, weight).unflatten(1, (batch, rank)).transpose(0, 1).flatten(1, 2)
    left = left.reshape(batch, heads, queries, rank).transpose(1, 2).flatten(2)
    y = torch.baddbmm(out["bias"].to(x.dtype), left, found) if "bias" in out else left @ found
    return y.reshape(*lead, queries, size)
