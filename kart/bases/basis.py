"""What a family of learnable functions of one real variable is, and what all families share."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kart import schema
from kart.bases import names

Params = dict[str, Any]


class Cpp(NamedTuple):
    """A family in C++, for the "cpp" engine of `kart.kernels`.

    Each name in `sizes` is a `constexpr int` before `text`, which defines a struct in terms of
    kart/kernels/cpp/vector.h; its constructor is given `options`. A linear family defines `Piece`:

        struct Piece {
          static constexpr int K = 2;                 // features
          float pitch;
          explicit Piece(const float* options) : pitch(options[0]) {}
          INLINE void features(vec x, vec* f) const { sincos(x * pitch, f[0], f[1]); }
          INLINE void slopes(vec x, const vec* f, vec* g) const {  // their derivatives
            g[0] = f[1] * pitch;
            g[1] = f[0] * -pitch;
          }
        };

    which `linear(sines, 2, cpp=Cpp(text, {}, (2.0,)))` takes beside the same features in torch. Any
    other family defines `Unit`, one function with P parameters: see kart/bases/rational.py. The
    base activation and the per-unit scales are the engine's. What is wrong is refused: the engine
    is held against the torch functions before its first use.
    """

    text: str
    sizes: Mapping[str, int] = {}
    options: tuple[float, ...] = ()


class Triton(NamedTuple):
    """A family in Triton, for the "triton" engine of `kart.kernels`.

    Each name in `sizes` is a `tl.constexpr` before `text`, which defines functions of a tile of
    scores in terms of `tl`, `libdevice` and the first functions of kart/kernels/triton/device.py.
    A linear family defines two; J and SIZE, the number of the feature and K, are known when they
    are compiled:

        def start(x, gate, origin, density, FAST: tl.constexpr):
            return (x - origin) * density, gate           # a tuple, the state for feature 0

        def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
            t, gate = state
            value = tl.exp(-(t - J) * (t - J)) * gate
            return value, -2.0 * density * (t - J) * value, state  # f_J(x), f_J'(x), the next state

    Where `gate` is 0 rather than 1 they return zeros. `fold` maps coefficients `(..., K, M)` to
    those of the derivative, where that has the same features: `feature` then returns the value for
    the slope. `rescale` multiplies coefficients `(..., K, M, r)` in place, where the features of
    the text are multiples of the family's. `linear` takes it as its `triton`; as with `Cpp`, what
    is wrong is refused.

    Any other family defines `unit(x, theta, FAST: tl.constexpr)`, one function with P parameters: a
    value, its slope in x, and a tuple of its derivatives by the P tiles `theta`, which broadcast
    against x; finite where x is 0. See kart/bases/rational.py.
    """

    text: str
    origin: float = 0.0
    density: float = 1.0
    fold: Callable[[Tensor], Tensor] | None = None
    rescale: Callable[[Tensor], Any] | None = None
    sizes: Mapping[str, float] = {}


class Pieces(NamedTuple):
    """What the engines of `kart.kernels` know of a basis beside its torch functions.

    `name` names what is computed, for good and in every process; `width` is the number of features,
    or of parameters of a nonlinear unit, that of the base activation included; `of` is the function
    that all this describes (`features`, or `apply` of a nonlinear family). Optional, and all
    without the base activation: `fill(out, x)` writes the features of `x (G, ...)` into `out (G, K,
    ...)`; `fold(coefs)` maps coefficients `(..., K, M)` to those of the derivative, where that has
    the same features; `cpp` and `triton` are the family in those engines. `leaves(params)` are the
    coefficients, or parameters of nonlinear units, as `(..., width)`, scales absorbed and that of
    the base activation last.
    """

    name: str
    width: int
    of: Callable[..., Tensor]
    base: str = "zero"
    fill: Callable[[Tensor, Tensor], None] | None = None
    fold: Callable[[Tensor], Tensor] | None = None
    cpp: Cpp | None = None
    triton: Triton | None = None
    leaves: Callable[[Params], Tensor] | None = None


class Basis(NamedTuple):
    """A family of univariate functions phi(x; theta), as pure functions of its parameters.

    `init(generator, shape)` draws float32 parameters of `prod(shape)` functions, with `shape` as
    their leading axes. `apply(params, x)` evaluates each function at its element of `x`, which
    broadcasts against `shape`; it keeps x's dtype. `expand(x)` maps `(...)` to the features `(...,
    K)` in which `apply` is linear with `params["coefs"]`, `K = size`; it returns None for a family
    that has none. `features(x)`, `(..., K')`, and `coefficients(params)`, `(..., K')`, are the same
    with the base activation (one more feature) and the per-unit scales absorbed, so that
    `apply(params, x) == (features(x) * coefficients(params)).sum(-1)`; both are None where `expand`
    returns None. `options` are the hyperparameters and `traits` the properties that `kart.testing`
    holds the family to; "operations" among them are those of a unit on one number, where they are
    not K. `pieces` are for the engines of `kart.kernels`; `recipe` is the call of a factory of kart
    that made the basis, by which it is pickled. One made by hand has neither, and pickles as its
    fields, if they do.
    """

    family: str
    size: int
    init: Callable[[Generator, Sequence[int]], Params]
    apply: Callable[[Params, Tensor], Tensor]
    expand: Callable[[Tensor], Tensor | None]
    features: Callable[[Tensor], Tensor] | None
    coefficients: Callable[[Params], Tensor] | None
    options: Mapping[str, Any]
    traits: Mapping[str, Any]
    pieces: Pieces | None = None
    recipe: tuple[Callable[..., "Basis"], Mapping[str, Any]] | None = None

    def __reduce__(self):
        if self.recipe is None:
            return type(self), tuple(self)
        functions = (self.init, self.apply, self.expand, self.features, self.coefficients)
        if any(f and getattr(f, "recipe", None) is not self.recipe for f in functions):
            raise TypeError(
                f"pickling needs a basis as its factory made it, got a changed {self.family!r}. "
                "Pickle what it was made of, and make it again."
            )
        said = {name: getattr(self, name) for name in ("family", "size", "options", "traits")}
        return _again, (*self.recipe, said)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: Any):
        # immutable: tuples of functions
        return self


def _again(
    factory: Callable[..., Basis], arguments: Mapping[str, Any], said: Mapping[str, Any]
) -> Basis:
    return factory(**arguments)._replace(**said)


# the largest grid or degree: a feature each, of which a unit has that many parameters
MOST = 4096

# parameters as they are drawn, whatever torch's defaults are
DRAWN: Any = {"dtype": torch.float32, "device": "cpu"}

BASES = {"zero": None, "identity": lambda x: x, "silu": F.silu, "gelu": F.gelu}


def wide(x: Tensor) -> Tensor:
    """`x`, half types as float32: 8 bits of mantissa are too few for harmonics and powers."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def check_input(name: str, x: Tensor) -> None:
    """Raises ValueError unless `x` is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"`{name}` needs floating-point `x`, got {kind}. Convert it with `x.float()`."
        )


def check_integer(function: str, argument: str, value: Any, least: int, most: float = MOST) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    advice = "Pass a larger one." if schema.fits(value, int) else "Pass a Python int."
    schema.check_integer(function, argument, value, least, advice)
    if value > most:
        raise ValueError(
            f"`{function}` needs an integer `{argument}` <= {most}, got {value!r}. "
            "Pass a smaller one: every unit has a parameter for each."
        )


def check_span(function: str, span: Sequence[float]) -> tuple[float, float]:
    """The ends of a span; ValueError unless they are finite and in order."""
    pair = schema.fits(span, tuple[float, ...]) and len(span) == 2
    if not pair or not -math.inf < span[0] < span[1] < math.inf:
        raise ValueError(
            f"`{function}` needs `span` = (low, high) with finite low < high, got {span!r}. "
            "Pass for example (-4.0, 4.0)."
        )
    return float(span[0]), float(span[1])


def last_axis(features: Tensor) -> Tensor:
    """`(K, ...)` as `(..., K)`, a view: a feature lies together in memory, and is written and read
    in rows, eight times as fast on a CPU as number by number.
    """
    return features.movedim(0, -1)


def check_generator(generator: Any) -> None:
    """Raises ValueError unless `generator` is one on the CPU: None would be torch's global one."""
    if not isinstance(generator, Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"`init` needs a `torch.Generator` on the CPU first, got {generator!r}. "
            "Draw with torch.Generator().manual_seed(seed), then move with tree.to(params, device)."
        )


def normal(generator: Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 `shape`, drawn on the CPU, so that a seed means the same numbers on
    every device.
    """
    check_generator(generator)
    return torch.randn(tuple(shape), generator=generator, **DRAWN)


def assemble(
    family: str,
    size: int,
    draw: Callable[[Generator, tuple[int, ...]], Params],
    core: Callable[[Params, Tensor], Tensor] | None,
    expand: Callable[[Tensor], Tensor] | None,
    base: str,
    scales: bool,
    options: Mapping[str, Any],
    traits: Mapping[str, Any],
    recipe: tuple[Callable[..., Basis], Mapping[str, Any]],
    name: str,
    leaves: Callable[[Params], Tensor] | None = None,
    learned: Sequence[str] | None = None,
    **pieces: Any,
) -> Basis:
    """Adds what all families share: base activation (eq. 5), KAN's per-unit scales, dtype rules,
    checks.

    `core` is a nonlinear family's function of (params, x), `expand` the features of a linear one;
    `learned` are the names of what `draw` draws, as far as they are known; `name`, `leaves` of a
    nonlinear family without the base activation, and `pieces` are fields of `Pieces`.
    """
    schema.check_choice(family, "base", base, BASES)
    schema.check_type(family, "scales", scales, bool)
    activation = BASES[base]

    both = ("scale_base", "scale_basis")
    if learned is None:
        known = "coefs" if expand is not None else traits.get("amplitude")
        learned = () if known is None else (known,)
    wanted, unread = (*learned, *(both if scales else ())), () if scales else both

    def check_params(params: Params) -> None:
        # a ParameterDict is no dict, and has the leaves of one
        named = hasattr(params, "keys")
        fit = named and all(x in params for x in wanted) and not any(x in params for x in unread)
        if not fit:
            found = [*params] if named else type(params).__name__
            told = ", ".join(map(repr, wanted))
            raise ValueError(
                f"`{family}` needs parameters {told or 'by name'}, got {found!r:.100}. "
                "Call `init` of this basis for its parameters."
            )

    def init(generator: Generator, shape: Sequence[int]) -> Params:
        if not schema.fits(shape, tuple[int, ...]) or any(n < 0 for n in shape):
            raise ValueError(
                f"`init` needs a `shape` of integers, got {shape!r:.100}. Pass for example (3, 5)."
            )
        shape = tuple(shape)
        params = draw(generator, shape)
        if scales:
            params["scale_base"] = torch.ones(shape, **DRAWN)
            params["scale_basis"] = torch.ones(shape, **DRAWN)
        return params

    def features(x: Tensor) -> Tensor:
        check_input(f"{family}.features", x)
        assert expand is not None  # for the type checker: only linear families reach this
        widened = wide(x)
        values = expand(widened)
        if activation is not None:
            values = last_axis(torch.cat([values.movedim(-1, 0), activation(widened)[None]]))
        return values.to(x.dtype)

    def coefficients(params: Params) -> Tensor:
        check_params(params)
        coefs = params["coefs"]
        if coefs.shape[-1] != size:
            raise ValueError(
                f"`{family}` needs `coefs` with a last axis of K = {size}, got shape "
                f"{tuple(coefs.shape)}. Call `init` of this basis for its parameters."
            )
        if scales:
            coefs = coefs * params["scale_basis"][..., None]
        return with_base(params, coefs)

    def with_base(params: Params, values: Tensor) -> Tensor:
        if activation is None:
            return values
        last = params["scale_base"][..., None] if scales else torch.ones_like(values[..., :1])
        return torch.cat([values, last], dim=-1)

    def apply(params: Params, x: Tensor) -> Tensor:
        check_input(f"{family}.apply", x)
        widened = wide(x)
        if expand is not None:
            # one feature at a time: the (..., K) product of a broadcast x and coefs is never built
            values, coefs = features(widened), coefficients(params)
            products = map(torch.mul, values.unbind(-1), coefs.unbind(-1))
            return functools.reduce(torch.add, products).to(x.dtype)
        assert core is not None
        check_params(params)
        y = core(params, widened)
        if scales:
            y = y * params["scale_basis"]
        if activation is not None:
            y = y + (activation(widened) * params["scale_base"] if scales else activation(widened))
        return y.to(x.dtype)

    def expanded(x: Tensor) -> Tensor | None:
        check_input(f"{family}.expand", x)
        return None if expand is None else expand(wide(x)).to(x.dtype)

    def all_leaves(params: Params) -> Tensor:
        assert leaves is not None
        return with_base(params, leaves(params))

    for function in (init, apply, expanded, features, coefficients):
        function.recipe = recipe  # type: ignore[attr-defined]  # says that it belongs to it
    is_linear = expand is not None
    of, whole = (features, coefficients) if is_linear else (apply, all_leaves)
    width = size + (activation is not None)
    return Basis(
        family=family,
        size=size,
        init=init,
        apply=apply,
        expand=expanded,
        features=features if is_linear else None,
        coefficients=coefficients if is_linear else None,
        options={**options, "base": base, "scales": scales},
        traits={"linear": is_linear, **traits},
        pieces=Pieces(name, width, of, base, leaves=whole, **pieces),
        recipe=recipe,
    )


class Shared(NamedTuple):
    """What every linear family takes, see `linear`."""

    base: str
    init: str
    scales: bool


def expansion(
    factory: Callable[..., Basis],
    expand: Callable[[Tensor], Tensor],
    size: int,
    shared: Shared,
    *,
    orders: Sequence[int] | None = None,
    grid: int | None = None,
    options: Mapping[str, Any],
    traits: Mapping[str, Any],
    own: tuple[str, Mapping[str, Any], str] | None = None,
    **pieces: Any,
) -> Basis:
    """A linear family, of which `options` and `shared` make another by `factory`; or with `own` the
    family of that name, made by these arguments, whose functions have that name.

    `pieces` are fields of `Pieces`; the rest is as in `linear`.
    """
    base, init, scales = shared
    name = names.builtin(factory, {**options, "base": base}) if own is None else own[2]
    family, arguments, _ = own or (factory.__name__, {**options, **shared._asdict()}, name)
    check_integer(family, "size", size, 1, math.inf)
    starts = ["paper", "scaled"] + ["smooth"] * (orders is not None)
    schema.check_choice(family, "init", init, starts)
    positive = all(schema.fits(order, int) and order >= 1 for order in orders or ())
    if orders is not None and (len(orders) != size or not positive):
        raise ValueError(
            f"`{family}` needs `orders` of {size} positive integers, got {orders!r}. "
            "Give one a feature."
        )
    grid = size if grid is None else grid
    smooth = None
    if init == "smooth" and orders is not None:
        falling = torch.tensor([1.0 / k for k in orders], **DRAWN)
        # phi has at a typical x the variance that "scaled" gives it, size / grid / keys
        smooth = falling * math.sqrt(size / grid) / falling.square().sum().sqrt()

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        coefs = normal(generator, (*shape, size))
        keys = shape[-1] if shape else 1
        if smooth is not None:
            coefs = coefs * smooth / math.sqrt(keys)
        elif init == "scaled":
            coefs = coefs / math.sqrt(keys * grid)
        return {"coefs": coefs}

    def checked(x: Tensor) -> Tensor:
        values = expand(x)
        found = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        if found != (*x.shape, size):
            raise ValueError(
                f"`{family}` needs `expand` to map {tuple(x.shape)} to {(*x.shape, size)}, got "
                f"{found}. Stack the K = {size} features along a new last axis."
            )
        return values

    options = {"init": init, **options}
    return assemble(
        *(family, size, draw, None, checked, base, scales, options, traits),
        *((factory, arguments), name),
        **pieces,
    )


def linear(
    expand: Callable[[Tensor], Tensor],
    size: int,
    *,
    family: str = "linear",
    init: str = "scaled",
    orders: Sequence[int] | None = None,
    grid: int | None = None,
    base: str = "zero",
    scales: bool = False,
    options: Mapping[str, Any] | None = None,
    traits: Mapping[str, Any] | None = None,
    cpp: Cpp | None = None,
    triton: Triton | None = None,
) -> Basis:
    """A basis of one's own from its features: phi(x) = sum_k coefs[k] expand(x)[k].

    Args:
        expand: elementwise features, `(...)` to `(..., K)`, in the dtype of `x`; torch operations
            and constants only: what is learned are the coefficients.
        size: K.
        init: standard deviation of the coefficients, for `keys` = last axis of `shape`: "paper" 1;
            "scaled" 1/sqrt(keys * grid); "smooth" falling as 1/order and of the variance of
            "scaled" in sum (needs `orders`).
        orders: K positive integers, the frequency or degree of each feature, for "smooth".
        grid: the grid size of "scaled"; K where it is not given.
        base: b(x) of eq. 5, "zero", "identity", "silu" or "gelu", added to every function.
        scales: adds KAN's learnable `scale_base` and `scale_basis`, one each per function: phi =
            scale_base b + scale_basis sum. With them a unit has 2 more parameters, the count of the
            paper's tables ((2G + 3) with W's one); where b is zero, `scale_base` is counted alone.
        options, traits: recorded in the result as they are.
        cpp, triton: the features and their slopes in C++ and in Triton, for the engines on the CPU
            and on a GPU; held against `expand` before they are used, and refused where they differ.

    >>> waves = linear(lambda x: torch.stack([x.sin(), (2 * x).sin()], dim=-1), 2, family="sines")
    >>> params = waves.init(torch.Generator().manual_seed(0), (3, 5))
    >>> waves.apply(params, torch.zeros(4, 1, 5)).shape
    torch.Size([4, 3, 5])
    """
    for argument, value, kind in (
        ("expand", expand, Callable),
        ("family", family, str),
        ("orders", orders, Sequence | None),
        ("options", options, Mapping | None),
        ("traits", traits, Mapping | None),
        ("cpp", cpp, Cpp | None),
        ("triton", triton, Triton | None),
    ):
        schema.check_type("linear", argument, value, kind)
    if grid is not None:
        check_integer(family, "grid", grid, 1, math.inf)
    arguments = {
        "expand": expand, "size": size, "family": family, "init": init, "orders": orders,
        "grid": grid, "base": base, "scales": scales, "options": options, "traits": traits,
        "cpp": cpp, "triton": triton,
    }  # fmt: skip
    name = names.own(family, expand, size, base, (cpp, triton))
    return expansion(
        linear,
        expand,
        size,
        Shared(base, init, scales),
        orders=orders,
        grid=grid,
        options=options or {},
        traits=traits or {},
        own=(family, arguments, name),
        cpp=cpp,
        triton=triton,
    )
