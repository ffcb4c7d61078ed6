"""The products of KArAt as plain materialised expressions, the reference of every engine."""

from typing import Any

import torch
from torch import Tensor


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)


def contract(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`y[n, p] = sum_m mask[n, m] sum_j features(s[n, m])[j] coefs[p, m, j]`, `(..., H, N, r)`."""
    features = basis.features(_scores(q, k, scale))  # (..., H, N, M, K)
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
    """`y[n, p] = sum_m mask[n, m] phi_pm(s[n, m])` for units `(H, r, M)`, `(..., H, N, r)`."""
    lifted = {name: leaf.unsqueeze(1) for name, leaf in units.items()}  # (H, 1, r, M, ..)
    values = basis.apply(lifted, _scores(q, k, scale).unsqueeze(-2))  # (..., H, N, r, M)
    if mask is not None:
        values = torch.where(mask.unsqueeze(-2), values, 0)
    return values.sum(-1)


def mix_values(y: Tensor, mix: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`out[n] = sum_j mask[n, j] (y[n] . mix[j]) v[j]`, `(..., H, N, d)`."""
    return torch.where(mask, y @ mix.mT, 0) @ v


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`softmax(s) v`, `(..., H, N, d)`; a query whose keys are all masked gets zeros."""
    scores = _scores(q, k, scale)
    if mask is None:
        return scores.softmax(-1) @ v
    weights = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(mask, weights, 0) @ v
