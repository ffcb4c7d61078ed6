"""Optimisers: equal to torch's, pure, and the same for a population as for each of its members."""

import math

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from kart import optim, tree


def every_leaf(path, leaf):
    return True


def example(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "pos_embed": randn(1, 5, 3),
        "blocks": {
            "0": {"weight": randn(3, 4), "bias": randn(4), "operator": {"mix": randn(4, 2)}},
            "1": {},
        },
        "temperature": randn(),
    }


def gradients_at(params, step):
    """Some deterministic gradients, of sizes that change from step to step."""
    return tree.map(lambda x: (x + step + 0.1).sin() * (0.1 + step % 3), params)


def run(optimiser, params, steps, gradients=gradients_at):
    state = optimiser.init(params)
    for step in range(steps):
        updates, state = optimiser.update(gradients(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def run_torch(make, params, steps, max_norm=None):
    leaves = [torch.nn.Parameter(x.clone()) for x in tree.leaves(params)]
    optimiser = make(leaves)
    for step in range(steps):
        current = [x.detach() for x in leaves]
        for leaf, gradient in zip(leaves, gradients_at(current, step), strict=True):
            leaf.grad = gradient
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimiser.step()
    return [x.detach() for x in leaves]


OPTIMISERS = {
    "adamw": lambda rate=0.05: optim.adamw(rate),
    "adamw clipped": lambda rate=0.05: optim.adamw(rate, max_norm=1.0),
    "adamw, no decay": lambda rate=0.05: optim.adamw(rate, weight_decay=0.0),
    "sgd": lambda rate=0.05: optim.sgd(rate, 0.5),
    "nesterov": lambda rate=0.05: optim.sgd(rate, 0.5, nesterov=True),
    "plain": lambda rate=0.05: optim.chain(
        optim.identity(), optim.scale(1.0), optim.scale_by_learning_rate(rate)
    ),
    "frozen bias": lambda rate=0.05: optim.chain(
        optim.adamw(rate), optim.freeze(lambda path, leaf: path.endswith("bias"))
    ),
}
each_optimiser = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 1e-3, "weight_decay": 0.05},
        {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-6},
        {"lr": 0.01, "weight_decay": 0.5, "betas": (0.0, 0.5)},
        {"lr": 0.01, "weight_decay": 0.01, "betas": (0.95, 0.9), "eps": 0.1},
    ],
)
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e3])
def test_adamw_equals_torch(setting, max_norm):
    params = example()
    b1, b2 = setting.get("betas", (0.9, 0.999))
    ours = optim.adamw(
        setting["lr"],
        setting["weight_decay"],
        b1,
        b2,
        setting.get("eps", 1e-8),
        every_leaf,
        max_norm,
    )
    found, _ = run(ours, params, 60)
    expected = run_torch(lambda p: torch.optim.AdamW(p, **setting), params, 60, max_norm)
    for x, y in zip(tree.leaves(found), expected, strict=True):
        assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch(nesterov):
    params = example()
    found, _ = run(optim.sgd(0.02, 0.9, nesterov, max_norm=1.0), params, 60)
    expected = run_torch(
        lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=nesterov), params, 60, 1.0
    )
    for x, y in zip(tree.leaves(found), expected, strict=True):
        assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_torch_and_reports_the_norm(max_norm):
    gradients = example()
    leaves = [torch.nn.Parameter(torch.zeros_like(x)) for x in tree.leaves(gradients)]
    for leaf, gradient in zip(leaves, tree.leaves(gradients), strict=True):
        leaf.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clip = optim.clip_by_global_norm(max_norm)
    updates, state = clip.update(gradients, clip.init(gradients), gradients)
    assert_close(state.norm, norm)
    for x, leaf in zip(tree.leaves(updates), leaves, strict=True):
        assert_close(x, leaf.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clipping_keeps_one_bad_entry_to_itself(bad):
    gradients = {"a": torch.tensor([100.0, bad]), "b": torch.tensor([1.0])}
    clip = optim.clip_by_global_norm(1.0)
    updates, state = clip.update(gradients, clip.init(gradients), gradients)
    assert not state.norm.isfinite()
    assert_close(updates, gradients, equal_nan=True)


def test_clipping_zero_gradients_gives_zero():
    gradients = {"a": torch.zeros(3)}
    clip = optim.clip_by_global_norm(1.0)
    assert_close(clip.update(gradients, clip.init(gradients), gradients)[0], gradients)


@each_optimiser
def test_every_optimiser_lowers_a_parabola(make):
    def loss(params):
        return sum(((x - 1) ** 2).sum() for x in tree.leaves(params))

    params = example(torch.float32)
    found, _ = run(make(), params, 50, lambda p, step: grad(loss)(p))
    assert loss(found) < 0.7 * loss(params)


@each_optimiser
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_optimiser_keeps_structure_shapes_dtypes_and_its_inputs(make, dtype):
    params, optimiser = example(dtype), make()
    gradients, state = gradients_at(params, 1), optimiser.init(params)
    before = tree.map(torch.clone, (params, gradients, state))
    updates, after = optimiser.update(gradients, state, params)
    found = optim.apply_updates(params, updates)
    assert_close((params, gradients, state), before, rtol=0, atol=0)
    assert tree.map(lambda x: (x.shape, x.dtype), found) == tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert tree.map(lambda x: (x.shape, x.dtype), after) == tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert all(isinstance(x, torch.Tensor) for x in tree.leaves(after))


@each_optimiser
def test_a_learning_rate_of_zero_changes_nothing(make):
    params = example(torch.float32)
    assert_close(run(make(0.0), params, 3)[0], params, rtol=0, atol=0)


def test_updates_of_scalar_leaves_keep_their_dtype_beside_float64_rates():
    params = {"x": torch.tensor(2.0), "y": torch.ones(2)}
    for rate in (optim.constant(0.5), torch.tensor(0.5, dtype=torch.float64), 0.5):
        optimiser = optim.scale_by_learning_rate(rate)
        updates, _ = optimiser.update(params, optimiser.init(params), params)
        assert_close(updates, {"x": torch.tensor(-1.0), "y": torch.full((2,), -0.5)})


def test_moments_of_half_precision_parameters_are_float32():
    state = optim.scale_by_adam().init(example(torch.bfloat16))
    assert {x.dtype for x in tree.leaves((state.mean, state.square))} == {torch.float32}


@each_optimiser
def test_every_member_of_a_vmapped_population_equals_its_solo_run(make):
    rates = torch.tensor([0.0, 0.001, 0.1])
    members = [example(torch.float32, seed) for seed in range(3)]

    def train(params, rate):
        return run(make(rate), params, 5)

    found, state = vmap(train)(tree.stack(members), rates)
    for i, (params, rate) in enumerate(zip(members, rates, strict=True)):
        solo, solo_state = train(params, rate)
        assert_close(tree.unstack(found)[i], solo)
        assert_close(tree.unstack(state)[i], solo_state)
        # and a tensor is as good as a number
        assert_close(run(make(rate.item()), params, 5)[0], solo)


def test_a_population_steps_from_stacked_states_with_its_own_decay():
    decays = torch.tensor([0.0, 0.5], dtype=torch.float64)
    members = [example(torch.float32, seed) for seed in range(2)]

    def init(params, decay):
        return optim.adamw(0.1, decay).init(params)

    def step(params, state, decay):
        updates, state = optim.adamw(0.1, decay).update(gradients_at(params, 0), state, params)
        return optim.apply_updates(params, updates), state

    params = tree.stack(members)
    state = vmap(init)(params, decays)
    assert all(leaf.shape[0] == 2 for leaf in tree.leaves(state))
    for _ in range(3):
        params, state = vmap(step)(params, state, decays)
    for i in range(2):
        solo = run(
            optim.adamw(0.1, decays[i].item()), members[i], 3, lambda p, _: gradients_at(p, 0)
        )
        assert_close(tree.unstack(params)[i], solo[0])
        assert_close(tree.unstack(state)[i], solo[1])
    assert tree.leaves(params)[0].dtype == torch.float32


def test_the_decay_mask_spares_vectors_positions_and_if_asked_operators():
    def decayed(mask):
        return [name for name, leaf in tree.named(example()).items() if mask(name, leaf)]

    assert decayed(optim.decay_mask()) == ["blocks.0.weight", "blocks.0.operator.mix"]
    assert decayed(optim.decay_mask(operators=False)) == ["blocks.0.weight"]
    assert not optim.decay_mask()("cls_token", torch.zeros(1, 1, 3))
    # as in timm's Swin
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert not optim.decay_mask()(table, torch.zeros(9, 3))

    decay = optim.add_decayed_weights(0.5)
    params = example()
    zeros = tree.map(torch.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    for name, update in tree.named(updates).items():
        factor = 0.5 if name in decayed(optim.decay_mask()) else 0.0
        assert_close(update, factor * tree.named(params)[name])


def test_frozen_leaves_stay_bit_for_bit():
    params = example(torch.float32)
    params["blocks"]["0"]["bias"] = torch.tensor([0.0, -0.0, math.inf, 1e-45])

    def frozen(path, leaf):
        return path.startswith("blocks")

    optimiser = optim.chain(
        optim.freeze(frozen),
        optim.adamw(0.1, 0.5, mask=every_leaf, max_norm=1.0),
        optim.freeze(frozen),
    )
    found, _ = run(optimiser, params, 5)
    for name, leaf in tree.named(found).items():
        bits = torch.equal(leaf.view(torch.int32), tree.named(params)[name].view(torch.int32))
        assert bits == name.startswith("blocks")


def test_gradients_in_front_frozen_stay_out_of_the_norm():
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    optimiser = optim.chain(
        optim.freeze(lambda path, _: path == "b"), optim.clip_by_global_norm(9.0)
    )
    _, state = optimiser.update(gradients, optimiser.init(gradients), gradients)
    assert_close(state[1].norm, torch.tensor(5.0))


def test_the_optimiser_itself_has_a_derivative():
    def final_loss(rate):
        params, _ = run(optim.adamw(rate, 0.0), {"x": torch.tensor([3.0, -2.0])}, 3)
        return (params["x"] ** 2).sum()

    rate, step = torch.tensor(0.1, dtype=torch.float64), 1e-3
    difference = (final_loss(rate + step) - final_loss(rate - step)) / (2 * step)
    assert_close(grad(final_loss)(rate), difference.double(), rtol=1e-3, atol=1e-3)


def steps(*values):
    return torch.tensor(values)


def test_warmup_cosine_at_points_worked_out_by_hand():
    schedule = optim.warmup_cosine(1.0, 10, 30, start=0.1, end=0.2)
    # 0.1 + 0.9 * 5/10; end + 0.8 * (1 + cos(pi/4)) / 2 at a quarter; the middle of 1.0 and 0.2
    rates = schedule(steps(0, 5, 10, 15, 20, 30, 31, 1000))
    expected = [0.1, 0.55, 1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2, 0.2, 0.2]
    assert_close(rates, torch.tensor(expected, dtype=torch.float64))


def test_warmup_cosine_without_warmup_begins_at_the_base():
    rates = optim.warmup_cosine(2.0, 0, 2, end=0.0)(steps(0, 1, 2))
    assert_close(rates, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), atol=1e-15, rtol=0)


def test_a_schedule_can_be_looked_at_by_numbers():
    for schedule in (optim.warmup_cosine(2.0, 2, 6), optim.constant(0.5)):
        for step in (0, 1, 2, 5, 9):
            assert torch.equal(schedule(step), schedule(torch.tensor(step)))


def test_the_schedule_of_the_paper():
    base = optim.paper_learning_rate(32)
    assert_close(base, 3.125e-5)
    rates = optim.warmup_cosine(base, 5 * 1562, 100 * 1562)(steps(0, 5 * 1562, 100 * 1562))
    assert_close(rates, torch.tensor([1e-6, base, 1e-5], dtype=torch.float64))


def test_a_schedule_is_read_before_the_step_is_counted_and_its_rate_kept():
    optimiser = optim.adamw(optim.warmup_cosine(0.4, 4, 8, start=0.0), max_norm=1.0)
    params = example()
    state, rates = optimiser.init(params), []
    assert optim.readings(state)["learning_rate"] == 0
    for step in range(4):
        updates, state = optimiser.update(gradients_at(params, step), state, params)
        rates.append(optim.readings(state)["learning_rate"].item())
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    norm = optim.readings(state)["gradient_norm"]
    assert_close(norm, tree.norm(gradients_at(params, 3)))
    assert optim.readings(optim.chain(optim.identity(), optim.momentum()).init(params)) == {}
    constant = optim.constant(0.25)(steps(0, 7))
    assert_close(constant, torch.tensor([0.25, 0.25], dtype=torch.float64))


def test_ema_is_the_geometric_mean_of_the_past():
    ema = optim.ema(0.5)
    state = ema.init({"x": torch.tensor([8.0])})
    for value in (4.0, 2.0):
        state = ema.update(state, {"x": torch.tensor([value])})
    # 8 -> 6 -> 4
    assert_close(state.average, {"x": torch.tensor([4.0])})
    assert state.step == 2


def test_ema_warmup_begins_with_a_short_memory_and_ends_at_the_decay():
    ema = optim.ema(0.15, warmup=True)
    state = ema.init({"x": torch.tensor([1.0])})
    state = ema.update(state, {"x": torch.tensor([0.0])})
    assert_close(state.average["x"], torch.tensor([0.1]))
    state = ema.update(state, {"x": torch.tensor([0.0])})
    assert_close(state.average["x"], torch.tensor([0.015]))  # 2/11 is above 0.15


def test_ema_keeps_small_changes_of_half_precision_parameters_and_its_inputs():
    ema, params = optim.ema(0.999), {"x": torch.ones(2, dtype=torch.bfloat16)}
    state = ema.init(params)
    params["x"].zero_()
    assert_close(state.average["x"], torch.ones(2))
    assert_close(ema.update(state, params).average["x"], torch.full((2,), 0.999))
    assert_close(state.average["x"], torch.ones(2))


def test_ema_under_vmap_equals_solo_runs():
    ema = optim.ema(0.9, warmup=True)
    members = [example(torch.float32, seed) for seed in range(3)]
    stacked = vmap(lambda p: ema.update(ema.init(p), tree.map(torch.sin, p)))(tree.stack(members))
    for params, state in zip(members, tree.unstack(stacked), strict=True):
        assert_close(state, ema.update(ema.init(params), tree.map(torch.sin, params)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.adamw(-1.0), "`learning_rate` as a finite number >= 0, got -1.0"),
        (lambda: optim.adamw(math.nan), "`learning_rate`"),
        (lambda: optim.adamw("fast"), "`learning_rate`"),
        (lambda: optim.adamw(torch.zeros(2)), r"tensor of shape \(\)"),
        (lambda: optim.adamw(torch.tensor(1)), "floating-point tensor"),
        (lambda: optim.adamw(1.0, weight_decay=-0.1), "`add_decayed_weights` needs `weight_decay`"),
        (lambda: optim.adamw(1.0, b1=1.0), r"needs `b1` in \[0, 1\), got 1.0"),
        (lambda: optim.adamw(1.0, b2=-0.1), "needs `b2`"),
        (lambda: optim.adamw(1.0, eps=0.0), "needs `eps`"),
        (lambda: optim.adamw(1.0, max_norm=0.0), "needs `max_norm`"),
        (lambda: optim.clip_by_global_norm(math.inf), "needs `max_norm` finite and > 0"),
        (lambda: optim.sgd(1.0, decay=1.0), "`momentum` needs `decay`"),
        (lambda: optim.scale(math.inf), "`scale` needs `factor` finite"),
        (lambda: optim.constant(-1.0), "`constant` needs `value`"),
        (lambda: optim.warmup_cosine(1.0, -1, 5), "needs `warmup_steps` >= 0, got -1"),
        (lambda: optim.warmup_cosine(1.0, 5, 5), "needs `total_steps` > `warmup_steps` = 5, got 5"),
        (lambda: optim.warmup_cosine(1.0, 5, 9, end=-1.0), "needs `end`"),
        (lambda: optim.paper_learning_rate(0), "needs `batch_size` >= 1"),
        (lambda: optim.ema(1.0), "`ema` needs `decay`"),
        (lambda: optim.ema("0.9"), r"`ema` needs `decay` in \[0, 1\), got '0.9'"),
        (lambda: optim.sgd(1.0, decay=None), "`momentum` needs `decay`"),
        (lambda: optim.adamw(1.0, b1="0.9"), "needs `b1`"),
        (lambda: optim.adamw(1.0, eps=None), "needs `eps`"),
        (lambda: optim.adamw(1.0, max_norm="1"), "needs `max_norm`"),
        (lambda: optim.scale("2"), "`scale` needs `factor`"),
        (lambda: optim.warmup_cosine(1.0, None, 9), "needs `warmup_steps`"),
        (lambda: optim.warmup_cosine(1.0, 5, math.inf), "needs `total_steps`"),
        (lambda: optim.paper_learning_rate("32"), "needs `batch_size` >= 1, got '32'"),
    ],
)
def test_bad_hyperparameters_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_state_or_gradients_of_another_optimiser_or_model_are_refused():
    params = example()
    optimiser = optim.adamw(0.1)
    state = optimiser.init(params)
    with pytest.raises(ValueError, match="needs the state of its 3 transformations, got 4"):
        optimiser.update(params, optim.adamw(0.1, max_norm=1.0).init(params), params)
    with pytest.raises(ValueError, match="one structure.* only one tree has temperature"):
        optimiser.update({k: params[k] for k in ("pos_embed", "blocks")}, state, params)
