"""The vision transformer of the paper: pre-norm blocks, class token, learned positions, GELU MLP.

Parameters carry the names of timm's ViT (`blocks.0.attn.qkv.weight`), so that weights move both
ways; the row operator adds `blocks.<i>.operator` (blockwise) or one `operator` (universal).
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from kart import layers
from kart.factories import remember
from kart.models import blocks, checks, work
from kart.models.model import Choice, Columnar, Family, Model, Params, Site, choose, find
from kart.models.recompute import recomputed


@dataclass(frozen=True)
class ViTConfig(Columnar):
    """Everything that defines a vision transformer."""

    recompute: bool = False  # blocks are computed again in the backward, for less memory
    family: str = field(default="vit", init=False)


@remember
def vit(operator: Choice = "softmax", **fields: Any) -> Model:
    """A vision transformer from an operator (or one a block) and the fields of `ViTConfig`."""
    config = ViTConfig(**fields)
    checks.columnar("vit", config, "num_classes")
    config, operators = choose("vit", operator, config, fields)
    size, heads, tokens = config.embed_dim, config.num_heads, config.tokens
    universal = config.sharing == "universal"
    sites = [
        Site("operator" if universal else f"blocks.{i}.operator", op, heads, tokens, size // heads)
        for i, op in enumerate(operators)
    ]

    def init(generator: Generator) -> Params:
        attns = [blocks.attention_init] * config.depth
        return blocks.classifier_init(generator, config, tokens, attns)

    def forward(params: Params, images: Tensor, look: dict[str, Tensor] | None) -> Tensor:
        x = blocks.prepend_class(params, layers.patch_embed(params["patch_embed"], images))
        x = blocks.with_positions(params, x)
        for i, site in enumerate(sites):
            name = f"blocks.{i}"

            def block(own: Params, x: Tensor, site: Site = site, name: str = name) -> Tensor:
                attn = blocks.attention_at(site, own, look, name)
                return blocks.block(find(own, name), x, attn, images.dtype)

            own: Params = {"blocks": {str(i): params["blocks"][str(i)]}}
            if universal:
                own["operator"] = params["operator"]
            x = (recomputed(block) if config.recompute and look is None else block)(own, x)
            if look is not None:
                look[f"{name}.tokens"] = x
        return blocks.classify(params, x)

    return blocks.model(config, init, forward, sites, {"blocks": config.depth})


def work_of(config: ViTConfig) -> work.Layers:
    """The layers of a vision transformer; its last norm takes all tokens, as the paper counts."""
    size, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    yield work.product("embed", config.tokens - 1, config.in_channels * config.patch_size**2, size)
    for _ in range(config.depth):
        yield from work.block(config.tokens, size, hidden)
    yield work.norm(config.tokens, size)
    yield work.product("head", 1, size, config.num_classes)


# "vit_nano" is kart's own size for laptops and studies on small images; the others have the
# widths of Dosovitskiy et al. 2021 and Touvron et al. 2021, as the paper uses them (Table 1)
FAMILY = Family(
    vit,
    ViTConfig,
    {
        "vit_nano": {"embed_dim": 64, "depth": 4, "num_heads": 2},
        "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
        "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    },
    work_of,
)
