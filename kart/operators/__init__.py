"""Row operators: what stands where softmax stood, from scores to attention weights (paper, sec. 1).

| operator | weights of a row of scores S[n, :] | source | file |
|---|---|---|---|
| `low_rank` | W Phi(S), Phi r x M, W M x r | KArAt, the form the paper trains | `learnable.py` |
| `full_rank` | Phi(S), Phi M x M | eq. 1 | `learnable.py` |
| `project_first` | Phi(W S), W r x M, Phi M x r | App. C.5, order (ii) | `learnable.py` |
| `two_stage` | Phi2(Phi1(S)), Phi1 r x M, Phi2 M x r | App. C.5, order (iii) | `learnable.py` |
| `elementwise` | phi(S), one function a head, any length | ours | `elementwise.py` |
| `by_distance` | phi of the offset, any length | ours; continuous bias | `elementwise.py` |
| `generated` | W Phi(S), both functions of the place | ours | `generated.py` |
| `softmax`, `sigmoid`, `relu`, `sparsemax` | fixed functions | baselines | `fixed.py` |
| `entmax`, `tempered` | 1.5-entmax; softmax at a temperature | baselines | `comparators.py` |
| `gated` | softmax(S) and softmax of the offset, gated | ConViT | `comparators.py` |
| `synthesizer` | of the queries alone | Synthesizer, dense | `comparators.py` |
| `linformer`, `performer`, `cosformer` | of linear cost | baselines | `linear.py` |
| `static` | T, N x N parameters; beside or inside softmax | Synthesizer | `static.py` |
| `relative` | T by offset; beside or inside softmax | ours; Swin's bias | `relative.py` |
| `softconv` | softmax(S) + T by offset | ours | `offset.py` |
| `by_offset` | T[o] + phi_o(S), o the offset | ours | `offset.py` |
| `beside_relative` | softmax(S) + T + W Phi(S) | ours | `offset.py` |
| `added` | the sum of some of the above | ours | `sums.py` |
| `hybrid` | one of the above a head | App. C.5.2 | `mixtures.py` |

`contract.py` is what an operator is and what all of them share (checks, masks, precision, base,
projection), `spec.py` the language of spec strings, `resize.py` other numbers of keys, `cache.py`
tokens that come in parts. A new operator is a factory in a file of its own (from `from_rows`,
`from_logits` or, of any two forms, `from_forms`) and its name in `OPERATORS`: its signature says
what a spec may set.
"""

from collections.abc import Callable
from typing import Any

from kart.operators import spec as language
from kart.operators.cache import Cache, step
from kart.operators.comparators import entmax, gated, synthesizer, tempered
from kart.operators.contract import Factored, Operator, Source, from_forms, from_logits, from_rows
from kart.operators.elementwise import by_distance, elementwise
from kart.operators.fixed import relu, sigmoid, softmax, sparsemax
from kart.operators.generated import generated
from kart.operators.learnable import full_rank, low_rank, project_first, two_stage
from kart.operators.linear import cosformer, linformer, performer
from kart.operators.mixtures import hybrid
from kart.operators.offset import beside_relative, by_offset, softconv
from kart.operators.relative import relative
from kart.operators.resize import resize
from kart.operators.spec import Spec, each_block, shown, sources
from kart.operators.static import static
from kart.operators.sums import added

# what a spec may name; the first that takes a basis is the order of a spec that names none
OPERATORS: tuple[Callable[..., Operator], ...] = (
    *(softmax, sigmoid, relu, sparsemax),
    *(static, relative, softconv),
    *(entmax, tempered, gated, synthesizer, linformer, performer, cosformer),
    *(low_rank, full_rank, project_first, two_stage, by_offset, beside_relative),
    *(elementwise, by_distance, generated),
)
EXAMPLES = language.examples(OPERATORS)

__all__ = ["Cache", "EXAMPLES", "Factored", "OPERATORS", "Operator", "Source", "Spec", "added"]
__all__ += ["beside_relative", "by_distance", "by_offset", "cosformer", "each_block", "elementwise"]
__all__ += ["entmax", "from_forms", "from_logits", "from_rows", "full_rank", "gated", "generated"]
__all__ += ["hybrid", "linformer", "low_rank", "options", "parse", "performer", "project_first"]
__all__ += ["relative", "relu", "resize", "shown", "sigmoid", "softconv", "softmax", "sources"]
__all__ += ["sparsemax", "static", "step", "synthesizer", "tempered", "two_stage"]


def parse(spec: str, **overrides: Any) -> Spec:
    """The operator that a spec string names.

    `FAMILY-NUMBERS` then `B` (blockwise) or `U` (universal), then `:option=value,...`. The family
    defaults to fourier, `G3` is its grid; `polynomial-0`, `chebyshev-4` give degrees and
    `rational-5/4` both degrees. Options: `rank`, `project=simplex`, `base=softmax` or a unit's
    `identity|silu|gelu` (also `unit_base`), `init`, `mix`, `scales=true`, the family's own
    (`degree`, `span=-4..4`, `omega`, `reading`), and the order with its own (`reach`, `normalise`):
    `order=low_rank|full_rank|project_first|two_stage|by_offset|beside_relative|elementwise` or
    `by_distance|generated`. What has no units stands by its name, as `relative:inside=true`. Heads
    that differ are joined with `+`: `2*softmax+G3B`.

    A basis or operator of your own, or a factory of one, stands behind its module or file, which
    is run: `my_module:sinc-B`, `sinc.py:sinc-8U:rank=4`. Numbers are the first arguments of its
    factory, options the others.

    Args:
        spec: the string.
        overrides: options for every head that takes them and does not name them itself; None leaves
            a default. One that no head takes is an error, like an option without effect in the
            spec.

    >>> parse("G3B").operator.basis.options["grid"], parse("G3U").sharing
    (3, 'universal')
    >>> parse("2*softmax+G3B:rank=4").operator.name
    '2*softmax+G3B:rank=4'
    """
    return language.read(spec, OPERATORS, overrides)


def options(spec: str) -> set[str]:
    """The options that a spec leaves open, which `parse` takes as overrides.

    >>> options("softmax"), "rank" in options("softmax+G3B"), "rank" in options("G3B:rank=4")
    (set(), True, False)
    """
    return language.open_options(spec, OPERATORS)
