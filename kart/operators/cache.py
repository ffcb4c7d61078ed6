"""Generation: causal attention of tokens that come in parts, with the keys and values so far."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kart.bases import Params
from kart.operators.contract import Operator, check_qkv


class Cache(NamedTuple):
    """Keys `(..., H, M, d)` and values `(..., H, M, e)` of the tokens so far."""

    keys: Tensor
    values: Tensor


def step(
    op: Operator,
    params: Params,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, Cache]:
    """Attention of N more tokens, each to itself and all before: `(..., H, N, e)`, and the cache
    with them.

    In however many parts tokens come, the outputs are those of one pass under a causal mask. With
    parameters for a fixed number of keys, the keys to come are there and masked; and where weights
    are by the place of the query among them, so are the other queries, at the cost of that pass.

    Args:
        op, params: the operator.
        q, k, v: of the N tokens.
        cache: of the tokens before, None at the first.
        tokens: the number of keys that `params` are for, None where they fit any.
    """
    check_qkv(op.name, q, k, v, None)
    if op.traits.get("by_length"):
        raise ValueError(
            f"`step` needs weights that later tokens leave as they are, got {op.name!r}, whose "
            "weights are by the number of all tokens. Attend with all of them."
        )
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"`step` needs queries and keys of the same tokens, got {q.shape[-2]} and "
            f"{k.shape[-2]}. Pass those of the new tokens."
        )
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`step` needs `cache` as it returned it, got {type(cache).__name__}. Pass None first, "
            "or make a `kart.operators.Cache(keys, values)`."
        )
    if cache is not None:
        for name, old, more in (("keys", cache.keys, k), ("values", cache.values, v)):
            if old.shape[:-2] != more.shape[:-2] or old.shape[-1] != more.shape[-1]:
                raise ValueError(
                    "`step` needs a `cache` of the samples and heads of the new tokens, got "
                    f"{name} {tuple(old.shape)} for {tuple(more.shape)}. Index both alike."
                )
            if (old.dtype, old.device) != (more.dtype, more.device):
                raise ValueError(
                    f"`step` needs a `cache` like the new tokens, {more.dtype} on {more.device}, "
                    f"got {name} {old.dtype} on {old.device}. Convert them with `.to`, or start a "
                    "new cache."
                )
        k, v = torch.cat([cache.keys, k], -2), torch.cat([cache.values, v], -2)
    new, count = q.shape[-2], k.shape[-2]
    if tokens is not None and count > tokens:
        raise ValueError(
            f"`step` needs at most the {tokens} tokens that `params` are for, got {count}. Start a "
            "new cache, or move the parameters with `kart.operators.resize`."
        )
    total = count if tokens is None else tokens
    keys, values = k, v
    if total > count:
        keys, values = (functional.pad(x, (0, 0, 0, total - count)) for x in (k, v))
    first = count - new
    # which queries are there: the new ones, or all that the operator expects beside the keys
    start, stop = first, count
    if op.traits.get("self_attention") or (op.traits.get("queries_last") and total > count):
        start, stop = 0, total
        q = functional.pad(q, (0, 0, first, total - count))
    mask = None
    if stop - start > 1 or total > count:
        rows = torch.arange(start, stop, device=q.device)[:, None]
        mask = torch.arange(total, device=q.device) <= rows
    out = op.attend(params, q, keys, values, mask)
    return out[..., first - start : count - start, :], Cache(k, v)
