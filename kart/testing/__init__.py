"""Property suites."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`kart.testing` needs hypothesis, which is not installed. Install it with "
        "`pip install 'kart-attention[testing]'`."
    ) from error

import torch

from kart.testing import core, suites
from kart.testing.core import Result

Decorator = Callable[[Callable[[], Any]], Callable[..., None]]


def check_basis(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[Result]:
    """Puts a basis through its suite, without pytest; the same examples every time.

    Args:
        obj: anything with `init(generator, shape)`, `apply(params, x)` and `expand(x)`; its
            `traits`, `options` and `family` are used where it has them (see `kart.bases.Basis`).
        expected_failures: reasons by name of property; one that holds all the same is a failure.
        dtype: torch.float32 or torch.float64; None draws both.
        max_examples: examples a property; None is the number of Hypothesis' active profile.
        only: names of the properties to check, None for all.
        traits: declared in addition to those of `obj`.
        name: what messages call the object.
    """
    suite = suites.basis(obj, name, traits, dtype)
    return core.check(suite, expected_failures, max_examples, only)


def basis_suite(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_examples: int | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_basis`, a decorator that makes a test function one pytest item a property.

    The function takes no arguments and is called before each item. Examples come from the active
    profile of Hypothesis.
    """
    suite = suites.basis(obj, name, traits, dtype)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_operator(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
    heads: int | None = None,
) -> list[Result]:
    """As `check_basis`, for a row operator: anything with `init(generator, heads, tokens)`,
    `weights(params, scores, mask)` and `attend(params, q, k, v, mask)`. `heads` fixes their number
    where the operator works for one alone.
    """
    suite = suites.operator(obj, name, traits, dtype, heads)
    return core.check(suite, expected_failures, max_examples, only)


def operator_suite(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_examples: int | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
    heads: int | None = None,
) -> Decorator:
    """As `basis_suite`, for what `check_operator` takes."""
    suite = suites.operator(obj, name, traits, dtype, heads)
    return core.pytest_suite(suite, expected_failures, max_examples)
