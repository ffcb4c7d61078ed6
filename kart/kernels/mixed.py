"""`y (mix^T v) + beside` with the values as they lie in memory; kept are its inputs and `mix^T v`.

The values of a model are a view of the projection's output, whose samples and heads cannot be
joined into the one batch axis of a matrix product: torch copies them, forward and backward, and
keeps the copy. The compiled kernel reads them, and the gradient of the output, in place.
"""

import torch
from torch import Tensor

from kart.kernels import fused
from kart.kernels.cpp import mix as compiled
from kart.kernels.fused import Fused
from kart.kernels.transforms import forward_levels


def _expression(v: Tensor, y: Tensor, mix: Tensor, *beside: Tensor) -> tuple[Tensor]:
    return (sum(beside, start=y @ (mix.mT @ v)),)


def _engine() -> compiled.Engine:
    found = compiled.engine()
    assert found is not None  # `factored_values` asked
    return found


def _forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return _engine().forward(*inputs)


def _backward(gradients, inputs, results) -> tuple[Tensor, ...]:
    (dout,), (v, y, mix, *beside), (_, hidden) = gradients, inputs, results
    # a view: autograd keeps no input of a function that is its output, too
    return *_engine().backward(dout, v, y, mix, hidden), *(dout.view_as(dout) for _ in beside)


# the mix may be one for all samples
PRODUCT = Fused(_forward, _backward, _expression, 1, (0, 1, 2), (2,))
BESIDE = PRODUCT._replace(learned=(0, 1, 2, 3))


def factored_values(
    y: Tensor, mix: Tensor, v: Tensor, engine: str = "auto", beside: Tensor | None = None
) -> Tensor:
    """`y (mix^T v)`, `(..., H, N, e)`, for `y (..., H, N, r)`, `mix (..., H, M, r)` and `v (..., H,
    M, e)`, plus `beside (..., H, N, e)` where given: `mix_values` without a mask. Compiled on a CPU
    in float32 for four axes, unless `engine` is another than "auto" or "cpp".
    """
    more = () if beside is None else (beside,)
    tensors = (y, mix, v, *more)
    in_place = (
        engine in ("auto", "cpp")
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype is torch.float32 for x in tensors)
        and v.dim() == y.dim() == 4
        and mix.dim() in (3, 4)
        and y.shape[:2] == v.shape[:2]
        and mix.shape[-3] == v.shape[1]
        and all(x.shape == (*y.shape[:3], v.shape[3]) for x in more)
        and not forward_levels()
        and all(x.numel() for x in tensors)
        and compiled.engine() is not None
    )
    if not in_place:
        return _expression(v, y, mix, *more)[0]
    op = BESIDE if more else PRODUCT
    return fused.apply(op, v, y, mix if mix.dim() == 4 else mix[None], *more)[0]
