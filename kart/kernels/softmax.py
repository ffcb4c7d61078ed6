"""Softmax attention by torch's fused kernels where they hold, and right where they do not.

On the CPU the fused kernel has no batching rule, no forward mode and no second derivative;
`kart.kernels.fused` gives it those. The backward of those of a GPU has no batching rule either.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kart.kernels import fused, plain
from kart.kernels.arguments import broadcast_leading, check, dense_rows, flat_mask, four_axes
from kart.kernels.cpp import weights as compiled
from kart.kernels.cpp.weights import Weighted
from kart.kernels.transforms import forward_levels, grad_levels, untransformed, vmap_levels

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
# of fewer keys than a vector register holds, and no bias, the kernel makes zeros of a query of NaN
_LANES = 16


def _bias(mask: Tensor | None, like: Tensor, rows: int, keys: int) -> Tensor | None:
    if mask is None:
        return None
    zeros = torch.zeros_like(mask, dtype=like.dtype)
    return zeros.masked_fill(~mask, -math.inf).expand(-1, -1, rows, keys)


def _flash_forward(scale, q, k, v, mask):
    keys = k.shape[-2]
    if mask is None and keys < _LANES:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    bias = _bias(mask, q, q.shape[-2], keys)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *dense_rows(q, k, v), 0.0, False, attn_mask=bias, scale=scale
    )


def _flash_backward(scale, gradients, inputs, results):
    q, k, v, mask = inputs
    bias = _bias(mask, q, q.shape[-2], k.shape[-2])
    out, logsumexp = results
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *dense_rows(*gradients, q, k, v, out), logsumexp, 0.0, False, attn_mask=bias, scale=scale
    )


def _flash(scale: float) -> fused.Fused:
    """The CPU's fused kernel on q, k, v and mask, all of four axes."""
    return fused.Fused(
        partial(_flash_forward, scale),
        partial(_flash_backward, scale),
        lambda q, k, v, mask: (plain.softmax_attention(q, k, v, mask, scale),),
        count=1,
        learned=(0, 1, 2),
        shared=(3,),
        reads=False,
    )


def _whole(scale: float) -> fused.Fused:
    """A GPU's fused kernel for `vmap`: its forward runs again in the backward."""

    def forward(q, k, v, mask):
        return (F.scaled_dot_product_attention(q, k, v, mask, scale=scale),)

    def backward(gradients, inputs, results):
        with untransformed(), torch.enable_grad():
            q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            return torch.autograd.grad(forward(q, k, v, inputs[3]), leaves, gradients)

    return _flash(scale)._replace(forward=forward, backward=backward)


# Products with a table that all samples share are taken of the samples as they lie in memory: one
# product for all would need copies of its factor and of its result with the heads first, which cost
# as much as it does.


def _beside_forward(scale, q, k, v, table):
    q, k, v = dense_rows(q, k, v)
    out, logsumexp = _flash_forward(scale, q, k, v, None)
    # the backward of softmax's share needs `out` as it is
    total = torch.empty_like(out)
    for h in range(v.shape[1]):
        torch.bmm(table[:, h].expand(len(v), -1, -1), v[:, h], out=total[:, h])
    return total.add_(out), out, logsumexp


def _beside_backward(scale, gradients, inputs, results):
    q, k, v, table = inputs
    (gradient, v), (_, *rest) = dense_rows(gradients[0], v), results
    found = _flash_backward(scale, [gradient], (q, k, v, None), rest)
    shared = len(table) != len(v)
    of_table = torch.empty_like(table) if shared else gradient @ v.mT
    for h in range(v.shape[1]):
        # nobody else holds the gradient of v yet
        found[2][:, h].baddbmm_(table[:, h].mT.expand(len(v), -1, -1), gradient[:, h])
        if shared:
            torch.addbmm(of_table[0, h], gradient[:, h], v[:, h].mT, beta=0, out=of_table[0, h])
    return *found, of_table


def _weighted(scale, q, k, v, table) -> Weighted:
    packed = compiled.of_matrix(table)
    return Weighted(None, "beside", q, k, v, packed, None, None, scale, matrix=True)


def _pass_forward(scale, q, k, v, table):
    return compiled.forward(_weighted(scale, q, k, v, table))


def _pass_backward(scale, gradients, inputs, results):
    *found, packed = compiled.backward(_weighted(scale, *inputs), *gradients, *results)
    return *found, compiled.as_matrix(packed, *inputs[3].shape[2:])


def _beside(scale: float, one_pass: bool) -> fused.Fused:
    """`softmax(scale q k^T) v + table v`, `table (B or 1, H, N, M)`, the others of four axes.

    In one pass each weight is summed before it meets its value, and the gradient of the table is a
    sum of those of the weights: a product fewer forward, two fewer backward.
    """
    return fused.Fused(
        partial(_pass_forward if one_pass else _beside_forward, scale),
        partial(_pass_backward if one_pass else _beside_backward, scale),
        lambda q, k, v, table: (plain.softmax_attention(q, k, v, None, scale, table),),
        count=1,
        learned=(0, 1, 2, 3),
        shared=(3,),
        reads=one_pass,
    )


def _apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    table: Tensor | None = None,
    traced: bool = False,
) -> Tensor:
    """Four axes each; torch.compile keeps this function whole (see `_keep_whole`)."""
    if table is not None and (forward_levels() or q.device.type != "cpu"):
        # a GPU's matrix units sum products of half types in float32
        x = v if v.device.type == "cuda" else plain.wide(v)
        # one product for all samples: a matmul would repeat the table a sample
        added = torch.einsum("bhnm,chme->chne", table.to(x.dtype), x)
        return _apply(q, k, v, mask, scale) + added.to(v.dtype)
    # fused kernels of other devices refuse no samples, or leave them without a graph
    elsewhere = q.device.type != "cpu" and (grad_levels() > 1 or not q.shape[0])
    if forward_levels() or elsewhere:
        return plain.softmax_attention(q, k, v, mask, scale)
    if q.device.type != "cpu":
        if vmap_levels():
            return fused.apply(_whole(scale), q, k, v, mask)[0]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    # the CPU's kernel would round the weights to half precision before they meet the values
    dtype, (q, k, v) = q.dtype, (plain.wide(x) for x in (q, k, v))
    # asked of plain tensors of these sizes: the question has no rule of its own under vmap
    samples = [torch.empty(1, 1, *x.shape[-2:], dtype=x.dtype, device=x.device) for x in (q, k, v)]
    backend = torch.ops.aten._fused_sdp_choice(*samples, None, 0.0, False, scale=scale)
    if backend != _FLASH:
        return plain.softmax_attention(q, k, v, mask, scale, table).to(dtype)
    if table is not None:
        one_pass = not traced and not compiled.refuses(_weighted(scale, q, k, v, table))
        return fused.apply(_beside(scale, one_pass), q, k, v, table)[0].to(dtype)
    return fused.apply(_flash(scale), q, k, v, mask)[0].to(dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q k^T) v`, `(..., H, N, d)`, by torch's fused kernel wherever there is one.

    With a `table` of weights that are the same for all samples it is `(softmax(scale q k^T) +
    table) v`.

    A query whose keys are all masked gets zeros. One all of whose attended scores overflow to -inf
    has no weights: it gets NaN, but where torch's fused kernel runs, which makes zeros of it.

    Holds under every transform of `torch.func`; on the CPU also under double backward. On CUDA a
    second derivative by `torch.autograd` alone (not `torch.func`) is refused by torch's kernel.

    Args:
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, M, e)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.
        scale: of the scores; default `d^-1/2`.
        table: `(H or 1, N, M)`, float32 beside half types, which a GPU rounds to theirs; not beside
            a mask.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check("softmax_attention", q, k, mask, scale, v=v)
    if table is not None:
        check("softmax_attention", q, k, mask, scale, table=table)
    if v.dim() < 3 or v.shape[-2] != k.shape[-2] or v.dtype != q.dtype:
        raise ValueError(
            f"`softmax_attention` needs `v` (..., H, {k.shape[-2]}, e) in {q.dtype}, for the keys "
            f"of `k`, got {tuple(v.shape)} in {v.dtype}. Project v from the same tokens as k."
        )
    *lead, heads = broadcast_leading("softmax_attention", q=q, k=k, v=v, mask=mask)
    size = (heads, q.shape[-2], k.shape[-2])
    # one table may be that of all heads
    fits = table is None or tuple(table.shape) in (size, (1, *size[1:]))
    if table is not None and (mask is not None or not fits):
        what = "a mask" if mask is not None else f"shape {tuple(table.shape)}"
        raise ValueError(
            f"`softmax_attention` needs `table` (H, N, M) = {size} without a mask, got {what}. "
            "Add the product of a masked table and v outside."
        )
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = four_axes([*lead, heads], q, k, v)
    some = None
    if mask is not None:
        mask = flat_mask(mask, lead).expand(-1, -1, -1, k.shape[-2])
        # fused kernels differ in what a row of nothing is: it attends to all, then becomes zero
        some = mask.any(-1, keepdim=True)
        mask = mask | ~some
    if torch.compiler.is_compiling():
        _keep_whole()
    # without a table the call has no other arguments, as torch.compile sees it
    if table is None:
        out = _apply(q, k, v, mask, factor)
    else:
        own = table.expand(size)[None].to(plain.wide(v[:0]).dtype)
        out = _apply(q, k, v, mask, factor, own, torch.compiler.is_compiling())
    if some is not None:
        out = torch.where(some, out, 0)
    return out.reshape(*lead, *out.shape[1:])


def _keep_whole() -> bool:
    torch.compiler.allow_in_graph(_apply)
    return True


# run, not traced, by torch.compile, as in `kart.kernels.core`
_keep_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]
