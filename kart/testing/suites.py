"""From an object to its suite: which properties are asked of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kart.testing import basis as basis_properties
from kart.testing import draw, families
from kart.testing import kernel as kernel_properties
from kart.testing import model as model_properties
from kart.testing import operator as operator_properties
from kart.testing import projection as projection_properties
from kart.testing import step as step_properties
from kart.testing.core import Suite, title


def _require(function: str, obj: Any, parts: tuple[str, ...], advice: str) -> None:
    missing = [part for part in parts if not callable(getattr(obj, part, None))]
    if missing:
        raise ValueError(
            f"`{function}` needs an object with {', '.join(f'`{p}`' for p in parts)}, got "
            f"{obj!r:.200} without {', '.join(missing)}. {advice}"
        )


def _dtypes(dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    if dtype not in (None, *draw.DTYPES):
        raise ValueError(
            f"`dtype` needs torch.float32, torch.float64 or None for both, got {dtype!r}. "
            "bfloat16 has a property of its own."
        )
    return draw.DTYPES if dtype is None else (dtype,)


def basis(
    obj: Any, name: str | None, traits: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> Suite:
    """The suite of a basis: any object with `init`, `apply` and `expand`."""
    advice = "`kart.bases.linear` makes a basis from its features."
    _require("basis_suite", obj, ("init", "apply", "expand"), advice)
    # the contract itself declares it: features are what `apply` is linear in
    declared = {"linear": obj.expand(torch.zeros(1)) is not None}
    declared |= {**(getattr(obj, "traits", None) or {}), **(traits or {})}
    options = dict(getattr(obj, "options", None) or {})
    family = str(getattr(obj, "family", None) or type(obj).__name__)
    subject = basis_properties.Subject(obj, family, options, declared, _dtypes(dtype))
    shown = {k: v for k, v in options.items() if k != "init"}
    return Suite(
        "basis",
        name or title(family, shown),
        subject,
        declared,
        (*basis_properties.EVERYONE, *basis_properties.TRAITS, *families.OF.get(family, ())),
        lambda trait, value: subject._replace(traits={**declared, trait: value}),
    )


def operator(
    obj: Any,
    name: str | None,
    traits: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    heads: int | None,
) -> Suite:
    """The suite of a row operator: any object with `init`, `weights` and `attend`."""
    advice = "`kart.operators.low_rank` makes one from a basis."
    _require("operator_suite", obj, ("init", "weights", "attend"), advice)
    declared = {**operator_properties.traits_of(obj), **(traits or {})}
    groups = (getattr(obj, "options", None) or {}).get("groups")
    if heads is None and groups:
        heads = sum(count for _, count in groups)
    subject = operator_properties.Subject(obj, heads, declared, _dtypes(dtype))
    return Suite(
        "operator",
        name or str(getattr(obj, "name", None) or type(obj).__name__),
        subject,
        declared,
        (*operator_properties.EVERYONE, *operator_properties.TRAITS),
        lambda trait, value: subject._replace(traits={**declared, trait: value}),
    )


def projection(obj: Any, name: str | None, dtype: torch.dtype | None) -> Suite:
    """The suite of a projection of rows onto the simplex, `obj(y, dim=-1)`."""
    if not callable(obj):
        raise ValueError(
            f"`projection_suite` needs a function of (y, dim=-1), got {obj!r:.200}. "
            "Pass one such as `kart.projections.simplex`."
        )
    subject = projection_properties.Subject(obj, _dtypes(dtype))
    title = name or getattr(obj, "__name__", type(obj).__name__)
    return Suite("projection", title, subject, {}, projection_properties.EVERYONE, _nothing)


def _nothing(trait: str, value: Any) -> Any:
    raise AssertionError("these properties are asked of everyone")


def kernel(
    fast: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Callable[..., tuple[Any, ...]],
    sizes: Mapping[str, Sequence[int]],
    name: str | None,
    traits: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> Suite:
    """The suite of a fast form against its plain one."""
    for argument, value in (("fast", fast), ("plain", plain), ("inputs", inputs)):
        if not callable(value):
            raise ValueError(
                f"`kernel_suite` needs a function as `{argument}`, got {value!r:.200}."
            )
    if not all(list(values) for values in sizes.values()):
        raise ValueError(
            f"`kernel_suite` needs one or more numbers for each of `sizes`, got {dict(sizes)!r}. "
            "Include those around the block size of the fast form."
        )
    declared = dict.fromkeys(kernel_properties.TRANSFORMS, True) | dict(traits or {})
    kinds = _dtypes(dtype)
    subject = kernel_properties.Subject(fast, plain, inputs, sizes, declared, kinds)
    return Suite(
        "kernel",
        name or getattr(fast, "__name__", type(fast).__name__),
        subject,
        declared,
        kernel_properties.EVERYONE,
        lambda trait, value: subject,
    )


def step(training: step_properties.Training, name: str | None) -> Suite:
    """The suite of a training step."""
    if not isinstance(training, step_properties.Training):
        raise ValueError(
            f"`step_suite` needs a `kart.testing.Training`, got {training!r:.200}. "
            "Wrap `init`, `step` and `batch` in one."
        )
    properties = step_properties.EVERYONE
    return Suite("step", name or "step", training, {}, properties, _nothing)


def model(
    obj: Any,
    images: Callable[[torch.Generator, int], torch.Tensor] | None,
    tied: Any,
    name: str | None,
    dtype: torch.dtype | None,
) -> Suite:
    """The suite of a model: any object with `init`, `apply` and `intermediates`."""
    advice = "`kart.models.create` makes one."
    _require("model_suite", obj, ("init", "apply", "intermediates"), advice)
    config = getattr(obj, "config", None)
    if images is None and not hasattr(config, "image_size"):
        raise ValueError(
            "`model_suite` needs `images` for a model whose config has no `image_size`, got None. "
            "Pass a function from (generator, size) to a batch of images."
        )

    def drawn(generator: torch.Generator, size: int) -> torch.Tensor:
        shape = (size, config.in_channels, config.image_size, config.image_size)  # pyright: ignore[reportOptionalMemberAccess]
        return torch.randn(shape, generator=generator)

    subject = model_properties.Subject(obj, images or drawn, tied, {}, _dtypes(dtype))
    named = name or f"model with {getattr(config, 'operator', type(obj).__name__)}"
    return Suite("model", named, subject, {}, model_properties.EVERYONE, _nothing)
