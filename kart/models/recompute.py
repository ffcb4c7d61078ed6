"""Parts of a model that are computed again in the backward: memory for a third more time."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kart import tree
from kart.kernels.plain import pullback
from kart.kernels.transforms import autocasting, batchable, forward_levels

Params = Any
Part = Callable[[Params, Tensor], Tensor]


class _Again(Function):
    """`fn(*tensors)`, of which only the tensors are kept for the backward.

    torch.utils.checkpoint does the same, but not under torch.func.
    """

    # only torch operations inside, or Functions with rules of their own: torch derives this one
    generate_vmap_rule = True

    @staticmethod
    def forward(fn, *tensors):
        return fn(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        # the backward runs outside of the caller's autocast
        device = output.device.type
        on = autocasting(output)
        ctx.autocast = (device, torch.get_autocast_dtype(device)) if on else None

    @staticmethod
    @batchable
    def backward(ctx, gradient):
        again = contextlib.nullcontext()
        if ctx.autocast is not None:
            again = torch.autocast(ctx.autocast[0], ctx.autocast[1])
        with again:
            pull = pullback(ctx.fn, *ctx.saved_tensors)
        return None, *pull(gradient)


def recomputed(part: Part) -> Part:
    """`part(params, x)`, whose backward computes it again from `params` and `x`: the same numbers,
    without what it would keep. All that is learned must be in `params`.

    Forward mode keeps nothing in any case and a compiled graph plans its memory by itself: both
    take the part as it is.
    """

    def run(params: Params, x: Tensor) -> Tensor:
        if forward_levels() or torch.compiler.is_compiling():
            return part(params, x)

        def of_leaves(x: Tensor, *leaves: Tensor) -> Tensor:
            return part(tree.with_leaves(params, leaves), x)

        return _Again.apply(of_leaves, x, *tree.leaves(params))  # type: ignore[no-any-return]

    return run
