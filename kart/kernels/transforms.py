"""The transforms of `torch.func` that are running, and plain calls from inside them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # no stubs
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import _disable_current_modes


class Quick(Function):
    """A Function whose `apply` takes all arguments of its `forward` in their order: torch binds
    those of every call to a signature, which costs as much as a small product.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return custom_function_call(cls, *args)  # type: ignore[call-arg]
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def batchable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` of a Function for `torch.autograd.grad(is_grads_batched=True)` too, which maps
    by a vmap older than that of torch.func: that one's rules are followed instead.
    """

    @functools.wraps(backward)
    def mapped(ctx: Any, *gradients: Tensor | None) -> Any:
        old = [g is not None and _functorch.is_legacy_batchedtensor(g) for g in gradients]
        if not any(old):
            return backward(ctx, *gradients)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        some: list[bool] = []

        def pull(*gradients: Tensor | None) -> tuple[Tensor, ...]:
            found = backward(ctx, *gradients)
            some.extend(x is not None for x in found)
            return tuple(x for x in found if x is not None)

        # the size is asked of tensors without the axis alone
        whole = [
            torch._remove_batch_dim(g, level, 0, 0) if own else g  # type: ignore[arg-type]
            for g, own in zip(gradients, old, strict=True)
        ]
        pulled = iter(torch.func.vmap(pull, tuple(0 if own else None for own in old))(*whole))
        add = torch._add_batch_dim  # type: ignore[attr-defined]
        return tuple(add(next(pulled), 0, level) if x else None for x in some)

    return mapped


def _levels(kind: Any) -> int:
    return sum(level.key() == kind for level in _functorch.get_interpreter_stack() or [])


def forward_levels() -> int:
    """Number of forward-mode levels that are running: `torch.func.jvp` and dual levels."""
    levels = _levels(_functorch.TransformType.Jvp)
    return max(levels, int(forward_ad._current_level >= 0))


def grad_levels() -> int:
    """Number of `torch.func.grad` levels that are running."""
    return _levels(_functorch.TransformType.Grad)


def vmap_levels() -> int:
    """Number of `torch.func.vmap` levels that are running."""
    return _levels(_functorch.TransformType.Vmap)


def recorded() -> bool:
    """Whether what is called now is differentiated, transformed or traced; the backward of a plain
    loss is not, and may call what it needs without an autograd.Function around it.
    """
    return (
        torch.is_grad_enabled()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or bool(_functorch.get_interpreter_stack())
        or forward_ad._current_level >= 0
    )


def front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped axis first; a view that repeats `x` where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def mapped(x: Tensor) -> bool:
    """Whether `x` has an axis of `torch.func.vmap`, at whatever level."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; for "meta" torch has none, and no answer."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block without autocast, which would round the scores to bfloat16."""
    if autocasting(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def fresh_keys() -> tuple[Any, Any]:
    """The dispatch keys of a new thread. A raw operation may be called from inside a dispatch mode
    (torch.compile checks aliasing in one), where autograd is off and no `enable_grad` brings it
    back.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(
            lambda: (
                torch._C._dispatch_tls_local_include_set(),
                torch._C._dispatch_tls_local_exclude_set(),
            )
        ).result()


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """A block on plain tensors without gradients, whatever transform or mode is running."""
    include, exclude = fresh_keys()
    # `torch.func.grad` forbids `requires_grad_` to whatever runs inside, plain tensors included
    allowed = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        with (
            # `detach` asks for modes by their stack, not by the key
            _disable_current_modes(),
            torch._C._DisableFuncTorch(),
            torch._C._ForceDispatchKeyGuard(include, exclude),
            torch.no_grad(),
        ):
            yield
    finally:
        _functorch.set_inplace_requires_grad_allowed(allowed)


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """A block for what is kept, and so of no transform, mode, trace or checkpoint that first asks
    for it.
    """
    traced = torch._C._get_tracing_state()
    trace = torch._C._set_tracing_state  # type: ignore[attr-defined]  # no stubs
    if traced is not None:
        trace(None)
    try:
        with untransformed(), torch.inference_mode(False), _unhooked():
            yield
    finally:
        if traced is not None:
            trace(traced)


class Constant:
    """`make(*sizes, device)`, a tensor of nothing else, whose last results are kept; a dtype may be
    among the sizes.

    Not while something is compiled, traced or captured: torch.compile traces what is kept, and
    warns that it does; tensors of a mode, as fake ones, are of no use after it; a CUDA graph owns
    what is made while it is recorded, and would read what is kept after it has been let go.
    """

    def __init__(self, make: Callable[..., Tensor], most: int = 64):
        functools.update_wrapper(self, make)
        self.make = make
        self.kept = functools.lru_cache(most)(self._for_good)

    def _for_good(self, *sizes: Any) -> Tensor:
        with for_good():
            return self.make(*sizes)

    def _keeps(self, device: torch.device) -> bool:
        return not (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        )

    def __call__(self, *sizes: Any) -> Tensor:
        if not self._keeps(sizes[-1]):
            return self.make(*sizes)
        # torch.jit.trace has sizes as tensors
        return self.kept(*(int(x) if isinstance(x, Tensor) else x for x in sizes))

    def rows(self, length: int, *sizes: Any) -> Tensor:
        """The tensor of a first size `length`, whose rows are those of any longer one: up to 2^14
        the next power of two is kept, as for tokens that come one by one.
        """
        traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if traced or not self._keeps(sizes[-1]) or length > 2**14:
            return self.make(length, *sizes)
        return self(max(256, 1 << (length - 1).bit_length()), *sizes)[:length]


def _unhooked() -> contextlib.AbstractContextManager[Any]:
    """A block in which graphs keep tensors as they are: `torch.utils.checkpoint` counts them by its
    hooks. Of several the innermost hold; where they are forbidden there are none.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@contextlib.contextmanager
def unseen(*tensors: Tensor | None) -> Iterator[tuple[bool, list[Any]]]:
    """A block for the tangent of a Function: whether nothing needs to see the operations in it, and
    the tensors to do them on.

    That is where no more than the level of forward mode is running that asks for the tangent, whose
    wrappers, of several microseconds an operation, are then taken off.
    """
    kinds = {level.key() for level in _functorch.get_interpreter_stack() or []}
    plain = [x if x is None else _unwrapped(x) for x in tensors]
    if (
        kinds - {_functorch.TransformType.Jvp}
        # a mode may record them, and lose what is written in place (`torch.func.linearize`)
        or torch._C._len_torch_dispatch_stack()
        # while a Function is asked, forward mode is off
        or (forward_levels() and torch._C._is_fwd_grad_enabled())
        or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in plain))
    ):
        yield False, list(tensors)
    else:
        with torch._C._DisableFuncTorch(), torch.no_grad():
            yield True, plain


def _unwrapped(x: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x
