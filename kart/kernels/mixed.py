"""`y (mix^T v) + beside` with the values as they lie in memory; kept are its inputs and `mix^T v`.

The values of a model are a view of the projection's output, whose samples and heads cannot be
joined into the one batch axis of a matrix product: torch copies them, forward and backward, and
keeps the copy; half types are widened, too. The compiled kernels of a CPU and those of Triton read
them, and the gradient of the output, in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kart.kernels import fused
from kart.kernels.arguments import broadcast_leading
from kart.kernels.cpp import mix as compiled
from kart.kernels.fused import Fused
from kart.kernels.plain import wide
from kart.kernels.transforms import forward_levels
from kart.kernels.triton import values


def _expression(v: Tensor, y: Tensor, mix: Tensor, *beside: Tensor) -> tuple[Tensor]:
    # r cancelling terms: rounding each factor to half precision would show in the sum
    hidden = wide(mix).mT @ wide(v)
    return (sum(map(wide, beside), start=wide(y) @ hidden).to(v.dtype),)


def _engine(tensors: Sequence[Tensor]) -> Any:
    """The kernels that take `(v, y, mix, ...)`, or None."""
    v = tensors[0]
    if v.device.type == "cuda":
        return None if values.refuses(tensors) else values
    if v.device.type == "cpu" and all(x.dtype is torch.float32 for x in tensors):
        return compiled.engine()
    return None


def _forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return _engine(inputs).forward(*inputs)


def _backward(gradients, inputs, results) -> tuple[Tensor, ...]:
    (dout,), (v, y, mix, *beside), (_, hidden) = gradients, inputs, results
    found = _engine((v, y, mix)).backward(dout, v, y, mix, hidden)
    # a view: autograd keeps no input of a function that is its output, too
    return *found, *(dout.to(x.dtype).view_as(x) for x in beside)


# the mix may be one for all samples
PRODUCT = Fused(_forward, _backward, _expression, 1, (0, 1, 2), (2,))
BESIDE = PRODUCT._replace(learned=(0, 1, 2, 3))


def factored_values(
    y: Tensor, mix: Tensor, v: Tensor, engine: str = "auto", beside: Tensor | None = None
) -> Tensor:
    """`y (mix^T v)`, `(..., H, N, e)`, for `y (..., H, N, r)`, `mix (..., H, M, r)` and `v (..., H,
    M, e)`, plus `beside (..., H, N, e)` where given: `mix_values` without a mask. Float32 at least,
    or rounded once to the dtype of v, where a GPU's kernels read half types.

    By kernels for four axes, unless `engine` is another than theirs or "auto".
    """
    more = () if beside is None else (beside,)
    if not all(isinstance(x, Tensor) for x in (y, mix, v, *more)):
        kinds = ", ".join(type(x).__name__ for x in (y, mix, v, *more))
        raise ValueError(f"`factored_values` needs tensors, got {kinds}. Convert what is none.")
    # kernels read as many numbers as these say
    fits = (
        min(y.dim(), mix.dim(), v.dim()) > 1
        and y.shape[-1] == mix.shape[-1]
        and mix.shape[-2] == v.shape[-2]
        and all(x.shape[-2:] == (y.shape[-2], v.shape[-1]) for x in more)
    )
    if not fits:
        shapes = [tuple(x.shape) for x in (y, mix, v, *more)]
        raise ValueError(
            f"`factored_values` needs `y` (..., N, r), `mix` (..., M, r), `v` (..., M, e) and "
            f"`beside` (..., N, e), got {shapes}. Take all of the same operator and tokens."
        )
    on_gpu = v.device.type == "cuda"
    tensors = (v, y, mix, *more) if on_gpu else tuple(map(wide, (v, y, mix, *more)))
    in_place = (
        engine in ("auto", "triton" if on_gpu else "cpp")
        and not torch.compiler.is_compiling()
        and v.dim() == y.dim() == 4
        and mix.dim() in (3, 4)
        and y.shape[:2] == v.shape[:2]
        and mix.shape[-3] == v.shape[1]
        and (mix.dim() == 3 or mix.shape[0] in (1, v.shape[0]))
        and all(x.shape == (*y.shape[:3], v.shape[3]) for x in more)
        and not forward_levels()
        and all(x.numel() and x.device == v.device for x in tensors)
        and _engine(tensors) is not None
    )
    if not in_place:
        broadcast_leading("factored_values", y=y, mix=mix, v=v, beside=beside)
        return _expression(*map(wide, tensors))[0]
    v, y, mix, *more = tensors
    op = BESIDE if more else PRODUCT
    return fused.apply(op, v, y, mix if mix.dim() == 4 else mix[None], *more)[0]
