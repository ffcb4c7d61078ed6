"""KArAt in timm's vision transformers: a class for `attn_layer`.

    layer = kart.bridges.timm.attention("G3B", tokens=197)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer)

The modules are those of timm's `Attention` by name (`qkv`, `proj`, `q_norm`, `k_norm`, `norm`), so
that its weights load, with `operator` beside them, where `kart export --format timm` writes that of
a ViT and `kart.checkpoint.from_timm` finds it. timm itself is never imported.

Blocks of timm's that compute attention by themselves, as `ParallelScalingBlock`
(vit_base_patch16_xp_224), leave `attn_layer` aside without a word and keep softmax.
"""

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from kart import nn, operators
from kart.bridges import arguments

Norm = Callable[..., torch.nn.Module]


class Attention(nn.Attention):
    """timm's self-attention, `(B, N, D)` to `(B, N, D)`, with a row operator for softmax.

    `attention` makes the class that timm calls with its own arguments; these are they, and after
    them the operator.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Norm | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        tokens: int | None,
        operator: str | operators.Operator | nn.Operator,
        generator: Generator,
    ):
        arguments.check_no_dropout("attention", "attn_drop", attn_drop)
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        bias: dict[str, Any] = {"bias": qkv_bias, "proj_bias": proj_bias}
        super().__init__(dim, num_heads, tokens, operator, generator=generator, **bias, **given)
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(
                "`attention` needs `norm_layer` for qk_norm or scale_norm, got None. Pass one."
            )

        def norm(wanted: bool, width: int) -> torch.nn.Module:
            return norm_layer(width, **given) if wanted and norm_layer else torch.nn.Identity()

        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q_norm = norm(qk_norm, self.head_dim)
        self.k_norm = norm(qk_norm, self.head_dim)
        self.norm = norm(scale_norm, dim)
        self.proj_drop = torch.nn.Dropout(proj_drop)

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, the former two through the norms of `qk_norm`."""
        q, k, v = super().project(x, context)
        return self.q_norm(q), self.k_norm(k), v

    def join(self, out: Tensor) -> Tensor:
        """The heads side by side, through the norm of `scale_norm`, projected, some dropped."""
        return self.proj_drop(self.proj(self.norm(nn.merge_heads(out))))

    def forward(  # type: ignore[override]  # timm's names
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """`(B, N, D)`; `attn_mask` as timm has it: boolean, True = attend, or of 0 and -inf."""
        q, k, v = self.project(x)
        if is_causal:
            # as in timm, where it takes precedence
            attn_mask = nn.causal_mask(x.shape[-2], x.shape[-2], x.device)
        elif attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = arguments.from_additive("attention", "attn_mask", attn_mask)
        return self.join(self.operator(q, k, v, attn_mask))


class _Made(type):
    """What `attention` makes, which pickles as the call of it: models of timm's keep the class."""

    call: tuple[Any, ...]


def _again(operator: Any, tokens: Any, sharing: Any, generator: Any) -> type[torch.nn.Module]:
    """`attention` of what a class was made of."""
    return attention(operator, tokens, sharing=sharing, generator=generator)


copyreg.pickle(_Made, lambda made: (_again, made.call))  # type: ignore[arg-type]


def attention(
    operator: str | operators.Operator = "G3B",
    tokens: int | None = None,
    *,
    sharing: str | None = None,
    generator: Generator | None = None,
) -> type[torch.nn.Module]:
    """A class for `attn_layer` of timm's `create_model` and `VisionTransformer`.

    It is for one model: the blocks draw from one generator, one after the other, and with universal
    sharing they hold one operator, the first block's.

    Args:
        operator: a spec string or an Operator.
        tokens: the keys, class and register tokens among them (197 for 224 px in patches of 16);
            None for operators of any length.
        sharing: "blockwise" or "universal"; default what the spec says, else blockwise.
        generator: draws the parameters; None is a fresh one of seed 0.
    """
    op, universal = arguments.operator_and_sharing("attention", operator, sharing)
    source = nn.seeded(generator)
    made: list[nn.Operator] = []

    class Layer(torch.nn.Module, metaclass=_Made):
        """Makes an `Attention`, which pickles as any module."""

        call = (operator, tokens, sharing, generator)

        def __new__(cls, *args: Any, **given: Any) -> Any:
            own = made[0] if made else op
            layer = Attention(*args, **given, tokens=tokens, operator=own, generator=source)
            if universal and not made:
                made.append(layer.operator)
            return layer

    return Layer
