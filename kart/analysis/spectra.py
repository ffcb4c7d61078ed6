"""The singular values of attention weights: how many directions a head really uses (paper, sec. 7,
Figure 13).

    aux = model.intermediates(params, images)
    spectra.effective_rank(aux["blocks.0.weights"])
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import pages, schema
from kart.analysis import figures
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Member,
    differences,
    samples,
    scalars,
    seeds_table,
    windowed,
)

IMAGES = 5  # of the section, as in the paper
CUT = 1e-5  # of the largest singular value: below it counts as rounding of float32


def _spectrum(name: str, matrices: Tensor) -> Tensor:
    schema.check_type(name, "matrices", matrices, Tensor)
    if matrices.dim() < 2 or not matrices.dtype.is_floating_point or 0 in matrices.shape[-2:]:
        raise ValueError(
            f"`{name}` needs floating-point matrices (..., N, M) with N, M >= 1, got "
            f"{matrices.dtype} of shape {tuple(matrices.shape)}. Pass scores or weights."
        )
    if not bool(matrices.isfinite().all()):
        raise ValueError(
            f"`{name}` needs finite matrices, got {int((~matrices.isfinite()).sum())} entries nan "
            "or inf. Leave diverged runs out."
        )
    return torch.linalg.svdvals(matrices.double())


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of `(..., N, M)`, descending, `(..., min(N, M))`, float64.

    >>> singular_values(torch.tensor([[0.0, 2.0], [-3.0, 0.0]])).round(decimals=6).tolist()
    [3.0, 2.0]
    """
    return _spectrum("singular_values", matrices)


def effective_rank(matrices: Tensor) -> Tensor:
    """How many singular values carry a matrix, `(..., N, M)` to `(...)` in [1, min(N, M)], float64:
    exp of the entropy (nats) of the singular values scaled to sum 1; 0 for a matrix of zeros.

    Reference: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    >>> effective_rank(torch.stack([torch.eye(4), torch.ones(4, 4)])).round(decimals=6).tolist()
    [4.0, 1.0]
    """
    spectrum = _spectrum("effective_rank", matrices)
    largest = spectrum[..., :1]
    # in units of the largest, so that no sum overflows and no small one is taken for zero
    spectrum = spectrum / torch.where(largest > 0, largest, 1.0)
    share = spectrum / spectrum.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(largest[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def numerical_rank(matrices: Tensor, tolerance: float | None = None) -> Tensor:
    """Number of singular values above `tolerance` times the largest, `(..., N, M)` to `(...)`.

    `tolerance` defaults to max(N, M) times the precision of the dtype the matrices are given in,
    what rounding alone leaves (as `torch.linalg.matrix_rank`). Beside the r of an operator it says
    whether the product is really cut there.

    >>> numerical_rank(torch.diag(torch.tensor([3.0, 1e-3, 0.0]))).item()
    2
    """
    spectrum = _spectrum("numerical_rank", matrices)
    given = schema.fits(tolerance, float | None)
    if not given or (tolerance is not None and not 0 <= tolerance < 1):
        raise ValueError(
            f"`numerical_rank` needs 0 <= `tolerance` < 1, got {tolerance!r}. Leave it out."
        )
    precision = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    if tolerance is None and precision >= 1:
        raise ValueError(
            f"`numerical_rank` needs a `tolerance` for {matrices.dtype} matrices of this size, "
            f"whose rounding may reach the largest singular value, got shape "
            f"{tuple(matrices.shape)}. Pass one such as 1e-2, or take them in float32."
        )
    cut = (precision if tolerance is None else tolerance) * spectrum[..., :1]
    return (spectrum > cut).sum(-1)


class Profile(NamedTuple):
    """Lowest, mean and highest log10 of the singular values of each index, `(K,)` each."""

    low: Tensor
    mean: Tensor
    high: Tensor


def log_profile(values: Tensor, floor: float = 1e-12) -> Profile:
    """The log10 of singular values `(..., K)`: its lowest, mean and highest per index over the
    leading axes, that is over heads, images, blocks (the paper's Figure 13).

    Values below `floor` times the largest of all count as that: zero has no logarithm.

    >>> low, mean, high = log_profile(torch.tensor([[100.0, 1.0], [10.0, 0.01]]))
    >>> [[round(x, 6) for x in y.tolist()] for y in (low, mean, high)]
    [[1.0, -2.0], [1.5, -1.0], [2.0, 0.0]]
    """
    schema.check_type("log_profile", "values", values, Tensor)
    if values.dim() < 1 or not values.numel() or not bool(values.isfinite().all()):
        raise ValueError(
            f"`log_profile` needs finite singular values (..., K), got shape "
            f"{tuple(values.shape)}. Take those of `singular_values`."
        )
    largest = float(values.max())
    bounded = schema.fits(floor, float) and 0 < floor < 1
    if largest <= 0 or float(values.min()) < 0 or not bounded:
        raise ValueError(
            f"`log_profile` needs values >= 0, not all of them 0, and 0 < `floor` < 1, got values "
            f"from {float(values.min())} to {largest} and {floor!r}. Take `singular_values`."
        )
    logs = values.double().clamp(min=floor * largest).log10().reshape(-1, values.shape[-1])
    return Profile(logs.amin(0), logs.mean(0), logs.amax(0))


def plot(panels: Mapping[str, Mapping[str, Tensor]], rank: int | None = None) -> Any:
    """A matplotlib Figure, a panel each, of `log_profile` by index: the mean as a line over the
    band from the lowest to the highest, all panels on one scale.

    Args:
        panels: title to name to singular values `(..., K)`, such as {"scores": {"softmax": ..,
            "G3B": ..}, "weights": ..}.
        rank: the r of an operator, drawn as an upright line.
    """
    if not panels or not all(panels.values()):
        raise ValueError("`plot` needs singular values by panel and name, got none. Pass some.")
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    looks = {name: figures.look(i) for i, name in enumerate(names)}
    fig, axes = figures.grid(1, len(panels), 2.7, 2.4, sharey=True)
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        for name, values in panel.items():
            low, mean, high = (x.cpu().numpy() for x in log_profile(values))
            index = range(1, len(mean) + 1)
            style = looks[name]
            ax.fill_between(index, low, high, color=style["color"], alpha=0.2, lw=0)
            ax.plot(index, mean, lw=1.3, label=name, **style)
        if rank is not None:
            ax.axvline(rank, color=figures.QUIET, lw=0.8, ls=(0, (3, 2)))
            place = {"transform": ax.get_xaxis_transform(), "ha": "left", "va": "top"}
            ax.text(rank, 1.0, f" r = {rank}", fontsize=7, color=figures.INK, **place)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(title, fontsize=8, color=figures.INK)
        ax.set_xlabel("index")
    axes[0, 0].set_ylabel("log10 of the singular value")
    figures.legend(fig)
    return fig


# --- the section ----------------------------------------------------------------------------------


def rank_of(operator: Any) -> int | None:
    """The r that the weights of an operator cannot exceed, None where nothing bounds them."""
    options = operator.options
    bound = options.get("kind") == "low_rank" and not options.get("project")
    return options["rank"] if bound and not options.get("base") else None


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """Singular values of scores and weights of the last block, and ranks over all blocks."""

    def compute() -> dict[str, Tensor]:
        model = context.model(member.config)
        images, _ = context.images(member.config, IMAGES)
        with torch.no_grad():
            aux = model.intermediates(member.params, images)
        found: dict[str, Tensor] = {}
        for kind in ("scores", "weights"):
            blocks = [samples(one, aux[f"blocks.{i}.{kind}"]) for i, one in enumerate(model.sites)]
            found[f"{kind}_values"] = singular_values(blocks[-1])
            ranks = torch.stack([effective_rank(block).mean() for block in blocks])
            found[f"{kind}_effective"], found[f"{kind}_by_block"] = ranks.mean(), ranks
            numerical = [numerical_rank(block, CUT).double() for block in blocks]
            found[f"{kind}_numerical"] = torch.stack([one.mean() for one in numerical]).mean()
            found[f"{kind}_most"] = torch.stack([one.max() for one in numerical]).max()
        return found

    return context.kept(f"ranks images={IMAGES}", member, compute)


def section(context: Context) -> pages.Section:
    """Spectra before and after the operator as in the paper's Figure 13, and ranks beside r."""
    found = scalars(context, measure)
    first = {one.name: measure(context, Member(one, 0)) for one in context.results}
    bounds = {}
    for result, model in zip(context.results, context.models, strict=True):
        ranks = {rank_of(op) for op in model.operators}
        if getattr(model.config, "gated_blocks", 0):
            ranks.add(None)  # their weights are mixed with those of positions
        bounds[result.name] = max(ranks) if None not in ranks else None  # type: ignore[type-var]
    known = {rank for rank in bounds.values() if rank is not None}
    keys = {"before the operator": "scores_values", "after it": "weights_values"}
    panels = {title: {name: own[key] for name, own in first.items()} for title, key in keys.items()}
    fig = pages.figure(
        plot(panels, known.pop() if len(known) == 1 else None),
        "spectra",
        f"Singular values of scores and weights of {', '.join(first)}, last block",
        f"Singular values of the last block, {context.first_seeds}: mean (line), lowest and "
        f"highest (band) over heads and {context.available(IMAGES)} validation images. A cut at r "
        "is a fall of many decades there.",
    )
    most = context.most_keys
    columns = [
        Column("scores_effective", "effective rank, scores", 1, low=0.0, high=most),
        Column("weights_effective", "effective rank, weights", 1, low=0.0, high=most),
        Column("weights_numerical", "numerical rank, weights", 1, low=0.0, high=most),
        Column("weights_most", "its largest", 0, low=0.0, high=most),
    ]
    table, numbers = seeds_table(
        found,
        columns,
        "Mean over heads, blocks and images, 95 % interval over seeds. Effective rank: exp of the "
        "entropy of the singular values, scaled to sum 1. Numerical rank: how many are above "
        f"{CUT:g} of the largest; its largest over all heads, blocks and images.",
    )
    lines = [
        f"{name} cannot have a rank above r = {bound}; its largest numerical rank is "
        f"{max(one['weights_most'] for one in found[name].values()):.0f}."
        for name, bound in bounds.items()
        if bound is not None
    ]
    lines += differences(found, "weights_effective", "Effective rank of the weights", columns[1])
    told = "How many directions the attention of a head really uses."
    notes = windowed(context, "A rank is at most the number of keys of its window.")
    if any(getattr(model.config, "gated_blocks", 0) for model in context.models):
        notes.append(pages.note("Weights of gated blocks are mixed with those of positions."))
    return pages.Section([pages.text(told), *notes, fig, table, pages.items(lines)], numbers)


ANALYSIS = Analysis(
    "spectra", "Spectra of attention", section, version=2, minutes=0.5, measure=measure
)
