"""What a row operator is, and what all of them share: checks, masks, precision, base, projection.

An operator of one's own starts at `from_rows` (a function of scores alone), `from_logits`
(parameters and logits) or `from_forms` (any two forms): all check arguments and silence what is
masked; the first two compute in float32 where the input is half precision.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from kart import bases, factories, kernels, schema, tree
from kart.bases import Basis, Params
from kart.kernels import arguments
from kart.kernels.core import no_autocast
from kart.kernels.plain import scores as scores_of
from kart.kernels.plain import simplex_rows, softmax_rows, wide, wide_dtype


class Factored(NamedTuple):
    """Logits as a product, `left (..., H, N, J)` times the transpose of `right (..., H, M, J)`."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """`(..., H, N, M)`."""
        return self.left @ self.right.to(self.left.dtype).mT


class Factors(NamedTuple):
    """Weights as a product: `of(params, q, k)` are its factors, of `rank` columns, where nothing is
    masked; those of an operator whose `attend` is this one still.
    """

    rank: int
    of: Callable[..., Factored]
    attend: Callable[..., Tensor]


class Operator(NamedTuple):
    """A map from scores to attention weights, as pure functions of its parameters.

    `init(generator, heads, tokens)` draws parameters for rows of `tokens` keys; every leaf leads
    with the H heads. `weights(params, scores, mask=None)` maps `(..., H, N, M)` to `(..., H, N,
    M)`, materialised, for looking. `attend(params, q, k, v, mask=None)` is `weights(q k^T /
    sqrt(d)) @ v`, `(..., H, N, d)`, streamed. `mask` is boolean, True = attend, and broadcasts to
    `(..., H, N, M)`: a masked key has weight 0 and no part in the weights of others, whatever it
    holds. `basis` is the family of the learnable units, None where there is none.

    `options` are the hyperparameters. `traits` are what `kart.testing` and other rooms may rely on:
    "learned" (has parameters) and "length_free" (the parameters fit any number of keys); further
    "self_attention" (queries are the tokens of the keys), "by_length" (weights are by the number of
    keys), "by_place" (by the place of the key), "queries_last" (by the offset to the key, of
    queries that are the last of the keys), "whole" (they are all that a block attends with: a
    ConViT mixes no positions in), "of_scores" (False where `weights` is an error, as scores do not
    determine them), and `product_flops(tokens, width)` and `activation_flops(tokens, unit)`, what a
    head multiplies with q, k and v, and does from scores to weights if a unit costs `unit` a score,
    for those whose cost `kart.analysis.cost` is to know.
    `resize(params, old, new)` moves parameters to another lattice of keys (see
    `kart.operators.resize`), None where there is nothing to move. `call` is the call that made the
    tuple, by which it pickles. `factors` gives weights that are a product of few columns as that
    product (see `kart.operators.projected`), None where they are none; an operator with another
    `attend` put in its place has none.
    """

    name: str
    init: Callable[[Generator, int, int], Params]
    weights: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    basis: Basis | None = None
    options: Mapping[str, Any] = {}
    traits: Mapping[str, Any] = {}
    resize: Callable[..., Params] | None = None
    call: factories.Call | None = None
    factors: Factors | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return factories.reduce(self)


# the basis in which scores stand for themselves
SCORES = bases.polynomial(1)

# --- checks ---------------------------------------------------------------------------------------


def check_sizes(heads: int, tokens: int) -> None:
    """Raises ValueError unless there is at least one head and one key."""
    if not all(schema.fits(value, int) and value >= 1 for value in (heads, tokens)):
        raise ValueError(
            f"`init` needs `heads` >= 1 and `tokens` >= 1, got {heads!r} and {tokens!r}. "
            "Pass the number of heads and of keys."
        )


def draw(op: Operator, generator: Generator, heads: int, tokens: int) -> Params:
    """What `op.init` draws; ValueError unless it is nested dicts of floating-point tensors, which
    modules and checkpoints can hold and optimisers can train.
    """
    drawn = op.init(generator, heads, tokens)
    _check_drawn(op.name, drawn, "")
    return drawn


def _check_drawn(name: str, node: Any, path: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(
                    f"`{name}.init` needs names without dots as keys, got {key!r}"
                    f"{f' in {path!r}' if path else ''}. Rename it."
                )
            _check_drawn(name, value, f"{path}.{key}" if path else key)
    elif not path or not isinstance(node, Tensor) or not node.is_floating_point():
        kind = node.dtype if isinstance(node, Tensor) else type(node).__name__
        raise ValueError(
            f"`{name}.init` needs to give nested dicts of floating-point tensors, got {kind}"
            f"{f' at {path!r}' if path else ''}. What is not learned is a constant of the factory."
        )


def check_fits_memory(name: str, numbers: int, what: str) -> None:
    """Raises ValueError where float32 parameters are more than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > memory:
        raise ValueError(
            f"`{name}.init` needs parameters that fit the {memory / 2**30:.0f} GiB of memory, got "
            f"{what}, {4 * numbers // 2**30:,} GiB. Choose a smaller rank, grid or number of keys."
        )


def check_rank(name: str, rank: int) -> None:
    """Raises ValueError unless `rank` is a positive integer."""
    schema.check_integer(name, "rank", rank, 1, "The paper uses 12.")


def check_basis(name: str, basis: Basis) -> None:
    """Raises ValueError unless `basis` is one."""
    if not isinstance(basis, Basis):
        raise ValueError(
            f"`{name}` needs a Basis first, got {basis!r}. Pass for example bases.fourier(grid=3)."
        )


def check_padded(name: str, *tensors: Tensor) -> None:
    """Raises ValueError for what is no tensor, and for nested ones: operators take rows of one
    length, and a mask.
    """
    if not all(isinstance(x, Tensor) for x in tensors):
        kinds = ", ".join(type(x).__name__ for x in tensors)
        raise ValueError(
            f"`{name}` needs tensors, got {kinds}. Convert what is none with `torch.as_tensor`."
        )
    if any(x.is_nested for x in tensors):
        raise ValueError(
            f"`{name}` needs tensors of one length, got a nested one. Pad it with "
            "`torch.nested.to_padded_tensor`, and say in a mask which keys there are."
        )


def check_scores(name: str, scores: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError unless scores are `(..., H, N, M)` and the mask fits them."""
    check_padded(f"{name}.weights", scores)
    if scores.dim() < 2 or not scores.dtype.is_floating_point or 0 in scores.shape[-2:]:
        raise ValueError(
            f"`{name}.weights` needs floating-point `scores` (..., H, N, M) with N, M >= 1, got "
            f"{scores.dtype} of shape {tuple(scores.shape)}. Pass q @ k.mT / sqrt(d)."
        )
    *lead, queries, keys = scores.shape
    check_mask(f"{name}.weights", mask, queries, keys, lead)


def check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError unless q, k, v and the mask fit together."""
    check_padded(f"{name}.attend", q, k, v)
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
    check_mask(f"{name}.attend", mask, q.shape[-2], k.shape[-2], *(x.shape[:-2] for x in (q, k, v)))


def check_mask(
    name: str, mask: Tensor | None, queries: int, keys: int, *leads: Sequence[int]
) -> None:
    """Raises ValueError unless the mask is boolean and broadcasts to `(..., queries, keys)`, with
    leading axes `leads` of the other tensors.
    """
    arguments.check_mask(name, mask, queries, keys)
    if mask is None or mask.dim() <= 2:
        return
    try:
        torch.broadcast_shapes(mask.shape[:-2], *leads)
    except RuntimeError:
        others = " and ".join(dict.fromkeys(str(tuple(lead)) for lead in leads))
        raise ValueError(
            f"`{name}` needs a `mask` whose axes before the last two broadcast with those of "
            f"the other tensors, {others}, got shape {tuple(mask.shape)}. A mask of keys is (B, 1, "
            f"1, {keys})."
        ) from None


def check_keys(name: str, expected: int, keys: int) -> None:
    """Raises ValueError unless the parameters are for this number of keys."""
    if expected != keys:
        raise ValueError(
            f"`{name}` was initialised for rows of {expected} keys, got {keys}. "
            f"Call `init(generator, heads, {keys})` for this number of tokens, or move the "
            "parameters with `kart.operators.resize`."
        )


def unit_sizes(basis: Basis) -> dict[str, tuple[int, ...]] | None:
    """The axes that each leaf of units of a basis has behind those of their shape; None where one
    of the user's own cannot draw no units.
    """
    try:
        return {name: tuple(x.shape[2:]) for name, x in basis.init(Generator(), (0, 1)).items()}
    except Exception:
        return None


def check_params(name: str, params: Any) -> None:
    """Raises ValueError unless parameters are a dict, as `init` draws them."""
    if not isinstance(params, dict):
        raise ValueError(
            f"`{name}` needs parameters as a dict, got {type(params).__name__}. Pass what "
            "`init(generator, heads, tokens)` drew."
        )


def check_names(name: str, params: Params, wanted: Collection[str]) -> None:
    """Raises ValueError unless the parameters are called as `wanted`."""
    if params.keys() != set(wanted):
        found = ", ".join(map(str, params)) or "none"
        raise ValueError(
            f"`{name}` needs parameters {', '.join(wanted)}, got {found}, which are of another "
            "operator. Take that one, or call `init(generator, heads, tokens)` of this."
        )


def check_shapes(name: str, params: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the leaves are those of `shapes`, `(H, *shape)` each: of others
    products would repeat an axis of one.
    """
    check_names(name, params, shapes)
    for leaf, own in shapes.items():
        if params[leaf].shape[1:] != own:
            what = ", ".join(["H", *map(str, own)])
            raise ValueError(
                f"`{name}` needs parameters with {leaf!r} ({what}), got shape "
                f"{tuple(params[leaf].shape)}. Take all of one operator, or call `init(generator, "
                "heads, tokens)`."
            )


def check_unit_sizes(
    name: str, units: Params, sizes: Mapping[str, tuple[int, ...]] | None, axes: int
) -> None:
    """Raises ValueError unless the leaves of units are those of a basis, with `axes` before the
    `sizes` that it has, where they are known.
    """
    if sizes is None:
        return
    check_names(name, units, sizes)
    for leaf, own in sizes.items():
        shape = tuple(units[leaf].shape)
        if shape[axes:] != own or len(shape) < axes:
            what = ", ".join(["H", *["."] * (axes - 1), *map(str, own)])
            raise ValueError(
                f"`{name}` needs units with {leaf!r} ({what}), got shape {shape}, which is of "
                "another operator or basis. Take that one, or call `init(generator, heads, tokens)`"
                " of this."
            )


def check_heads(name: str, params: Params, *tensors: Tensor) -> None:
    """Raises ValueError unless every leaf of the parameters leads with the heads that the tensors
    `(..., H, N, .)` have together, or with one, which broadcasts: the heads of the output are those
    of the input.
    """
    heads = max(x.shape[-3] if x.dim() > 2 else 1 for x in tensors)
    leaves = tree.leaves(params)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"`{name}` needs parameters of tensors, got {leaves!r:.100}. Pass what "
            "`init(generator, heads, tokens)` drew."
        )
    found = [tuple(leaf.shape[:1]) for leaf in leaves]
    # compared, not as a set: in a trace sizes are tensors
    if any(own not in ((heads,), (1,)) for own in found):
        told = " and ".join(str(*sizes) for sizes in sorted(set(found)))
        raise ValueError(
            f"`{name}` needs parameters of {heads} heads, got those of {told or 'none'}. "
            f"Call `init(generator, {heads}, tokens)`, or put the heads before the tokens."
        )


# --- masks and rows -------------------------------------------------------------------------------


def two_axes(mask: Tensor | None) -> Tensor | None:
    """The mask with axes of queries and of keys, `(..., N or 1, M or 1)`."""
    if mask is None or mask.dim() >= 2:
        return mask
    return mask.reshape((1,) * (2 - mask.dim()) + mask.shape)


def same_for_all_queries(mask: Tensor | None) -> bool:
    """Whether no query has a mask of its own."""
    return mask is None or mask.shape[-2] == 1


def silence(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with zeros for queries that attend to nothing and keys that nobody attends to.

    A weight of 0 is not enough where they hold NaN or infinity: 0 times those is NaN, in the output
    and in every gradient.
    """
    if mask is None:
        return q, k, v
    queries, keys = mask.any(-1)[..., None], mask.any(-2)[..., None]
    return torch.where(queries, q, 0), torch.where(keys, k, 0), torch.where(keys, v, 0)


def attended_keys(mask: Tensor | None, keys: int, like: Tensor) -> Tensor:
    """The number of keys that each query attends to, at least 1, `(..., N or 1, 1)`."""
    if mask is None:
        return torch.full((), keys, dtype=like.dtype, device=like.device)
    count = mask.expand(*mask.shape[:-1], keys).sum(-1, keepdim=True)
    return count.clamp(min=1).to(like.dtype)


def only(y: Tensor, mask: Tensor | None) -> Tensor:
    """`y` where the mask is True, zero elsewhere."""
    return y if mask is None else torch.where(mask, y, 0)


def simplex_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """`simplex_rows(scale q k^T) v`, streamed, `(..., H, N, e)`."""
    score = torch.arange(2, dtype=wide_dtype(q), device=q.device)
    units = {"coefs": score.expand(v.shape[-3], 2)}
    return kernels.entry_attention(
        SCORES, units, q, k, v, mask, form="simplex", scale=scale, engine=engine
    )


# --- operators ------------------------------------------------------------------------------------

# operations on a score of softmax, and of the projection onto the simplex
SOFTMAX, SIMPLEX = 3, 5


class Each(NamedTuple):
    """So many operations a score, as a trait that pickles and compares."""

    count: int

    def __call__(self, tokens: int, unit: int) -> int:
        return self.count * tokens**2


def products(tokens: int, width: int) -> int:
    """Multiply-accumulates of scores and of their weights with values, a head."""
    return 2 * tokens**2 * width


def scored(each: int) -> dict[str, Callable[[int, int], int]]:
    """The traits of cost of weights that take `each` operations a score."""
    return {"product_flops": products, "activation_flops": Each(each)}


def from_forms(
    name: str,
    init: Callable[[Generator, int, int], Params] | None,
    weights: Callable[[Params, Tensor, Tensor | None], Tensor] | str,
    attend: Callable[[Params, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    *,
    fits: Callable[[Params, int, int], None] | None = None,
    basis: Basis | None = None,
    resize: Callable[..., Params] | None = None,
    options: Mapping[str, Any] | None = None,
    traits: Mapping[str, Any] | None = None,
) -> Operator:
    """An operator from its two forms, which see checked arguments outside of autocast; what they
    give is brought to the dtype of the input.

    Args:
        init: draws the parameters, after the sizes are checked; None where there are none.
        weights: of the parameters, float32 or float64 scores, zero where they are masked, and a
            mask of at least two axes; or, where scores do not determine the weights, what does.
        attend: of the parameters, q, k and v in their own dtype, zero where nothing attends or is
            attended to, and such a mask.
        fits: `fits(params, queries, keys)` raises ValueError unless parameters are for these.
        basis, resize: see `Operator`.
        options, traits: recorded in the result.
    """

    def checked_init(generator: Generator, heads: int, tokens: int) -> Params:
        check_sizes(heads, tokens)
        return {} if init is None else init(generator, heads, tokens)

    def check_own(params: Params, queries: int, keys: int, *tensors: Tensor) -> None:
        check_params(name, params)
        if init is None and params:
            raise ValueError(
                f"`{name}` has no parameters, got {', '.join(params)}, which are of another "
                "operator. Take that one, or pass {}."
            )
        check_heads(name, params, *tensors)
        if fits is not None:
            fits(params, queries, keys)

    def checked_weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        if isinstance(weights, str):
            raise ValueError(
                f"`{name}.weights` needs an operator of the scores, got one of {weights}. Pass the "
                "identity (M, M) as `v` to `attend`, which gives them."
            )
        check_scores(name, scores, mask)
        check_own(params, scores.shape[-2], scores.shape[-1], scores)
        mask = two_axes(mask)
        with no_autocast(scores):
            return weights(params, only(wide(scores), mask), mask).to(scores.dtype)

    def checked_attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        check_qkv(name, q, k, v, mask)
        check_own(params, q.shape[-2], k.shape[-2], q, k, v)
        mask, dtype = two_axes(mask), v.dtype
        with no_autocast(q):
            return attend(params, *silence(q, k, v, mask), mask).to(dtype)

    options = {"kind": name, **(options or {})}
    traits = {"learned": init is not None, "length_free": False, **(traits or {})}
    if isinstance(weights, str):
        traits["of_scores"] = False
    return Operator(
        name, checked_init, checked_weights, checked_attend, basis, options, traits, resize
    )


def from_rows(
    name: str,
    rows: Callable[[Tensor, Tensor | None], Tensor],
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    traits: Mapping[str, Any] | None = None,
) -> Operator:
    """An operator without parameters from `rows(scores, mask)`, the weights of whole rows.

    `rows` sees float32 or float64 scores, zero where they are masked, and a mask of at least two
    axes; what they hold at masked keys is dropped. `product(q, k, v, mask)` is `rows(q k^T /
    sqrt(d)) v` without the N x M weights where that can be; q, k and v come in their own dtype.
    `options` and `traits` are recorded in the result.
    """

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        return only(rows(scores, mask), mask)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if product is not None:
            return product(q, k, v, mask)
        return weights(params, only(scores_of(q, k, None), mask), mask) @ wide(v)

    traits = {"length_free": True, **(traits or {})}
    return from_forms(name, None, weights, attend, options=options, traits=traits)


Logits = Tensor | Factored


class Source(Protocol):
    """The scores as the logits of an operator see them: held, or streamed from q and k."""

    def units(self, basis: Basis, units: Params, exact: bool = False) -> Tensor:
        """`sum_m phi_pm(S[n, m])` over attended keys for `units (H, P, M)`: `(..., H, N, P)`.

        `exact` keeps float32 of half inputs, for sums that a nonlinear function is taken of.
        """
        ...

    def mixed(self, mix: Tensor) -> Tensor:
        """`sum_m mix[p, m] S[n, m]` over attended keys for `mix (H, P, M)`, in float32."""
        ...


def sum_units(basis: Basis, units: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
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


class Held:
    """Scores `(..., H, N, M)` that are there, zero where they are masked."""

    def __init__(self, scores: Tensor, mask: Tensor | None):
        self.scores = scores
        self.mask = mask

    def units(self, basis: Basis, units: Params, exact: bool = False) -> Tensor:
        return sum_units(basis, units, self.scores, self.mask)

    def mixed(self, mix: Tensor) -> Tensor:
        return self.scores @ mix.to(self.scores.dtype).mT


class Streamed:
    """Scores of `q` and `k`, streamed over the keys by an engine of `kart.kernels`.

    With `values`, the first product takes the softmax of the same scores along, `attended`.
    """

    def __init__(
        self, q: Tensor, k: Tensor, mask: Tensor | None, engine: str, values: Tensor | None = None
    ):
        self.q = q
        self.k = k
        self.mask = mask
        self.engine = engine
        self.values = values
        self.attended: Tensor | None = None

    def units(self, basis: Basis, units: Params, exact: bool = False) -> Tensor:
        q, k = (wide(self.q), wide(self.k)) if exact else (self.q, self.k)
        if basis.coefficients is None:
            # half types keep float32 parameters: the scores they meet are float32, too
            units = {name: leaf.to(wide_dtype(q)) for name, leaf in units.items()}
            return kernels.contract_units(basis, units, q, k, self.mask)
        coefs = basis.coefficients(units).to(wide_dtype(q))
        if self.values is not None and not exact:
            y, self.attended = kernels.contract_softmax(
                basis, coefs, q, k, self.values, self.mask, engine=self.engine
            )
            return y
        return kernels.contract(basis, coefs, q, k, self.mask, engine=self.engine)

    def mixed(self, mix: Tensor) -> Tensor:
        q, k = wide(self.q), wide(self.k)
        mix = mix.to(k.dtype)
        if same_for_all_queries(self.mask):
            # W S^T is q (W K)^T: r keys instead of M; masked ones are zero
            return scores_of(q, mix @ k, None)
        coefs = torch.stack([torch.zeros_like(mix), mix], dim=-1)
        return kernels.contract(SCORES, coefs, q, k, self.mask, engine=self.engine)


def values_of(
    logits: Logits,
    v: Tensor,
    mask: Tensor | None,
    engine: str = "auto",
    beside: Tensor | None = None,
) -> Tensor:
    """The logits, zero where they are masked, times `v (..., H, M, e)`, plus `beside` where given:
    in float32 at least, or rounded once.
    """
    if isinstance(logits, Factored) and same_for_all_queries(mask):
        # parameters of float64 do not widen inputs of float32
        right = logits.right.to(wide_dtype(v))
        return kernels.factored_values(logits.left, right, v, engine, beside)
    v = wide(v)
    if isinstance(logits, Factored):
        # a mask that differs between queries cannot move into right^T V
        left, right = wide(logits.left), logits.right.to(v.dtype)
        out = kernels.mix_values(left, right, v, mask)  # type: ignore[arg-type]
    else:
        out = only(wide(logits), mask) @ v
    return out if beside is None else out + wide(beside)


def from_logits(
    name: str,
    init: Callable[[Generator, int, int], Params],
    logits: Callable[[Params, Source], Logits],
    keys: Callable[[Params], int | None],
    *,
    basis: Basis | None = None,
    project: str | None = None,
    base: str | None = None,
    engine: str = "auto",
    product: Callable[[Params, Streamed, Tensor], Tensor] | None = None,
    resize: Callable[..., Params] | None = None,
    options: Mapping[str, Any] | None = None,
    traits: Mapping[str, Any] | None = None,
    rank: int | None = None,
) -> Operator:
    """An operator with parameters from its logits, whose rows it may project or add softmax to.

    Args:
        init: draws the parameters; the sizes are checked before.
        logits: the logits `(..., H, N, M)` of the scores of a `Source`, or their factors, which are
            streamed under every mask. What they hold at masked keys is dropped.
        keys: the number of keys that parameters are for, None where they fit any.
        basis: of the learnable units.
        project: None, or "simplex".
        base: None, or "softmax", which is added.
        engine: of `kart.kernels`.
        product: `logits @ v` for a mask of keys, where that has a better order than the factors'.
        resize: see `Operator`.
        options, traits: recorded in the result.
        rank: the number of columns of factored logits, where it is below the width of a head.
    """
    schema.check_choice(name, "project", project, [None, "simplex"])
    schema.check_choice(name, "base", base, [None, "softmax"])
    schema.check_choice(name, "engine", engine, kernels.ENGINES)

    def rows(logits: Logits, scores: Tensor | None, mask: Tensor | None) -> Tensor:
        y = logits.dense() if isinstance(logits, Factored) else logits
        y = y if scores is None else y + softmax_rows(scores, mask)
        return only(y, mask) if project is None else simplex_rows(y, mask)

    def fits(params: Params, queries: int, found: int) -> None:
        expected = keys(params)
        if expected is not None:
            check_keys(name, expected, found)

    def weights(params: Params, scores: Tensor, mask: Tensor | None) -> Tensor:
        return rows(logits(params, Held(scores, mask)), scores if base else None, mask)

    def attend(params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if project is not None:
            q, k, v = wide(q), wide(k), wide(v)
            y = logits(params, Streamed(q, k, mask, engine))
            if isinstance(y, Factored) and base is None:
                # logits of r numbers a query and a key are scores again
                # of which Triton has no kernel
                known = "auto" if engine == "triton" else engine
                return simplex_values(y.left, y.right.to(v.dtype), v, mask, 1.0, known)
            # the projection sees whole rows: here alone the N x M weights are held
            scores = scores_of(q, k, None) if base else None
            return rows(y, scores, mask) @ v
        source = Streamed(q, k, mask, engine, v if base else None)
        if product is not None and same_for_all_queries(mask):
            out = product(params, source, v)
            out = out if source.attended is None else out + source.attended
        else:
            y = logits(params, source)  # which takes the softmax along, or does not
            out = values_of(y, v, mask, engine, source.attended)
        if base is not None and source.attended is None:
            out = out + kernels.softmax_attention(q, k, v, mask)
        return out

    def factors(params: Params, q: Tensor, k: Tensor) -> Factored:
        check_qkv(name, q, k, k, None)
        fits(params, q.shape[-2], k.shape[-2])
        with no_autocast(q):
            found = logits(params, Streamed(q, k, None, engine))
        assert isinstance(found, Factored)  # by `rank`
        return Factored(wide(found.left), found.right)

    made = from_forms(
        name,
        init,
        weights,
        attend,
        fits=fits,
        basis=basis,
        resize=resize,
        options={**(options or {}), "project": project, "base": base},
        traits=traits,
    )
    apart = rank and project is None and base is None and engine != "plain"
    product_of = Factors(rank, factors, made.attend) if rank and apart else None
    return made._replace(factors=product_of)
