"""Learned functions of the score and of the relative position (ours), on softmax + a table.

`softconv` is softmax(S) + T, T by offset. `by_offset` gives every offset a learned function of the
score beside its entry of T; `beside_relative` adds KArAt of low rank. What they add starts at zero
with softmax, so that whatever they gain over `softconv` is a function of the scores.
"""

import torch
from torch import Generator, Tensor

from kart import kernels, schema
from kart.bases import Basis, Params
from kart.factories import remember
from kart.kernels.plain import scores as scores_of
from kart.kernels.plain import wide
from kart.operators.contract import (
    Operator,
    check_basis,
    check_fits_memory,
    check_names,
    check_shapes,
    check_unit_sizes,
    from_forms,
    only,
    products,
    softmax_rows,
    unit_sizes,
)
from kart.operators.learnable import low_rank
from kart.operators.relative import (
    check_geometry,
    flatten_table,
    index_of,
    init_table,
    lattice_of,
    relative,
    resize_table,
    table_shapes,
    tokens_in,
)
from kart.operators.resize import Lattice, amplitudes, check_amplitude
from kart.operators.static import check_square, default_start
from kart.operators.sums import added


@remember
def softconv(prefix: int | None = None, rows: int | None = None) -> Operator:
    """softmax(S) + T with a signed T by offset, a learned convolution beside attention (ours).

    It is `relative(base="softmax")` and starts as exactly softmax; prefix and rows as there.
    """
    return relative(base="softmax", prefix=prefix, rows=rows)._replace(name="softconv")


@remember
def beside_relative(
    basis: Basis, rank: int = 12, prefix: int | None = None, rows: int | None = None
) -> Operator:
    """softmax(S) + T + W Phi(S): low-rank KArAt on top of `softconv`, W zero at the start (ours).

    Parameters `{"0": the table of `relative`, "1": those of `low_rank`}`.
    """
    op = added(
        [relative(base="softmax", prefix=prefix, rows=rows), low_rank(basis, rank, mix="zero")]
    )
    traits = {
        **op.traits,
        "softmax_start": True,
        "product_flops": products,
        "activation_flops": lambda tokens, unit: tokens**2 * ((unit + 1) * rank + 5),
    }
    options = {
        **op.options,
        "kind": "beside_relative",
        "rank": rank,
        "prefix": prefix,
        "rows": rows,
    }
    return op._replace(name="beside_relative", basis=basis, options=options, traits=traits)


@remember
def by_offset(
    basis: Basis,
    base: str | None = None,
    prefix: int | None = None,
    rows: int | None = None,
    start: str | None = None,
) -> Operator:
    """Weights T[o] + phi_o(S), o the offset of the key: a table and a unit an offset (ours).

    With a linear basis phi_o(S) = sum_k F_k(S) c_k(o), a sum of products of a function of the score
    and one of the offset. `attend` streams (see `kart.kernels.pair_attention`); with units that are
    not linear it holds the scores of a block of queries at a time.

    Parameters `{"table": as `relative` has it, "units": {part of the table: its units}}`, e.g.
    `params["units"]["offsets"]["coefs"]` (H, 2R - 1, 2C - 1, K).

    Args:
        basis: the family of the units, without a base activation: T is in its place.
        base: None, or "softmax", which is added.
        prefix, rows: the tokens, as in `relative`.
        start: "scaled", T and the amplitudes of the units of variance 1 / N, or "zero"; default
            "zero" with softmax, which is then where it starts, else "scaled".
    """
    check_basis("by_offset", basis)
    check_geometry("by_offset", prefix, rows)
    schema.check_choice("by_offset", "base", base, [None, "softmax"])
    begin = default_start("by_offset", start, base, False)
    if basis.options.get("base", "zero") != "zero":
        raise ValueError(
            f"`by_offset` needs units without a base activation, got base="
            f"{basis.options['base']!r}. Leave it out: the table is in its place."
        )
    if begin == "zero":
        check_amplitude("by_offset", basis)
    scaled = amplitudes(basis)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        lattice = lattice_of("by_offset", tokens, prefix, rows)
        count = heads * 4 * tokens * (basis.size + 1)
        check_fits_memory("by_offset", count, f"{heads} x {4 * tokens:,} units")
        scale = 0.0 if begin == "zero" else tokens**-0.5
        table = init_table(generator, heads, lattice, scale)
        units = {
            part: {
                leaf: x * (scale if leaf in scaled else 1)
                for leaf, x in basis.init(generator, (heads, *shape)).items()
            }
            for part, shape in table_shapes(lattice).items()
        }
        return {"table": table, "units": units}

    def rows_of(params: Params, dtype: torch.dtype) -> tuple[list[str], list[Tensor], Tensor]:
        """Names and entries of the leaves of the units, T first, and where they stand."""
        table, units = params["table"], params["units"]
        names = list(units["offsets"])
        tables = [{part: own[name] for part, own in units.items()} for name in names]
        leaves = [flatten_table(one).to(dtype) for one in (table, *tables)]
        return names, leaves, index_of(table)

    def block(
        names: list[str], index: Tensor, scores: Tensor, mask: Tensor | None, leaves: list[Tensor]
    ) -> Tensor:
        """The weights of some queries, whose rows of the index these are."""
        # leaves of units may have axes after that of the places
        t, *units = (
            kernels.looked_up(leaf.movedim(1, -1), index).movedim((-2, -1), (1, 2))
            for leaf in leaves
        )
        scores = only(scores, mask)
        y = t + basis.apply(dict(zip(names, units, strict=True)), scores)
        y = only(y, mask)
        return y + softmax_rows(scores, mask) if base else y

    sizes = unit_sizes(basis)

    def fits(params: Params, queries: int, keys: int) -> None:
        check_names("by_offset", params, ["table", "units"])
        for part in params["table"]:
            check_unit_sizes("by_offset", params["units"].get(part, {}), sizes, 3)
        check_names("by_offset", params["units"], params["table"])
        for part, own in params["units"].items():
            places = tuple(params["table"][part].shape[1:3])
            check_shapes("by_offset", own, {n: (*places, *x.shape[3:]) for n, x in own.items()})
        check_square("by_offset", tokens_in(params["table"], "by_offset"), queries, keys)

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        names, leaves, index = rows_of(params, scores.dtype)
        return block(names, index, scores, mask, leaves)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = wide(q), wide(k), wide(v)
        if basis.features is not None and basis.coefficients is not None:
            table = params["table"]
            units = {part: basis.coefficients(own) for part, own in params["units"].items()}
            entries = torch.cat([flatten_table(table)[:, None], flatten_table(units).mT], 1)
            form = "beside" if base else "plain"
            return kernels.pair_attention(basis, entries, index_of(table), q, k, v, mask, form)
        names, leaves, index = rows_of(params, q.dtype)

        def some(index: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            *leaves, mask = rest
            return block(names, index, scores_of(q, k, None), mask, leaves) @ v

        # the features, their products with the coefficients, and what derivatives need
        numbers = 2 * (basis.size + 2)
        return kernels.by_queries(some, [index, q], [k, v, *leaves], mask, numbers)

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        units = params["units"]
        if old.patches != new.patches:
            check_amplitude("resize", basis)
        moved = {
            leaf: resize_table(
                {part: own[leaf] for part, own in units.items()}, old, new, leaf in scaled
            )
            for leaf in units["offsets"]
        }
        return {
            "table": resize_table(params["table"], old, new, True),
            "units": {part: {leaf: one[part] for leaf, one in moved.items()} for part in units},
        }

    options = {"base": base, "prefix": prefix, "rows": rows, "start": begin}
    each = 4 if base else 0
    traits = {
        "self_attention": True,
        "product_flops": products,
        "activation_flops": lambda tokens, unit: tokens**2 * (unit + 1 + each),
    }
    if base:
        traits |= {"softmax_base": True, "softmax_start": begin == "zero"}
    return from_forms(
        "by_offset",
        init,
        weights,
        attend,
        fits=fits,
        basis=basis,
        resize=resize,
        options=options,
        traits=traits,
    )
