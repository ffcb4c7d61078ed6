"""Windows of a grid of tokens: partition, shift masks, relative positions, padding."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kart.operators.relative import entry_index


class Cut(NamedTuple):
    """How a grid of `side` x `side` tokens is cut into windows of `window` x `window`: rolled by
    `-shift` before, and padded below and at the right where windows do not divide it.
    """

    side: int
    window: int
    shift: int = 0

    @property
    def count(self) -> int:
        """The windows of an image.

        >>> Cut(8, 4).count, Cut(9, 4).count
        (4, 9)
        """
        return (-(-self.side // self.window)) ** 2

    @property
    def whole(self) -> list[int]:
        """The windows, counted in reading order, in which no pair is masked: those at the lower and
        the right end hold tokens from both ends of a rolled grid, or padding.

        >>> Cut(12, 4, 2).whole, Cut(8, 4).whole
        ([0, 1, 3, 4], [0, 1, 2, 3])
        """
        across = -(-self.side // self.window)
        last = across - 1 if self.shift or self.side % self.window else across
        return [row * across + column for row in range(last) for column in range(last)]


def partition(x: Tensor, window: int) -> Tensor:
    """A grid `(..., h, w, D)` to its windows in reading order, `(..., n, window^2, D)`."""
    rows, columns = x.shape[-3] // window, x.shape[-2] // window
    cut = x.unflatten(-2, (columns, window)).unflatten(-4, (rows, window))
    # (..., rows, columns, window, window, D)
    return cut.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)


def merge(x: Tensor, rows: int, columns: int) -> Tensor:
    """The grid `(..., rows, columns, D)` whose `partition` is `x (..., n, window^2, D)`."""
    window = round(x.shape[-2] ** 0.5)
    cut = x.unflatten(-2, (window, window)).unflatten(-4, (rows // window, columns // window))
    return cut.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)


def pad(x: Tensor, window: int) -> Tensor:
    """A grid `(..., h, w, D)` with zeros below and at the right up to multiples of `window`."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % window, 0, -x.shape[-3] % window))


def padding_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor | None:
    """Which keys of each window are no padding, `(n, 1, 1, window^2)`; None where there is none."""
    if rows % window == 0 and columns % window == 0:
        return None
    real = torch.ones(rows, columns, 1, dtype=torch.bool, device=device)
    return partition(pad(real, window), window).mT[:, None]


def shift_mask(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which pairs of a window were neighbours before the grid was rolled by `-shift`, `(n, 1,
    window^2, window^2)`.

    The last windows hold tokens from both ends of the grid (Liu et al. 2021, fig. 4): two tokens
    attend to each other where both or neither were carried over, by rows and by columns.
    """
    carried = torch.arange(side, device=device) >= side - shift
    kind = 2 * carried[:, None].long() + carried
    kinds = partition(kind[..., None], window)  # (n, window^2, 1)
    return (kinds == kinds.mT)[:, None]


def position_bias(table: Tensor, window: int) -> Tensor:
    """Biases `(H, window^2, window^2)` of a table `((2 window - 1)^2, H)`, whose offsets (query
    less key) are counted row by row, from `(1 - window, 1 - window)` on.
    """
    if table.shape[0] != (2 * window - 1) ** 2:
        raise ValueError(
            f"`apply` needs a `relative_position_bias_table` of {(2 * window - 1) ** 2} offsets, "
            f"for windows of {window}, got {table.shape[0]}. Create the model with the "
            "`window_size` that its parameters were made with."
        )
    # turned around: its offsets are key less query
    index = entry_index(0, window, window, table.device).mT.contiguous()
    return table[index].movedim(-1, 0)


def biased(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, both `(..., d + M)`, whose scores are those of `q` and `k` plus `bias (H,
    N, M)`.

    The bias goes with the queries and a one with the keys that it is for, so that an operator's
    `attend` streams biased scores, too.
    """
    keys = k.shape[-2]
    width = q.shape[-1] + keys
    wide_q = [
        q * (width / q.shape[-1]) ** 0.5,
        (bias * width**0.5).to(q.dtype).expand(*q.shape[:-1], keys),
    ]
    ones = torch.eye(keys, dtype=k.dtype, device=k.device).expand(*k.shape[:-1], keys)
    return torch.cat(wide_q, dim=-1), torch.cat([k, ones], dim=-1)
