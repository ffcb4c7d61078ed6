"""What a model computes for one image beside its row operators: its family declares it, layer by
layer, and `kart.analysis.cost` adds it up.

    def work_of(config: MyConfig) -> work.Layers:
        yield work.product("embed", config.tokens, pixels, config.embed_dim)
        for _ in range(config.depth):
            yield from work.block(config.tokens, config.embed_dim, hidden)

Counted are the operations of the paper's convention. Sums that are added one by one (biases,
residuals, masks) and GELU are no layers here: the count leaves them out.
"""

from collections.abc import Iterator

from kart.operators.contract import SOFTMAX

# a field of `kart.analysis.cost.Flops`, and operations that it counts
Layer = tuple[str, int]
Layers = Iterator[Layer]


def product(part: str, rows: int, inputs: int, outputs: int) -> Layer:
    """A matrix product: `rows` vectors of `inputs` numbers become as many of `outputs`; `part` is
    "embed", "linear", "attention" or "head".
    """
    return part, rows * inputs * outputs


def norm(rows: int, width: int) -> Layer:
    """A layer norm of `rows` vectors of `width` numbers."""
    return "norms", 5 * rows * width


def softmax(rows: int, keys: int) -> Layer:
    """Softmax of `rows` of `keys` numbers, in attention that is no row operator's."""
    return "attention", SOFTMAX * rows * keys


def block(rows: int, size: int, hidden: int, attended: int | None = None) -> Layers:
    """The layers of `blocks.block` on `rows` tokens of width `size`; `attended` are the tokens of
    its attention where padding adds to them.
    """
    attended = rows if attended is None else attended
    yield norm(rows, size)
    yield product("linear", attended, size, 3 * size)
    yield product("linear", attended, size, size)
    yield norm(rows, size)
    yield product("linear", rows, size, hidden)
    yield product("linear", rows, hidden, size)
