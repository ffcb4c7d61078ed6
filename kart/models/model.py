"""What a model is, where its blocks keep their row operators, and how configs choose them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from kart import factories, operators, schema
from kart.models.windows import Cut
from kart.models.work import Layers
from kart.operators import Operator
from kart.operators.sums import meaning

Params = dict[str, Any]
# what `operator` may be: a spec, an Operator, or one of either per block
Choice = str | Operator | Sequence[str | Operator]


@dataclass(frozen=True)
class Config:
    """What the configs of all models share; JSON-able when `operator` is a spec."""

    operator: str | tuple[str, ...] = "softmax"  # one spec, or one a block
    sharing: str = "blockwise"  # or "universal": blocks share one operator
    rank: int | None = None  # r; None leaves it to the spec, else 12
    project: str | None = None
    base: str | None = None
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if isinstance(getattr(self, one.name), list):  # JSON has no tuples
                object.__setattr__(self, one.name, tuple(getattr(self, one.name)))

    @property
    def side(self) -> int:
        """The patches along a side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Columnar(Config):
    """What the configs of classifiers share whose blocks are alike and read a class token."""

    num_classes: int = 1000
    embed_dim: int = 192  # D
    depth: int = 12  # L
    num_heads: int = 3  # H, d = D / H

    @property
    def tokens(self) -> int:
        """N: the patches and the class token."""
        return self.side**2 + 1


class Site(NamedTuple):
    """The row operator of one block: the dotted path of its parameters, its heads, its keys, and
    the width d of a head.

    Blocks that share an operator name the same path. `cut` says of blocks with windows how they
    lie on the grid of tokens; `biased`, whether position biases are added to the scores.
    """

    path: str
    operator: Operator
    heads: int
    tokens: int
    width: int
    cut: Cut | None = None
    biased: bool = False

    @property
    def windows(self) -> int:
        """How often the operator acts on an image."""
        return 1 if self.cut is None else self.cut.count


class Model(NamedTuple):
    """A model as pure functions of its parameters.

    `init(generator)` draws them; `apply(params, images)` maps `(..., Cin, height, width)` to logits
    `(..., C)`, or of a ViTDet to maps by level; `intermediates(params, images)` returns, by name,
    "blocks.<i>.scores" and "blocks.<i>.weights" `(..., H, N, M)`, "blocks.<i>.values" `(..., H, M,
    d)`, of blocks with windows with an axis of those before the heads, "blocks.<i>.tokens" `(...,
    N, D)`, and "logits" or the maps. `sites` say, block by block, which operator stands there and
    where its parameters are.
    """

    config: Any
    init: Callable[[Generator], Params]
    apply: Callable[[Params, Tensor], Any]
    intermediates: Callable[[Params, Tensor], dict[str, Tensor]]
    sites: tuple[Site, ...]
    call: factories.Call | None = None  # that made the tuple, by which it pickles

    def __reduce__(self) -> tuple[Any, ...]:
        return factories.reduce(self)

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The row operators, one a block."""
        return tuple(site.operator for site in self.sites)

    def operator_params(self, params: Params, block: int) -> Params:
        """The parameters of the operator of `block`, counted from 0 over the whole model."""
        return find(params, self.sites[block].path)


class Family(NamedTuple):
    """Models of one kind: `build(operator, **fields of config)`, the sizes that have names, and the
    layers that `work(config)` says they compute beside their row operators.
    """

    build: Callable[..., Model]
    config: type
    sizes: Mapping[str, Mapping[str, Any]]
    work: Callable[[Any], Layers]


def find(params: Params, path: str) -> Params:
    """The subtree of `params` at a dotted path."""
    for key in path.split("."):
        if not isinstance(params, dict) or key not in params:
            among = [*params] if isinstance(params, dict) else type(params).__name__
            raise ValueError(
                f"a model needs parameters with {path!r}, got none called {key!r} among "
                f"{among!r:.100}. Create the model with the config that they were made with."
            )
        params = params[key]
    return params


def place(params: Params, path: str, node: Params) -> Params:
    """`params` with `node` at a dotted path; what was given is not changed."""
    key, dot, rest = path.partition(".")
    return {**params, key: place(params.get(key, {}), rest, node) if dot else node}


def _named(op: Operator) -> str:
    """What a config calls an operator that it was given: its name, or where that is the spec of
    another operator, which `from_config` would make, the spec of its call, or a name that is no
    spec.
    """
    if operators.sources(op.name):  # of the user's own, whose code is not run for this
        return op.name
    try:
        said = operators.parse(op.name).operator
    except ValueError:
        return op.name
    return op.name if _same(op, said) else _spec(op) or f"{op.name} (an Operator)"


def _same(op: Operator, said: Operator) -> bool:
    """Whether an operator is that of a spec."""
    one, other = (None if x.call is None else x.call.factory for x in (op, said))
    whole = not factories.changed(op).keys() - {"name"}
    return whole and one is other and meaning(op) == meaning(said)


def _spec(op: Operator) -> str:
    """The spec of the call that made an operator, "" where its arguments are not those of one."""
    if op.call is None or factories.changed(op):
        return ""
    given = inspect.signature(op.call.factory).bind(*op.call.args, **op.call.kwargs).arguments
    if not all(schema.fits(value, str | float | bool | None) for value in given.values()):
        return ""
    written = {name: "none" if value is None else str(value) for name, value in given.items()}
    options = ",".join(f"{name}={value}" for name, value in written.items())
    spec = f"{op.call.factory.__name__}:{options}"
    try:
        return spec if _same(op, operators.parse(spec).operator) else ""
    except ValueError:
        return ""


def choose(
    function: str, given: Choice, config: Any, fields: Mapping[str, Any]
) -> tuple[Any, tuple[Operator, ...]]:
    """`config` with the names of the operators and their sharing, and the operators of its blocks,
    from `given` and, in `fields`, sharing, rank, project, base.

    Sharing is what `fields` ask for or the letter of the spec says, else blockwise.
    """
    asked, depth = fields.get("sharing"), config.depth
    if asked not in (None, "blockwise", "universal"):
        raise ValueError(
            f'`{function}` needs `sharing` "blockwise" or "universal", got {asked!r}. Choose one '
            "of them."
        )
    single = isinstance(given, str | Operator)
    ones = [given] if single else list(given)
    if not single and len(ones) != depth:
        raise ValueError(
            f"`{function}` needs one operator, or one for each of {depth} blocks, got {len(ones)}. "
            "Give as many as there are blocks."
        )
    names = ("rank", "project", "base")
    options = {name: fields[name] for name in names if fields.get(name) is not None}
    # with several blocks, an option is for those that leave it open; for none, `parse` refuses it
    written = {one: operators.options(one) for one in ones if isinstance(one, str)}
    nobody = options.keys() - set[str]().union(*written.values())
    parsed: dict[str, operators.Spec] = {}
    for one, left_open in written.items():
        taken = left_open | nobody
        fitting = {name: value for name, value in options.items() if name in taken}
        parsed[one] = operators.parse(one, **fitting)
    specs = [
        operators.Spec(one, None) if isinstance(one, Operator) else parsed[one] for one in ones
    ]
    if nobody and not written:
        raise ValueError(
            f"`{function}` needs options that have an effect, got {sorted(nobody)} beside an "
            "Operator. Give them to the factory of the operator."
        )
    modes = {mode for mode in (asked, *(spec.sharing for spec in specs)) if mode is not None}
    if len(modes) > 1:
        raise ValueError(
            f"`{function}` needs one way of sharing, got {sorted(modes)} from the spec {given!r} "
            f"and `sharing`={asked!r}. Drop the letter of the spec or the argument."
        )
    sharing = modes.pop() if modes else "blockwise"
    if sharing == "universal" and len(ones) > 1:
        raise ValueError(
            f"`{function}` needs one operator for universal sharing, got {len(ones)}. "
            "Give one spec, or share blockwise."
        )
    named = tuple(
        _named(one) if isinstance(one, Operator) else spec.operator.name
        for one, spec in zip(ones, specs, strict=True)
    )
    blocks = tuple(spec.operator for spec in specs) * (depth if single else 1)
    chosen = {"operator": named[0] if single else named, "sharing": sharing}
    return dataclasses.replace(config, **chosen), blocks
