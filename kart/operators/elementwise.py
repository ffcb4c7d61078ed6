"""Operators that do not know the length: a weight is a function of the score, or of the offset, of
its own key (ours; the paper's operators know how many keys there are).

`elementwise` has one learned function of the score a head, for all keys; `by_distance` one of the
offset from query to key. Their parameters serve any N and M, masks, causal or padding, and tokens
that come one by one. `from_entries` makes both.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from kart import kernels, schema
from kart.bases import Basis, Params
from kart.factories import remember
from kart.kernels import plain
from kart.kernels.arguments import broadcast_leading
from kart.kernels.entries import ENGINES
from kart.kernels.plain import softmax_rows, weigh, wide
from kart.kernels.transforms import Constant
from kart.operators import static
from kart.operators.contract import (
    Operator,
    attended_keys,
    check_basis,
    check_names,
    check_unit_sizes,
    from_forms,
    two_axes,
    unit_sizes,
)
from kart.operators.resize import amplitudes, check_amplitude, fixed_base

NORMALISATIONS = ("count", "l1", "softmax")


def each_head(basis: Basis, units: Params, x: Tensor) -> Tensor:
    """`phi_h(x)` for `units (H,)` and x `(..., H, N, M)`, one function a head."""
    if basis.features is None or basis.coefficients is None:
        lifted = {name: leaf[:, None, None] for name, leaf in units.items()}
        return basis.apply(lifted, x)
    coefs, features = basis.coefficients(units).to(x.dtype), basis.features(x)
    # ONNX has no axis of one beside one of several heads
    features = features.expand(*features.shape[:-4], coefs.shape[0], *features.shape[-3:])
    return torch.einsum("...hnmk,hk->...hnm", features, coefs)


class Form(NamedTuple):
    """What becomes of entries, and at which `start`: see `from_entries`."""

    normalise: str | None
    base: str | None
    inside: bool
    start: str | None


def check_form(name: str, normalise: str | None, base: str | None, inside: bool) -> None:
    """Raises ValueError unless these say one thing about what becomes of the entries."""
    schema.check_choice(name, "normalise", normalise, (None, *NORMALISATIONS))
    schema.check_choice(name, "base", base, [None, "softmax"])
    if not isinstance(inside, bool):
        raise ValueError(f"`{name}` needs `inside` True or False, got {inside!r}.")
    if inside and (base or normalise):
        raise ValueError(
            f"`{name}` needs `inside` alone, which is in the softmax of the scores, got it with "
            f"base={base!r} and normalise={normalise!r}. Leave them out."
        )


def from_entries(
    name: str,
    basis: Basis,
    given: Form,
    *,
    engine: str,
    table: Callable[[Params, int, int], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Operator:
    """An operator from the entry Y of a query and a key, which no other key has a part in.

    The weights are Y, normalised; with softmax(S) added with `base="softmax"`; or softmax(S + Y)
    with `inside`. `attend` streams (see `kart.kernels.entry_attention`); without scores the entries
    are those of every sample, and it holds a block of queries at a time. Parameters `{"units":
    those of the basis, (H,)}`.

    Args:
        basis: of the units.
        given: see above. Its start is "scaled", as the basis draws, without a normalisation over
            sqrt(tokens); "zero", of which Y = 0; None for "zero" beside or inside softmax, else
            "scaled".
        engine: of `kart.kernels.entry_attention`.
        table: of parameters and the numbers N and M of queries and keys, the entries `(H, N + M -
            1)` at the offsets -(N - 1) to M - 1 from key to query; None, where they are phi_h(S).
        options: recorded in the result.
    """
    check_basis(name, basis)
    normalise, base, inside, start = given
    check_form(name, normalise, base, inside)
    start = default_start(name, start, normalise, base, inside)
    check_starts(name, basis, start)
    schema.check_choice(name, "engine", engine, ENGINES)
    rows = normalise if normalise in ("l1", "softmax") else None
    form = "inside" if inside else rows or ("beside" if base else "plain")
    alone = "inside" if inside else rows or "plain"

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        scale = tokens**-0.5 if normalise is None and not inside else 1.0
        return {"units": draw_units(basis, generator, heads, scale, start)}

    sizes = unit_sizes(basis)

    def fits(params: Params, queries: int, keys: int) -> None:
        check_names(name, params, ["units"])
        check_unit_sizes(name, params["units"], sizes, 1)

    def factor_of(mask: Tensor | None, keys: int, like: Tensor) -> Tensor | None:
        return two_axes(1 / attended_keys(mask, keys, like)) if normalise == "count" else None

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        if table is None:
            y = each_head(basis, params["units"], scores)
        else:
            y = plain.entries(None, {"theta": table(params, *scores.shape[-2:])}, scores)
        y = weigh(alone, y, scores, mask, factor_of(mask, scores.shape[-1], scores))
        return y + softmax_rows(scores, mask) if base else y.expand(scores.shape)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        apart = base and form != "beside"
        added = kernels.softmax_attention(q, k, v, mask) if apart else None
        factor = factor_of(mask, k.shape[-2], wide(v[..., :0]))
        if table is None or form in ("inside", "beside"):
            # a GPU's kernels multiply half types as they are
            out = of_each(params, q, k, v, mask, factor)
        else:
            out = of_places(params, wide(q), wide(k), wide(v), mask, factor)
        return out if added is None else wide(out) + added

    def of_each(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Any, factor: Any) -> Tensor:
        own = params["units"]
        if table is not None:
            own = {"table": table(params, q.shape[-2], k.shape[-2])}
        of = basis if table is None else None
        return kernels.entry_attention(
            of, own, q, k, v, mask, form=form, factor=factor, engine=engine
        )

    def of_places(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Any, factor: Any
    ) -> Tensor:
        assert table is not None  # for the type checker
        queries, keys = q.shape[-2], k.shape[-2]

        def block(place: Tensor, v: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
            index = place - torch.arange(keys, device=place.device)
            y = weigh(alone, entries[:, 0, index], None, mask)
            return static.mixed(y.to(v.dtype), v)

        place = torch.arange(queries, device=q.device)[:, None] + keys - 1
        entries = table(params, queries, keys)[:, None]
        out = kernels.by_queries(block, [place], [v, entries], mask, 2)
        # the axes of q and k, which have no other part
        lead = broadcast_leading(name, q=q, k=k, out=out)
        out = out.expand(*lead, *out.shape[-2:])
        return out if factor is None else out * factor

    options = {**(options or {}), **given._asdict(), "start": start}
    found: dict[str, Any] = {"length_free": True, "queries_last": table is not None}
    if inside or (normalise == "softmax" and not base):
        found["simplex"] = True
    if inside or (base and normalise in (None, "count")):
        found["softmax_base"] = True
        found["softmax_start"] = start == "zero"
    return from_forms(
        name, init, weights, attend, fits=fits, basis=basis, options=options, traits=found
    )


def default_start(
    name: str, start: str | None, normalise: str | None, base: str | None, inside: bool
) -> str:
    """The start that was asked for; "zero" beside or inside softmax, "scaled" alone."""
    rows = normalise in ("l1", "softmax")
    if start == "zero" and rows:
        raise ValueError(
            f'`{name}` needs `start` "scaled" with normalise={normalise!r}, got "zero", of which '
            "no row can be normalised to zero. Leave it out."
        )
    return static.default_start(name, start, None if rows else base, inside)


def draw_units(
    basis: Basis, generator: Generator, heads: int, scale: float, start: str
) -> dict[str, Tensor]:
    """Units `(H,)`, their amplitudes times `scale`, or zero with start "zero"."""
    scaled = amplitudes(basis)
    factor = 0.0 if start == "zero" else scale
    units = basis.init(generator, (heads,))
    return {name: leaf * factor if name in scaled else leaf for name, leaf in units.items()}


def check_starts(name: str, basis: Basis, start: str) -> None:
    """Raises ValueError where units are to start at zero, which no parameter of theirs can do."""
    if start != "zero":
        return
    check_amplitude(name, basis)
    if fixed_base(basis):
        raise ValueError(
            f"`{name}` needs units that can start at zero, got base activation "
            f'{basis.options["base"]!r}. Leave it out, or ask for start="scaled".'
        )


@remember
def elementwise(
    basis: Basis,
    normalise: str | None = None,
    base: str | None = None,
    inside: bool = False,
    start: str | None = None,
    *,
    engine: str = "auto",
) -> Operator:
    """Weights phi(S) with one learned function of the score a head, shared by all queries and keys
    (ours).

    Signed, unlike sigmoid and relu attention, of which it is the learned form. Parameters
    `{"units": those of the basis, (H,)}`, whatever N and M.

    Args:
        basis: the family of the functions.
        normalise: None; "count", phi(S) / n with n the number of attended keys, for lengths that
            vary; "l1", over the sum of magnitudes of the row; "softmax", softmax(phi(S)).
        base: None, or "softmax", which is added.
        inside: softmax(S + phi(S)) instead.
        start: "scaled", as the basis draws the functions of (H,), amplitudes over sqrt(H), and
            without a normalisation over sqrt(tokens), so that the size of a head's output does not
            depend on their number; "zero", with which softmax beside or around starts as exactly
            softmax. Default "zero" with softmax, else "scaled".
        engine: of `kart.kernels.entry_attention`.
    """

    given = Form(normalise, base, inside, start)
    return from_entries("elementwise", basis, given, engine=engine)


@remember
def by_distance(
    basis: Basis,
    normalise: str | None = None,
    base: str | None = None,
    inside: bool = False,
    reach: int = 256,
    start: str | None = None,
    *,
    engine: str = "auto",
) -> Operator:
    """Weights phi(u), a learned function of the offset o from key to query, whatever the scores
    (ours).

    `u = pi sign(o) log(1 + |o|) / log(1 + reach)`, so that neighbours are told apart and any
    distance has a value. `inside=True` is softmax(S + phi(u)), a relative bias as in Raffel et al.
    2020 that is continuous in the logarithm of the distance; alone, or beside softmax, it mixes
    tokens as a convolution does. The queries are the last N of the M tokens.

    Parameters `{"units": those of the basis, (H,)}`.

    Args:
        basis: the family of the functions; u is within -pi and pi up to `reach`.
        normalise: None; "count", over the number of attended keys; "l1"; "softmax".
        base: None, or "softmax", which is added.
        inside: softmax(S + phi(u)) instead.
        reach: the offset at which u is pi, the longest that is trained on.
        start: "scaled" or "zero", as in `elementwise`; default "zero" with softmax, else "scaled".
        engine: of `kart.kernels.entry_attention`, where the scores have a part.
    """
    advice = "Pass the longest sequence of training."
    schema.check_integer("by_distance", "reach", reach, 1, advice)

    def angles(first: int, stop: int, device: torch.device) -> Tensor:
        offsets = torch.arange(first, stop, dtype=torch.float64, device=device)
        return offsets.sign() * offsets.abs().log1p() * (math.pi / math.log1p(reach))

    @Constant
    def past(keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Features `(M, K)` at the offsets 0..M - 1, all that one query has."""
        return basis.features(angles(0, keys, device)).to(dtype)  # type: ignore[misc]

    def table(params: Params, queries: int, keys: int) -> Tensor:
        units = params["units"]
        leaf = next(iter(units.values()))
        like = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        # MPS has no float64
        device = torch.device("cpu") if leaf.device.type == "mps" else leaf.device
        if basis.features is None or basis.coefficients is None:
            lifted = {name: leaf[:, None] for name, leaf in units.items()}
            return basis.apply(lifted, angles(1 - queries, keys, device).to(like))
        if queries == 1:
            features = past.rows(keys, like.dtype, device)
        else:
            features = basis.features(angles(1 - queries, keys, device))
        return basis.coefficients(units).to(like.dtype) @ features.to(like).mT

    return from_entries(
        "by_distance",
        basis,
        Form(normalise, base, inside, start),
        engine=engine,
        table=table,
        options={"reach": reach},
    )
