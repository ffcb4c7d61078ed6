"""Mixing by relative position: one weight for each offset between patches, a learned convolution.

Tokens are `prefix` ones without a place (class, registers), then the patches of a lattice by rows.
The weight of a patch for another is an entry of a table over their offset; those from and to prefix
tokens have entries of their own for each patch.
"""

import math

import torch
from torch import Generator, Tensor

from kart import bases, kernels, schema
from kart.bases import Params
from kart.factories import remember
from kart.kernels.transforms import Constant
from kart.operators.contract import Operator, check_fits_memory, check_names, check_shapes
from kart.operators.resize import Lattice, check_prefix, interpolate
from kart.operators.static import Form, default_start, from_matrix

# of a table, in the order of `flatten_table`
PARTS = ("offsets", "to_prefix", "from_prefix", "prefix")


def check_geometry(name: str, prefix: int | None, rows: int | None) -> None:
    """Raises ValueError unless `prefix` and `rows` can describe tokens."""
    advice = "A ViT and square windows leave both out; a sequence has prefix=0 and rows=1."
    for argument, value, least in (("prefix", prefix, 0), ("rows", rows, 1)):
        if value is not None:
            schema.check_integer(name, argument, value, least, advice)


def lattice_of(name: str, tokens: int, prefix: int | None, rows: int | None) -> Lattice:
    """The lattice of `tokens` tokens: a square of patches, or `rows` rows of them. Without a
    `prefix` there is one token before them, as in a ViT, or none where all are a square.
    """
    if prefix is None:
        # no square is the one after another, but for 0 and 1
        prefix = 0 if rows is None and math.isqrt(max(tokens, 0)) ** 2 == tokens else 1
    patches = tokens - prefix
    side = math.isqrt(max(patches, 0)) if rows is None else rows
    if patches < 1 or patches % max(side, 1) or (rows is None and side * side != patches):
        wanted = "a square of patches" if rows is None else f"{rows} rows of patches"
        raise ValueError(
            f"`{name}` needs `tokens` as {prefix} prefix tokens and {wanted}, got {tokens}. Set "
            "`prefix` and `rows`: prefix=0 for windows, rows=R for R x C patches, rows=1 for a "
            "sequence."
        )
    return Lattice(prefix, side, patches // side)


@Constant
def entry_index(prefix: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Where a flattened table has the entry of query n and key m, `(N, N)`, made on `device`: a
    copy to a GPU would wait for it.
    """
    y, x = (torch.arange(n, device=device) for n in (rows, columns))
    y, x = y[:, None].expand(rows, columns).flatten(), x.repeat(rows)
    down, right = y - y[:, None] + rows - 1, x - x[:, None] + columns - 1
    index, patches = down * (2 * columns - 1) + right, rows * columns
    if not prefix:
        return index
    sizes = [(2 * rows - 1) * (2 * columns - 1), patches * prefix, prefix * patches, prefix**2]
    ends = torch.arange(sum(sizes), device=device).split(sizes)
    to_prefix, from_prefix = ends[1].view(patches, prefix), ends[2].view(prefix, patches)
    first = torch.cat([ends[3].view(prefix, prefix), from_prefix], -1)
    return torch.cat([first, torch.cat([to_prefix, index], -1)])


def table_shapes(lattice: Lattice) -> dict[str, tuple[int, int]]:
    """The parts of a table and their axes after that of the heads."""
    prefix, rows, columns = lattice.prefix or 0, lattice.rows, lattice.columns
    shapes = {"offsets": (2 * rows - 1, 2 * columns - 1)}
    if prefix:
        shapes["to_prefix"] = (lattice.patches, prefix)
        shapes["from_prefix"] = (prefix, lattice.patches)
        shapes["prefix"] = (prefix, prefix)
    return shapes


def init_table(generator: Generator, heads: int, lattice: Lattice, scale: float) -> Params:
    """Entries N(0, scale^2) for every offset and, with prefix tokens, for every pair with one."""
    return {
        name: bases.normal(generator, (heads, *shape)) * scale
        for name, shape in table_shapes(lattice).items()
    }


def lattice_in(table: Params) -> Lattice:
    """The lattice that a table is for."""
    rows, columns = ((n + 1) // 2 for n in table["offsets"].shape[1:3])
    return Lattice(table["prefix"].shape[1] if "prefix" in table else 0, rows, columns)


def flatten_table(table: Params) -> Tensor:
    """The entries of all parts one after the other, `(H, E, ...)`."""
    return torch.cat([table[name].flatten(1, 2) for name in PARTS if name in table], 1)


def index_of(table: Params) -> Tensor:
    """Where `flatten_table(table)` has the entry of query n and key m, `(N, N)`."""
    lattice, device = lattice_in(table), table["offsets"].device
    return entry_index(lattice.prefix or 0, lattice.rows, lattice.columns, device)


def expand_table(table: Params) -> Tensor:
    """The matrix `(H, N, M)` of a table: `T[n, m] = offsets[place of m - place of n]`."""
    return kernels.looked_up(flatten_table(table), index_of(table))


def tokens_in(table: Params, name: str = "relative") -> int:
    """The number of tokens that a table is for; ValueError unless its parts are of one lattice."""
    if "offsets" not in table or table["offsets"].dim() < 3:
        check_names(name, table, ["offsets"])
        check_shapes(name, table, {"offsets": (1, 1)})
    lattice = lattice_in(table)
    check_shapes(name, table, table_shapes(lattice))
    return (lattice.prefix or 0) + lattice.patches


def cubic_weights(old: int, new: int) -> Tensor:
    """The samples of a function at offsets -(old - 1)..old - 1, in steps of 1 / old, moved to those
    of `new`: a matrix `(2 new - 1, 2 old - 1)` of cubic convolution (Keys, a = -1/2).

    On the way down the kernel is widened; at the ends its weights are scaled to a sum of one.
    """
    there = torch.arange(1 - new, new, dtype=torch.float64, device="cpu")[:, None] * (old / new)
    here = torch.arange(1 - old, old, dtype=torch.float64, device="cpu")
    x = (there - here).abs() / max(1.0, old / new)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    w = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return w / w.sum(-1, keepdim=True)


def resize_table(table: Params, old: Lattice, new: Lattice, amplitude: bool) -> Params:
    """The table of another lattice; entries that are weights (`amplitude`) are scaled by P / P'.

    An entry is a sample of a function of the offset in units of the picture's side.
    """
    own = lattice_in(table)
    prefix = own.prefix if old.prefix is None else old.prefix
    if (prefix, old.rows, old.columns) != own:
        raise ValueError(
            f"`resize` needs `old_tokens` as the ({own.prefix}, {own.rows}, {own.columns}) of "
            f"`params`, got ({prefix}, {old.rows}, {old.columns}). Name their lattice."
        )
    check_prefix(prefix, new)
    if (old.rows, old.columns) == (new.rows, new.columns):
        return table
    offsets = table["offsets"]
    like = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
    down, right = (
        cubic_weights(a, b).to(like) for a, b in ((old.rows, new.rows), (old.columns, new.columns))
    )
    moved = torch.einsum("ij,hjk...,lk->hil...", down, like, right)
    moved = moved * (old.patches / new.patches if amplitude else 1.0)
    result = {**table, "offsets": moved.to(offsets.dtype)}
    if prefix:
        # places alone, so that the prefix of the leaf is none of them
        a, b = (Lattice(0, one.rows, one.columns) for one in (old, new))
        result["to_prefix"] = interpolate(table["to_prefix"], 1, a, b, False)
        result["from_prefix"] = interpolate(table["from_prefix"], 2, a, b, amplitude)
    return result


@remember
def relative(
    base: str | None = None,
    signed: bool = True,
    normalise: str | None = None,
    inside: bool = False,
    prefix: int | None = None,
    rows: int | None = None,
    start: str | None = None,
) -> Operator:
    """A learned table of one weight an offset and head, whatever the scores: a convolution of the
    values as wide as the picture.

    Alone, or beside softmax with `base="softmax"`: softmax(S) + T, T signed, which starts as
    exactly softmax (ours). `inside=True` is softmax(S + T), the relative position bias of Swin
    (Liu et al. 2021) and of Raffel et al. 2020.

    Parameters `{"offsets": (H, 2R - 1, 2C - 1)}`, where `offsets[h, R - 1 + dy, C - 1 + dx]` is the
    weight of the patch dy rows below and dx columns right of the query; with prefix tokens also
    `"to_prefix" (H, P, prefix)` of patches for them, `"from_prefix" (H, prefix, P)` of theirs for
    patches, and `"prefix" (H, prefix, prefix)`.

    Args:
        base: None, or "softmax", which is added.
        signed: False for softplus(T) / N, weights of one sign.
        normalise: None, or "softmax" by rows.
        inside: T is added to the scores instead.
        prefix: tokens before the patches, which have no place; None for one, or for none where
            the tokens are a square, as those of a window are, and `rows` is left out.
        rows: rows of the lattice; None for a square one, 1 for a sequence.
        start: "scaled", entries of variance 1 / N, or "zero"; default "zero" with softmax, else
            "scaled".

    Reference: Tay et al., 2021, arXiv:2005.00743, for weights without scores; Liu et al., "Swin
    Transformer", 2021, arXiv:2103.14030, eq. 4, for the table inside softmax.
    """
    check_geometry("relative", prefix, rows)
    begin = default_start("relative", start, base, inside)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        lattice = lattice_of("relative", tokens, prefix, rows)
        check_fits_memory("relative", heads * 4 * tokens, f"{heads} x {4 * tokens:,} numbers")
        return init_table(generator, heads, lattice, 0.0 if begin == "zero" else tokens**-0.5)

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        return resize_table(params, old, new, signed and not normalise and not inside)

    return from_matrix(
        "relative",
        init,
        expand_table,
        tokens_in,
        Form(signed, normalise, base, inside, begin),
        placed=lambda table: (flatten_table(table), index_of(table)),
        resize=resize,
        options={"prefix": prefix, "rows": rows},
    )
