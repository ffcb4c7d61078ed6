"""The curvature of a loss: products with its Hessian, eigenvalues, trace, spectral density, and the
noise of its gradients.

Everything is a function of `loss(params) -> ()` and a tree `params`; nothing holds a Hessian. For a
part of the parameters, `subset` gives the loss and the tree to pass instead.

    part, some = curvature.subset(loss, params, "*.operator.*")
    curvature.top_eigenvalues(part, some, 5, torch.Generator())
"""

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import grad, jvp, vmap

from kart import pages, schema, tree
from kart.analysis import figures
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Member,
    differences,
    own_params,
    scalars,
    seeds_table,
)

Params = Any
Loss = Callable[[Params], Tensor]

# of the section: what is left open by the number of images is in `Context.examples`
OPERATOR = "*.operator.*"
SAMPLES = 8  # products that the trace is estimated from
STEPS = 24  # products that the density is from
TOLERANCE = 0.02  # of the largest eigenvalue
# what `top_eigenvalues` sorts by
WHICH: dict[str, Callable[[Tensor], Tensor]] = {
    "magnitude": torch.abs,
    "largest": torch.clone,
    "smallest": torch.neg,
}


def hvp(loss: Loss, params: Params, vector: Params) -> Params:
    """The Hessian of `loss` at `params` times `vector`, all of one structure (forward over
    reverse, Pearlmutter 1994).

    >>> hvp(lambda w: (torch.tensor([1.0, 2.0]) * w**2).sum(), torch.ones(2), torch.ones(2))
    tensor([2., 4.])
    """
    tree.check_floating("hvp", params)
    tree.map(_check_like, params, vector)
    return jvp(grad(loss), (params,), (vector,))[1]


def _check_like(leaf: Tensor, other: Tensor) -> None:
    schema.check_type("hvp", "vector", other, Tensor)
    if leaf.shape != other.shape or leaf.dtype != other.dtype:
        raise ValueError(
            f"`hvp` needs a vector of the shapes and dtypes of `params`, got {other.dtype} "
            f"{tuple(other.shape)} for {leaf.dtype} {tuple(leaf.shape)}. Make it with tree.map."
        )


def subset(loss: Loss, params: Params, pattern: str) -> tuple[Loss, dict[str, Tensor]]:
    """The loss as a function of some of the parameters, the others held, and those parameters.

    They are the leaves whose dotted path matches `pattern` as file names do, with or without a dot
    before it: "*.operator.*" is every operator, "blocks.0.*" the first block. They come by path.

    >>> params = {"a": torch.ones(2), "b": torch.ones(2)}
    >>> part, some = subset(lambda p: (p["a"] ** 2 * p["b"]).sum(), params, "a")
    >>> hvp(part, some, some)
    {'a': tensor([2., 2.])}
    """
    named = tree.named(params)
    chosen = {
        name: leaf
        for name, leaf in named.items()
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f".{name}", pattern)
    }
    if not chosen:
        shown = ", ".join(list(named)[:4])
        raise ValueError(
            f"`subset` needs a pattern that matches a path of `params`, got {pattern!r}. "
            f"The {len(named)} paths are {shown}{', ...' if len(named) > 4 else ''}."
        )

    def part(some: dict[str, Tensor]) -> Tensor:
        return loss(tree.map_named(lambda name, leaf: some.get(name, leaf), params))

    return part, chosen


class _Space:
    """Krylov vectors `basis (m + 1, P)` of a Hessian, orthonormal, in float32 at least, and the
    Hessian among them, `projected (m, m)`, float64. `precision` is that of its products.
    """

    def __init__(self, loss: Loss, params: Params, steps: int):
        tree.check_floating("the curvature", params)
        start = tree.ravel(params)
        if not start.numel():
            raise ValueError("the curvature needs parameters, got none. Pass those of the loss.")
        # no graph of what the caller trains is kept from one product to the next
        self.loss, self.params, self.size = loss, tree.map(Tensor.detach, params), start.numel()
        self.precision = max(torch.finfo(leaf.dtype).eps for leaf in tree.leaves(params))
        # vectors of half precision would soon not be orthogonal
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.basis = torch.zeros(steps + 1, self.size, dtype=dtype, device=start.device)
        self.projected = torch.zeros(steps, steps, dtype=torch.float64, device=start.device)

    def normal(self, generator: Generator) -> Tensor:
        drawn = torch.randn(self.size, generator=generator, device=generator.device)
        return drawn.to(self.basis)

    def product(self, vector: Tensor) -> Tensor:
        like = tree.unravel(vector, self.params)
        found = tree.ravel(hvp(self.loss, self.params, like)).to(self.basis)
        if not bool(found.isfinite().all()):
            raise ValueError(
                "the curvature needs finite second derivatives, got nan or inf. "
                "Look whether the loss is finite at these parameters."
            )
        return found

    def remainder(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What the first `count` vectors leave of `vector`, and what they take."""
        basis = self.basis[:count]
        along = basis @ vector
        vector = vector - along @ basis
        # once more: what rounding left of a long vector is no longer orthogonal (Giraud 2005)
        again = basis @ vector
        return vector - again @ basis, along + again

    def grow(self, start: int, stop: int, generator: Generator | None) -> tuple[int, float]:
        """Adds vectors `start + 1` to `stop`; returns how many are multiplied, and the size of what
        the last of them leaves.

        Where they span an invariant space a vector drawn from `generator` goes on, by which the
        copies of a multiple eigenvalue are found; without a generator it ends there.
        """
        left = 0.0
        for j in range(start, stop):
            rest, along = self.remainder(self.product(self.basis[j]), j + 1)
            self.projected[: j + 1, j] = self.projected[j, : j + 1] = along.double()
            left = float(torch.linalg.vector_norm(rest))
            # within rounding of the numbers seen so far
            scale = float(self.projected[: j + 1, : j + 1].abs().max())
            if left <= 100 * torch.finfo(self.basis.dtype).eps * scale:
                left = 0.0
                if generator is None or j + 1 == self.size:
                    return j + 1, left
                rest = self.remainder(self.normal(generator), j + 1)[0]
            self.basis[j + 1] = rest / torch.linalg.vector_norm(rest)
        return stop, left


def top_eigenvalues(
    loss: Loss,
    params: Params,
    count: int,
    generator: Generator,
    *,
    which: str = "magnitude",
    vectors: int | None = None,
    tolerance: float | None = None,
    limit: int = 1000,
) -> Tensor:
    """The `count` eigenvalues of the Hessian of largest magnitude, `(count,)`, descending by it, or
    of another end of the spectrum.

    Lanczos with full orthogonalisation and thick restarts (Wu and Simon 2000), in the dtype of
    `params`, float32 at least. A multiple eigenvalue is counted as often as it occurs where
    `vectors` reaches P, else perhaps once, as by every method that starts from one vector.

    Args:
        which: "magnitude", "largest" (descending; the first is the sharpness) or "smallest"
            (ascending; negative where the weights are no minimum).
        vectors: how many vectors of P are held; default 2 `count` + 20, at most P.
        tolerance: residual over the largest magnitude at which an eigenvalue counts as found;
            default the square root of the precision of `params`. Its error is below that, and about
            the square of it where it lies apart.
        limit: how many Hessian-vector products may be spent, `vectors` of them at the start.

    Raises ValueError where the limit does not suffice.

    >>> loss = lambda w: (torch.tensor([1.0, -4.0, 2.0]) * w**2).sum()
    >>> top_eigenvalues(loss, torch.ones(3), 2, torch.Generator())
    tensor([-8.,  4.])
    >>> top_eigenvalues(loss, torch.ones(3), 2, torch.Generator(), which="largest")
    tensor([4., 2.])
    """
    schema.check_choice("top_eigenvalues", "which", which, WHICH)
    schema.check_type("top_eigenvalues", "generator", generator, Generator)
    tree.check_floating("top_eigenvalues", params)
    size = tree.size(params)
    if not schema.fits(count, int) or not 1 <= count <= size:
        raise ValueError(
            f"`top_eigenvalues` needs 1 <= `count` <= {size}, the number of parameters, got "
            f"{count!r}. Ask for 5."
        )
    steps = 2 * count + 20 if vectors is None else vectors
    if not schema.fits(steps, int) or steps < min(size, count + 2):
        raise ValueError(
            f"`top_eigenvalues` needs `vectors` >= {min(size, count + 2)}, got {vectors}. "
            "Leave it out."
        )
    schema.check_integer("top_eigenvalues", "limit", limit, 0, "Leave it out.")
    given = schema.fits(tolerance, float | None)
    if not given or (tolerance is not None and not 0 < tolerance < 1):
        raise ValueError(
            f"`top_eigenvalues` needs 0 < `tolerance` < 1, got {tolerance!r}. Leave it out."
        )
    steps = min(size, steps)
    space = _Space(loss, params, steps)
    dtype = space.basis.dtype
    close = space.precision**0.5 if tolerance is None else tolerance
    first = space.normal(generator)
    space.basis[0] = first / torch.linalg.vector_norm(first)
    kept = used = found = 0
    while True:
        if used + steps - kept > limit:
            raise ValueError(
                f"`top_eigenvalues` needs more than {limit} Hessian-vector products for {count} "
                f"eigenvalues, got {found} of them. Raise `limit` or `tolerance`, or ask for fewer."
            )
        filled, left = space.grow(kept, steps, generator)
        used += filled - kept
        values, directions = torch.linalg.eigh(space.projected)
        order = WHICH[which](values).argsort(descending=True)
        largest = float(values.abs().max())
        residuals = left * directions[-1, order[:count]].abs()
        found = int((residuals <= close * largest).sum())
        if filled == size or found == count:
            return values[order[:count]].to(dtype)
        # the wanted vectors and as many of the next as let the new ones be half of the space
        kept = min(count + (steps - count) // 2, steps - 1)
        best = order[:kept]
        ritz = directions[:, best].mT.to(dtype) @ space.basis[:steps]
        space.basis[:kept], space.basis[kept] = ritz, space.basis[steps].clone()
        space.projected.zero_()
        space.projected.diagonal()[:kept] = values[best]


def _probes(space: _Space, samples: int, generator: Generator) -> Iterator[Tensor]:
    """At most `samples` vectors: independent signs, or each unit vector where they suffice."""
    like = space.basis[0]
    for i in range(min(samples, space.size)):
        if samples >= space.size:
            vector = torch.zeros_like(like)
            vector[i] = 1
            yield vector
        else:
            drawn = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
            yield (2 * drawn - 1).to(like)


class Trace(NamedTuple):
    """An estimate of the trace of a Hessian, `()`, and its standard error, `()`."""

    estimate: Tensor
    error: Tensor


def trace(loss: Loss, params: Params, samples: int, generator: Generator) -> Trace:
    """Trace of the Hessian and the standard error of the estimate, from `samples` products.

    The mean of z^T H z over vectors z of random signs (Hutchinson 1989). With as many samples as
    parameters, or more, the diagonal is summed instead: then the error is that of rounding.

    >>> estimate, error = trace(lambda w: (3 * w**2).sum(), torch.ones(4), 2, torch.Generator())
    >>> float(estimate)
    24.0
    """
    schema.check_integer("trace", "samples", samples, 2, "20 is a start.")
    schema.check_type("trace", "generator", generator, Generator)
    space = _Space(loss, params, 0)
    vectors = _probes(space, samples, generator)
    terms = torch.stack([(z.double() * space.product(z).double()).sum() for z in vectors])
    exact = samples >= space.size
    terms = terms * space.size if exact else terms
    rounding = space.precision * terms.abs().mean()
    spread = terms.new_zeros(()) if exact else terms.std() / samples**0.5
    dtype = space.basis.dtype
    return Trace(terms.mean().to(dtype), torch.maximum(spread, rounding).to(dtype))


class Density(NamedTuple):
    """A density `(points,)` over eigenvalues `grid (points,)`, float64."""

    grid: Tensor
    density: Tensor


def spectral_density(
    loss: Loss,
    params: Params,
    samples: int,
    generator: Generator,
    *,
    steps: int = 64,
    points: int = 1024,
    width: float | None = None,
) -> Density:
    """Density of the eigenvalues of the Hessian, of integral 1, each spread to a Gaussian.

    Stochastic Lanczos quadrature (Ghorbani et al. 2019): the mean over `samples` vectors of random
    signs, `steps` products each. With as many samples as parameters each axis is a start, and with
    as many steps as there are distinct eigenvalues nothing is left to chance.

    Args:
        width: standard deviation of the Gaussians; default 1 % of the range of the eigenvalues.

    >>> loss = lambda w: (torch.tensor([1.0, 3.0]) * w**2).sum()
    >>> grid, density = spectral_density(loss, torch.ones(2), 2, torch.Generator(), width=0.5)
    >>> round(float(torch.trapezoid(density, grid)), 6)
    1.0
    """
    schema.check_integer("spectral_density", "samples", samples, 1, "20 is a start.")
    schema.check_type("spectral_density", "generator", generator, Generator)
    tree.check_floating("spectral_density", params)
    size = tree.size(params)
    kinds = ((steps, int), (points, int), (width, float | None))
    fitting = all(schema.fits(value, kind) for value, kind in kinds)
    fitting = fitting and (width is None or 0 < width < math.inf)
    if not fitting or steps < 1 or points < 2:
        raise ValueError(
            f"`spectral_density` needs integers `steps` >= 1 and `points` >= 2, and `width` > 0, "
            f"got {steps!r}, {points!r} and {width!r}. Leave them out."
        )
    space = _Space(loss, params, min(steps, size))
    nodes, shares = [], []
    for start in _probes(space, samples, generator):
        space.basis[0] = start / torch.linalg.vector_norm(start)
        filled, _ = space.grow(0, min(steps, size), None)
        values, directions = torch.linalg.eigh(space.projected[:filled, :filled])
        nodes.append(values)
        shares.append(directions[0].square() / min(samples, size))
    node, share = torch.cat(nodes), torch.cat(shares)
    low, high = float(node.min()), float(node.max())
    # one eigenvalue alone has no range but rounding: a percent of itself, or of 1 where it is zero
    scale, largest = high - low, max(abs(low), abs(high))
    if scale <= 100 * torch.finfo(space.basis.dtype).eps * largest:
        scale = largest or 1.0
    sigma = 0.01 * scale if width is None else width
    low, high = low - 6 * sigma, high + 6 * sigma
    if (high - low) / (points - 1) > sigma:
        raise ValueError(
            f"`spectral_density` needs `points` >= {math.ceil((high - low) / sigma) + 1} for peaks "
            f"of this width, got {points}. Pass more, or a larger `width`."
        )
    grid = torch.linspace(low, high, points, dtype=torch.float64, device=node.device)
    peaks = torch.exp(-0.5 * ((grid - node[:, None]) / sigma).square())
    return Density(grid, share @ peaks / (sigma * math.sqrt(2 * math.pi)))


class NoiseScale(NamedTuple):
    """The noise of gradients, `()` each, float64: the simple noise scale in examples, and what it
    is the ratio of, the trace of the covariance of an example's gradient and the squared norm of
    the true gradient.
    """

    scale: Tensor
    covariance_trace: Tensor
    gradient_square: Tensor


def noise_scale(
    loss: Callable[..., Tensor], params: Params, *examples: Tensor, chunk: int = 32
) -> NoiseScale:
    """The batch size at which noise and signal of the gradient are equal (McCandlish et al. 2018).

    Unbiased estimates of tr Sigma and of |G|^2 from the gradients of n examples; the latter may
    come out negative where n is too small to see the gradient, then the scale is infinite.

    Args:
        loss: `loss(params, *example) -> ()` of one example.
        examples: tensors `(n, ...)`, such as images and targets.
        chunk: how many gradients are held at a time.

    >>> noise = noise_scale(lambda w, x: w * x, torch.ones(()), torch.tensor([1.0, 2.0, 3.0]))
    >>> [round(float(x), 4) for x in noise]
    [0.2727, 1.0, 3.6667]
    """
    for one in examples:
        schema.check_type("noise_scale", "examples", one, Tensor)
    counts = {len(x) if x.dim() else 0 for x in examples}
    n = counts.pop() if len(counts) == 1 else 0
    if n < 2 or not schema.fits(chunk, int) or chunk < 1:
        raise ValueError(
            f"`noise_scale` needs tensors of n >= 2 examples each and `chunk` >= 1, got "
            f"{[tuple(x.shape) for x in examples]} and {chunk!r}. Pass images and targets of "
            "a batch."
        )
    tree.check_floating("noise_scale", params)
    params = tree.map(Tensor.detach, params)
    # where a loss draws numbers, as for dropout, each example has its own
    each_of = (None, *(0 for _ in examples))
    gradients = vmap(grad(loss), in_dims=each_of, randomness="different")
    total: list[Tensor] | None = None
    square = 0.0
    for parts in zip(*(x.split(chunk) for x in examples), strict=True):
        leaves = [g.double() for g in tree.leaves(gradients(params, *parts))]
        sums = [g.sum(0) for g in leaves]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
        square = square + sum(g.square().sum() for g in leaves)
    assert total is not None
    each = torch.as_tensor(square) / n  # E|g|^2 = |G|^2 + tr Sigma
    mean = sum(((x / n).square().sum() for x in total), torch.zeros_like(each))  # .. + tr Sigma / n
    covariance = (each - mean).clamp(min=0) * n / (n - 1)  # equal gradients differ by roundings
    signal = (n * mean - each) / (n - 1)
    scale = torch.where(signal <= 0, math.inf, covariance / signal.clamp(min=1e-300))
    return NoiseScale(scale, covariance, signal)


def plot(densities: Mapping[str, Density]) -> Any:
    """A matplotlib Figure of spectral densities by name, on logarithmic axes: a peak of one
    eigenvalue in a hundred thousand is still seen, and a density of a narrow range beside one of a
    wide range.
    """
    if not densities:
        raise ValueError("`plot` needs at least one density, got none. Pass {name: density}.")
    fig, (ax,) = figures.panels(1, 1, 4.4, 2.7)
    tops = [float(found.density.max()) for found in densities.values()]
    narrow = min(float(found.grid[-1] - found.grid[0]) for found in densities.values())
    for i, (name, found) in enumerate(densities.items()):
        x, y = found.grid.cpu().numpy(), found.density.cpu().numpy()
        ax.plot(x, y, lw=1.2, label=name, **figures.look(i))
    ax.set_yscale("log")
    ax.set_ylim(1e-7 * min(tops), 2 * max(tops))
    ax.set_xscale("symlog", linthresh=narrow / 10)
    ax.axvline(0, color=figures.QUIET, lw=0.5)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("density, per unit")
    figures.legend(fig)
    return fig


# --- the section ----------------------------------------------------------------------------------


def _few(context: Context) -> int:
    """A quarter of the images that losses are taken on: a product costs several gradients."""
    return max(2, context.examples // 4)


def _loss(context: Context, member: Member) -> Loss:
    losses = context.losses(context.model(member.config), member.params)
    images, labels = context.images(member.config, _few(context))
    return lambda params: losses(params, images, labels).mean()


def _curvature(context: Context, member: Member, pattern: str) -> dict[str, Tensor]:
    part, some = subset(_loss(context, member), own_params(member.params), pattern)
    size = tree.size(some)
    context.holds(f"24 vectors of the {size:,} weights of {member.name}", 4 * 24 * size / 2**20)

    def compute() -> dict[str, Tensor]:
        draws = context.generator(pattern, member.seed)
        top = top_eigenvalues(part, some, 1, draws, which="largest", tolerance=TOLERANCE)[0]
        context.check()
        found = trace(part, some, SAMPLES, draws)
        return {"top": top, "trace": found.estimate, "trace_error": found.error}

    count = context.available(_few(context))
    what = f"{pattern} largest images={count} samples={SAMPLES}"
    found = context.kept(what, member, compute)
    return {**found, "mean": found["trace"] / size}


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """Largest eigenvalue and trace, of all parameters and of the operator's alone, the noise scale
    of the gradient, and of the first seed the density of the eigenvalues.
    """
    found = _curvature(context, member, "*")
    params = own_params(member.params)
    if any("operator" in name.split(".") for name in tree.named(params)):
        own = _curvature(context, member, OPERATOR)
        found |= {f"operator_{name}": value for name, value in own.items()}
    losses = context.losses(context.model(member.config), member.params)

    def noise() -> dict[str, Tensor]:
        def one(params: Params, image: Tensor, label: Tensor) -> Tensor:
            return losses(params, image[None], label[None])[0]

        some = context.images(member.config, context.examples)
        return dict(noise_scale(one, params, *some, chunk=16)._asdict())

    found |= context.kept(f"noise images={context.examples}", member, noise)
    if member.index:
        return found

    def density() -> dict[str, Tensor]:
        loss, draws = _loss(context, member), context.generator("density", member.seed)
        return dict(spectral_density(loss, params, 1, draws, steps=STEPS)._asdict())

    what = f"density images={_few(context)} steps={STEPS}"
    return found | context.kept(what, member, density)


def section(context: Context) -> pages.Section:
    """Largest eigenvalue, trace and noise scale of every seed, densities of the first."""
    found = scalars(context, measure)
    first = {one.name: measure(context, Member(one, 0)) for one in context.results}
    densities = {name: Density(own["grid"], own["density"]) for name, own in first.items()}
    count, noise = context.available(_few(context)), context.available(context.examples)
    columns = [
        Column("top", "largest eigenvalue", 1),
        Column("trace", "trace", 0),
        Column("mean", "mean eigenvalue, 1e-3", 3, "", 1000.0),
        Column("scale", "noise scale, images", 0, "images", low=0.0),
    ]
    own = [
        Column("operator_top", "largest eigenvalue", 2),
        Column("operator_trace", "trace", 1),
        Column("operator_mean", "mean eigenvalue, 1e-3", 3, "", 1000.0),
    ]
    shares = [
        one[f"{name}_error"] / abs(one[name])
        for seeds in found.values()
        for one in seeds.values()
        for name in ("trace", "operator_trace")
        if one.get(name)
    ]
    error = max(filter(math.isfinite, shares), default=0.0)
    told = (
        f"The Hessian of the loss on {count} validation images at the final weights, by products "
        "alone: its largest eigenvalue (negative ones, however large, are in the picture below), "
        f"to {100 * TOLERANCE:g} % of the largest magnitude, its trace from {SAMPLES} "
        "products (the more curved in all directions, the larger), over all weights and over "
        "those of the operators alone, the others held. The standard error of a trace is up to "
        f"{100 * error:.0f} % of it, by the same products: where few eigenvalues are large, they "
        "may have missed some. Noise scale: the batch at which the "
        f"noise of the gradient is as large as the gradient, from {noise} images one by one; "
        "infinite where they are too few to see the gradient."
    )
    table, numbers = seeds_table(found, columns, "All weights: mean, 95 % interval over seeds.")
    tables = [table]
    learned = {
        name: seeds
        for name, seeds in found.items()
        if any("operator_top" in one for one in seeds.values())
    }
    if learned:
        # a table of its own: beside the others its columns would be cut off
        table, more = seeds_table(
            learned, own, "Of the operators alone: mean, 95 % interval over seeds."
        )
        tables.append(table)
        numbers += more
    lines = [
        *differences(found, "top", "Largest eigenvalue", columns[0]),
        *differences(found, "trace", "Trace", columns[1]),
    ]
    fig = pages.figure(
        plot(densities),
        "curvature-density",
        f"Density of the eigenvalues of the Hessian of {', '.join(densities)}",
        f"How the eigenvalues are spread, {context.first_seeds}, all weights: "
        f"one random start, {STEPS} products. Right of the peak at zero: directions in which the "
        "loss is steep; left of it: those in which the weights are no minimum. An eigenvalue is "
        "drawn as a peak, 1 % as wide as the range of its operator: compare where peaks lie, and "
        "heights within an operator; widths mean nothing. Away from zero the axis is logarithmic.",
    )
    return pages.Section([pages.text(told), *tables, pages.items(lines), fig], numbers)


ANALYSIS = Analysis(
    "curvature", "Curvature", section, minutes=9.0, measure=measure, uses=("examples", "limit_mib")
)
