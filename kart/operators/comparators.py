"""What else stands where softmax stood, to compare with: fixed, tempered, gated, of queries alone.

gMLP's spatial gate (Liu et al. 2021, arXiv:2105.08050) is in part an operator: its mixing of tokens
is `static` (one head, with a bias a token), its product with another half of the channels is not,
for an operator has no say in what becomes of its output.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from kart import bases, kernels, schema
from kart.bases import Params
from kart.factories import remember
from kart.kernels.plain import wide
from kart.operators.contract import (
    Factored,
    Operator,
    check_keys,
    check_names,
    check_shapes,
    from_forms,
    from_rows,
    only,
    scored,
    softmax_rows,
    values_of,
)
from kart.operators.fixed import on_simplex
from kart.operators.relative import check_geometry, lattice_of
from kart.operators.resize import Lattice, check_read, interpolate
from kart.operators.static import check_square, matrix_values, mixed


def entmax_rows(scores: Tensor, mask: Tensor | None) -> Tensor:
    """1.5-entmax of each row over the keys that it attends to; a row of none is zero.

    `p = max(s / 2 - tau, 0)^2` with tau such that they sum to 1. Of a row sorted from its largest
    entry on, tau for the first k is `mean - sqrt((1 - sum of squared deviations) / k)`, and k the
    last whose entry is not below its tau.
    """
    hidden = scores if mask is None else torch.where(mask, scores, torch.finfo(scores.dtype).min)
    x = hidden / 2
    x = x - x.detach().amax(-1, keepdim=True)
    # tau is at least -1, as (0 - tau)^2 <= 1: what is below it is outside, and kept from the sums
    ordered = x.detach().clamp(min=-1).sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = ordered.cumsum(-1) / count
    deviations = ordered.square().cumsum(-1) - count * mean.square()
    tau = mean - ((1 - deviations) / count).clamp(min=0).sqrt()
    last = ((tau <= ordered).sum(-1, keepdim=True) - 1).clamp(min=0)
    # a row with NaN is all NaN, not outside
    support = ~(x.detach() <= tau.gather(-1, last))
    # written out on the support, where it is smooth, so that every derivative comes out right
    size = support.sum(-1, keepdim=True)
    mean = torch.where(support, x, 0).sum(-1, keepdim=True) / size
    deviations = torch.where(support, x - mean, 0).square().sum(-1, keepdim=True)
    tau = mean - ((1 - deviations) / size).sqrt()
    return only(torch.where(support, (x - tau).clamp(min=0).square(), 0), mask)


@remember
def entmax() -> Operator:
    """Rows of 1.5-entmax, between softmax (1) and sparsemax (2): sparse and smooth (Peters, Niculae
    and Martins 2019, arXiv:1905.05702, algorithm 2).
    """
    return from_rows("entmax", entmax_rows, traits=on_simplex(8))


@remember
def tempered() -> Operator:
    """softmax(exp(a) S) with a learned a per head, 0 at the start (Lee, Lee and Song 2021,
    arXiv:2112.13492, eq. 5, who learn the temperature itself).

    Parameters `{"sharpness": a, (H,)}`.
    """

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        return {"sharpness": torch.zeros(heads, **bases.DRAWN)}

    def factor(params: Params, like: Tensor) -> Tensor:
        return params["sharpness"].to(like.dtype).exp()[:, None, None]

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        return softmax_rows(scores * factor(params, scores), mask)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = wide(q), wide(k), wide(v)
        return kernels.softmax_attention(q * factor(params, q), k, v, mask)

    def fits(params: Params, queries: int, keys: int) -> None:
        check_shapes("tempered", params, {"sharpness": ()})

    traits: dict[str, Any] = {"length_free": True, "simplex": True, "shift_invariant": True}
    traits |= {"softmax_base": True, "softmax_start": True, **scored(4)}
    return from_forms("tempered", init, weights, attend, fits=fits, traits=traits)


def squared_offsets(lattice: Lattice, like: Tensor) -> Tensor:
    """`(x, y, x^2 + y^2)` of the key m from the query n in patches, `(N, N, 3)`; zero for pairs
    with a prefix token.
    """
    prefix, rows, columns = lattice.prefix or 0, lattice.rows, lattice.columns
    down = torch.arange(rows, dtype=like.dtype, device=like.device).repeat_interleave(columns)
    right = torch.arange(columns, dtype=like.dtype, device=like.device).repeat(rows)
    y, x = (t - t[:, None] for t in (down, right))
    pairs = torch.stack([x, y, x.square() + y.square()], -1)
    return functional.pad(pairs, (0, 0, prefix, 0, prefix, 0)) if prefix else pairs


def neighbours(heads: int) -> Tensor:
    """Factors of `squared_offsets`, `(s^2, 3)`, of as many heads as make a square: each looks at
    one neighbour of a square around the query, down first, as timm counts the heads.
    """
    side = math.isqrt(heads)
    offset = torch.arange(side, **bases.DRAWN) - (side - 1) / 2
    right, down = offset.repeat_interleave(side), offset.repeat(side)
    return torch.stack([2 * right, 2 * down, -torch.ones_like(right)], -1)


@remember
def gated(prefix: int | None = None, rows: int | None = None, locality: float = 1.0) -> Operator:
    """(1 - g) softmax(S) + g softmax(P), P a quadratic in the offset and g a gate per head: the
    gated positional attention of ConViT (d'Ascoli et al. 2021, arXiv:2103.10697, eq. 7).

    Parameters `{"gate": (H,), "position": (H, 3)}`; g is the sigmoid of the gate and P of offset
    (x, y) is `position . (x, y, x^2 + y^2)`. ConViT adds its class token after these blocks; here P
    is 0 for pairs with a prefix token. (`kart.models` has ConViT itself, whose blocks take an
    operator for the content.)

    Args:
        prefix, rows: the tokens, as in `relative`.
        locality: how sharply heads look at one neighbour of a square around the query at the start.
    """
    check_geometry("gated", prefix, rows)
    if not schema.fits(locality, float) or not 0 <= locality < math.inf:
        raise ValueError(
            f"`gated` needs a finite `locality` >= 0, got {locality!r}. ConViT uses 1."
        )

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        lattice_of("gated", tokens, prefix, rows)
        nearest = neighbours(heads)
        # heads beyond a square look at no neighbour
        others = bases.normal(generator, (heads - len(nearest), 3)) * 3**-0.5
        gate = torch.ones(heads, **bases.DRAWN)
        return {"gate": gate, "position": locality * torch.cat([nearest, others])}

    def parts(params: Params, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """g, `(H, 1, 1)`, and P, `(H, N, N)`."""
        position = params["position"].to(dtype)
        offsets = squared_offsets(lattice_of("gated", keys, prefix, rows), position)
        gate = params["gate"].to(dtype).sigmoid()[:, None, None]
        return gate, torch.einsum("nmj,hj->hnm", offsets, position)

    def fits(params: Params, queries: int, keys: int) -> None:
        check_shapes("gated", params, {"gate": (), "position": (3,)})
        check_square("gated", keys, queries, keys)

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        gate, p = parts(params, scores.shape[-1], scores.dtype)
        return (1 - gate) * softmax_rows(scores, mask) + gate * softmax_rows(p, mask)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = wide(q), wide(k), wide(v)
        gate, p = parts(params, k.shape[-2], v.dtype)
        content = kernels.softmax_attention(q, k, v, mask)
        return (1 - gate) * content + gate * matrix_values(p, v, mask, normalise=True)

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        before = (prefix or 0) if new.prefix is None else new.prefix
        check_read("gated", new, lattice_of("gated", before + new.patches, prefix, rows))
        # offsets in patches: those of a finer lattice are longer
        right, down = old.columns / new.columns, old.rows / new.rows
        scale = params["position"].new_tensor([right, down, right * down])
        return {**params, "position": params["position"] * scale}

    options = {"prefix": prefix, "rows": rows, "locality": locality}
    # two softmaxes, the quadratic in between, the mixture
    traits = {"self_attention": True, "simplex": True, **scored(3 + 3 + 3 + 2)}
    return from_forms(
        "gated", init, weights, attend, fits=fits, resize=resize, options=options, traits=traits
    )


def check_head(name: str, expected: int, q: Tensor) -> None:
    """Raises ValueError unless queries have the width that parameters are for."""
    if q.shape[-1] != expected:
        raise ValueError(
            f"`{name}` was made for heads of {expected} numbers, got {q.shape[-1]}. Say "
            f"width={q.shape[-1]}."
        )


@remember
def synthesizer(
    width: int = 64, normalise: str | None = "softmax", base: str | None = None
) -> Operator:
    """The dense Synthesizer: weights of each query from itself, softmax(W2 relu(W1 q + b1) + b2)
    over the keys (Tay et al. 2021, arXiv:2005.00743, eq. 1 to 3).

    Keys have no part in it, so scores do not determine the weights: `weights` is an error. Without
    `normalise` the weights are signed, and `base="softmax"` adds softmax(S), which is then the
    start. The Synthesizer's random variants are `static(normalise="softmax")`.

    Parameters `{"first": W1, (H, d, d), "bias": (H, d), "second": W2, (H, d, M), "shift": (H, M)}`.

    Args:
        width: d, the numbers of a head, embed_dim / num_heads.
        normalise: "softmax", or None.
        base: None, or "softmax", which is added.
    """
    schema.check_integer("synthesizer", "width", width, 1, "It is embed_dim / num_heads.")
    schema.check_choice("synthesizer", "normalise", normalise, [None, "softmax"])
    schema.check_choice("synthesizer", "base", base, [None, "softmax"])
    from_softmax = base is not None and normalise is None

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        first = bases.normal(generator, (heads, width, width)) * width**-0.5
        second = bases.normal(generator, (heads, width, tokens)) * width**-0.5
        # weights without softmax keep the output of a head at the size of its values
        scale = 0.0 if from_softmax else 1.0 if normalise else tokens**-0.5
        bias, shift = (torch.zeros(heads, n, **bases.DRAWN) for n in (width, tokens))
        return {"first": first, "bias": bias, "second": second * scale, "shift": shift}

    def hidden(q: Tensor, first: Tensor, bias: Tensor) -> Tensor:
        return (mixed(q, first) + bias[:, None]).relu()

    def block(q: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        first, bias, second, shift, mask = rest
        logits = mixed(hidden(q, first, bias), second) + shift[:, None]
        return softmax_rows(logits, mask) @ v

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        names = ("first", "bias", "second", "shift")
        check_names("synthesizer", params, names)
        check_head("synthesizer", params["first"].shape[-2], q)
        check_keys("synthesizer", params["shift"].shape[-1], k.shape[-2])
        d, m = q.shape[-1], k.shape[-2]
        own = {"first": (d, d), "bias": (d,), "second": (d, m), "shift": (m,)}
        check_shapes("synthesizer", params, own)
        q, k, v = wide(q), wide(k), wide(v)
        leaves = [params[x].to(q.dtype) for x in names]
        first, bias, second, shift = leaves
        if normalise:
            out = kernels.by_queries(block, [q], [v, *leaves], mask)
        else:
            left = hidden(q, first, bias)
            left = torch.cat([left, torch.ones_like(left[..., :1])], -1)
            right = torch.cat([second.mT, shift[..., None]], -1)
            out = values_of(Factored(left, right), v, mask)
        # the axes of k, which has no other part
        if k.shape[:-2] != out.shape[:-2]:
            lead = torch.broadcast_shapes(k.shape[:-2], out.shape[:-2])
            out = out.expand(*lead, *out.shape[-2:])
        return out + kernels.softmax_attention(q, k, v, mask) if base else out

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        amplitude = normalise is None
        moved = {
            name: interpolate(params[name], axis, old, new, amplitude)
            for name, axis in (("second", 2), ("shift", 1))
        }
        return {**params, **moved}

    def product_flops(tokens: int, width: int) -> int:
        scores = tokens**2 * width if base else 0
        return tokens * width**2 + 2 * tokens**2 * width + scores

    each = 3 * (normalise is not None) + 4 * (base is not None)
    return from_forms(
        "synthesizer",
        init,
        "the queries alone",
        attend,
        resize=resize,
        options={"width": width, "normalise": normalise, "base": base},
        traits={
            "softmax_start": from_softmax,
            "product_flops": product_flops,
            "activation_flops": lambda tokens, unit: each * tokens**2,
        },
    )
