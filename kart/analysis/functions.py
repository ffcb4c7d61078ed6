"""The functions that the heads of a learnable operator learned (paper, eq. 1, 2 and 5): their
curves, what they are near to, what of them can be dropped, and how much they do at all.

    x = functions.score_range(scores, operator)
    functions.fits(functions.curves(operator, params, x), x, functions.density(scores, x))
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import pages, schema, tree
from kart.analysis import figures, symbolic
from kart.analysis.attention import score_share
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Look,
    Member,
    Result,
    differences,
    percent,
    samples,
    scalars,
    seeds_table,
    some_blocks,
    windowed,
)
from kart.bases import Params
from kart.models import Model
from kart.models.model import find
from kart.operators import Operator
from kart.operators.resize import amplitude, check_amplitude
from kart.operators.sums import parts_of, simple_parts

# whose functions are not of the score alone
PLACED = ("by_offset", "by_distance")


def _units(operator: Operator, params: Params) -> Params:
    if operator.basis is None and not parts_of(operator):
        raise ValueError(
            f"`curves` needs an operator with learnable units, got {operator.name!r}. Fixed "
            "functions have no units: they are the same in every head."
        )
    if parts_of(operator) or operator.options.get("kind") == "by_offset":
        raise ValueError(
            f"`curves` needs an operator whose units have axes (H, P, M), got {operator.name!r}. "
            "Of hybrid heads and sums pass a group of `learned_groups`; units by offset have other "
            "axes."
        )
    found = params.get("units", params.get("first"))
    if found is None:
        raise ValueError(
            f"`curves` needs the parameters of one operator, `units` or `first` among them, got "
            f'{sorted(params)}. Pass those of a block, params["blocks"]["0"]["operator"], or '
            'params["operator"] with universal sharing.'
        )
    return _lifted(operator, found)


def _lifted(operator: Operator, units: Params) -> Params:
    """Units with the axes `(H, P, M)`, where an operator has one of them a head."""
    if operator.options.get("kind") not in ("elementwise", "by_distance"):
        return units
    return {name: leaf[:, None, None] for name, leaf in units.items()}


def curves(operator: Operator, params: Params, x: Tensor) -> Tensor:
    """`phi(x)` of every unit: `x (X)` to `(H, P, M, X)`.

    P and M are the axes of the operator's units: rank and keys for `low_rank` and for the first
    stage of `two_stage`, keys and keys for `full_rank`, keys and rank for `project_first`, rank and
    features of the place for `generated`, 1 and 1 for `elementwise` and `by_distance`. Of hybrid
    heads pass one group, see `learned_groups`.
    """
    schema.check_type("curves", "x", x, Tensor)
    if x.dim() != 1 or not x.dtype.is_floating_point:
        raise ValueError(
            f"`curves` needs floating-point `x` with one axis, got {x.dtype} of shape "
            f"{tuple(x.shape)}. Pass for example torch.linspace(-4, 4, 101)."
        )
    units = _units(operator, params)
    assert operator.basis is not None
    x = x.to(tree.leaves(units)[0].device)
    with torch.no_grad():
        return operator.basis.apply(units, x[:, None, None, None]).movedim(0, -1)


def _check_units(name: str, values: Tensor) -> None:
    schema.check_type(name, "values", values, Tensor)
    if values.dim() != 4 or not values.dtype.is_floating_point:
        raise ValueError(
            f"`{name}` needs floating-point values (H, P, M, X), got {values.dtype} of shape "
            f"{tuple(values.shape)}. Take those of `curves`."
        )


def strongest(values: Tensor, mix: Tensor | None = None, count: int = 4) -> Tensor:
    """Indices `(H, count)`, into the flattened (P, M), of the units that move the weights most, of
    `values (H, P, M, X)`.

    That is the root mean square over x; where W follows the units, as in `low_rank`, times the norm
    of the unit's column of it, `mix (H, M, P)`.
    """
    _check_units("strongest", values)
    size = values.square().mean(-1).sqrt()  # (H, P, M)
    if mix is not None:
        size = size * mix.detach().norm(dim=-2)[..., None]
    size = size.flatten(1)
    if not schema.fits(count, int) or not 1 <= count <= size.shape[1]:
        raise ValueError(
            f"`strongest` needs 1 <= `count` <= {size.shape[1]} units a head, got {count!r}. "
            "Ask for fewer."
        )
    return size.topk(count, dim=-1).indices


def softmax_response(x: Tensor, keys: int, scores: Tensor | None = None) -> Tensor:
    """A key's weight in a row of softmax as a function of its own score, less its mean over x: `x
    (X)` to `(1, X)`, or to `(H, X)` with the `scores (..., H, N, M)` that other keys take.

    The other keys are `keys - 1` times the mean of exp over the scores of the head, or of zeros.
    """
    rest = x.new_tensor([float(keys - 1)]).log()
    if scores is not None:
        x, rest = x.to(scores.device), rest.to(scores.device)
        seen = scores.detach().movedim(-3, 0).flatten(1).to(x.dtype)
        rest = rest + seen.logsumexp(1) - math.log(seen.shape[1])
    values = (x - rest[:, None]).sigmoid()
    return values - values.mean(-1, keepdim=True)


def response(operator: Operator, params: Params, x: Tensor, scores: Tensor | None = None) -> Tensor:
    """A key's weight as a function of its own score, less its mean over x: `x (X)` to `(H, M, X)`.

    For key m of `low_rank` that is sum_p W[m, p] phi_pm(x), and with base="softmax" the weight of
    softmax that it is added to; the other keys' scores add a constant. Before any projection. It
    stands where softmax has exp(x). `scores` as in `softmax_response`.
    """
    if operator.options.get("kind") != "low_rank":
        raise ValueError(
            f"`response` needs a low-rank operator, got {operator.name!r}. `curves` shows the "
            "units of the others."
        )
    values = curves(operator, params, x)
    own = torch.einsum("hmp,hpmx->hmx", params["mix"].detach().to(values.dtype), values)
    own = own - own.mean(-1, keepdim=True)
    if operator.options.get("base") == "softmax":
        own = own + softmax_response(x.to(own.device), own.shape[1], scores)[:, None]
    return own


class Group(NamedTuple):
    """Heads with one learnable operator: the first, operator, parameters and their dotted path."""

    first: int
    operator: Operator
    params: Params
    path: str = ""


def learned_groups(operator: Operator, params: Params) -> Iterator[Group]:
    """The groups of heads that learn functions of scores: one, unless the operator is hybrid or a
    sum; none if fixed, none by distance, and none by offset, whose units have other axes than
    `curves` shows.
    """
    parts, before = parts_of(operator), 0
    heads = [count for _, count in operator.options.get("groups", ())] or [0] * len(parts)
    for i, (op, count) in enumerate(zip(parts, heads, strict=True)):
        for found in learned_groups(op, params[str(i)]):
            path = f"{i}.{found.path}" if found.path else str(i)
            yield found._replace(first=before + found.first, path=path)
        before += count
    if not parts and learns(operator):
        yield Group(0, operator, params)


def seen_by(group: Group, scores: Tensor) -> Tensor:
    """Of scores `(..., H, N, M)` of a whole operator those that the units of a group take: of its
    heads, and of `project_first` what it makes of them, `(..., heads, N, J)`.
    """
    heads = len(tree.leaves(group.params)[0])
    own = scores.detach()[..., group.first : group.first + heads, :, :]
    if group.operator.options.get("kind") != "project_first":
        return own
    return own @ group.params["mix"].detach().to(own).mT


def _placed(operator: Operator) -> bool:
    """Whether any head of an operator learns functions of the place."""
    return any(one.options.get("kind") in PLACED for one in simple_parts(operator))


def learns(operator: Operator) -> bool:
    """Whether any head of an operator learns functions that `learned_groups` gives."""
    return any(
        one.basis is not None and one.options.get("kind") not in PLACED
        for one in simple_parts(operator)
    )


def score_range(scores: Tensor | None, operator: Operator, points: int = 121) -> Tensor:
    """Where to look: 99 % of the `scores`, at least [-1, 1]; without any, one period or [-4, 4]."""
    schema.check_integer("score_range", "points", points, 2, "Leave it out.")
    if scores is None:
        period = operator.basis.traits.get("periodic") if operator.basis else None
        half = period / 2 if period else 4.0
    else:
        schema.check_type("score_range", "scores", scores, Tensor)
        if not scores.numel():
            raise ValueError("`score_range` needs scores, got none. Pass None for a usual range.")
        some = scores.detach().flatten()
        # `quantile` takes 16M at most, and no half precision
        some = some[:: max(1, some.numel() // 100_000)].abs().double()
        reached = float(some.quantile(0.99))
        if not math.isfinite(reached):
            raise ValueError(
                f"`score_range` needs finite scores, got {int((~some.isfinite()).sum())} of "
                f"{some.numel()} nan or inf. Leave diverged runs out."
            )
        half = max(1.0, reached)
    return torch.linspace(-half, half, points)


def _range(groups: Sequence[Group], seen: Sequence[Tensor] | None) -> Tensor:
    """Where to look at several groups: `score_range` of what their units see."""
    every = None if seen is None else torch.cat([own.flatten() for own in seen])
    return score_range(every, groups[0].operator)


def moved(values: Tensor, initial: Tensor) -> Tensor:
    """How far training moved each head's units, `(H, P, M, X)` twice to `(H,)`: the root mean
    square of the change over that of the initial functions; infinite from zero.
    """
    for given in (values, initial):
        _check_units("moved", given)
    change = (values - initial).square().flatten(1).mean(-1)
    # where nan moved, nan comes out
    return torch.where(change == 0, 0.0, change / initial.square().flatten(1).mean(-1)).sqrt()


def density(scores: Tensor, x: Tensor) -> Tensor:
    """How often scores are seen at each point of an ascending grid: `x (X)` to `(X,)` of sum 1,
    float64. A score counts at the nearest point, unless it is over half a step beyond the ends.

    >>> density(torch.tensor([0.1, 0.9, 1.1, 9.0]), torch.tensor([0.0, 1.0])).tolist()
    [0.3333333333333333, 0.6666666666666666]
    """
    for argument, given in (("scores", scores), ("x", x)):
        schema.check_type("density", argument, given, Tensor)
    if x.dim() != 1 or len(x) < 2 or not bool((x.diff() > 0).all()):
        raise ValueError(
            f"`density` needs ascending `x` of two points or more, got shape {tuple(x.shape)}. "
            "Take `score_range`."
        )
    if missing := int(scores.isnan().sum()):
        raise ValueError(
            f"`density` needs scores that are numbers, got {missing} of {scores.numel()} nan. "
            "Leave diverged runs out."
        )
    grid = x.double().to(scores.device)
    step = grid.diff()
    edges = torch.cat([grid[:1] - step[:1] / 2, grid[:-1] + step / 2, grid[-1:] + step[-1:] / 2])
    place = torch.bucketize(scores.detach().double().flatten(), edges, right=True) - 1
    place = place[(place >= 0) & (place < len(grid))]
    if not len(place):
        raise ValueError(
            f"`density` needs scores between {float(x[0]):.3g} and {float(x[-1]):.3g}, got none "
            f"of {scores.numel()}. Take `score_range(scores, operator)`."
        )
    return place.bincount(minlength=len(grid)).double() / len(place)


class Fits(NamedTuple):
    """R^2 of the best c, a x, a x + c and a exp(x) + c, `(...)` each, float64."""

    constant: Tensor
    identity: Tensor
    affine: Tensor
    exp: Tensor


def fits(values: Tensor, x: Tensor, density: Tensor | None = None) -> Fits:
    """How near functions are to simple ones: `values (..., X)` at `x (X)` to R^2 `(...)` of the
    best constant, multiple of the identity, affine function and multiple of exp plus a constant.

    R^2 is the share of the mean square, not of the variance, that the fit explains, so that the
    constant has one, too: what a constant explains does not depend on the score. A function of
    zeros is all of them. `density (X)` weighs the points by the scores really seen; default alike.

    >>> x = torch.linspace(-1, 1, 5)
    >>> [round(float(r), 3) for r in fits(2 * x.exp() + 1, x)]
    [0.814, 0.172, 0.986, 1.0]
    """
    weights = symbolic.grid_weights("fits", values, x, density)
    points = x.to(weights)
    # exp of the largest is 1: the same fit, without overflow
    one, exp = torch.ones_like(points), (points - points.max()).exp()
    columns = {"constant": [one], "identity": [points], "affine": [one, points], "exp": [one, exp]}
    root = weights.sqrt()
    rows = values.double() * root
    whole = rows.square().sum(-1)
    found = {}
    for name, parts in columns.items():
        matrix = torch.stack(parts, -1) * root[:, None]
        matrix = matrix / matrix.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        basis, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
        # where all scores are at one point the columns are the same
        along = (rows @ basis[:, sizes > 1e-10]).square().sum(-1)
        found[name] = torch.where(whole > 0, along / whole.clamp(min=1e-300), 1.0).clamp(max=1)
    return Fits(**found)


def harmonics(operator: Operator, params: Params) -> Tensor:
    """Amplitude of each harmonic of each Fourier unit, `(H, P, M, G)`: sqrt(a_k^2 + b_k^2), with
    the scales of the units where they have them. P and M as in `curves`.

    >>> from kart import bases, operators
    >>> op = operators.full_rank(bases.fourier(2))
    >>> coefs = torch.tensor([3.0, 0.0, 4.0, 1.0]).reshape(1, 1, 1, 4)
    >>> harmonics(op, {"units": {"coefs": coefs}}).tolist()
    [[[[5.0, 1.0]]]]
    """
    units = _units(operator, params)
    basis = operator.basis
    assert basis is not None
    if basis.family != "fourier" or basis.coefficients is None:
        raise ValueError(
            f"`harmonics` needs Fourier units, got {basis.family!r}. `fits` looks at any family."
        )
    grid = basis.size // 2
    coefs = basis.coefficients(units).detach()
    return torch.hypot(coefs[..., :grid], coefs[..., grid : 2 * grid])


class Dropped(NamedTuple):
    """What `prune` dropped from an operator: terms (harmonics, or coefficients of another basis, or
    the amplitude of a unit that has no terms), and units with no term left.
    """

    terms: int
    of_terms: int
    units: int
    of_units: int


class Pruned(NamedTuple):
    """Parameters without what was too small, and what that was by the path of the operator."""

    params: Params
    dropped: dict[str, Dropped]


def prune(model: Model, params: Params, threshold: float) -> Pruned:
    """Parameters of a model with the small terms of its learned functions set to zero.

    A term is a harmonic of a Fourier unit (both a_k and b_k), a coefficient of another linear
    basis, a whole unit where the family is not linear. Its size is its amplitude, for `low_rank`
    times the norm of the unit's column of W, and it is dropped where that is below `threshold`
    times the largest of its head. A base activation of the units stays, and so do functions of the
    distance and units by offset.

    What it costs is the difference of `train.evaluate` with both parameters.

    >>> from kart import models
    >>> model = models.create("vit_nano", "G2B", image_size=8, patch_size=4)
    >>> pruned = prune(model, model.init(torch.Generator().manual_seed(0)), 0.3)
    >>> sorted(pruned.dropped)[0], pruned.dropped["blocks.0.operator"].of_units
    ('blocks.0.operator', 120)
    """
    if not schema.fits(threshold, float) or not 0 <= threshold < 1:
        raise ValueError(
            f"`prune` needs 0 <= `threshold` < 1, got {threshold!r}. 0.1 drops what is below a "
            "tenth of the largest of its head."
        )
    places = {site.path: (site.operator, find(params, site.path)) for site in model.sites}
    changed: dict[str, Tensor] = {}
    dropped: dict[str, Dropped] = {}
    for path, (whole, given) in places.items():
        for group in learned_groups(whole, given):
            at = f"{path}.{group.path}" if group.path else path
            counts = Dropped(0, 0, 0, 0)
            for name in ("units", "first", "second"):
                if name in group.params:
                    leaf, kept, found = _prune_units(group, name, threshold)
                    changed[f"{at}.{name}.{leaf}"] = kept
                    counts = Dropped(*(a + b for a, b in zip(counts, found, strict=True)))
            dropped[at] = counts
    if not dropped:
        raise ValueError(
            "`prune` needs a model that learns functions of scores, got fixed operators alone, or "
            "functions of the distance or by offset, all of which it leaves as they are."
        )
    return Pruned(tree.map_named(lambda name, leaf: changed.get(name, leaf), params), dropped)


def _prune_units(group: Group, name: str, threshold: float) -> tuple[str, Tensor, Dropped]:
    """The leaf of units that holds their amplitudes, what is kept of it, and what is dropped."""
    basis = group.operator.basis
    assert basis is not None
    units = _lifted(group.operator, group.params[name])
    leaf = check_amplitude("prune", basis)
    given = units[leaf].detach()
    pairs = basis.family == "fourier"
    if basis.coefficients is not None:
        size = basis.coefficients(units).detach()[..., : basis.size].abs()  # (H, P, M, K)
        if pairs:
            size = torch.hypot(*size.chunk(2, -1))
    else:
        size = given.reshape(*given.shape[:3], -1).norm(dim=-1, keepdim=True)
        if basis.options.get("scales"):
            size = size * units["scale_basis"].detach().abs()[..., None]
    terms = size
    if group.operator.options.get("kind") == "low_rank":
        terms = size * group.params["mix"].detach().norm(dim=-2)[:, :, None, None]
    keep = terms >= threshold * terms.amax((1, 2, 3), keepdim=True)
    mask = torch.cat([keep, keep], -1) if pairs else keep
    kept = given * (mask if given.dim() == 4 else mask[..., 0])
    gone = ~keep
    counts = (gone.sum(), gone.numel(), gone.all(-1).sum(), gone[..., 0].numel())
    kept = kept.reshape(group.params[name][leaf].shape)
    return leaf, kept, Dropped(*(int(count) for count in counts))


def plot(
    operator: Operator,
    params: Params,
    x: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    initial: Params | None = None,
    count: int = 4,
) -> Any:
    """A matplotlib Figure, one panel a head: the strongest units as lines, over the band that 90 %
    of its units fill.

    Args:
        operator, params: of one block.
        x: where; default `score_range`.
        scores: `(..., H, N, M)` of some images; where they lie is drawn below the curves.
        initial: the parameters before training; the same units as they were then are dotted.
        count: how many units are drawn as lines.
    """
    groups = list(learned_groups(operator, params))
    if not groups:
        raise ValueError(
            f"`plot` needs functions of the score in learnable units, got {operator.name!r}. Fixed "
            "functions are the same in every head, those by offset are not drawn, and `curves` "
            "shows those of the distance."
        )
    starts = [None] * len(groups)
    if initial is not None:
        starts = [group.params for group in learned_groups(operator, initial)]
    seen = None if scores is None else [seen_by(group, scores) for group in groups]
    where = _range(groups, seen) if x is None else x
    parts = []
    for group, start in zip(groups, starts, strict=True):
        values = curves(group.operator, group.params, where)
        before = None if start is None else curves(group.operator, start, where)
        # of `project_first` W comes before the units
        after = group.operator.options.get("kind") != "project_first"
        mix = group.params.get("mix") if after else None
        chosen = strongest(values, mix, min(count, values[0, ..., 0].numel()))
        bands = values.flatten(1, 2).quantile(values.new_tensor([0.05, 0.95]), dim=1)
        for h, units in enumerate(chosen):
            lines = values[h].flatten(0, 1)[units]
            dotted = None if before is None else before[h].flatten(0, 1)[units]
            parts.append((group.first + h, (lines, bands[:, h], dotted)))
    shown = None if seen is None else [x for own in seen for x in own.movedim(-3, 0)]
    return _panels(parts, _draw, where, shown, "φ(score)")


def plot_response(
    operator: Operator, params: Params, x: Tensor | None = None, *, scores: Tensor | None = None
) -> Any:
    """A matplotlib Figure, one panel a head of `low_rank`: `response` of each key as a thin line,
    their median, the band of the middle 80 % of the keys, and `softmax_response` dotted.

    Args as of `plot`.
    """
    where = score_range(scores, operator) if x is None else x
    values = response(operator, params, where, scores)
    where = where.to(values.device)
    reference = softmax_response(where, values.shape[1], scores).expand(len(values), -1)
    levels = values.quantile(values.new_tensor([0.1, 0.5, 0.9]), dim=1).transpose(0, 1)
    parts = list(enumerate(zip(values, levels, reference, strict=True)))
    shown = None if scores is None else list(scores.movedim(-3, 0))
    return _panels(parts, _draw_response, where, shown, "weight, centred")


def _panels(
    parts: Sequence[tuple[int, Sequence[Tensor | None]]],
    draw: Callable[..., None],
    x: Tensor,
    scores: Sequence[Tensor] | None,
    label: str,
) -> Any:
    """A panel for each (head, what `draw(ax, x, ...)` takes as NumPy arrays, since matplotlib reads
    no tensors cleanly), four in a row, over `scores` each.
    """
    fig, axes = figures.panels(len(parts), 4, 1.9, 1.6, sharex=True, sharey=True)
    for i, (ax, (head, values)) in enumerate(zip(axes, parts, strict=True)):
        ax.axhline(0, color=figures.QUIET, lw=0.5)
        draw(ax, x.cpu().numpy(), *(None if y is None else y.cpu().numpy() for y in values))
        ax.set_xlim(float(x[0]), float(x[-1]))
        if scores is not None:
            _silhouette(ax, x, scores[i])
        ax.set_title(f"head {head + 1}", fontsize=8)
    fig.supxlabel("score", fontsize=8, color=figures.INK)
    fig.supylabel(label, fontsize=8, color=figures.INK)
    return fig


def _draw(ax: Any, x: Any, lines: Any, band: Any, dotted: Any) -> None:
    ax.fill_between(x, band[0], band[1], color=figures.QUIET, alpha=0.22, lw=0)
    for i, line in enumerate(lines):
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        if dotted is not None:
            ax.plot(x, dotted[i], color=colour, lw=0.9, ls=(0, (1, 1.5)))
        ax.plot(x, line, color=colour, lw=1.2)


def _draw_response(ax: Any, x: Any, lines: Any, levels: Any, reference: Any) -> None:
    blue, orange = figures.COLOURS[:2]
    ax.fill_between(x, levels[0], levels[2], color=blue, alpha=0.15, lw=0)
    # some keys, evenly spaced, the class token's first
    ax.plot(x, lines[:: max(1, len(lines) // 8)].T, color=blue, lw=0.6, alpha=0.6)
    ax.plot(x, levels[1], color=orange, lw=1.6)
    ax.plot(x, reference, color=figures.INK, lw=0.9, ls=(0, (1, 1.5)))


def _silhouette(ax: Any, x: Tensor, scores: Tensor) -> None:
    """Where `scores` lie, along the bottom of the axes."""
    low, high = float(x[0]), float(x[-1])
    counts = torch.histc(scores.detach().float(), 40, low, high)
    heights = (0.2 * counts / counts.max().clamp(min=1)).cpu().numpy()
    edges = torch.linspace(low, high, 41).numpy()
    bottom = ax.get_xaxis_transform()
    ax.stairs(heights, edges, transform=bottom, fill=True, color=figures.QUIET, alpha=0.5)


def plot_harmonics(found: Mapping[str, Tensor]) -> Any:
    """A matplotlib Figure of `harmonics` by name: the root mean square over all units of each
    harmonic as a line, over the band from the smallest head to the largest.
    """
    if not found:
        raise ValueError("`plot_harmonics` needs amplitudes by name, got none. Pass some.")
    fig, (ax,) = figures.panels(1, 1, 3.4, 2.4)
    for i, (name, values) in enumerate(found.items()):
        style = figures.look(i)
        heads = values.double().square().flatten(1, 2).mean(1).sqrt().cpu()  # (H, G)
        index = range(1, heads.shape[1] + 1)
        low, high = heads.amin(0).numpy(), heads.amax(0).numpy()
        ax.fill_between(index, low, high, color=style["color"], alpha=0.2, lw=0)
        mean = heads.square().mean(0).sqrt().numpy()
        ax.plot(index, mean, lw=1.3, marker="o", ms=3, label=name, **style)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("harmonic k")
    ax.set_title("amplitude", loc="left", fontsize=9, color=figures.INK)
    figures.legend(fig)
    return fig


# --- the section ----------------------------------------------------------------------------------

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
Numbers = list[pages.Number]


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """How much of a member's output follows its scores, and what its functions are near to."""

    def compute() -> dict[str, Tensor]:
        model = context.model(member.config)
        # as many as the fit of a constant operator asks for, twice
        count = context.few(model)
        for site in model.sites:
            alike = 1 if site.cut is None else len(site.cut.whole)
            count = max(count, math.ceil(8 * site.tokens / (site.width * alike)))
        pairs = sum(site.windows * site.heads * site.tokens**2 for site in model.sites)
        context.holds(
            f"the attention of {count} images in {member.name}", 3 * 4 * count * pairs / 2**20
        )
        with torch.no_grad():
            aux = model.intermediates(member.params, context.images(member.config, count)[0])
        shares, near = [], []
        for i, site in enumerate(model.sites):
            scores, weights, values = (
                samples(site, aux[f"blocks.{i}.{kind}"]) for kind in ("scores", "weights", "values")
            )
            # fewer validation images than the fit of a constant operator asks for
            if weights.shape[0] * values.shape[-1] >= 4 * weights.shape[-1]:
                shares.append(score_share(weights, values))
            for group in learned_groups(site.operator, model.operator_params(member.params, i)):
                seen = seen_by(group, scores)
                x = score_range(seen, group.operator)
                values = curves(group.operator, group.params, x)
                near.append(torch.stack([r2.flatten() for r2 in fits(values, x, density(seen, x))]))
        found = {}
        if len(shares) == len(model.sites):
            by_block = torch.stack([share.mean() for share in shares])
            found = {"score_share": torch.cat(shares).mean(), "by_block": by_block}
        if near:
            means = torch.cat(near, 1).mean(1)
            found |= {f"r2_{name}": mean for name, mean in zip(Fits._fields, means, strict=True)}
        return found

    return context.kept("functions", member, compute)


def _pruned(context: Context, member: Member) -> dict[str, Tensor]:
    """Top-1 on some validation images, and what is left of the terms, threshold by threshold."""

    def compute() -> dict[str, Tensor]:
        model = context.model(member.config)
        images, labels = context.images(member.config, context.examples)
        hits, left = [], []
        for threshold in (0.0, *THRESHOLDS):
            params, share = member.params, 1.0
            if threshold:
                params, dropped = prune(model, params, threshold)
                terms = sum(one.of_terms for one in dropped.values())
                share -= sum(one.terms for one in dropped.values()) / terms
            with torch.no_grad():
                right = model.apply(params, images).argmax(-1) == labels
            hits.append(right.double().mean())
            left.append(torch.tensor(share, dtype=torch.float64))
        return {"top1": torch.stack(hits), "left": torch.stack(left)}

    return context.kept(f"pruned images={context.examples}", member, compute)


def section(context: Context) -> pages.Section:
    """How much follows the scores, what functions are near to, what can be dropped; pictures."""
    found = scalars(context, measure)
    column = percent("score_share", "of the scores %")
    kinds = [Column(f"r2_{name}", f"R² {name}", 3, low=0.0, high=1.0) for name in Fits._fields]
    table, numbers = seeds_table(
        found,
        [column, *kinds],
        "Of the scores: the share of the variance of the heads' output over images that the best "
        "operator that is the same for all images does not give, mean over heads and blocks; 0 is "
        "attention that ignores its scores, a dash too few validation images to tell. R²: the "
        "share of a unit's mean square, over the scores seen, that the best function of the kind "
        "gives, mean over units. Mean, 95 % interval over seeds.",
    )
    lines = differences(found, "score_share", "The share of the scores (%)", column)
    notes = windowed(context, "The best constant operator is one for all windows of a block.")
    pairs = list(zip(context.results, context.models, strict=True))
    learned = [result for result, model in pairs if any(map(learns, model.operators))]
    placed = [result.name for result, model in pairs if any(map(_placed, model.operators))]
    if placed:
        told = "functions by offset and by distance are not of the score alone and not shown here."
        notes.append(pages.note(f"{', '.join(placed)}: {told}"))
    if not learned:
        nothing = [] if placed else [pages.note("No operator here learns functions.")]
        return pages.Section([*notes, table, pages.items(lines), *nothing], numbers)
    blocks = [*notes, table, pages.items(lines), *_dropped(context, learned, numbers)]
    shown = _shapes(context, learned, numbers)
    pictures, changes = _pictures([context.look(result) for result in learned])
    numbers += changes
    blocks += [
        pages.text(
            f"Each panel is a head, {context.first_seeds}. Solid: the four units that move its "
            "weights most; dotted: the same units before training. Grey band: 90 % of all its "
            "units. Silhouette: where the scores that they see of validation images lie, which is "
            "where the functions are used. The change is the root mean square over all units of a "
            "head, relative to the initial functions."
        ),
        pages.text(
            "A key's weight by its own score is the sum over p of W[m, p] \u03c6_pm(score), less "
            "its mean: thin lines are keys m, the band the middle 80 % of them, orange their "
            "median; dotted is what softmax has there, with the other keys' scores as they were "
            "seen."
        ),
        pages.beside(*pictures),
        pages.text(
            "Units that are alike up to scale and sign (correlation 0.95 over the scores seen), "
            "last block, first head that learns: up to four groups, each led by the unit that "
            "varies most of those left; dotted the simplest formula that fits it over these scores."
        ),
        *shown,
    ]
    return pages.Section(blocks, numbers)


def _dropped(context: Context, learned: Sequence[Result], numbers: Numbers) -> list[pages.Markup]:
    """The table of what dropping small terms costs, of each first seed."""
    rows, without = [], []
    for result in learned:
        if _sizeless(context.model(result.configs[0])):
            without.append(result.name)
            continue
        own = _pruned(context, Member(result, 0))
        cells = [
            f"{100 * float(top1):.1f} ({100 * float(left):.0f})"
            for top1, left in zip(own["top1"], own["left"], strict=True)
        ]
        rows.append([result.name, *cells])
        numbers += [
            pages.Number(result.name, f"top1_pruned_{t:g}", float(x), "", result.configs[0].seed)
            for t, x in zip((0.0, *THRESHOLDS), own["top1"], strict=True)
        ]
    count = context.available(context.examples)
    caption = (
        f"Top-1 % on {count} validation images without the terms (harmonics, coefficients) below a "
        "share of the largest of their head, in brackets how many % of the terms are left; the "
        "first seed."
    )
    header = ["operator", "whole", *(f"below {t:g}" for t in THRESHOLDS)]
    told = "nothing is dropped, as the family has no trait amplitude that names a factor."
    notes = [pages.note(f"{', '.join(without)}: {told}")] if without else []
    return [*([pages.table(header, rows, caption)] if rows else []), *notes]


def _sizeless(model: Model) -> bool:
    """Whether any unit of a model is of a family that names no amplitude."""
    ones = [one for operator in model.operators for one in simple_parts(operator) if learns(one)]
    return any(one.basis is not None and not amplitude(one.basis) for one in ones)


def _shapes(context: Context, learned: Sequence[Result], numbers: Numbers) -> list[pages.Markup]:
    """Groups of alike units of the last block and their formulas; amplitudes of harmonics."""
    shown, amplitudes = [], {}
    for result in learned:
        look = context.look(result)
        block = len(look.model.operators) - 1
        scores = look.seen("scores", block)
        params = look.model.operator_params(look.params, block)
        for group in learned_groups(look.model.operators[block], params):
            assert group.operator.basis is not None
            if group.operator.basis.family == "fourier":
                name = result.name
                if name in amplitudes:  # of hybrid heads each group
                    name += f", head {group.first + 1}"
                amplitudes[name] = harmonics(group.operator, group.params)
            own = seen_by(group, scores)
            x = score_range(own, group.operator)
            seen = density(own, x)
            values = curves(group.operator, group.params, x)[0].flatten(0, 1)
            groups = symbolic.clusters(values, x, seen, count=4)
            if not len(groups.leaders):
                continue  # all scores seen are at one point: nothing has a shape there
            formulas = [symbolic.candidate(values[int(i)], x, seen) for i in groups.leaders]
            numbers += [
                pages.Number(
                    result.name, f"formula_head_{group.first + 1}_{i + 1}_r2", one.r2, "", look.seed
                )
                for i, one in enumerate(formulas)
            ]
            name = f"functions-alike-{len(shown)}"
            fig = symbolic.plot(values, x, groups, formulas)
            alt = f"Groups of alike functions of {result.name} and their formulas"
            caption = f"{result.name}, last block, head {group.first + 1}."
            shown.append(pages.figure(fig, name, alt, caption))
    if amplitudes:
        alt = f"Amplitude by harmonic of {', '.join(amplitudes)}"
        caption = "Amplitude by harmonic, last block: root mean square over units, band over heads."
        shown.append(pages.figure(plot_harmonics(amplitudes), "functions-harmonics", alt, caption))
    return shown


def _blocks(names: Sequence[int], depth: int) -> str:
    """The words for blocks that share an operator."""
    if len(names) == 1:
        return f"block {names[0] + 1}"
    if len(names) == depth:
        return "all blocks (shared)"
    return f"blocks {', '.join(str(i + 1) for i in names)} (shared)"


def _pictures(looks: Sequence[Look]) -> tuple[list[pages.Markup], Numbers]:
    """The functions of some blocks as curves, and how far training moved them."""
    shown, numbers = [], []
    for look in looks:
        # blocks that share an operator share a panel
        paths: dict[str, list[int]] = {}
        for i, site in enumerate(look.model.sites):
            paths.setdefault(site.path, []).append(i)
        together = list(paths.values())
        for names in [together[i] for i in some_blocks(len(together))]:
            block = names[0]
            operator = look.model.operators[block]
            now, then = look.model.operator_params(look.params, block), None
            if look.initial is not None:
                then = look.model.operator_params(look.initial, block)
            groups = list(learned_groups(operator, now))
            if not groups:
                continue
            scores = torch.cat([look.seen("scores", i) for i in names])
            x = _range(groups, [seen_by(group, scores) for group in groups])
            starts = [] if then is None else learned_groups(operator, then)
            distances = [
                100 * float(value)
                for a, b in zip(groups, starts, strict=False)
                for value in moved(curves(a.operator, a.params, x), curves(b.operator, b.params, x))
            ]
            where = _blocks(names, len(look.model.sites))
            far = "not known, as it began with other weights and kept no trajectory"
            if distances:
                percents = (f"{value:.0f}\N{NO-BREAK SPACE}%" for value in distances)
                far = ", ".join("from zero" if "inf" in one else one for one in percents)
            numbers += [
                pages.Number(
                    look.result.name, f"change_block_{block + 1}_panel_{i + 1}", d, "%", look.seed
                )
                for i, d in enumerate(distances)
            ]
            caption = f"{look.result.name}, {where}. Change by training, head by head: {far}."
            fig = plot(operator, now, x, scores=scores, initial=then)
            alt = f"Learned functions of {caption}"
            shown.append(pages.figure(fig, f"functions-{len(shown)}", alt, caption))
            if operator.options.get("kind") == "low_rank":
                caption = f"{look.result.name}, {where}. A key's weight by its own score."
                if operator.options.get("base") == "softmax":
                    caption += " The softmax that it is added to is included."
                fig = plot_response(operator, now, x, scores=scores)
                shown.append(pages.figure(fig, f"functions-{len(shown)}", caption, caption))
    return shown, numbers


ANALYSIS = Analysis(
    "functions",
    "The functions that each head learned",
    section,
    version=4,
    minutes=1.0,
    measure=measure,
    uses=("examples", "limit_mib"),
)
