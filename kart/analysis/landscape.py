"""The loss around the weights that training found, in a plane, and the path that led there.

The plane is spanned by two directions `(2, P)`, in the order of `tree.ravel`: the leading ones of
the path, or random ones (Li et al. 2018, arXiv:1712.09913).

    plane, explained = landscape.directions(path)
    z = landscape.surface(loss, params, plane, 1.0, 41)
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from kart import pages, schema, tree
from kart.analysis import figures
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Member,
    differences,
    own_params,
    percent,
    scalars,
    seeds_table,
    trajectories,
)

Params = Any
Extent = float | Tensor | Sequence[Sequence[float]]

COLUMNS = 2**20  # parameters that are in float64 at a time
GRID = 11  # points a side of the surfaces that the numbers of the page are of
RADIUS = 0.4  # share of the extent within which those take the sharpness


def directions(path: Tensor) -> tuple[Tensor, Tensor]:
    """The two directions in which a path moved most, `(T, P)` to `(2, P)`, orthonormal, and the
    share of its variance that each explains, `(2,)`.

    Principal components of the differences to the final weights, the last snapshot, about which
    the variance is taken: among all planes through the final weights theirs is nearest to the
    path. The sign is such that the snapshot farthest along a direction is on its positive side. A
    path on a line leaves the second direction open; it is then across the line and explains 0.

    Raises ValueError for fewer than three snapshots, nan, or a path that does not move.

    >>> plane, explained = directions(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0, 0, 0]]))
    >>> plane.round(decimals=2), [round(float(x), 3) for x in explained]
    (tensor([[0.6000, 0.8000, 0.0000],
            [0.0000, 0.0000, 1.0000]]), [0.962, 0.038])
    """
    schema.check_type("directions", "path", path, Tensor)
    if path.dim() != 2 or not path.dtype.is_floating_point or len(path) < 3 or path.shape[1] < 2:
        raise ValueError(
            "`directions` needs a path (T, P) of T >= 3 snapshots of P >= 2 weights, got "
            f"{path.dtype} of shape {tuple(path.shape)}. Train with a longer `trajectory`."
        )
    bad = (~path.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"`directions` needs finite weights, got nan or inf in snapshots {bad[:5]} of "
            f"{len(path)}. The run diverged; leave it out."
        )
    whole = float(sum(part.square().sum() for part in _differences(path)))
    if whole == 0:
        raise ValueError(
            f"`directions` needs a path that moves, got {len(path)} equal snapshots. "
            "Take one of a run that trained."
        )
    first, variance = _leading(path, None)
    second, rest = _leading(path, first)
    if rest <= 1e-14 * variance:  # within rounding of a line
        second, rest = _across(first), 0.0
    found = torch.stack([first, second])
    shares = torch.tensor([variance, rest], dtype=torch.float64) / whole
    return found.to(path.dtype), shares.to(path)


def _differences(path: Tensor, removed: Tensor | None = None) -> Iterable[Tensor]:
    """The differences to the last row in float64, `(T - 1, columns)` at a time, without their part
    along `removed (P,)`.
    """
    along = None
    if removed is not None:
        parts = zip(_differences(path), removed.split(COLUMNS), strict=True)
        along = sum((part @ column for part, column in parts), removed.new_zeros(len(path) - 1))
    for start in range(0, path.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        part = path[:-1, columns].double() - path[-1, columns].double()
        if along is not None and removed is not None:
            part = part - along[:, None] * removed[columns]
        yield part


def _leading(path: Tensor, removed: Tensor | None) -> tuple[Tensor, float]:
    """The leading direction `(P,)`, float64, of what `removed` leaves, and its variance."""
    gram = torch.zeros(len(path) - 1, len(path) - 1, dtype=torch.float64, device=path.device)
    for part in _differences(path, removed):
        gram += part @ part.mT
    values, vectors = torch.linalg.eigh(gram)
    direction = torch.cat([vectors[:, -1] @ part for part in _differences(path, removed)])
    if removed is not None:
        direction = direction - (direction @ removed) * removed
    length = torch.linalg.vector_norm(direction)
    direction = direction / length.clamp(min=torch.finfo(torch.float64).tiny)
    # the coordinates of the snapshots are the eigenvector times the length
    farthest = vectors[vectors[:, -1].abs().argmax(), -1]
    return direction * torch.sign(farthest), float(values[-1].clamp(min=0))


def _across(direction: Tensor) -> Tensor:
    """A unit vector at right angles to `direction`: the axis it has least of, made so."""
    axis = torch.zeros_like(direction)
    axis[direction.abs().argmin()] = 1
    axis = axis - (axis @ direction) * direction
    return axis / torch.linalg.vector_norm(axis)


def coordinates(path: Tensor, directions: Tensor) -> Tensor:
    """Where the snapshots lie in the plane about the last of them, `(T, P)` to `(T, 2)`, float64.

    The coordinates of the nearest points of the plane, be `directions (2, P)` orthonormal or not.

    >>> coordinates(torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 0.0]]), torch.eye(3)[:2]).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    schema.check_type("coordinates", "path", path, Tensor)
    if path.dim() != 2 or not len(path):
        raise ValueError(
            f"`coordinates` needs a path (T, P) of one snapshot or more, got shape "
            f"{tuple(path.shape)}. Stack the raveled weights."
        )
    _check_directions("coordinates", directions, path.shape[-1])
    plane = directions.double()
    parts = zip(_differences(path), plane.split(COLUMNS, dim=1), strict=True)
    along = sum((d @ p.mT for d, p in parts), plane.new_zeros(len(path) - 1, 2))
    gram = plane @ plane.mT
    if not float(gram.det()) > 1e-12 * float(gram.diagonal().prod()):
        raise ValueError(
            f"`coordinates` needs `directions` that span a plane, got parallel ones or zeros of "
            f"lengths {gram.diagonal().sqrt().tolist()}. Take those of `directions`."
        )
    found = torch.linalg.solve(gram, along.mT).mT
    return torch.cat([found, found.new_zeros(1, 2)])


def _check_directions(name: str, directions: Tensor, size: int) -> None:
    schema.check_type(name, "directions", directions, Tensor)
    if directions.shape != (2, size) or not bool(directions.isfinite().all()):
        raise ValueError(
            f"`{name}` needs finite directions (2, {size}) for these weights, got shape "
            f"{tuple(directions.shape)}. Take those of `directions` or `random_directions`."
        )


def random_directions(generator: Generator, params: Params) -> Tensor:
    """Two random directions `(2, P)`, each filter of the size of the weights' (Li et al. 2018).

    A filter is what feeds one output: a row of a matrix, an output channel of a convolution; an
    embedding, whose first axis is 1, is one filter. Biases and the scales of norms, leaves of at
    most one axis, stay as they are, as in the source. The parameters of an operator, which has no
    filters, are those below "operator": theirs is what feeds one hidden value or one key of one
    head, that is all but the first two axes, `(M, K)` of the coefficients `(H, r, M, K)` and `(r,)`
    of the mix `(H, M, r)`.

    Unlike the directions of a path these have about the length of the weights, and are at right
    angles only nearly.

    >>> params = {"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "bias": torch.ones(2)}
    >>> found = random_directions(torch.Generator().manual_seed(0), params)
    >>> tree.unravel(found, params)["weight"].norm(dim=-1)
    tensor([[5., 0.],
            [5., 0.]])
    """

    tree.check_floating("random_directions", params)

    def draw(name: str, leaf: Tensor) -> Tensor:
        if leaf.dim() < 2:
            return torch.zeros_like(leaf)
        drawn = torch.randn(leaf.shape, generator=generator, device=generator.device).to(leaf)
        start = 2 if ".operator." in f".{name}" and leaf.dim() > 2 else 1
        axes = tuple(range(start, leaf.dim()))
        size = torch.linalg.vector_norm(leaf, dim=axes, keepdim=True)
        length = torch.linalg.vector_norm(drawn, dim=axes, keepdim=True)
        return drawn * size / length.clamp(min=torch.finfo(leaf.dtype).tiny)

    return torch.stack([tree.ravel(tree.map_named(draw, params)) for _ in range(2)])


def axes(extent: Extent, points: int) -> Tensor:
    """Where `surface` looks along the two directions, `(2, points)`, float64: `[-extent, extent]`
    along both, or `extent` is a pair of ranges `((low, high), (low, high))`.

    >>> axes(1.0, 3).tolist(), axes(((0.0, 1.0), (0.0, 2.0)), 2).tolist()
    ([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]], [[0.0, 1.0], [0.0, 2.0]])
    """
    schema.check_integer("surface", "points", points, 2, "41 is usual.")
    try:
        given = torch.as_tensor(extent, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # ragged, or no numbers
        given = torch.full((), torch.nan, dtype=torch.float64)
    spans = torch.stack([-given, given]).expand(2, 2) if given.dim() == 0 else given
    fits = spans.shape == (2, 2) and bool(spans.isfinite().all())
    if not fits or not bool((spans[:, 0] < spans[:, 1]).all()):
        raise ValueError(
            f"`surface` needs `extent` > 0 or two ranges (low, high), got {extent!r}. "
            "Take 1.0, or ranges that hold the path."
        )
    lines = [torch.linspace(low, high, points, dtype=torch.float64) for low, high in spans.tolist()]
    return torch.stack(lines)


def surface(
    loss: Callable[[Params], Tensor],
    params: Params,
    directions: Tensor,
    extent: Extent,
    points: int,
    *,
    chunk: int = 1,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
) -> Tensor:
    """The loss on a grid of the plane, `(points, points)`, float64: `z[i, j]` at `params + a[i]
    directions[0] + b[j] directions[1]` with `a, b = axes(extent, points)`.

    A loss that is not finite stays nan or inf.

    Args:
        loss: of one set of parameters, `() `; `mean_loss` makes one of a data set in batches.
        directions: `(2, P)`, in the order of `tree.ravel(params)`.
        chunk: how many grid points are evaluated at a time by `torch.func.vmap`, each with weights
            of its own: this bounds the memory. It pays for models so small that calls cost more
            than the arithmetic; 1 is a plain loop.
        progress: wraps the chunks, as `kart.tables.bar` does.

    >>> loss = lambda w: (w**2).sum()
    >>> surface(loss, torch.zeros(3), torch.eye(3)[:2], 1.0, 3).tolist()
    [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]
    """
    tree.check_floating("surface", params)
    _check_directions("surface", directions, tree.size(params))
    schema.check_integer("surface", "chunk", chunk, 1, "Leave it out.")
    first, second = (tree.unravel(direction, params) for direction in directions)
    a, b = axes(extent, points).to(directions.device)
    pairs = torch.cartesian_prod(a, b).split(chunk)

    def at(pair: Tensor) -> Tensor:
        def moved(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
            return x + pair[0].to(x.dtype) * u + pair[1].to(x.dtype) * v

        value = loss(tree.map(moved, params, first, second))
        if value.shape != ():
            raise ValueError(
                f"`surface` needs a loss that returns one number, got shape {tuple(value.shape)}. "
                "Take its mean."
            )
        return value.double()

    many = torch.func.vmap(at, randomness="different")
    parts = pairs if progress is None else progress(pairs)
    with torch.no_grad():
        found = [at(part[0])[None] if len(part) == 1 else many(part) for part in parts]
    return torch.cat(found).reshape(points, points)


def mean_loss(
    losses: Callable[..., Tensor], *data: Tensor, batch: int = 256
) -> Callable[[Params], Tensor]:
    """`loss(params) -> ()`, the mean over a data set, evaluated `batch` examples at a time and
    summed in float64.

    Args:
        losses: `losses(params, *some) -> (n,)` of n examples.
        data: tensors `(examples, ...)`, such as images and labels.

    >>> loss = mean_loss(lambda w, x: (w * x) ** 2, torch.arange(4.0), batch=3)
    >>> loss(torch.tensor(2.0))
    tensor(14., dtype=torch.float64)
    """
    for one in data:
        schema.check_type("mean_loss", "data", one, Tensor)
    counts = {len(x) if x.dim() else 0 for x in data}
    if len(counts) != 1 or 0 in counts or not schema.fits(batch, int) or batch < 1:
        raise ValueError(
            f"`mean_loss` needs tensors of as many examples each and `batch` >= 1, got "
            f"{[tuple(x.shape) for x in data]} and {batch!r}. Pass images and labels of a split."
        )
    total = counts.pop()

    def summed(params: Params, *part: Tensor) -> Tensor:
        found = losses(params, *part)
        if found.shape != part[0].shape[:1]:
            raise ValueError(
                f"`mean_loss` needs the losses ({len(part[0])},) of {len(part[0])} examples, got "
                f"shape {tuple(found.shape)}. Take no mean or sum over them."
            )
        return found.double().sum()

    def loss(params: Params) -> Tensor:
        parts = zip(*(x.split(batch) for x in data), strict=True)
        return torch.stack([summed(params, *part) for part in parts]).sum() / total

    return loss


class Sharpness(NamedTuple):
    """The largest and the mean rise of the loss over that at the centre, `()` each."""

    largest: Tensor
    mean: Tensor


def _check_surface(name: str, z: Tensor, axes: Tensor) -> None:
    for argument, given in (("z", z), ("axes", axes)):
        schema.check_type(name, argument, given, Tensor)
    if z.dim() != 2 or axes.shape != (2, z.shape[-1]) or z.shape[0] != z.shape[1]:
        raise ValueError(
            f"`{name}` needs a surface (points, points) and its axes (2, points), got "
            f"{tuple(z.shape)} and {tuple(axes.shape)}. Take `axes(extent, points)` of the surface."
        )


def sharpness(z: Tensor, axes: Tensor, radius: float) -> Sharpness:
    """How far the loss rises within `radius` of the centre: the largest rise and the mean over
    the grid points there, in the unit of the loss.

    `radius` is in the unit of the axes. The grid must have the centre (0, 0) as a point, and reach
    as far as `radius` on every side. Of a quadratic c |x|^2 / 2 the rises are c radius^2 / 2 and
    about half of that.

    >>> grid = axes(1.0, 5)
    >>> z = grid[0][:, None] ** 2 + grid[1] ** 2
    >>> [float(x) for x in sharpness(z, grid, 0.5)]
    [0.25, 0.2]
    """
    _check_surface("sharpness", z, axes)
    schema.check_type("sharpness", "radius", radius, float)
    distance = torch.hypot(axes[0][:, None], axes[1])
    centre = distance <= 1e-9 * float(axes.abs().max())
    within = distance <= radius * (1 + 1e-9)  # a point at the radius is within, whatever rounding
    if int(centre.sum()) != 1 or int(within.sum()) < 5:
        raise ValueError(
            f"`sharpness` needs a grid with the point (0, 0) and 4 more within {radius!r}, got "
            f"{int(within.sum())} within. Use an odd number of points, or a larger radius."
        )
    reach = float(torch.minimum(-axes.amin(-1), axes.amax(-1)).min())
    if radius > reach * (1 + 1e-9):
        raise ValueError(
            f"`sharpness` needs `radius` <= {reach:g}, how far the grid reaches from its centre, "
            f"got {radius!r}. Take a surface of a larger `extent`."
        )
    rise = z[within] - z[centre]
    return Sharpness(rise.max(), rise.mean())


def roughness(z: Tensor, axes: Tensor) -> Tensor:
    """The share of the variance of a surface, `()` in [0, 1], that the best quadratic in the two
    coordinates leaves: 0 for a bowl, a saddle, a plane.

    >>> grid = axes(1.0, 9)
    >>> float(roughness(grid[0][:, None] ** 2 + grid[1], grid)) < 1e-12
    True
    """
    _check_surface("roughness", z, axes)
    if not bool(z.isfinite().all()) or z.shape[0] < 3:
        raise ValueError(
            f"`roughness` needs a finite surface of 3 points a side or more, got shape "
            f"{tuple(z.shape)} with {int((~z.isfinite()).sum())} points nan or inf. "
            "Take a smaller extent."
        )
    # in units of the largest coordinate, in which the columns of the fit are of one size
    a, b = (axes.double() / axes.abs().max()).to(z.device)
    a, b = a[:, None].expand(z.shape).flatten(), b.expand(z.shape).flatten()
    columns = torch.stack([torch.ones_like(a), a, b, a * a, a * b, b * b], dim=-1)
    values = z.double().flatten()
    values = values - values.mean()
    whole = values.square().sum()
    basis = torch.linalg.qr(columns)[0]
    left = (values - basis @ (basis.mT @ values)).square().sum()
    return torch.where(whole > 0, left / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


def _levels(surfaces: Iterable[Tensor]) -> list[float]:
    """Levels of the loss for surfaces: the lowest, then even in the logarithm of the rise."""
    finite = torch.cat([z[z.isfinite()].flatten().cpu() for z in surfaces])
    if not len(finite):
        raise ValueError("`plot` needs a surface with finite points, got none. Shrink the extent.")
    low, high = float(finite.min()), float(finite.max())
    span = (high - low) or 1.0
    rises = torch.logspace(-2.5, 0, 13, dtype=torch.float64) * span
    return [low, *(low + rises).tolist()]


def plot(
    surfaces: Mapping[str, Tensor],
    axes: Mapping[str, Tensor],
    paths: Mapping[str, Tensor] | None = None,
    explained: Mapping[str, Tensor] | None = None,
) -> Any:
    """A matplotlib Figure: contours of each surface by name, all with the same levels and colours,
    and over them the path, from a ring to a star, the final weights.

    Args:
        surfaces: `(points, points)` of `surface`.
        axes: `(2, points)` of each.
        paths: `coordinates` of each, `(T, 2)`, where there is one.
        explained: shares of the path's variance that the two directions explain, for the labels.
    """
    _check_named(surfaces, axes)
    levels = _levels(surfaces.values())
    fig, cells = figures.panels(len(surfaces), 3, 2.9, 2.7)
    colours = _colours(levels)
    drawn = None
    for ax, (name, z) in zip(cells, surfaces.items(), strict=True):
        a, b = axes[name].cpu().numpy()
        values = z.clamp(max=levels[-1]).cpu().numpy().T
        drawn = ax.contourf(a, b, values, levels=levels, **colours)
        ax.contour(a, b, values, levels=levels[1:], colors=figures.INK, linewidths=0.3, alpha=0.5)
        if paths is not None and name in paths:
            x, y = paths[name].cpu().numpy().T
            line = {"color": figures.COLOURS[1], "clip_on": True}
            ax.plot(x, y, lw=1.2, marker=".", ms=3, **line)
            ax.plot(x[:1], y[:1], marker="o", mfc="none", ms=6, **line)
            ax.plot(x[-1:], y[-1:], marker="*", ms=9, **line)
        ax.set_xlim(a[0], a[-1])
        ax.set_ylim(b[0], b[-1])
        ax.set_title(figures.wrapped(name), fontsize=8, color=figures.INK)
        shares = explained.get(name) if explained is not None else None
        for i, label in enumerate((ax.set_xlabel, ax.set_ylabel)):
            share = "" if shares is None else f" ({100 * float(shares[i]):.0f} %)"
            label(f"direction {i + 1}{share}")
    # as many digits as tell the lowest levels apart
    digits = min(9, max(2, 2 - math.floor(math.log10(levels[-1] - levels[0]))))
    bar = fig.colorbar(drawn, ax=cells, shrink=0.9, format=f"%.{digits}f", spacing="uniform")
    bar.set_label("loss", fontsize=8, color=figures.INK)
    bar.ax.tick_params(labelsize=6, labelcolor=figures.INK, color=figures.QUIET)
    return fig


def plot_surfaces(surfaces: Mapping[str, Tensor], axes: Mapping[str, Tensor]) -> Any:
    """A matplotlib Figure: surfaces by name in perspective, one height and colours; see `plot`."""
    _check_named(surfaces, axes)
    levels = _levels(surfaces.values())
    fig, cells = figures.panels(len(surfaces), 3, 3.0, 2.8, subplot_kw={"projection": "3d"})
    shown = {**_colours(levels), "rstride": 1, "cstride": 1, "linewidth": 0, "antialiased": False}
    for ax, (name, z) in zip(cells, surfaces.items(), strict=True):
        grid = torch.meshgrid(*axes[name].cpu(), indexing="ij")
        height = z.clamp(max=levels[-1]).cpu()
        ax.plot_surface(*(x.numpy() for x in (*grid, height)), **shown)
        ax.set_zlim(levels[0], levels[-1])
        ax.set_title(figures.wrapped(name), fontsize=8, color=figures.INK)
        ax.set_xlabel("direction 1", fontsize=7, labelpad=-6)
        ax.set_ylabel("direction 2", fontsize=7, labelpad=-6)
        ax.set_zlabel("loss", fontsize=7, labelpad=0)
        ax.tick_params(labelsize=6, pad=-2)
        ax.locator_params(nbins=5)
        ax.set_box_aspect(None, zoom=0.85)  # room for the label of the height
    return fig


def _check_named(surfaces: Mapping[str, Tensor], axes: Mapping[str, Tensor]) -> None:
    if not surfaces or surfaces.keys() != axes.keys():
        raise ValueError(
            f"`plot` needs surfaces and axes of the same names, got {sorted(surfaces)} and "
            f"{sorted(axes)}. Pass {{name: surface}} and {{name: axes}}."
        )
    for name, z in surfaces.items():
        _check_surface("plot", z, axes[name])


def _colours(levels: Sequence[float]) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    # of even steps in lightness, so that it survives print and colour blindness
    cmap = colormaps["cividis"]
    return {"cmap": cmap, "norm": BoundaryNorm(levels, cmap.N)}


# --- the section ----------------------------------------------------------------------------------


def _path(context: Context, member: Member) -> dict[str, Tensor]:
    """Where the snapshots of a member lie in the plane of its path."""

    def compute() -> dict[str, Tensor]:
        path, plane, explained = _plane(context, member)
        distance = torch.linalg.vector_norm(path[0].double() - path[-1].double())
        found = {"coordinates": coordinates(path, plane), "explained": explained.double()}
        return {**found, "distance": distance}

    return context.kept("path and distance", member, compute)


def _plane(context: Context, member: Member) -> tuple[Tensor, Tensor, Tensor]:
    # as trees, stacked, and what one of them takes while it is read
    mib = 3 * 4 * member.config.trajectory * tree.size(member.params) / 2**20
    context.holds(f"the {member.config.trajectory} snapshots of {member.name}", mib)
    path = torch.stack([tree.ravel(params).float() for _, params in member.snapshots()])
    return path, *directions(path)


def _reach(context: Context) -> float:
    """How far the path of any member goes, rounded up to two digits."""
    paths = (_path(context, member)["coordinates"] for member in context.members())
    far = max(float(path.abs().max()) for path in paths)
    unit = 10.0 ** (math.floor(math.log10(far)) - 1)
    return unit * math.ceil(1.02 * far / unit)


def _progress(context: Context, label: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """Says once in a while how far a surface is, and ends it with the section's minutes."""

    def over(pairs: Sequence[Any]) -> Iterable[Any]:
        began = said = time.monotonic()
        for i, pair in enumerate(pairs):
            context.check()
            yield pair
            now = time.monotonic()
            if now - said > 20:
                said, left = now, (now - began) / (i + 1) * (len(pairs) - i - 1)
                context.say(f"landscape: {label}, {i + 1} of {len(pairs)}, {left:.0f} s left")

    return over


def _kept_surface(context: Context, member: Member, kind: str, extent: float) -> Tensor:
    points = context.points if kind == "path" and member.index == 0 else GRID
    label = f"{kind} extent={extent:g} points={points} images={context.examples}"

    def compute() -> dict[str, Tensor]:
        if kind == "path":
            path, plane, _ = _plane(context, member)
            params = tree.unravel(path[-1], member.params)
        else:
            params = own_params(member.params)
            plane = random_directions(context.generator("random", member.seed), params)
        model = context.model(member.config)
        examples = context.images(member.config, context.examples)
        loss = mean_loss(context.losses(model, member.params), *examples, batch=128)
        said = f"{member.name}, seed {member.seed}, {kind}"
        z = surface(loss, params, plane, extent, points, progress=_progress(context, said))
        return {"z": z}

    return context.kept(label, member, compute)["z"]


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """The surfaces of a member over the plane of its path and over a random one, and the numbers
    of both from `GRID` points a side, whatever the picture has: where the loss of a point is not
    finite, the roughness is nan, and such points are counted.
    """
    path, reach = _path(context, member), _reach(context)
    found: dict[str, Tensor] = {"coordinates": path["coordinates"], "explained": path["explained"]}
    found["explained_by_two"] = path["explained"].sum()
    found["path_distance"] = path["distance"]
    for kind, extent in (("path", reach), ("random", 1.0)):
        z = _kept_surface(context, member, kind, extent)
        step = (len(z) - 1) // (GRID - 1)
        coarse, grid = z[::step, ::step], axes(extent, GRID)
        rises = sharpness(coarse, grid, RADIUS * extent)
        lost = (~coarse.isfinite()).sum()
        rough = roughness(coarse, grid) if lost == 0 else coarse.new_tensor(math.nan)
        found |= {
            f"{kind}_surface": z,
            f"{kind}_axes": axes(extent, len(z)),
            f"{kind}_loss": coarse[GRID // 2, GRID // 2],
            f"{kind}_rise": rises.mean,
            f"{kind}_largest": rises.largest,
            f"{kind}_roughness": rough,
            f"{kind}_lost": lost,
        }
    return found


def section(context: Context) -> pages.Section:
    """Surfaces of every operator on the same axes and colours, with the path, and numbers."""
    found = scalars(context, measure)
    first = {one.name: measure(context, Member(one, 0)) for one in context.results}
    reach = float(next(iter(first.values()))["path_axes"].max())
    count = context.available(context.examples)

    def of(key: str) -> dict[str, Tensor]:
        return {name: own[key] for name, own in first.items()}

    parts = {kind: (of(f"{kind}_surface"), of(f"{kind}_axes")) for kind in ("path", "random")}
    names = ", ".join(first)
    shown = [
        pages.figure(
            plot(*parts["path"], of("coordinates"), of("explained")),
            "landscape-path",
            f"Contours of the validation loss of {names} in the plane of the path of training",
            "In the plane in which training moved most. Ring: where it began. Star: where it "
            "ended. Axes: distance in the space of weights, and the share of the path's variance.",
        ),
        pages.figure(
            plot_surfaces(*parts["path"]),
            "landscape-surface",
            f"The same surfaces of {names} in perspective",
            "The same surfaces in perspective, all with one height.",
        ),
        pages.figure(
            plot(*parts["random"]),
            "landscape-random",
            f"Contours of the validation loss of {names} in a plane of random directions",
            "In a plane of random directions, each filter of the length of the weights' own: at 1 "
            "the step is as long as the weights.",
        ),
    ]
    radius = f"{RADIUS * reach:.2g}"
    columns = {
        "path": [
            Column("path_loss", "loss at the end", 3, "nats"),
            Column("path_rise", "mean rise", 3, "nats"),
            Column("path_largest", "largest rise", 3, "nats"),
            percent("path_roughness", "roughness %"),
            percent("explained_by_two", "path explained %"),
            Column("path_distance", "distance trained", 1, low=0.0),
        ],
        "random": [
            Column("random_rise", "mean rise", 3, "nats"),
            Column("random_largest", "largest rise", 3, "nats"),
            percent("random_roughness", "roughness %"),
        ],
    }
    captions = {
        "path": f"In the plane of the path, within {radius} of the end (mean and largest rise of "
        "the loss), and over the whole square (roughness: the share of the surface's variance that "
        "the best quadratic leaves; 0 is a bowl).",
        "random": f"In the plane of random directions: within {RADIUS:g} of the weights' own "
        "length, and over the whole square.",
    }
    tables, numbers = [], []
    for kind, chosen in columns.items():
        table, own = seeds_table(found, chosen, captions[kind] + " Mean, 95 % interval over seeds.")
        tables.append(table)
        numbers += own
    lines = [
        *differences(found, "path_roughness", "Roughness (%, path)", columns["path"][3]),
        *differences(found, "random_roughness", "Roughness (%, random)", columns["random"][2]),
        *differences(found, "random_rise", "Mean rise (nats, random)", columns["random"][0]),
    ]
    lost = [
        pages.warning(
            f"{own[f'{kind}_lost']:.0f} of {GRID**2} points of {name}, seed {seed}, in the "
            f"{kind} plane have a loss of nan or inf: no roughness, and in the picture the "
            "highest colour or none."
        )
        for kind in columns
        for name, seeds in found.items()
        for seed, own in seeds.items()
        if own[f"{kind}_lost"]
    ]
    best = any(result.epochs is not None for result in context.results)
    apart = ", and in the random plane around those of the best epoch" if best else ""
    told = (
        f"The loss on {count} validation images around the final weights{apart}; a spiky landscape "
        "would show as small islands of contours and as a large roughness. The pictures are "
        f"{context.first_seeds}, with {len(next(iter(parts['path'][0].values())))} points a side "
        f"in the plane of the path and {GRID} in the random one; all numbers are from {GRID} "
        "points a side. Axes, colours and heights are the same for all operators. Biases and norms "
        "do not move in the random plane; of an operator a filter is what feeds one hidden value "
        "or one key of one head."
    )
    return pages.Section([pages.text(told), *lost, *shown, *tables, pages.items(lines)], numbers)


ANALYSIS = Analysis(
    "landscape",
    "Loss landscape and path",
    section,
    minutes=13.0,
    needs=trajectories,
    measure=measure,
    uses=("examples", "points", "limit_mib"),
)
