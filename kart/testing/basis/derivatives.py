"""The derivatives of a basis: those of its values, finite, and the same in both modes."""

import functools

import torch
from torch import Tensor
from torch.func import grad

from kart import tree
from kart.testing import draw
from kart.testing.basis.subject import THETA_X, Params, Subject, rows, setting, within
from kart.testing.core import Property, show
from kart.testing.draw import Theta
from kart.testing.laws import adjoint, check_slope, every_leaf_counts, slope


def finite_with_derivatives(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi, phi', phi'' and d phi / d theta are finite in float32 for abs(x) <= `finite`, 100 where
    it is not declared.

    An overflow, a pole, 0/0 or sqrt at zero: one such score ends a training run. A NaN in a
    derivative alone is mostly `torch.where` around a division.
    """
    params, values = setting(s, theta, x, torch.float32)

    def total(params: Params, values: Tensor) -> Tensor:
        return s.basis.apply(params, values).sum()

    def slope(values: Tensor) -> Tensor:
        return grad(total, 1)(params, values).sum()

    first = grad(total, (0, 1))(params, values)
    found = {"phi(x)": s.basis.apply(params, values), "phi'(x)": first[1]}
    if s.traits.get("second_derivative", True):
        found |= {"phi''(x)": grad(slope)(values)}
    found |= {f"d phi / d {name}": leaf for name, leaf in tree.named(first[0]).items()}
    for name, leaf in found.items():
        if not bool(leaf.isfinite().all()):
            raise AssertionError(f"{name} is {show(leaf)}")


def forward_meets_reverse(s: Subject, theta: Theta, x: list[float], seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of phi in (theta, x).

    Forward and reverse mode disagree: a custom derivative is wrong in one of them, or missing.
    """
    at = setting(s, theta, x, torch.float64)
    adjoint(s.basis.apply, at, seed, 1.0, (0.0, -0.5, 0.5, -1.0, 1.0))


def _clear(s: Subject, x: Tensor) -> Tensor:
    """`x`, moved off places where the function may have a kink, unless it is declared smooth."""
    if s.traits.get("smooth", 0) >= 2:
        return x
    kinks = torch.tensor([*draw.SIMPLE, *s.points], dtype=x.dtype)
    distance = (x[:, None] - kinks).abs().amin(-1)
    return torch.where(distance < 1e-3 * s.reach, x + 0.0137 * s.reach, x)


def gradient_is_right(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi'(x) by autograd lies between the two one-sided difference quotients, away from kinks.

    The gradient is not that of the value: a wrong custom backward, or a value computed outside
    autograd (`.detach()`, numpy, rounding).
    """
    params, values = setting(s, theta, x, torch.float64)
    values = _clear(s, values)
    check_slope(lambda x: s.basis.apply(params, x), values, s.reach, "phi'(x)")


def curvature_is_right(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi''(x) by autograd lies between the one-sided difference quotients of phi', away from
    kinks.

    Hessian-vector products (sharpness, loss landscapes) need the second derivative; a custom
    backward is often not differentiable itself.
    """
    params, values = setting(s, theta, x, torch.float64)
    values = _clear(s, values)
    phi = functools.partial(s.basis.apply, params)
    check_slope(lambda x: slope(phi, x), values, s.reach, "phi''(x)")


def parameter_gradient_is_right(s: Subject, theta: Theta, x: list[float], seed: int) -> None:
    """d phi / d theta by autograd lies between the one-sided difference quotients along any line.

    The parameters get a wrong gradient, and training follows it.
    """
    params, values = setting(s, theta, x, torch.float64)
    source = draw.generator(seed)
    line = tree.map(lambda p: torch.randn(p.shape, generator=source, dtype=p.dtype), params)

    def along(t: Tensor) -> Tensor:
        def moved(p: Tensor, d: Tensor) -> Tensor:
            return p + t.view(*t.shape, *[1] * (p.dim() - 1)) * d

        return s.basis.apply(tree.map(moved, params, line), values)

    check_slope(along, torch.zeros_like(values), 1.0, "d phi / d theta")


def every_parameter_counts(s: Subject, seed: int) -> None:
    """d phi / d theta is not zero over the reach of the basis for any leaf theta.

    A parameter is drawn, counted and saved, but not used.
    """
    x = torch.linspace(-s.reach, s.reach, 32, dtype=torch.float64)
    # of several functions: one may be zero at all of these places
    params = s.params(Theta(seed, 1.0), (8,), torch.float64)
    every_leaf_counts(lambda params: s.basis.apply(params, x[:, None]), params, seed)


PROPERTIES = (
    Property(finite_with_derivatives, {**THETA_X, "x": rows(within)}),
    Property(forward_meets_reverse, {**THETA_X, "seed": draw.seeds}, "forward_mode"),
    Property(gradient_is_right, THETA_X),
    Property(curvature_is_right, THETA_X, "second_derivative"),
    Property(parameter_gradient_is_right, {**THETA_X, "seed": draw.seeds}),
    Property(every_parameter_counts, {"seed": draw.seeds}),
)
