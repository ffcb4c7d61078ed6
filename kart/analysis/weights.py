"""How the weights of a model are distributed, and how heavy their tails are (paper, sec. 7,
Figure 12).

    parts = weights.by_part(params)
    weights.summary(parts["all"])
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import pages, schema, tree
from kart.analysis import figures
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Member,
    own_params,
    percent,
    scalars,
    seeds_table,
    trajectories,
)

STAGES = ("start", "half way", "end")
BINS = 81


def _check_values(name: str, values: Tensor, least: int) -> None:
    schema.check_type(name, "values", values, Tensor)
    if values.dim() < 1 or not values.dtype.is_floating_point or values.shape[-1] < least:
        raise ValueError(
            f"`{name}` needs floating-point values (..., n) with n >= {least}, got {values.dtype} "
            f"of shape {tuple(values.shape)}. Flatten the weights."
        )
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"`{name}` needs finite values, got {int((~values.isfinite()).sum())} nan or inf. "
            "Leave diverged runs out."
        )


def hill(values: Tensor, share: float = 0.1) -> Tensor:
    """Tail index of the absolute values, `(..., n)` to `(...)`, float64: alpha where P(|x| > t)
    falls as t^-alpha, so that the smaller it is the heavier the tail.

    Hill's estimate (1975) from the `share` of the values that are largest; of a Pareto sample it is
    alpha with a relative error of 1 / sqrt(share n), of normal values it grows without end as
    `share` falls. Infinite where all of them are equal.

    >>> u = torch.arange(1, 10001).double() / 10001
    >>> round(float(hill(u ** (-1 / 3.0))), 1)  # Pareto with alpha 3
    3.0
    """
    _check_values("hill", values, 2)
    count = int(share * values.shape[-1]) if schema.fits(share, float) and 0 < share < 1 else 0
    if count < 1:
        raise ValueError(
            f"`hill` needs 0 < `share` < 1 and one value in it, got {share!r} of "
            f"{values.shape[-1]} values. The default is 0.1."
        )
    top = values.double().abs().topk(count + 1, dim=-1).values
    if not bool((top[..., -1] > 0).all()):
        raise ValueError(
            f"`hill` needs the largest {count + 1} values different from 0, got zeros among them. "
            "Take a smaller `share`."
        )
    return 1 / (top[..., :-1] / top[..., -1:]).log().mean(-1)


def kurtosis(values: Tensor) -> Tensor:
    """Excess kurtosis, `(..., n)` to `(...)`, float64: the fourth central moment over the squared
    variance, less 3, the value of a normal distribution.

    0 is normal, positive is heavier tails (3 for a Laplace), negative is lighter (-1.2 for a
    uniform, -2, the least, for two values). The moments are those of the values, as scipy's by
    default. Values that are all equal have 0.

    >>> kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0])).item()
    -2.0
    """
    _check_values("kurtosis", values, 2)
    apart = values.double() - values.double().mean(-1, keepdim=True)
    # in units of the largest, so that no power overflows or vanishes
    largest = apart.abs().amax(-1, keepdim=True)
    apart = apart / largest.clamp(min=torch.finfo(torch.float64).tiny)
    variance = apart.square().mean(-1)
    ratio = apart.pow(4).mean(-1) / variance.square().clamp(min=torch.finfo(torch.float64).tiny)
    # equal values have only rounding left
    spread = largest[..., 0] > 1e-14 * values.double().abs().amax(-1)
    return torch.where(spread, ratio - 3, 0.0)


def near_zero(values: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of values smaller than `fraction` of their root mean square, `(..., n)` to `(...)`,
    float64: 0.0797 for normal values at 0.1; 1 where all are zero.

    >>> near_zero(torch.tensor([0.01, -1.0, 1.0, 1.0])).item()
    0.25
    """
    _check_values("near_zero", values, 1)
    if not schema.fits(fraction, float) or not 0 < fraction < 1:
        raise ValueError(
            f"`near_zero` needs 0 < `fraction` < 1, got {fraction!r}. The default is 0.1."
        )
    size = values.double().abs()
    root = size.square().mean(-1, keepdim=True).sqrt()
    return ((size < fraction * root) | (size == 0)).double().mean(-1)


def by_part(params: Any) -> dict[str, Tensor]:
    """The weights of a model to look at together: "all" `(1, P)`, and of its operators, where it
    has any, each kind of leaf by its last name, such as "coefs" and "mix", a head a row:
    `(heads of all blocks, n)`.

    >>> params = {"w": torch.ones(5), "operator": {"mix": torch.ones(2, 3, 4)}}
    >>> {name: tuple(values.shape) for name, values in by_part(params).items()}
    {'all': (1, 29), 'mix': (2, 12)}
    """
    found = {"all": [tree.ravel(params)[None]]}
    for name, leaf in tree.named(params).items():
        if "operator" in name.split("."):
            rows = leaf.reshape(len(leaf) if leaf.dim() else 1, -1)  # one number a head, too
            found.setdefault(name.split(".")[-1], []).append(rows)
    parts: dict[str, list[Tensor]] = {}
    for name, rows in found.items():
        # blocks with operators of different sizes: their rows cannot stand under each other
        several = len({row.shape[1] for row in rows}) > 1
        for row in rows:
            parts.setdefault(f"{name} ({row.shape[1]})" if several else name, []).append(row)
    return {name: torch.cat(rows) for name, rows in parts.items()}


class Summary(NamedTuple):
    """What `summary` says of values `(..., n)`: `(...)` each."""

    rms: Tensor
    kurtosis: Tensor
    hill: Tensor
    near_zero: Tensor


def summary(values: Tensor) -> Summary:
    """Root mean square, `kurtosis`, `hill` and `near_zero` of `(..., n)`, each `(...)`, float64.

    The tail index is infinite where more than nine tenths of the values are zero: such weights,
    a mix or biases at their start, have no tail to speak of.

    >>> [round(float(x), 2) for x in summary(torch.linspace(-1, 1, 1001))]
    [0.58, -1.2, 18.3, 0.06]
    """
    _check_values("summary", values, 20)
    size = values.double().abs()
    cut = size.topk(int(0.1 * values.shape[-1]) + 1, dim=-1).values[..., -1] > 0
    tail = torch.full_like(cut, torch.inf, dtype=torch.float64)
    if bool(cut.any()):
        tail[cut] = hill(values[cut])
    return Summary(size.square().mean(-1).sqrt(), kurtosis(values), tail, near_zero(values))


def plot(stages: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """A matplotlib Figure of histograms of `stages`, title to name to values of any shape: a panel
    a stage such as "start", "half way" and "end", with a line a name.

    The panels share `BINS` over 99.9 % of all values (what lies outside falls into the outermost)
    and axes; densities are logarithmic, since tails are what differs.
    """
    if not stages or not all(stages.values()):
        raise ValueError("`plot` needs values by stage and name, got none. Pass some.")
    everything = torch.cat(
        [v.detach().flatten().cpu().double() for stage in stages.values() for v in stage.values()]
    )
    _check_values("plot", everything, 1)
    ordered = everything.abs().sort().values
    edge = float(ordered[int(0.999 * (len(ordered) - 1))]) or 1.0
    edges = torch.linspace(-edge, edge, BINS + 1, dtype=torch.float64)
    width = 2 * edge / BINS
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage))
    looks = {name: figures.look(i) for i, name in enumerate(names)}
    fig, axes = figures.grid(1, len(stages), 2.4, 2.2, sharex=True, sharey=True)
    lowest = min(1 / (v.numel() * width) for stage in stages.values() for v in stage.values())
    for ax, (title, stage) in zip(axes[0], stages.items(), strict=True):
        for name, values in stage.items():
            flat = values.detach().flatten().cpu().double().clamp(-edge, edge)
            counts = torch.histogram(flat, edges).hist
            heights = (counts / (flat.numel() * width)).numpy()
            line = {"lw": 1.1, "label": name, "baseline": None, **looks[name]}
            ax.stairs(heights, edges.numpy(), **line)
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.5 * lowest)
        ax.set_title(title, fontsize=8, color=figures.INK)
        ax.set_xlabel("weight")
    axes[0, 0].set_ylabel("density")
    figures.legend(fig)
    return fig


# --- the section ----------------------------------------------------------------------------------


def _stages(member: Member) -> dict[str, Any]:
    """A member's own weights at the start, half way and the end of its trajectory."""
    path = [(step, own_params(params)) for step, params in member.snapshots()]
    half = min(path, key=lambda one: abs(one[0] - path[-1][0] / 2))
    return dict(zip(STAGES, (path[0][1], half[1], path[-1][1]), strict=True))


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """`summary` of the kinds of weights of a member at each stage, the mean over heads."""
    mib = 2 * 4 * member.config.trajectory * tree.size(member.params) / 2**20
    context.holds(f"the {member.config.trajectory} snapshots of {member.name}", mib)

    def compute() -> dict[str, Tensor]:
        found = {}
        for stage, params in _stages(member).items():
            for part, values in by_part(params).items():
                if values.shape[-1] < 20:
                    continue
                one = summary(values)._asdict()
                found |= {f"{part}|{stage}|{name}": value.mean() for name, value in one.items()}
        return found

    return context.kept("summary", member, compute)


def section(context: Context) -> pages.Section:
    """Histograms as in the paper's Figure 12, and how heavy their tails are."""
    found = scalars(context, measure)
    shown: dict[str, dict[str, dict[str, Tensor]]] = {}  # by part, stage, operator
    for result in context.results:
        for stage, params in _stages(Member(result, 0)).items():
            for part, values in by_part(params).items():
                shown.setdefault(part, {}).setdefault(stage, {})[result.name] = values
    blocks: list[Any] = [
        pages.text(
            f"Pictures: {context.first_seeds}, at the start, half way and at the end of training, "
            "densities on a logarithmic scale; what lies outside of 99.9 % is in the outermost "
            "bins. Tables: the end, mean over seeds and their 95 % interval; of operators the mean "
            "over heads. Excess kurtosis: 0 is normal, more is heavier tails. Tail index (Hill, "
            "largest tenth): the smaller, the heavier the tail. Near zero: below a tenth of the "
            "root mean square (8 % of normal values)."
        )
    ]
    numbers: list[pages.Number] = []
    for part, stages in shown.items():
        own = {
            operator: seeds
            for operator, seeds in found.items()
            if any(f"{part}|end|rms" in one for one in seeds.values())
        }
        if not own:  # too few numbers for a distribution
            continue
        name = "all weights" if part == "all" else f"{part.replace('_', ' ')} of the operators"
        title = name.capitalize()
        blocks.append(pages.figure(plot(stages), f"weights-{part}", f"Histograms of {name}", title))
        columns = [
            Column(f"{part}|end|rms", "root mean square", 3, low=0.0),
            Column(f"{part}|end|kurtosis", "excess kurtosis", 2),
            Column(f"{part}|start|kurtosis", "at the start", 2),
            Column(f"{part}|end|hill", "tail index", 2, low=0.0),
            percent(f"{part}|end|near_zero", "near zero %"),
            percent(f"{part}|start|near_zero", "at the start %"),
        ]
        table, some = seeds_table(own, columns, "")
        blocks.append(table)
        numbers += [one._replace(measure=one.measure.replace("|", "_")) for one in some]
    return pages.Section(blocks, numbers)


ANALYSIS = Analysis(
    "weights",
    "Distributions of weights",
    section,
    minutes=1.0,
    needs=trajectories,
    measure=measure,
    uses=("limit_mib",),
)
