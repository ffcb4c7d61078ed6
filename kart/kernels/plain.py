"""The products of KArAt as plain materialised expressions, the reference of every engine.

Half types are computed in float32 and cast back once. Every function here is ordinary torch, so
any transform of any order may be taken through it; the price is the N x M x K memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # no stubs
from torch._functorch.utils import unwrap_dead_wrappers

from kart import projections


def wide(x: Tensor) -> Tensor:
    """`x` in float32 where it is narrower: 8 or 11 bits are too few for scores and sums."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `wide(x)`."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def transforming() -> bool:
    """Whether a transform of `torch.func` is running."""
    return bool(_functorch.get_interpreter_stack())


def pullback(fn: Callable[..., Any], *primals: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The map from a cotangent of `fn(*primals)` to cotangents of `primals`."""
    if torch.is_grad_enabled() or transforming():
        # torch gives no zeros like a tensor of a level that has ended, wrapped for another
        return torch.func.vjp(fn, *unwrap_dead_wrappers(primals))[1]
    # nobody differentiates it again: without the graph that torch.func keeps for that
    leaves = [x.detach().requires_grad_() for x in primals]
    with torch.enable_grad():
        y = fn(*leaves)

    def pull(cotangents: Any) -> tuple[Tensor, ...]:
        outputs = zip(y, cotangents, strict=True) if isinstance(y, tuple) else [(y, cotangents)]
        # what comes out may depend on none of them
        some = [(out, cotangent) for out, cotangent in outputs if out.requires_grad]
        if not some:
            return tuple(map(torch.zeros_like, leaves))
        outs, given = zip(*some, strict=True)
        return torch.autograd.grad(outs, leaves, given, materialize_grads=True)

    return pull


def scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """`scale q k^T`, `(..., N, M)`; `scale` defaults to `d^-1/2`."""
    return wide(q) * (q.shape[-1] ** -0.5 if scale is None else scale) @ wide(k).mT


def contract(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`y[n, p] = sum_m mask[n, m] sum_j features(s[n, m])[j] coefs[p, m, j]`, `(..., H, N, r)`."""
    features = basis.features(scores(q, k, scale))  # (..., H, N, M, K)
    if mask is not None:
        features = torch.where(mask[..., None], features, 0)
    return torch.einsum("...nmk,...pmk->...np", features, coefs.to(features.dtype)).to(q.dtype)


def contract_units(
    basis: Any,
    units: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`y[n, p] = sum_m mask[n, m] phi_pm(s[n, m])` for units `(H, r, M, ..)`, `(..., H, N, r)`."""
    lifted = {name: leaf.unsqueeze(1) for name, leaf in units.items()}  # (H, 1, r, M, ..)
    values = basis.apply(lifted, scores(q, k, scale).unsqueeze(-2))  # (..., H, N, r, M)
    if mask is not None:
        values = torch.where(mask.unsqueeze(-2) if mask.dim() > 1 else mask, values, 0)
    return values.sum(-1).to(q.dtype)


def mix_values(y: Tensor, mix: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`out[n] = sum_j mask[n, j] (y[n] . mix[j]) v[j]`, `(..., H, N, d)`."""
    return (torch.where(mask, wide(y) @ wide(mix).mT, 0) @ wide(v)).to(v.dtype)


def softmax_rows(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of each row over the keys that it attends to; a row of none is zero, of -inf NaN."""
    if mask is None:
        return scores.softmax(-1)
    # a row without any key must come out zero, and its gradient too: not by way of NaN
    hidden = torch.where(mask.any(-1, keepdim=True), -math.inf, scores.new_zeros(()))
    return torch.where(mask, torch.where(mask, scores, hidden).softmax(-1), 0)


def simplex_rows(y: Tensor, mask: Tensor | None) -> Tensor:
    """Each row projected onto the simplex over the keys that it attends to; a row of none is
    zero.
    """
    if mask is None:
        return projections.simplex(y)
    # a row of -inf alone is shared by all keys: those that count are more than the masked ones
    y = y.clamp(min=torch.finfo(y.dtype).min).masked_fill(~mask, -math.inf)
    return torch.where(mask, projections.simplex(y), 0)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """`softmax(s) v`, `(..., H, N, d)`; a query whose keys are all masked gets zeros. With a table
    `(softmax(s) + table) v`, without a mask.
    """
    weights = softmax_rows(scores(q, k, scale), mask)
    weights = weights if table is None else weights + table
    return (weights @ wide(v)).to(v.dtype)


# what becomes of entries y: f y; y / sum |y|; softmax(y); softmax(s + y); f y + softmax(s); y
# projected onto the simplex
FORMS = ("plain", "l1", "softmax", "inside", "beside", "simplex")


def weigh(
    form: str, y: Tensor, scores: Any, mask: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    """Entries `(..., N, M)` as weights, zero where masked, in one of `FORMS`; `factor` is f, and
    `scores` are of "inside" and "beside" alone. A row of no key is zero.
    """
    if form == "softmax":
        return softmax_rows(y, mask)
    if form == "inside":
        return softmax_rows(scores + y, mask)
    if form == "simplex":
        return simplex_rows(y, mask)
    y = y if mask is None else torch.where(mask, y, 0)
    if form == "l1":
        # a row of zeros stays one
        return y / y.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
    y = y if factor is None else y * factor
    return y + softmax_rows(scores, mask) if form == "beside" else y


def entries(basis: Any, units: dict[str, Tensor], x: Tensor, place: Tensor | None = None) -> Tensor:
    """`phi_h(x)` for `units (B or 1, H)`, one function a head, those of a linear family as "theta",
    `(.., H, K)`; without a basis "theta" `(.., H, offsets)` has the entry of query n and key m at
    place[n] - m, `place (N, 1)`, default n + M - 1.
    """
    if basis is None:
        rows, keys = x.shape[-2:]
        if place is None:
            place = torch.arange(rows, device=x.device)[:, None] + keys - 1
        return units["theta"][..., place - torch.arange(keys, device=x.device)].to(x.dtype)
    if basis.features is None:
        return basis.apply({name: leaf[:, :, None, None] for name, leaf in units.items()}, x)
    coefs = units["theta"].to(x.dtype)
    return (basis.features(x) * coefs[..., None, None, :]).sum(-1)


def pair_entries(basis: Any, matrix: Tensor, x: Tensor) -> Tensor:
    """`t[n, m] + sum_j features(x[n, m])[j] c[j, n, m]`, of t and then c `(.., H, 1 + K, N, M)`."""
    t, *coefs = matrix.to(x.dtype).unbind(-3)
    return sum((f * c for f, c in zip(basis.features(x).unbind(-1), coefs, strict=True)), t)


def entry_attention(
    basis: Any,
    units: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    form: str,
    scale: float,
    place: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Tensor:
    """`weigh(form, entries(...), ...) v`, `(..., H, N, e)`; `matrix (.., H, N, M)`, or with a basis
    `(.., H, 1 + K, N, M)` and a function of each score, is in their place.
    """
    x = scores(q, k, scale)
    # hidden scores may be NaN
    x = x if mask is None else torch.where(mask, x, 0)
    if matrix is None:
        y = entries(basis, units, x, place)
    else:
        y = matrix if basis is None else pair_entries(basis, matrix, x)
    y = weigh(form, y, x, mask, factor)
    return (y @ wide(v)).to(v.dtype)
