"""The fixed operators, baselines of the learnable ones: softmax, sigmoid, relu, sparsemax."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kart import bases, kernels
from kart.factories import remember
from kart.kernels.plain import scores as scores_of
from kart.kernels.plain import wide
from kart.operators.contract import (
    SIMPLEX,
    SOFTMAX,
    Operator,
    attended_keys,
    from_rows,
    only,
    scored,
    simplex_rows,
    simplex_values,
    softmax_rows,
)


def feature(unit: Callable[[Tensor], Tensor]) -> bases.Basis:
    """A basis of the one feature `unit(x)`."""
    return bases.linear(lambda x: unit(x)[..., None], 1, family="fixed")


def streamed(basis: bases.Basis, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`sum_m f(S[n, m]) v[m]` over attended keys, `(..., H, N, e)`, f the feature, without the
    weights.
    """
    # the full-rank product with v for coefficients
    return kernels.contract(basis, wide(v).mT[..., None], q, k, mask)


def on_simplex(each: int) -> dict[str, Any]:
    """The traits of rows on the simplex that take `each` operations a score."""
    return {**scored(each), "simplex": True, "shift_invariant": True}


@remember
def softmax() -> Operator:
    """Rows of softmax; a row whose keys are all masked is zero, one whose attended scores are all
    -inf NaN, of which `kernels.softmax_attention` says more.
    """
    return from_rows("softmax", softmax_rows, kernels.softmax_attention, traits=on_simplex(SOFTMAX))


@remember
def sigmoid() -> Operator:
    """sigmoid(s - log n), n the number of keys that are attended (Ramapuram et al. 2024)."""

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        count = attended_keys(mask, scores.shape[-1], scores)
        return only((scores - count.log()).sigmoid(), mask)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # a basis is not made while it is traced, where the number of keys may be left open
        if mask is not None or torch.compiler.is_compiling():
            return rows(scores_of(q, k, None), mask) @ wide(v)
        shift = math.log(k.shape[-2])
        return streamed(feature(lambda x: (x - shift).sigmoid()), q, k, v, None)

    return from_rows("sigmoid", rows, product, traits=scored(3))


@remember
def relu() -> Operator:
    """relu(s) / n, n the number of keys that are attended (Wortsman et al. 2023)."""
    basis = feature(Tensor.relu)

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        return only(scores.relu() / attended_keys(mask, scores.shape[-1], scores), mask)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # divided before the sum, which half types could not hold
        keys = k.shape[-2]
        mean = streamed(basis, q, k, wide(v) / keys, mask)
        return mean if mask is None else wide(mean) * (keys / attended_keys(mask, keys, wide(mean)))

    return from_rows("relu", rows, product, traits=scored(2))


@remember
def sparsemax() -> Operator:
    """Rows of scores projected onto the simplex (Martins and Astudillo 2016)."""
    return from_rows("sparsemax", simplex_rows, simplex_values, traits=on_simplex(SIMPLEX))
