"""The functions that the heads of a learnable operator learned (paper, eq. 1, 2 and 5)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import pages
from kart.analysis import figures
from kart.analysis.section import Analysis, Context
from kart.bases import Params
from kart.operators import Operator


def _units(operator: Operator, params: Params) -> Params:
    if operator.basis is None:
        raise ValueError(
            f"`curves` needs an operator with learnable units, got {operator.name!r}. "
            "A fixed function is the same in every head."
        )
    found = params.get("units", params.get("first"))
    if found is None:
        raise ValueError(
            f"`curves` needs the parameters of one operator, `units` or `first` among them, got "
            f'{sorted(params)}. Pass those of a block, params["blocks"]["0"]["operator"], or '
            'params["operator"] with universal sharing.'
        )
    return found


def curves(operator: Operator, params: Params, x: Tensor) -> Tensor:
    """`phi(x)` of every unit: `x (X)` to `(H, P, M, X)`.

    P and M are the axes of the operator's units: rank and keys for `low_rank` and for the first
    stage of `two_stage`, keys and keys for `full_rank`, keys and rank for `project_first`. Of
    hybrid heads pass one group, see `learned_groups`.
    """
    if x.dim() != 1 or not x.dtype.is_floating_point:
        raise ValueError(
            f"`curves` needs floating-point `x` with one axis, got {x.dtype} of shape "
            f"{tuple(x.shape)}. Pass for example torch.linspace(-4, 4, 101)."
        )
    units = _units(operator, params)
    assert operator.basis is not None
    with torch.no_grad():
        return operator.basis.apply(units, x[:, None, None, None]).movedim(0, -1)


def key_means(values: Tensor) -> Tensor:
    """Means over keys, `(H, P, M, X)` to `(H, P, X)`: hidden value p, over M, of a row of scores
    that are all x.
    """
    return values.mean(-2)


def unit_quantiles(values: Tensor, levels: tuple[float, ...] = (0.05, 0.5, 0.95)) -> Tensor:
    """Quantiles over a head's units, `(H, P, M, X)` to `(levels, H, X)`."""
    return values.flatten(1, 2).quantile(values.new_tensor(levels), dim=1)


def strongest(values: Tensor, params: Params, count: int = 4) -> Tensor:
    """Indices `(H, count)`, into the flattened (P, M), of the units that move the weights most.

    That is the root mean square over x, for `low_rank` times the norm of the unit's column of W.
    """
    size = values.square().mean(-1).sqrt()  # (H, P, M)
    mix = params.get("mix")
    if mix is not None and mix.shape[-1] == size.shape[1] and mix.shape[-2] == size.shape[2]:
        size = size * mix.detach().norm(dim=-2)[..., None]
    size = size.flatten(1)
    if not 1 <= count <= size.shape[1]:
        raise ValueError(
            f"`strongest` needs 1 <= `count` <= {size.shape[1]} units a head, got {count}. "
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
        own = own + softmax_response(x, own.shape[1], scores)[:, None]
    return own


class Group(NamedTuple):
    """Heads with the same learnable operator: the first of them, the operator, its parameters."""

    first: int
    operator: Operator
    params: Params


def learned_groups(operator: Operator, params: Params) -> Iterator[Group]:
    """The groups of heads that learn functions: one, unless the heads are hybrid; none if fixed."""
    if operator.options.get("kind") != "hybrid":
        if operator.basis is not None:
            yield Group(0, operator, params)
        return
    first = 0
    for i, (op, count) in enumerate(operator.options["groups"]):
        if op.basis is not None:
            yield Group(first, op, params[str(i)])
        first += count


def score_range(scores: Tensor | None, operator: Operator, points: int = 121) -> Tensor:
    """Where to look: 99 % of the `scores`, at least [-1, 1]; without any, one period or [-4, 4]."""
    if scores is None:
        period = operator.basis.traits.get("periodic") if operator.basis else None
        half = period / 2 if period else 4.0
    else:
        some = scores.detach().flatten()
        some = some[:: max(1, some.numel() // 100_000)].abs()  # `quantile` takes 16M at most
        half = max(1.0, float(some.quantile(0.99)))
    return torch.linspace(-half, half, points)


def moved(values: Tensor, initial: Tensor) -> Tensor:
    """How far training moved each head's units, `(H, P, M, X)` twice to `(H,)`: the root mean
    square of the change over that of the initial functions.
    """
    change = (values - initial).square().flatten(1).mean(-1)
    return (change / initial.square().flatten(1).mean(-1)).sqrt()


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
            f"`plot` needs an operator with learnable units, got {operator.name!r}. "
            "A fixed function is the same in every head."
        )
    starts = [None] * len(groups)
    if initial is not None:
        starts = [group.params for group in learned_groups(operator, initial)]
    where = score_range(scores, groups[0].operator) if x is None else x
    panels = []  # (head, lines, band, dotted)
    for group, start in zip(groups, starts, strict=True):
        values = curves(group.operator, group.params, where)
        before = None if start is None else curves(group.operator, start, where)
        chosen = strongest(values, group.params, min(count, values[0, ..., 0].numel()))
        bands = unit_quantiles(values)
        for h, units in enumerate(chosen):
            lines = values[h].flatten(0, 1)[units]
            dotted = None if before is None else before[h].flatten(0, 1)[units]
            panels.append((group.first + h, lines, bands[::2, h], dotted))
    parts = [
        (head, [None if part is None else part.cpu().numpy() for part in rest])
        for head, *rest in panels
    ]
    return _panels(parts, _draw, where, scores, "φ(score)")


def plot_response(
    operator: Operator, params: Params, x: Tensor | None = None, *, scores: Tensor | None = None
) -> Any:
    """A matplotlib Figure, one panel a head of `low_rank`: `response` of each key as a thin line,
    their median, the band of the middle 80 % of the keys, and `softmax_response` dotted.

    Args as of `plot`.
    """
    where = score_range(scores, operator) if x is None else x
    values = response(operator, params, where, scores)
    reference = softmax_response(where, values.shape[1], scores).expand(len(values), -1)
    levels = values.quantile(values.new_tensor([0.1, 0.5, 0.9]), dim=1).transpose(0, 1)
    parts = [
        (head, [part.cpu().numpy() for part in rest])
        for head, rest in enumerate(zip(values, levels, reference, strict=True))
    ]
    return _panels(parts, _draw_response, where, scores, "weight, centred")


def _panels(
    parts: Sequence[tuple[int, list[Any]]],
    draw: Callable[..., None],
    x: Tensor,
    scores: Tensor | None,
    label: str,
) -> Any:
    """A panel for each (head, what `draw(ax, x, ...)` takes), four in a row."""
    columns = min(4, len(parts))
    fig, axes = figures.grid(-(-len(parts) // columns), columns, 1.9, 1.6, sharex=True, sharey=True)
    for ax, (head, values) in zip(axes.flat, parts, strict=False):
        ax.axhline(0, color=figures.QUIET, lw=0.5)
        draw(ax, x.cpu().numpy(), *values)
        ax.set_xlim(float(x[0]), float(x[-1]))
        if scores is not None:
            _silhouette(ax, x, scores[..., head, :, :])
        ax.set_title(f"head {head + 1}", fontsize=8)
    for ax in axes.flat[len(parts) :]:
        ax.set_visible(False)
    fig.supxlabel("score", fontsize=8, color=figures.INK)
    fig.supylabel(label, fontsize=8, color=figures.INK)
    return fig


def _draw(ax: Any, x: Any, lines: Any, band: Any, dotted: Any) -> None:
    """One head's units; NumPy arrays, since matplotlib reads no tensors cleanly."""
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


def some_blocks(depth: int) -> list[int]:
    """The first, the middle and the last block, or all of three."""
    return list(range(depth)) if depth <= 3 else [0, depth // 2, depth - 1]


def section(context: Context) -> pages.Section:
    """The functions that each head learned, over the scores seen, and how far they moved."""
    shown, numbers = [], []
    for look in map(context.look, context.results):
        universal = look.model.config.sharing == "universal"
        depth = look.model.config.depth
        for block in [0] if universal else some_blocks(depth):
            operator = look.model.operators[block]
            now, then = (look.operator_params(p, block) for p in (look.params, look.initial))
            groups = list(learned_groups(operator, now))
            if not groups:
                continue
            names = range(depth) if universal else [block]
            scores = torch.cat([look.aux[f"blocks.{i}.scores"] for i in names])
            x = score_range(scores, groups[0].operator)
            distances = [
                100 * float(value)
                for a, b in zip(groups, learned_groups(operator, then), strict=True)
                for value in moved(curves(a.operator, a.params, x), curves(b.operator, b.params, x))
            ]
            where = "all blocks (shared)" if universal else f"block {block + 1}"
            far = ", ".join(f"{value:.0f}\N{NO-BREAK SPACE}%" for value in distances)
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
    if not shown:
        return pages.Section([pages.note("No operator here learns functions.")])
    seed = context.results[0].configs[0].seed
    blocks = [
        pages.text(
            f"Each panel is a head, seed {seed}. Solid: the four units that move its weights most; "
            "dotted: the same units before training. Grey band: 90 % of all its units. Silhouette: "
            "where the scores of validation images lie, which is where the functions are used. The "
            "change is the root mean square over all units of a head, relative to the initial "
            "functions."
        ),
        pages.text(
            "A key's weight by its own score is the sum over p of W[m, p] \u03c6_pm(score), less "
            "its mean: thin lines are keys m, the band the middle 80 % of them, orange their "
            "median; dotted is what softmax has there, with the other keys' scores as they were "
            "seen."
        ),
        pages.beside(*shown),
    ]
    return pages.Section(blocks, numbers)


ANALYSIS = Analysis("functions", "The functions that each head learned", section)
