"""Swin: attention in windows that shift from block to block, in stages of halved resolution (Liu
et al. 2021, arXiv:2103.14030).

Parameters carry timm's names (`layers.0.blocks.1.attn.relative_position_bias_table`). Operators act
on the rows of a window, 49 keys at a window of 7: on scores with the relative position bias added,
under the masks of the shift. Blockwise each block has its own, as in Maity et al. 2025.

That paper calls universal sharing impossible here, since an operator has as many heads as its
block, and stages have 3, 6, 12 and 24. It is possible where heads agree: universal means one
operator a stage, `params["operator"]["<stage>"]`, shared by the blocks of the stage.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from kart import layers
from kart.factories import remember
from kart.models import blocks, checks, windows, work
from kart.models.model import Choice, Config, Family, Model, Params, Site, choose

EPS = 1e-5  # of Swin's layer norms; ViTs have 1e-6


@dataclass(frozen=True)
class SwinConfig(Config):
    """Everything that defines a Swin."""

    patch_size: int = 4
    num_classes: int = 1000
    embed_dim: int = 96  # D of the first stage, doubled by each further one
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks by stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # H by stage
    window_size: int = 7
    family: str = field(default="swin", init=False)

    @property
    def depth(self) -> int:
        """L: the blocks of all stages."""
        return sum(self.depths)

    @property
    def tokens(self) -> int:
        """M: the keys of a window of the first stage."""
        return self.stages[0].window ** 2

    @property
    def windows(self) -> tuple[int, ...]:
        """Sides of the windows, by stage."""
        return tuple(stage.window for stage in self.stages)

    @property
    def stages(self) -> tuple["Stage", ...]:
        """The stages; their windows are no larger than their grids."""
        side, window = self.side, self.window_size
        return tuple(
            Stage(i, self.embed_dim << i, depth, heads, side >> i, min(window, side >> i))
            for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True))
        )


class Stage(NamedTuple):
    """A stage: its place, width D, blocks, heads, and the sides of its grid and its windows."""

    index: int
    width: int
    depth: int
    heads: int
    side: int
    window: int

    def shift(self, block: int) -> int:
        """How far the windows of `block` are shifted: every second by half, if there are some."""
        return self.window // 2 if block % 2 and self.side > self.window else 0


def _check(config: SwinConfig) -> None:
    checks.integers(
        *("swin", config, "num_classes", "embed_dim", "window_size", "depths", "num_heads")
    )
    if len(config.depths) != len(config.num_heads):
        raise ValueError(
            f"`swin` needs as many `depths` as `num_heads`, got {config.depths} and "
            f"{config.num_heads}. Give one of each per stage."
        )
    checks.divides("swin", config, ("image_size", "patch_size"))
    side, stages = config.side, config.stages
    last = len(stages) - 1
    if side % (1 << last):
        raise ValueError(
            f"`swin` needs a grid of patches that can be halved {last} times, got {side} x {side}. "
            f"Make `image_size` a multiple of {config.patch_size << last}, or change `patch_size`."
        )
    checks.fits_memory(
        "swin",
        patches=config.embed_dim * config.in_channels * config.patch_size**2,
        blocks=sum(s.depth * checks.block_numbers(s.width, config.mlp_ratio) for s in stages),
        classifier=stages[-1].width * config.num_classes,
    )
    for stage in stages:
        if stage.width % stage.heads or stage.side % stage.window:
            raise ValueError(
                f"`swin` needs in each stage a width divisible by `num_heads` and a grid divisible "
                f"by `window_size`, got width {stage.width}, {stage.heads} heads, a grid of "
                f"{stage.side} and windows of {stage.window} in stage {stage.index}. Change one."
            )


@remember
def swin(operator: Choice = "softmax", **fields: Any) -> Model:
    """A Swin from an operator (or one a block) and the fields of `SwinConfig`."""
    config = SwinConfig(**fields)
    _check(config)
    config, operators = choose("swin", operator, config, fields)
    stages, universal = config.stages, config.sharing == "universal"
    places = [(stage, block) for stage in stages for block in range(stage.depth)]
    sites = [
        Site(
            f"operator.{s.index}" if universal else f"layers.{s.index}.blocks.{b}.operator",
            *(op, s.heads, s.window**2, s.width // s.heads),
            cut=windows.Cut(s.side, s.window, s.shift(b)),
            biased=True,
        )
        for (s, b), op in zip(places, operators, strict=True)
    ]

    def init(generator: Generator) -> Params:
        first = config.embed_dim
        embed = layers.patch_embed_init(generator, config.in_channels, config.patch_size, first)
        return {
            "patch_embed": {**embed, "norm": layers.layer_norm_init(first)},
            "layers": {str(s.index): stage_init(generator, s) for s in stages},
            "norm": layers.layer_norm_init(stages[-1].width),
            "head": {"fc": layers.linear_init(generator, stages[-1].width, config.num_classes)},
        }

    def stage_init(generator: Generator, stage: Stage) -> Params:
        def attn(generator: Generator, size: int) -> Params:
            table = ((2 * stage.window - 1) ** 2, stage.heads)
            return {
                "relative_position_bias_table": layers.truncated_normal(generator, *table),
                **blocks.attention_init(generator, size),
            }

        params: Params = {}
        if stage.index:
            params["downsample"] = {
                "norm": layers.layer_norm_init(2 * stage.width),
                "reduction": layers.linear_init(
                    generator, 2 * stage.width, stage.width, bias=False
                ),
            }
        hidden = int(stage.width * config.mlp_ratio)
        drawn = [
            blocks.block_init(generator, stage.width, hidden, attn) for _ in range(stage.depth)
        ]
        return {**params, "blocks": {str(b): block for b, block in enumerate(drawn)}}

    def forward(params: Params, images: Tensor, look: dict[str, Tensor] | None) -> Tensor:
        x = layers.patch_embed(params["patch_embed"], images)
        norm = params["patch_embed"]["norm"]
        # from here on the residual stream has the parameters' precision
        x = x.to(torch.promote_types(x.dtype, norm["weight"].dtype))
        x = layers.layer_norm(norm, x, EPS).unflatten(-2, (stages[0].side, stages[0].side))
        for i, ((stage, b), site) in enumerate(zip(places, sites, strict=True)):
            own = params["layers"][str(stage.index)]
            if b == 0 and stage.index:
                x = downsample(own["downsample"], x, images.dtype)
            attend = blocks.attend_at(site, params, look, f"blocks.{i}")
            shape = {"heads": stage.heads, "window": stage.window, "shift": stage.shift(b)}
            attn = functools.partial(window_attention, **shape, attend=attend)
            x = blocks.block(own["blocks"][str(b)], x, attn, images.dtype, EPS)
            if look is not None:
                look[f"blocks.{i}.tokens"] = x.flatten(-3, -2)
        pooled = layers.layer_norm(params["norm"], x, EPS).mean((-3, -2))
        return layers.linear(params["head"]["fc"], pooled)

    depths = {f"layers.{stage.index}.blocks": stage.depth for stage in stages}
    return blocks.model(config, init, forward, sites, depths)


def window_attention(
    params: Params, x: Tensor, heads: int, window: int, shift: int, attend: blocks.Attend
) -> Tensor:
    """Self-attention inside the windows of a square grid `(..., h, h, D)` rolled by `-shift`."""
    side = x.shape[-2]
    mask = windows.shift_mask(side, window, shift, x.device) if shift else None
    bias = windows.position_bias(params["relative_position_bias_table"], window)

    def attend_biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(*windows.biased(q, k, bias), v, mask)

    cut = windows.partition(x.roll((-shift, -shift), (-3, -2)) if shift else x, window)
    whole = windows.merge(
        blocks.attention(params, cut, heads, attend_biased, mask=mask), side, side
    )
    return whole.roll((shift, shift), (-3, -2)) if shift else whole


def downsample(params: Params, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Patch merging: tokens of 2 x 2 become one of twice the width, `(..., h/2, w/2, 2 D)`."""
    cut = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # (..., h/2, 2, w/2, 2, D)
    # the four in the order of the original: down first, then right
    four = cut.movedim(-4, -2).flatten(-3)
    four = layers.layer_norm(params["norm"], four, EPS)
    return layers.linear(params["reduction"], four.to(dtype)).to(x.dtype)


def work_of(config: SwinConfig) -> work.Layers:
    """The layers of a Swin, those of patch merging among the linear ones."""
    stages = config.stages
    patches, first = stages[0].side ** 2, config.embed_dim
    yield work.product("embed", patches, config.in_channels * config.patch_size**2, first)
    yield work.norm(patches, first)
    for stage in stages:
        tokens = stage.side**2
        if stage.index:
            yield work.norm(tokens, 2 * stage.width)
            yield work.product("linear", tokens, 2 * stage.width, stage.width)
        for _ in range(stage.depth):
            yield from work.block(tokens, stage.width, int(stage.width * config.mlp_ratio))
    yield work.norm(stages[-1].side ** 2, stages[-1].width)
    yield work.product("head", 1, stages[-1].width, config.num_classes)


# "swin_nano" is kart's own size for small images
FAMILY = Family(
    swin,
    SwinConfig,
    {
        "swin_nano": {"embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
        "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    },
    work_of,
)
