"""The "triton" engine: the streamed product on CUDA, for the bases that bring a piece of Triton.

`forward` and `backward` are raw operations on a `kart.kernels.family.Product`, deterministic and
seen by no transform: of linear families by `linear`, of units that are not linear in their
parameters by `units`. Those of attention with functions for weights are in `entries`. Triton itself
is imported by their first call. With TRITON_INTERPRET=1 in the environment before that, the same
kernels run on CPU tensors, slowly: so they are tested. A piece of the user's own is held against
the plain expression before its first use.

Products of float32 inputs follow `torch.set_float32_matmul_precision`: "highest", torch's default,
splits each operand in two ("tf32x3", about 22 bits); "high" and "medium" round it to tf32 (11
bits: with a score of 100 goes an error of 0.05). Scores and sums are float32 for every input.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels import cpp
from kart.kernels.family import Family, Product, once, pin
from kart.kernels.transforms import for_good
from kart.kernels.triton import linear, units
from kart.kernels.triton.launch import Tiles, interpreted, kind_of

log = logging.getLogger("kart.kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 128


def status() -> str:
    """ "ready", or why the engine cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or interpreted():
        return "ready"
    return "torch sees no CUDA device"


capability = functools.cache(torch.cuda.get_device_capability)


def refuses_device(device: torch.device) -> str:
    """Why the engine cannot run on a device, or ""."""
    if status() != "ready":
        return status()
    if interpreted():
        return ""
    if device.type != "cuda":
        return f"the Triton engine runs on CUDA, not on {device.type}"
    # before it there is neither bfloat16 nor tf32
    major, minor = capability(device)
    return "" if major >= 8 else f"the Triton engine needs sm_80 or later, not sm_{major}{minor}"


def refuses(product: Product) -> str:
    """Why the engine cannot take these inputs, or ""."""
    q = product.q
    reason = refuses_tensors((q, product.coefs), (q.shape[-1],))
    return reason or refuses_family(product.family, q.device)


def refuses_tensors(tensors: Sequence[Tensor], widths: Sequence[int]) -> str:
    """Why the engine cannot take tensors of these dtypes, or heads of these widths, or ""."""
    reason = refuses_device(tensors[0].device)
    if reason:
        return reason
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"the Triton engine has no {x.dtype}"
        if interpreted() and x.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrong (triton#11584)"
    if max(widths) > WIDTH:
        return f"the Triton engine takes heads of width {WIDTH} at most, not {max(widths)}"
    return ""


def refuses_family(family: Family, device: torch.device) -> str:
    """Why the engine cannot take a family, or ""."""
    if kind_of(family) is None:
        return f"the Triton engine has no {family.basis.family!r} basis of this kind"
    if family.basis.features is None and family.width > units.PARAMETERS:
        most = units.PARAMETERS
        return f"the Triton engine takes units of {most} parameters at most, not {family.width}"
    return _refuses_piece(family, device) if family.name.startswith("own:") else ""


class _There(NamedTuple):
    """The kernels on a device, exact, for tensors of the CPU."""

    device: torch.device

    def forward(self, product: Product, soft: None) -> tuple[Tensor, ...]:
        return (forward(self._moved(product), "ieee").cpu(),)

    def backward(self, product: Product, dy: Tensor, soft: None) -> tuple[Tensor, ...]:
        found = backward(self._moved(product), dy.to(self.device), "ieee")
        return tuple(x.cpu() for x in found)

    def _moved(self, product: Product) -> Product:
        tensors = {name: x for name, x in product._asdict().items() if isinstance(x, Tensor)}
        return product._replace(**{name: x.to(self.device) for name, x in tensors.items()})


@once
def _refuses_piece(family: Family | None, device: torch.device) -> str:
    """Why the piece of a basis of one's own is not taken, or ""; logged once."""
    assert family is not None
    pin(family)
    try:
        with for_good(), torch.device("cpu"):
            cpp.check(_There(device), family, False)
    except Exception as error:
        why = " ".join(str(error).split())
        log.warning("kart's Triton engine is off for %s, torch runs instead: %s", family.name, why)
        return why
    return ""


def _kernels(product: Product) -> Any:
    return units if product.family.basis.features is None else linear


def forward(
    product: Product, precision: str | None = None, choose: Callable[..., Tiles] | None = None
) -> Tensor:
    """The streamed product `(B, H, N, r)`, contiguous, in q's dtype.

    A Fourier feature of harmonic g is right to `g (abs(score) 2^-24 + 2^-20)` up to scores of 2^15
    turns (2e5), where a float32 score has two digits left, and bounded beyond.

    Args:
        precision: "tf32", "tf32x3" or "ieee" (exact, slow) products of float32 inputs; by default
            what torch is set to, see the module.
        choose: of the tiles of each kernel, by default `linear.tiles` or `units.tiles`; to tune
            them.
    """
    kernels = _kernels(product)
    return kernels.forward(product, precision, choose or kernels.tiles)


def backward(
    product: Product,
    dy: Tensor,
    precision: str | None = None,
    choose: Callable[..., Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dcoefs)` of `(forward(...) * dy).sum()`, in the dtypes of q, k, coefs.

    dq and dk are laid out as q and k (`kart.kernels.arguments.room_like`), dcoefs is contiguous.

    dcoefs is summed over the batch where coefs has a batch of 1. Two runs agree in every bit.
    """
    kernels = _kernels(product)
    return kernels.backward(product, dy, precision, choose or kernels.tiles)
