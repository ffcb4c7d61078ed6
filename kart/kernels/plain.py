"""The products of KArAt as plain materialised expressions, the reference of every engine.

Half types are computed in float32 and cast back once. Every function here is ordinary torch, so
any transform of any order may be taken through it; the price is the N x M x K memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # no stubs


def wide(x: Tensor) -> Tensor:
    """`x` in float32 where it is narrower: 8 or 11 bits are too few for scores and sums."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def transforming() -> bool:
    """Whether a transform of `torch.func` is running."""
    return bool(_functorch.get_interpreter_stack())


def pullback(fn: Callable[..., Any], *primals: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The map from a cotangent of `fn(*primals)` to cotangents of `primals`."""
    if torch.is_grad_enabled() or transforming():
        return torch.func.vjp(fn, *primals)[1]
    # nobody differentiates it again: without the graph that torch.func keeps for that
    leaves = [x.detach().requires_grad_() for x in primals]
    with torch.enable_grad():
        y = fn(*leaves)

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)

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


def contract_values(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`sum_p contract(...)[n, p] v[p]`: full rank, with the N x P weights."""
    return contract(basis, coefs, q, k, mask, scale) @ v


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
    logits = scores(q, k, scale)
    if table is not None:
        return ((logits.softmax(-1) + table) @ wide(v)).to(v.dtype)
    if mask is None:
        return (logits.softmax(-1) @ wide(v)).to(v.dtype)
    # a row of -inf has a NaN softmax, a row of the least finite number has not
    weights = torch.where(mask, logits, torch.finfo(logits.dtype).min).softmax(-1)
    return (torch.where(mask, weights, 0) @ wide(v)).to(v.dtype)
