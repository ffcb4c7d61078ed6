"""Row operators: what stands where softmax stood, from scores to attention weights (paper, sec. 1).

| operator | weights of a row of scores S[n, :] | source |
|---|---|---|
| `low_rank` | W Phi(S), Phi r x M, W M x r | KArAt, the form the paper trains |
| `full_rank` | Phi(S), Phi M x M | eq. 1 |
| `project_first` | Phi(W S), W r x M, Phi M x r | App. C.5, order (ii) |
| `two_stage` | Phi2(Phi1(S)), Phi1 r x M, Phi2 M x r | App. C.5, order (iii) |
| `softmax`, `sigmoid`, `relu`, `sparsemax` | fixed functions | baselines |
| `hybrid` | one of the above a head | App. C.5.2 |

All learnable ones reassociate: with features F and coefficients C of a linear basis, `Phi(S) = F(S)
C` and `out = F(S) C (W^T V)`, so `attend` streams over the keys (`kart.kernels`) and never holds
the activated N x M matrix. A projection onto the simplex acts on whole rows and is the exception.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from kart import bases, kernels, projections
from kart.bases import Basis, Params


class Operator(NamedTuple):
    """A map from scores to attention weights, as pure functions of its parameters.

    `init(generator, heads, tokens)` draws parameters for rows of `tokens` keys; every leaf leads
    with the H heads. `weights(params, scores, mask=None)` maps `(..., H, N, M)` to `(..., H, N,
    M)`, materialised, for looking. `attend(params, q, k, v, mask=None)` is `weights(q k^T /
    sqrt(d)) @ v`, `(..., H, N, d)`, streamed. `mask` is boolean, True = attend, and broadcasts to
    `(..., H, N, M)`: a masked key has weight 0 and no part in the weights of others. `basis` is the
    family of the learnable units, None for a fixed operator.
    """

    name: str
    init: Callable[[Generator, int, int], Params]
    weights: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    basis: Basis | None = None
    options: Mapping[str, Any] = {}


def _check_sizes(heads: int, tokens: int) -> None:
    if heads < 1 or tokens < 1:
        raise ValueError(
            f"`init` needs `heads` >= 1 and `tokens` >= 1, got {heads} and {tokens}. "
            "Pass the number of heads and of keys."
        )


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.dim() < 2 or not scores.dtype.is_floating_point or 0 in scores.shape[-2:]:
        raise ValueError(
            f"`{name}.weights` needs floating-point `scores` (..., H, N, M) with N, M >= 1, got "
            f"{scores.dtype} of shape {tuple(scores.shape)}. Pass q @ k.mT / sqrt(d)."
        )


def _check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = (
        min(q.dim(), k.dim(), v.dim()) >= 2
        and q.shape[-1] == k.shape[-1]
        and k.shape[-2] == v.shape[-2]
        and 0 not in (*q.shape[-2:], *k.shape[-2:], v.shape[-1])
    )
    if not fits:
        raise ValueError(
            f"`{name}.attend` needs `q` (..., H, N, d), `k` (..., H, M, d) and `v` (..., H, M, e) "
            f"with no empty axis, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. "
            "Put the heads before the tokens."
        )
    kinds = {(t.dtype, t.device.type) for t in (q, k, v)}
    if len(kinds) > 1 or not q.dtype.is_floating_point:
        raise ValueError(
            f"`{name}.attend` needs `q`, `k` and `v` of one floating-point dtype on one device, "
            f"got {[f'{t.dtype} on {t.device}' for t in (q, k, v)]}. Convert them with `.to`."
        )


def _check_mask(name: str, mask: Tensor | None, queries: int, keys: int) -> None:
    if mask is None:
        return
    shape = tuple(mask.shape)
    fits = not shape or shape[-1] in (1, keys)
    fits = fits and (len(shape) < 2 or shape[-2] in (1, queries))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"`{name}` needs a boolean `mask` (True = attend) broadcasting to (..., H, {queries}, "
            f"{keys}), got {mask.dtype} of shape {shape}. A mask of keys is (..., 1, 1, {keys})."
        )


def _check_keys(name: str, expected: int, keys: int) -> None:
    if expected != keys:
        raise ValueError(
            f"`{name}` was initialised for rows of {expected} keys, got {keys}. "
            f"Call `init(generator, heads, {keys})` for this number of tokens."
        )


def _check_rank(name: str, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`{name}` needs an integer `rank` >= 1, got {rank!r}. The paper uses 12.")


def _choice(name: str, argument: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(
            f"`{name}` needs `{argument}` None or in {list(allowed)}, got {value!r}. "
            "Choose one of them."
        )


def _same_for_all_queries(mask: Tensor | None) -> bool:
    return mask is None or mask.dim() < 2 or mask.shape[-2] == 1


def _silence(keys: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of `keys (..., M, d)` that a mask of keys `(..., 1, M)` hides, set to zero."""
    if mask is None:
        return keys
    column = mask.expand(*mask.shape[:-2], 1, keys.shape[-2]) if mask.dim() >= 2 else mask
    column = column.mT if column.dim() >= 2 else column.expand(keys.shape[-2])[:, None]
    return torch.where(column, keys, 0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def _softmax_rows(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    # a row without any key must come out zero: softmax of a row of -inf is NaN, of a finite row not
    hidden = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return torch.where(mask, hidden.softmax(-1), 0)


def _simplex_rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return projections.simplex(logits)
    return torch.where(mask, projections.simplex(logits.masked_fill(~mask, -math.inf)), 0)


def _sum_units(basis: Basis, units: Params, x: Tensor, mask: Tensor | None) -> Tensor:
    """`sum_m phi_pm(x[n, m])` for `units (H, P, M)` and `x (..., H, N, M)`: `(..., H, N, P)`."""
    if basis.features is not None and basis.coefficients is not None:
        features = basis.features(x)
        if mask is not None:
            features = torch.where(mask[..., None], features, 0)
        coefs = basis.coefficients(units).to(x.dtype)
        return torch.einsum("...hnmk,hpmk->...hnp", features, coefs)
    lifted = {name: leaf.unsqueeze(1) for name, leaf in units.items()}  # (H, 1, P, M, ..)
    values = basis.apply(lifted, x.unsqueeze(-2))  # (..., H, N, P, M)
    if mask is not None:
        values = torch.where(mask.unsqueeze(-2), values, 0)
    return values.sum(-1)


class _Contract(NamedTuple):
    """As `_sum_units` of the scores of q and k, streamed by `engine`."""

    basis: Basis
    engine: str

    @staticmethod
    def dtype(q: Tensor) -> torch.dtype:
        # half types keep float32 parameters: the scores they weigh are float32, too
        return torch.promote_types(q.dtype, torch.float32)

    def __call__(self, units: Params, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        if self.basis.coefficients is None:
            units = {name: leaf.to(self.dtype(q)) for name, leaf in units.items()}
            return kernels.contract_units(self.basis, units, q, k, mask)
        return self.product(self.basis.coefficients(units), q, k, mask)

    def product(self, coefs: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        coefs = coefs.to(self.dtype(q))
        return kernels.contract(self.basis, coefs, q, k, mask, engine=self.engine)


def _contraction(name: str, basis: Basis, engine: str) -> _Contract:
    _choice(name, "engine", engine, kernels.ENGINES)
    return _Contract(basis, engine)


def _operator(
    name: str,
    init: Callable[[Generator, int, int], Params],
    logits: Callable[[Params, Tensor, Tensor | None], Tensor],
    streamed_logits: Callable[[Params, Tensor, Tensor, Tensor | None], Tensor],
    streamed_product: Callable[[Params, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    keys_of: Callable[[Params], int],
    basis: Basis,
    project: str | None,
    base: str | None,
    options: Mapping[str, Any],
) -> Operator:
    """What the learnable operators share: checks, base, projection, masks."""
    _choice(name, "project", project, ["simplex"])
    _choice(name, "base", base, ["softmax"])

    def rows(learned: Tensor, scores: Tensor | None, mask: Tensor | None) -> Tensor:
        y = learned if scores is None else learned + _softmax_rows(scores, mask)
        if project is not None:
            return _simplex_rows(y, mask)
        return y if mask is None else torch.where(mask, y, 0)

    def checked_init(generator: Generator, heads: int, tokens: int) -> Params:
        _check_sizes(heads, tokens)
        return init(generator, heads, tokens)

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_scores(name, scores)
        _check_keys(name, keys_of(params), scores.shape[-1])
        _check_mask(f"{name}.weights", mask, *scores.shape[-2:])
        return rows(logits(params, scores, mask), scores if base else None, mask)

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        _check_qkv(name, q, k, v)
        _check_keys(name, keys_of(params), k.shape[-2])
        _check_mask(f"{name}.attend", mask, q.shape[-2], k.shape[-2])
        if project is not None:
            # the projection sees whole rows, so this one operator holds the N x M weights
            scores = _scores(q, k) if base else None
            return rows(streamed_logits(params, q, k, mask), scores, mask) @ v
        if _same_for_all_queries(mask):
            out = streamed_product(params, q, k, _silence(v, mask), mask)
        else:
            out = rows(streamed_logits(params, q, k, mask), None, mask) @ v
        return out + kernels.softmax_attention(q, k, v, mask) if base else out

    options = {"kind": name, **options, "project": project, "base": base}
    return Operator(name, checked_init, weights, attend, basis, options)


AMPLITUDES = ("coefs", "weight", "numerator")


def _output_units(
    basis: Basis, generator: Generator, heads: int, tokens: int, inputs: int
) -> Params:
    """Units `(H, tokens, inputs)` whose values are attention weights.

    Their amplitudes are divided by sqrt(tokens), which keeps the output of a head at the size of
    its values as W does in `low_rank`; with init "paper" they stay as printed.
    """
    units = basis.init(generator, (heads, tokens, inputs))
    if basis.options.get("init") == "paper":
        return units
    factor = tokens**-0.5
    return {name: leaf * factor if name in AMPLITUDES else leaf for name, leaf in units.items()}


MIXES = ("scaled", "linear", "zero")


def low_rank(
    basis: Basis,
    rank: int = 12,
    project: str | None = None,
    base: str | None = None,
    *,
    mix: str | None = None,
    engine: str = "auto",
) -> Operator:
    """KArAt: weights W Phi(S), with Phi of r x M learnable units and W an M x r matrix (sec. 1).

    Parameters `{"units": those of the basis, (H, r, M), "mix": W, (H, M, r)}`. Before a projection
    the weights have rank at most r; with softmax added they have not.

    Args:
        basis: the family of the units.
        rank: r; the paper uses 12.
        project: None, or "simplex": each row is projected onto the probability simplex (Alg. 1).
        base: None, or "softmax": softmax(S) + W Phi(S).
        mix: how W is drawn: "scaled" N(0, 1 / (r M)), which keeps the output of a head at the size
            of its values whatever M is; "linear" U(-1/sqrt r, 1/sqrt r), torch's default for a
            linear layer; "zero", with which `base="softmax"` starts as exactly softmax. Default
            "scaled", and "zero" with `base="softmax"`.
    """
    _check_rank("low_rank", rank)
    _choice("low_rank", "mix", mix, MIXES)
    contract = _contraction("low_rank", basis, engine)
    start = mix or ("zero" if base == "softmax" else "scaled")

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        units = basis.init(generator, (heads, rank, tokens))
        if start == "zero":
            drawn = torch.zeros(heads, tokens, rank)
        elif start == "scaled":
            drawn = bases.normal(generator, (heads, tokens, rank)) / math.sqrt(rank * tokens)
        else:
            uniform = torch.rand(heads, tokens, rank, generator=generator)
            drawn = (2 * uniform - 1) / math.sqrt(rank)
        return {"units": units, "mix": drawn}

    def logits(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        hidden = _sum_units(basis, params["units"], scores, mask)
        return hidden @ params["mix"].to(hidden.dtype).mT

    def streamed_logits(params: Params, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        hidden = contract(params["units"], q, k, mask)
        return hidden @ params["mix"].to(hidden.dtype).mT

    def streamed_product(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        values = params["mix"].to(v.dtype).mT @ v  # (..., H, r, d)
        return contract(params["units"], q, k, mask) @ values

    operator = _operator(
        "low_rank",
        init,
        logits,
        streamed_logits,
        streamed_product,
        lambda params: params["mix"].shape[-2],
        basis,
        project,
        base,
        {"rank": rank, "mix": start},
    )
    if project is not None:
        return operator

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        if mask is None or _same_for_all_queries(mask):
            return operator.attend(params, q, k, v, mask)
        # a mask that differs between queries cannot move into W^T V: streamed over query blocks
        _check_qkv("low_rank", q, k, v)
        _check_keys("low_rank", params["mix"].shape[-2], k.shape[-2])
        _check_mask("low_rank.attend", mask, q.shape[-2], k.shape[-2])
        hidden = contract(params["units"], q, k, mask)
        out = kernels.mix_values(hidden, params["mix"].to(v.dtype), v, mask)
        return out + kernels.softmax_attention(q, k, v, mask) if base else out

    return operator._replace(attend=attend)


def full_rank(
    basis: Basis, project: str | None = None, base: str | None = None, *, engine: str = "auto"
) -> Operator:
    """Weights Phi(S) with M x M learnable units a head (eq. 1): weight[p] = sum_q phi_pq(S[q]).

    Parameters `{"units": those of the basis, (H, M, M)}`, output key before input key. `attend`
    streams F(S) (C V): the coefficients meet the values first, an effective rank of d.
    """
    contract = _contraction("full_rank", basis, engine)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        return {"units": _output_units(basis, generator, heads, tokens, tokens)}

    def streamed_product(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        if basis.coefficients is None:
            return contract(params["units"], q, k, mask) @ v
        coefs = basis.coefficients(params["units"]).to(contract.dtype(q))
        return kernels.contract_values(basis, coefs, q, k, v, mask, engine=engine)

    def keys_of(params: Params) -> int:
        return next(iter(params["units"].values())).shape[1]

    return _operator(
        "full_rank",
        init,
        lambda params, scores, mask: _sum_units(basis, params["units"], scores, mask),
        lambda params, q, k, mask: contract(params["units"], q, k, mask),
        streamed_product,
        keys_of,
        basis,
        project,
        base,
        {},
    )


def _second_stage(basis: Basis, units: Params, hidden: Tensor, v: Tensor) -> Tensor:
    """`Phi(hidden) @ v` for `units (H, M, r)`, `hidden (..., H, N, r)`, reassociated."""
    if basis.features is None or basis.coefficients is None:
        return _sum_units(basis, units, hidden, None) @ v
    coefs = basis.coefficients(units).to(v.dtype)
    mixed = torch.einsum("hjpk,...hje->...hpke", coefs, v)
    return basis.features(hidden).flatten(-2) @ mixed.flatten(-3, -2)


def project_first(
    basis: Basis,
    rank: int = 12,
    project: str | None = None,
    base: str | None = None,
    *,
    engine: str = "auto",
) -> Operator:
    """Weights Phi(W S): W, r x M, first, then M x r learnable units (App. C.5, order (ii)).

    Parameters `{"mix": W, (H, r, M), "units": those of the basis, (H, M, r)}`. W S is q (W K)^T, so
    `attend` costs r keys instead of M.
    """
    _check_rank("project_first", rank)
    contract = _contraction("project_first", bases.polynomial(1), engine)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        mix = bases.normal(generator, (heads, rank, tokens)) / math.sqrt(tokens)
        return {"mix": mix, "units": _output_units(basis, generator, heads, tokens, rank)}

    def hidden_of(params: Params, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        mix = params["mix"].to(k.dtype)
        if _same_for_all_queries(mask):
            return _scores(q, mix @ _silence(k, mask))
        coefs = torch.stack([torch.zeros_like(mix), mix], dim=-1)
        return contract.product(coefs, q, k, mask)

    def logits(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        scores = scores if mask is None else torch.where(mask, scores, 0)
        hidden = scores @ params["mix"].to(scores.dtype).mT
        return _sum_units(basis, params["units"], hidden, None)

    def streamed_logits(params: Params, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return _sum_units(basis, params["units"], hidden_of(params, q, k, mask), None)

    def streamed_product(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        return _second_stage(basis, params["units"], hidden_of(params, q, k, mask), v)

    return _operator(
        "project_first",
        init,
        logits,
        streamed_logits,
        streamed_product,
        lambda params: params["mix"].shape[-1],
        basis,
        project,
        base,
        {"rank": rank},
    )


def two_stage(
    basis: Basis,
    rank: int = 12,
    project: str | None = None,
    base: str | None = None,
    *,
    engine: str = "auto",
) -> Operator:
    """Weights Phi2(Phi1(S)): r x M, then M x r learnable units (App. C.5, order (iii)).

    Parameters `{"first": units (H, r, M), "second": units (H, M, r)}`.
    """
    _check_rank("two_stage", rank)
    contract = _contraction("two_stage", basis, engine)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        first = basis.init(generator, (heads, rank, tokens))
        return {"first": first, "second": _output_units(basis, generator, heads, tokens, rank)}

    def logits(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        hidden = _sum_units(basis, params["first"], scores, mask)
        return _sum_units(basis, params["second"], hidden, None)

    def streamed_logits(params: Params, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        hidden = contract(params["first"], q, k, mask)
        return _sum_units(basis, params["second"], hidden, None)

    def streamed_product(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        hidden = contract(params["first"], q, k, mask)
        return _second_stage(basis, params["second"], hidden, v)

    def keys_of(params: Params) -> int:
        return next(iter(params["second"].values())).shape[1]

    return _operator(
        "two_stage",
        init,
        logits,
        streamed_logits,
        streamed_product,
        keys_of,
        basis,
        project,
        base,
        {"rank": rank},
    )


def _fixed(
    name: str,
    rows: Callable[[Tensor, Tensor | None], Tensor],
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Operator:
    def init(generator: Generator, heads: int, tokens: int) -> Params:
        _check_sizes(heads, tokens)
        return {}

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_scores(name, scores)
        _check_mask(f"{name}.weights", mask, *scores.shape[-2:])
        return rows(scores, mask)

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        _check_qkv(name, q, k, v)
        _check_mask(f"{name}.attend", mask, q.shape[-2], k.shape[-2])
        return product(q, k, v, mask)

    return Operator(name, init, weights, attend, None, {"kind": name})


def softmax() -> Operator:
    """Rows of softmax; a row whose keys are all masked is zero."""
    return _fixed("softmax", _softmax_rows, kernels.softmax_attention)


def _attended(mask: Tensor | None, keys: int, like: Tensor) -> Tensor:
    if mask is None:
        return torch.tensor(float(keys), dtype=like.dtype, device=like.device)
    mask = mask.expand(*mask.shape[:-1], keys) if mask.dim() else mask.expand(keys)
    return mask.sum(-1, keepdim=True).clamp(min=1).to(like.dtype)


def _streamed(unit: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    # sum_m f(S[n, m]) v[m] is the full-rank product with the one feature f and coefficients v
    feature = bases.linear(lambda x: unit(x)[..., None], 1, family="fixed")
    return _Contract(feature, "auto").product(v.mT[..., None], q, k, mask)


def sigmoid() -> Operator:
    """sigmoid(s - log n), n the number of keys that are attended (Ramapuram et al. 2024)."""

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        y = (scores - _attended(mask, scores.shape[-1], scores).log()).sigmoid()
        return y if mask is None else torch.where(mask, y, 0)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return rows(_scores(q, k), mask) @ v
        shift = math.log(k.shape[-2])
        return _streamed(lambda x: (x - shift).sigmoid(), q, k, v, None)

    return _fixed("sigmoid", rows, product)


def relu() -> Operator:
    """relu(s) / n, n the number of keys that are attended (Wortsman et al. 2023)."""

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        y = scores.relu() / _attended(mask, scores.shape[-1], scores)
        return y if mask is None else torch.where(mask, y, 0)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _streamed(torch.relu, q, k, v, mask) / _attended(mask, k.shape[-2], q)

    return _fixed("relu", rows, product)


def sparsemax() -> Operator:
    """Rows of scores projected onto the simplex (Martins and Astudillo 2016)."""

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _simplex_rows(_scores(q, k), mask) @ v

    return _fixed("sparsemax", _simplex_rows, product)


FIXED: dict[str, Callable[[], Operator]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "relu": relu,
    "sparsemax": sparsemax,
}
ORDERS: dict[str, Callable[..., Operator]] = {
    "low_rank": low_rank,
    "full_rank": full_rank,
    "project_first": project_first,
    "two_stage": two_stage,
}


def hybrid(operators: Sequence[Operator]) -> Operator:
    """One operator a head, e.g. 2 softmax + 1 KArAt (App. C.5.2).

    Heads that follow each other with the same operator (the same object) run as one group; group i
    has its parameters under `str(i)`.
    """
    if not operators or not all(isinstance(op, Operator) for op in operators):
        raise ValueError(
            f"`hybrid` needs one Operator per head, got {list(operators)!r}. "
            "Pass for example [softmax(), softmax(), low_rank(basis)]."
        )
    groups: list[tuple[Operator, int]] = []
    for op in operators:
        if groups and groups[-1][0] is op:
            groups[-1] = (op, groups[-1][1] + 1)
        else:
            groups.append((op, 1))
    counts = [count for _, count in groups]

    def check(heads: int) -> None:
        if heads != len(operators):
            raise ValueError(
                f"`hybrid` needs as many heads as operators, {len(operators)}, got {heads}. "
                "Give one operator per head."
            )

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check(heads)
        return {str(i): op.init(generator, count, tokens) for i, (op, count) in enumerate(groups)}

    def by_group(call: Callable[..., Tensor], *tensors: Tensor, mask: Tensor | None) -> Tensor:
        check(tensors[0].shape[-3])
        columns = [tensor.split(counts, dim=-3) for tensor in tensors]
        if mask is not None and mask.dim() >= 3 and mask.shape[-3] > 1:
            masks: Sequence[Tensor | None] = mask.split(counts, dim=-3)
        else:
            masks = [mask] * len(groups)
        parts = [
            call(i, op, *(column[i] for column in columns), mask=masks[i])
            for i, (op, _) in enumerate(groups)
        ]
        return torch.cat(parts, dim=-3)

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return by_group(
            lambda i, op, s, mask: op.weights(params[str(i)], s, mask), scores, mask=mask
        )

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return by_group(
            lambda i, op, q, k, v, mask: op.attend(params[str(i)], q, k, v, mask),
            *(q, k, v),
            mask=mask,
        )

    name = "+".join(f"{count}*{op.name}" for op, count in groups)
    return Operator(name, init, weights, attend, None, {"kind": "hybrid", "groups": groups})


class Spec(NamedTuple):
    """What a spec string says: the operator, and "blockwise", "universal" or None where it is
    silent.
    """

    operator: Operator
    sharing: str | None


EXAMPLES = [
    "softmax",
    "sigmoid",
    "relu",
    "sparsemax",
    "G3B",
    "G3U",
    "G1B",
    "G1U",
    "bspline-G8B",
    "gaussian_rbf-G8B",
    "polynomial-0B",
    "polynomial-1B",
    "chebyshev-4B",
    "rational-5/4B",
    "mexican_hat-B",
    "morlet-B",
    "dog-B",
    "meyer-B",
    "shannon-B",
    "G3B:rank=24",
    "G3B:project=simplex",
    "G3B:base=softmax",
    "2*softmax+G3B",
]

# the positional numbers of each family in a spec; families not named take none
NUMBERS = {
    "fourier": ["grid"],
    "bspline": ["grid"],
    "gaussian_rbf": ["grid"],
    "polynomial": ["degree"],
    "chebyshev": ["degree"],
    "rational": ["numerator", "denominator"],
}
_SPEC = re.compile(r"(?:(?P<family>[a-z_]+)(?:-|$))?(?P<numbers>G?\d+(?:/\d+)?)?(?P<sharing>[BU])?")


def _unknown(spec: str, why: str = "") -> ValueError:
    names = [*EXAMPLES, *bases.FAMILIES]
    near = difflib.get_close_matches(spec, names, n=3, cutoff=0.4) or list(EXAMPLES[:6])
    return ValueError(
        f"`operator` needs a spec such as G3B, softmax or bspline-G8U:rank=24, got {spec!r}"
        f"{': ' + why if why else ''}. Near matches: {', '.join(near)}."
    )


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    ends = text.split("..")
    return (float(ends[0]), float(ends[1])) if len(ends) == 2 else text


def _parse_one(spec: str, overrides: Mapping[str, Any]) -> Spec:
    head, _, tail = spec.partition(":")
    given: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, equals, text = item.partition("=")
        if not equals:
            raise _unknown(spec, f"option {item!r} is not of the form name=value")
        given[key.strip()] = _value(text.strip())
    if head in FIXED:
        if given:
            raise _unknown(spec, f"{head} takes no options, got {sorted(given)}")
        return Spec(FIXED[head](), None)
    match = _SPEC.fullmatch(head)
    family = (match and match["family"]) or "fourier"
    if not match or family not in bases.FAMILIES or not any(match.groups()):
        raise _unknown(spec)
    options = {**{k: v for k, v in overrides.items() if v is not None}, **given}
    numbers = (match["numbers"] or "").lstrip("G")
    values = [int(number) for number in numbers.split("/") if number]
    fields = NUMBERS.get(family, [])
    if len(values) not in (0, len(fields)) or (family == "fourier" and not values):
        raise _unknown(spec, f"{family} needs {fields or 'no numbers'} before B or U")
    arguments: dict[str, Any] = dict(zip(fields, values, strict=False))
    # `base` names the operator's (softmax) or the units' (eq. 5): their values do not overlap
    base = options.pop("base", None)
    if base in bases.BASES:
        arguments["base"] = base
        base = None
    if "unit_base" in options:
        arguments["base"] = options.pop("unit_base")
    order = options.pop("order", "low_rank")
    if order not in ORDERS:
        raise _unknown(spec, f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    outer = {"project": options.pop("project", None), "base": base}
    for name in ("rank", "mix", "engine") if order == "low_rank" else ("rank", "engine"):
        if name in options:
            outer[name] = options.pop(name)
    if order == "full_rank" and "rank" not in given:
        outer.pop("rank", None)
    arguments.update(options)
    try:
        operator = ORDERS[order](bases.FAMILIES[family](**arguments), **outer)
    except TypeError as error:
        raise _unknown(spec, str(error).replace("()", "")) from None
    sharing = {"B": "blockwise", "U": "universal", None: None}[match["sharing"]]
    return Spec(operator._replace(name=spec), sharing)


def parse(spec: str, **overrides: Any) -> Spec:
    """The operator that a spec string names.

    `FAMILY-NUMBERS` then `B` (blockwise) or `U` (universal), then `:option=value,...`. The family
    defaults to fourier, `G3` is its grid; `polynomial-0`, `chebyshev-4` give degrees and
    `rational-5/4` both degrees. Options: `rank`, `project=simplex`, `base=softmax` or a unit's
    `identity|silu|gelu` (also `unit_base`), `init`, `mix`, `scales=true`,
    `order=low_rank|full_rank| project_first|two_stage`, and the family's own (`degree`,
    `span=-4..4`, `omega`, `reading`). Heads that differ are joined with `+`: `2*softmax+G3B`.
    `overrides` are options that the spec does not name itself; None leaves a default.

    >>> parse("G3B").operator.basis.options["grid"], parse("G3U").sharing
    (3, 'universal')
    >>> parse("2*softmax+G3B:rank=4").operator.name
    '2*softmax+G3B:rank=4'
    """
    if not isinstance(spec, str) or not spec:
        raise _unknown(str(spec))
    parts = []
    for part in spec.split("+"):
        count, star, rest = part.partition("*")
        if star and not count.isdigit():
            raise _unknown(spec, f"{count!r} before * is not a number of heads")
        parts.append((_parse_one(rest if star else part, overrides), int(count) if star else 1))
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    modes = {one.sharing for one, _ in parts} - {None}
    if len(modes) > 1:
        raise _unknown(spec, "the heads of a block are all blockwise or all universal")
    heads = [one.operator for one, count in parts for _ in range(count)]
    return Spec(hybrid(heads)._replace(name=spec), modes.pop() if modes else None)
