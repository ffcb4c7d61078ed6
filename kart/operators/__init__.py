"""Row operators: what stands where softmax stood, from scores to attention weights (paper, sec. 1).

| operator | weights of a row of scores S[n, :] | source | file |
|---|---|---|---|
| `low_rank` | W Phi(S), Phi r x M, W M x r | KArAt, the form the paper trains | `learnable.py` |
| `full_rank` | Phi(S), Phi M x M | eq. 1 | `learnable.py` |
| `project_first` | Phi(W S), W r x M, Phi M x r | App. C.5, order (ii) | `learnable.py` |
| `two_stage` | Phi2(Phi1(S)), Phi1 r x M, Phi2 M x r | App. C.5, order (iii) | `learnable.py` |
| `softmax`, `sigmoid`, `relu`, `sparsemax` | fixed functions | baselines | `fixed.py` |
| `hybrid` | one of the above a head | App. C.5.2 | `mixtures.py` |

`contract.py` is what an operator is and what all of them share (checks, masks, precision, base,
projection), `spec.py` the language of spec strings, `resize.py` other numbers of keys. A new
operator is a factory in a file of its own (from `from_rows` or `from_logits`) and its name in
`OPERATORS`: its signature says what a spec may set.
"""

from collections.abc import Callable
from typing import Any

from kart.operators import spec as language
from kart.operators.contract import Factored, Operator, Source, from_logits, from_rows
from kart.operators.fixed import relu, sigmoid, softmax, sparsemax
from kart.operators.learnable import full_rank, low_rank, project_first, two_stage
from kart.operators.mixtures import hybrid
from kart.operators.resize import resize
from kart.operators.spec import Spec, sources

# what a spec may name; the first that takes a basis is the order of a spec that names none
OPERATORS: tuple[Callable[..., Operator], ...] = (
    *(softmax, sigmoid, relu, sparsemax),
    *(low_rank, full_rank, project_first, two_stage),
)
EXAMPLES = language.examples(OPERATORS)

__all__ = ["EXAMPLES", "OPERATORS", "Factored", "Operator", "Source", "Spec", "from_logits"]
__all__ += ["from_rows", "full_rank", "hybrid", "low_rank", "options", "parse", "project_first"]
__all__ += ["relu", "resize", "sigmoid", "softmax", "sources", "sparsemax", "two_stage"]


def parse(spec: str, **overrides: Any) -> Spec:
    """The operator that a spec string names.

    `FAMILY-NUMBERS` then `B` (blockwise) or `U` (universal), then `:option=value,...`. The family
    defaults to fourier, `G3` is its grid; `polynomial-0`, `chebyshev-4` give degrees and
    `rational-5/4` both degrees. Options: `rank`, `project=simplex`, `base=softmax` or a unit's
    `identity|silu|gelu` (also `unit_base`), `init`, `mix`, `scales=true`,
    `order=low_rank|full_rank|project_first|two_stage`, and the family's own (`degree`,
    `span=-4..4`, `omega`, `reading`). Heads that differ are joined with `+`: `2*softmax+G3B`.

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
