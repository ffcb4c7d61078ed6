"""What all suites share: a property, how it is run and shrunk, and how a failure reads."""

import inspect
import re
import textwrap
import time
import traceback
import unittest
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from kart import schema


class Result(NamedTuple):
    """What became of one property: `passed` True, False, or None for a check that proves nothing
    (not declared, not applicable, or expected to fail and failing), with the reason in `message`.
    """

    name: str
    passed: bool | None
    message: str


class Property(NamedTuple):
    """One line of mathematics that a suite holds an object to.

    The first paragraph of `check`'s docstring is the formula, the rest says what a failure means.
    `check(subject, **drawn)` raises AssertionError where it does not hold; `draws` are its
    arguments, each a strategy or a function from the subject to one. `trait` is the declared trait
    that switches it on, None for everyone; `guesses` are the values a probe tries where it is not
    declared. `unfit(subject)` says why the property makes no sense for a subject, None where it
    does.
    """

    check: Callable[..., None]
    draws: Mapping[str, Any] = {}
    trait: str | None = None
    guesses: Sequence[Any] = ()
    unfit: Callable[[Any], str | None] = lambda subject: None

    @property
    def name(self) -> str:
        """The name of the property, that of its function."""
        return self.check.__name__

    @property
    def formula(self) -> str:
        """The statement, in one line."""
        return " ".join(_paragraphs(self.check)[0].split())

    @property
    def meaning(self) -> str:
        """What it means where it fails."""
        return " ".join(" ".join(_paragraphs(self.check)[1:]).split())


def _paragraphs(function: Callable[..., Any]) -> list[str]:
    return (inspect.getdoc(function) or function.__name__).split("\n\n")


class Suite(NamedTuple):
    """An object under test: `kind` ("basis"), its name, its traits, and the properties asked of it.

    `subject` is what the checks are given, a NamedTuple with `traits` where properties have any.
    """

    kind: str
    name: str
    subject: Any
    traits: Mapping[str, Any]
    properties: Sequence[Property]

    def declaring(self, trait: str, value: Any) -> "Suite":
        """The same suite with one more trait."""
        traits = {**self.traits, trait: value}
        return self._replace(subject=self.subject._replace(traits=traits), traits=traits)


def require(kind: str, obj: Any, parts: Sequence[str], advice: str) -> None:
    """Refuses an object that lacks one of the functions `parts`."""
    missing = [part for part in parts if not callable(getattr(obj, part, None))]
    if missing:
        raise ValueError(
            f"`{kind}_suite` needs an object with {', '.join(f'`{p}`' for p in parts)}, got "
            f"{obj!r:.200} without {', '.join(missing)}. {advice}"
        )


def with_traits(
    kind: str,
    properties: Sequence[Property],
    own: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    others: Sequence[str] = (),
    declared: Mapping[str, Any] | None = None,
    elsewhere: Sequence[str] = (),
) -> dict[str, Any]:
    """The traits of an object: its `own`, those that it has `declared` and those `given` beside
    them. Refuses one of which nothing depends: of no property, not among its own, nor among
    `others`; those that are read `elsewhere` may be declared, and are left out.
    """
    known = {one.trait for one in properties if one.trait} | {*own, *others}
    for source, traits, names in (
        ("`traits`", given or {}, known),
        ("an object whose traits are", declared or {}, {*known, *elsewhere}),
    ):
        unknown = sorted(traits.keys() - names)
        if unknown:
            near = schema.near_matches(unknown[0], names)
            raise ValueError(
                f"`{kind}_suite` needs {source} among {', '.join(sorted(names))}, got "
                f"{unknown[0]!r}.{near}"
            )
    kept = {name: value for name, value in (declared or {}).items() if name in known}
    return {**own, **kept, **(given or {})}


DTYPES = (torch.float32, torch.float64)


def dtypes_of(dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """The dtypes that an object is held to: the one given, or both."""
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"`dtype` needs torch.float32, torch.float64 or None for both, got {dtype!r}. "
            "bfloat16 has a property of its own."
        )
    return DTYPES if dtype is None else (dtype,)


class TorchRandom:
    """torch's global CPU generator as a `random.Random`, for Hypothesis to seed and to restore."""

    def seed(self, seed: int) -> None:
        # not torch.manual_seed, which also queues seeds for devices that are not there
        torch.default_generator.manual_seed(seed)

    def getstate(self) -> Tensor:
        return torch.default_generator.get_state()

    def setstate(self, state: Tensor) -> None:
        torch.default_generator.set_state(state)


# Hypothesis holds what is registered weakly: this is the reference that keeps it
_TORCH_RANDOM = TorchRandom()


class Broken(AssertionError):
    """A property that does not hold, with the whole message."""


class OutOfTime(unittest.SkipTest):
    """Ends the examples of a property: Hypothesis passes on what skips a test, and stops."""


def show(value: Any) -> str:
    """`value` as a failure message has it: tensors as numbers, long ones by their shape."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.numel() <= 12:
            return f"{show(value.tolist())} ({kind})"
        return f"{kind} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        text = ", ".join(show(v) for v in value)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    return repr(value)


def _complaint(error: BaseException) -> str:
    """What an exception inside a check says, with the place unless it is the check's own."""
    if isinstance(error, Flaky):
        return (
            "one and the same example fails at one time and passes at another: the object is not "
            "a function of its arguments"
        )
    if isinstance(error, AssertionError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}\n(raised in {last.filename}, line {last.lineno})"


def _report(suite: Suite, prop: Property, example: Mapping[str, Any], error: BaseException) -> str:
    why = "asked of everyone"
    if prop.trait is not None:
        why = f"declared by the trait {prop.trait} = {show(suite.traits.get(prop.trait))}"
    drawn = [f"{name} = {show(value)}" for name, value in example.items()]
    body = "\n".join(drawn) or "nothing was drawn: the property fails as it stands"
    return "\n".join(
        [
            f"{suite.kind} {suite.name} breaks `{prop.name}`, {why}:",
            textwrap.indent(prop.formula, "    "),
            "smallest example found:",
            textwrap.indent(body, "    "),
            "there:",
            textwrap.indent(_complaint(error), "    "),
            "what it means:",
            textwrap.fill(prop.meaning, 96, initial_indent="    ", subsequent_indent="    "),
        ]
    )


def run(
    suite: Suite, prop: Property, options: settings, seconds: float | None = None
) -> tuple[int, bool]:
    """Puts one property to the object; raises `Broken` with the smallest example found.

    Returns the number of examples and whether they were cut short: after `seconds` no new one is
    begun, and a failing one is not made smaller.
    """
    draws = {
        name: draw if isinstance(draw, SearchStrategy) else draw(suite.subject)
        for name, draw in prop.draws.items()
    }
    failing: dict[str, Any] = {}
    count, start, late = 0, time.monotonic(), False

    def example(**drawn: Any) -> None:
        nonlocal count, late
        late = late or (count > 0 and seconds is not None and time.monotonic() - start > seconds)
        if late and not failing:
            raise OutOfTime("no new example is begun")
        if late and repr(drawn) != repr(failing):
            return
        count += 1
        try:
            prop.check(suite.subject, **drawn)
        except Exception:
            # Hypothesis replays the smallest example last
            failing.clear()
            failing.update(drawn)
            raise

    try:
        if not draws:
            example()
            return 1, False
        # what Hypothesis' pytest plugin sets for an item: properties do not share saved examples
        label = f"{suite.kind} {suite.name} {prop.name}".encode()
        example._hypothesis_internal_add_digest = label  # pyright: ignore[reportFunctionMemberAccess]
        hypothesis.register_random(_TORCH_RANDOM)
        test = hypothesis.given(**draws)(example)
        if options.derandomize:
            test = hypothesis.seed(zlib.crc32(label))(test)
        options(test)()
    except OutOfTime:
        return count, True
    except Exception as error:
        raise Broken(_report(suite, prop, failing, error)) from error
    return count, late


def configured(max_examples: int | None, reproducible: bool) -> settings:
    """The active profile of Hypothesis, without what does not suit a check of tensors.

    With `reproducible` the same examples come every time, and nothing is written to the disk.
    """
    parent = settings.get_profile(settings.get_current_profile_name())
    fixed: dict[str, Any] = {"derandomize": True, "database": None} if reproducible else {}
    return settings(
        parent=parent,
        max_examples=max_examples or parent.max_examples,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        phases=[phase for phase in parent.phases if phase is not hypothesis.Phase.explain],
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        **fixed,
    )


def _probe(suite: Suite, prop: Property) -> str:
    """What a short run says of a trait that is not declared."""
    if not prop.guesses:
        return "no probe without a value"
    for value in prop.guesses:
        try:
            # whether it fails is all that is asked, not the smallest example
            quick = settings(configured(20, True), phases=[hypothesis.Phase.generate])
            run(suite.declaring(str(prop.trait), value), prop, quick)
        except Broken:
            continue
        return f"probe says it holds with {value!r}"
    return "probe says it does not hold"


def skipped(suite: Suite, prop: Property, probe: bool = True) -> str | None:
    """Why `prop` is not put to the object, None if it is; with what a probe finds."""
    if prop.trait is not None:
        value = suite.traits.get(prop.trait)
        if prop.trait not in suite.traits:
            found = f" ({_probe(suite, prop)})" if probe else ""
            return f"{prop.trait} is not declared{found}"
        if value is None or value is False:
            return f"{prop.trait} is declared not to hold"
    return prop.unfit(suite.subject)


def check_names(suite: Suite, function: str, argument: str, names: Sequence[str]) -> None:
    """Refuses names of properties that the suite does not have."""
    known = [prop.name for prop in suite.properties]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"`{function}` needs `{argument}` among the properties of {suite.name}, got "
            f"{', '.join(unknown)}. They are: {', '.join(known)}."
        )


def _expected(
    suite: Suite, function: str, expected_failures: Mapping[str, str] | None
) -> dict[str, str]:
    """`expected_failures`, each of a property that is put to the object."""
    expected = dict(expected_failures or {})
    check_names(suite, function, "expected_failures", list(expected))
    for prop in suite.properties:
        reason = skipped(suite, prop, probe=False) if prop.name in expected else None
        if reason is not None:
            raise ValueError(
                f"`{function}` needs `expected_failures` among what is asked of {suite.name}, got "
                f"{prop.name}, which is skipped: {reason}. Remove the entry."
            )
    return expected


def results(
    suite: Suite,
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    only: Sequence[str] | None = None,
    seconds: float | None = None,
) -> Iterator[Result]:
    """The results of the properties of `suite`, or of those named by `only`, one by one."""
    function = f"check_{suite.kind}"
    expected = _expected(suite, function, expected_failures)
    check_names(suite, function, "only", list(only or ()))
    options = configured(max_examples, reproducible=True)
    for prop in suite.properties:
        if only is None or prop.name in only:
            reason = skipped(suite, prop)
            yield (
                judge(suite, prop, expected.get(prop.name), options, seconds)
                if reason is None
                else Result(prop.name, None, reason)
            )


def judge(
    suite: Suite,
    prop: Property,
    expected: str | None,
    options: settings,
    seconds: float | None = None,
) -> Result:
    """The result of a property that applies; `expected` is the reason it should fail for."""
    try:
        count, late = run(suite, prop, options, seconds)
    except Broken as broken:
        if expected is None:
            return Result(prop.name, False, str(broken))
        return Result(prop.name, None, f"fails as expected: {expected}")
    if expected is not None:
        message = (
            f"{suite.kind} {suite.name} was expected to break `{prop.name}` ({expected}), but "
            "holds it. Remove the entry of `expected_failures`."
        )
        return Result(prop.name, False, message)
    short = f"[{count} examples in {seconds:g} s] " if late else ""
    return Result(prop.name, True, short + prop.formula)


def pytest_suite(
    suite: Suite, expected_failures: Mapping[str, str] | None, max_examples: int | None
) -> Callable[[Callable[[], Any]], Callable[..., None]]:
    """A decorator that turns a test function into one pytest item a property."""
    try:
        import pytest
    except ImportError as error:
        raise ImportError(
            f"`{suite.kind}_suite` needs pytest, which is not installed. Install it with "
            f"`pip install 'kart-attention[testing]'`, or call `check_{suite.kind}`."
        ) from error
    expected = _expected(suite, f"{suite.kind}_suite", expected_failures)

    def decorate(test: Callable[[], Any]) -> Callable[..., None]:
        if not callable(test) or inspect.signature(test).parameters:
            raise ValueError(
                f"`{suite.kind}_suite` needs a test function without arguments, got {test!r}. "
                "Build the object before it, at the level of the module."
            )

        def item(prop: Property) -> None:
            test()
            reason = skipped(suite, prop)
            if reason is not None:
                pytest.skip(reason)
            found = judge(suite, prop, expected.get(prop.name), configured(max_examples, False))
            if found.passed is None:
                pytest.xfail(found.message)
            if not found.passed:
                pytest.fail(found.message, pytrace=False)

        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(item, name, getattr(test, name))
        names = [prop.name for prop in suite.properties]
        return pytest.mark.parametrize("prop", suite.properties, ids=names)(item)

    return decorate


def title(name: str, options: Mapping[str, Any]) -> str:
    """`name(option=value, ..)` as it is called in messages."""
    shown = {k: v for k, v in options.items() if isinstance(v, int | float | str | tuple)}
    text = ", ".join(f"{k}={v!r}" for k, v in shown.items())
    return f"{re.sub(r'[^A-Za-z0-9_.+*:/=-]', '', name)}({text})" if text else name
