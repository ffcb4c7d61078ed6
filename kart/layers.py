"""Linear, layer norm, MLP, patch and position embedding: init and apply over a dict of tensors.

Weights keep torch's layout, `(out, in)`, and are cast to the dtype of the input, so that bfloat16
inputs compute in bfloat16 with float32 parameters.
"""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kart import kernels
from kart.bases.basis import DRAWN, check_generator, check_input
from kart.kernels.transforms import forward_levels, grad_levels

Params = dict[str, Any]


def truncated_normal(generator: Generator, *shape: int, std: float = 0.02) -> Tensor:
    """N(0, std^2) cut at two standard deviations, as ViTs are initialised, `shape`, on the CPU."""
    check_generator(generator)
    weight = torch.empty(shape, **DRAWN)
    return torch.nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)


def linear_init(generator: Generator, in_size: int, out_size: int, bias: bool = True) -> Params:
    """Parameters of `linear`, `weight (out, in)` and, unless it has none, a zero `bias (out,)`."""
    weight = {"weight": truncated_normal(generator, out_size, in_size)}
    return {**weight, "bias": torch.zeros(out_size, **DRAWN)} if bias else weight


def linear(params: Params, x: Tensor) -> Tensor:
    """`(..., in)` to `(..., out)`."""
    check_input("linear", x)
    weight = params["weight"].to(x.dtype)
    bias = params["bias"].to(x.dtype) if "bias" in params else None
    if x.dim() <= 3:
        return F.linear(x, weight, bias)
    # beyond three axes torch rounds otherwise where gradients are traced than where they are not
    return F.linear(x.flatten(0, -2), weight, bias).reshape(*x.shape[:-1], weight.shape[-2])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(..., N, H d)` to `(..., H, N, d)`."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """`(..., H, N, d)` to `(..., N, H d)`."""
    return x.transpose(-3, -2).flatten(-2)


def layer_norm_init(size: int) -> Params:
    """Parameters of `layer_norm`, ones and zeros."""
    return {"weight": torch.ones(size, **DRAWN), "bias": torch.zeros(size, **DRAWN)}


def layer_norm(params: Params, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis, in the dtype of `x`."""
    weight, bias = params["weight"].to(x.dtype), params["bias"].to(x.dtype)
    # what Dynamo records is exported as well, as torch 2.11 has it
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if torch.compiler.is_compiling() or forward_levels() or grad_levels() > 2:
        # torch's tangent of a layer norm has wrong derivatives itself, and so has its second
        # derivative, without a word (torch 2.13); a graph that is compiled does not say what
        # transforms are in it
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True)
        normed = centred * (spread + eps).rsqrt()
        return torch.addcmul(bias.to(wide.dtype), normed, weight.to(wide.dtype)).to(x.dtype)
    if not kernels.transforming():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # so has the mapped backward of a scaled one (torch.func.hessian); unscaled it is right
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=eps), weight)


def mlp_init(generator: Generator, size: int, hidden_size: int) -> Params:
    """Parameters of `mlp`."""
    return {
        "fc1": linear_init(generator, size, hidden_size),
        "fc2": linear_init(generator, hidden_size, size),
    }


def mlp(params: Params, x: Tensor) -> Tensor:
    """Two linear layers around an exact GELU, `(..., D)` to `(..., D)`."""
    return linear(params["fc2"], F.gelu(linear(params["fc1"], x)))


def patch_embed_init(generator: Generator, channels: int, patch_size: int, size: int) -> Params:
    """Parameters of `patch_embed`: those of the equivalent convolution, `weight (D, C, p, p)`."""
    weight = truncated_normal(generator, size, channels, patch_size, patch_size)
    return {"proj": {"weight": weight, "bias": torch.zeros(size, **DRAWN)}}


def patch_embed(params: Params, images: Tensor) -> Tensor:
    """Images `(..., C, height, width)` to one token a patch, `(..., (height/p)(width/p), D)`.

    A product of reshaped patches: under `vmap` over a population a convolution would become a
    grouped one, which is slow.
    """
    check_input("patch_embed", images)
    weight, bias = params["proj"]["weight"], params["proj"]["bias"]
    p = weight.shape[-1]
    *lead, channels, height, width = images.shape
    grid = images.reshape(*lead, channels, height // p, p, width // p, p)
    n = len(lead)
    # (..., rows, columns, C, p, p)
    order = [*range(n), n + 1, n + 3, n, n + 2, n + 4]
    patches = grid.permute(order).reshape(*lead, (height // p) * (width // p), channels * p * p)
    return F.linear(patches, weight.flatten(1).to(images.dtype), bias.to(images.dtype))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings `(1, prefix + h w, D)` of a grid `old` on the grid `new`.

    Bicubic with antialiasing, computed in float32, as timm's `resample_abs_pos_embed`; the first
    tokens, which have no place on the grid, stay. The same grid is the identity to the bit.
    """
    if old == new:
        return positions
    prefix = positions.shape[-2] - old[0] * old[1]
    grid = positions[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    moved = grid.flatten(2).mT.to(positions.dtype)
    return torch.cat([positions[:, :prefix], moved], dim=1)
