"""A check and a pytest suite for every kind of object, each pair made from one suite."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kart.testing import basis, core, kernel, model, operator, projection, step
from kart.testing.core import Result, Suite

CHECK = """

Every property is put to it without pytest, with the same examples every time.

Args:
    expected_failures: reasons by name of property; one that holds all the same is a failure, one
        of a property that is skipped an error.
    max_examples: examples a property; None is the number of Hypothesis' active profile.
    only: names of the properties to check, None for all.
    dtype: torch.float32 or torch.float64; None draws both.
    traits: declared in addition to those of the object.
    name: what messages call the object.
"""
DECORATE = """

A decorator that makes a test function, which takes no arguments and is called before each item,
one pytest item a property. Examples come from the active profile of Hypothesis, and so do their
number and the database of failures. A failing property fails its item, one that was expected to
fail and holds does as well, and one that is not declared or makes no sense for the object is
skipped with the reason.
"""


Check = Callable[..., list[Result]]
Decorate = Callable[..., Callable[[Callable[[], Any]], Callable[..., None]]]


def pair(suite: Callable[..., Suite]) -> tuple[Check, Decorate]:
    """The check and the decorator of the suites that `suite(obj, ..)` makes; both take what it
    takes, and how to run it.
    """

    def check(
        *obj: Any,
        expected_failures: Mapping[str, str] | None = None,
        max_examples: int | None = None,
        only: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Result]:
        made = suite(*obj, **options)
        return list(core.results(made, expected_failures, max_examples, only))

    def decorate(
        *obj: Any,
        expected_failures: Mapping[str, str] | None = None,
        max_examples: int | None = None,
        **options: Any,
    ) -> Callable[[Callable[[], Any]], Callable[..., None]]:
        return core.pytest_suite(suite(*obj, **options), expected_failures, max_examples)

    kind = suite.__module__.rsplit(".", 1)[-1]
    _dress(check, f"check_{kind}", suite, CHECK)
    _dress(decorate, f"{kind}_suite", suite, DECORATE)
    return check, decorate


def _dress(function: Callable[..., Any], name: str, suite: Callable[..., Suite], text: str) -> None:
    """Gives a function the name, docstring and signature that a reader looks for."""
    own, taken = inspect.signature(function), inspect.signature(suite)
    how = [p for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = sorted([*taken.parameters.values(), *how], key=lambda p: p.kind)
    signature = own.replace(parameters=parameters)
    doc = (inspect.getdoc(suite) or "") + text
    for key, value in (("__name__", name), ("__qualname__", name), ("__doc__", doc)):
        setattr(function, key, value)
    setattr(function, "__signature__", signature)  # noqa: B010


# by kind: what the command line names
SUITES: dict[str, Callable[..., Suite]] = {
    "basis": basis.suite,
    "operator": operator.suite,
    "projection": projection.suite,
    "kernel": kernel.suite,
    "step": step.suite,
    "model": model.suite,
}
check_basis, basis_suite = pair(basis.suite)
check_operator, operator_suite = pair(operator.suite)
check_projection, projection_suite = pair(projection.suite)
check_kernel, kernel_suite = pair(kernel.suite)
check_step, step_suite = pair(step.suite)
check_model, model_suite = pair(model.suite)
