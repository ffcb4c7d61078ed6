"""A drop-in for `torch.nn.MultiheadAttention`, with a row operator for softmax."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from kart import layers, nn, operators, schema
from kart.bridges import arguments


class MultiheadAttention(torch.nn.Module):
    """`torch.nn.MultiheadAttention` with a row operator: the same call, names and masks.

    Weights of the original load (`strict=False`: the operator's, `operator.<name>`, are its own).
    Put into a `torch.nn.TransformerEncoder` that is made already, set its `use_nested_tensor` to
    False: nested tensors are refused.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as there.
        dropout: 0; there are no weights to drop.
        add_bias_kv, add_zero_attn: False; they add keys, which an operator has no parameters for.
        operator: a spec string, an Operator or a module of `kart.nn.operator`.
        tokens: the number of keys; None for operators of any length.
        generator: draws the parameters; None is a fresh one of seed 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str | operators.Operator | nn.Operator = "G3B",
        tokens: int | None = None,
        generator: Generator | None = None,
    ):
        super().__init__()
        arguments.check_no_dropout("MultiheadAttention", "dropout", dropout)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(
                    f"`MultiheadAttention` needs `{name}` False, got {value!r}: it adds a key, "
                    "which the operator has no parameters for. Leave it out."
                )
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, value in sizes.items():
            if value is not None:
                schema.check_integer("MultiheadAttention", name, value, 1)
        if embed_dim % num_heads:
            raise ValueError(
                f"`MultiheadAttention` needs `num_heads` to divide `embed_dim`, got {num_heads} "
                f"and {embed_dim}. Choose a divisor."
            )
        generator = nn.seeded(generator)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        self.head_dim, self.dropout = embed_dim // num_heads, dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        # TransformerEncoderLayer asks it, and where it is True computes softmax by itself
        self._qkv_same_embed_dim = False
        given = nn.placed(device, dtype)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(layers.truncated_normal(generator, *shape).to(**given))

        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(embed_dim, self.kdim)
            self.v_proj_weight = parameter(embed_dim, self.vdim)
        zeros = torch.zeros(3 * embed_dim, **given) if bias else None
        self.in_proj_bias = None if zeros is None else torch.nn.Parameter(zeros)
        self.out_proj = nn.linear(generator, embed_dim, embed_dim, bias, **given)
        self.operator = nn.own_or_shared(operator, num_heads, tokens, generator, **given)

    def project(self, *inputs: Tensor) -> list[Tensor]:
        """q, k and v `(B, H, ., d)` of the three inputs `(B, ., .)`."""
        if self.kdim == self.vdim == self.embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        for name, x, weight in zip(("query", "key", "value"), inputs, weights, strict=True):
            if x.dim() != 3 or x.shape[-1] != weight.shape[1]:
                raise ValueError(
                    f"`MultiheadAttention` needs `{name}` of width {weight.shape[1]} and two or "
                    f"three axes, got {tuple(x.shape)}. See `batch_first`, `kdim` and `vdim`."
                )
            nn.check_device("MultiheadAttention", self, x)
            nn.check_dtype("MultiheadAttention", name, weight, x)
        batches = [x.shape[0] for x in inputs]  # `len` would fix them in a graph
        if any(batch != batches[0] for batch in batches):
            raise ValueError(
                f"`MultiheadAttention` needs `query`, `key` and `value` of as many samples, got "
                f"{batches}. See `batch_first`."
            )
        made = zip(inputs, weights, biases, strict=True)
        return [nn.split_heads(functional.linear(*one), self.num_heads) for one in made]

    def mask(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """The mask `(B or 1, H or 1, N or 1, M)`, True = attend, of torch's, True = ignore."""
        batch, heads, queries, keys = *q.shape[:-1], k.shape[-2]
        found = nn.causal_mask(queries, keys, q.device)[None, None] if is_causal else None
        shapes = {
            "key_padding_mask": [(batch, keys)],
            "attn_mask": [(queries, keys), (batch * heads, queries, keys)],
        }
        for name, one in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if one is None:
                continue
            if tuple(one.shape) not in shapes[name]:
                raise ValueError(
                    f"`MultiheadAttention` needs `{name}` of shape "
                    f"{' or '.join(map(str, shapes[name]))}, got {tuple(one.shape)}. True there "
                    "means ignore, as in torch."
                )
            if one.dtype == torch.bool:
                seen = ~one
            else:
                seen = arguments.from_additive("MultiheadAttention", name, one)
            if name == "key_padding_mask":
                seen = seen[:, None, None]
            else:
                seen = seen.view(-1, heads if one.dim() == 3 else 1, queries, keys)
            found = seen if found is None else found & seen
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, shaped as `query`, and the weights `(B, N, M)`, None without `need_weights`.

        Args:
            query, key, value: (N, B, D), (B, N, D) with `batch_first`, or (N, D).
            key_padding_mask: (B, M), boolean, True = ignore, or of 0 and -inf.
            need_weights: also materialises the weights.
            attn_mask: (N, M) or (B H, N, M), as `key_padding_mask`.
            average_attn_weights: over the heads; else they are (B, H, N, M).
            is_causal: masks what comes later, whether or not `attn_mask` does.
        """
        masks = [x for x in (key_padding_mask, attn_mask) if x is not None]
        if not all(isinstance(x, Tensor) for x in (query, key, value, *masks)):
            kinds = ", ".join(type(x).__name__ for x in (query, key, value, *masks))
            raise ValueError(
                f"`MultiheadAttention` needs `query`, `key`, `value` and masks as tensors, got "
                f"{kinds}. Convert them with `torch.as_tensor`."
            )
        if any(x.is_nested for x in (query, key, value)):
            raise ValueError(
                "`MultiheadAttention` needs tensors of one length, got a nested one, as "
                "torch.nn.TransformerEncoder makes them of a padding mask without gradients. Set "
                "`use_nested_tensor = False` of that encoder; else pad them, and pass the mask."
            )
        single = query.dim() == 2
        if single:
            inputs = [x[None] for x in (query, key, value)]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask[None]
        else:
            inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        q, k, v = self.project(*inputs)
        mask = self.mask(q, k, key_padding_mask, attn_mask, is_causal)
        out = self.out_proj(nn.merge_heads(self.operator(q, k, v, mask)))
        weights = None
        if need_weights:
            weights = self.operator.weights(q, k, mask)
            weights = weights.mean(1) if average_attn_weights else weights
        if single:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights
