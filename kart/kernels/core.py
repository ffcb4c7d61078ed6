"""The entry to the streamed product that holds under every transform, over several engines.

`contract` brings its arguments to the raw layout of `kart.kernels.chunked` and applies a pair of
`autograd.Function`s, forward and backward, each with its own derivative, forward mode and folding
rule for `vmap`. They call two operations of torch's library, `torch.ops.kart.contract_forward` and
`contract_backward`, which choose the engine and which `torch.compile` keeps as one node each. Those
carry no autograd of their own: a registered one fails under `torch.func.grad` (pytorch#170834) and
is silently zero in forward mode.
"""

import contextlib
import math
import sys
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # its one home; no stubs
from torch.autograd import Function, forward_ad

from kart.kernels import chunked, cpp, plain, triton
from kart.kernels.chunked import Family

ENGINES = ("auto", "torch", "cpp", "triton", "plain")


# --- what a basis is to the kernels ---------------------------------------------------------------


class Handle:
    """A basis under a name: the operations of torch's library take strings, not functions."""

    def __init__(self, name: str, family: Family):
        self.name = name
        self.family = family


# handles live as long as a caller, an autograd graph or `_pinned` holds them
_handles: "weakref.WeakValueDictionary[str, Handle]" = weakref.WeakValueDictionary()
_names: "weakref.WeakKeyDictionary[Callable, tuple[str, int, int | None]]" = (
    weakref.WeakKeyDictionary()
)
# those of recorded graphs, which know them by name only
_pinned: set[Handle] = set()


def _recordable(handle: Handle) -> str:
    """The name of the handle, which stays valid for good where a graph is being recorded."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if tracer is not None and tracer.get_proxy_mode() is not None:
        _pinned.add(handle)
    return handle.name


def _is_fourier(basis: Any) -> bool:
    """Whether `basis` is what the Fourier kernels compute: its family claims it, its features are
    asked.
    """
    grid = basis.size // 2
    if basis.family != "fourier" or basis.size != 2 * grid or not grid:
        return False
    x = torch.tensor([-2.5, -0.3, 0.0, 1.1, 3.0], dtype=torch.float64)
    angles = x[:, None] * torch.arange(1, grid + 1, dtype=x.dtype)
    features = basis.features(x)
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return features.shape == expected.shape and torch.allclose(features, expected, atol=1e-9 * grid)


def handle_of(basis: Any) -> Handle:
    """The handle of a basis that is linear in its coefficients."""
    known = _names.get(basis.features)
    if known is None:
        # asked on plain tensors, whatever transform is running
        with torch._C._DisableFuncTorch(), torch.no_grad():
            width = basis.features(torch.zeros(1)).shape[-1]
            grid = _is_fourier(basis) and basis.size // 2 or None
        # a fresh name for what is no built-in: compile caches on disk must not confuse two of them
        name = f"fourier:{grid}" if grid else f"{basis.family}:{uuid.uuid4().hex}"
        known = (name, width, grid)
        with contextlib.suppress(TypeError):  # features that have no weak reference
            _names[basis.features] = known
    name, width, grid = known
    handle = _handles.get(name)
    if handle is None:
        handle = Handle(name, Family(basis, basis.features, width, grid))
        _handles[name] = handle
    return handle


def _pin(basis: Any) -> tuple[str, int]:
    """Name and number of features of a basis for a graph being compiled; Dynamo runs it while
    tracing.
    """
    # traced into, Dynamo would inline the forward and drop the rules of the Function. Said here and
    # not at import, where it would cost two seconds
    torch.compiler.allow_in_graph(_apply)
    handle = handle_of(basis)
    _pinned.add(handle)
    return handle.name, handle.family.width


# what torch.compiler.assume_constant_result sets, without importing the compiler
_pin._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- the raw operations ---------------------------------------------------------------------------


def choose(
    engine: str, family: Family, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None
) -> tuple[Any, str]:
    """The engine that runs the raw operations on these tensors, None if the one that was asked for
    cannot, and why another was not taken.
    """
    device = q.device.type
    compiled = {"cpu": ("cpp", cpp), "cuda": ("triton", triton)}
    name, module = compiled.get(device, ("", None))
    if engine == "triton":  # its interpreter runs on the CPU
        name, module = "triton", triton
    if engine == "torch" or (engine == "auto" and module is None) or not q.shape[0]:
        return chunked, ""
    if module is None or engine not in ("auto", name):
        return None, f"it does not run on {device} tensors"
    reason = module.refuses(family, q, k, coefs, mask)
    if not reason:
        return module, ""
    return (chunked if engine == "auto" else None), reason


def _run(engine: str, family: Family, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None):
    module, reason = choose(engine, family, q, k, coefs, mask)
    if module is None:
        raise ValueError(
            f"`contract` cannot run engine={engine!r} here: {reason}. Pass engine='auto'."
        )
    return module


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast, which would round the scores to bfloat16."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


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
    family = _handles[basis].family
    with no_autocast(q), torch.no_grad():
        return _run(engine, family, q, k, coefs, mask).forward(family, q, k, coefs, mask, scale)


def _raw_backward(dy, q, k, coefs, mask, scale, basis, engine):
    family = _handles[basis].family
    with no_autocast(q), torch.no_grad():
        module = _run(engine, family, q, k, coefs, mask)
        return module.backward(family, dy, q, k, coefs, mask, scale)


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
    return q.new_empty(q.shape), k.new_empty(k.shape), coefs.new_empty(coefs.shape)


# --- folding a vmapped axis into the raw layout ---------------------------------------------------


def front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped axis first; a view that repeats `x` where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


class _Fold:
    """How a mapped axis of P members enters the raw layout, and leaves it again.

    Members that share coefficients are more samples: they join the batch axis. Members with
    coefficients of their own are more heads where a batch shares them, and more samples where every
    sample has its own already.
    """

    def __init__(self, members: int, batch: int, own: bool):
        self.members = members
        self.axis = 1 if own and batch != 1 else 0
        self.own = own

    def tensor(self, x: Tensor, dim: int | None) -> Tensor:
        """`(B, H, ...)` with its mapped axis at `dim`, to `(P B, H, ...)` or `(B, P H, ...)`."""
        x = front(x, dim, self.members)
        return x.movedim(0, self.axis).flatten(self.axis, self.axis + 1)

    def mask(self, mask: Tensor | None, dim: int | None, shape: Sequence[int]) -> Tensor | None:
        if mask is None or (dim is None and mask.shape[self.axis] == 1):
            return mask
        mapped = front(mask, dim, self.members)
        sizes = list(mapped.shape)
        sizes[self.axis + 1] = shape[self.axis]
        return mapped.expand(sizes).movedim(0, self.axis).flatten(self.axis, self.axis + 1)

    def out(self, x: Tensor) -> Tensor:
        return x.unflatten(self.axis, (self.members, -1 if x.shape[self.axis] else 0))


def _logical(x: Tensor, dim: int | None) -> list[int]:
    shape = list(x.shape)
    if dim is not None:
        del shape[dim]
    return shape


# --- the pair of Functions ------------------------------------------------------------------------


def _levels(kind: Any) -> int:
    return sum(level.key() == kind for level in _functorch.get_interpreter_stack() or [])


def forward_levels() -> int:
    """Number of forward-mode levels that are running: `torch.func.jvp` and dual levels."""
    levels = _levels(_functorch.TransformType.Jvp)
    return max(levels, int(forward_ad._current_level >= 0))


def grad_levels() -> int:
    """Number of `torch.func.grad` levels that are running."""
    return _levels(_functorch.TransformType.Grad)


def _zeros(tangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(x) if t is None else t for t, x in zip(tangents, primals, strict=True)
    )


def _plain(family: Family, q, k, coefs, mask, scale) -> Tensor:
    with no_autocast(q):
        return plain.contract(family.basis, coefs, q, k, mask, scale)


class _Forward(Function):
    """`(handle, engine, scale, q, k, coefs, mask) -> y`, in the raw layout."""

    @staticmethod
    def forward(handle, engine, scale, q, k, coefs, mask):
        name = _recordable(handle)
        return torch.ops.kart.contract_forward(q, k, coefs, mask, scale, name, engine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.handle, ctx.engine, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        q, k, coefs, mask = ctx.saved_tensors
        if forward_levels() > 1:
            # torch loses the tangents of a Function under two forward levels (pytorch#197867)
            gradients = plain.pullback(
                lambda q, k, coefs: _plain(ctx.handle.family, q, k, coefs, mask, ctx.scale),
                *(q, k, coefs),
            )(dy)
        else:
            gradients = _Backward.apply(ctx.handle, ctx.engine, ctx.scale, dy, q, k, coefs, mask)
        return None, None, None, *gradients, None

    @staticmethod
    def jvp(ctx, _handle, _engine, _scale, tq, tk, tcoefs, _mask):
        *primals, mask = ctx.saved_tensors
        with no_autocast(primals[0]):
            return chunked.tangent(
                ctx.handle.family,
                tuple(primals),
                _zeros((tq, tk, tcoefs), primals),
                mask,
                ctx.scale,
            )

    @staticmethod
    def vmap(info, in_dims, handle, engine, scale, q, k, coefs, mask):
        _, _, _, q_dim, k_dim, coefs_dim, mask_dim = in_dims
        members = info.batch_size
        if coefs_dim is not None and q_dim is None and k_dim is None and mask_dim is None:
            # more units on the same scores, which are computed once
            stacked = coefs.movedim(coefs_dim, 2).flatten(2, 3)
            y = _Forward.apply(handle, engine, scale, q, k, stacked, mask)
            return y.unflatten(-1, (members, -1)), 3
        shape = _logical(q, q_dim)
        own = coefs_dim is not None or coefs.shape[0] != 1
        fold = _Fold(members, shape[0] if _logical(coefs, coefs_dim)[0] == 1 else 1, own)
        y = _Forward.apply(
            handle,
            engine,
            scale,
            fold.tensor(q, q_dim),
            fold.tensor(k, k_dim),
            fold.tensor(coefs, coefs_dim) if own else coefs,
            fold.mask(mask, mask_dim, shape),
        )
        return fold.out(y), fold.axis


class _Backward(Function):
    """`(handle, engine, scale, dy, q, k, coefs, mask) -> dq, dk, dcoefs`, in the raw layout."""

    @staticmethod
    def forward(handle, engine, scale, dy, q, k, coefs, mask):
        name = _recordable(handle)
        return torch.ops.kart.contract_backward(dy, q, k, coefs, mask, scale, name, engine)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.handle, _, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        # <u, dq> + <v, dk> + <w, dcoefs> is <dy, tangent of y along (u, v, w)>
        dy, *primals, mask = ctx.saved_tensors
        family, scale = ctx.handle.family, ctx.scale
        directions = _zeros(cotangents, primals)
        with no_autocast(dy):
            first = chunked.tangent(family, tuple(primals), directions, mask, scale)
            second = chunked.backward_tangent(
                family, (dy, *primals), (torch.zeros_like(dy), *directions), mask, scale
            )
        return None, None, None, first, *second, None

    @staticmethod
    def jvp(ctx, _handle, _engine, _scale, tdy, tq, tk, tcoefs, _mask):
        *primals, mask = ctx.saved_tensors
        with no_autocast(primals[0]):
            return chunked.backward_tangent(
                ctx.handle.family,
                tuple(primals),
                _zeros((tdy, tq, tk, tcoefs), primals),
                mask,
                ctx.scale,
            )

    @staticmethod
    def vmap(info, in_dims, handle, engine, scale, dy, q, k, coefs, mask):
        _, _, _, dy_dim, q_dim, k_dim, coefs_dim, mask_dim = in_dims
        shape = _logical(q, q_dim)
        # every member wants its own gradient of the coefficients, so each gets its own coefficients
        fold = _Fold(info.batch_size, shape[0] if _logical(coefs, coefs_dim)[0] == 1 else 1, True)
        gradients = _Backward.apply(
            handle,
            engine,
            scale,
            fold.tensor(dy, dy_dim),
            fold.tensor(q, q_dim),
            fold.tensor(k, k_dim),
            fold.tensor(coefs, coefs_dim),
            fold.mask(mask, mask_dim, shape),
        )
        return tuple(fold.out(x) for x in gradients), (fold.axis,) * 3


def _apply(
    name: str, engine: str, scale: float, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None
) -> Tensor:
    """The product in the raw layout; torch.compile keeps this function whole (see `_pin`)."""
    handle = _handles[name]
    if forward_levels() > 1:
        return _plain(handle.family, q, k, coefs, mask, scale)
    return _Forward.apply(handle, engine, scale, q, k, coefs, mask)


# --- arguments ------------------------------------------------------------------------------------


def check(
    function: str,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None,
    names: tuple[str, str] = ("q", "k"),
    **others: Tensor,
) -> None:
    """Raises ValueError unless q, k, the mask and the other tensors fit together."""
    first, second = names
    for name, x in {first: q, second: k, **others}.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"`{function}` needs a tensor `{name}`, got {type(x).__name__}.")
    for name, x in {first: q, second: k}.items():
        if x.dim() < 3 or 0 in x.shape[-3:]:
            raise ValueError(
                f"`{function}` needs `{name}` (..., H, tokens, width) with no empty axis but the "
                f"leading ones, got {tuple(x.shape)}. Put the heads before the tokens."
            )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"`{function}` needs `{first}` and `{second}` of one width, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}. Project both to the same width."
        )
    for name, x in {first: q, second: k, **others}.items():
        if not x.dtype.is_floating_point:
            raise ValueError(
                f"`{function}` needs floating-point `{name}`, got {x.dtype}. Convert it with "
                "`.float()`."
            )
        if x.device != q.device:
            raise ValueError(
                f"`{function}` needs its tensors on one device, got `{first}` on {q.device} and "
                f"`{name}` on {x.device}. Move them with `.to`."
            )
        # parameters may stay float32 beside narrower activations
        if x.dtype != q.dtype and (name == second or x.dtype != plain.wide(q.new_empty(0)).dtype):
            raise ValueError(
                f"`{function}` needs `{name}` in the dtype of `{first}`, {q.dtype}, got {x.dtype}. "
                "Convert it with `.to`."
            )
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(
            f"`{function}` needs a finite number as `scale`, got {scale!r}. Leave it out for "
            "1 / sqrt(d)."
        )
    check_mask(function, mask, q.shape[-2], k.shape[-2], q.device)


def check_mask(
    function: str, mask: Tensor | None, queries: int, keys: int, device: torch.device
) -> None:
    """Raises ValueError unless the mask is boolean and broadcasts to (..., queries, keys)."""
    if mask is None:
        return
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool
    if fits:
        tail = (1, 1, *mask.shape)[-2:]
        fits = tail[0] in (1, queries) and tail[1] in (1, keys)
    if not fits:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(
            f"`{function}` needs a boolean `mask` (True = attend) broadcasting to (..., H, "
            f"{queries}, {keys}), got {got}. A mask of keys is (..., 1, 1, {keys})."
        )
    if mask.device != device:
        raise ValueError(
            f"`{function}` needs its tensors on one device, got `q` on {device} and `mask` on "
            f"{mask.device}. Move them with `.to`."
        )


def broadcast_leading(function: str, **shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of the leading axes, or ValueError."""
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(
            f"`{function}` needs leading axes that broadcast, got "
            f"{', '.join(f'`{name}` {tuple(shape)}' for name, shape in shapes.items())}. "
            "They are all axes up to and including the heads."
        ) from None


def flat_mask(mask: Tensor, lead: Sequence[int]) -> Tensor:
    """A mask as `(B or 1, H or 1, N or 1, M or 1)`, B the product of the axes before the heads."""
    mask = mask.reshape((1,) * (len(lead) + 3 - mask.dim()) + mask.shape)
    if any(size != 1 for size in mask.shape[: len(lead)]):
        mask = mask.expand(*lead, *mask.shape[len(lead) :])
    return mask.reshape(-1, *mask.shape[len(lead) :])


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
    features of one sample at a time; under two or more forward levels, those of all.

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
    if engine not in ENGINES:
        raise ValueError(
            f"`contract` needs `engine` in {list(ENGINES)}, got {engine!r}. Choose one of them."
        )
    if basis.features is None:
        raise ValueError(
            f"`contract` needs a basis that is linear in its coefficients, got {basis.family!r}. "
            "Use `contract_units`."
        )
    check("contract", q, k, mask, scale, coefs=coefs)
    if torch.compiler.is_compiling():
        name, width = _pin(basis)
    else:
        handle = handle_of(basis)  # held until the Function holds it
        name, width = handle.name, handle.family.width
    if coefs.dim() < 4 or coefs.shape[-2:] != (k.shape[-2], width) or 0 in coefs.shape[-4:-2]:
        raise ValueError(
            f"`contract` needs `coefs` (..., H, r, {k.shape[-2]}, {width}) with r >= 1, for the "
            f"keys of `k` and the features of {basis.family}, got {tuple(coefs.shape)}. "
            "Call `init` of the operator for this number of keys."
        )
    mask_lead = () if mask is None else mask.shape[:-2]
    *lead, heads = broadcast_leading(
        "contract", q=q.shape[:-2], k=k.shape[:-2], coefs=coefs.shape[:-3], mask=mask_lead
    )
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if engine == "plain":
        with no_autocast(q):
            return plain.contract(basis, coefs, q, k, mask, factor)

    rows, keys, units = q.shape[-2], k.shape[-2], coefs.shape[-3]
    q = q.expand(*lead, heads, *q.shape[-2:])
    k = k.expand(*lead, heads, *k.shape[-2:])
    # leading axes along which the coefficients differ, and those along which they are shared
    coefs = coefs.reshape((1,) * (len(lead) + 4 - coefs.dim()) + coefs.shape)
    own = [i for i in range(len(lead)) if coefs.shape[i] > 1]
    shared = [i for i in range(len(lead)) if coefs.shape[i] == 1]
    count = len(lead)
    if math.prod([lead[i] for i in shared]) == 1 or not own:
        batch = math.prod(lead)
        q, k = (x.reshape(batch, heads, *x.shape[-2:]) for x in (q, k))
        coefs = coefs.expand(*coefs.shape[:count], heads, units, keys, width)
        coefs = coefs.reshape(-1, heads, units, keys, width)
        mask = None if mask is None else flat_mask(mask, lead)
        y = _apply(name, engine, factor, q, k, coefs, mask)
        return y.reshape(*lead, heads, rows, units)
    # coefficients of their own for some leading axes and not for others: those become heads
    order = [*shared, *own]
    group = math.prod([lead[i] for i in own])
    batch = math.prod([lead[i] for i in shared])

    def fold(x: Tensor) -> Tensor:
        x = x.permute(*order, *range(count, x.dim()))
        return x.reshape(batch, group * heads, *x.shape[-2:])

    coefs = coefs.expand(*coefs.shape[:count], heads, units, keys, width)
    coefs = coefs.permute(*order, *range(count, count + 4))
    coefs = coefs.reshape(1, group * heads, units, keys, width)
    if mask is not None:
        mask = fold(mask.expand(*lead, heads, *mask.shape[-2:]))
    y = _apply(name, engine, factor, fold(q), fold(k), coefs, mask)
    y = y.reshape(*(lead[i] for i in order), heads, rows, units)
    return y.permute(*(order.index(i) for i in range(count)), count, count + 1, count + 2)


def engines() -> dict[str, str]:
    """Each engine of `contract` and whether it can run here: "ready", or why not.

    `engine="auto"` takes "triton" on CUDA and "cpp" on the CPU where they are ready and know the
    basis and dtype, and "torch" otherwise.
    """
    return {"torch": "ready", "cpp": cpp.status(), "triton": triton.status()}
