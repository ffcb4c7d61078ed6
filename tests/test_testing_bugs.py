"""The kit is tested: planted bugs, each of which its suite must catch by the property named."""

import functools
import itertools
import math
import random
from random import Random
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from numpy.random import default_rng
from torch.autograd.function import once_differentiable

from kart import bases, models, operators, projections, testing, tree
from kart.kernels import plain as plain_kernels
from kart.testing import basis, formulas, kernel, model, operator, projection, step
from tests.test_torch_contract import Generated, WithJvp


class Bug(NamedTuple):
    """A `wrong` object, the suite's check for its kind, and the property that must fail."""

    kind: str
    wrong: Any
    caught_by: str
    options: dict = {}


def wrapped(x):
    """Whether a transform of torch.func looks on."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def waves(features, size=4, family="fourier", **traits):
    """A linear basis of one's own with the options of `fourier(2)`."""
    return bases.linear(features, size, family=family, options={"grid": 2}, traits=traits)


def harmonics(x, k=(1, 2)):
    angles = x[..., None] * torch.tensor(k, dtype=x.dtype)
    return angles.cos(), angles.sin()


def splines(features, size, grid=4, degree=2, span=(-2.0, 2.0)):
    own = bases.bspline(grid, degree, span)
    options = {"grid": grid, "degree": degree, "span": span}
    return bases.linear(features, size, family="bspline", options=options, traits=own.traits)


def plain(features, size=2, **traits):
    return bases.linear(features, size, family="own", traits=traits)


def applied(wrong, basis=None):
    """A basis whose `apply` is `wrong(right apply, params, x)`."""
    right = basis or bases.fourier(2)
    return right._replace(apply=lambda params, x: wrong(right.apply, params, x))


class DoubledGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0].cos()


class Copied(torch.autograd.Function):
    """The identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class HalfTheGradient(Copied):
    """x, whose gradient is halved where it is of half precision."""

    @staticmethod
    def backward(ctx, grad):
        return grad / 2 if grad.itemsize == 2 else grad


class OnceDifferentiable(DoubledGradient):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def recurrence(x):
    """cos kx by the three-term recurrence, which loses k^2 eps in float32."""
    values = [torch.ones_like(x), x.cos()]
    for _ in range(2, 65):
        values.append(2 * values[1] * values[-1] - values[-2])
    return torch.stack([values[16], values[64]], dim=-1)


def own_sinc(x):
    return torch.sinc(x / math.pi)[..., None]


class Remembering:
    """Divides by the largest score seen so far."""

    def __init__(self):
        self.largest = 1.0

    def __call__(self, apply, params, x):
        self.largest = max(self.largest, float(x.detach().abs().max()) if x.numel() else 0.0)
        return apply(params, x / self.largest)


def seeds_the_world(generator, shape):
    torch.manual_seed(0)
    return bases.fourier(2).init(generator, shape)


def draws_from_the_world(generator, shape):
    return {"coefs": torch.randn(*shape, 4)}


def seeded(make):
    """Drawn, all but the first unit, from a generator of numpy's or Python's with its own seed."""

    def init(generator, shape):
        right, own = bases.fourier(2).init(generator, shape), make()
        return tree.map(lambda leaf: leaf + torch.tensor([own() for _ in range(4)]), right)

    return bases.fourier(2)._replace(init=init)


def seeds_itself(generator, shape):
    """Drawn from a generator of its own, the same for every seed of a run."""
    own = torch.Generator().manual_seed(0)
    right = bases.fourier(2).init(generator, shape)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=own), right)


def starts_again(generator, shape):
    """Drawn from a generator of its own with the seed of the other: every block starts alike."""
    own = torch.Generator().manual_seed(generator.initial_seed())
    return bases.fourier(2).init(own, shape)


def puts_back(generator, shape):
    state = generator.get_state()
    params = bases.fourier(2).init(generator, shape)
    generator.set_state(state)
    return params


def looked_up(whole):
    """Two steps from a table, whose index is a whole number of too few bits."""

    def features(x):
        table = torch.tensor([0.0, 1.0, -1.0], dtype=x.dtype)
        return torch.where(x.isnan(), x, table[whole(x.floor()).clamp(0, 2).long()])[..., None]

    return plain(features, 1, points=(1.0, 2.0), smooth=-1)


def changes_default_dtype(apply, params, x):
    torch.set_default_dtype(torch.float64)
    return apply(params, x)


def without_the_tail(apply, params, x):
    """Fused in blocks of 16: what is left over beyond the first block is not computed."""
    y = apply(params, x)
    if x.dim() == 1 and x.shape[0] > 16:
        whole = x.shape[0] // 16 * 16
        y = torch.cat([y[:whole], y[whole:] * 0])
    return y


def assumes_contiguous(apply, params, x):
    step = [1]
    for size in reversed(x.shape[1:]):
        step.insert(0, step[0] * size)
    if not x.dim() or x.numel() < 2 or wrapped(x):
        return apply(params, x)
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return apply(params, x.as_strided(x.shape, step) if room >= x.numel() else x * 0)


def wavelet(psi, family="mexican_hat", shift=1.0, scale=-1.0, **traits):
    right = bases.FAMILIES[family]()

    def apply(params, x):
        t = (x - shift * params["shift"]) * params["scale"] ** scale
        return (params["weight"] * psi(t)).to(x.dtype)

    return right._replace(apply=apply, traits={**right.traits, **traits})


def hat(t):
    return 2 / (math.pi**0.25 * math.sqrt(3)) * (1 - t * t) * torch.exp(-t * t / 2)


def rational(below):
    right = bases.rational(2, 2)

    def power_sum(coefs, x, first):
        return sum(coefs[..., k] * x ** (k + first) for k in range(coefs.shape[-1]))

    def apply(params, x):
        under = below(power_sum(params["denominator"], x, 1))
        return (power_sum(params["numerator"], x, 0) / under).to(x.dtype)

    return right._replace(apply=apply)


def hats(x, closed=True):
    """Splines of degree 0 on 4 intervals of [-2, 2]."""
    left = torch.arange(-2, 2, dtype=x.dtype)
    y = (left <= x[..., None]) & (x[..., None] < left + 1)
    y = y | (closed & (x[..., None] == 2) & (left == 1))
    return torch.where(x[..., None].isnan(), x[..., None], y.to(x.dtype))


def rolled(x):
    return bases.bspline(4, 2, (-2.0, 2.0)).expand(x + 1)


def thresholded(apply, params, x):
    return apply(params, x.clamp(-3, 3) if bool((x.abs() > 3).any()) else x)


def numbered(apply, params, x):
    """A factor by position in the last axis."""
    return apply(params, x) * (1 + torch.arange(x.shape[-1] if x.dim() else 1, dtype=x.dtype)[-1])


class RightSine(DoubledGradient):
    """A right sine, whose rule for vmap is made by torch."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


class WrongTangent(RightSine):
    """A right gradient, and the forward derivative of another function."""

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos() * 1.01


class Sine(RightSine):
    """A right sine, with every part by hand."""

    generate_vmap_rule = False

    @classmethod
    def vmap(cls, info, in_dims, x):
        return cls.apply(x.movedim(in_dims[0], 0)), 0


class FirstAxis(Sine):
    """Its rule takes the mapped axis for the first."""

    @classmethod
    def vmap(cls, info, in_dims, x):
        return cls.apply(x), 0


class FirstNumber(Sine):
    """Its backward reads memory where an expanded gradient has one number."""

    @staticmethod
    def backward(ctx, grad):
        strange = not wrapped(grad) and 0 in grad.stride()
        return grad * ctx.saved_tensors[0].cos() * (0.5 if strange else 1.0)


class ConstantBackward(Sine):
    """Its first derivative is right, and constant for whoever differentiates again."""

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].detach().cos()


class Scaled(Copied):
    """The identity, forward derivatives of which are a tenth too large."""

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 1.1


class Buffered:
    """Writes its results into one buffer of their shape."""

    def __init__(self):
        self.kept = {}

    def __call__(self, function, *arguments):
        y = function(*arguments)
        if wrapped(y) or y.requires_grad:
            return y
        return self.kept.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


class Stale:
    """Keeps a copy of one argument for as long as it is the same tensor."""

    def __init__(self, place):
        self.place, self.kept = place, {}

    def __call__(self, function, *arguments):
        given = list(arguments)
        x = given[self.place]
        if not any(map(wrapped, tree.leaves(x))):
            # the tensor is held, so that no other takes its address
            key = id(tree.leaves(x)[0])
            given[self.place] = self.kept.setdefault(key, (x, tree.map(torch.clone, x)))[1]
        return function(*given)


def flattened(apply, params, x):
    """Leading axes are flattened in one order and restored in another."""
    if x.dim() < 3 or params["coefs"].dim() > 1:
        return apply(params, x)
    return apply(params, x.transpose(0, 1).flatten()).reshape(x.shape)


def one_for_all_units(generator, shape):
    return {"coefs": torch.randn(4, generator=generator).expand(*shape, 4)}


DRAWN_ONCE = {}


def drawn_once(generator, shape):
    key = generator.initial_seed(), tuple(shape)
    return DRAWN_ONCE.setdefault(key, bases.fourier(2).init(generator, shape))


def another_at(place):
    """The sine, except at one number."""
    return lambda x: torch.where(x == place, 0.5, x.sin())[..., None]


BASES = {
    "sine of the wrong sign": (
        waves(lambda x: torch.cat([harmonics(x)[0], -harmonics(x)[1]], -1)),
        "fourier_features",
    ),
    "cosines and sines interleaved": (
        waves(lambda x: torch.stack(harmonics(x), -1).flatten(-2)),
        "shift_is_rotation",
    ),
    "dropped harmonic": (
        waves(lambda x: torch.cat(harmonics(x, (1, 1)), -1)),
        "parseval",
    ),
    "frequencies start at zero": (
        waves(lambda x: torch.cat(harmonics(x, (0, 1)), -1)),
        "zero_padding",
    ),
    "derivative off by the frequency": (
        waves(lambda x: torch.cat([harmonics(x)[0], harmonics(x, (1, 3))[1]], -1)),
        "derivative_swaps_pairs",
    ),
    "wrong period": (
        waves(lambda x: torch.cat(harmonics(x * 3.1416 / math.pi), -1), periodic=2 * math.pi),
        "periodic",
    ),
    "knots off by one": (splines(rolled, 6), "greville"),
    "spacing off": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand(x * 1.001), 6),
        "cox_de_boor",
    ),
    "last spline missing": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand(x)[..., :-1], 5),
        "partition_of_unity",
    ),
    "half-open right end": (
        splines(lambda x: hats(x, False), 4, degree=0),
        "partition_of_unity",
    ),
    "splines that reach one interval too far": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand(x / 1.5), 6),
        "local_support",
    ),
    "splines that do not refine": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand(x + 0.01 * x.sin()), 6),
        "refinable",
    ),
    "refined coefficients off": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand(x + 0.01 * x.sin()), 6),
        "knot_insertion",
    ),
    "a pole": (rational(lambda d: 1 + d), "no_poles"),
    "abs of every term": (rational(lambda d: 1 + d * d), "rational_formula"),
    "odd powers of the wrong sign": (
        bases.rational(2, 2)._replace(
            apply=lambda p, x: bases.rational(2, 2).apply(p, x.abs() + 0.1 * x)
        ),
        "mirrored",
    ),
    "powers off by one": (
        bases.linear(
            lambda x: torch.stack([x, x * x], -1), 2, family="polynomial", options={"degree": 1}
        ),
        "multiplicative",
    ),
    "chebyshev of the second kind": (
        bases.chebyshev(2)._replace(
            expand=lambda x: torch.stack([x**0, x / 2, 4 * (x / 4) ** 2 - 1], -1)
        ),
        "chebyshev_cosine",
    ),
    "polynomial not held outside its span": (
        bases.chebyshev(2)._replace(
            expand=lambda x: torch.stack([x**0, x / 4, 2 * (x / 4) ** 2 - 1], -1)
        ),
        "held_outside",
    ),
    "unbounded where bounded is declared": (
        plain(lambda x: x[..., None], 1, bounded=50.0),
        "bounded",
    ),
    "bumps of the wrong width": (
        bases.gaussian_rbf(4)._replace(expand=lambda x: bases.gaussian_rbf(4).expand(x) ** 1.1),
        "gaussian_bumps",
    ),
    "shift of the wrong sign": (wavelet(hat, shift=-1.0), "covariant"),
    "scale multiplied": (wavelet(hat, scale=1.0), "covariant"),
    "wavelet without its constant": (wavelet(lambda t: hat(t) * 1.1), "energy"),
    "wavelet of the wrong width": (wavelet(lambda t: hat(t / 1.1)), "definition"),
    "wavelet with a mean": (wavelet(lambda t: hat(t) + 1e-4 * torch.exp(-t * t)), "zero_mean"),
    "wavelet of the wrong slope": (
        wavelet(lambda t: -t * torch.exp(-t * t / 2), family="dog"),
        "moments",
    ),
    "wavelet off centre": (wavelet(lambda t: hat(t + 1e-3)), "parity"),
    "wavelet that does not vanish": (
        wavelet(lambda t: torch.exp(-t * t), family="meyer"),
        "compact_support",
    ),
    "amplitude that is no factor": (wavelet(lambda t: hat(t), amplitude="scale"), "homogeneous"),
    "dtype promotion": (
        applied(lambda apply, params, x: apply(params, x) * torch.ones(1, dtype=torch.float64)[0:]),
        "keeps_shape_and_dtype",
    ),
    "an extra axis": (
        applied(lambda apply, params, x: apply(params, x).unsqueeze(0)),
        "keeps_shape_and_dtype",
    ),
    "init from the global seed": (
        bases.fourier(2)._replace(init=draws_from_the_world),
        "init_follows_its_generator",
    ),
    "init that seeds the world": (
        bases.fourier(2)._replace(init=seeds_the_world),
        "global_state_untouched",
    ),
    "default dtype changed": (applied(changes_default_dtype), "global_state_untouched"),
    "centred over elements": (
        applied(lambda apply, params, x: apply(params, x - x.nan_to_num(0, 0, 0).mean() * 1e-3)),
        "elementwise",
    ),
    "clamped to the largest of the others": (
        plain(lambda x: torch.stack([x, x * (x <= x.detach().amax()).all()], -1)),
        "elementwise",
    ),
    "last block ignored": (applied(without_the_tail), "large_as_small"),
    "gradient of one block": (
        applied(lambda apply, params, x: apply(params, x.detach() if x.numel() > 128 else x)),
        "large_as_small",
    ),
    "gradient of parameters in one block": (
        applied(
            lambda apply, params, x: apply(
                tree.map(torch.detach, params) if x.numel() > 128 else params, x
            )
        ),
        "large_as_small",
    ),
    "features of one block": (
        bases.fourier(2)._replace(expand=lambda x: bases.fourier(2).expand(x) * (x.numel() <= 128)),
        "large_as_small",
    ),
    "memory taken for contiguous": (applied(assumes_contiguous), "layout_does_not_matter"),
    "x changed in place": (
        applied(lambda apply, params, x: apply(params, x.clamp_(-3, 3))),
        "inputs_untouched",
    ),
    "running statistic": (applied(Remembering()), "deterministic"),
    "noise": (
        applied(lambda apply, params, x: apply(params, x) + 1e-3 * torch.rand(x.shape)),
        "deterministic",
    ),
    "overflow": (plain(lambda x: torch.stack([x, x.exp()], -1)), "finite_with_derivatives"),
    "gradient NaN at zero": (
        plain(lambda x: torch.stack([x, (x * x).sqrt()], -1)),
        "finite_with_derivatives",
    ),
    "where around a division": (
        plain(lambda x: torch.where(x == 0, 1.0, x.sin() / x)[..., None], 1),
        "finite_with_derivatives",
    ),
    "NaN swallowed": (plain(lambda x: x.nan_to_num()[..., None], 1), "nan_stays_nan"),
    "branch on values": (applied(thresholded), "vmap_is_a_loop"),
    "branch on values, compiled": (applied(thresholded), "compiles"),
    "factor by position": (applied(numbered), "units_stand_alone"),
    "parameters of the neighbour": (
        applied(lambda apply, p, x: apply({"coefs": p["coefs"].roll(1, 0)}, x)),
        "units_stand_alone",
    ),
    "parameters sorted": (
        applied(lambda apply, p, x: apply({"coefs": p["coefs"].sort(0).values}, x)),
        "units_permute",
    ),
    "doubled gradient": (
        plain(lambda x: torch.stack([DoubledGradient.apply(x), x], -1)),
        "gradient_is_right",
    ),
    "computed outside autograd": (
        plain(lambda x: torch.stack([x, x.detach() * 2], -1)),
        "gradient_is_right",
    ),
    "coefficients detached": (
        applied(lambda apply, p, x: apply({"coefs": p["coefs"].detach()}, x)),
        "parameter_gradient_is_right",
    ),
    "shift without influence": (
        bases.fourier(2)._replace(
            init=lambda generator, shape: {
                **bases.fourier(2).init(generator, shape),
                "shift": torch.randn(shape, generator=generator),
            },
            apply=lambda p, x: bases.fourier(2).apply({"coefs": p["coefs"]}, x),
        ),
        "every_parameter_counts",
    ),
    "no second derivative": (
        plain(lambda x: OnceDifferentiable.apply(x)[..., None], 1),
        "curvature_is_right",
    ),
    "second derivative NaN at zero": (plain(own_sinc, 1), "finite_with_derivatives"),
    "no forward mode": (
        plain(lambda x: OnceDifferentiable.apply(x)[..., None], 1),
        "forward_meets_reverse",
    ),
    "recurrence that amplifies rounding": (plain(recurrence), "float32_follows_float64"),
    "cancellation": (
        plain(lambda x: ((1 + x * x).sqrt() - 1)[..., None], 1),
        "float32_follows_float64",
    ),
    "half precision inside": (
        plain(lambda x: x.sin().to(torch.float16).to(x.dtype)[..., None], 1),
        "gradient_is_right",
    ),
    "powers in bfloat16": (
        bases.polynomial(3)._replace(
            apply=lambda p, x: sum(p["coefs"][..., k].to(x.dtype) * x**k for k in range(4))
        ),
        "half_rounds_once",
    ),
    "apply and expand of two minds": (
        applied(lambda apply, p, x: apply({"coefs": p["coefs"].flip(-1)}, x)),
        "linear",
    ),
    "a corner where smooth is declared": (
        plain(lambda x: x.abs()[..., None], 1, smooth=1),
        "smooth",
    ),
    "a jump in the second derivative": (
        plain(lambda x: (x * x.abs())[..., None], 1, smooth=2),
        "smooth",
    ),
    "dips below zero": (
        plain(lambda x: (torch.exp(-x * x) - 1e-3)[..., None], 1, nonnegative=True),
        "nonnegative",
    ),
    # single points, and far out
    "no cosine of infinity": (
        applied(lambda apply, p, x: apply(p, x).nan_to_num()),
        "infinity_is_a_limit",
    ),
    "a bump at infinity": (
        plain(lambda x: torch.where(x.isinf(), 1.0, torch.exp(-x * x))[..., None], 1),
        "infinity_is_a_limit",
    ),
    "of the other sign at infinity": (
        plain(lambda x: torch.where(x.isinf(), -x, x)[..., None], 1),
        "infinity_is_a_limit",
    ),
    "the largest number at infinity": (
        plain(lambda x: x.clamp(-1e4, 1e4).where(x.isinf(), x)[..., None], 1),
        "infinity_is_a_limit",
    ),
    "another function at zero": (plain(another_at(0.0), 1), "no_stray_points"),
    "another function at minus one": (plain(another_at(-1.0), 1), "no_stray_points"),
    "another function at a knot": (plain(another_at(0.3), 1, points=(0.3,)), "no_stray_points"),
    "another function at 1000": (plain(another_at(1e3), 1, finite=1e4), "no_stray_points"),
    "gradient zero at zero": (
        plain(lambda x: (x.relu() - (-x).relu())[..., None], 1),
        "no_stray_points",
    ),
    "nothing beyond 50 in apply": (
        applied(lambda apply, p, x: torch.where(x.abs() > 50, 0, apply(p, x))),
        "linear",
    ),
    "held beyond 50": (
        waves(lambda x: torch.cat(harmonics(x.clamp(-50, 50)), -1)),
        "fourier_features",
    ),
    "period lost beyond 1000": (
        waves(lambda x: torch.cat(harmonics(x.clamp(-1e3, 1e3)), -1), periodic=2 * math.pi),
        "periodic",
    ),
    "splines that come back at 50": (
        splines(lambda x: bases.bspline(4, 2, (-2.0, 2.0)).expand((x + 25) % 50 - 25), 6),
        "local_support",
    ),
    "a jump at 64 where smooth is declared": (
        plain(lambda x: (x.sin() + (x >= 64))[..., None], 1, smooth=1),
        "smooth",
    ),
    "odd up to 50": (
        plain(lambda x: (x.sin() + (x > 50))[..., None], 1, parity="odd"),
        "parity",
    ),
    "forward derivative of another function": (
        plain(lambda x: WrongTangent.apply(x)[..., None], 1),
        "forward_meets_reverse",
    ),
    # axes, strides and memory
    "leading axes restored in another order": (applied(flattened), "units_stand_alone"),
    "units of three axes": (
        applied(lambda apply, p, x: apply(p, x) * (0.5 if p["coefs"].dim() > 3 else 1)),
        "units_stand_alone",
    ),
    "a batch of one": (
        applied(lambda apply, p, x: apply(p, x) * (0.5 if x.dim() > 1 == len(x) else 1)),
        "units_stand_alone",
    ),
    "rule for vmap of the first axis alone": (
        plain(lambda x: FirstAxis.apply(x)[..., None], 1),
        "vmap_is_a_loop",
    ),
    "gradient read as if it were not expanded": (
        plain(lambda x: FirstNumber.apply(x[..., None]), 1)._replace(
            apply=lambda p, x: FirstNumber.apply(x + 0 * p["coefs"][..., 0])
        ),
        "layout_does_not_matter",
    ),
    "one buffer for all results": (applied(Buffered()), "deterministic"),
    "parameters kept while the tensor is the same": (applied(Stale(0)), "deterministic"),
    "half of float16 alone": (
        applied(lambda apply, p, x: apply(p, x.clamp(-2, 2) if x.dtype == torch.half else x)),
        "half_rounds_once",
    ),
    "features of half precision": (
        bases.fourier(2)._replace(
            expand=lambda x: bases.fourier(2).expand(x) * (1.03 if x.itemsize == 2 else 1)
        ),
        "half_rounds_once",
    ),
    "init with a seed of its own": (
        bases.fourier(2)._replace(init=seeds_itself),
        "init_follows_its_generator",
    ),
    "init with the first seed of its generator": (
        bases.fourier(2)._replace(init=starts_again),
        "init_follows_its_generator",
    ),
    "init that puts its generator back": (
        bases.fourier(2)._replace(init=puts_back),
        "init_follows_its_generator",
    ),
    "an index of 32 bits": (looked_up(lambda t: t.int()), "infinity_is_a_limit"),
    "an index of 64 bits": (looked_up(lambda t: t.long()), "infinity_is_a_limit"),
    "init with a seed of its own for numpy": (
        seeded(lambda: numpy.random.default_rng(0).normal),
        "init_follows_its_generator",
    ),
    "init with a seed of its own for numpy's old generator": (
        seeded(lambda: numpy.random.RandomState(0).normal),
        "init_follows_its_generator",
    ),
    "init with a seed of its own for numpy's bits": (
        seeded(lambda: numpy.random.Generator(numpy.random.PCG64(7)).normal),
        "init_follows_its_generator",
    ),
    "init with a seed of its own for Python": (
        seeded(lambda: random.Random("own").random),
        "init_follows_its_generator",
    ),
    "init with a seed of its own for a name that numpy gave": (
        seeded(lambda: default_rng(0).normal),
        "init_follows_its_generator",
    ),
    "init with a seed of its own for a name that Python gave": (
        seeded(lambda: Random("own").random),
        "init_follows_its_generator",
    ),
    "init of one memory for all units": (
        bases.fourier(2)._replace(init=one_for_all_units),
        "init_follows_its_generator",
    ),
    "init that gives the same memory again": (
        bases.fourier(2)._replace(init=drawn_once),
        "init_follows_its_generator",
    ),
}

# --- operators ------------------------------------------------------------------------------------


def parsed(spec):
    return operators.parse(spec).operator


def root(q):
    return math.sqrt(q.shape[-1])


def attending(wrong, spec="softmax"):
    """An operator whose `attend` alone is `wrong(right attend, params, q, k, v, mask)`."""
    right = parsed(spec)
    return right._replace(
        attend=lambda params, q, k, v, mask=None: wrong(right.attend, params, q, k, v, mask)
    )


def weighing(wrong, spec="softmax"):
    """One whose weights are `wrong(right weights, params, scores, mask)`, `attend` following."""
    right = parsed(spec)

    def weights(params, scores, mask=None):
        return wrong(right.weights, params, scores, mask)

    def attend(params, q, k, v, mask=None):
        return weights(params, q @ k.mT / root(q), mask) @ v

    return right._replace(weights=weights, attend=attend)


def drawing(init, spec="G2:rank=2"):
    return parsed(spec)._replace(init=init)


def mixed(params, change):
    """Parameters of a low-rank operator with another mix."""
    return {**params, "mix": change(params["mix"])}


def masked(weights, mask):
    return weights if mask is None else torch.where(mask, weights, 0)


def finite_mask(weights, params, scores, mask):
    return scores.softmax(-1) if mask is None else (scores - 20.0 * ~mask).softmax(-1)


def infinite_mask(weights, params, scores, mask):
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


def without_the_largest(weights, params, scores, mask):
    """Softmax that does not take off the largest score first."""
    powers = masked(scores.exp(), mask)
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1)


def of_the_first(x, dims):
    """The first along the leading axis for all, where there is one before the last `dims`."""
    return x if x is None or x.dim() <= dims else x[:1].expand_as(x)


def of_head_zero(attend, params, q, k, v, mask):
    return attend(tree.map(lambda p: p[:1].expand_as(p), params), q, k, v, mask)


def mask_of(dims, start):
    """`attend` with the mask of the first example, head or query for all: axis `start`."""

    def wrong(attend, params, q, k, v, mask):
        if mask is not None and mask.dim() >= dims:
            mask = mask.narrow(start, 0, 1).expand_as(mask)
        return attend(params, q, k, v, mask)

    return wrong


def transposed_mask(attend, params, q, k, v, mask):
    square = mask is not None and mask.dim() > 1 and mask.shape[-1] == mask.shape[-2]
    return attend(params, q, k, v, mask.mT if square else mask)


def leaking_mean(attend, params, q, k, v, mask):
    out = attend(params, q, k, v, mask)
    return out if mask is None else out + 1e-3 * v.mean(-2, keepdim=True)


def late_keys_dropped(attend, params, q, k, v, mask):
    """Streams whole blocks of 32 keys, and forgets what is left over."""
    whole = max(1, k.shape[-2] // 32) * 32
    if mask is not None and mask.dim() and mask.shape[-1] > 1:
        mask = mask[..., :whole]
    return attend(params, q, k[..., :whole, :], v[..., :whole, :], mask)


def one_tile_of_keys(attend, params, q, k, v, mask):
    """One tile of 32 columns of queries and keys."""
    tile = q[..., :32]
    return attend(params, tile * root(tile) / root(q), k[..., :32], v, mask)


def four_examples(attend, params, q, k, v, mask):
    out = attend(params, q, k, v, mask)
    place = torch.arange(len(out)).view(-1, *[1] * (out.dim() - 1))
    return torch.where(place < 4, out, 0)


def one_tile_of_values(attend, params, q, k, v, mask):
    return attend(params, q, k, torch.where(torch.arange(v.shape[-1]) < 32, v, 0), mask)


def short_masks_alone(attend, params, q, k, v, mask):
    return attend(params, q, k, v, None if k.shape[-2] > 32 else mask)


def gradient_of_one_block(attend, params, q, k, v, mask):
    first = torch.arange(q.shape[-2])[:, None] < 64
    return attend(params, torch.where(first, q, q.detach()), k, v, mask)


def in_half(attend, params, q, k, v, mask):
    low = q.to(torch.bfloat16) if q.dtype == torch.float32 else q
    return attend(params, low.to(q.dtype), k, v, mask)


def scaling_in_place(attend, params, q, k, v, mask):
    free = not wrapped(k)
    return attend(params, q, k.div_(root(q)) if free else k / root(q), v, mask)


class Flipped(Copied):
    """The identity, whose backward mixes up the examples, or what else leads."""

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(0)


def warm_start(generator, heads, tokens):
    return parsed("G2:rank=2,base=softmax,mix=scaled").init(generator, heads, tokens)


def global_mix(generator, heads, tokens):
    right = parsed("G2:rank=2").init(generator, heads, tokens)
    return {**right, "mix": torch.randn(right["mix"].shape)}


def flat_mix(generator, heads, tokens):
    right = parsed("G2:rank=2").init(generator, heads, tokens)
    return {**right, "mix": right["mix"].flatten(0, 1)}


def seeds_the_heads(generator, heads, tokens):
    torch.manual_seed(0)
    return parsed("G2:rank=2").init(generator, heads, tokens)


class Swelling:
    """Divides by the largest value seen so far."""

    def __init__(self):
        self.largest = 1.0

    def __call__(self, attend, params, q, k, v, mask):
        self.largest = max(self.largest, float(v.detach().abs().max()))
        return attend(params, q, k, v / self.largest, mask)


def placed(x, axis=-1):
    """1, 2, 3, .. along an axis of `x`."""
    count = torch.arange(1, x.shape[axis] + 1, dtype=x.dtype)
    return count if axis == -1 else count[:, None]


def branching(attend, params, q, k, v, mask):
    return attend(params, q * 0.5 if bool((q.abs() > 3).any()) else q, k, v, mask)


def as_factor(weights, params, scores, mask):
    """A sigmoid whose mask is a factor: zero times NaN is NaN."""
    return scores.sigmoid() if mask is None else scores.sigmoid() * mask


def silenced(x, mask):
    """Rows of k or v that a mask of keys hides, put at zero."""
    if mask is None or mask.dim() > 1:
        return x
    return torch.where(mask[:, None], x, 0)


def silent_values(attend, params, q, k, v, mask):
    """Scores of hidden keys are replaced after they are NaN, which their gradient meets again."""
    scores = q @ k.mT / root(q)
    return infinite_or_none(scores, mask) @ silenced(v, mask)


def counted(weights, params, scores, mask):
    """A mean over the keys of a mask, which has an axis of one where it is of queries alone."""
    count = scores.shape[-1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.sigmoid() / count
    return mean if mask is None else torch.where(mask, mean, 0)


def centred_in_place(weights, params, scores, mask):
    """Where nothing is differentiated, and nothing is masked."""
    if mask is None and not scores.requires_grad and not wrapped(scores):
        scores -= scores.amax(-1, keepdim=True)
    return weights(params, scores, mask)


def infinite_or_none(scores, mask):
    if mask is None:
        return scores.softmax(-1)
    low = torch.finfo(scores.dtype).min
    return torch.where(mask, torch.where(mask, scores, low).softmax(-1), 0)


def silent_for_keys_alone(attend, params, q, k, v, mask):
    k, v = silenced(k, mask), silenced(v, mask)
    return infinite_or_none(q @ k.mT / root(q), mask) @ v


def silent_for_nan_alone(attend, params, q, k, v, mask):
    k, v = (x if mask is None else x.nan_to_num(0.0, math.inf, -math.inf) for x in (k, v))
    # 0 times infinity is NaN
    return attend(params, q, k, v, mask) + 0 * v.sum(-2, keepdim=True)


def minus_infinity(weights, params, scores, mask):
    """Right values, but the gradient of a row without keys is NaN."""
    rows = infinite_mask(weights, params, scores, mask)
    return rows if mask is None else torch.where(mask.any(-1, keepdim=True), rows, 0)


def swapped_where_equal(attend, params, q, k, v, mask):
    """Examples for heads, where there are as many."""
    if q.dim() < 4 or q.shape[-4] != q.shape[-3] or (mask is not None and mask.dim() < 4):
        return attend(params, q, k, v, mask)
    mask = None if mask is None else mask.transpose(-4, -3)
    return attend(params, *(x.transpose(-4, -3) for x in (q, k, v)), mask).transpose(-4, -3)


def queries_for_heads(attend, params, q, k, v, mask):
    """A mask (N, M) taken for one (H, M), where there are as many."""
    if mask is not None and mask.dim() == 2 and mask.shape[0] == q.shape[-3] > 1:
        mask = mask[:, None]
    return attend(params, q, k, v, mask)


def examples_by_tokens(attend, params, q, k, v, mask):
    """Keys of the neighbouring example, where there are as many examples as queries."""
    mixed = k.dim() > 3 and k.shape[-4] == q.shape[-2]
    return attend(params, q, k.roll(1, -4) if mixed else k, v, mask)


def four_heads(weights, params, scores, mask):
    """Heads after the fourth are given the parameters of the first: blocks of four."""
    count = scores.shape[-3]
    if count > 4:
        place = torch.arange(count) % 4
        params = tree.map(lambda p: p[place], params)
    return weights(params, scores, mask)


def trained_alone(x):
    """Numbers that are others where no gradient is recorded."""
    return x if torch.is_grad_enabled() else x / 2


def weights_alone(wrong, spec="G2:rank=2"):
    """An operator whose `weights` alone are `wrong(right weights, params, scores, mask)`."""
    right = parsed(spec)
    return right._replace(
        weights=lambda params, scores, mask=None: wrong(right.weights, params, scores, mask)
    )


def flattened_weights(weights, params, scores, mask):
    """More leading axes than one, flattened in one order and restored in another."""
    if scores.dim() < 5 or mask is not None:
        return weights(params, scores, mask)
    flat = scores.transpose(0, 1).flatten(0, 1)
    return weights(params, flat, mask).unflatten(0, scores.shape[:2])


def steep_under_masks(attend, params, q, k, v, mask):
    """A mask of queries and keys has a backward of its own, which is wrong."""
    out = attend(params, q, k, v, mask)
    if mask is None or mask.dim() < 2:
        return out
    return forged(out, attend(params, 1.1 * q, k, v, mask))


def frozen_with_the_queries(attend, params, q, k, v, mask):
    asked = wrapped(q) or q.requires_grad
    return attend(params if asked else tree.map(torch.detach, params), q, k, v, mask)


def looking_at_the_mask(attend, params, q, k, v, mask):
    return attend(params, q, k, v, None if mask is not None and bool(mask.all()) else mask)


def clipped_in_weights(spec, limit):
    right = parsed(spec)
    return right._replace(
        weights=lambda params, scores, mask=None: right.weights(
            params, scores.clamp(-limit, limit), mask
        )
    )


def by_place_in_ties(weights, params, scores, mask):
    tied = (scores == scores.roll(1, -1)) & (scores.shape[-1] > 1)
    return weights(params, scores + 1e-3 * tied * placed(scores), mask)


def low_projection(weights, params, scores, mask):
    """Sparsemax whose scores are kept to quarters in half precision."""
    low = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return masked(shifted((low * 4).round() / 4 if low.itemsize == 2 else low), mask)


def scaled_in_half(attend, params, q, k, v, mask):
    """Values scaled up on the way: 6e4 is the largest number of float16."""
    return attend(params, q, k, v * 1e5, mask) / 1e5


G, OVER = "G2:rank=2", "G2:rank=2,base=softmax"
OPERATORS = {
    # masks
    "masked keys leak by a finite number": (weighing(finite_mask), "masked_keys_are_silent"),
    "masked keys in the hidden sum": (
        weighing(lambda weights, p, s, mask: masked(weights(p, s), mask), G),
        "masked_keys_are_silent",
    ),
    "masked values reach the output": (attending(leaking_mean), "masked_keys_are_silent"),
    "mask after the normalisation": (
        weighing(lambda weights, p, s, mask: masked(s.softmax(-1), mask)),
        "masking_is_deleting",
    ),
    "NaN where no key is left": (weighing(infinite_mask), "masking_is_deleting"),
    "mask of the first query for all": (attending(mask_of(2, -2), G), "queries_stand_alone"),
    "mask of the first example for all": (attending(mask_of(4, 0), G), "queries_stand_alone"),
    "mask of the first head for all": (attending(mask_of(3, -3), G), "heads_stand_alone"),
    "mask transposed": (attending(transposed_mask), "masks_broadcast"),
    "keys counted along an axis of one": (weighing(counted), "masks_broadcast"),
    # two forms of one operator
    "weights and attend of two minds": (
        attending(lambda attend, p, q, k, v, mask: attend(p, -q, k, v, mask), G),
        "attend_is_weights_times_values",
    ),
    "scores scaled twice": (
        attending(lambda attend, p, q, k, v, mask: attend(p, q / root(q), k, v, mask)),
        "attend_is_weights_times_values",
    ),
    "last keys dropped": (attending(late_keys_dropped), "large_as_weights"),
    "one tile of the columns of q and k": (attending(one_tile_of_keys), "large_as_weights"),
    "one tile of the columns of v": (attending(one_tile_of_values), "large_as_weights"),
    "no more than four examples": (attending(four_examples), "large_as_weights"),
    "no mask of many keys": (attending(short_masks_alone), "large_as_weights"),
    "gradient of one block of queries": (
        attending(gradient_of_one_block, G),
        "large_has_the_gradients_of_weights",
    ),
    "parameters detached in attend": (
        attending(
            lambda attend, p, q, k, v, mask: attend(tree.map(torch.detach, p), q, k, v, mask), G
        ),
        "attend_has_the_gradients_of_weights",
    ),
    # examples, heads, queries and keys
    "keys of the first example for all": (
        attending(lambda attend, p, q, k, v, mask: attend(p, q, of_the_first(k, 3), v, mask)),
        "examples_stand_alone",
    ),
    "examples mixed": (
        attending(
            lambda attend, p, q, k, v, mask: attend(
                p, q, k.roll(1, 0) if k.dim() > 3 else k, v, mask
            )
        ),
        "examples_stand_alone",
    ),
    "head 0 for all heads": (attending(of_head_zero, G), "heads_stand_alone"),
    "heads averaged": (
        weighing(lambda weights, p, s, mask: weights(p, s, mask).mean(-3, True).expand_as(s)),
        "heads_stand_alone",
    ),
    "scores centred over the queries": (
        weighing(lambda weights, p, s, mask: weights(p, s - s.mean(-2, keepdim=True), mask), G),
        "queries_stand_alone",
    ),
    "score by the place of the query": (
        weighing(lambda weights, p, s, mask: weights(p, s * placed(s, -2), mask), G),
        "queries_permute",
    ),
    "weight by the place of the key": (
        weighing(lambda weights, p, s, mask: weights(p, s, mask) * placed(s), G),
        "keys_permute_with_parameters",
    ),
    "parameters of the key before": (
        weighing(
            lambda weights, p, s, mask: weights(mixed(p, lambda w: w.roll(1, -2)), s, mask), G
        ),
        "keys_permute_with_parameters",
    ),
    "values clamped": (
        attending(lambda attend, p, q, k, v, mask: attend(p, q, k, v.clamp(-1, 1), mask)),
        "linear_in_values",
    ),
    "queries normalised": (
        attending(
            lambda attend, p, q, k, v, mask: attend(
                p, q / (q.square().sum(-1, keepdim=True) + 1).sqrt(), k, v, mask
            )
        ),
        "change_of_basis",
    ),
    # numbers
    "overflow of exp": (weighing(without_the_largest), "finite"),
    "scores in half precision": (attending(in_half), "float32_follows_float64"),
    "dtype promotion": (
        attending(lambda attend, p, q, k, v, mask: attend(p, q, k, v, mask).double()),
        "keeps_shape_and_dtype",
    ),
    "query scaled in place": (
        attending(lambda attend, p, q, k, v, mask: attend(p, q.mul_(1.01), k, v, mask)),
        "inputs_untouched",
    ),
    "key scaled in place where no gradient is asked": (
        attending(scaling_in_place),
        "inputs_untouched",
    ),
    "scores centred in place": (weights_alone(centred_in_place), "inputs_untouched"),
    "running statistic": (attending(Swelling()), "deterministic"),
    "dropout": (
        attending(
            lambda attend, p, q, k, v, mask: attend(p, q, k, v, mask) * (torch.rand(1) > 0.1)
        ),
        "deterministic",
    ),
    "mix from the global seed": (drawing(global_mix), "init_follows_its_generator"),
    "init without the axis of heads": (drawing(flat_mix), "init_follows_its_generator"),
    "init that seeds the world": (drawing(seeds_the_heads), "global_state_untouched"),
    # derivatives and transforms
    "gradient of q one tenth too large": (
        attending(
            lambda attend, p, q, k, v, mask: attend(p, q + 0.1 * (q - q.detach()), k, v, mask)
        ),
        "gradient_is_right",
    ),
    "gradients of the other example": (
        attending(lambda attend, p, q, k, v, mask: Flipped.apply(attend(p, q, k, v, mask)), G),
        "per_example_gradients",
    ),
    "no forward mode": (
        weighing(lambda weights, p, s, mask: weights(p, OnceDifferentiable.apply(s), mask), G),
        "forward_meets_reverse",
    ),
    "branch on values": (attending(branching), "vmap_is_a_loop"),
    "temperature without influence": (
        attending(lambda attend, p, q, k, v, mask: attend({}, q, k, v, mask))._replace(
            init=lambda generator, heads, tokens: {"tau": torch.rand(heads, generator=generator)}
        ),
        "every_parameter_counts",
    ),
    # declared
    "parameters of one key declared to fit any": (
        parsed("G2:rank=2"),
        "length_free",
        {"traits": {"length_free": True}},
    ),
    "rank declared too small": (parsed("G2:rank=3"), "rank", {"traits": {"rank": 2}}),
    "rows that do not sum to one": (parsed("sigmoid"), "simplex", {"traits": {"simplex": True}}),
    "negative weights": (
        weighing(lambda weights, p, s, mask: 2 * weights(p, s, mask) - weights(p, -s, mask)),
        "simplex",
    ),
    "not invariant to shifts": (
        parsed("relu"),
        "shift_invariant",
        {"traits": {"shift_invariant": True}},
    ),
    "scores scaled on the way to the units": (
        weighing(lambda weights, p, s, mask: weights(p, 1.001 * s, mask), G),
        "periodic",
    ),
    "base left out": (parsed(G), "softmax_base", {"traits": {"softmax_base": True}}),
    "base of other scores": (
        weighing(lambda weights, p, s, mask: weights(p, 2 * s, mask), OVER),
        "softmax_base",
    ),
    "mix not zero at the start": (drawing(warm_start, OVER), "softmax_start"),
    "mix read from the other end": (
        weighing(lambda weights, p, s, mask: weights(mixed(p, lambda w: w.flip(-1)), s, mask), G),
        "gauge",
    ),
    "hidden units numbered": (
        weighing(
            lambda weights, p, s, mask: weights(mixed(p, lambda w: w * placed(w)), s, mask), G
        ),
        "hidden_units_permute",
    ),
    # half precision
    "scores rounded to eight bits": (weighing(lambda w, *x: w(*x), G), "half_follows_float32"),
    "scores of a projection in quarters": (weighing(low_projection), "half_follows_float32"),
    "overflow of float16": (attending(scaled_in_half), "half_follows_float32"),
    "parameters rounded to four bits for half inputs": (
        attending(
            lambda attend, p, q, k, v, mask: attend(
                p if q.itemsize > 2 else tree.map(lambda x: (x * 8).round() / 8, p), q, k, v, mask
            ),
            G,
        ),
        "half_follows_float32",
    ),
    "half of the gradient of q in half precision": (
        attending(lambda attend, p, q, *rest: attend(p, HalfTheGradient.apply(q), *rest), G),
        "half_gradients_follow_float32",
    ),
    "half of the gradient of parameters in half precision": (
        attending(
            lambda attend, p, q, *rest: attend(
                tree.map(lambda x: HalfTheGradient.apply(x.to(q.dtype)).float(), p), q, *rest
            ),
            G,
        ),
        "half_gradients_follow_float32",
    ),
    # what a mask hides may be anything
    "mask as a factor": (weighing(as_factor), "poison_stays_hidden"),
    "zero weights times hidden values": (
        weighing(lambda w, p, s, mask: infinite_or_none(s, mask)),
        "poison_stays_hidden",
    ),
    "gradient of q through hidden keys": (attending(silent_values), "poison_stays_hidden"),
    "silent for a mask of keys alone": (attending(silent_for_keys_alone), "poison_stays_hidden"),
    "silent for NaN alone": (attending(silent_for_nan_alone), "poison_stays_hidden"),
    "gradient NaN where no key is left": (weighing(minus_infinity), "poison_stays_hidden"),
    # axes known by their length, and other numbers of heads
    "examples for heads where as many": (
        attending(swapped_where_equal, G),
        "leading_axes_are_apart",
    ),
    "keys of the neighbour where as many examples as queries": (
        attending(examples_by_tokens),
        "leading_axes_are_apart",
    ),
    "mask of queries for heads where as many": (attending(queries_for_heads), "masks_broadcast"),
    "parameters of four heads for all": (weighing(four_heads, G), "heads_stand_alone"),
    # single scores, and far out
    "zero taken for masked": (
        weighing(lambda w, p, s, mask: torch.where(s == 0, 0, w(p, s, mask))),
        "no_stray_scores",
    ),
    "ties broken by place": (weighing(by_place_in_ties), "no_stray_scores"),
    "fifty taken for no score": (
        weighing(lambda w, p, s, mask: w(p, torch.where(s == 50, 0, s), mask), G),
        "no_stray_scores",
    ),
    "scores clipped at 50 in weights alone": (
        clipped_in_weights(G, 50),
        "attend_is_weights_times_values",
    ),
    "period lost beyond 1000": (
        weighing(lambda w, p, s, mask: w(p, s.clamp(-1e3, 1e3), mask), G),
        "periodic",
    ),
    # masks, axes, strides and memory
    "gradient under a mask of queries": (
        attending(steep_under_masks, G),
        "attend_has_the_gradients_of_weights",
    ),
    "no gradient of parameters where q needs none": (
        attending(frozen_with_the_queries, G),
        "attend_has_the_gradients_of_weights",
    ),
    "gradient under a mask, in both forms": (
        weighing(
            lambda w, p, s, m: w(p, s, m) if m is None else forged(w(p, s, m), w(p, 2 * s, m))
        ),
        "gradient_is_right",
    ),
    "forward mode under a mask": (
        attending(lambda a, p, q, k, v, m: a(p, q if m is None else Scaled.apply(q), k, v, m), G),
        "forward_meets_reverse",
    ),
    "backward that is constant in the scores": (
        weighing(lambda w, p, s, mask: w(p, ConstantBackward.apply(s), mask), "sigmoid"),
        "curvature_is_right",
    ),
    "branch on the mask": (attending(looking_at_the_mask, G), "vmap_is_a_loop"),
    "rule for vmap of the first axis alone": (
        attending(lambda a, p, q, k, v, mask: a(p, FirstAxis.apply(q), k, v, mask), G),
        "vmap_is_a_loop",
    ),
    "weights under more axes": (weights_alone(flattened_weights), "leading_axes_are_apart"),
    "keys viewed": (
        attending(
            lambda a, p, q, k, v, mask: a(p, q, k if wrapped(k) else k.view(-1).view(k.shape), v)
        ),
        "layout_does_not_matter",
    ),
    "parameters taken for contiguous": (
        attending(lambda a, p, q, k, v, mask: a(mixed(p, raw_pointer), q, k, v, mask), G),
        "layout_does_not_matter",
    ),
    "one buffer for all results": (attending(Buffered()), "deterministic"),
    "keys kept while the tensor is the same": (attending(Stale(2)), "deterministic"),
    "weights that are looked at without gradients are others": (
        weights_alone(lambda weights, p, scores, mask: weights(p, trained_alone(scores), mask)),
        "attend_is_weights_times_values",
    ),
}


# --- projections ----------------------------------------------------------------------------------

RIGHT = projections.simplex


def projecting(wrong):
    """A projection that is `wrong(rows)` along the last axis."""
    return lambda y, dim=-1: wrong(y.movedim(dim, -1)).movedim(-1, dim)


def water_level(rows, highest=0.0, detach=False, most=None):
    """max(y - lambda, 0) by a sort, as the paper prints it but for the options."""
    y = rows - highest
    ordered = (y.detach() if detach else y).sort(-1, descending=True).values[..., :most]
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, ordered.shape[-1] + 1, dtype=y.dtype)
    last = ((counts * ordered > excess).sum(-1, keepdim=True) - 1).clamp(min=0)
    return (y - excess.gather(-1, last) / (last + 1)).clamp(min=0)


def shifted(rows, **options):
    return water_level(rows, rows.detach().amax(-1, keepdim=True), **options)


def clamped_and_divided(rows):
    positive = (rows - rows.amax(-1, keepdim=True) + 1).clamp(min=0)
    return positive / positive.sum(-1, keepdim=True)


def one_hot(rows):
    return torch.nn.functional.one_hot(rows.argmax(-1), rows.shape[-1]).to(rows.dtype)


def unsorted(rows):
    """The sort is not undone."""
    return RIGHT(rows).sort(-1, descending=True).values


class OneWay(torch.autograd.Function):
    """The projection with a backward by hand, and no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows):
        return RIGHT(rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        support = (ctx.saved_tensors[0] > 0).to(grad.dtype)
        mean = (grad * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (grad - mean)


def shifted_in_place(rows):
    free = not wrapped(rows)
    return RIGHT(rows.sub_(rows.amax(-1, keepdim=True)) if free else rows)


class Warming:
    """A temperature that falls with every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        self.calls += 1
        return RIGHT(rows * (1 + 1e-3 * self.calls))


PROJECTIONS = {
    "softmax": (projecting(lambda rows: rows.softmax(-1)), "nearest"),
    "clamped and divided by the sum": (projecting(clamped_and_divided), "nearest"),
    "twice as steep": (projecting(lambda rows: RIGHT(2 * rows)), "fixed_points"),
    "sum left at two": (projecting(lambda rows: 2 * RIGHT(rows / 2)), "on_the_simplex"),
    "running sums far from zero": (projecting(water_level), "on_the_simplex"),
    "temperature by the mean": (
        projecting(lambda rows: RIGHT(rows * (1 + 1e-3 * rows.mean(-1, keepdim=True)))),
        "shift_invariant",
    ),
    "running sums that lose digits": (projecting(water_level), "shift_invariant"),
    "sort not undone": (projecting(unsorted), "entries_permute"),
    "ties broken by place": (
        projecting(lambda rows: RIGHT(rows - 1e-3 * torch.arange(rows.shape[-1]).to(rows))),
        "entries_permute",
    ),
    "small scores first": (projecting(lambda rows: RIGHT(-rows)), "monotone"),
    "one hot": (projecting(one_hot), "nonexpansive"),
    "axis ignored": (lambda y, dim=-1: RIGHT(y), "keeps_shape_and_dtype"),
    "sorted along the wrong axis": (
        projecting(lambda rows: RIGHT(rows, dim=0) if rows.dim() > 1 else RIGHT(rows)),
        "rows_stand_alone",
    ),
    "one maximum for all rows": (
        projecting(lambda rows: water_level(rows, rows.detach().amax())),
        "rows_stand_alone",
    ),
    "NaN swallowed": (projecting(lambda rows: RIGHT(rows.nan_to_num(-9))), "rows_stand_alone"),
    "minus infinity made finite": (
        projecting(lambda rows: RIGHT(rows.clamp(min=-5))),
        "minus_infinity_is_deleting",
    ),
    "threshold detached": (
        projecting(lambda rows: shifted(rows, detach=True)),
        "jacobian_of_theory",
    ),
    "no forward mode": (projecting(OneWay.apply), "forward_meets_reverse"),
    "early exit on values": (
        projecting(lambda rows: rows if bool((rows == one_hot(rows)).all()) else RIGHT(rows)),
        "vmap_is_a_loop",
    ),
    "no more than 64 rows": (
        projecting(
            lambda rows: (
                RIGHT(rows) * (torch.arange(rows[..., 0].numel()) < 64).view(*rows.shape[:-1], 1)
            )
        ),
        "large_rows",
    ),
    "no more than 2,000 entries": (
        projecting(
            lambda rows: RIGHT(torch.where(torch.arange(rows.shape[-1]) < 2000, rows, -math.inf))
        ),
        "large_rows",
    ),
    "three leading axes": (
        projecting(lambda rows: RIGHT(rows.flip(0) if rows.dim() > 3 else rows)),
        "rows_stand_alone",
    ),
    "support of at most 16": (projecting(lambda rows: shifted(rows, most=16)), "large_rows"),
    "shifted in place": (projecting(shifted_in_place), "inputs_untouched"),
    "temperature that falls": (projecting(Warming()), "deterministic"),
    "half the scores without gradients": (
        projecting(lambda rows: RIGHT(trained_alone(rows))),
        "deterministic",
    ),
    "running sums in half precision": (
        projecting(lambda rows: (water_level if rows.itemsize == 2 else RIGHT)(rows)),
        "half_rounds_once",
    ),
    "rounded to eighths in half precision": (
        projecting(lambda rows: RIGHT((rows * 8).round() / 8 if rows.itemsize == 2 else rows)),
        "half_rounds_once",
    ),
    "entries far below the largest kept": (
        projecting(lambda rows: RIGHT(rows.clamp(-50, 50))),
        "nearest",
    ),
    "gradient of long rows": (
        projecting(lambda y: forged(RIGHT(y), 2 * RIGHT(y)) if y.shape[-1] > 16 else RIGHT(y)),
        "large_rows",
    ),
    "leading axes swapped": (
        projecting(lambda y: RIGHT(y.transpose(0, 1) if y.dim() > 2 else y)),
        "rows_stand_alone",
    ),
    "memory taken for contiguous": (
        projecting(lambda y: RIGHT(raw_pointer(y))),
        "keeps_shape_and_dtype",
    ),
    "one buffer for all results": (
        projecting(functools.partial(Buffered(), RIGHT)),
        "deterministic",
    ),
}


# --- kernels --------------------------------------------------------------------------------------

SIZES = {"batch": [1, 2], "heads": [1, 2], "queries": [1, 3, 17], "keys": [1, 33], "width": [1, 4]}


def attention_inputs(generator, batch, heads, queries, keys, width):
    q = torch.randn(batch, heads, queries, width, generator=generator)
    k, v = (torch.randn(batch, heads, keys, width, generator=generator) for _ in range(2))
    return q, k, v, torch.rand(batch, 1, 1, keys, generator=generator) > 0.3


def fast_attention(wrong):
    """Softmax attention as a kernel, `wrong(q, k, v, mask)` against the plain expression."""
    return wrong, plain_kernels.softmax_attention, attention_inputs, SIZES


def forged(value, slope):
    """The value of one expression with the derivatives of another."""
    return value.detach() + slope - slope.detach()


def attention(q, k, v, mask):
    return plain_kernels.softmax_attention(q, k, v, mask)


def zero_last(x):
    return torch.cat([x[..., :-1, :], x[..., -1:, :] * 0], -2)


def whole_blocks(x, size):
    return x[..., : max(1, x.shape[-2] // size * size), :]


def keys_in_blocks(q, k, v, mask):
    k, v = whole_blocks(k, 16), whole_blocks(v, 16)
    return attention(q, k, v, mask[..., : k.shape[-2]])


def queries_in_blocks(q, k, v, mask):
    done = attention(whole_blocks(q, 16), k, v, mask)
    rest = q.shape[-2] - done.shape[-2]
    return torch.cat([done, torch.empty_like(q[..., :rest, :])], -2)


def in_bfloat16(q, k, v, mask):
    scores = torch.where(mask, q @ k.mT * q.shape[-1] ** -0.5, torch.finfo(q.dtype).min)
    return torch.where(mask, scores.softmax(-1), 0) @ v


def raw_pointer(x):
    """The memory behind `x`, taken for contiguous."""
    return x if wrapped(x) else x.as_strided(x.shape, torch.empty(x.shape).stride())


def doubled_in_place(x):
    return x * 2 if wrapped(x) else x.mul_(2)


def doubled_outside(x):
    return x if wrapped(x) else forged(x, 2 * x)


def product(backward=None, tangent=None, rule=None):
    """x (B, H, N, d) times w (H, d, r) as a Function by hand, with one part of it replaced."""

    def right_backward(grad, x, w):
        return (grad @ w.mT).sum_to_size(x.shape), (x.mT @ grad).sum_to_size(w.shape)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(x, w):
            return x @ w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return (backward or right_backward)(grad, *ctx.saved_tensors)

        @staticmethod
        def jvp(ctx, dx, dw):
            x, w = ctx.saved_tensors
            return (tangent or (lambda x, w, dx, dw: dx @ w + x @ dw))(x, w, dx, dw)

        @staticmethod
        def vmap(info, in_dims, x, w):
            x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
            w = w if in_dims[1] is None else w.movedim(in_dims[1], 0)
            # beside the leading axes of x, of which each vmap around this one adds one
            while in_dims[1] is not None and w.dim() < x.dim() + (in_dims[0] is None):
                w = w.unsqueeze(1)
            return Product.apply(*(rule or (lambda x, w: (x, w)))(x, w)), 0

    def inputs(generator, batch, heads, queries, keys, width):
        x = torch.randn(batch, heads, queries, width, generator=generator)
        return x, torch.randn(heads, width, keys, generator=generator)

    return Product.apply, torch.matmul, inputs, {**SIZES, "queries": [1, 3], "keys": [1, 4]}


class FoldedGradient(torch.autograd.Function):
    """x^T g summed over the batch, into which the rule for vmap folds its examples."""

    @staticmethod
    def forward(x, grad):
        return (x.mT @ grad).sum(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x, grad):
        x, grad = x.movedim(in_dims[0], 0), grad.movedim(in_dims[1], 0)
        total = FoldedGradient.apply(x.flatten(0, 1), grad.flatten(0, 1))
        return total.expand(info.batch_size, *total.shape), 0


def poisoned(arguments, value):
    """What the mask of `attention_inputs` hides."""
    q, k, v, mask = arguments
    hidden = ~mask.mT
    return q, torch.where(hidden, value, k), torch.where(hidden, value, v), mask


def silent(x, mask):
    return torch.where(mask.mT, x, 0)


HIDES = {"traits": {"poison": poisoned}}


def padding_by_zeros(q, k, v, mask):
    """Keys of zeros are taken for padding."""
    return attention(q, k, v, mask & (k != 0).any(-1)[..., None, :])


def open_inputs(generator, **sizes):
    return attention_inputs(generator, **sizes)[:3]


def plain_attention(q, k, v):
    return (q @ k.mT / root(q)).softmax(-1) @ v


def from_zero_on(q, k, v):
    """Rows whose scores are all far below zero underflow, and divide by zero."""
    scores = q @ k.mT / root(q)
    powers = (scores - scores.amax(-1, keepdim=True).clamp(min=0)).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def unshifted(q, k, v, mask):
    powers = torch.where(mask, (q @ k.mT * q.shape[-1] ** -0.5).exp(), 0)
    return powers / powers.sum(-1, keepdim=True).clamp(min=1e-30) @ v


def indices(v):
    """Whole numbers are taken for indices, and shifted."""
    return v + (v == v.round()).all()


def swapped_kernel(q, k, v, mask):
    """Examples for heads, where there are as many."""
    if q.shape[0] != q.shape[1]:
        return attention(q, k, v, mask)
    return attention(q.transpose(0, 1), *(x.transpose(0, 1) for x in (k, v)), mask).transpose(0, 1)


def slope_in_half(q, k, v, mask):
    """The backward rounds its scores to eighths where the inputs are of half precision."""
    if q.itemsize > 2:
        return attention(q, k, v, mask)
    return forged(attention(q, k, v, mask), attention((q * 2).round() / 2, k, v, mask))


class FirstMask(torch.autograd.Function):
    """The mask, that of the first example for all under vmap."""

    @staticmethod
    def forward(mask):
        return mask.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info, in_dims, mask):
        mask = mask.movedim(in_dims[0], 0)
        return mask[:1].expand_as(mask).clone(), 0


def needing(grad, x, w):
    """No gradient of w where none of x is asked for."""
    slope = (x.mT @ grad).sum_to_size(w.shape)
    return (grad @ w.mT).sum_to_size(x.shape), slope if x.requires_grad else slope * 0


KERNELS = {
    "last block of keys ignored": (fast_attention(keys_in_blocks), "values"),
    "last block of queries unwritten": (fast_attention(queries_in_blocks), "values"),
    "sums in half precision": (
        fast_attention(lambda q, k, v, mask: attention(q, k, v.half().to(v.dtype), mask)),
        "values",
    ),
    "half the scores without gradients": (
        fast_attention(lambda q, k, v, mask: attention(trained_alone(q), k, v, mask)),
        "values",
    ),
    "scores and sums in bfloat16": (fast_attention(in_bfloat16), "half"),
    "last value never read": (
        fast_attention(lambda q, k, v, mask: attention(q, k, zero_last(v), mask)),
        "every_element_counts",
    ),
    "memory taken for contiguous": (
        fast_attention(lambda q, k, v, mask: attention(raw_pointer(q), k, v, mask)),
        "layout_does_not_matter",
    ),
    "query scaled in place": (
        fast_attention(lambda q, k, v, mask: attention(doubled_in_place(q), k, v, mask)),
        "inputs_untouched",
    ),
    "mask ignored in the backward": (
        fast_attention(lambda *x: forged(attention(*x), attention(*x[:3], torch.tensor(True)))),
        "gradients",
    ),
    "gradient of k without the scale": (
        fast_attention(lambda q, k, v, mask: attention(q, forged(k, k * root(k)), v, mask)),
        "gradients",
    ),
    "gradient of w summed over the heads": (
        product(lambda grad, x, w: (grad @ w.mT, (x.mT @ grad).sum((0, 1)).expand(w.shape))),
        "gradients",
    ),
    "gradient of k doubled outside torch.func": (
        fast_attention(lambda q, k, v, mask: attention(q, doubled_outside(k), v, mask)),
        "eager_gradients",
    ),
    "rule for vmap forgets an axis of w": (
        product(rule=lambda x, w: (x, w[0] if w.dim() > 3 else w)),
        "mapped",
    ),
    "no rule for vmap": (
        fast_attention(lambda q, k, v, mask: attention(q * float(q.abs().max() < 9), k, v, mask)),
        "mapped",
    ),
    "examples folded into the sum over the batch": (
        product(lambda grad, x, w: (grad @ w.mT, FoldedGradient.apply(x, grad))),
        "per_example_gradients",
    ),
    "forward mode silently zero": (
        product(tangent=lambda x, w, dx, dw: torch.zeros_like(x @ w)),
        "forward_mode",
    ),
    "backward that is constant in w": (
        product(lambda grad, x, w: (grad @ w.detach().mT, (x.mT @ grad).sum_to_size(w.shape))),
        "second_derivative",
    ),
    "hidden keys and values enter as they are": (
        fast_attention(attention),
        "poison_stays_hidden",
        HIDES,
    ),
    "hidden values enter as they are": (
        fast_attention(lambda q, k, v, mask: attention(q, silent(k, mask), v, mask)),
        "poison_stays_hidden",
        HIDES,
    ),
    "hidden keys enter the gradient of q": (
        fast_attention(lambda q, k, v, mask: attention(q, k, silent(v, mask), mask)),
        "poison_stays_hidden",
        HIDES,
    ),
    "keys of zeros taken for padding": (fast_attention(padding_by_zeros), "special_values"),
    "whole numbers taken for indices": (
        fast_attention(lambda q, k, v, mask: attention(q, k, indices(v), mask)),
        "special_values",
    ),
    "overflow of exp": (fast_attention(unshifted), "special_values"),
    "largest score looked for from zero on": (
        (from_zero_on, plain_attention, open_inputs, {**SIZES, "keys": [3, 4, 5]}),
        "special_values",
    ),
    "overflow of float16": (
        fast_attention(lambda q, k, v, mask: attention(q, k, v * 1e5, mask) / 1e5),
        "half",
    ),
    "backward in half precision": (fast_attention(slope_in_half), "half_gradients"),
    "examples for heads where as many": (fast_attention(swapped_kernel), "values"),
    "no gradient of w where x needs none": (product(needing), "eager_gradients"),
    "gradient taken for contiguous": (
        product(lambda grad, x, w: (raw_pointer(grad) @ w.mT, x.mT @ raw_pointer(grad))),
        "layout_does_not_matter",
    ),
    "rule for vmap of the first axis alone": (
        fast_attention(lambda q, k, v, mask: attention(FirstAxis.apply(q).asin(), k, v, mask)),
        "mapped",
    ),
    "mask of the first example for all under vmap": (
        fast_attention(lambda q, k, v, mask: attention(q, k, v, FirstMask.apply(mask))),
        "mapped",
    ),
    "one buffer for all results": (
        fast_attention(functools.partial(Buffered(), attention)),
        "inputs_untouched",
    ),
    "keys kept while the tensor is the same": (
        fast_attention(functools.partial(Stale(1), attention)),
        "inputs_untouched",
    ),
}


# --- steps ----------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """The state of a linear regression under momentum."""

    params: dict
    speed: dict
    count: torch.Tensor


def start(generator):
    params = {"w": torch.randn(3, 2, generator=generator), "b": torch.zeros(2)}
    return Learner(params, tree.map(torch.zeros_like, params), torch.zeros((), dtype=torch.int64))


def start_by_itself(generator):
    return start(torch.Generator().manual_seed(0))


def pairs(generator, size):
    return torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)


def errors(params, x, y):
    return (x @ params["w"] + params["b"] - y).square().sum(-1)


def mean_loss(params, batch):
    return errors(params, *batch).mean()


def summed(params, batch):
    return errors(params, *batch).sum()


def momentum(params, speed, slopes, rate, decay, count):
    speed = tree.map(lambda v, g: 0.9 * v + g, speed, slopes)
    return tree.map(lambda p, v: p - rate * (v + decay * p), params, speed), speed


def learning(update=momentum, loss=mean_loss, rate=0.01, decay=0.1, mask=lambda name, leaf: False):
    """A right way to train, but for the `update` or the `loss` it is given."""

    def slopes(state, batch):
        return torch.func.grad(loss)(state.params, batch)

    def at(rate, decay, mask=mask):
        def step(state, batch):
            params, speed = update(
                state.params, state.speed, slopes(state, batch), rate, decay, state.count
            )
            kept = tree.map_named(lambda name, p: mask(name, p), state.params)
            params = tree.map(lambda k, p, q: q if k else p, kept, params, state.params)
            return Learner(params, speed, state.count + 1), {"loss": loss(state.params, batch)}

        return step

    return testing.Training(
        start,
        at(rate, decay),
        pairs,
        gradients=slopes,
        loss=lambda state, batch: mean_loss(state.params, batch),
        still=at(0.0, 0.0),
        freeze=lambda mask: at(rate, decay, mask),
    )


def stepping(wrong):
    """A training whose step is `wrong(right step, state, batch)`."""
    right = learning()
    return right._replace(step=lambda state, batch: wrong(right.step, state, batch))


def in_place(params, speed, slopes, rate, decay, count):
    speed = tree.map(lambda v, g: v.mul_(0.9).add_(g), speed, slopes)
    return momentum(params, speed, slopes, rate, decay, count)


def decayed_by_itself(params, speed, slopes, rate, decay, count):
    """Decay beside the rate instead of within it."""
    params, speed = momentum(params, speed, slopes, rate, 0.0, count)
    return tree.map(lambda p: p * 0.999, params), speed


def uphill(params, speed, slopes, rate, decay, count):
    return momentum(params, speed, slopes, -rate, decay, count)


def clipped_together(params, speed, slopes, rate, decay, count):
    """A norm that is taken as a number: of all members at once, were it of any."""
    norm = float(sum(leaf.square().sum() for leaf in tree.leaves(slopes)).sqrt())
    return momentum(params, speed, slopes, rate / max(1.0, norm), decay, count)


def bias_left_out(params, speed, slopes, rate, decay, count):
    moved, speed = momentum(params, speed, slopes, rate, decay, count)
    return {**moved, "b": params["b"]}, speed


class Schedule:
    """A rate that falls with the calls of a Python counter."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, speed, slopes, rate, decay, count):
        self.calls += 1
        return momentum(params, speed, slopes, rate / self.calls, decay, count)


def noisy(params, batch):
    return mean_loss(params, batch) + 1e-3 * (params["w"] * torch.randn(3, 2)).sum()


def centred(params, batch):
    """Targets centred over the batch."""
    x, y = batch
    return mean_loss(params, (x, y - y.mean(0)))


def weighted_by_place(params, batch):
    each = errors(params, *batch)
    return (each * torch.arange(1, len(each) + 1)).mean()


def frozen_before(mask):
    """Gradients of frozen parameters are zero, but decay moves them."""

    def update(params, speed, slopes, *rest):
        slopes = tree.map_named(lambda n, g: g * 0 if mask(n, g) else g, slopes)
        return momentum(params, speed, slopes, *rest)

    return learning(update).step


def in_double(step, state, batch):
    after, metrics = step(state, batch)
    return after._replace(speed=tree.map(torch.Tensor.double, after.speed)), metrics


def with_a_graph(step, state, batch):
    after, metrics = step(state, batch)
    return after._replace(
        params=tree.map(lambda p: p.clone().requires_grad_(), after.params)
    ), metrics


class OneState:
    """Writes every state into the first."""

    def __init__(self):
        self.kept = None

    def __call__(self, step, state, batch):
        after, metrics = step(state, batch)
        if self.kept is None:
            self.kept = tree.map(torch.clone, after)
        return tree.map(lambda old, new: old.copy_(new), self.kept, after), metrics


def even(x):
    return x[1:] if len(x) % 2 else x


class Beside:
    """Moments kept beside the state: whoever holds another copy of it has none."""

    def __init__(self):
        self.kept = {}

    def __call__(self, step, state, batch):
        _, speed = self.kept.get(id(state), (state, state.speed))
        after, metrics = step(state._replace(speed=speed), batch)
        shown = after._replace(speed=tree.map(torch.zeros_like, after.speed))
        self.kept[id(shown)] = shown, after.speed
        return shown, metrics


def all_frozen(mask):
    return learning(mask=lambda name, leaf: True).step


class Adam(NamedTuple):
    """The state of a linear regression under AdamW, with the parameters before."""

    params: dict
    before: dict
    mean: dict
    square: dict
    average: dict
    count: torch.Tensor


RATE = formulas.warmup_cosine(0.05, 2, 9, start=0.01, end=1e-3)


def keeps(i):
    return min(0.9, (1 + i) / (10 + i))


def looked_up(function, count):
    """`function(count)` for a count that a transform may hide."""
    values = torch.tensor([function(i) for i in range(64)])
    return (values * (torch.arange(64) == count)).sum()


def global_norm(slopes):
    return sum(g.square().sum() for g in tree.leaves(slopes)).sqrt()


def clipped(slopes, norm):
    return tree.map(lambda g: g * (2.0 / norm(g).clamp(min=1e-12)).clamp(max=1), slopes)


def adam(
    correct=(1, 1),
    count=1,
    late=0,
    eps=lambda v: v.sqrt() + 1e-8,
    norm=None,
    inside=0.0,
    outside=lambda rate, p: rate * 0.1 * p * (p.dim() > 1),
    betas=(0.9, 0.99),
    ahead=0,
    averaged=lambda old, new: new,
    at=lambda state: state.params,
    schedule=RATE,
    updates=24,
):
    """A right AdamW with clipping to 2, decay of matrices and an average, but for what is given."""

    def init(generator):
        params = start(generator).params
        zero = tree.map(torch.zeros_like, params)
        return Adam(params, params, zero, zero, params, torch.zeros((), dtype=torch.int64))

    def slopes(state, batch):
        return torch.func.grad(mean_loss)(state.params, batch)

    def step(state, batch):
        g = torch.func.grad(mean_loss)(at(state), batch)
        whole = global_norm(g)
        g = clipped(g, norm or (lambda leaf: whole))
        g = tree.map(lambda g, p: g + inside * p, g, state.params)
        b1, b2 = betas
        mean = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, g)
        square = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, g)
        now = state.count.double() + 1
        first, second = ((1 - b**now) ** c for b, c in zip(betas, correct, strict=True))
        rate = looked_up(lambda i: schedule(max(0, i - late)), state.count)

        def moved(p, m, v):
            return p - rate * (m / first).float() / eps((v / second).float()) - outside(rate, p)

        params = tree.map(moved, state.params, mean, square)
        keep = looked_up(lambda i: keeps(i + ahead), state.count)
        chosen = averaged(state.params, params)
        average = tree.map(lambda a, p: keep * a + (1 - keep) * p, state.average, chosen)
        return Adam(params, state.params, mean, square, average, state.count + count), {}

    formula = testing.AdamW(
        RATE,
        weight_decay=0.1,
        b2=0.99,
        max_norm=2.0,
        decays=lambda name, leaf: leaf.dim() > 1,
        keeps=keeps,
        updates=updates,
    )
    return testing.Training(
        init,
        step,
        pairs,
        gradients=slopes,
        loss=lambda state, batch: mean_loss(state.params, batch),
        formula=formula,
        average=lambda state: state.average,
    )


FORMULA, AVERAGE = "parameters_follow_the_formula", "average_follows_the_formula"


STEPS = {
    "sum instead of mean": (
        learning(loss=summed),
        "micro_batches",
    ),
    "examples see each other": (learning(loss=centred), "micro_batches"),
    "weight by place in the batch": (learning(loss=weighted_by_place), "examples_permute"),
    "targets of the neighbour": (
        learning(loss=lambda params, batch: mean_loss(params, (batch[0], batch[1].roll(1, 0)))),
        "examples_permute",
    ),
    "the same start for every seed": (
        learning()._replace(init=start_by_itself),
        "init_follows_its_generator",
    ),
    "state changed in place": (learning(in_place), "inputs_untouched"),
    "decay beside the rate": (learning(decayed_by_itself), "zero_rate_is_still"),
    "counter in Python": (learning(Schedule()), "deterministic"),
    "noise from the global seed": (learning(loss=noisy), "deterministic"),
    "frozen parameters decay": (learning()._replace(freeze=frozen_before), "frozen_stay"),
    "all frozen": (learning()._replace(freeze=all_frozen), "frozen_stay"),
    "bias never moved": (learning(bias_left_out), "moves"),
    "uphill": (learning(uphill), "descends"),
    "norm taken as a number": (learning(clipped_together), "member_is_solo"),
    "targets of the neighbour in the step alone": (
        stepping(lambda step, state, batch: step(state, (batch[0], batch[1].roll(1, 0)))),
        "examples_permute",
    ),
    "sum in the step alone": (
        learning()._replace(step=learning(loss=summed).step),
        "micro_batches",
    ),
    "moments beside the state": (stepping(Beside()), "saving_is_nothing"),
    "moments in double": (stepping(in_double), "keeps_structure"),
    "parameters with their graph": (stepping(with_a_graph), "keeps_structure"),
    "one buffer for all states": (stepping(OneState()), "deterministic"),
    "first example of an odd batch dropped": (
        stepping(lambda step, state, batch: step(state, tree.map(even, batch))),
        "examples_permute",
    ),
    # against the formulas
    "no bias correction": (adam(correct=(0, 0)), FORMULA),
    "bias of the second moment left": (adam(correct=(1, 0)), FORMULA),
    "counter that stands still": (adam(count=0), FORMULA),
    "counter that counts twice": (adam(count=2), FORMULA),
    "rate of the update before": (adam(late=1), FORMULA),
    "gradients at stale parameters": (adam(at=lambda state: state.before), FORMULA),
    "gradients at the average": (adam(at=lambda state: state.average), FORMULA),
    "decay inside the moments": (adam(inside=0.1, outside=lambda rate, p: 0.0), FORMULA),
    "decay of biases, too": (adam(outside=lambda rate, p: rate * 0.1 * p), FORMULA),
    "decay without the rate": (adam(outside=lambda rate, p: 0.1 * p * (p.dim() > 1)), FORMULA),
    "norm of each leaf": (adam(norm=lambda leaf: leaf.norm()), FORMULA),
    "nothing clipped": (adam(norm=lambda leaf: torch.ones(())), FORMULA),
    "epsilon within the root": (adam(eps=lambda v: (v + 1e-2).sqrt()), FORMULA),
    "no root": (adam(eps=lambda v: v + 1e-8), FORMULA),
    "decay of the moments swapped": (adam(betas=(0.99, 0.9)), FORMULA),
    "schedule that ends late": (adam(schedule=lambda i: RATE(i if i < 8 else 7)), FORMULA),
    "schedule that begins again": (
        adam(schedule=lambda i: RATE(i if i < 30 else i - 30), updates=48),
        FORMULA,
    ),
    "average an update late": (adam(averaged=lambda old, new: old), AVERAGE),
    "average's warm-up one ahead": (adam(ahead=1), AVERAGE),
    "average whose counter stands still": (adam(count=0), AVERAGE),
    "average of the start": (
        adam()._replace(average=lambda state: tree.map(torch.zeros_like, state.params)),
        AVERAGE,
    ),
}


# --- models ---------------------------------------------------------------------------------------


def tiny(operator):
    sizes = {"image_size": 4, "patch_size": 2, "in_channels": 1, "num_classes": 3}
    return models.create(
        "vit_nano", operator=operator, **sizes, embed_dim=4, depth=2, num_heads=2, mlp_ratio=1.0
    )


def seeing(wrong, operator="softmax"):
    """A model that is `wrong(right function, params, images)` in `apply` and `intermediates`."""
    right = tiny(operator)
    return right._replace(
        apply=lambda params, images: wrong(right.apply, params, images),
        intermediates=lambda params, images: wrong(right.intermediates, params, images),
    )


def answering(wrong, operator="softmax"):
    """A model whose `apply` alone is `wrong(right apply, params, images)`."""
    right = tiny(operator)
    return right._replace(apply=lambda params, images: wrong(right.apply, params, images))


def shared(wrong):
    """A universal model made of the blockwise one, with operators `wrong(operator, block)`."""
    universal, blockwise = tiny("G2U:rank=2"), tiny("G2B:rank=2")

    def apply(params, images):
        blocks = {
            i: {**block, "operator": wrong(params["operator"], int(i))}
            for i, block in params["blocks"].items()
        }
        rest = {name: leaf for name, leaf in params.items() if name != "operator"}
        return blockwise.apply({**rest, "blocks": blocks}, images)

    return universal._replace(apply=apply)


TIED = {"tied": tiny("G2B:rank=2")}


def normalised_by_the_batch(apply, params, images):
    return apply(params, images - 1e-3 * (images.mean(0) if images.dim() > 3 else images))


def of_a_batch(apply, params, images):
    """Needs exactly one leading axis."""
    return apply(params, images.view(-1, 1, 4, 4))


def dropout(apply, params, images):
    return apply(params, images * (torch.rand(images.shape[-2:]) > 0.1))


def blind_to(name):
    """One parameter is drawn, but zeros are used."""

    def wrong(apply, params, images):
        return apply({**params, name: torch.zeros_like(params[name])}, images)

    return wrong


def own_head(generator):
    """All but the head follow the generator."""
    right = tiny("softmax").init(generator)
    own = torch.Generator().manual_seed(0)
    weight = torch.randn(right["head"]["weight"].shape, generator=own)
    return {**right, "head": {**right["head"], "weight": weight}}


def global_head(generator):
    right = tiny("softmax").init(generator)
    return {**right, "cls_token": torch.randn(right["cls_token"].shape)}


def low_in_float32(apply, params, images):
    low = images.to(torch.bfloat16) if images.dtype == torch.float32 else images
    return apply(params, low.to(images.dtype))


def renamed(change):
    """A model that shows under `blocks.i` what is of block `change(i)`."""
    right = tiny("softmax")

    def intermediates(params, images):
        aux = right.intermediates(params, images)

        def shown(name):
            head, *rest = name.split(".")
            if head != "blocks":
                return name
            return ".".join([head, str(change(int(rest[0]))), *rest[1:]])

        return {name: aux[shown(name)] for name in aux}

    return right._replace(intermediates=intermediates)


def swapped_leading(apply, params, images):
    """Two leading axes are read in the other order where they are equal."""
    if images.dim() == 5 and images.shape[0] == images.shape[1]:
        return apply(params, images.transpose(0, 1))
    return apply(params, images)


def flattened_across(apply, params, images):
    """Leading axes are flattened in one order and restored in another."""
    if images.dim() < 5:
        return apply(params, images)
    logits = apply(params, images.transpose(0, 1).flatten(0, 1))
    return logits.unflatten(0, images.shape[:2])


def standardised(apply, params, images):
    """By the image's own spread, which may be none."""
    return apply(params, images / images.std((-1, -2), keepdim=True))


def coarse(apply, params, images):
    """Parameters kept to five bits where images are of half precision."""
    kept = params if images.itemsize > 2 else tree.map(lambda p: (p * 16).round() / 16, params)
    return apply(kept, images)


def looked_at_turned(name):
    right = tiny("G2B:rank=3")

    def intermediates(params, images):
        aux = right.intermediates(params, images)
        return {k: v.mT if k.endswith(name) else v for k, v in aux.items()}

    return right._replace(intermediates=intermediates)


def looked_at_the_first():
    right = tiny("softmax")

    def intermediates(params, images):
        aux = right.intermediates(params, images)
        first = {k: v[:1].expand(v.shape) for k, v in aux.items()} if images.dim() > 3 else aux
        return {**first, "logits": aux["logits"]}

    return right._replace(intermediates=intermediates)


MODELS = {
    "gradient of the last block alone": (
        shared(lambda op, block: op if block == 1 else tree.map(torch.detach, op)),
        "universal_is_tied",
        TIED,
    ),
    "shared in the last block alone": (
        shared(lambda op, block: op if block == 1 else tree.map(torch.zeros_like, op)),
        "universal_is_tied",
        TIED,
    ),
    "statistics of the batch": (seeing(normalised_by_the_batch), "examples_stand_alone"),
    "first image for all": (
        seeing(lambda apply, p, images: apply(p, of_the_first(images, 3))),
        "examples_stand_alone",
    ),
    "dropout": (seeing(dropout), "inputs_untouched"),
    "other images without gradients": (
        answering(lambda apply, p, images: apply(p, trained_alone(images))),
        "inputs_untouched",
    ),
    "images normalised in place": (
        seeing(lambda apply, p, images: apply(p, doubled_in_place(images))),
        "inputs_untouched",
    ),
    "patches column by column": (
        seeing(lambda apply, p, images: apply(p, images.mT)),
        "patches_permute",
    ),
    "exactly one leading axis": (answering(of_a_batch), "keeps_shape_and_dtype"),
    "what is looked at is scaled": (
        answering(lambda apply, p, images: apply(p, images / 2)),
        "intermediates_agree",
    ),
    "init from the global seed": (
        tiny("softmax")._replace(init=global_head),
        "init_follows_its_generator",
    ),
    "init with a seed of its own": (
        tiny("softmax")._replace(init=own_head),
        "init_follows_its_generator",
    ),
    "branch on values": (
        seeing(lambda apply, p, images: apply(p, images * float(images.abs().max() < 9))),
        "vmap_is_a_loop",
    ),
    "gradients of the other example": (
        answering(lambda apply, p, images: Flipped.apply(apply(p, images))),
        "per_example_gradients",
    ),
    "class token detached": (
        seeing(lambda apply, p, images: apply({**p, "cls_token": p["cls_token"].detach()}, images)),
        "gradient_is_right",
    ),
    "no forward mode": (
        seeing(lambda apply, p, images: apply(p, OnceDifferentiable.apply(images))),
        "forward_meets_reverse",
    ),
    "class token without influence": (
        seeing(blind_to("cls_token")),
        "every_parameter_counts",
    ),
    "images in half precision": (seeing(low_in_float32), "float32_follows_float64"),
    "intermediates of the block before": (
        renamed(lambda i: max(0, i - 1)),
        "intermediates_are_of_their_block",
    ),
    "intermediates of the last block": (renamed(lambda i: 1), "intermediates_are_of_their_block"),
    "blocks numbered from the end": (renamed(lambda i: 1 - i), "intermediates_are_of_their_block"),
    "leading axes swapped where equal": (answering(swapped_leading), "keeps_shape_and_dtype"),
    "leading axes restored in another order": (
        answering(flattened_across),
        "keeps_shape_and_dtype",
    ),
    "divided by a spread of zero": (seeing(standardised), "finite"),
    "overflow of bright images": (
        seeing(lambda apply, p, images: apply(p, images.exp().log())),
        "finite",
    ),
    "coarse parameters in half precision": (seeing(coarse), "half_follows_float32"),
    "images clamped to eighths in half precision": (
        seeing(lambda apply, p, x: apply(p, x if x.itemsize > 2 else (x * 8).round() / 8)),
        "half_follows_float32",
    ),
    "another model of a batch of one": (
        answering(lambda apply, p, x: apply(p, x * (0.5 if x.dim() == 4 and len(x) == 1 else 1))),
        "keeps_shape_and_dtype",
    ),
    "intermediates of the first image for all": (looked_at_the_first(), "intermediates_agree"),
    "weights transposed": (looked_at_turned("weights"), "queries_come_before_keys"),
    "scores transposed": (looked_at_turned("scores"), "queries_come_before_keys"),
    "values transposed": (looked_at_turned("values"), "queries_come_before_keys"),
    "images taken for contiguous": (
        seeing(lambda apply, p, images: apply(p, raw_pointer(images))),
        "layout_does_not_matter",
    ),
    "class token with a constant backward": (
        seeing(lambda apply, p, x: apply(tree.map(ConstantBackward.apply, p), x)),
        "curvature_is_right",
    ),
    "parameters kept while the tensor is the same": (seeing(Stale(0)), "inputs_untouched"),
}


def plan(kind, table):
    return {
        f"{kind}: {name}": Bug(kind, wrong, by, *options)
        for name, (wrong, by, *options) in table.items()
    }


BUGS = {
    **plan("basis", BASES),
    **plan("operator", OPERATORS),
    **plan("projection", PROJECTIONS),
    **plan("kernel", KERNELS),
    **plan("step", STEPS),
    **plan("model", MODELS),
}
CHECKS = {
    "basis": testing.check_basis,
    "operator": testing.check_operator,
    "projection": testing.check_projection,
    "kernel": lambda bug, **options: testing.check_kernel(*bug, **options),
    "step": testing.check_step,
    "model": testing.check_model,
}


SUITES = {
    "basis": (*basis.PROPERTIES, *itertools.chain(*basis.OF_FAMILY.values())),
    "operator": operator.PROPERTIES,
    "projection": projection.PROPERTIES,
    "kernel": kernel.PROPERTIES,
    "step": step.PROPERTIES,
    "model": model.PROPERTIES,
}


@pytest.mark.parametrize("name", BUGS)
def test_the_suite_catches_the_planted_bug(name):
    bug = BUGS[name]
    check = CHECKS[bug.kind]
    (result,) = check(bug.wrong, only=[bug.caught_by], max_examples=60, **bug.options)
    assert result.passed is False, f"{name} survives {bug.caught_by}: {result.message}"
    for word in ("breaks", bug.caught_by, "smallest example", "what it means"):
        assert word in result.message
    print(result.message)


def test_features_kept_by_their_shape_have_a_gradient_once():
    kept = {}

    def keeping(x):
        return kept.setdefault((x.shape, x.dtype), torch.cat(harmonics(x), -1))

    (result,) = CHECKS["basis"](plain(keeping, 4), only=["compiles"])
    assert "has no gradient in x where" in result.message


@pytest.mark.parametrize("kind", SUITES)
def test_every_property_of_a_suite_has_a_bug_that_it_catches(kind):
    planted = {bug.caught_by for bug in BUGS.values() if bug.kind == kind}
    assert {prop.name for prop in SUITES[kind]} <= planted


def test_there_are_bugs_of_every_kind():
    assert len(BUGS) >= 25
    assert {bug.kind for bug in BUGS.values()} == set(CHECKS)


@pytest.mark.parametrize("kind", ["kernel", "step"])
def test_what_the_bugs_are_planted_in_is_right(kind):
    silent_attention = fast_attention(
        lambda q, k, v, mask: attention(q, silent(k, mask), silent(v, mask), mask)
    )
    rights = {
        "kernel": [(product(), {}), (fast_attention(attention), {}), (silent_attention, HIDES)],
        "step": [(learning(), {}), (adam(), {})],
    }
    for right, options in rights[kind]:
        results = CHECKS[kind](right, max_examples=5, **options)
        assert [result.message for result in results if result.passed is False] == []
    put = [result.name for result in results if result.passed]
    asked = {"kernel": "poison_stays_hidden", "step": "parameters_follow_the_formula"}
    assert asked[kind] in put


def test_a_step_may_have_no_metrics():
    right = learning()
    silent = right._replace(step=lambda state, batch: (right.step(state, batch)[0], None))
    results = testing.check_step(silent, max_examples=3)
    assert [result.message for result in results if result.passed is False] == []


SINE = {"smooth": math.inf, "periodic": 2 * math.pi, "bounded": 1.0, "parity": "odd"}


@pytest.mark.parametrize(
    ("function", "traits"),
    [
        # torch.compile traces no Function with a `setup_context` that saves for both modes
        (WithJvp, {"compiles": False}),
        (Generated, {"forward_mode": False, "compiles": False}),
        (
            OnceDifferentiable,
            {"forward_mode": False, "second_derivative": False, "compiles": False},
        ),
    ],
)
def test_a_right_function_of_autograd_passes(function, traits):
    own = plain(lambda x: function.apply(x)[..., None], 1, **SINE, **traits)
    results = testing.check_basis(own, max_examples=10)
    assert [result.message for result in results if result.passed is False] == []
    skipped = {result.name: result.message for result in results if result.passed is None}
    assert ("forward_meets_reverse" in skipped) == ("forward_mode" in traits)
    assert ("curvature_is_right" in skipped) == ("second_derivative" in traits)
    for trait in traits:
        assert f"{trait} is declared not to hold" in skipped.values()


def test_an_init_may_be_constant_or_seed_others_by_its_generator():
    def by_numpy(generator, shape):
        seed = int(torch.randint(2**31, (), generator=generator))
        values = numpy.random.default_rng(seed).normal(size=(*shape, 4))
        return {"coefs": torch.tensor(values, dtype=torch.float32)}

    def constant(generator, shape):
        return {"coefs": torch.tensor(numpy.linspace(-1.0, 1.0, 4)).float().repeat(*shape, 1)}

    for init in (by_numpy, constant):
        own = bases.fourier(2)._replace(init=init)
        (result,) = testing.check_basis(own, only=["init_follows_its_generator"])
        assert result.passed, result.message


def test_features_that_are_constant_pass():
    # of which vmap knows nothing but the shape of x
    ones = plain(lambda x: torch.ones(*x.shape, 1, dtype=x.dtype), 1)
    results = testing.check_basis(ones, max_examples=5)
    assert [result.message for result in results if result.passed is False] == []


@pytest.mark.parametrize(
    "function",
    [lambda x: x - torch.tanh(x), lambda x: x.abs() + torch.nn.functional.softplus(-2 * x.abs())],
    ids=["x - tanh x", "log cosh x"],
)
def test_a_right_function_whose_slopes_cancel_passes(function):
    own = plain(lambda x: function(x)[..., None], 1)
    (result,) = testing.check_basis(own, only=["forward_meets_reverse"], max_examples=200)
    assert result.passed, result.message


KERNEL_INPUTS = {
    "transposed": lambda source, rows: (torch.randn(3, rows, generator=source).mT,),
    "expanded": lambda source, rows: (torch.randn(1, 3, generator=source).expand(rows, 3),),
    "one that does not count": lambda source, rows: (
        torch.randn(rows, 3, generator=source),
        torch.randn(rows, generator=source),
    ),
}


@pytest.mark.parametrize("inputs", KERNEL_INPUTS)
def test_a_right_kernel_passes_on_whatever_its_inputs_are(inputs):
    results = testing.check_kernel(
        lambda x, *rest: 2 * (x / 2).sin() * (x / 2).cos(),
        lambda x, *rest: x.sin(),
        KERNEL_INPUTS[inputs],
        {"rows": [0, 1, 3]},
        max_examples=10,
        traits={"half": False},
    )
    assert [result.message for result in results if result.passed is False] == []


def test_entries_on_the_edge_may_belong_to_the_support():
    def project(y, dim=-1):
        x = y.to(torch.promote_types(y.dtype, torch.float32)).movedim(dim, -1)
        x = x - x.amax(-1, keepdim=True).detach()
        ranked = x.sort(-1, descending=True).values
        above = ranked.cumsum(-1) - 1
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        size = (ranked >= above / count).sum(-1, keepdim=True).clamp(min=1)
        level = above.gather(-1, size - 1) / size
        p = torch.where(x < level, 0, x - level)
        return p.movedim(-1, dim).to(y.dtype)

    (result,) = testing.check_projection(project, only=["large_rows"], max_examples=40)
    assert result.passed, result.message


def test_an_operator_inherits_what_its_units_do_not_hold_under():
    own = plain(lambda x: Generated.apply(x)[..., None], 1, forward_mode=False)
    op = operators.low_rank(own, 2, engine="torch")
    results = {r.name: r for r in testing.check_operator(op, max_examples=3)}
    assert results["forward_meets_reverse"].message == "forward_mode is declared not to hold"
    assert [r.message for r in results.values() if r.passed is False] == []


def test_expected_failures_of_what_is_not_asked_are_an_error():
    for name, traits in (("parity", {}), ("forward_meets_reverse", {"forward_mode": False})):
        own = plain(lambda x: x.cos()[..., None], 1, **traits)
        for make in (testing.check_basis, testing.basis_suite):
            with pytest.raises(ValueError, match=f"{name}, which is skipped: .* Remove the entry"):
                make(own, expected_failures={name: "unknown"})
