"""The streamed product and softmax attention of the same scores, which are computed once."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kart.kernels import cpp, fused
from kart.kernels.arguments import broadcast_leading, check, flat_mask, four_axes
from kart.kernels.core import contract
from kart.kernels.family import Family, Product, family_of
from kart.kernels.softmax import softmax_attention
from kart.kernels.transforms import forward_levels, no_autocast


def contract_softmax(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`contract(basis, coefs, q, k, ...)` and `softmax_attention(q, k, v, ...)`.

    Both read the same scores in the "cpp" engine, forward and backward; elsewhere, under forward
    mode and in second derivatives each has its own.

    Args:
        basis, coefs, q, k, mask, scale, engine: as in `contract`.
        v: `(..., H, M, e)`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    apart = partial(_apart, basis, mask=mask, scale=scale, engine=engine)
    plainly = torch.compiler.is_compiling() or forward_levels() or q.device.type != "cpu"
    if plainly or engine not in ("auto", "cpp") or basis.features is None:
        return apart(coefs, q, k, v)
    check("contract_softmax", q, k, mask, scale, coefs=coefs, v=v)
    family = family_of(basis)
    keys = k.shape[-2]
    narrow = all(x.dtype in cpp.DTYPES for x in (q, coefs)) and v.dtype == q.dtype
    fits = v.dim() >= 3 and v.shape[-2] == keys and coefs.shape[-2:] == (keys, family.width)
    if not narrow or not fits or coefs.dim() < 4 or cpp.engine_of(family, True)[0] is None:
        return apart(coefs, q, k, v)
    *lead, heads = broadcast_leading(
        "contract_softmax", q=q, k=k, v=v, coefs=coefs.shape[:-3], mask=mask
    )
    batch, rows = math.prod(lead), q.shape[-2]
    if not batch or not coefs.shape[-3]:
        return apart(coefs, q, k, v)
    q, k, v = four_axes([*lead, heads], q, k, v)
    shared = all(size == 1 for size in coefs.shape[:-4])
    coefs = coefs.expand(*([1] * len(lead) if shared else lead), heads, *coefs.shape[-3:])
    coefs = coefs.reshape(math.prod(coefs.shape[:-4]), heads, *coefs.shape[-3:])
    mask = None if mask is None else flat_mask(mask, lead)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with no_autocast(q):
        y, out = fused.apply(_both(family, factor), q, k, v, coefs, mask)
    y, out = (x.reshape(*lead, heads, rows, x.shape[-1]) for x in (y, out))
    return y, out


def _apart(basis, coefs, q, k, v, mask, scale, engine) -> tuple[Tensor, Tensor]:
    y = contract(basis, coefs, q, k, mask, scale, engine)
    return y, softmax_attention(q, k, v, mask, scale)


def _both(family: Family, scale: float) -> fused.Fused:
    """Of q, k, v, coefs and mask in the layout of a `Product`."""

    def forward(q, k, v, coefs, mask):
        return cpp.forward_beside(Product(family, q, k, coefs, mask, scale), v)

    def backward(gradients, inputs, results):
        q, k, v, coefs, mask = inputs
        dy, dout = gradients
        _, out, sums = results
        product = Product(family, q, k, coefs, mask, scale)
        dq, dk, dcoefs, dv = cpp.backward_beside(product, dy, v, dout, out, sums)
        return dq, dk, dv, dcoefs

    def expression(q, k, v, coefs, mask):
        return _apart(family.basis, coefs, q, k, v, mask, scale, "auto")

    return fused.Fused(forward, backward, expression, 2, (0, 1, 2, 3), (3, 4))
