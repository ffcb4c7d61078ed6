"""Softmax attention by torch's fused kernels where they hold, and right where they do not.

On the CPU the fused kernel has no batching rule, no forward mode and no second derivative. Here it
is wrapped in a pair of Functions that give it those: folding for `vmap`, the plain expression for
the derivatives beyond the first.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from kart.kernels import plain
from kart.kernels.arguments import broadcast_leading, check, flat_mask
from kart.kernels.transforms import forward_levels, front, grad_levels

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


def _bias(mask: Tensor | None, like: Tensor, rows: int, keys: int) -> Tensor | None:
    if mask is None:
        return None
    zeros = torch.zeros_like(mask, dtype=like.dtype)
    return zeros.masked_fill(~mask, -math.inf).expand(-1, -1, rows, keys)


def _dense(*tensors: Tensor) -> list[Tensor]:
    # the raw kernel takes the last axis for contiguous and reads other memory where it is not
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _gradients(q, k, v, mask, scale, dout):
    """The plain expression's gradients, to be differentiated further."""
    fn = partial(plain.softmax_attention, mask=mask, scale=scale)
    return plain.pullback(fn, q, k, v)(dout)


def _fold(members: int, x: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """A mapped axis joins the batch axis; a mask that no sample differs in stays as it is."""
    if x is None or (dim is None and x.dtype == torch.bool and x.shape[0] == 1):
        return x
    x = front(x, dim, members)
    return x.expand(members, batch, *x.shape[2:]).flatten(0, 1)


class _Flash(Function):
    """`(scale, q, k, v, mask) -> out, logsumexp` by the CPU's fused kernel, all of four axes."""

    @staticmethod
    def forward(scale, q, k, v, mask):
        bias = _bias(mask, q, q.shape[-2], k.shape[-2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_dense(q, k, v), 0.0, False, attn_mask=bias, scale=scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale, q, k, v, mask = inputs
        out, logsumexp = output
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(q, k, v, mask, out, logsumexp)

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, mask, out, logsumexp = ctx.saved_tensors
        if forward_levels():
            gradients = _gradients(q, k, v, mask, ctx.scale, dout)
        else:
            gradients = _FlashBackward.apply(ctx.scale, dout, q, k, v, mask, out, logsumexp)
        return None, *gradients, None

    @staticmethod
    def vmap(info, in_dims, scale, q, k, v, mask):
        _, q_dim, k_dim, v_dim, mask_dim = in_dims
        batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        folded = [
            _fold(info.batch_size, x, dim, batch)
            for x, dim in ((q, q_dim), (k, k_dim), (v, v_dim), (mask, mask_dim))
        ]
        outputs = _Flash.apply(scale, *folded)
        return tuple(x.unflatten(0, (info.batch_size, batch)) for x in outputs), (0, 0)


class _FlashBackward(Function):
    """`(scale, dout, q, k, v, mask, out, logsumexp) -> dq, dk, dv`."""

    @staticmethod
    def forward(scale, dout, q, k, v, mask, out, logsumexp):
        bias = _bias(mask, q, q.shape[-2], k.shape[-2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_dense(dout, q, k, v, out), logsumexp, 0.0, False, attn_mask=bias, scale=scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale, dout, q, k, v, mask, _, _ = inputs
        ctx.save_for_backward(dout, q, k, v, mask)

    @staticmethod
    def backward(ctx, *cotangents):
        dout, q, k, v, mask = ctx.saved_tensors
        # out and logsumexp are functions of q, k and v: their share is in those gradients
        pulled = plain.pullback(
            lambda dout, q, k, v: _gradients(q, k, v, mask, ctx.scale, dout), dout, q, k, v
        )(cotangents)
        return None, *pulled, None, None, None

    @staticmethod
    def vmap(info, in_dims, scale, dout, q, k, v, mask, out, logsumexp):
        dims = in_dims[1:]
        tensors = (dout, q, k, v, mask, out, logsumexp)
        q_dim = dims[1]
        batch = q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        folded = [
            _fold(info.batch_size, x, dim, batch) for x, dim in zip(tensors, dims, strict=True)
        ]
        gradients = _FlashBackward.apply(scale, *folded)
        return tuple(x.unflatten(0, (info.batch_size, batch)) for x in gradients), (0, 0, 0)


def _apply(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Four axes each; torch.compile keeps this function whole (see `keep_whole`)."""
    if forward_levels() or (q.device.type != "cpu" and grad_levels() > 1):
        return plain.softmax_attention(q, k, v, mask, scale)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    # the CPU's kernel would round the weights to half precision before they meet the values
    dtype, (q, k, v) = q.dtype, (plain.wide(x) for x in (q, k, v))
    # asked of plain tensors of these sizes: the question has no rule of its own under vmap
    samples = [torch.empty(1, 1, *x.shape[-2:], dtype=x.dtype, device=x.device) for x in (q, k, v)]
    backend = torch.ops.aten._fused_sdp_choice(*samples, None, 0.0, False, scale=scale)
    if backend != _FLASH:
        return plain.softmax_attention(q, k, v, mask, scale).to(dtype)
    return _Flash.apply(scale, q, k, v, mask)[0].to(dtype)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`softmax(scale q k^T) v`, `(..., H, N, d)`, by torch's fused kernel wherever there is one.

    A query whose keys are all masked gets zeros. Holds under every transform of `torch.func`; on
    the CPU also under double backward. On CUDA a second derivative by `torch.autograd` alone (not
    `torch.func`) is refused by torch's kernel.

    Args:
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, M, e)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.
        scale: of the scores; default `d^-1/2`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check("softmax_attention", q, k, mask, scale, v=v)
    if v.dim() < 3 or v.shape[-2] != k.shape[-2] or v.dtype != q.dtype:
        raise ValueError(
            f"`softmax_attention` needs `v` (..., H, {k.shape[-2]}, e) in {q.dtype}, for the keys "
            f"of `k`, got {tuple(v.shape)} in {v.dtype}. Project v from the same tokens as k."
        )
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    *lead, heads = broadcast_leading(
        "softmax_attention",
        q=q.shape[:-2],
        k=k.shape[:-2],
        v=v.shape[:-2],
        mask=() if mask is None else mask.shape[:-2],
    )
    batch, rows = math.prod(lead), q.shape[-2]
    q, k, v = (x.expand(*lead, heads, *x.shape[-2:]) for x in (q, k, v))
    q, k, v = (x.reshape(batch, heads, *x.shape[-2:]) for x in (q, k, v))
    some = None
    if mask is not None:
        mask = flat_mask(mask, lead).expand(-1, -1, -1, k.shape[-2])
        # fused kernels differ in what a row of nothing is: it attends to all, then becomes zero
        some = mask.any(-1, keepdim=True)
        mask = mask | ~some
    if torch.compiler.is_compiling():
        _keep_whole()
    out = v.new_zeros(0, heads, rows, v.shape[-1])
    if batch:
        out = _apply(q, k, v, mask, factor)
    if some is not None:
        out = torch.where(some, out, 0)
    return out.reshape(*lead, heads, rows, v.shape[-1])


def _keep_whole() -> bool:
    torch.compiler.allow_in_graph(_apply)
    return True


# run, not traced, by torch.compile, as in `kart.kernels.core`
_keep_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]
