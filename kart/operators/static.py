"""Static mixing: weights that are parameters of the positions and ignore the scores.

`from_matrix` makes an operator of any matrix T of queries x keys that parameters stand for: alone,
beside softmax, or inside it. `static` is the matrix itself, full or of low rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    check_fits_memory,
    check_keys,
    check_rank,
    check_shapes,
    from_forms,
    only,
    same_for_all_queries,
    softmax_rows,
)
from kart.operators.resize import Lattice, interpolate

STARTS = ("scaled", "zero")


def check_square(name: str, expected: int, queries: int, keys: int) -> None:
    """Raises ValueError unless queries and keys are the tokens that the parameters are for."""
    check_keys(name, expected, keys)
    if queries != keys:
        raise ValueError(
            f"`{name}` needs the queries to be the tokens of the keys, got {queries} queries and "
            f"{keys} keys. Its weights are by position: attend with all {keys} tokens."
        )


class Form(NamedTuple):
    """What becomes of a matrix T, see `from_matrix`, and at which `start`: "zero" where T is 0."""

    signed: bool
    normalise: str | None
    base: str | None
    inside: bool
    start: str


def check_form(name: str, form: Form) -> None:
    """Raises ValueError unless a form says one thing about what becomes of the matrix."""
    signed, normalise, base, inside, _ = form
    schema.check_choice(name, "normalise", normalise, [None, "softmax"])
    schema.check_choice(name, "base", base, [None, "softmax"])
    for argument, value in (("signed", signed), ("inside", inside)):
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` needs `{argument}` True or False, got {value!r}.")
    if inside and (base or normalise or not signed):
        raise ValueError(
            f"`{name}` needs `inside` alone, which is softmax(S + T), got it with base={base!r}, "
            f"normalise={normalise!r}, signed={signed}. Leave the others out."
        )
    if normalise and not signed:
        raise ValueError(
            f"`{name}` needs `signed` or `normalise`, got signed=False with "
            f"normalise={normalise!r}, whose weights are positive already. Leave one out."
        )


def mixed(matrix: Tensor, v: Tensor) -> Tensor:
    """`matrix (H, N, M)` times `v (..., H, M, e)`, where either may have more axes in front; a
    matmul would repeat the other a sample.
    """
    if torch.compiler.is_exporting():  # ONNX wants as many axes in every ellipsis
        return matrix @ v
    return torch.einsum("...nm,...me->...ne", matrix, v)


def beside(x: Tensor, y: Tensor) -> Tensor:
    """`x (..., H, N, d)` and `y (H, N, r)` side by side, `(..., H, N, d + r)`; one may have one
    head for all.
    """
    lead = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([z.to(x.dtype).expand(*lead, z.shape[-1]) for z in (x, y)], -1)


def matrix_values(
    matrix: Tensor, v: Tensor, mask: Tensor | None, normalise: bool = False
) -> Tensor:
    """`matrix (H, N, M)` times `v (..., H, M, e)` over attended keys, by softmax of its rows with
    `normalise`; v is zero at keys that nobody attends to.

    No sample has weights of its own: masks that differ between queries of a sample are met a block
    of queries at a time.
    """
    if mask is None or (same_for_all_queries(mask) and not normalise):
        return mixed(matrix.softmax(-1) if normalise else matrix, v)
    rows = softmax_rows if normalise else only
    if mask.dim() <= 3:
        # one mask for all samples: as large as the matrix itself
        return mixed(rows(matrix, mask), v)
    return kernels.by_queries(lambda t, v, mask: rows(t, mask) @ v, [matrix], [v], mask)


def from_matrix(
    name: str,
    init: Callable[[Generator, int, int], Params],
    matrix: Callable[[Params], Tensor | Factored],
    tokens: Callable[[Params], int],
    form: Form,
    *,
    rank: int | None = None,
    placed: Callable[[Params], tuple[Tensor, Tensor]] | None = None,
    resize: Callable[..., Params] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Operator:
    """An operator whose parameters are a matrix T of queries x keys, by position.

    The weights are T; softplus(T) / M unless `signed`; softmax(T) by rows with
    `normalise="softmax"`; each with softmax(S) added with `base="softmax"`; and softmax(S + T) with
    `inside`. Queries and keys are the same tokens.

    Args:
        init: draws the parameters; the sizes are checked before.
        matrix: T of the parameters, `(H, N, M)` or its factors.
        tokens: the number of tokens that parameters are for.
        form: see above.
        rank: of the factors, None for a matrix.
        placed: the entries `(H, E)` of T and their index `(N, M)`, where it has fewer than N M.
        resize: see `Operator`.
        options: recorded in the result.
    """
    check_form(name, form)
    signed, normalise, base, inside, start = form

    def entries(t: Tensor) -> Tensor:
        return t if signed else functional.softplus(t) / t.shape[-1]

    def fits(params: Params, queries: int, keys: int) -> None:
        check_square(name, tokens(params), queries, keys)

    def dense(params: Params, dtype: torch.dtype) -> Tensor:
        t = matrix(params)
        return (t.dense() if isinstance(t, Factored) else t).to(dtype)

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        t = dense(params, scores.dtype)
        if inside:
            return softmax_rows(scores + t, mask)
        y = softmax_rows(t, mask) if normalise else only(entries(t), mask)
        return y + softmax_rows(scores, mask) if base else y.expand(scores.shape)

    def product(params: Params, v: Tensor, mask: Tensor | None) -> Tensor:
        t = matrix(params)
        if isinstance(t, Factored) and signed and not normalise:
            left, right = t.left.to(v.dtype), t.right.to(v.dtype)
            if same_for_all_queries(mask):
                # v is zero where it is masked
                return mixed(left, mixed(right.mT, v))
            return kernels.mix_values(left, right, v, mask)  # type: ignore[arg-type]
        t = dense(params, v.dtype)
        return matrix_values(t if normalise else entries(t), v, mask, normalise is not None)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if base and mask is None and rank is None:
            t = dense(params, wide(v).dtype)
            t = t.softmax(-1) if normalise else entries(t)
            return kernels.softmax_attention(q, k, v, table=t)
        if not inside:
            out = product(params, wide(v), mask)
            # the axes of q and k, which have no other part
            lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], out.shape[:-2])
            out = out.expand(*lead, *out.shape[-2:])
            return out + kernels.softmax_attention(q, k, v, mask) if base else out
        q, k, v = wide(q), wide(k), wide(v)
        if placed is not None:
            own, index = placed(params)
        else:
            t = matrix(params)
            if isinstance(t, Factored):
                # q k^T / sqrt(d) + L R^T is one product of longer vectors
                q = beside(q * q.shape[-1] ** -0.5, t.left)
                k = beside(k, t.right)
                return kernels.softmax_attention(q, k, v, mask, 1.0)
            own = t.flatten(1)
            index = torch.arange(own.shape[1], device=t.device).view(t.shape[1:])
        return kernels.pair_attention(None, own[:, None], index, q, k, v, mask, "inside")

    def product_flops(tokens: int, width: int) -> int:
        low = rank is not None and signed and not normalise and not inside
        dense = 2 if base or inside else 0 if low else 1
        return dense * tokens**2 * width + (2 * tokens * rank * width if low and rank else 0)

    def activation_flops(tokens: int, unit: int) -> int:
        each = 2 * (not signed) + 3 * (normalise is not None) + 4 * (base is not None) + 4 * inside
        built = rank is not None and (not signed or normalise is not None or inside)
        return tokens**2 * (each + (rank if built and rank else 0))

    options = {**(options or {}), **form._asdict()}
    traits: dict[str, Any] = {"self_attention": True}
    traits |= {"product_flops": product_flops, "activation_flops": activation_flops}
    if inside or normalise and not base:
        traits["simplex"] = True
    if inside:
        traits["shift_invariant"] = True
    if inside or base and signed and not normalise:
        traits["softmax_base"] = True
        traits["softmax_start"] = start == "zero"
    return from_forms(
        name, init, weights, attend, fits=fits, resize=resize, options=options, traits=traits
    )


def default_start(name: str, start: str | None, base: str | None, inside: bool) -> str:
    """The start that was asked for; "zero" beside or inside softmax, "scaled" alone."""
    schema.check_choice(name, "start", start, (None, *STARTS))
    return start or ("zero" if base or inside else "scaled")


@remember
def static(
    rank: int | None = None,
    base: str | None = None,
    signed: bool = True,
    normalise: str | None = None,
    inside: bool = False,
    start: str | None = None,
) -> Operator:
    """A learned matrix of N queries x N keys a head, whatever the scores (Tay et al. 2021).

    The Synthesizer's random variants put it through softmax (`normalise="softmax"`, dense or
    factorised); here it is signed and as it is unless asked otherwise, which is what KArAt of
    constant units comes to. `base="softmax"` adds softmax(S), `inside=True` is softmax(S + T).

    Parameters `{"matrix": (H, N, N)}`, or `{"queries": (H, N, r), "keys": (H, N, r)}` whose product
    is T.

    Args:
        rank: r, None for the full matrix.
        base: None, or "softmax", which is added.
        signed: False for softplus(T) / N, weights of one sign.
        normalise: None, or "softmax" by rows.
        inside: T is added to the scores instead.
        start: "scaled": entries of T of variance 1 / N, which keep the output of a head at the size
            of its values; "zero", with which softmax beside or around T starts as exactly softmax.
            Default "zero" with softmax, else "scaled".

    Reference: Tay et al., "Synthesizer: rethinking self-attention for Transformer models", 2021,
    arXiv:2005.00743, sec. 3.2 and 3.3.
    """
    if rank is not None:
        check_rank("static", rank)
    begin = default_start("static", start, base, inside)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        last = 0.0 if begin == "zero" else tokens**-0.5
        if rank is None:
            what = f"{heads} x {tokens:,} x {tokens:,} numbers"
            check_fits_memory("static", heads * tokens * tokens, what)
            return {"matrix": bases.normal(generator, (heads, tokens, tokens)) * last}
        what = f"2 x {heads} x {tokens:,} x {rank:,} numbers"
        check_fits_memory("static", 2 * heads * tokens * rank, what)
        queries, keys = (bases.normal(generator, (heads, tokens, rank)) for _ in range(2))
        # one factor is drawn at any start: two zeros have no gradient
        return {"queries": queries, "keys": keys * (last * rank**-0.5)}

    def matrix(params: Params) -> Tensor | Factored:
        if rank is None:
            return params["matrix"]
        return Factored(params["queries"], params["keys"])

    def tokens_of(params: Params) -> int:
        found = params.get("matrix" if rank is None else "keys")
        tokens = found.shape[1] if isinstance(found, Tensor) and found.dim() > 1 else 0
        names = ["matrix"] if rank is None else ["queries", "keys"]
        check_shapes("static", params, dict.fromkeys(names, (tokens, rank or tokens)))
        return tokens

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        # entries that are weights stand for an integral over the keys, entries of a softmax do not
        amplitude = signed and not normalise and not inside
        if rank is not None:
            queries = interpolate(params["queries"], 1, old, new, False)
            return {"queries": queries, "keys": interpolate(params["keys"], 1, old, new, amplitude)}
        moved = interpolate(params["matrix"], 1, old, new, False)
        return {"matrix": interpolate(moved, 2, old, new, amplitude)}

    return from_matrix(
        "static",
        init,
        matrix,
        tokens_of,
        Form(signed, normalise, base, inside, begin),
        rank=rank,
        resize=resize,
        options={"rank": rank},
    )
