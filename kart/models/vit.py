"""The vision transformer of the paper: pre-norm blocks, class token, learned positions, GELU MLP.

Parameters carry the names of timm's ViT (`blocks.0.attn.qkv.weight`), so that weights move both
ways; the row operator adds `blocks.<i>.operator` (blockwise) or one `operator` (universal).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from kart import layers, operators
from kart.operators import Operator

Params = dict[str, Any]


@dataclass(frozen=True)
class ViTConfig:
    """Everything that defines a vision transformer; JSON-able when `operator` is a spec."""

    operator: str | tuple[str, ...] = "softmax"  # one spec, or one a block
    sharing: str = "blockwise"  # or "universal": all blocks share one operator
    rank: int | None = None  # r; None leaves it to the spec, else 12
    project: str | None = None
    base: str | None = None
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 192  # D
    depth: int = 12  # L
    num_heads: int = 3  # H, d = D / H
    mlp_ratio: float = 4.0

    @property
    def tokens(self) -> int:
        """N: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Model(NamedTuple):
    """A model as pure functions of its parameters.

    `init(generator)` draws them; `apply(params, images)` maps `(..., Cin, height, width)` to logits
    `(..., C)`; `intermediates(params, images)` returns, by name, "blocks.<i>.scores" and
    "blocks.<i>.weights" `(..., H, N, N)`, "blocks.<i>.tokens" `(..., N, D)` and "logits".
    `operators` are the row operators, one a block.
    """

    config: ViTConfig
    init: Callable[[Generator], Params]
    apply: Callable[[Params, Tensor], Tensor]
    intermediates: Callable[[Params, Tensor], dict[str, Tensor]]
    operators: tuple[Operator, ...]


def _check(config: ViTConfig) -> None:
    least_one = [
        "image_size",
        "patch_size",
        "in_channels",
        "num_classes",
        "embed_dim",
        "depth",
        "num_heads",
    ]
    for name in least_one:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`vit` needs an integer `{name}` >= 1, got {value!r}. Pass one.")
    for whole, part in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"`vit` needs `{whole}` divisible by `{part}`, got {getattr(config, whole)} and "
                f"{getattr(config, part)}. Change one of them."
            )
    if not 0 < config.mlp_ratio < math.inf:
        raise ValueError(f"`vit` needs `mlp_ratio` > 0, got {config.mlp_ratio!r}. ViTs use 4.")


def _resolve(
    given: str | Operator | Sequence[str | Operator], fields: dict[str, Any]
) -> tuple[str | tuple[str, ...], tuple[Operator, ...], str]:
    """Names for the config, one operator a block, and the sharing."""
    depth, asked = fields.get("depth", ViTConfig.depth), fields.get("sharing")
    if asked not in (None, "blockwise", "universal"):
        raise ValueError(
            f'`vit` needs `sharing` "blockwise" or "universal", got {asked!r}. Choose one of them.'
        )
    single = isinstance(given, str | Operator)
    ones = [given] if single else list(given)
    if not single and len(ones) != depth:
        raise ValueError(
            f"`vit` needs one operator, or one for each of {depth} blocks, got {len(ones)}. "
            "Give as many as `depth`."
        )
    options = {name: fields.get(name) for name in ("rank", "project", "base")}
    options = {name: value for name, value in options.items() if value is not None}
    # with several blocks, an option is for those that leave it open; for none, `parse` refuses it
    written = {one: operators.options(one) for one in ones if isinstance(one, str)}
    nobody = {name for name in options if not any(name in open_ for open_ in written.values())}
    specs = []
    parsed: dict[str, operators.Spec] = {}
    for one in ones:
        if isinstance(one, Operator):
            specs.append(operators.Spec(one, None))
        else:
            if one not in parsed:
                taken = written[one] | nobody
                fitting = {name: value for name, value in options.items() if name in taken}
                parsed[one] = operators.parse(one, **fitting)
            specs.append(parsed[one])
    if nobody and not written:
        raise ValueError(
            f"`vit` needs options that have an effect, got {sorted(nobody)} beside an Operator. "
            "Give them to the factory of the operator."
        )
    modes = {mode for mode in (asked, *(spec.sharing for spec in specs)) if mode is not None}
    if len(modes) > 1:
        raise ValueError(
            f"`vit` needs one way of sharing, got {sorted(modes)} from the spec {given!r} and "
            f"`sharing`={asked!r}. Drop the letter of the spec or the argument."
        )
    sharing = modes.pop() if modes else "blockwise"
    if sharing == "universal" and not single:
        raise ValueError(
            f"`vit` needs one operator for universal sharing, got {len(ones)}. "
            "Give one spec, or share blockwise."
        )
    names = tuple(spec.operator.name for spec in specs)
    blocks = tuple(spec.operator for spec in specs) * (depth if single else 1)
    return (names[0] if single else names), blocks, sharing


def vit(operator: str | Operator | Sequence[str | Operator] = "softmax", **fields: Any) -> Model:
    """A vision transformer from an operator (or one a block) and the fields of `ViTConfig`."""
    names, blocks_operators, sharing = _resolve(operator, fields)
    config = ViTConfig(operator=names, **{**fields, "sharing": sharing})
    _check(config)
    size, heads, tokens = config.embed_dim, config.num_heads, config.tokens
    universal = config.sharing == "universal"

    def init(generator: Generator) -> Params:
        hidden = int(size * config.mlp_ratio)
        params: Params = {
            "patch_embed": layers.patch_embed_init(
                generator, config.in_channels, config.patch_size, size
            ),
            "cls_token": layers.truncated_normal(generator, 1, 1, size),
            "pos_embed": layers.truncated_normal(generator, 1, tokens, size),
            "blocks": {
                str(i): {
                    "norm1": layers.layer_norm_init(size),
                    "attn": {
                        "qkv": layers.linear_init(generator, size, 3 * size),
                        "proj": layers.linear_init(generator, size, size),
                    },
                    "norm2": layers.layer_norm_init(size),
                    "mlp": layers.mlp_init(generator, size, hidden),
                }
                for i in range(config.depth)
            },
            "norm": layers.layer_norm_init(size),
            "head": layers.linear_init(generator, size, config.num_classes),
        }
        # last, so that models which differ in the operator alone start from the same backbone
        if universal:
            params["operator"] = blocks_operators[0].init(generator, heads, tokens)
        else:
            for i, op in enumerate(blocks_operators):
                params["blocks"][str(i)]["operator"] = op.init(generator, heads, tokens)
        return params

    def check_images(images: Tensor) -> None:
        expected = (config.in_channels, config.image_size, config.image_size)
        if not images.dtype.is_floating_point:
            raise ValueError(
                f"`apply` needs floating-point images, got {images.dtype}. "
                "Scale them with kart.data.normalise."
            )
        if images.dim() < 3 or tuple(images.shape[-3:]) != expected:
            raise ValueError(
                f"`apply` needs images (..., {', '.join(map(str, expected))}), got shape "
                f"{tuple(images.shape)}. Resize them, or create the model for this size."
            )

    def embed(params: Params, images: Tensor) -> Tensor:
        x = layers.patch_embed(params["patch_embed"], images)
        first = params["cls_token"][0].to(x.dtype).expand(*x.shape[:-2], 1, size)
        # the residual stream stays in the parameters' precision when images are bfloat16
        return torch.cat([first, x], dim=-2) + params["pos_embed"][0]

    def split_heads(block: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = layers.linear(block["attn"]["qkv"], x)
        qkv = qkv.unflatten(-1, (3, heads, size // heads)).movedim(-3, 0).transpose(-3, -2)
        q, k, v = qkv.unbind(0)  # each (..., H, N, d)
        return q, k, v

    def close_block(block: Params, x: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
        merged = out.transpose(-3, -2).flatten(-2)  # (..., N, D)
        x = x + layers.linear(block["attn"]["proj"], merged)
        return x + layers.mlp(block["mlp"], layers.layer_norm(block["norm2"], x).to(dtype))

    def classify(params: Params, x: Tensor) -> Tensor:
        return layers.linear(params["head"], layers.layer_norm(params["norm"], x[..., 0, :]))

    def operator_params(params: Params, i: int) -> Params:
        return params["operator"] if universal else params["blocks"][str(i)]["operator"]

    def apply(params: Params, images: Tensor) -> Tensor:
        check_images(images)
        x = embed(params, images)
        for i, op in enumerate(blocks_operators):
            block = params["blocks"][str(i)]
            q, k, v = split_heads(block, layers.layer_norm(block["norm1"], x).to(images.dtype))
            out = op.attend(operator_params(params, i), q, k, v)
            x = close_block(block, x, out, images.dtype)
        return classify(params, x)

    def intermediates(params: Params, images: Tensor) -> dict[str, Tensor]:
        check_images(images)
        aux: dict[str, Tensor] = {}
        x = embed(params, images)
        for i, op in enumerate(blocks_operators):
            block = params["blocks"][str(i)]
            q, k, v = split_heads(block, layers.layer_norm(block["norm1"], x).to(images.dtype))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = op.weights(operator_params(params, i), scores)
            x = close_block(block, x, weights @ v, images.dtype)
            aux[f"blocks.{i}.scores"] = scores
            aux[f"blocks.{i}.weights"] = weights
            aux[f"blocks.{i}.tokens"] = x
        aux["logits"] = classify(params, x)
        return aux

    return Model(config, init, apply, intermediates, blocks_operators)
