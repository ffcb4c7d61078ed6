"""The entry to the streamed product that holds under every transform, over several engines.

`contract` brings its arguments to a `kart.kernels.family.Product` and applies a pair of
`autograd.Function`s, forward and backward, each with its own derivative, forward mode and folding
rule for `vmap`. They call two operations of torch's library, `torch.ops.kart.contract_forward` and
`contract_backward`, which choose the engine and which `torch.compile` keeps as one node each. Those
carry no autograd of their own: a registered one fails under `torch.func.grad` (pytorch#170834) and
is silently zero in forward mode.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kart import schema
from kart.kernels import chunked, cpp, plain, triton
from kart.kernels.arguments import (
    broadcast_leading,
    check,
    flat_mask,
    four_axes,
    laid_like,
    room_like,
)
from kart.kernels.family import Family, Product, family_named, family_of, pin, recordable
from kart.kernels.transforms import Quick, batchable, forward_levels, front, no_autocast, recorded

ENGINES = ("auto", "torch", "cpp", "triton", "plain")


def _pin(basis: Any) -> tuple[str, int]:
    """Name and number of features of a basis for a graph being compiled; Dynamo runs it while
    tracing.
    """
    # traced into, Dynamo would inline the forward and drop the rules of the Function. Said here and
    # not at import, where it would cost two seconds
    torch.compiler.allow_in_graph(_apply)
    family = pin(family_of(basis))
    return family.name, family.width


# what torch.compiler.assume_constant_result sets, without importing the compiler
_pin._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- the raw operations ---------------------------------------------------------------------------


def choose(engine: str, product: Product) -> tuple[Any, str]:
    """The engine that runs a raw product, None if the one that was asked for cannot, and why
    another was not taken.
    """
    device = product.q.device.type
    compiled = {"cpu": ("cpp", cpp), "cuda": ("triton", triton)}
    name, module = compiled.get(device, ("", None))
    if engine == "triton":  # its interpreter runs on the CPU
        name, module = "triton", triton
    if engine == "torch" or (engine == "auto" and module is None) or not product.q.shape[0]:
        return chunked, ""
    if module is None or engine not in ("auto", name):
        return None, f"it does not run on {device} tensors"
    reason = module.refuses(product)
    if not reason:
        return module, ""
    return (chunked if engine == "auto" else None), reason


def engine_for(engine: str, product: Product) -> Any:
    """The module that runs a raw product; ValueError where the one that was asked for cannot."""
    module, reason = choose(engine, product)
    if module is None:
        raise ValueError(
            f"`contract` cannot run engine={engine!r} here: {reason}. Pass engine='auto'."
        )
    return module


_library = torch.library.Library("kart", "FRAGMENT")
_library.define(
    "contract_forward(Tensor q, Tensor k, Tensor coefs, Tensor? mask, float scale, str basis, "
    "str engine) -> Tensor"
)
_library.define(
    "contract_backward(Tensor dy, Tensor q, Tensor k, Tensor coefs, Tensor? mask, float scale, "
    "str basis, str engine) -> (Tensor, Tensor, Tensor)"
)


def _raw_forward(q, k, coefs, mask, scale, basis, engine):
    product = Product(family_named(basis), q, k, coefs, mask, scale)
    with no_autocast(q), torch.no_grad():
        return engine_for(engine, product).forward(product)


def _raw_backward(dy, q, k, coefs, mask, scale, basis, engine):
    product = Product(family_named(basis), q, k, coefs, mask, scale)
    with no_autocast(q), torch.no_grad():
        dq, dk, dcoefs = engine_for(engine, product).backward(product, dy)
    # one layout whatever the engine, that recorded graphs know
    return laid_like(dq, q), laid_like(dk, k), dcoefs


for _name, _implementation in (
    ("contract_forward", _raw_forward),
    ("contract_backward", _raw_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    # no kernel of its own and no bookkeeping: the Functions below are the autograd
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("kart::contract_forward", lib=_library)
def _fake_forward(q, k, coefs, mask, scale, basis, engine):
    return q.new_empty(*q.shape[:3], coefs.shape[2])


@torch.library.register_fake("kart::contract_backward", lib=_library)
def _fake_backward(dy, q, k, coefs, mask, scale, basis, engine):
    return room_like(q), room_like(k), coefs.new_empty(coefs.shape)


# --- folding a vmapped axis into the raw layout ---------------------------------------------------


class _Fold:
    """How a mapped axis of P members enters the raw layout, and leaves it again.

    Members that share coefficients are more samples: they join the batch axis. Members with
    coefficients of their own are more heads where a batch shares them, and more samples where every
    sample has its own already.
    """

    def __init__(self, members: int, shape: Sequence[int], coefs_batch: int, own: bool):
        self.members = members
        self.axis = 1 if own and coefs_batch == 1 != shape[0] else 0
        self.size = shape[self.axis]

    def tensor(self, x: Tensor, dim: int | None) -> Tensor:
        """`(B, H, ...)` with its mapped axis at `dim`, to `(P B, H, ...)` or `(B, P H, ...)`."""
        x = front(x, dim, self.members)
        return x.movedim(0, self.axis).flatten(self.axis, self.axis + 1)

    def mask(self, mask: Tensor | None, dim: int | None) -> Tensor | None:
        if mask is None or (dim is None and mask.shape[self.axis] == 1):
            return mask
        mapped = front(mask, dim, self.members)
        sizes = list(mapped.shape)
        sizes[self.axis + 1] = self.size
        return mapped.expand(sizes).movedim(0, self.axis).flatten(self.axis, self.axis + 1)

    def out(self, x: Tensor) -> Tensor:
        return x.unflatten(self.axis, (self.members, self.size))


def _logical(x: Tensor, dim: int | None) -> list[int]:
    shape = list(x.shape)
    if dim is not None:
        del shape[dim]
    return shape


# --- the pair of Functions ------------------------------------------------------------------------


def _zeros(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(x) if t is None else t for t, x in zip(tangents, primals, strict=True)
    )


def _plain(family: Family, q, k, coefs, mask, scale) -> Tensor:
    with no_autocast(q):
        return plain.contract(family.basis, coefs, q, k, mask, scale)


class _Forward(Quick):
    """`(family, engine, scale, q, k, coefs, mask) -> y`, in the raw layout."""

    @staticmethod
    def forward(family, engine, scale, q, k, coefs, mask):
        name = recordable(family)
        return torch.ops.kart.contract_forward(q, k, coefs, mask, scale, name, engine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.family, ctx.engine, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @batchable
    def backward(ctx, dy):
        q, k, coefs, mask = ctx.saved_tensors
        if forward_levels() > 1:
            # torch loses the tangents of a Function under two forward levels (pytorch#197867)
            gradients = plain.pullback(
                lambda q, k, coefs: _plain(ctx.family, q, k, coefs, mask, ctx.scale), *(q, k, coefs)
            )(dy)
        else:
            backward = _Backward.apply if recorded() else _Backward.forward
            gradients = backward(ctx.family, ctx.engine, ctx.scale, dy, q, k, coefs, mask)
        return None, None, None, *gradients, None

    @staticmethod
    def jvp(ctx, _family, _engine, _scale, tq, tk, tcoefs, _mask):
        *primals, mask = ctx.saved_tensors
        with no_autocast(primals[0]):
            return chunked.tangent(
                ctx.family, tuple(primals), _zeros((tq, tk, tcoefs), primals), mask, ctx.scale
            )

    @staticmethod
    def vmap(info, in_dims, family, engine, scale, q, k, coefs, mask):
        _, _, _, q_dim, k_dim, coefs_dim, mask_dim = in_dims
        members = info.batch_size
        if coefs_dim is not None and q_dim is None and k_dim is None and mask_dim is None:
            # more units on the same scores, which are computed once
            stacked = coefs.movedim(coefs_dim, 2).flatten(2, 3)
            y = _Forward.apply(family, engine, scale, q, k, stacked, mask)
            return y.unflatten(-1, (members, _logical(coefs, coefs_dim)[2])), 3
        shape = _logical(q, q_dim)
        own = coefs_dim is not None or coefs.shape[0] != 1
        fold = _Fold(members, shape, _logical(coefs, coefs_dim)[0], own)
        y = _Forward.apply(
            family,
            engine,
            scale,
            fold.tensor(q, q_dim),
            fold.tensor(k, k_dim),
            fold.tensor(coefs, coefs_dim) if own else coefs,
            fold.mask(mask, mask_dim),
        )
        return fold.out(y), fold.axis


class _Backward(Quick):
    """`(family, engine, scale, dy, q, k, coefs, mask) -> dq, dk, dcoefs`, in the raw layout."""

    @staticmethod
    def forward(family, engine, scale, dy, q, k, coefs, mask):
        name = recordable(family)
        return torch.ops.kart.contract_backward(dy, q, k, coefs, mask, scale, name, engine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.family, _, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @batchable
    def backward(ctx, *cotangents):
        # <u, dq> + <v, dk> + <w, dcoefs> is <dy, tangent of y along (u, v, w)>
        dy, *primals, mask = ctx.saved_tensors
        family, scale = ctx.family, ctx.scale
        directions = _zeros(cotangents, primals)
        with no_autocast(dy):
            first = chunked.tangent(family, tuple(primals), directions, mask, scale)
            second = chunked.backward_tangent(
                family, (dy, *primals), (torch.zeros_like(dy), *directions), mask, scale
            )
        return None, None, None, first, *second, None

    @staticmethod
    def jvp(ctx, _family, _engine, _scale, tdy, tq, tk, tcoefs, _mask):
        *primals, mask = ctx.saved_tensors
        with no_autocast(primals[0]):
            return chunked.backward_tangent(
                ctx.family, tuple(primals), _zeros((tdy, tq, tk, tcoefs), primals), mask, ctx.scale
            )

    @staticmethod
    def vmap(info, in_dims, family, engine, scale, dy, q, k, coefs, mask):
        _, _, _, dy_dim, q_dim, k_dim, coefs_dim, mask_dim = in_dims
        shape = _logical(q, q_dim)
        # every member wants its own gradient of the coefficients, so each gets its own coefficients
        fold = _Fold(info.batch_size, shape, _logical(coefs, coefs_dim)[0], True)
        gradients = _Backward.apply(
            family,
            engine,
            scale,
            fold.tensor(dy, dy_dim),
            fold.tensor(q, q_dim),
            fold.tensor(k, k_dim),
            fold.tensor(coefs, coefs_dim),
            fold.mask(mask, mask_dim),
        )
        return tuple(fold.out(x) for x in gradients), (fold.axis,) * 3


def _apply(
    name: str, engine: str, scale: float, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None
) -> Tensor:
    """The product in the raw layout; torch.compile keeps this function whole (see `_pin`)."""
    family = family_named(name)
    if forward_levels() > 1:
        return _plain(family, q, k, coefs, mask, scale)
    forward = _Forward.apply if recorded() else _Forward.forward
    return forward(family, engine, scale, q, k, coefs, mask)


# --- the entry ------------------------------------------------------------------------------------


def contract(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """The streamed product of KArAt, `(..., H, N, r)`: `y[n, p] = sum_m mask[n, m] sum_j
    features(scale q_n . k_m)[j] coefs[p, m, j]`.

    No N x M x K tensor is held, forward or backward. Scores and sums are at least float32; the
    result has q's dtype. Holds under every transform of `torch.func`, under `torch.autograd` of any
    order, and in `torch.compile(fullgraph=True)`. Forward mode and second derivatives hold the
    features of some samples at a time; under two or more forward levels, those of all.

    Args:
        basis: a basis that is linear in its coefficients: `features` maps `(...)` to `(..., K)`.
        coefs: `(..., H, r, M, K)`, the features' last axis K including the base activation;
            leading axes broadcast with q's.
        q, k: `(..., H, N, d)` and `(..., H, M, d)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.
        scale: of the scores; default `d^-1/2`.
        engine: "auto" (by device), "torch", "cpp", "triton", or "plain", the materialised
            reference.

    Raises:
        ValueError: names the argument that does not fit.
    """
    schema.check_choice("contract", "engine", engine, ENGINES)
    if basis.features is None:
        raise ValueError(
            f"`contract` needs a basis that is linear in its coefficients, got {basis.family!r}. "
            "Use `contract_units`."
        )
    check("contract", q, k, mask, scale, coefs=coefs)
    if torch.compiler.is_compiling():
        name, width = _pin(basis)
    else:
        family = family_of(basis)  # held until the Function holds it
        name, width = family.name, family.width
    if coefs.dim() < 4 or coefs.shape[-2:] != (k.shape[-2], width) or 0 in coefs.shape[-4:-2]:
        raise ValueError(
            f"`contract` needs `coefs` (..., H, r, {k.shape[-2]}, {width}) with r >= 1, for the "
            f"keys of `k` and the features of {basis.family}, got {tuple(coefs.shape)}. "
            "Call `init` of the operator for this number of keys."
        )
    *lead, heads = broadcast_leading("contract", q=q, k=k, coefs=coefs.shape[:-3], mask=mask)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if engine == "plain":
        with no_autocast(q):
            return plain.contract(basis, coefs, q, k, mask, factor)

    rows, keys, units = q.shape[-2], k.shape[-2], coefs.shape[-3]
    # numbers of axes first: tuples of any lengths are compared by their elements, and in a graph
    # that is exported a batch that is as large as the heads would be one for good
    usual = coefs.dim() == 4 and coefs.shape[0] == heads and len(lead) == 1
    if usual and q.shape[:-2] == k.shape[:-2] == (*lead, heads):
        # as a model has them: eight views that change nothing cost as much as a small product
        mask = None if mask is None else flat_mask(mask, lead)
        return _apply(name, engine, factor, q, k, coefs[None], mask)
    # leading axes along which the coefficients differ, and those along which they are shared
    coefs = coefs.reshape((1,) * (len(lead) + 4 - coefs.dim()) + coefs.shape)
    own = [i for i in range(len(lead)) if coefs.shape[i] > 1]
    shared = [i for i in range(len(lead)) if coefs.shape[i] == 1]
    count = len(lead)
    coefs = coefs.expand(*coefs.shape[:count], heads, units, keys, width)
    if math.prod([lead[i] for i in shared]) == 1 or not own:
        q, k = four_axes([*lead, heads], q, k)
        coefs = coefs.reshape(math.prod(coefs.shape[:count]), heads, units, keys, width)
        mask = None if mask is None else flat_mask(mask, lead)
        y = _apply(name, engine, factor, q, k, coefs, mask)
        return y.reshape(*lead, heads, rows, units)
    # coefficients of their own for some leading axes and not for others: those become heads
    order = [*shared, *own]
    group = math.prod([lead[i] for i in own])
    batch = math.prod([lead[i] for i in shared])

    def fold(x: Tensor) -> Tensor:
        x = x.expand(*lead, heads, *(1, 1, *x.shape)[-2:])
        x = x.permute(*order, *range(count, count + 3))
        return x.reshape(batch, group * heads, *x.shape[-2:])

    coefs = coefs.permute(*order, *range(count, count + 4))
    coefs = coefs.reshape(1, group * heads, units, keys, width)
    mask = None if mask is None else fold(mask)
    y = _apply(name, engine, factor, fold(q), fold(k), coefs, mask)
    y = y.reshape(*(lead[i] for i in order), heads, rows, units)
    return y.permute(*(order.index(i) for i in range(count)), count, count + 1, count + 2)


def engines() -> dict[str, str]:
    """Each engine of `contract` and whether it can run here: "ready", or why not.

    `engine="auto"` takes "triton" on CUDA and "cpp" on the CPU where they are ready and know the
    basis and dtype, and "torch" otherwise.
    """
    return {"torch": "ready", "cpp": cpp.status(), "triton": triton.status()}
