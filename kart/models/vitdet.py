"""A plain vision transformer as detectors have it: windows in most blocks, a simple feature pyramid
behind them (Li et al. 2022, "Exploring Plain Vision Transformer Backbones", arXiv:2203.16527).

Windows do not shift; information crosses them in the global blocks. A grid that windows do not
divide is padded, and padding is masked. Positions are learned and absolute: the relative ones that
the paper adds are left out. There is no class token and no classifier.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from kart import layers
from kart.factories import remember
from kart.models import blocks, checks, pyramid, windows, work
from kart.models.model import Choice, Config, Family, Model, Params, Site, choose


@dataclass(frozen=True)
class ViTDetConfig(Config):
    """Everything that defines a ViTDet backbone."""

    image_size: int = 1024
    embed_dim: int = 192  # D
    depth: int = 12  # L
    num_heads: int = 3  # H, d = D / H
    window_size: int = 14  # side of a window, in patches
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)  # those without windows, counted from 0
    pyramid_dim: int = 256  # C of every level
    family: str = field(default="vitdet", init=False)

    @property
    def tokens(self) -> int:
        """N: the patches."""
        return self.side**2

    @property
    def strides(self) -> dict[str, int]:
        """Pixels a step of each level, by its name: level p is one of 2^p pixels."""
        strides = [int(self.patch_size / scale) for scale in pyramid.SCALES]
        return {f"p{stride.bit_length() - 1}": stride for stride in strides}

    def cut(self, block: int) -> windows.Cut:
        """The windows of a block; one of the whole grid where it is global."""
        whole = block in self.global_blocks
        return windows.Cut(self.side, self.side if whole else self.window_size)


def _check(config: ViTDetConfig) -> None:
    checks.columnar("vitdet", config, "window_size", "pyramid_dim")
    patch, side = config.patch_size, config.side
    if patch < 4 or patch & (patch - 1) or side % 2 or config.embed_dim % 4:
        raise ValueError(
            f"`vitdet` needs a `patch_size` of 4, 8, 16, .., an even grid and `embed_dim` divisible"
            f" by 4 for its pyramid, got {patch}, {side} x {side} and {config.embed_dim}."
        )
    chosen = config.global_blocks
    if not isinstance(chosen, tuple) or not set(chosen) <= set(range(config.depth)):
        raise ValueError(
            f"`vitdet` needs `global_blocks` among 0 .. {config.depth - 1}, got {chosen!r}. "
            "Name those of the blocks that see the whole image."
        )


@remember
def vitdet(operator: Choice = "softmax", **fields: Any) -> Model:
    """A ViTDet backbone from an operator (or one a block) and the fields of `ViTDetConfig`.

    `apply` maps images to feature maps by level, finest first: `{"p2": (..., C, height / 4, width /
    4), ..., "p5": ...}` at a patch size of 16. Universal sharing keeps one operator for the blocks
    with windows, `params["operator"]["windows"]`, and one for those without, `["whole"]`.
    """
    config = ViTDetConfig(**fields)
    _check(config)
    config, operators = choose("vitdet", operator, config, fields)
    size, heads, side = config.embed_dim, config.num_heads, config.side

    def site(i: int) -> Site:
        whole = i in config.global_blocks
        shared = f"operator.{'whole' if whole else 'windows'}"
        path = shared if config.sharing == "universal" else f"blocks.{i}.operator"
        cut = config.cut(i)
        return Site(path, operators[i], heads, cut.window**2, size // heads, cut)

    sites = [site(i) for i in range(config.depth)]

    def init(generator: Generator) -> Params:
        patch, hidden = config.patch_size, int(size * config.mlp_ratio)
        return {
            "patch_embed": layers.patch_embed_init(generator, config.in_channels, patch, size),
            "pos_embed": layers.truncated_normal(generator, 1, config.tokens, size),
            "blocks": {
                str(i): blocks.block_init(generator, size, hidden, blocks.attention_init)
                for i in range(config.depth)
            },
            "pyramid": pyramid.pyramid_init(generator, size, config.pyramid_dim),
        }

    def forward(
        params: Params, images: Tensor, look: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        x = blocks.with_positions(params, layers.patch_embed(params["patch_embed"], images))
        x = x.unflatten(-2, (side, side))
        for i, site in enumerate(sites):
            attention = blocks.attention_at(site, params, look, f"blocks.{i}")
            window = config.cut(i).window
            attn = functools.partial(windowed_attention, window=window, attention=attention)
            x = blocks.block(params["blocks"][str(i)], x, attn, images.dtype)
            if look is not None:
                look[f"blocks.{i}.tokens"] = x.flatten(-3, -2)
        levels = pyramid.pyramid(params["pyramid"], x.to(images.dtype))
        return dict(zip(config.strides, levels, strict=True))

    return blocks.model(config, init, forward, sites, {"blocks": config.depth})


def windowed_attention(
    params: Params, x: Tensor, window: int, attention: Callable[..., Tensor]
) -> Tensor:
    """Self-attention inside the windows of a grid `(..., h, w, D)`, padded where it must be."""
    rows, columns = x.shape[-3:-1]
    mask = windows.padding_mask(rows, columns, window, x.device)
    padded = windows.pad(x, window)
    out = attention(params, windows.partition(padded, window), mask=mask)
    return windows.merge(out, *padded.shape[-3:-1])[..., :rows, :columns, :]


def work_of(config: ViTDetConfig) -> work.Layers:
    """The layers of a ViTDet, on padded windows where there are some, and of its pyramid."""
    size, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    yield work.product("embed", config.tokens, config.in_channels * config.patch_size**2, size)
    for i in range(config.depth):
        cut = config.cut(i)
        yield from work.block(config.tokens, size, hidden, cut.count * cut.window**2)
    yield from pyramid.work_of(config.side, size, config.pyramid_dim)


FAMILY = Family(
    vitdet, ViTDetConfig, {"vitdet_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3}}, work_of
)
