"""The functions that heads have learned: units phi_pq, and a key's weight by its own score."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kart.operators import Operator, Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _check(function: str, operator: Operator, params: Params) -> None:
    if operator.options.get("kind") != "low_rank" or "units" not in params:
        raise ValueError(
            f"`{function}` needs a low-rank operator and its parameters, got {operator.name!r} "
            f"with {sorted(params)}. Pass params['blocks']['0']['operator'] of a KArAt model."
        )


def curves(operator: Operator, params: Params, x: Tensor) -> Tensor:
    """The units phi_pm of a low-rank operator at `x (X,)`, `(H, r, M, X)`."""
    _check("curves", operator, params)
    basis = operator.basis
    assert basis is not None
    lifted = {name: leaf.unsqueeze(3) for name, leaf in params["units"].items()}
    if basis.coefficients is None:
        return basis.apply(lifted, x)
    return basis.apply({name: leaf.to(x.dtype) for name, leaf in lifted.items()}, x)


def response(operator: Operator, params: Params, x: Tensor) -> Tensor:
    """The part of a key's weight that its own score `x (X,)` decides, `(H, M, X)`.

    For key m of a low-rank operator that is sum_p W[m, p] phi_pm(x), the diagonal of d weight /
    d score before any projection; the other keys' scores add a constant. Softmax has exp here.
    """
    values = curves(operator, params, x)
    return torch.einsum("hmp,hpmx->hmx", params["mix"].to(values.dtype), values)


def quantiles(values: Tensor, at: tuple[float, ...] = (0.1, 0.5, 0.9)) -> Tensor:
    """Quantiles over the keys of `(H, M, X)`, `(len(at), H, X)`."""
    return values.quantile(torch.tensor(at, dtype=values.dtype), dim=1)


def plot(operator: Operator, params: Params, span: float = 6.0, title: str = "") -> "Figure":
    """A figure with a panel per head: each key's own response, centred, and their middle.

    Args:
        operator, params: a low-rank operator and its parameters in one block.
        span: scores from -span to span.
        title: over the figure.
    """
    from matplotlib.figure import Figure

    x = torch.linspace(-span, span, 241)
    with torch.no_grad():
        values = response(operator, params, x).float()
    values = values - values.mean(-1, keepdim=True)
    low, middle, high = quantiles(values)
    heads = values.shape[0]
    figure = Figure(figsize=(2.6 * heads, 2.1), layout="constrained")
    panels = figure.subplots(1, heads, sharey=True, squeeze=False)[0]
    for head, axes in enumerate(panels):
        # the class token's key and, evenly spaced, some others
        chosen = range(0, values.shape[1], max(1, values.shape[1] // 8))
        for key in chosen:
            axes.plot(x, values[head, key], color="#2f6f8f", linewidth=0.7, alpha=0.55)
        axes.fill_between(x, low[head], high[head], color="#2f6f8f", alpha=0.15, linewidth=0)
        axes.plot(x, middle[head], color="#b3533b", linewidth=1.4)
        axes.axhline(0, color="0.6", linewidth=0.5)
        axes.set_title(f"head {head + 1}", fontsize=9)
        axes.set_xlabel("score", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight of a key\nby its own score", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
