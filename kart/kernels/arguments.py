"""What the products ask of their tensors, and how leading axes and masks come to one form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kart import schema
from kart.kernels import plain


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
        if x.dtype != q.dtype and (name == second or x.dtype != plain.wide_dtype(q)):
            raise ValueError(
                f"`{function}` needs `{name}` in the dtype of `{first}`, {q.dtype}, got {x.dtype}. "
                "Convert it with `.to`."
            )
    if scale is not None and not (schema.fits(scale, float) and math.isfinite(scale)):
        raise ValueError(
            f"`{function}` needs a finite number as `scale`, got {scale!r}. Leave it out for "
            "1 / sqrt(d)."
        )
    check_mask(function, mask, q.shape[-2], k.shape[-2], q.device)


def check_mask(
    function: str, mask: Tensor | None, queries: int, keys: int, device: torch.device | None = None
) -> None:
    """Raises ValueError unless the mask is boolean and broadcasts to (..., queries, keys), on the
    `device` where one is given.
    """
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
    if device is not None and mask.device != device:
        raise ValueError(
            f"`{function}` needs its tensors on one device, got `q` on {device} and `mask` on "
            f"{mask.device}. Move them with `.to`."
        )


def broadcast_leading(function: str, **given: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    """The common shape of the leading axes, or ValueError.

    They are those given, or all of a tensor but its last two; of None there are none.
    """
    shapes = {
        name: () if x is None else x.shape[:-2] if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    common = [1] * max(len(shape) for shape in shapes.values())
    for shape in shapes.values():
        for i, size in enumerate(shape, len(common) - len(shape)):
            if common[i] == 1:
                common[i] = size
            # `in` of torch.compile tells a size that it knows from one that it does not
            elif size != 1 and size != common[i]:
                raise ValueError(
                    f"`{function}` needs leading axes that broadcast, got "
                    f"{', '.join(f'`{name}` {tuple(x)}' for name, x in shapes.items())}. "
                    "They are all axes up to and including the heads."
                )
    return tuple(common)


def four_axes(lead: Sequence[int], *tensors: Tensor) -> list[Tensor]:
    """Tensors `(..., a, b)` as `(B, H, a, b)`, for the common leading axes, the heads the last."""
    batch, heads = math.prod(lead[:-1]), lead[-1]
    return [x.expand(*lead, *x.shape[-2:]).reshape(batch, heads, *x.shape[-2:]) for x in tensors]


def flat_mask(mask: Tensor, lead: Sequence[int]) -> Tensor:
    """A mask as `(B or 1, H or 1, N or 1, M or 1)`, B the product of the axes before the heads."""
    mask = mask.reshape((1,) * (len(lead) + 3 - mask.dim()) + mask.shape)
    if any(size != 1 for size in mask.shape[: len(lead)]):
        mask = mask.expand(*lead, *mask.shape[len(lead) :])
    return mask.reshape(math.prod(mask.shape[: len(lead)]), *mask.shape[len(lead) :])


def dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors with a contiguous last axis, copied where it is not: a raw kernel takes it for that,
    and would read other memory.
    """
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def side_by_side(x: Tensor) -> bool:
    """Whether rows of heads of `x (B, H, N, d)` lie side by side, as a projection leaves them."""
    return x.shape[1] > 1 and x.shape[2] > 1 and 0 < x.stride(1) < x.stride(2)


def room_like(x: Tensor, rows: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor for the gradient of `x (B, H, N, d)`, or for `rows` rows of its kind: where
    those of its heads lie side by side they do so here, and joining the heads is a view.
    """
    batch, heads, own, width = x.shape
    rows = own if rows is None else rows
    if side_by_side(x):
        return x.new_empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, rows, width, dtype=dtype)


def laid_like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the layout of `room_like(x)`, a copy where it has another."""
    return y.transpose(1, 2).contiguous().transpose(1, 2) if side_by_side(x) else y.contiguous()
