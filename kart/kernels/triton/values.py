"""`y (mix^T v) + beside` on CUDA, as `kart.kernels.cpp.mix` has it on a CPU; see `device_values`.

torch would copy the values, widened, and take matrix products of twelve columns one batch after
another: together they take longer than the product with the scores.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kart.kernels.arguments import room_like
from kart.kernels.triton import DTYPES, WIDTH, refuses_device
from kart.kernels.triton.launch import PROGRAMS, launched_on, padded, precision_of

RANKS = 64
BLOCK = 64


def refuses(tensors: Sequence[Tensor]) -> bool:
    """Whether these kernels cannot take such `(v, y, mix, ...)`."""
    v, _, mix, *_ = tensors
    return (
        bool(refuses_device(v.device))
        or any(x.dtype not in DTYPES for x in tensors)
        or v.shape[-1] > WIDTH
        or mix.shape[-1] > RANKS
    )


def forward(
    v: Tensor, y: Tensor, mix: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y (mix^T v) + beside` in the dtype of v, and `mix^T v (B, H, r, e)` in float32, for `v (B,
    H, M, e)`, `y (B, H, N, r)`, `mix (B or 1, H, M, r)` and `beside (B, H, N, e)`.
    """
    from kart.kernels.triton import device_values as kernels

    (batch, heads, queries, rank), width = y.shape, v.shape[3]
    block = _block(rank, width)
    out = room_like(v, queries)
    hidden = _gather(mix, v)
    with launched_on(v):
        kernels.spread[(math.ceil(queries / block) * batch * heads,)](
            x_ptr=y,
            h_ptr=hidden,
            beside_ptr=beside,
            out_ptr=out,
            **_strides("x", "p", y, batch),
            **_strides("beside", "e", beside, batch),
            **_strides("out", "e", out, batch),
            H=heads,
            N=queries,
            **_sizes(rank, width, block),
        )
    return out, hidden


def backward(
    dout: Tensor, v: Tensor, y: Tensor, mix: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dv, dy and dmix."""
    from kart.kernels.triton import device_values as kernels

    (batch, heads, keys, width), queries, rank = v.shape, y.shape[2], y.shape[3]
    dv, dy = room_like(v), y.new_empty(y.shape)
    dmix = v.new_empty(batch, heads, keys, rank, dtype=torch.float32)
    block = _block(rank, width)
    blocks = math.ceil(queries / block) + math.ceil(keys / block)
    dhidden = _gather(y, dout)
    with launched_on(v):
        kernels.pull[(blocks * batch * heads,)](
            dout_ptr=dout,
            v_ptr=v,
            mix_ptr=mix,
            hidden_ptr=hidden.contiguous(),
            dhidden_ptr=dhidden,
            dv_ptr=dv,
            dy_ptr=dy,
            dmix_ptr=dmix,
            **_strides("dout", "e", dout, batch),
            **_strides("v", "e", v, batch),
            **_strides("mix", "p", mix, batch),
            **_strides("dv", "e", dv, batch),
            H=heads,
            N=queries,
            M=keys,
            **_sizes(rank, width, block),
        )
    dmix = dmix if mix.shape[0] > 1 else dmix.sum(0, keepdim=True)
    return dv, dy, dmix.to(mix.dtype)


def _strides(name: str, last: str, x: Tensor | None, batch: int) -> dict[str, int]:
    strides = (0, 0, 0, 0) if x is None else x.stride()
    own = x is not None and x.shape[0] == batch > 1
    names = (f"{name}_{axis}" for axis in ("b", "h", "n", last))
    return dict(zip(names, (strides[0] if own else 0, *strides[1:]), strict=True))


def _block(rank: int, width: int) -> int:
    """Tokens of a tile, whose ranks and columns take registers."""
    return BLOCK if padded(rank) < RANKS and width <= BLOCK else BLOCK // 2


def _sizes(rank: int, width: int, block: int) -> dict[str, Any]:
    return {
        "RANK": rank,
        "WIDTH": width,
        "R": padded(rank),
        "E": padded(width),
        "PRECISION": precision_of(None),
        "BLOCK": block,
        "enable_fp_fusion": True,
    }


def _gather(x: Tensor, z: Tensor) -> Tensor:
    """`x^T z (B, H, r, e)`."""
    from kart.kernels.triton import device_values as kernels

    (batch, heads, tokens, width), rank = z.shape, x.shape[3]
    block = _block(rank, width)
    # few heads: several programs each, and a sum in an order of its own
    shares = min(math.ceil(tokens / block), math.ceil(PROGRAMS / (batch * heads)))
    share = math.ceil(tokens / shares / block) * block
    shares = math.ceil(tokens / share)
    out = z.new_empty(shares, batch, heads, rank, width, dtype=torch.float32)
    with launched_on(z):
        kernels.gather[(shares * batch * heads,)](
            x_ptr=x,
            z_ptr=z,
            out_ptr=out,
            **_strides("x", "p", x, batch),
            **_strides("z", "e", z, batch),
            H=heads,
            N=tokens,
            share=share,
            **_sizes(rank, width, block),
        )
    return out[0] if shares == 1 else out.sum(0)
