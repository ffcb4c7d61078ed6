"""ConViT: a vision transformer whose first blocks mix content with learned positions (d'Ascoli et
al. 2021, arXiv:2103.10697).

Parameters carry timm's names (`blocks.0.attn.qk.weight`, `pos_proj`, `gating_param`). In the gated
blocks the operator stands where the softmax of the content scores stood; the softmax of the
position scores stays, and the gate g mixes the two: `(1 - g) content + g positions` (eq. 7). The
paper then divides rows by their sums. Those are 1 where both parts are softmax, so this changes
nothing there but rounding; KArAt's signed rows can sum to zero, and here no row is divided.

The class token enters behind the gated blocks, which have one key less than the others: universal
sharing keeps one operator for each of the two, `params["operator"]["gated"]` and `["plain"]`.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from kart import layers, schema
from kart.bases import DRAWN
from kart.factories import remember
from kart.models import blocks, checks, work
from kart.models.model import Choice, Columnar, Family, Model, Params, Site, choose
from kart.operators.comparators import neighbours, squared_offsets
from kart.operators.resize import Lattice


@dataclass(frozen=True)
class ConViTConfig(Columnar):
    """Everything that defines a ConViT."""

    num_heads: int = 4  # H, d = D / H
    gated_blocks: int = 10  # of the L, from the first
    locality: float = 1.0  # alpha: how sharply a head looks at its neighbour when it is drawn
    family: str = field(default="convit", init=False)


@remember
def convit(operator: Choice = "softmax", **fields: Any) -> Model:
    """A ConViT from an operator (or one a block) and the fields of `ConViTConfig`."""
    config = ConViTConfig(**fields)
    checks.columnar("convit", config, "num_classes")
    gated = config.gated_blocks
    if not schema.fits(gated, int) or not 0 <= gated < config.depth:
        raise ValueError(
            f"`convit` needs `gated_blocks` in 0 .. depth - 1, got {gated!r} of {config.depth}: "
            f"the class token enters behind them. Pass gated_blocks={max(0, config.depth - 2)}."
        )
    if not schema.fits(config.locality, float) or not 0 <= config.locality < math.inf:
        raise ValueError(
            f"`convit` needs `locality` >= 0 and finite, got {config.locality!r}. It uses 1."
        )
    if not gated and config.locality != ConViTConfig.locality:
        raise ValueError(
            f"`convit` needs `gated_blocks` for `locality`, got {config.locality!r} and none of "
            "them. Leave it out."
        )
    config, operators = choose("convit", operator, config, fields)
    size, heads, side = config.embed_dim, config.num_heads, config.side

    def site(i: int) -> Site:
        shared = f"operator.{'gated' if i < gated else 'plain'}"
        path = shared if config.sharing == "universal" else f"blocks.{i}.operator"
        return Site(path, operators[i], heads, side * side + (i >= gated), size // heads)

    sites = [site(i) for i in range(config.depth)]

    def init(generator: Generator) -> Params:
        gated_init = functools.partial(gated_attention_init, heads=heads, locality=config.locality)
        plain_init = functools.partial(blocks.attention_init, bias=False)
        attns = [gated_init] * gated + [plain_init] * (config.depth - gated)
        return blocks.classifier_init(generator, config, side * side, attns)

    def forward(params: Params, images: Tensor, look: dict[str, Tensor] | None) -> Tensor:
        x = blocks.with_positions(params, layers.patch_embed(params["patch_embed"], images))
        for i, site in enumerate(sites):
            own, name = params["blocks"][str(i)], f"blocks.{i}"
            mixed = i < gated and not site.operator.traits.get("whole")
            if i == gated:
                x = blocks.prepend_class(params, x)
            if i < gated:
                attend = blocks.attend_at(site, params, look, name)
                shape = {"heads": heads, "side": side, "mixed": mixed}
                attn = functools.partial(gated_attention, **shape, attend=attend)
            else:
                attn = blocks.attention_at(site, params, look, name)
            x = blocks.block(own, x, attn, images.dtype)
            if look is not None:
                if mixed:
                    content = look[f"{name}.weights"]
                    look[f"{name}.weights"] = mix(
                        own["attn"], content, positions(own["attn"], side)
                    )
                look[f"{name}.tokens"] = x
        return blocks.classify(params, x)

    return blocks.model(config, init, forward, sites, {"blocks": config.depth})


def gated_attention_init(generator: Generator, size: int, heads: int, locality: float) -> Params:
    """Parameters of `gated_attention`, drawn local: values pass as they are, and of the heads each
    looks at one neighbour of a square around the query, as a convolution does (sec. 3).

    A number of heads that is no square leaves the heads beyond it without a neighbour.
    """
    params = {
        "qk": layers.linear_init(generator, size, 2 * size, bias=False),
        "v": {"weight": torch.eye(size, **DRAWN)},
        "proj": layers.linear_init(generator, size, size),
        "pos_proj": layers.linear_init(generator, 3, heads),
        "gating_param": torch.ones(heads, **DRAWN),
    }
    nearest, drawn = neighbours(heads), params["pos_proj"]["weight"]
    params["pos_proj"]["weight"] = locality * torch.cat([nearest, drawn[len(nearest) :]])
    return params


def positions(params: Params, side: int) -> Tensor:
    """Attention weights of the positions alone, `(H, N, N)` for a grid of N = side^2 patches: the
    softmax of a learned function of the offset (x, y) to the key and its squared length.
    """
    offsets = squared_offsets(Lattice(0, side, side), params["pos_proj"]["weight"])
    return layers.linear(params["pos_proj"], offsets).movedim(-1, 0).softmax(-1)


def mix(params: Params, content: Tensor, positional: Tensor) -> Tensor:
    """`(1 - g) content + g positional` of tensors `(..., H, N, .)`, g the sigmoid of the gate."""
    gate = params["gating_param"].sigmoid()[:, None, None].to(content.dtype)
    return (1 - gate) * content + gate * positional.to(content.dtype)


def gated_attention(
    params: Params, x: Tensor, heads: int, side: int, mixed: bool, attend: blocks.Attend
) -> Tensor:
    """Gated positional self-attention, `(..., N, D)` to `(..., N, D)`; that of `attend` alone
    unless `mixed`.
    """
    q, k = blocks.split_heads(layers.linear(params["qk"], x), heads, parts=2)
    v = layers.split_heads(layers.linear(params["v"], x), heads)
    out = attend(q, k, v)
    if mixed:
        out = mix(params, out, positions(params, side).to(v.dtype) @ v)
    return layers.linear(params["proj"], layers.merge_heads(out))


def work_of(config: ConViTConfig) -> work.Layers:
    """The layers of a ConViT. The attention of positions, which no operator has a part in, is
    computed once a batch whatever its images, and counted for each.
    """
    size, heads, patches = config.embed_dim, config.num_heads, config.tokens - 1
    hidden = int(size * config.mlp_ratio)
    yield work.product("embed", patches, config.in_channels * config.patch_size**2, size)
    for i in range(config.depth):
        gated = i < config.gated_blocks
        yield from work.block(patches if gated else config.tokens, size, hidden)
        if gated:
            yield work.product("attention", patches**2, 3, heads)
            yield work.softmax(heads * patches, patches)
            # beside the operator's: outputs are mixed, not weights
            yield work.product("attention", heads * patches, patches, size // heads)
    yield work.norm(config.tokens, size)
    yield work.product("head", 1, size, config.num_classes)


# "convit_nano" is kart's own size for small images
FAMILY = Family(
    convit,
    ConViTConfig,
    {
        "convit_nano": {"embed_dim": 64, "depth": 4, "num_heads": 4, "gated_blocks": 3},
        "convit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 4},
    },
    work_of,
)
