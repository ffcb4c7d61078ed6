"""Attention of linear cost, to compare with: Linformer, Performer, cosFormer."""

import math

import torch
from torch import Generator, Tensor

from kart import bases, kernels, schema
from kart.bases import Params
from kart.factories import remember
from kart.kernels.plain import wide
from kart.operators.comparators import check_head
from kart.operators.contract import (
    Factored,
    Operator,
    Source,
    check_names,
    check_rank,
    from_forms,
    from_logits,
    only,
    same_for_all_queries,
    softmax_rows,
)
from kart.operators.resize import Lattice, interpolate
from kart.operators.static import mixed

ALONE = "queries and keys by themselves"  # what determines weights that scores do not


@remember
def linformer(rank: int = 16) -> Operator:
    """softmax(S E^T) F, E and F matrices r x M: keys and values are projected to r tokens (Wang et
    al. 2020, arXiv:2006.04768, eq. 7).

    Its N x M weights have rank at most r. A masked key is left out of both sums.

    Parameters `{"keys": E, (H, r, M), "values": F, (H, r, M)}`, drawn with variance 1 / M, so that
    a sum over the keys has the size of its terms (the paper's proof has 1 / r).
    """
    check_rank("linformer", rank)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        draw = [bases.normal(generator, (heads, rank, tokens)) * tokens**-0.5 for _ in range(2)]
        return {"keys": draw[0], "values": draw[1]}

    def logits(params: Params, scores: Source) -> Factored:
        return Factored(scores.mixed(params["keys"]).softmax(-1), params["values"].mT)

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        check_names("resize", params, ["keys", "values"])
        return {name: interpolate(leaf, 2, old, new, True) for name, leaf in params.items()}

    return from_logits(
        "linformer",
        init,
        logits,
        lambda params: params["keys"].shape[-1],
        resize=resize,
        options={"rank": rank},
        rank=rank,
        traits={
            "rank": rank,
            "product_flops": lambda tokens, width: 4 * tokens * rank * width,
            "activation_flops": lambda tokens, unit: 3 * tokens * rank,
        },
    )


@remember
def performer(width: int = 64, features: int = 64) -> Operator:
    """Weights phi(q) phi(k)^T by rows of sum 1, phi(x) = exp(w x - |x|^2 / 2) of random w: FAVOR+
    with positive orthogonal features (Choromanski et al. 2021, arXiv:2009.14794, sec. 2.3 to 2.4).

    An estimate of softmax in O(N m d). The directions are orthogonal in blocks of d and of length
    sqrt(d), the paper's regularised kernel. They are drawn by `init` and not trained: they have no
    gradient, and only their direction counts, which weight decay leaves as it is. Scores do not
    determine the weights (|k| counts): `weights` is an error.

    A constant added in the exponent of a feature cancels in the ratio; those here are the largest
    of the keys and of the query, so that nothing overflows and no sum vanishes, without the
    published code's epsilon. Masks that differ between queries take the quadratic form, a block of
    queries at a time.

    Parameters `{"directions": (H, m, d)}`.

    Args:
        width: d, the numbers of a head, embed_dim / num_heads.
        features: m.
    """
    schema.check_integer("performer", "width", width, 1, "It is embed_dim / num_heads.")
    schema.check_integer("performer", "features", features, 1, "The default is 64.")

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        blocks = -(-features // width)
        drawn = bases.normal(generator, (heads, blocks, width, width))
        directions = torch.linalg.qr(drawn).Q.mT.flatten(1, 2)[:, :features]
        return {"directions": directions.contiguous()}

    def block(a: Tensor, b: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        logits = torch.logsumexp(a[..., :, None, :] + b[..., None, :, :], -1)
        return softmax_rows(logits, mask) @ v

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        check_head("performer", params["directions"].shape[-1], q)
        q, k, v = wide(q), wide(k), wide(v)
        directions = params["directions"].detach().to(q.dtype)
        length = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
        w = (directions * (math.sqrt(width) / length)).mT  # (H, d, m)
        q, k = q * width**-0.25, k * width**-0.25
        # the term of |q| is the same for all keys: it cancels
        a, b = mixed(q, w), mixed(k, w) - k.square().sum(-1, keepdim=True) / 2
        # one query costs the same in either form, and is then rounded as it is among others
        if not same_for_all_queries(mask) or (mask is not None and q.shape[-2] == 1):
            return kernels.by_queries(block, [a], [b, v], mask, features)
        seen = None if mask is None else mask.mT
        b = b if seen is None else torch.where(seen, b, torch.finfo(b.dtype).min)
        highest = b.detach().amax(-2, keepdim=True)
        keys = only((b - highest).exp(), seen)
        a = a + highest
        queries = (a - a.detach().amax(-1, keepdim=True)).exp()
        total = queries @ keys.sum(-2)[..., None]
        # at least 1 where there is any key
        return queries @ (keys.mT @ v) / torch.where(total == 0, 1, total)

    options = {"width": width, "features": features}
    traits = {
        "length_free": True,
        "product_flops": lambda tokens, width: 4 * tokens * features * width,
        "activation_flops": lambda tokens, unit: 3 * 2 * tokens * features,
    }
    return from_forms("performer", init, ALONE, attend, options=options, traits=traits)


# a sum of relu products may be zero: the floor of the published code
FLOOR = 1e-6


@remember
def cosformer() -> Operator:
    """Weights relu(q) relu(k)^T cos(pi (i - j) / 2L) by rows of sum 1, i and j the places of query
    and key and L the larger number of tokens (Qin et al. 2022, arXiv:2202.08791, eq. 9 to 11).

    The cosine of a difference is a sum of two products, so that the cost is O(N d^2). Tokens stand
    in a row: class token first, then the patches. Scores do not determine the weights: `weights` is
    an error. Masks that differ between queries take the quadratic form, a block of queries at a
    time. As L is known when all tokens are, they cannot come in parts.
    """

    def turned(x: Tensor, longest: int) -> Tensor:
        """`relu(x)` times cosine and sine of its place, `(..., N, 2 d)`."""
        place = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None]
        angle = place * (math.pi / 2 / longest)
        return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)

    def block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = only(q @ k.mT, mask)
        return y @ v / y.sum(-1, keepdim=True).clamp(min=FLOOR)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = wide(q), wide(k), wide(v)
        longest = max(q.shape[-2], k.shape[-2])
        queries, keys = turned(q, longest), turned(k, longest)
        if not same_for_all_queries(mask):
            return kernels.by_queries(block, [queries], [keys, v], mask)
        # masked keys are zero
        total = queries @ keys.sum(-2)[..., None]
        return queries @ (keys.mT @ v) / total.clamp(min=FLOOR)

    traits = {
        "length_free": True,
        "by_length": True,
        # features of 2 d; two operations for each
        "product_flops": lambda tokens, width: 4 * tokens * width**2 + 8 * tokens * width,
        "activation_flops": lambda tokens, unit: 0,
    }
    return from_forms("cosformer", None, ALONE, attend, traits=traits)
