"""Properties of a training step: a pure function from state and batch to state and metrics."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.func import vmap

from kart import checkpoint, tree
from kart.testing import draw, laws
from kart.testing.compare import agree, same, same_tree, unit
from kart.testing.core import Property, Suite
from kart.testing.formulas import AdamW, adamw, averaged

State = Any
Batch = Any


class Training(NamedTuple):
    """What `step_suite` needs of a way to train.

    `init(generator)` gives a state, a tree of tensors with the parameters at `params(state)`;
    `batch(generator, size)` a batch, a tree of tensors led by the axis of examples; `step(state,
    batch)` the next state and metrics, a tree of tensors or None. Optional, each the switch of its
    properties: `gradients(state, batch)`, those of the mean loss over the batch, as the
    parameters are; `loss(state, batch)`, that mean; `still`, the same step at learning rate 0 (and
    without decay);
    `freeze(mask)`, the same step with the parameters held where `mask(path, leaf)` is true;
    `formula`, what the step computes from those gradients as a plain formula has it, and
    `average(state)`, the moving average of the parameters, where it keeps one.
    """

    init: Callable[[Generator], State]
    step: Callable[[State, Batch], tuple[State, Any]]
    batch: Callable[[Generator, int], Batch]
    params: Callable[[State], Any] = lambda state: state.params
    gradients: Callable[[State, Batch], Any] | None = None
    loss: Callable[[State, Batch], Tensor] | None = None
    still: Callable[[State, Batch], tuple[State, Any]] | None = None
    freeze: Callable[[Callable[[str, Tensor], bool]], Callable[..., Any]] | None = None
    formula: AdamW | None = None
    average: Callable[[State], Any] | None = None

    def after(self, seed: int, steps: int) -> State:
        """The state after some steps, so that moments and counters are not zero."""
        source = draw.generator(seed)
        state = self.init(source)
        for _ in range(steps):
            state, _ = self.step(state, self.batch(source, 4))
        return state


def _batch(t: Training, seed: int, size: int = 4) -> Batch:
    return t.batch(draw.generator(seed + 1), size)


def _near(got: Any, wanted: Any, left: str, right: str) -> None:
    """Asserts that two trees agree up to the rounding of sums in another order."""
    there = tree.named(wanted)
    for name, leaf in tree.named(got).items():
        other = there[name]
        if not leaf.is_floating_point():
            same(leaf, other, f"{name} of {left}", f"that of {right}")
            continue
        # 64: a gradient passes through some ten layers, each with a sum
        limit = 64 * unit(leaf.dtype) * max(1e-3, float(other.abs().max()))
        agree(leaf, other, limit, f"{name} of {left}", f"that of {right}")


def init_follows_its_generator(t: Training, seed: int) -> None:
    """init(generator) is a function of the generator.

    A state that comes from elsewhere (the global seed, a seed of its own) makes runs that cannot be
    repeated, or seeds that are all the same run.
    """
    laws.drawn_from_its_generator(t.init, seed)


def deterministic(t: Training, seed: int, steps: int) -> None:
    """step(state, batch) is the same bit for bit whenever it is asked, and stays when it is asked
    of others.

    A hidden state, a clock or the global seed enters: the run cannot be repeated. A buffer that is
    used again changes states that are kept.
    """
    state, batch = t.after(seed, steps), _batch(t, seed)
    first = t.step(state, batch)
    kept = tree.map(torch.clone, tuple(first))
    t.step(t.init(draw.generator(seed + 5)), _batch(t, seed + 5))
    with laws.another_seed(seed + 11):
        again = t.step(state, batch)
    same_tree(tuple(again), kept, "a second step", "the first")
    same_tree(tuple(first), kept, "the first state after other steps", "it before")


def inputs_untouched(t: Training, seed: int, steps: int) -> None:
    """step writes neither to state nor to batch, nor to anything global.

    The old state is gone: no comparison, no retry, no population from one start.
    """
    state, batch = t.after(seed, steps), _batch(t, seed)
    with laws.world_untouched(), laws.untouched(state=state, batch=batch):
        t.step(state, batch)


def keeps_structure(t: Training, seed: int) -> None:
    """step keeps names, shapes and dtypes of the state, and no graph of autograd.

    A state that changes shape or dtype cannot be saved into its template, stacked or compiled; one
    that requires gradients holds on to every step before it.
    """
    state = t.init(draw.generator(seed))
    following, _ = t.step(state, _batch(t, seed))
    old, new = tree.named(state), tree.named(following)
    if old.keys() != new.keys():
        raise AssertionError(f"names that come or go: {sorted(old.keys() ^ new.keys())}")
    for name, leaf in old.items():
        if new[name].requires_grad:
            raise AssertionError(f"{name} requires a gradient after the step: detach it")
        if (leaf.shape, leaf.dtype) != (new[name].shape, new[name].dtype):
            raise AssertionError(
                f"{name} was {leaf.dtype} {tuple(leaf.shape)}, is {new[name].dtype} "
                f"{tuple(new[name].shape)}"
            )


def moves(t: Training, seed: int) -> None:
    """step changes every parameter, by finite amounts.

    A parameter that never moves is not in the loss, or cut off from it.
    """
    state = t.init(draw.generator(seed))
    following = state
    for i in range(3):
        following, _ = t.step(following, _batch(t, seed + i))
    old, new = tree.named(t.params(state)), tree.named(t.params(following))
    still = [name for name in old if torch.equal(old[name], new[name])]
    wild = [name for name in new if not bool(new[name].isfinite().all())]
    if still or wild:
        raise AssertionError(f"after three steps unmoved: {still}, not finite: {wild}")


def descends(t: Training, seed: int) -> None:
    """loss(step^n(state), batch) < loss(state, batch) on one batch, n = 40.

    The sign of the update or of the gradient is wrong, or the rate is far off.
    """
    assert t.loss is not None
    state, batch = t.init(draw.generator(seed)), _batch(t, seed)
    start = float(t.loss(state, batch))
    for _ in range(40):
        state, _ = t.step(state, batch)
    end = float(t.loss(state, batch))
    if not end < start:
        raise AssertionError(f"the loss went from {start:.6g} to {end:.6g}")


def micro_batches(t: Training, seed: int, steps: int, parts: int) -> None:
    """The mean of the gradients of equal micro-batches = the gradient of the full batch, and step
    moves by a batch repeated as by the batch.

    The loss is a sum where a mean is meant, or examples of a batch see each other.
    """
    assert t.gradients is not None
    state = t.after(seed, steps)
    batch = _batch(t, seed, 2 * parts)
    pieces = [tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(parts)]
    each = [t.gradients(state, piece) for piece in pieces]
    mean = tree.map(lambda *xs: torch.stack(xs).mean(0), *each)
    _near(mean, t.gradients(state, batch), "the mean of micro-batches", "the full batch")
    twice, _ = t.step(state, tree.map(lambda x: torch.cat([x, x]), batch))
    once, _ = t.step(state, batch)
    _moved_alike(t.params(twice), t.params(once), t.params(state), "a batch twice")


def examples_permute(t: Training, seed: int, steps: int, size: int) -> None:
    """gradients(state, P batch) = gradients(state, batch) for permutations P of the examples, and
    step moves alike by both.

    The place of an example in its batch counts, as where inputs and targets are paired wrongly.
    """
    assert t.gradients is not None
    state, batch = t.after(seed, steps), _batch(t, seed, size)
    order = torch.randperm(size, generator=draw.generator(seed))
    moved = tree.map(lambda x: x[order], batch)
    _near(t.gradients(state, moved), t.gradients(state, batch), "the permuted batch", "the batch")
    after, alone = t.step(state, moved)[0], t.step(state, batch)[0]
    _moved_alike(t.params(after), t.params(alone), t.params(state), "the permuted batch")


def member_is_solo(t: Training, seed: int, steps: int) -> None:
    """vmap(step)(stack(states), stack(batches))[i] = step(state_i, batch_i).

    Members of a population mix: in a norm that clips them together, in a mean, in a schedule.
    """
    states = [t.after(seed + i, steps + i) for i in range(3)]
    batches = [_batch(t, seed + 10 * i) for i in range(3)]
    stacked, _ = vmap(t.step)(tree.stack(states), tree.stack(batches))
    for i, (state, batch) in enumerate(zip(states, batches, strict=True)):
        # Adam divides by the root of a square: noise of tiny gradients becomes a step, so what is
        # compared are the gradients where they are at hand
        member = tree.map(lambda x, i=i: x[i], stacked)
        alone, _ = t.step(state, batch)
        _moved_alike(t.params(member), t.params(alone), t.params(state), f"member {i}")


def _moved_alike(got: Any, wanted: Any, start: Any, who: str) -> None:
    """Asserts that two trees moved alike from `start`."""
    here, there = tree.named(got), tree.named(wanted)
    for name, leaf in tree.named(start).items():
        one, other = here[name].double() - leaf, there[name].double() - leaf
        # a normalised update amplifies rounding of the gradient where that is nearly zero; a member
        # that sees another's batch differs in nearly all entries
        rounding = 4 * torch.finfo(leaf.dtype).eps * leaf.abs().clamp(min=1)
        apart = (one - other).abs() > 1e-3 * other.abs().max() + rounding
        if float(apart.double().mean()) > 0.05:
            raise AssertionError(
                f"{name} of {who} moves by {float(one.flatten()[0]):.6g} (first entry), where "
                f"{float(other.flatten()[0]):.6g} is wanted; {float(apart.double().mean()):.0%} "
                "differ"
            )


def zero_rate_is_still(t: Training, seed: int, steps: int) -> None:
    """step at learning rate 0 leaves the parameters as they are, bit for bit.

    Something moves parameters beside the optimiser: a decay that is not scaled, an average, a cast.
    """
    assert t.still is not None
    state = t.after(seed, steps)
    following, _ = t.still(state, _batch(t, seed))
    same_tree(t.params(following), t.params(state), "the parameters afterwards", "those before")


def frozen_stay(t: Training, seed: int, steps: int, every: int) -> None:
    """Frozen parameters stay as they are, bit for bit, while the others move as ever.

    Decay, momentum or an average reaches what was to be held.
    """
    assert t.freeze is not None
    state = t.after(seed, steps)
    names = list(tree.named(t.params(state)))
    frozen = set(names[seed % every :: every])
    step = t.freeze(lambda name, leaf: name in frozen)
    following = state
    for i in range(2):
        following, _ = step(following, _batch(t, seed + i))
    old, new = tree.named(t.params(state)), tree.named(t.params(following))
    for name in frozen:
        same(new[name], old[name], f"frozen {name} afterwards", "it before")
    if len(frozen) < len(names) and all(torch.equal(old[name], new[name]) for name in names):
        raise AssertionError("no parameter moved, frozen or not")


def parameters_follow_the_formula(t: Training, seed: int, updates: int) -> None:
    """params(step(state, batch)) is what the formula makes of params(state) and of
    gradients(state, batch), at every update from the first.

    The first updates tell: a missing bias correction, a counter that stands still or starts at
    another number, gradients at stale parameters, decay inside the moments, a norm that is not of
    all gradients, a rate of the update before.
    """
    assert t.formula is not None and t.gradients is not None
    state, moments = t.init(draw.generator(seed)), None
    for i in range(updates):
        batch = _batch(t, seed + i)
        start, slopes = t.params(state), t.gradients(state, batch)
        wanted, moments = adamw(t.formula, start, slopes, moments, i)
        state, _ = t.step(state, batch)
        _moved_alike(t.params(state), wanted, start, f"update {i}")


def average_follows_the_formula(t: Training, seed: int, updates: int) -> None:
    """average(step(state, batch)) = keeps(i) average(state) + (1 - keeps(i)) params(step(state,
    batch)) at update i, from average = params.

    The average is an update late, or its warm-up one ahead: what is evaluated is another model.
    """
    assert t.formula is not None and t.average is not None
    state = t.init(draw.generator(seed))
    same_tree(t.average(state), t.params(state), "the average at the start", "the parameters")
    for i in range(updates):
        start = t.average(state)
        state, _ = t.step(state, _batch(t, seed + i))
        wanted = averaged(t.formula, start, t.params(state), i)
        _moved_alike(t.average(state), wanted, start, f"the average at update {i}")


def saving_is_nothing(t: Training, seed: int, steps: int) -> None:
    """step(load(save(state)), batch) = step(state, batch), bit for bit.

    A counter, a moment or an average is not saved, or comes back in another dtype: resumed runs are
    other runs.
    """
    state, batch = t.after(seed, steps), _batch(t, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        checkpoint.save(path, t.params(state), {}, state=state)
        loaded = checkpoint.load_state(path, state=t.init(draw.generator(seed + 3)))["state"]
    same_tree(loaded, state, "the loaded state", "the saved one")
    same_tree(t.step(loaded, batch)[0], t.step(state, batch)[0], "the resumed step", "the step")


def _needs(*fields: str) -> Callable[[Training], str | None]:
    def missing(t: Training) -> str | None:
        absent = [field for field in fields if getattr(t, field) is None]
        return f"no `{'` and no `'.join(absent)}` was given" if absent else None

    return missing


SEED: dict[str, Any] = {"seed": draw.seeds}
CASE: dict[str, Any] = {"seed": draw.seeds, "steps": st.integers(0, 2)}
# the first updates tell most; the end of the schedule lies beyond them
LONG: dict[str, Any] = {**SEED, "updates": lambda t: st.sampled_from([6, t.formula.updates])}

PROPERTIES = (
    Property(init_follows_its_generator, SEED),
    Property(deterministic, CASE),
    Property(inputs_untouched, CASE),
    Property(keeps_structure, SEED),
    Property(moves, SEED),
    Property(descends, SEED, unfit=_needs("loss")),
    Property(micro_batches, {**CASE, "parts": st.integers(1, 3)}, unfit=_needs("gradients")),
    Property(examples_permute, {**CASE, "size": st.integers(2, 5)}, unfit=_needs("gradients")),
    Property(member_is_solo, CASE),
    Property(zero_rate_is_still, CASE, unfit=_needs("still")),
    Property(frozen_stay, {**CASE, "every": st.integers(1, 3)}, unfit=_needs("freeze")),
    Property(saving_is_nothing, CASE),
    Property(parameters_follow_the_formula, LONG, unfit=_needs("formula", "gradients")),
    Property(average_follows_the_formula, LONG, unfit=_needs("formula", "average")),
)


def suite(training: Training, *, name: str | None = None) -> Suite:
    """Puts a training step through its suite; `Training` says what is needed of it."""
    if not isinstance(training, Training):
        raise ValueError(
            f"`step_suite` needs a `kart.testing.Training`, got {training!r:.200}. "
            "Wrap `init`, `step` and `batch` in one."
        )

    def step(state: State, batch: Batch) -> tuple[State, Any]:
        following, metrics = training.step(state, batch)
        return following, {} if metrics is None else metrics

    return Suite("step", name or "step", training._replace(step=step), {}, PROPERTIES)
