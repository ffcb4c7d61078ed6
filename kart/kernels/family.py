"""What a basis is to the engines, and the arguments of a raw product of one."""

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # no stubs


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A basis under its name: the operations of torch's library take strings, not functions.

    `width` is the number of its features, or of parameters of a nonlinear unit. What else the basis
    declares of itself for the engines, `kart.bases.basis.Pieces`, is in `pieces`; None where it
    declares nothing, and where its functions were replaced after that.
    """

    name: str
    basis: Any
    width: int
    pieces: Any

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Maps scores `(...)` to `(..., width)`."""
        return self.basis.features

    def own(self, piece: str) -> Any:
        """A piece that holds for all features: None where a base activation is one of them."""
        return getattr(self.pieces, piece, None) if self.base == "zero" else None

    @property
    def base(self) -> str:
        """The base activation that `pieces` do not include."""
        return getattr(self.pieces, "base", "zero")

    def stacked(self, units: Mapping[str, Tensor]) -> Tensor:
        """The leaves of units `(B or 1, ...)`, as `pieces` have them: vmap may have given some of
        them a copy for each sample.
        """
        size = max(leaf.shape[0] for leaf in units.values())
        return self.pieces.leaves({n: x.expand(size, *x.shape[1:]) for n, x in units.items()})


class Product(NamedTuple):
    """The arguments of a raw product: `q (B, H, N, d)`, `k (B, H, M, d)`, `coefs (B or 1, H, r, M,
    K)`, `mask` None or boolean `(B or 1, H or 1, N or 1, M or 1)`.
    """

    family: Family
    q: Tensor
    k: Tensor
    coefs: Tensor
    mask: Tensor | None
    scale: float

    @property
    def own(self) -> bool:
        """Whether every sample has coefficients of its own."""
        return self.coefs.shape[0] > 1


# families live as long as a caller, an autograd graph or `_pinned` holds them
_families: "weakref.WeakValueDictionary[str, Family]" = weakref.WeakValueDictionary()
# those of recorded graphs, which know them by name only, and those that were compiled
_pinned: set[Family] = set()
# names of functions that declare none
_names: "weakref.WeakKeyDictionary[Callable, str]" = weakref.WeakKeyDictionary()


def family_of(basis: Any) -> Family:
    """The family of a basis; the same object for the same name while anybody holds it."""
    function = basis.apply if basis.features is None else basis.features
    pieces = getattr(basis, "pieces", None)
    if pieces is not None and pieces.of is not function:
        pieces = None
    if pieces is not None:
        name, width = pieces.name, pieces.width
    else:
        name = _names.get(function) or f"{basis.family}:{uuid.uuid4().hex}"
        with contextlib.suppress(TypeError):  # a callable that has no weak reference
            _names[function] = name
        width = basis.size
        if basis.features is not None:
            # asked on plain tensors, whatever transform is running
            with torch._C._DisableFuncTorch(), torch.no_grad():
                width = basis.features(torch.zeros(1, dtype=torch.float32, device="cpu")).shape[-1]
    if basis.features is not None and not name.startswith("kart.bases:"):
        _check_constant(basis)
    known = _families.get(name)
    if known is None:
        known = Family(name, basis, width, pieces)
        _families[name] = known
    return known


def _check_constant(basis: Any) -> None:
    """Raises ValueError where features are by tensors whose gradient, or mapped axis, the engines,
    which ask for features of plain scores, would lose.
    """
    try:
        x = basis.features(torch.zeros(1, dtype=torch.float32, device="cpu"))
    except Exception:
        return  # of tensors elsewhere; what is wrong with them is said where they are used
    lost = x.requires_grad
    while _functorch.is_functorch_wrapped_tensor(x):
        lost |= _functorch.is_batchedtensor(x)
        x = _functorch.get_unwrapped(x)
        lost |= x.requires_grad
    if lost:
        raise ValueError(
            f"`contract` needs features of constants, got {basis.family!r} with a tensor in them "
            "that is differentiated or mapped, which the engines do not see. Detach it, or ask for "
            "`weights`, which holds them."
        )


def family_named(name: str) -> Family:
    """The family of a recorded graph. One of kart's own is made from its name; another must be
    alive: a file names it, and no file says what is imported.
    """
    known = _families.get(name)
    if known is not None:
        return known
    module, _, call = name.partition(":")
    if module != "kart.bases":
        raise ValueError(
            f"`contract` needs the basis {name!r} of this graph, which this process has not made. "
            "Make it and pass it to `kernels.keep` before the graph is run."
        )
    factory, _, options = call.partition("?")
    families = importlib.import_module(module).FAMILIES
    return pin(family_of(families[factory](**json.loads(options))))


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(family or None, *rest)`, asked once for each while the family lives: to look up
    what is built by its whole text would cost as much as a small product.
    """
    known: weakref.WeakKeyDictionary[Family, dict[Any, Any]] = weakref.WeakKeyDictionary()
    of_none: dict[Any, Any] = {}

    @functools.wraps(function)
    def asked(family: Family | None, *rest: Any) -> Any:
        own = of_none if family is None else known.setdefault(family, {})
        if rest not in own:
            own[rest] = function(family, *rest)
        return own[rest]

    return asked


def pin(family: Family) -> Family:
    """Keeps a family for good."""
    _pinned.add(family)
    return family


def keep(basis: Any) -> None:
    """Keeps a basis of one's own for graphs that were exported with it and know it by name only."""
    pin(family_of(basis))


def recordable(family: Family) -> str:
    """The name of the family, which stays valid for good where a graph is being recorded."""
    if recording():
        pin(family)
    return family.name


def recording() -> bool:
    """Whether a graph of the operations is being recorded, as by `make_fx` and `torch.export`."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None
