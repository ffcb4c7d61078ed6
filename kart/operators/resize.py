"""Parameters of an operator for another number of keys: bicubic over the lattice of patches.

A unit, or an entry of W, at key m is a sample of a function of the place of the patch m. Keys are
class or register tokens first, kept as they are, then the patches by rows. On the new lattice the
function is sampled by cubic convolution (Keys, a = -1/2; on the way down its support is widened to
cover what is dropped, as in image resizing with `antialias=True`), and the samples are weighted
anew: a sum over P patches stands for an integral, so amplitudes become P / P' times as large. Both
sums of an operator, the hidden one over scores and W^T V over values, then keep their size, and so
does what a head puts out. (Units that look alike add up like P, not like the sqrt(P) of independent
ones, and neighbours on a refined lattice do look alike.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kart import schema
from kart.bases import Basis, Params
from kart.operators.contract import Operator, check_names, check_params

Tokens = int | Sequence[int]


class Lattice(NamedTuple):
    """Keys as `prefix` tokens without a place, then `rows` x `columns` patches.

    `prefix` is None where it is what the parameters have beside the patches.
    """

    prefix: int | None
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """P."""
        return self.rows * self.columns


def lattice(argument: str, tokens: Tokens) -> Lattice:
    """The lattice that a number of keys or a tuple stands for."""
    if schema.fits(tokens, int) and tokens > 1:  # type: ignore[operator]
        side = math.isqrt(tokens - 1)  # type: ignore[operator]
        if side * side == tokens - 1:  # type: ignore[operator]
            return Lattice(1, side, side)
    sizes = tuple(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else ()
    fits = all(schema.fits(x, int) for x in sizes)
    if fits and len(sizes) == 2 and min(sizes) >= 1:
        return Lattice(None, *sizes)
    if fits and len(sizes) == 3 and sizes[0] >= 0 and min(sizes[1:]) >= 1:
        return Lattice(*sizes)
    raise ValueError(
        f"`resize` needs `{argument}` as 1 + g * g keys (a class token and a square of patches) or "
        f"as (prefix tokens, rows, columns), got {tokens!r}. Name the lattice: "
        f"`resize(op, params, old_tokens=(1, 14, 14), new_tokens=(1, 16, 16))`."
    )


def check_prefix(prefix: int | None, new: Lattice) -> None:
    """Raises ValueError unless the lattice `new` has `prefix` tokens before its patches."""
    if new.prefix not in (None, prefix):
        raise ValueError(
            f"`resize` needs `new_tokens` with the {prefix} prefix tokens of `old_tokens`, got "
            f"{new.prefix}. Tokens without a place are kept: pass ({prefix}, {new.rows}, "
            f"{new.columns})."
        )


def interpolate(leaf: Tensor, axis: int, old: Lattice, new: Lattice, amplitude: bool) -> Tensor:
    """`leaf` with its axis of keys on another lattice; `amplitude` ones are weighted by P / P'."""
    keys = leaf.shape[axis]
    prefix = keys - old.patches if old.prefix is None else old.prefix
    if prefix < 0 or prefix + old.patches != keys:
        raise ValueError(
            f"`resize` needs `old_tokens` to be the {keys} keys of `params`, got {prefix} and "
            f"{old.rows} x {old.columns} patches. Name the lattice: `resize(op, params, "
            f"old_tokens=(prefix, rows, columns), new_tokens=...)`."
        )
    check_prefix(prefix, new)
    if (old.rows, old.columns) == (new.rows, new.columns):
        return leaf
    last = leaf.movedim(axis, -1)
    first, patches = last[..., :prefix], last[..., prefix:]
    # half types would round the weights of the interpolation
    image = patches.to(torch.promote_types(leaf.dtype, torch.float32))
    image = image.reshape(-1, 1, old.rows, old.columns)
    size = (new.rows, new.columns)
    image = functional.interpolate(image, size, mode="bicubic", antialias=True)
    if amplitude:
        image = image * (old.patches / new.patches)
    moved = image.reshape(*patches.shape[:-1], new.patches).to(leaf.dtype)
    return torch.cat([first, moved], dim=-1).movedim(-1, axis).contiguous()


def check_read(name: str, new: Lattice, read: Lattice) -> None:
    """Raises ValueError unless an operator whose parameters do not say their lattice takes as many
    keys as `new` has for it; `read` is what it takes them for.
    """
    if new[1:] != read[1:] or new.prefix not in (None, read.prefix):
        raise ValueError(
            f"`resize` needs `new_tokens` as `{name}` takes so many keys, {tuple(read)}, got "
            f"{tuple(new)}. Make the operator for them, and resize with that one."
        )


def amplitude(basis: Basis) -> str | None:
    """The leaf that the units of a basis are linear in: "coefs" of a linear family, of another what
    its trait `amplitude` names, else None.
    """
    return basis.traits.get("amplitude") or ("coefs" if basis.coefficients is not None else None)


def amplitudes(basis: Basis) -> set[str]:
    """That leaf, where there is one, and the scale of the base activation."""
    named = amplitude(basis)
    return {"scale_base", named} if named else {"scale_base"}


def check_amplitude(name: str, basis: Basis) -> str:
    """The leaf that the units of a basis are linear in; ValueError where none is named."""
    named = amplitude(basis)
    if named is None:
        raise ValueError(
            f"`{name}` needs a basis that says which of its parameters is a factor of the "
            f"function, got {basis.family!r}, which does not. Name it in its trait `amplitude`."
        )
    return named


def fixed_base(basis: Basis) -> bool:
    """Whether units have a base activation that no parameter is a factor of."""
    return basis.options.get("base", "zero") != "zero" and not basis.options.get("scales")


def moving(axes: Mapping[str, Sequence[int]], basis: Basis) -> Callable[..., Params]:
    """The field `resize` of an operator whose parameters `name` have keys at `axes[name]`.

    A parameter that is a dict holds units of `basis`; one that is a tensor is an amplitude.
    """

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        check_names("resize", params, axes)
        if old.patches != new.patches:
            if fixed_base(basis):
                raise ValueError(
                    f"`resize` needs units that can be weighted anew, got base activation "
                    f"{basis.options['base']!r} of weight 1, which adds up over the keys. Train "
                    "with `scales=True`, whose weight of it is a parameter."
                )
            check_amplitude("resize", basis)
        scaled = amplitudes(basis)

        def move(leaf: Tensor, name: str, amplitude: bool) -> Tensor:
            for axis in axes[name]:
                leaf = interpolate(leaf, axis, old, new, amplitude)
            return leaf

        return {
            name: {key: move(leaf, name, key in scaled) for key, leaf in value.items()}
            if isinstance(value, dict)
            else move(value, name, True)
            for name, value in params.items()
        }

    return resize


def resize(op: Operator, params: Params, old_tokens: Tokens, new_tokens: Tokens) -> Params:
    """Parameters of `op` for another number of keys, moved from those for `old_tokens`.

    Bicubic over the patches, class and register tokens kept; amplitudes (coefficients, W) are
    weighted by P / P', the numbers of patches, other parameters (the shifts and scales of wavelets,
    denominators) are not. The same lattice is the identity to the bit, an operator without
    parameters of keys has nothing to move.

    Args:
        op: the operator that `params` are of.
        params: as `op.init(generator, heads, tokens)` makes them.
        old_tokens, new_tokens: the keys before and after, 1 + g * g (a class token and a square of
            patches); or (prefix tokens, rows, columns); or (rows, columns), with the prefix tokens
            that the parameters have.

    >>> from kart import bases, operators
    >>> op = operators.low_rank(bases.fourier(3), rank=4)
    >>> params = op.init(torch.Generator().manual_seed(0), 2, 17)
    >>> operators.resize(op, params, 17, 65)["mix"].shape
    torch.Size([2, 65, 4])
    """
    if not isinstance(op, Operator):
        raise ValueError(
            f"`resize` needs an Operator first, got {type(op).__name__}. Pass for example "
            '`operators.parse("G3B").operator`.'
        )
    check_params("resize", params)
    old, new = lattice("old_tokens", old_tokens), lattice("new_tokens", new_tokens)
    if not params and op.traits.get("learned"):
        raise ValueError(
            f"`resize` needs the parameters of {op.name!r}, got none. Pass what "
            "`init(generator, heads, tokens)` drew."
        )
    if op.resize is not None:
        try:
            return op.resize(params, old, new)
        except KeyError as error:
            found = ", ".join(map(str, params))
            raise ValueError(
                f"`resize` needs the parameters of {op.name!r}, {error} among them, got {found}. "
                "Pass what `init(generator, heads, tokens)` drew."
            ) from error
    if not params or op.traits.get("length_free"):
        return params
    raise ValueError(
        f"`resize` needs an operator that says where its keys are (`Operator.resize`), got "
        f"{op.name!r}. Give it one, or the trait `length_free` where parameters fit any number, or "
        "call `init` for the new number of keys."
    )
