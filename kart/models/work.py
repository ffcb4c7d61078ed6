"""What a model computes for one image beside its row operators: its family declares it, layer by
layer, and `kart.analysis.cost` counts it.

    def work_of(config: MyConfig) -> work.Layers:
        yield work.Product("embed", config.tokens, pixels, config.embed_dim)
        for _ in range(config.depth):
            yield from work.block(config.tokens, config.embed_dim, hidden)

Sums that are added one by one (biases, residuals, masks) and GELU are no layers here: the count
leaves them out.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Product(NamedTuple):
    """A matrix product: `rows` vectors of `inputs` numbers become as many of `outputs`.

    `part` is the field of `kart.analysis.cost.Flops` that it belongs to: "embed", "linear",
    "attention" or "head".
    """

    part: str
    rows: int
    inputs: int
    outputs: int


class Norm(NamedTuple):
    """A layer norm of `rows` vectors of `width` numbers."""

    rows: int
    width: int


class Softmax(NamedTuple):
    """Softmax of `rows` of `keys` numbers, in attention that is no row operator's."""

    rows: int
    keys: int


Layers = Iterator[Product | Norm | Softmax]


def block(rows: int, size: int, hidden: int, attended: int | None = None) -> Layers:
    """The layers of `blocks.block` on `rows` tokens of width `size`; `attended` are the tokens of
    its attention where padding adds to them.
    """
    attended = rows if attended is None else attended
    yield Norm(rows, size)
    yield Product("linear", attended, size, 3 * size)
    yield Product("linear", attended, size, size)
    yield Norm(rows, size)
    yield Product("linear", rows, size, hidden)
    yield Product("linear", rows, hidden, size)
