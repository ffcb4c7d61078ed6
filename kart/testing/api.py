"""The functions that users call: a check and a pytest suite for every kind of object."""

import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kart.testing import core, suites
from kart.testing.core import Result
from kart.testing.step import Training

Decorator = Callable[[Callable[[], Any]], Callable[..., None]]


def check_basis(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[Result]:
    """Puts a basis through its suite, without pytest; the same examples every time.

    Args:
        obj: anything with `init(generator, shape)`, `apply(params, x)` and `expand(x)`; its
            `traits`, `options` and `family` are used where it has them (see `kart.bases.Basis`).
        expected_failures: reasons by name of property; one that holds all the same is a failure.
        max_examples: examples a property; None is the number of Hypothesis' active profile.
        only: names of the properties to check, None for all.
        dtype: torch.float32 or torch.float64; None draws both.
        traits: declared in addition to those of `obj`.
        name: what messages call the object.
    """
    suite = suites.basis(obj, name, traits, dtype)
    return core.check(suite, expected_failures, max_examples, only)


def basis_suite(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_basis`, a decorator that makes a test function one pytest item a property.

    The function takes no arguments and is called before each item. Examples come from the active
    profile of Hypothesis, and so do their number and the database of failures. A failing property
    fails its item, one that was expected to fail and holds does as well, and one that is not
    declared or makes no sense for the object is skipped with the reason.
    """
    suite = suites.basis(obj, name, traits, dtype)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_operator(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    heads: int | None = None,
    name: str | None = None,
) -> list[Result]:
    """As `check_basis`, for a row operator: anything with `init(generator, heads, tokens)`,
    `weights(params, scores, mask=None)` and `attend(params, q, k, v, mask=None)`.

    Args:
        heads: their number, where the operator works for one alone.
    """
    suite = suites.operator(obj, name, traits, dtype, heads)
    return core.check(suite, expected_failures, max_examples, only)


def operator_suite(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    heads: int | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_operator`, as a decorator: see `basis_suite`."""
    suite = suites.operator(obj, name, traits, dtype, heads)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_projection(
    project: Callable[..., torch.Tensor],
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> list[Result]:
    """As `check_basis`, for a projection of rows onto the probability simplex: `project(y,
    dim=-1)`, `(..., M)` to `(..., M)`.
    """
    suite = suites.projection(project, name, dtype)
    return core.check(suite, expected_failures, max_examples, only)


def projection_suite(
    project: Callable[..., torch.Tensor],
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_projection`, as a decorator: see `basis_suite`."""
    suite = suites.projection(project, name, dtype)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_kernel(
    fast: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Callable[..., tuple[Any, ...]],
    sizes: Mapping[str, Sequence[int]],
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[Result]:
    """As `check_basis`, for a fast form against its plain expression, under every transform.

    Args:
        fast, plain: functions of the same arguments, with one result or a tree of them.
        inputs: `inputs(generator, **sizes)` gives the arguments, floating-point tensors in float32
            (the suite casts and differentiates them), masks and None as they are.
        sizes: the numbers to draw each size from; include those around the blocks of `fast`.
        traits: "vmap", "forward_mode", "second_derivative" or "half" as False, where `fast` does
            not claim it; "half" as the number of eps of the largest value that it may be off by,
            where it keeps what is between in half precision on purpose.
    """
    suite = suites.kernel(fast, plain, inputs, sizes, name, traits, dtype)
    return core.check(suite, expected_failures, max_examples, only)


def kernel_suite(
    fast: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Callable[..., tuple[Any, ...]],
    sizes: Mapping[str, Sequence[int]],
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_kernel`, as a decorator: see `basis_suite`."""
    suite = suites.kernel(fast, plain, inputs, sizes, name, traits, dtype)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_step(
    training: Training,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    name: str | None = None,
) -> list[Result]:
    """As `check_basis`, for a training step; `Training` says what is needed of it."""
    suite = suites.step(training, name)
    return core.check(suite, expected_failures, max_examples, only)


def step_suite(
    training: Training,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_step`, as a decorator: see `basis_suite`."""
    suite = suites.step(training, name)
    return core.pytest_suite(suite, expected_failures, max_examples)


def check_model(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    images: Callable[[torch.Generator, int], torch.Tensor] | None = None,
    tied: Any = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> list[Result]:
    """As `check_basis`, for a model: anything with `init(generator)`, `apply(params, images)` and
    `intermediates(params, images)`.

    Args:
        images: `images(generator, size)` gives a float32 batch; None draws what `obj.config` takes.
        tied: the blockwise model of a universal one, of which it ties the operators.
    """
    suite = suites.model(obj, images, tied, name, dtype)
    return core.check(suite, expected_failures, max_examples, only)


def model_suite(
    obj: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    images: Callable[[torch.Generator, int], torch.Tensor] | None = None,
    tied: Any = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Decorator:
    """As `check_model`, as a decorator: see `basis_suite`."""
    suite = suites.model(obj, images, tied, name, dtype)
    return core.pytest_suite(suite, expected_failures, max_examples)


CHECKS: dict[str, Callable[..., list[Result]]] = {
    "basis": check_basis,
    "operator": check_operator,
    "projection": check_projection,
    "model": check_model,
}
FACTORIES = {"basis": "init", "operator": "init", "model": "init"}


def load(target: str, kind: str = "basis") -> Any:
    """The object that `module:name` (or `file.py:name`) names; a factory is called first."""
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise ValueError(
            f"`target` needs the form module:name, got {target!r}. "
            "Pass for example my_module:my_basis, or my_file.py:my_basis."
        )
    try:
        value: Any = _module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(
            f"`target` needs a name that can be imported, got {target!r} ({error}). Run it in the "
            "folder of the module, or pass the path of its file."
        ) from error
    mark = FACTORIES.get(kind)
    return value() if mark and callable(value) and not hasattr(value, mark) else value


def _module(name: str) -> Any:
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def table(results: Sequence[Result]) -> str:
    """The results as text: one line a property, then the failures in full."""
    width = max(len(result.name) for result in results)
    words = {True: "holds", False: "FAILS", None: "-"}
    lines = [
        f"{words[r.passed]:5}  {r.name:{width}}  "
        + textwrap.shorten("see below" if r.passed is False else r.message, 110)
        for r in results
    ]
    failures = [result.message for result in results if result.passed is False]
    counts = [sum(r.passed is value for r in results) for value in (True, False, None)]
    total = f"{counts[0]} hold, {counts[1]} fail, {counts[2]} not checked"
    return "\n\n".join(["\n".join(lines), *failures, total])


def cli_main(
    target: str,
    kind: str = "basis",
    *,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
) -> int:
    """Checks the object that `target` names and prints a table; 0 if all holds, 1 if something
    fails, 2 if there is no such object.

    Args:
        target: `module:name` or `file.py:name`; a factory without required arguments is called.
        kind: "basis", "operator", "projection" or "model".
        max_examples, only: as in `check_basis`.
    """
    try:
        if kind not in CHECKS:
            raise ValueError(
                f"`kind` needs to be one of {', '.join(CHECKS)}, got {kind!r}. Choose one of them."
            )
        obj = load(target, kind)
        results = CHECKS[kind](obj, max_examples=max_examples, only=only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    return int(any(result.passed is False for result in results))
