"""Maps of a row of scores onto a convex set."""

import torch
from torch import Tensor


def simplex(y: Tensor, dim: int = -1) -> Tensor:
    """Nearest point of the probability simplex to each row along `dim`, `(..., M)` to `(..., M)`.

    The sort form of the paper's Algorithm 1, on rows shifted to a maximum of zero: the projection
    does not change under a shift, and near zero nothing cancels, so rows around 1e8 keep float32's
    accuracy. float16 and bfloat16 are computed in float32 and cast back.

    The derivative is `diag(s) - s s^T / |s|` for the indicator `s` of the support (the entries of
    positive weight). Plain operations make it, so that it holds under every transform and every
    order.

    Special rows: equal entries get equal weight, a constant row 1/M each. Entries of +inf share the
    whole weight equally, with derivative zero; entries of -inf get weight 0 and derivative zero; a
    row of nothing but -inf is uniform, with derivative zero. One NaN makes its whole row NaN.

    Where an entry sits exactly on the edge of the support (weight 0, `y_i = lambda`) the projection
    has a kink; the derivative given there is the one with that entry outside.

    >>> simplex(torch.tensor([1.0, 0.5, -2.0]))
    tensor([0.7500, 0.2500, 0.0000])

    Args:
        y: floating-point scores.
        dim: the axis that holds a row.

    Reference: Maity et al., "Kolmogorov-Arnold Attention", 2025, arXiv:2503.10632, Algorithm 1;
    Condat, "Fast projection onto the simplex and the l1 ball", 2016; the derivative: Martins and
    Astudillo, "From softmax to sparsemax", 2016, arXiv:1602.02068.
    """
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"`simplex` needs floating-point rows, got {kind}. Convert them first.")
    if y.ndim == 0 or type(dim) is not int or not -y.ndim <= dim < y.ndim:
        raise ValueError(
            f"`simplex` needs an axis `dim` of its input, got dim {dim!r} of shape "
            f"{tuple(y.shape)}. Name the axis that holds a row."
        )
    if y.shape[dim] == 0:
        raise ValueError(
            f"`simplex` needs rows of at least one entry, got shape {tuple(y.shape)} along dim "
            f"{dim}. There is no simplex of size 0: drop the empty rows."
        )
    rows = y.movedim(dim, -1).to(torch.promote_types(y.dtype, torch.float32))
    highest = rows.detach().amax(-1, keepdim=True)
    # inf - inf is NaN: the infinite maximum, of either sign, is put at zero by hand
    rows = torch.where(highest.isinf() & (rows == highest), 0.0, rows - highest)

    # far entries may swamp the running sum or make it -inf: after those of the support, where it is
    # read no more, and where the comparison is false
    ordered = rows.detach().sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, ordered.shape[-1] + 1, dtype=ordered.dtype, device=ordered.device)
    # NaN rows fail every comparison: the clamp keeps their index valid
    last = ((counts * ordered > excess).sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold = excess.gather(-1, last) / (last + 1)

    support = (rows.detach() > threshold) | highest.isnan()
    # on its support the projection is affine: written out, every derivative comes out right
    kept = torch.where(support, rows, 0.0)
    threshold = (kept.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    # the two thresholds differ by rounding: the clamp holds the weights at zero from below
    weights = torch.where(support, rows - threshold, 0.0).clamp(min=0.0)
    return weights.to(y.dtype).movedim(-1, dim)
