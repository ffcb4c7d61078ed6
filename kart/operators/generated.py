"""KArAt of low rank whose units are functions of the place of their key (ours), for any length.

Where `low_rank` learns every key's units and its row of W, here both are sums of features of the
key's place, with learned coefficients: `C(m) = sum_j f_j(m) c_j` and `W(m) = sum_j f_j(m) w_j`.
With as many features as there are keys in training they are those of `low_rank`, in other words.
"""

import math

import torch
from torch import Generator, Tensor

from kart import bases, kernels, schema, tree
from kart.bases import Basis, Params
from kart.factories import remember
from kart.kernels.plain import scores as scores_of
from kart.kernels.plain import softmax_rows, wide
from kart.kernels.transforms import Constant
from kart.operators.contract import (
    Operator,
    attended_keys,
    check_basis,
    check_fits_memory,
    check_names,
    check_rank,
    check_unit_sizes,
    from_forms,
    only,
    unit_sizes,
)
from kart.operators.learnable import low_rank
from kart.operators.resize import Lattice, check_read
from kart.operators.static import STARTS


def cosines(places: Tensor, count: int) -> Tensor:
    """Features `(M, J)` of places in units of the reach: `sqrt(2 / J) cos(pi j x)`, `1 / sqrt(J)`
    for j = 0.

    At the J places (m + 1/2) / J they are orthonormal (the discrete cosine transform); their
    squares sum to one or so anywhere.
    """
    waves = torch.arange(count, dtype=places.dtype, device=places.device)
    # `torch.func.linearize` drops what is written in place
    scale = torch.full_like(waves, math.sqrt(2 / count)).masked_fill(waves == 0, count**-0.5)
    return (math.pi * places[:, None] * waves).cos() * scale


@Constant
def sequence(keys: int, count: int, reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Features `(M, J)` of tokens 0..M - 1; beyond `reach` they are mirrored."""
    places = (torch.arange(keys, dtype=torch.float64, device=device) + 0.5) / reach
    return cosines(places, count).to(dtype)


def lattice(keys: int, count: int, prefix: int, device: torch.device) -> Tensor:
    """Features `(M, J)` of `prefix` tokens, one each, and of a square of patches: products of
    cosines of their row and column, relative to the side.
    """
    side, waves = math.isqrt(max(0, keys - prefix)), math.isqrt(count - prefix)
    if side < 1 or side * side != keys - prefix:
        raise ValueError(
            f"`generated` needs {prefix} prefix tokens and a square of patches, got {keys} keys. "
            "Set `prefix`, or `reach` for a sequence."
        )
    one = cosines((torch.arange(side, dtype=torch.float64, device=device) + 0.5) / side, waves)
    both = (one[:, None, :, None] * one[None, :, None, :]).reshape(side * side, waves * waves)
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64, device=device), both)


@remember
def generated(
    basis: Basis,
    rank: int = 12,
    features: int = 16,
    reach: int | None = 256,
    prefix: int = 0,
    normalise: str | None = None,
    base: str | None = None,
    *,
    mix: str | None = None,
    engine: str = "auto",
) -> Operator:
    """W Phi(S) of low rank r with units and W generated from the places of the keys (ours).

    Parameters `{"units": those of the basis, (H, r, J), "mix": (H, J, r)}`, J features of the
    place, whatever M; the operator of M keys is `low_rank` with `sum_j f_j(m) units_j` and `sum_j
    f_j(m) mix_j`. On the lattice of training (`reach` keys, J = reach) that is any `low_rank`.

    Args:
        basis: the family of the units, linear in its coefficients, without a base activation.
        rank: r.
        features: J; for a lattice `prefix` and a square.
        reach: the length of training sequences, whose tokens 0..M - 1 have places (m + 1/2) /
            reach; None for a square of patches, whose places are relative to its side: sums over
            more patches grow, which `operators.resize` makes up for.
        prefix: tokens before the patches of a lattice, which have features of their own.
        normalise: None; "count", sums over the keys as means times `reach`: a sum of like terms
            keeps its size for rows of any number of attended keys, one of noise grows where they
            are few.
        base: None, or "softmax", which is added.
        mix: how W is drawn, as in `low_rank`: "scaled", or "zero", with which `base="softmax"`
            starts as exactly softmax. Default "zero" with `base="softmax"`, else "scaled".
        engine: of `kart.kernels`.
    """
    check_basis("generated", basis)
    check_rank("generated", rank)
    schema.check_choice("generated", "mix", mix, (None, *STARTS))
    schema.check_choice("generated", "normalise", normalise, [None, "count"])
    schema.check_choice("generated", "base", base, [None, "softmax"])
    for argument, value, least in (
        ("features", features, prefix + 1),
        ("reach", 1 if reach is None else reach, 1),
        ("prefix", prefix, 0),
    ):
        schema.check_integer("generated", argument, value, least, "Pass one.")
    waves = math.isqrt(features - prefix)
    if reach is None and waves * waves != features - prefix:
        raise ValueError(
            f"`generated` needs `features` as {prefix} prefix tokens and a square, got {features}. "
            f"Pass {prefix + waves * waves} or {prefix + (waves + 1) ** 2}."
        )
    if reach is None and normalise:
        raise ValueError(
            "`generated` needs `reach` with normalise='count', got None. A lattice says its size."
        )
    if reach is not None and prefix:
        raise ValueError(
            f"`generated` needs `prefix` 0 in a sequence, got {prefix}. Its tokens have places; "
            "pass reach=None for a lattice."
        )
    if basis.features is None or basis.options.get("base", "zero") != "zero":
        raise ValueError(
            f"`generated` needs units linear in their coefficients and without a base activation, "
            f"got {basis.family!r} with base={basis.options.get('base', 'zero')!r}. Choose such a "
            "basis: fourier, polynomial, chebyshev, bspline, gaussian_rbf."
        )
    start = mix or ("zero" if base == "softmax" else "scaled")
    inner = low_rank(basis, rank, mix=start, engine=engine)
    beside = low_rank(basis, rank, base=base, mix=start, engine=engine) if base else inner

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        count = heads * features * rank * (basis.size + 1)
        check_fits_memory("generated", count, f"{heads} x {rank} x {features:,} units")
        units = basis.init(generator, (heads, rank, features))
        drawn = bases.normal(generator, (heads, features, rank))
        # as in `low_rank`, for the keys of training
        keys = tokens if reach is None else reach
        return {"units": units, "mix": drawn * (0.0 if start == "zero" else (rank * keys) ** -0.5)}

    def places(keys: int, like: Tensor) -> Tensor:
        # made on the device, as a copy to a GPU would wait for it; MPS has no float64
        device = torch.device("cpu") if like.device.type == "mps" else like.device
        if reach is None:
            return lattice(keys, features, prefix, device).to(like)
        return sequence.rows(keys, features, reach, like.dtype, device).to(like)

    sizes = unit_sizes(basis)

    def fits(params: Params, queries: int, keys: int) -> None:
        check_names("generated", params, ["units", "mix"])
        check_unit_sizes("generated", params["units"], sizes, 3)
        found = tree.leaves(params["units"])[0].shape[2], params["mix"].shape[1]
        if found != (features, features):
            raise ValueError(
                f"`generated` needs parameters of {features} features, got {found[0]} of the units "
                f"and {found[1]} of the mix. Make the operator with as many."
            )

    def of_keys(params: Params, keys: int) -> Params:
        """The parameters of `low_rank` for this many keys."""
        mix = params["mix"]
        found = places(keys, mix)
        # scales a unit are part of its coefficients
        coefs = torch.einsum("mj,hrjk->hrmk", found, basis.coefficients(params["units"]))  # type: ignore[misc]
        units = {"coefs": coefs}
        if basis.options.get("scales"):
            ones = torch.ones_like(coefs[..., 0])
            units |= {"scale_base": ones, "scale_basis": ones}
        return {"units": units, "mix": torch.einsum("mj,hjr->hmr", found, mix)}

    def resized(y: Tensor, mask: Tensor | None, keys: int) -> Tensor:
        # once for the sum over scores, once for that over values
        if normalise is None:
            return y
        return y * (reach / attended_keys(mask, keys, wide(y))).square().to(y.dtype)  # type: ignore[operator]

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        keys = scores.shape[-1]
        y = resized(inner.weights(of_keys(params, keys), scores, mask), mask, keys)
        return y + softmax_rows(scores, mask) if base else y

    def row(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attend` of one query: sums over the keys come first, and nothing is made for each."""
        q, k, v = wide(q), wide(k), wide(v)
        scores = only(scores_of(q, k, None), mask)
        found = places(k.shape[-2], scores)
        values = basis.features(scores)  # type: ignore[misc]
        values = values if mask is None else torch.where(mask[..., None], values, 0)
        coefs = basis.coefficients(params["units"]).to(scores.dtype)  # type: ignore[misc]
        sums = (values.mT @ found).flatten(-2)  # (..., H, 1, K J)
        y = sums @ coefs.mT.flatten(-2).mT
        y = only((y @ params["mix"].to(y.dtype).mT) @ found.mT, mask)
        y = resized(y, mask, k.shape[-2])
        y = y + softmax_rows(scores, mask) if base else y
        return y @ v

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        keys = k.shape[-2]
        if q.shape[-2] == 1 and min(q.dim(), k.dim(), v.dim()) > 2:
            return row(params, q, k, v, mask)
        made = of_keys(params, keys)
        if mask is None or normalise is None:
            # the softmax of the same scores
            made["mix"] = resized(made["mix"], None, keys)
            return beside.attend(made, q, k, v, mask)
        out = resized(inner.attend(made, q, k, v, mask), mask, keys)
        return out + kernels.softmax_attention(q, k, v, mask) if base else out

    def moved(params: Params, old: Lattice, new: Lattice) -> Params:
        side = math.isqrt(new.patches)
        check_read("generated", new, Lattice(prefix, side, side))
        # what comes from patches is weighted by P / P', as in `low_rank`; places are relative
        if old.patches == new.patches:
            return params
        weight = params["mix"].new_ones(features)
        weight[prefix:] = old.patches / new.patches
        units, mix = params["units"], params["mix"]
        coefs = units["coefs"] * weight.to(units["coefs"].dtype)[:, None]
        return {"units": {**units, "coefs": coefs}, "mix": mix * weight[:, None]}

    options = {"rank": rank, "features": features, "reach": reach}
    options |= {"prefix": prefix, "normalise": normalise, "base": base, "mix": start}
    traits = {"length_free": True, "by_place": True}
    if base:
        traits |= {"softmax_base": True, "softmax_start": start == "zero"}
    return from_forms(
        "generated",
        init,
        weights,
        attend,
        fits=fits,
        basis=basis,
        resize=moved if reach is None else None,
        options=options,
        traits=traits,
    )
