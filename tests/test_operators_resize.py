"""Parameters for another number of keys: identity, what is kept, functions known on the lattice."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import bases, operators, tree

HEADS = 2
# where each order has its keys
AXES = {
    "low_rank": {"units": (2,), "mix": (1,)},
    "full_rank": {"units": (1, 2)},
    "project_first": {"units": (1,), "mix": (2,)},
    "two_stage": {"first": (2,), "second": (1,)},
}
SPECS = [f"{units}:order={order}" for units in ("G2", "dog", "rational") for order in AXES]
SPECS += ["G2:order=full_rank,scales=true,unit_base=gelu", "G2:base=softmax,mix=scaled"]
SPECS += ["softmax", "sparsemax", "softmax+G2", "G2:project=simplex"]


def drawn(spec, tokens, seed=0):
    op = operators.parse(spec, rank=3 if "rank" in operators.options(spec) else None).operator
    return op, op.init(torch.Generator().manual_seed(seed), HEADS, tokens)


def places(rows, columns):
    """Centres of the patches of the unit square, (rows * columns, 2)."""
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    return torch.cartesian_prod(y, x)


def smooth(rows, columns, prefix=1):
    """A smooth function of the place, with a value of its own for each prefix token."""
    y, x = places(rows, columns).unbind(-1)
    values = 1.5 + torch.sin(2 * x + 1) * torch.cos(3 * y)
    return torch.cat([torch.full((prefix,), 7.0, dtype=torch.float64), values])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [17, (1, 2, 8), (2, 3, 5), (0, 4, 4), (4, 4)])
def test_the_same_lattice_is_the_identity_to_the_bit(spec, tokens):
    keys = tokens if isinstance(tokens, int) else tokens[-1] * tokens[-2]
    keys += tokens[0] if len(str(tokens)) > 6 else 0
    op, params = drawn(spec, keys)
    same = operators.resize(op, params, tokens, tokens)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), same, params)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sizes", [(17, 65), (65, 17), (17, (1, 3, 7)), ((2, 3, 5), (2, 6, 4))])
def test_the_new_parameters_are_those_of_init_for_the_new_keys(spec, sizes):
    counts = [s if isinstance(s, int) else s[0] + s[1] * s[2] for s in sizes]
    op, params = drawn(spec, counts[0])
    moved = operators.resize(op, params, *sizes)
    wanted = drawn(spec, counts[1])[1]
    tree.map(lambda a, b: assert_close(a, b, rtol=math.inf, atol=math.inf), moved, wanted)
    q, k, v = (torch.randn(HEADS, n, 4) for n in (3, counts[1], counts[1]))
    assert op.attend(moved, q, k, v).isfinite().all()


def filled(op, rows, columns, order):
    """Parameters of every leaf one function of the place along every axis of keys."""
    like = op.init(torch.Generator().manual_seed(0), HEADS, 1 + rows * columns)
    values = smooth(rows, columns)

    def fill(leaf, axes):
        leaf = torch.ones_like(leaf, dtype=torch.float64)
        for axis in axes:
            shape = [1] * leaf.dim()
            shape[axis] = len(values)
            leaf = leaf * values.reshape(shape)
        return leaf

    return {
        name: {key: fill(leaf, AXES[order][name]) for key, leaf in value.items()}
        if isinstance(value, dict)
        else fill(value, AXES[order][name])
        for name, value in like.items()
    }


# what the last sum, over values, is weighted by
LAST = {"low_rank": "mix", "full_rank": "units", "project_first": "units", "two_stage": "second"}
AMPLITUDES = {"mix", "coefs", "weight", "numerator", "scale_base"}


@pytest.mark.parametrize("order", AXES)
@pytest.mark.parametrize("units", ["fourier", "dog", "rational"])
@pytest.mark.parametrize("sizes", [((8, 8), (12, 16)), ((16, 16), (8, 8)), ((8, 12), (12, 8))])
def test_a_smooth_function_of_the_place_is_sampled_anew_and_amplitudes_weighted(
    order, units, sizes
):
    make = getattr(operators, order)
    basis = bases.FAMILIES[units]()
    op = make(basis) if order == "full_rank" else make(basis, rank=2)
    moved = operators.resize(op, filled(op, *sizes[0], order), sizes[0], sizes[1])
    wanted = filled(op, *sizes[1], order)
    (old, new), share = (a * b for a, b in sizes), {}
    ratio = torch.cat([torch.ones(1), torch.full((new,), old / new)]).double()
    for name, axes in AXES[order].items():
        leaves = wanted[name] if isinstance(wanted[name], dict) else {name: wanted[name]}
        got = moved[name] if isinstance(moved[name], dict) else {name: moved[name]}
        for key, leaf in leaves.items():
            for axis in axes if key in AMPLITUDES else ():
                shape = [1] * leaf.dim()
                shape[axis] = new + 1
                leaf = leaf * ratio.reshape(shape)
            # cubic convolution on eight samples a side, held at the border: percents there
            assert_close(got[key], leaf, rtol=0.05, atol=0.05)
            share[name, key] = float((got[key] - leaf).norm() / leaf.norm())
            kept = got[key]
            for axis in axes:
                kept, leaf = kept.narrow(axis, 0, 1), leaf.narrow(axis, 0, 1)
            assert_close(kept, leaf, rtol=0, atol=0)
    assert max(share.values()) < 0.02, share


def test_quadratics_come_out_exactly_inside():
    op = operators.low_rank(bases.polynomial(0), rank=1)
    params = tree.to(op.init(torch.Generator().manual_seed(0), 1, 100), torch.float64)
    y, x = places(10, 10).unbind(-1)
    params["mix"] = (2 * y * y - x * y + 3 * x)[None, :, None]
    moved = operators.resize(op, params, (0, 10, 10), (0, 20, 20))["mix"][0, :, 0]
    y, x = places(20, 20).unbind(-1)
    wanted = (2 * y * y - x * y + 3 * x) / 4
    inside = ((torch.stack([y, x]) - 0.5).abs() < 0.3).all(0)
    assert_close(moved[inside], wanted[inside], rtol=1e-10, atol=1e-12)


@given(small=st.integers(4, 8), factor=st.sampled_from([1.5, 2, 3]), seed=st.integers(0, 2**31))
def test_up_and_down_again_loses_little(small, factor, seed):
    large = int(small * factor)
    op = operators.low_rank(bases.fourier(2), rank=2)
    params = tree.to(
        op.init(torch.Generator().manual_seed(seed), HEADS, 1 + small * small), torch.float64
    )
    envelope = smooth(small, small)
    params["mix"] = params["mix"][:, :1] * envelope[:, None]
    up = operators.resize(op, params, 1 + small**2, 1 + large**2)
    down = operators.resize(op, up, 1 + large**2, 1 + small**2)["mix"]
    lost = (down - params["mix"]).norm() / params["mix"].norm()
    assert lost < 0.03, float(lost)


@pytest.mark.parametrize("order", AXES)
@pytest.mark.parametrize("rows", [{}, {"project": "simplex"}])
@pytest.mark.parametrize("sizes", [((8, 8), (16, 16)), ((16, 16), (8, 8)), ((8, 8), (8, 24))])
def test_a_head_puts_out_what_it_did_on_the_same_picture(order, rows, sizes):
    # tokens that are samples of one smooth picture: keys and values are functions of the place
    def picture(lattice):
        y, x = places(*lattice).unbind(-1)
        k = torch.stack([torch.sin(3 * x), torch.cos(2 * y), x * y, y - x], -1)
        v = torch.stack([torch.cos(2 * x + y), torch.sin(4 * y)], -1)
        return k[None].expand(HEADS, -1, -1), v[None].expand(HEADS, -1, -1)

    make = getattr(operators, order)
    op = make(bases.fourier(2), **({} if order == "full_rank" else {"rank": 3}), **rows)
    (k, v), (k2, v2) = (picture(size) for size in sizes)
    generator = torch.Generator().manual_seed(4)
    params = tree.to(op.init(generator, HEADS, k.shape[-2]), torch.float64)
    y, x = places(*sizes[0]).unbind(-1)

    def tame(leaf, name):
        # what is drawn for one key, modulated smoothly: white noise has no values in between
        for axis in AXES[order][name]:
            shape = [1] * leaf.dim()
            shape[axis] = -1
            wave = (1 + 0.5 * torch.sin(2 * x + 3 * y)).reshape(shape)
            # and so small that a sum over keys, no longer of independent terms, is of order 1
            leaf = leaf.narrow(axis, 0, 1) * wave * wave.numel() ** -0.5
        # logits that differ enough for a projection to drop some
        return leaf * 30 if rows and name == LAST[order] else leaf

    params = {
        name: {key: tame(leaf, name) for key, leaf in value.items()}
        if isinstance(value, dict)
        else tame(value, name)
        for name, value in params.items()
    }
    q = torch.randn(HEADS, 5, 4, generator=generator).double()
    before = op.attend(params, q, k, v)
    after = op.attend(operators.resize(op, params, *sizes), q, k2, v2)
    assert (after - before).norm() / before.norm() < 0.05


def test_a_base_activation_that_cannot_be_weighted_is_refused():
    op, params = drawn("G2:unit_base=silu", 17)
    with pytest.raises(ValueError, match="`scales=True`"):
        operators.resize(op, params, 17, 65)
    assert operators.resize(op, params, 17, 17)["mix"] is params["mix"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (16, 65, r"`old_tokens` as 1 \+ g \* g"),
        (17, 64, r"`new_tokens` as 1 \+ g \* g"),
        (1, 17, "`old_tokens`"),
        (True, 17, "`old_tokens`"),
        ("17", 17, "`old_tokens`"),
        (17.0, 17, "`old_tokens`"),
        (17, (1, 0, 4), "`new_tokens`"),
        (17, (1, 2, 3, 4), "`new_tokens`"),
        (26, 65, "to be the 17 keys of `params`"),
        ((5, 5), 65, "to be the 17 keys of `params`"),
        (17, (2, 4, 4), "the 1 prefix tokens"),
    ],
)
def test_a_lattice_that_does_not_fit_is_named(old, new, words):
    op, params = drawn("G2", 17)
    with pytest.raises(ValueError, match=words) as caught:
        operators.resize(op, params, old, new)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "new", "read"),
    [
        # 25 keys are a square, and 33 are one token and as many patches in 4 rows as before
        ("gated", (1, 4, 6), r"\(0, 5, 5\), got \(1, 4, 6\)"),
        ("gated:prefix=1,rows=4", (1, 8, 4), r"\(1, 4, 8\), got \(1, 8, 4\)"),
        ("gated:prefix=1,rows=4", (8, 4), r"\(1, 4, 8\), got \(None, 8, 4\)"),
        ("G2:order=generated,reach=none,features=10,prefix=1", (1, 3, 8), r"\(1, 4, 4\)"),
        ("G2:order=generated,reach=none,features=10,prefix=1", (0, 5, 5), r"\(1, 5, 5\)"),
    ],
)
def test_a_lattice_that_an_operator_would_take_for_another_is_refused(spec, new, read):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), 2, 17)
    with pytest.raises(ValueError, match=read):
        operators.resize(op, params, 17, new)
    operators.resize(op, params, 17, (1, 4, 4))


@pytest.mark.parametrize(
    "spec",
    [
        *(spec for spec in SPECS if "G2" in spec),
        *("relative", "static", "static:rank=2", "gated", "linformer", "synthesizer", "tempered"),
        *("G2:order=by_offset", "G2:order=beside_relative", "G2:order=elementwise"),
        "G2:order=generated,reach=none,features=10,prefix=1",
    ],
)
def test_parameters_of_another_operator_are_refused(spec):
    op = operators.parse(spec).operator
    others = [{}] if op.traits["length_free"] else [{}, {"foo": torch.zeros(2, 17)}]
    for params in others:
        with pytest.raises(ValueError, match="`resize` needs (the )?parameters .*, got (none|foo)"):
            operators.resize(op, params, 17, 65)


def test_an_operator_that_does_not_say_where_its_keys_are_is_refused():
    op, params = drawn("G2", 17)
    with pytest.raises(ValueError, match="says where its keys are.* or the trait `length_free`"):
        operators.resize(op._replace(resize=None), params, 17, 65)
    mixed = operators.hybrid([operators.softmax(), op._replace(resize=None)])
    params = mixed.init(torch.Generator(), 2, 17)
    with pytest.raises(ValueError, match="says where its keys are"):
        operators.resize(mixed, params, 17, 65)


def test_generated_keeps_its_output_where_every_patch_becomes_four():
    # units and mix of one value for all patches, so that their places say nothing
    op = operators.generated(bases.fourier(2), 3, features=2, reach=None, prefix=1)
    params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
    params = tree.map(torch.Tensor.double, params)
    source = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(HEADS, n, 4, dtype=torch.float64, generator=source) for n in (3, 17, 17))
    fine = [torch.cat([x[:, :1], x[:, 1:].repeat_interleave(4, 1)], 1) for x in (k, v)]
    moved = operators.resize(op, params, 17, 65)
    assert_close(op.attend(moved, q, *fine), op.attend(params, q, k, v))
    assert operators.resize(op, params, 17, 17) is params
    assert operators.generated(bases.fourier(2), 3, features=5, reach=8).resize is None


def steps(**traits):
    """phi(x) = height tanh(weight x), a family of one's own without features."""

    def init(generator, shape):
        height, weight = bases.normal(generator, (2, *shape))
        return {"height": height, "weight": weight}

    def apply(params, x):
        return params["height"] * (params["weight"] * x).tanh()

    return bases.Basis("steps", 2, init, apply, lambda x: None, None, None, {}, traits)


def test_a_family_of_ones_own_says_what_is_weighed_anew_and_starts_at_zero():
    told, silent = steps(amplitude="height"), steps()
    op = operators.low_rank(told, rank=2)
    params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
    ones = {"units": tree.map(torch.ones_like, params["units"]), "mix": params["mix"]}
    moved = operators.resize(op, ones, 17, 65)["units"]
    assert_close(moved["height"][..., 1:], torch.full((HEADS, 2, 64), 16 / 64))
    assert_close(moved["weight"], torch.ones(HEADS, 2, 65))
    q, k, v = torch.randn(3, HEADS, 17, 4, generator=torch.Generator().manual_seed(1))
    for make in (operators.elementwise, operators.by_offset):
        grown = make(told, base="softmax")
        start = grown.init(torch.Generator().manual_seed(0), HEADS, 17)
        assert_close(grown.attend(start, q, k, v), (q @ k.mT / 2).softmax(-1) @ v)
        with pytest.raises(ValueError, match="got 'steps', which does not. Name it in its trait"):
            make(silent, base="softmax")
    for op in (operators.low_rank(silent, rank=2), operators.by_offset(silent)):
        params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
        assert operators.resize(op, params, 17, 17).keys() == params.keys()
        with pytest.raises(ValueError, match="`resize` needs a basis that says which of its"):
            operators.resize(op, params, 17, 65)
