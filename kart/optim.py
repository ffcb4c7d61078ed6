"""Optimisers as gradient transformations: pure `init` and `update` over pytrees, usable under vmap.

A transformation maps updates (at first the gradients) to updates; `chain` composes several and
`apply_updates` adds the last ones to the parameters. States hold tensors alone, so that they can be
saved, stacked and mapped. Nothing waits for the device, nothing is changed in place.

>>> params = {"weight": torch.tensor([[3.0]])}
>>> optimiser = adamw(0.1)
>>> state = optimiser.init(params)
>>> gradients = tree.map(lambda x: 2 * x, params)
>>> updates, state = optimiser.update(gradients, state, params)
>>> params = apply_updates(params, updates)

Learning rate and weight decay may be 0-d tensors: built inside a function that `torch.func.vmap`
maps over stacked params, states and rates, every member of a population trains with its own.

Reference: the design is optax's (Babuschkin et al., "The DeepMind JAX Ecosystem", 2020).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import schema, tree

Params = Any
Updates = Any
State = Any
Schedule = Callable[[Tensor], Tensor]
Mask = Callable[[str, Tensor], bool]


SPARED = (
    *("cls_token", "pos_embed", "relative_position_bias_table"),
    *("shift", "scale", "scale_base", "scale_basis"),
)


class Transformation(NamedTuple):
    """`init(params)` to a state; `update(updates, state, params)` to `(updates, state)`."""

    init: Callable[[Params], State]
    update: Callable[[Updates, State, Params], tuple[Updates, State]]


class EmaState(NamedTuple):
    """`step ()`: updates so far; `average`: the running mean of the parameters."""

    step: Tensor
    average: Params


class Ema(NamedTuple):
    """`init(params)` to a state; `update(state, params)` to a state whose `average` is the mean."""

    init: Callable[[Params], EmaState]
    update: Callable[[EmaState, Params], EmaState]


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


class ClipState(NamedTuple):
    """`norm ()`: global norm of the last updates, before clipping; not finite if they were not."""

    norm: Tensor


class AdamState(NamedTuple):
    """`step ()`, and the running means of the updates and of their squares."""

    step: Tensor
    mean: Params
    square: Params


class MomentumState(NamedTuple):
    """The decayed running sum of the updates."""

    total: Params


class LearningRateState(NamedTuple):
    """`step ()`: updates so far; `rate ()`: the learning rate of the last one, float64."""

    step: Tensor
    rate: Tensor


def _check(function: str, name: str, value: float | Tensor, ok: bool, needs: str) -> None:
    if not ok:
        raise ValueError(f"`{function}` needs `{name}` {needs}, got {value!r}. Change `{name}`.")


def _real(value: Any) -> float:
    """A number as it is; NaN, which no range holds, for what is none."""
    return float(value) if hasattr(value, "__float__") else math.nan


def _check_rate(function: str, name: str, value: float | Tensor) -> None:
    # a tensor's value stays unread: under vmap it is one member's, on a GPU reading it would wait
    if isinstance(value, Tensor):
        ok = value.ndim == 0 and value.is_floating_point()
        _check(function, name, value, ok, "as a number or a floating-point tensor of shape ()")
    else:
        ok = schema.fits(value, float) and 0 <= value < math.inf
        _check(function, name, value, ok, "as a finite number >= 0")


def _counter(params: Params) -> Tensor:
    device = next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))
    return torch.zeros((), dtype=torch.int64, device=device)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _accumulator(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=_wide(x))


def _stateless(update: Callable[[Updates, Params], Updates]) -> Transformation:
    return Transformation(
        lambda params: EmptyState(), lambda updates, state, params: (update(updates, params), state)
    )


def chain(*transformations: Transformation) -> Transformation:
    """Applies the transformations one after another; the state is the tuple of their states."""

    def init(params: Params) -> State:
        return tuple(t.init(params) for t in transformations)

    def update(updates: Updates, state: State, params: Params) -> tuple[Updates, State]:
        if len(state) != len(transformations):
            raise ValueError(
                f"`chain` needs the state of its {len(transformations)} transformations, got "
                f"{len(state)} states. Make it with this optimiser's `init`."
            )
        states = []
        for transformation, own in zip(transformations, state, strict=True):
            updates, own = transformation.update(updates, own, params)
            states.append(own)
        return updates, tuple(states)

    return Transformation(init, update)


def identity() -> Transformation:
    """Leaves the updates as they are."""
    return _stateless(lambda updates, params: updates)


def scale(factor: float | Tensor) -> Transformation:
    """Multiplies the updates by `factor`."""
    if isinstance(factor, Tensor):
        _check_rate("scale", "factor", factor)
    else:
        _check("scale", "factor", factor, math.isfinite(_real(factor)), "finite")
    return _stateless(lambda updates, params: _scaled(updates, factor))


def _scaled(updates: Updates, factor: float | Tensor) -> Updates:
    if isinstance(factor, Tensor):
        # cast first: a float64 factor would promote leaves of shape ()
        return tree.map(lambda u: u * factor.to(u.dtype), updates)
    return tree.map(lambda u: u * factor, updates)


def clip_by_global_norm(max_norm: float) -> Transformation:
    """Scales the updates down to a global norm of at most `max_norm`, as torch's `clip_grad_norm_`.

    The norm before clipping is kept in the state. Where it is NaN or infinite the updates pass
    unchanged: scaling would spread one bad entry over all parameters, and hide which it was.
    Whoever trains reads `state.norm` and stops.
    """
    ok = 0 < _real(max_norm) < math.inf
    _check("clip_by_global_norm", "max_norm", max_norm, ok, "finite and > 0")

    def init(params: Params) -> ClipState:
        return ClipState(torch.zeros_like(tree.norm(params)))

    def update(updates: Updates, state: ClipState, params: Params) -> tuple[Updates, ClipState]:
        del state, params
        factor, norm = _clipping(max_norm, updates)
        return _scaled(updates, factor), ClipState(norm)

    return Transformation(init, update)


def _clipping(max_norm: float, updates: Updates) -> tuple[Tensor, Tensor]:
    """The factor that clips, and the norm before it."""
    norm = tree.norm(updates)
    # 1e-6 as in torch, so that runs compare; it also keeps a norm of zero from dividing
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), factor, 1.0), norm


def clip_in_place(max_norm: float, updates: Updates) -> tuple[Updates, ClipState]:
    """`clip_by_global_norm`, written into the tensors of `updates`."""
    factor, norm = _clipping(max_norm, updates)
    if factor.device.type == "cpu" and factor == 1:  # see `_chosen`
        return updates, ClipState(norm)
    return tree.map(lambda u: u.mul_(factor.to(u.dtype)), updates), ClipState(norm)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transformation:
    """Running mean of the updates over the root of that of their squares, both bias-corrected.

    Moments and the resulting updates are float32, or wider where the parameters are.

    Reference: Kingma and Ba, "Adam", 2015, arXiv:1412.6980, Algorithm 1; KArAt's paper: eps 1e-6.
    """
    _check("scale_by_adam", "b1", b1, 0 <= _real(b1) < 1, "in [0, 1)")
    _check("scale_by_adam", "b2", b2, 0 <= _real(b2) < 1, "in [0, 1)")
    _check("scale_by_adam", "eps", eps, 0 < _real(eps) < math.inf, "finite and > 0")

    def init(params: Params) -> AdamState:
        return AdamState(
            _counter(params), tree.map(_accumulator, params), tree.map(_accumulator, params)
        )

    def update(updates: Updates, state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        del params
        step = state.step + 1
        mean = tree.map(lambda m, u: m.lerp(u.to(m.dtype), 1 - b1), state.mean, updates)
        square = tree.map(
            lambda s, u: torch.addcmul(b2 * s, u.to(s.dtype), u.to(s.dtype), value=1 - b2),
            state.square,
            updates,
        )
        # float64: in float32 1 - 0.999 ** 1 is off in the fifth digit
        mean_weight = 1 - b1 ** step.double()
        ratio = mean_weight / (1 - b2 ** step.double()).sqrt()

        def direction(m: Tensor, s: Tensor) -> Tensor:
            # m / mean_weight / (sqrt(s) / root_weight + eps) with the scalars gathered
            return m / (s.sqrt() * ratio.to(s.dtype) + (eps * mean_weight).to(s.dtype))

        return tree.map(direction, mean, square), AdamState(step, mean, square)

    return Transformation(init, update)


def momentum(decay: float = 0.9, nesterov: bool = False) -> Transformation:
    """Replaces updates by their decayed running sum, the heavy ball (Polyak, 1964).

    Args:
        decay: in [0, 1), the share of the sum that survives a step.
        nesterov: look one step ahead, `u + decay * total`, as `torch.optim.SGD` does.
    """
    _check("momentum", "decay", decay, 0 <= _real(decay) < 1, "in [0, 1)")

    def init(params: Params) -> MomentumState:
        return MomentumState(tree.map(_accumulator, params))

    def update(
        updates: Updates, state: MomentumState, params: Params
    ) -> tuple[Updates, MomentumState]:
        del params
        total = tree.map(lambda t, u: decay * t + u, state.total, updates)
        ahead = tree.map(lambda t, u: decay * t + u, total, updates) if nesterov else total
        return ahead, MomentumState(total)

    return Transformation(init, update)


def decay_mask(operators: bool = True) -> Mask:
    """Which leaves decay: those of two axes and more, but neither class token nor positions, nor
    the relative position biases of a Swin.

    The rule of timm and DeiT, which the paper's recipe follows; also spared are scales and shifts
    of learned units, which decay would pull to a function of no or of infinite width.
    `operators=False` spares the learned attention operators (every leaf below a key `operator`).
    """

    def mask(path: str, leaf: Tensor) -> bool:
        keys = path.split(".")
        if keys[-1] in SPARED:
            return False
        return leaf.ndim >= 2 and (operators or "operator" not in keys)

    return mask


def add_decayed_weights(weight_decay: float | Tensor, mask: Mask | None = None) -> Transformation:
    """Adds `weight_decay * params` to the updates; decoupled decay, placed after `scale_by_adam`.

    Args:
        weight_decay: a number, or a tensor `()`.
        mask: `(dotted path, leaf) -> bool`, the leaves that decay; None is `decay_mask()`.

    Reference: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019,
        arXiv:1711.05101.
    """
    _check_rate("add_decayed_weights", "weight_decay", weight_decay)
    decays = decay_mask() if mask is None else mask

    def update(updates: Updates, params: Params) -> Updates:
        chosen = tree.map_named(decays, params)

        def add(u: Tensor, x: Tensor, decayed: bool) -> Tensor:
            if not decayed:
                return u
            wide = x.to(u.dtype)
            if isinstance(weight_decay, Tensor):
                return u + weight_decay.to(u.dtype) * wide
            return torch.add(u, wide, alpha=weight_decay)

        return tree.map(add, updates, params, chosen)

    return _stateless(update)


def scale_by_learning_rate(learning_rate: float | Tensor | Schedule) -> Transformation:
    """Multiplies the updates by minus the learning rate, the last link of an optimiser.

    Args:
        learning_rate: a number, a tensor `()`, or a schedule from the number of updates so far, an
            int64 tensor `()`, to the rate.
    """
    if not callable(learning_rate):
        _check_rate("scale_by_learning_rate", "learning_rate", learning_rate)

    def init(params: Params) -> LearningRateState:
        step = _counter(params)
        return LearningRateState(step, torch.zeros_like(step, dtype=torch.float64))

    def update(
        updates: Updates, state: LearningRateState, params: Params
    ) -> tuple[Updates, LearningRateState]:
        del params
        rate: Any = learning_rate(state.step) if callable(learning_rate) else learning_rate
        record = torch.zeros_like(state.rate) + rate
        return _scaled(updates, -rate), LearningRateState(state.step + 1, record)

    return Transformation(init, update)


def freeze(mask: Mask) -> Transformation:
    """Holds leaves where `mask(dotted path, leaf)` is true: last in a chain, bit for bit.

    In front of a chain it keeps their gradients out of the norm and the moments:
    `chain(freeze(mask), adamw(1e-3), freeze(mask))`.
    """

    def update(updates: Updates, params: Params) -> Updates:
        held = tree.map_named(mask, params)
        # minus zero is the one number that leaves every other unchanged, minus zero included
        return tree.map(lambda u, hold: torch.full_like(u, -0.0) if hold else u, updates, held)

    return _stateless(update)


def adamw(
    learning_rate: float | Tensor | Schedule,
    weight_decay: float | Tensor = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mask: Mask | None = None,
    max_norm: float | None = None,
) -> Transformation:
    """AdamW: Adam with decoupled weight decay, after clipping to `max_norm` unless that is None.

    Args:
        learning_rate: a number, a tensor `()` or a schedule; `warmup_cosine` is the paper's.
        weight_decay: a number or a tensor `()`.
        b1, b2, eps: as in `scale_by_adam`; the paper has eps 1e-6.
        mask: the leaves that decay, `(dotted path, leaf) -> bool`; None is `decay_mask()`.
        max_norm: the largest global norm of the gradients; the paper has 1.0.
    """
    return chain(
        *([] if max_norm is None else [clip_by_global_norm(max_norm)]),
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: float | Tensor | Schedule,
    decay: float = 0.9,
    nesterov: bool = False,
    max_norm: float | None = None,
) -> Transformation:
    """Gradient descent with momentum `decay`, after clipping to `max_norm` unless that is None."""
    return chain(
        *([] if max_norm is None else [clip_by_global_norm(max_norm)]),
        momentum(decay, nesterov),
        scale_by_learning_rate(learning_rate),
    )


def apply_updates(params: Params, updates: Updates) -> Params:
    """`params + updates` in the dtypes of `params`; each sum is taken in the wider of the two."""
    return tree.map(lambda x, u: (x + u).to(x.dtype), params, updates)


# entries that an update in place takes together: fewer calls for small models, little memory
PACK = 1 << 18


def _packs(params: Mapping[str, Tensor], alike: Mask) -> list[list[str]]:
    """The paths of `params`, those of one kind and dtype together up to `PACK` entries."""
    packs: list[list[str]] = []
    # the last pack of a kind, and the entries it has room for
    last: dict[Any, tuple[list[str], int]] = {}
    for name, leaf in params.items():
        kind, size = (alike(name, leaf), leaf.dtype), leaf.numel()
        pack, room = last.get(kind, ([], 0))
        if size > room or not leaf.ndim:
            pack, room = [], PACK
            packs.append(pack)
        pack.append(name)
        last[kind] = pack, room - size
    return packs


def _each(of_dicts: Callable[..., Any], of_tensors: Callable[..., Any], *states: State) -> State:
    """What is made of the dicts of alike states, and of tensors outside them, in their tuples."""
    first = states[0]
    if isinstance(first, dict | Tensor):
        return (of_dicts if isinstance(first, dict) else of_tensors)(*states)
    parts = [_each(of_dicts, of_tensors, *own) for own in zip(*states, strict=True)]
    return first._make(parts) if hasattr(first, "_make") else tuple(parts)  # type: ignore


def _flat(state: State) -> State:
    """`state` with dotted paths as the keys of its dicts."""
    return _each(tree.flatten, lambda x: x, state)


def _packed(state: State, names: list[str]) -> State:
    """A flat `state` with one tensor in its dicts, of all entries of `names`, under the first."""

    def pack(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        first = leaves[names[0]]
        if len(names) == 1:
            return {names[0]: first}
        entries = torch.cat([leaves[name].flatten() for name in names])
        return {names[0]: entries.view((1,) * (first.ndim - 1) + (-1,))}

    return _each(pack, lambda x: x, state)


def _chosen(fine: Tensor, new: Tensor, old: Tensor) -> Tensor:
    # reading a number waits for a GPU, not for a CPU
    return (new if fine else old) if fine.device.type == "cpu" else torch.where(fine, new, old)


def _settle(old: State, part: State, new: State, fine: Tensor, names: list[str]) -> State:
    """Writes the entries of `new`, the next state of `part = _packed(old, names)`, into the tensors
    of `old` where `fine`; the result has the dicts of `old` and the other tensors of `new`.
    """

    def write(old: Params, part: Params, new: Params) -> Params:
        chosen = _chosen(fine, new[names[0]], part[names[0]])
        if len(names) == 1:
            old[names[0]].copy_(chosen)
            return old
        leaves = [old[name] for name in names]
        sizes = [leaf.numel() for leaf in leaves]
        for leaf, entries in zip(leaves, chosen.flatten().split(sizes), strict=True):
            leaf.copy_(entries.view(leaf.shape))
        return old

    return _each(write, lambda old, part, new: _chosen(fine, new, old), old, part, new)


def _with_dicts(state: State, after: State) -> State:
    """`after` with the dicts of `state`, whose tensors have been written."""
    return _each(lambda own, _: own, lambda _, new: new, state, after)


def apply_in_place(
    optimizer: Transformation,
    updates: Updates,
    state: State,
    params: Params,
    fine: Tensor,
    alike: Mask,
) -> State:
    """`optimizer.update` and `apply_updates`, written into the tensors of `params` and `state`
    where the boolean `fine ()` is true; returns the state.

    The numbers are those of the pure functions, bit for bit. It goes through the parameters in
    packs of at most `PACK` entries or one leaf, and holds a few tensors of one pack, where the pure
    functions hold several copies of all parameters. `optimizer` must treat each entry by itself, as
    all do but `clip_by_global_norm`.

    Args:
        alike: `(dotted path, leaf) -> key`; leaves of one key and dtype may be packed into one,
            which the optimizer sees under the path and with the rank of the first: the mask of its
            decay is such a key.
    """
    flat_params, flat_updates, flat_state = _flat(params), _flat(updates), _flat(state)
    after = flat_state
    for names in _packs(flat_params, alike):
        own, part = _packed(flat_params, names), _packed(flat_state, names)
        found, new = optimizer.update(_packed(flat_updates, names), part, own)
        _settle(flat_params, own, apply_updates(own, found), fine, names)
        after = _settle(flat_state, part, new, fine, names)
    return _with_dicts(state, after)


def average_in_place(average: Ema, state: EmaState, params: Params, fine: Tensor) -> EmaState:
    """`average.update`, written into the tensors of `state` where `fine ()` is true, in packs."""
    flat_params, flat_state = _flat(params), _flat(state)
    after = flat_state
    for names in _packs(flat_params, lambda name, leaf: True):
        part = _packed(flat_state, names)
        new = average.update(part, _packed(flat_params, names))
        after = _settle(flat_state, part, new, fine, names)
    return _with_dicts(state, after)


def constant(value: float | Tensor) -> Schedule:
    """The schedule that is always `value`."""
    _check_rate("constant", "value", value)
    return lambda step: torch.zeros_like(torch.as_tensor(step), dtype=torch.float64) + value


def warmup_cosine(
    base: float | Tensor,
    warmup_steps: int,
    total_steps: int,
    start: float = 1e-6,
    end: float = 1e-5,
) -> Schedule:
    """Linear from `start` to `base` over `warmup_steps`, then half a cosine to `end`.

    The first update has step 0 (a number will do, to look at it) and the rate `start`, or `base`
    without a warm-up; from `total_steps` on it is `end`. The paper's (its Table 5): 5 epochs of
    warm-up, 100 in all, `base` of `paper_learning_rate`.

    Reference: Loshchilov and Hutter, "SGDR", 2017, arXiv:1608.03983, equation 5.
    """
    for name, rate in (("base", base), ("start", start), ("end", end)):
        _check_rate("warmup_cosine", name, rate)
    first, last = _real(warmup_steps), _real(total_steps)
    _check("warmup_cosine", "warmup_steps", warmup_steps, first >= 0, ">= 0")
    needs = f"> `warmup_steps` = {warmup_steps}"
    _check("warmup_cosine", "total_steps", total_steps, first < last < math.inf, needs)

    def schedule(step: Tensor | int) -> Tensor:
        now = torch.as_tensor(step).double()
        rising = start + (base - start) * now / max(warmup_steps, 1)
        share = ((now - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
        falling = end + (base - end) * 0.5 * (1 + torch.cos(math.pi * share))
        return torch.where(now < warmup_steps, rising, falling)

    return schedule


def paper_learning_rate(batch_size: int) -> float:
    """The paper's base rate, `5e-4 * batch_size / 512` (its Table 5).

    >>> paper_learning_rate(128)
    0.000125
    """
    _check("paper_learning_rate", "batch_size", batch_size, _real(batch_size) >= 1, ">= 1")
    return 5e-4 * batch_size / 512


def ema(decay: float = 0.99992, warmup: bool = False) -> Ema:
    """Exponential moving average of the parameters, in at least float32; 0.99992 is the paper's.

    Args:
        decay: in [0, 1), the share of the average that survives an update.
        warmup: begin with the smaller `(1 + step) / (10 + step)`: a run much shorter than
            1 / (1 - decay) updates would otherwise average little but its initialisation.
    """
    _check("ema", "decay", decay, 0 <= _real(decay) < 1, "in [0, 1)")

    def init(params: Params) -> EmaState:
        # a copy, which a later in-place change of the parameters cannot reach
        average = tree.map(lambda x: x.detach().to(_wide(x), copy=True), params)
        return EmaState(_counter(params), average)

    def update(state: EmaState, params: Params) -> EmaState:
        now = state.step.double()
        kept = ((1 + now) / (10 + now)).clamp(max=decay) if warmup else now * 0 + decay
        average = tree.map(
            lambda a, x: a.lerp(x.to(a.dtype), (1 - kept).to(a.dtype)), state.average, params
        )
        return EmaState(state.step + 1, average)

    return Ema(init, update)


def readings(state: State) -> dict[str, Tensor]:
    """What the last update measured: `gradient_norm` if it clips, and `learning_rate`.

    Shape `()`, or `(members,)` for the stacked state of a population. Before the first update both
    are 0.
    """
    if isinstance(state, ClipState):
        return {"gradient_norm": state.norm}
    if isinstance(state, LearningRateState):
        return {"learning_rate": state.rate}
    found: dict[str, Tensor] = {}
    # the state of a chain is a plain tuple; every other state is a NamedTuple
    for own in state if type(state) is tuple else ():
        found |= readings(own)
    return found
