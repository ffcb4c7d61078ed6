"""Which of the learned functions are alike, and a formula for them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import schema
from kart.analysis import figures


def grid_weights(
    name: str, values: Tensor, x: Tensor, density: Tensor | None, shape: str = "(..., X)"
) -> Tensor:
    """The weights of the points of functions `values` of `shape` at `x (X)`, float64, of sum 1."""
    for argument, tensor in (("values", values), ("x", x)):
        schema.check_type(name, argument, tensor, Tensor)
    given = torch.ones_like(x) if density is None else density
    fits = x.dim() == 1 and values.shape[-1:] == x.shape == given.shape
    fits &= shape == "(..., X)" or values.dim() == 2
    fits = fits and bool(x.isfinite().all())
    if not fits or not bool((given >= 0).all()) or float(given.sum()) <= 0:
        raise ValueError(
            f"`{name}` needs values {shape}, x (X) and a density (X) >= 0, got "
            f"{tuple(values.shape)}, {tuple(x.shape)} and {tuple(given.shape)}. Take "
            "`functions.curves`, flattened, and `density` at the same x."
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"`{name}` needs finite values, got {int((~values.isfinite()).sum())} values nan or "
            "inf. Leave them out."
        )
    given = given.double().to(values.device)
    return given / given.sum()


def _checked(name: str, values: Tensor, x: Tensor, density: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values `(n, X)` less their means, each point times the root of its weight, and those roots;
    float64.
    """
    weights = grid_weights(name, values, x, density, "(n, X)")
    centred = values.double() - (values.double() * weights).sum(-1, keepdim=True)
    return centred * weights.sqrt(), weights.sqrt()


class Clusters(NamedTuple):
    """Alike functions: the cluster of each, `(n,)`, -1 for none; the leaders, `(clusters,)`."""

    labels: Tensor
    leaders: Tensor


def clusters(
    values: Tensor,
    x: Tensor,
    density: Tensor | None = None,
    *,
    similarity: float = 0.95,
    count: int = 8,
) -> Clusters:
    """Groups functions `values (n, X)` at `x (X)` that are alike up to an affine map of their
    values: those whose correlation over `density (X)`, without its sign, is at least `similarity`.

    The function with the largest variance leads the first cluster, which takes all that are alike
    to it; the largest of the rest leads the next, up to `count` clusters. What is left, and
    functions that are constant, are in none.

    >>> x = torch.linspace(-1, 1, 9)
    >>> found = clusters(torch.stack([x, 5 * x**2, 1 - 3 * x, x**2, 0 * x]), x)
    >>> found.labels.tolist(), found.leaders.tolist()
    ([0, 1, 0, 1, -1], [2, 1])
    """
    fitting = schema.fits(similarity, float) and schema.fits(count, int)
    if not fitting or not 0 < similarity <= 1 or count < 1:
        raise ValueError(
            f"`clusters` needs 0 < `similarity` <= 1 and `count` >= 1, got {similarity!r} and "
            f"{count!r}. Leave them out."
        )
    centred, roots = _checked("clusters", values, x, density)
    size = centred.norm(dim=-1)
    # rounding is no shape
    shaped = size > 1e-7 * (values.double().abs() * roots).norm(dim=-1)
    rows = centred / torch.where(shaped, size, 1.0)[:, None]
    labels = torch.full((len(values),), -1, device=values.device)
    left, leaders = shaped.clone(), []
    while bool(left.any()) and len(leaders) < count:
        leader = int(torch.where(left, size, -1.0).argmax())
        alike = left & ((rows @ rows[leader]).abs() >= similarity)
        alike[leader] = True
        labels[alike] = len(leaders)
        left &= ~alike
        leaders.append(leader)
    return Clusters(labels, torch.tensor(leaders, dtype=torch.long, device=values.device))


class Shape(NamedTuple):
    """A function of one variable, how it is written, and what changes the shape of f(b (x - t)), up
    to an affine map of its values: the size of b, its sign, t.
    """

    function: Callable[[Tensor], Tensor]
    text: str
    scaled: bool = False
    turned: bool = False
    moved: bool = False


# from simple to less so: of two that fit alike the first is taken
SHAPES = {
    "affine": Shape(lambda u: u, "{u}"),
    "square": Shape(torch.square, "({u})^2", moved=True),
    "exp": Shape(torch.exp, "exp({u})", scaled=True, turned=True),
    "sin": Shape(torch.sin, "sin({u})", scaled=True, moved=True),
    "abs": Shape(torch.abs, "|{u}|", moved=True),
    "relu": Shape(torch.relu, "max({u}, 0)", turned=True, moved=True),
    "tanh": Shape(torch.tanh, "tanh({u})", scaled=True, moved=True),
    "gauss": Shape(lambda u: torch.exp(-u * u), "exp(-({u})^2)", scaled=True, moved=True),
    "cube": Shape(lambda u: u**3, "({u})^3", moved=True),
    "lorentz": Shape(lambda u: 1 / (1 + u * u), "1 / (1 + ({u})^2)", scaled=True, moved=True),
}


class Candidate(NamedTuple):
    """A formula `a f(b x + c) + d` of a function, f by its name in `SHAPES`, and its R^2."""

    name: str
    formula: str
    r2: float
    a: float
    b: float
    c: float
    d: float

    def __call__(self, x: Tensor) -> Tensor:
        """The formula's values at `x (...)`."""
        if self.name == "constant":
            return torch.full_like(x, self.d)
        return self.a * SHAPES[self.name].function(self.b * x + self.c) + self.d


def candidate(
    values: Tensor, x: Tensor, density: Tensor | None = None, *, margin: float = 0.005
) -> Candidate:
    """The simplest formula `a f(b x + c) + d` for a function `values (X)` at `x (X)`, with f among
    `SHAPES`, whose R^2 is within `margin` of the best.

    R^2 is the share of the variance over `density (X)` that the formula explains; a and d are least
    squares, b and c from a grid that is drawn closer ten times.

    >>> x = torch.linspace(-3, 3, 61)
    >>> found = candidate(2 * torch.sin(1.5 * x) + 1, x)
    >>> found.name, round(found.r2, 4), found.formula
    ('sin', 1.0, '2 sin(1.5 x) + 1')
    """
    if not schema.fits(margin, float) or not 0 <= margin <= 1:
        raise ValueError(f"`candidate` needs 0 <= `margin` <= 1, got {margin!r}. Leave it out.")
    schema.check_type("candidate", "values", values, Tensor)
    centred, roots = _checked("candidate", values[None], x, density)
    target, whole = centred[0], float(centred[0].square().sum())
    mean = float((values.double() * roots.square()).sum())
    if whole <= 1e-14 * float((values.double() * roots).square().sum()):
        return Candidate("constant", f"{mean:.3g}", 1.0, 0.0, 0.0, 0.0, mean)
    x = x.double().to(values.device)
    found = [_fit(name, target, mean, x, roots) for name in SHAPES]
    best = max(one.r2 for one in found)
    return next(one for one in found if one.r2 >= best - margin)


def _fit(name: str, target: Tensor, mean: float, x: Tensor, roots: Tensor) -> Candidate:
    shape, whole = SHAPES[name], float(target.square().sum())

    def best(scales: Tensor, places: Tensor) -> tuple[float, float, float, float, float]:
        """R^2, a, d, b and t of the best of all scales b and places t; a, d by least squares."""
        b, t = (v.flatten() for v in torch.meshgrid(scales, places, indexing="ij"))
        f = shape.function((b[:, None] * (x - t[:, None])).clamp(-50, 50))
        means = (f * roots.square()).sum(-1)
        rows = (f - means[:, None]) * roots
        size = rows.square().sum(-1)
        along = rows @ target
        # a shape that is flat where scores are has no part in the fit
        flat = size <= 1e-12 * (f * roots).square().sum(-1)
        r2 = torch.where(flat, 0.0, along.square() / torch.where(flat, 1.0, size) / whole)
        i = int(r2.argmax())
        a = 0.0 if bool(flat[i]) else float(along[i] / size[i])
        return min(float(r2[i]), 1.0), a, mean - a * float(means[i]), float(b[i]), float(t[i])

    middle, half = float(x.max() + x.min()) / 2, float(x.max() - x.min()) / 2
    scales = torch.logspace(-1, 1.4, 37, dtype=x.dtype, device=x.device) / half
    scales = scales if shape.scaled else scales.new_ones(1)
    scales = torch.cat([scales, -scales]) if shape.turned else scales
    places = middle + 1.5 * half * torch.linspace(-1, 1, 49, dtype=x.dtype, device=x.device)
    places = places if shape.moved else places.new_full((1,), middle)
    ratio, step = math.exp(2.4 * math.log(10) / 36), 3 * half / 48
    near = torch.linspace(-1, 1, 9, dtype=x.dtype, device=x.device)
    r2, a, d, b, t = best(scales, places)
    for _ in range(10):
        scales = b * ratio**near if shape.scaled else scales
        places = t + step * near if shape.moved else places
        r2, a, d, b, t = best(scales, places)
        ratio, step = ratio**0.4, 0.4 * step
    u = b * x - b * t
    reach = float(x.abs().max()), float(shape.function(u.clamp(-50, 50)).abs().max())
    return Candidate(name, _written(shape, a, b, -b * t, d, reach), r2, a, b, -b * t, d)


def _written(
    shape: Shape, a: float, b: float, c: float, d: float, reach: tuple[float, float]
) -> str:
    """The formula with three digits, without what rounds to nothing beside the rest, where x and
    f(b x + c) do not go beyond `reach`.
    """
    wide, high = (min(1.0, far) for far in reach)

    def sum_of(first: str, second: float, beside: float) -> str:
        if abs(second) <= 5e-4 * beside:
            return first
        return f"{first} {'-' if second < 0 else '+'} {abs(second):.3g}"

    def times(factor: float, what: str) -> str:
        shown = f"{factor:.3g}"
        return {"1": what, "-1": f"-{what}"}.get(shown, f"{shown} {what}")

    inner = shape.text.format(u=sum_of(times(b, "x"), c, wide * abs(b)))
    if shape is SHAPES["affine"]:
        a, d, inner, high = a * b, d + a * c, "x", wide
    return sum_of(times(a, inner), d, high * abs(a))


def plot(values: Tensor, x: Tensor, found: Clusters, formulas: Sequence[Candidate] = ()) -> Any:
    """A matplotlib Figure, a panel a cluster: some of its functions, less their mean and of one
    size and sign, the leading one thick, its formula dotted and in the title.

    Args:
        values, x, found: of `clusters`.
        formulas: the `candidate` of each leader, where it was sought.
    """
    count = len(found.leaders)
    if not count or (formulas and len(formulas) != count):
        raise ValueError(
            f"`plot` needs clusters and a formula for each or for none, got {count} clusters and "
            f"{len(formulas)} formulas. Pass `candidate` of each leader."
        )
    fig, axes = figures.panels(count, 4, 2.1, 1.8, sharex=True)
    centred = values.detach().double() - values.detach().double().mean(-1, keepdim=True)
    size = centred.norm(dim=-1, keepdim=True).clamp(min=1e-300) / len(x) ** 0.5
    where = x.cpu().numpy()
    for i, ax in enumerate(axes):
        leader = int(found.leaders[i])
        members = (found.labels == i).nonzero().flatten()
        rows = (centred / size)[members[:: max(1, len(members) // 40)]]
        rows = rows * torch.sign(rows @ centred[leader])[:, None]
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        ax.plot(where, rows.mT.cpu().numpy(), color=colour, lw=0.5, alpha=0.4)
        ax.plot(where, (centred / size)[leader].cpu().numpy(), color=colour, lw=1.6)
        title = f"{len(members)} of {len(values)}"
        if formulas:
            fit = formulas[i](x.double())
            fit = (fit - values[leader].double().mean()) / size[leader]
            ax.plot(where, fit.cpu().numpy(), color=figures.INK, lw=0.9, ls=(0, (1, 1.5)))
            title += f"\n{formulas[i].formula}\nR² {formulas[i].r2:.3f}"
        ax.set_title(title, fontsize=7, color=figures.INK)
    fig.supxlabel("score", fontsize=8, color=figures.INK)
    fig.supylabel("φ, centred, of size 1", fontsize=8, color=figures.INK)
    return fig
