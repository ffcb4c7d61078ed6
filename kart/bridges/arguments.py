"""What several bridges are given: masks as other libraries write them, dropout, ways of sharing."""

import torch
from torch import Tensor

from kart import nn, operators


def from_additive(function: str, argument: str, mask: Tensor) -> Tensor:
    """The boolean mask, True = attend, of one that is added to scores: 0 there, -inf (or the least
    number of its type) elsewhere.

    Raises:
        ValueError: where it holds other numbers, for a bias has no meaning beyond softmax, or
            integers, or is learned, as a bias is that begins at 0.
    """
    if not mask.dtype.is_floating_point:
        raise ValueError(
            f"`{function}` needs `{argument}` boolean or of floating-point numbers, got "
            f"{mask.dtype}. Convert it with `.bool()`."
        )
    if mask.requires_grad:
        raise ValueError(
            f"`{function}` needs `{argument}` that is not learned, got one that requires "
            "gradients. A bias of the scores has a meaning within softmax alone: leave it out."
        )
    shown = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not bool((shown | hidden).all()):
        raise ValueError(
            f"`{function}` needs `{argument}` of 0 and -inf where it is not boolean, got other "
            "numbers. A bias of the scores has a meaning within softmax alone: leave it out."
        )
    return shown


def check_no_dropout(function: str, argument: str, rate: float) -> None:
    """Raises ValueError for dropout of attention weights, which are never held."""
    if rate:
        raise ValueError(
            f"`{function}` needs `{argument}` 0, got {rate!r}: the weights, which it would drop, "
            "are never held. Drop what comes out instead."
        )


def operator_and_sharing(
    function: str, operator: str | operators.Operator, sharing: str | None
) -> tuple[operators.Operator, bool]:
    """The operator of a spec, and whether all blocks share one.

    Raises:
        ValueError: where the letter of the spec and `sharing` differ.
    """
    if sharing not in (None, "blockwise", "universal"):
        raise ValueError(
            f'`{function}` needs `sharing` "blockwise" or "universal", got {sharing!r}. Choose one.'
        )
    said = operators.parse(operator).sharing if isinstance(operator, str) else None
    if sharing is not None and said is not None and sharing != said:
        raise ValueError(
            f"`{function}` needs one way of sharing, got {operator!r} and sharing={sharing!r}. "
            "Drop one of them."
        )
    return nn.named_operator(operator, shared=True), "universal" in (sharing, said)
