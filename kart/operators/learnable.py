"""The learnable operators of the paper: low rank, full rank, and the other two orders.

All of them reassociate: with features F and coefficients C of a linear basis, `Phi(S) = F(S) C` and
`out = F(S) C (W^T V)`, so `attend` streams over the keys and never holds the activated N x M
matrix. Rows are projected onto the simplex in a second pass, a block of queries at a time. The
exceptions hold N x M weights: that projection of `full_rank`, and of rows that softmax is added to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from kart import bases, kernels, schema
from kart.bases import Basis, Params
from kart.factories import remember
from kart.kernels.plain import wide
from kart.operators.contract import (
    SIMPLEX,
    SOFTMAX,
    Factored,
    Logits,
    Operator,
    Source,
    Streamed,
    check_basis,
    check_fits_memory,
    check_names,
    check_rank,
    check_unit_sizes,
    from_logits,
    sum_units,
    unit_sizes,
)
from kart.operators.resize import amplitudes, moving

MIXES = ("scaled", "linear", "zero")


def check_units(name: str, basis: Basis, *shapes: tuple[int, ...], mix: int = 0) -> None:
    """Raises ValueError where units of these shapes, and `mix` numbers, do not fit memory."""
    units = sum(math.prod(shape) for shape in shapes)
    what = " and ".join(" x ".join(f"{n:,}" for n in shape) for shape in shapes)
    check_fits_memory(
        name, units * basis.size + mix, f"{what} units of {basis.size:,} numbers each"
    )


def output_units(basis: Basis, generator: Generator, heads: int, tokens: int, inputs: int):
    """Units `(H, tokens, inputs)` whose values are attention weights.

    Their amplitudes are divided by sqrt(tokens), which keeps the output of a head at the size of
    its values as W does in `low_rank`; with init "paper" they stay as printed.
    """
    units = basis.init(generator, (heads, tokens, inputs))
    if basis.options.get("init") == "paper":
        return units
    # the base activation starts with weight 1, as in a layer of KAN
    scaled = amplitudes(basis) - {"scale_base"}
    return {name: leaf * tokens**-0.5 if name in scaled else leaf for name, leaf in units.items()}


def output_logits(basis: Basis, units: Params, hidden: Tensor) -> Logits:
    """Logits `Phi(hidden)` for `units (H, M, r)` and `hidden (..., H, N, r)`."""
    if basis.features is None or basis.coefficients is None:
        return sum_units(basis, units, hidden)
    return Factored(basis.features(hidden).flatten(-2), basis.coefficients(units).flatten(-2))


def order(
    name: str,
    init: Callable[[Generator, int, int], Params],
    logits: Callable[[Params, Source], Logits],
    axes: Mapping[str, Sequence[int]],
    shared: tuple[Basis, str | None, str | None, str],
    product: Callable[[Params, Streamed, Tensor], Tensor] | None = None,
    columns: int | None = None,
    *,
    units: int | None = None,
    mixed: int = 0,
    **options: Any,
) -> Operator:
    """The operator of `logits`, whose parameters `name` have keys at `axes[name]`; `shared` are
    basis, project, base and engine; `columns` is the `rank` of `from_logits`; `units` (default one
    a key) and `mixed` how many units and products with W a score meets.
    """
    basis, project, base, engine = shared
    check_basis(name, basis)

    def activation_flops(tokens: int, unit: int) -> int:
        rows = (SOFTMAX if base else 0) + (SIMPLEX if project else 0)
        return tokens**2 * ((tokens if units is None else units) * unit + mixed + rows)

    sizes = unit_sizes(basis)

    def keys(params: Params) -> int:
        check_names(name, params, axes)
        found = []
        for part, places in axes.items():
            leaves = [params[part]]
            if isinstance(params[part], dict):  # units
                check_unit_sizes(name, params[part], sizes, 3)
                leaves = params[part].values()
            found += [leaf.shape[place] for leaf in leaves for place in places]
        # compared, not as a set: in a trace sizes are tensors
        if any(size != found[0] for size in found):
            raise ValueError(
                f"`{name}` needs parameters of one number of keys, got {sorted(set(found))}. Move "
                "all of them, with `kart.operators.resize`."
            )
        return found[0]

    return from_logits(
        name,
        init,
        logits,
        keys,
        basis=basis,
        project=project,
        base=base,
        engine=engine,
        product=product,
        resize=moving(axes, basis),
        options=options,
        traits={"activation_flops": activation_flops},
        rank=columns,
    )


@remember
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
        mix: how W is drawn: "scaled" N(0, 1 / (r M)), which keeps the size of a head's output
            whatever M is (with Fourier units that of its values); "linear" U(-1/sqrt r, 1/sqrt r),
            torch's default for a linear layer; "zero", with which `base="softmax"` starts as
            exactly softmax. Default "scaled", and "zero" with `base="softmax"`.
        engine: of `kart.kernels.contract`.
    """
    check_rank("low_rank", rank)
    schema.check_choice("low_rank", "mix", mix, (None, *MIXES))
    start = mix or ("zero" if base == "softmax" else "scaled")

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_units("low_rank", basis, (heads, rank, tokens), mix=heads * rank * tokens)
        units = basis.init(generator, (heads, rank, tokens))
        if start == "zero":
            drawn = torch.zeros(heads, tokens, rank, **bases.DRAWN)
        elif start == "scaled":
            drawn = bases.normal(generator, (heads, tokens, rank)) / math.sqrt(rank * tokens)
        else:
            uniform = torch.rand(heads, tokens, rank, generator=generator, **bases.DRAWN)
            drawn = (2 * uniform - 1) / math.sqrt(rank)
        return {"units": units, "mix": drawn}

    def logits(params: Params, scores: Source) -> Logits:
        return Factored(scores.units(basis, params["units"]), params["mix"])

    shared = (basis, project, base, engine)
    axes = {"units": (2,), "mix": (1,)}
    counts: dict[str, Any] = {"columns": rank, "units": rank, "mixed": rank, "rank": rank}
    return order("low_rank", init, logits, axes, shared, **counts, mix=start)


@remember
def full_rank(
    basis: Basis, project: str | None = None, base: str | None = None, *, engine: str = "auto"
) -> Operator:
    """Weights Phi(S) with M x M learnable units a head (eq. 1): weight[p] = sum_q phi_pq(S[q]).

    Parameters `{"units": those of the basis, (H, M, M)}`, output key before input key. `attend`
    streams F(S) (C V): the coefficients meet the values first, an effective rank of d.
    """

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_units("full_rank", basis, (heads, tokens, tokens))
        return {"units": output_units(basis, generator, heads, tokens, tokens)}

    def logits(params: Params, scores: Source) -> Logits:
        return scores.units(basis, params["units"], exact=True)

    def product(params: Params, scores: Streamed, v: Tensor) -> Tensor:
        q, k, mask = scores.q, scores.k, scores.mask
        if basis.coefficients is None:
            return logits(params, scores) @ wide(v)  # type: ignore[operator]
        coefs = basis.coefficients(params["units"]).to(wide(v).dtype)
        return kernels.contract_values(basis, coefs, q, k, wide(v), mask, engine=engine)

    shared = (basis, project, base, engine)
    return order("full_rank", init, logits, {"units": (1, 2)}, shared, product)


@remember
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
    check_rank("project_first", rank)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_units("project_first", basis, (heads, tokens, rank), mix=heads * rank * tokens)
        mix = bases.normal(generator, (heads, rank, tokens)) / math.sqrt(tokens)
        return {"mix": mix, "units": output_units(basis, generator, heads, tokens, rank)}

    def logits(params: Params, scores: Source) -> Logits:
        return output_logits(basis, params["units"], scores.mixed(params["mix"]))

    shared = (basis, project, base, engine)
    axes = {"mix": (2,), "units": (1,)}
    return order("project_first", init, logits, axes, shared, units=rank, mixed=rank, rank=rank)


@remember
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
    check_rank("two_stage", rank)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_units("two_stage", basis, (heads, rank, tokens), (heads, tokens, rank))
        first = basis.init(generator, (heads, rank, tokens))
        return {"first": first, "second": output_units(basis, generator, heads, tokens, rank)}

    def logits(params: Params, scores: Source) -> Logits:
        hidden = scores.units(basis, params["first"], exact=True)
        return output_logits(basis, params["second"], hidden)

    shared = (basis, project, base, engine)
    axes = {"first": (2,), "second": (1,)}
    return order("two_stage", init, logits, axes, shared, units=2 * rank, rank=rank)
