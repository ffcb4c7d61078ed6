"""The shell of a product whose forward and backward are each one fused call on whole tensors.

A raw call has no derivative, no batching rule and no forward mode. `apply` gives it those: a first
derivative by the raw backward, further ones by the expression it stands for, and folding for
`vmap`. Under forward mode callers take that expression themselves.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels import plain
from kart.kernels.family import recording
from kart.kernels.transforms import Quick, batchable, forward_levels, front, recorded


class Fused(NamedTuple):
    """A product of `inputs`, each `(B, ...)`, those at the indices `shared` also `(1, ...)`, or
    None; the first has B.

    `forward(*inputs)` gives the `count` outputs and then what the backward needs of it.
    `backward(gradients, inputs, results)` gives the gradients of the inputs at the indices
    `learned`, from those of the outputs and all results of the forward. `expression(*inputs)` gives
    the outputs by operations that can be differentiated. `reads` says whether the raw calls read
    memory, as compiled ones do; those that are torch's own operations take any tensor.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor]]
    expression: Callable[..., tuple[Tensor, ...]]
    count: int
    learned: tuple[int, ...]
    shared: tuple[int, ...]
    reads: bool = True


def apply(op: Fused, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of a fused product."""
    # a graph recorded of real tensors has no trace of what is written from outside of torch; of
    # fake ones, as in export, whoever calls this has seen to it
    if recording() and type(inputs[0]) in (Tensor, torch.nn.Parameter):
        return tuple(op.expression(*inputs))
    return _run(op, inputs)[: op.count]


def _run(op: Fused, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The results of the forward; of no samples the outputs alone, without a kernel."""
    some = inputs[0] is not None and inputs[0].shape[0]
    if not some:
        return tuple(op.expression(*inputs))
    return _Forward.apply(op, *inputs) if recorded() else _raw_forward(op, inputs)


# what takes the operations on tensors of a type; torch's stubs bind it wrongly
_dispatch = operator.attrgetter("__torch_dispatch__")


def _readable(op: Fused, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Tensors as a raw call may read them, with no negation put off (`z.conj().imag`); None where
    one has no memory of its own to read, as a fake one.
    """
    if not op.reads:
        return list(tensors)
    plain = _dispatch(Tensor)
    if any(x is not None and _dispatch(type(x)) is not plain for x in tensors):
        return None
    return [x if x is None else x.resolve_neg() for x in tensors]


def _raw_forward(op: Fused, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    read = _readable(op, inputs)
    return tuple(op.expression(*inputs) if read is None else op.forward(*read))


def _raw_backward(
    op: Fused, gradients: Sequence[Any], inputs: Sequence[Any], results: Sequence[Tensor]
) -> Sequence[Tensor]:
    read = _readable(op, (*gradients, *inputs))
    if read is None:
        # views: autograd keeps no input of a Function that is its output, too
        return [x.view_as(x) for x in _pulled(op, inputs, gradients)]
    return op.backward(tuple(read[: op.count]), read[op.count :], results)


def _pulled(op: Fused, inputs: Sequence[Any], gradients: Sequence[Any]) -> tuple[Tensor, ...]:
    """The gradients of the learned inputs, to be differentiated further."""

    def expression(*learned: Tensor) -> tuple[Tensor, ...]:
        return tuple(op.expression(*_replaced(op, inputs, learned)))

    return plain.pullback(expression, *(inputs[i] for i in op.learned))(tuple(gradients))


def _replaced(op: Fused, inputs: Sequence[Any], learned: Sequence[Tensor]) -> list[Any]:
    """The inputs with others for the learned ones."""
    values = list(inputs)
    for i, x in zip(op.learned, learned, strict=True):
        values[i] = x
    return values


class _Fold:
    """A mapped axis of P members joins the batch axis."""

    def __init__(self, members: int, first: Tensor, dim: int | None):
        self.members = members
        self.batch = first.shape[0] if dim is None else first.movedim(dim, 0).shape[1]

    def tensor(self, x: Tensor | None, dim: int | None, shared: bool) -> Tensor | None:
        if x is None or (shared and dim is None and x.shape[0] == 1):
            return x
        x = front(x, dim, self.members)
        return x.expand(self.members, self.batch, *x.shape[2:]).flatten(0, 1)

    def out(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.members, self.batch))


class _Forward(Quick):
    """`(op, *inputs) -> (*outputs, *rest)`."""

    @staticmethod
    def forward(op, *inputs):
        return _raw_forward(op, inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, *tensors = inputs
        ctx.mark_non_differentiable(*output[ctx.op.count :])
        # what is only kept for the backward may be as large as an output: no zeros are made for it
        ctx.set_materialize_grads(False)
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @batchable
    def backward(ctx, *gradients):
        op, saved = ctx.op, ctx.saved_tensors  # asked for once: each time all are unpacked
        inputs, results = saved[: ctx.inputs], saved[ctx.inputs :]
        gradients = tuple(
            torch.zeros_like(y) if g is None else g
            for g, y in zip(gradients[: op.count], results, strict=False)
        )
        if forward_levels():
            pulled = _pulled(op, inputs, gradients)
        elif recorded():
            pulled = _Backward.apply(op, len(inputs), *gradients, *inputs, *results)
        else:
            pulled = _raw_backward(op, gradients, inputs, results)
        found = dict(zip(op.learned, pulled, strict=True))
        return None, *(found.get(i) for i in range(len(inputs)))

    @staticmethod
    def vmap(info, in_dims, op, *inputs):
        dims = in_dims[1:]
        fold = _Fold(info.batch_size, inputs[0], dims[0])
        folded = [
            fold.tensor(x, dim, i in op.shared)
            for i, (x, dim) in enumerate(zip(inputs, dims, strict=True))
        ]
        results = _run(op, folded)
        return tuple(fold.out(x) for x in results), (0,) * len(results)


class _Backward(Quick):
    """`(op, number of inputs, *gradients, *inputs, *results) -> gradients of what is learned`."""

    @staticmethod
    def forward(op, size, *tensors):
        gradients, rest = tensors[: op.count], tensors[op.count :]
        return tuple(_raw_backward(op, gradients, rest[:size], rest[size:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.size, *tensors = inputs
        ctx.total = len(tensors)
        ctx.save_for_backward(*tensors[: ctx.op.count + ctx.size])

    @staticmethod
    @batchable
    def backward(ctx, *cotangents):
        op, count, saved = ctx.op, ctx.op.count, ctx.saved_tensors
        gradients, inputs = saved[:count], saved[count:]

        # the results of the forward are functions of the inputs: their share is in those gradients
        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            return _pulled(op, _replaced(op, inputs, tensors[count:]), tensors[:count])

        learned = (inputs[i] for i in op.learned)
        pulled = plain.pullback(first, *gradients, *learned)(tuple(cotangents))
        found = dict(zip(op.learned, pulled[count:], strict=True))
        rest = [found.get(i) for i in range(ctx.size)]
        return None, None, *pulled[:count], *rest, *[None] * (ctx.total - count - ctx.size)

    @staticmethod
    def vmap(info, in_dims, op, size, *tensors):
        dims, count = in_dims[2:], op.count
        fold = _Fold(info.batch_size, tensors[count], dims[count])
        # every member wants its own gradient, so each gets its own copy of what is learned
        shared = {count + i for i in op.shared if i not in op.learned}
        folded = [
            fold.tensor(x, dim, i in shared)
            for i, (x, dim) in enumerate(zip(tensors, dims, strict=True))
        ]
        if folded[count].shape[0]:
            pulled = _Backward.apply(op, size, *folded)
        else:
            pulled = _pulled(op, folded[count : count + size], folded[:count])
        pulled = [fold.out(x) for x in pulled]
        for at, i in enumerate(op.learned):
            x, dim = tensors[count + i], dims[count + i]
            batch = x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]
            if batch != fold.batch:  # one for all samples
                pulled[at] = pulled[at].sum(1, keepdim=True)
        return tuple(pulled), (0,) * len(pulled)
