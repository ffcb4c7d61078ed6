"""The least time that attention can take on a machine: FLOPs, bytes and rates, no measurement.

    kart info --roofline        # the paper's models on an H100, N from 197 to 16,384
    kart info --roofline cpu    # the same counts beside this machine's clock, at its rates

A kernel is bound by the slowest of a machine's units, each at its full rate and all at once: matrix
products, memory, and exp, sin and cos where a unit of its own computes them (Williams, Waterman and
Patterson, "Roofline", CACM 52(4), 2009). Counted are the fused forms, forward and backward, that
recompute the scores in the backward: matrix products at 2 FLOPs a multiply-add, and every tensor
once on its way between a kernel and memory. Not counted: what is added to a score one by one
(maxima, harmonics, masks), and units that a rank of 12 leaves idle in a tile of 16.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from kart import models, operators, tables
from kart.analysis import bench, cost
from kart.models import Model
from kart.operators import Operator


class Work(NamedTuple):
    """What a kernel has to do: FLOPs of matrix products, bytes, values of exp, sin and cos."""

    flops: float = 0
    bytes: float = 0
    special: float = 0


class Machine(NamedTuple):
    """What a machine can do in a second; `special` infinite where exp is made of multiply-adds."""

    name: str
    flops: float
    bytes: float
    special: float = math.inf


# dense bfloat16 and HBM3 of the SXM5 (NVIDIA, H100 data sheet); 16 special functions a cycle of
# each of 132 multiprocessors (Shah et al., "FlashAttention-3", arXiv:2407.08608, sec. 3.1)
H100 = Machine("H100 SXM, bfloat16", 989.4e12, 3.35e12, 3.9e12)


def roof(work: Work, machine: Machine) -> tuple[float, str]:
    """Seconds that `work` takes at least on `machine`, and the unit that binds it."""
    units = {"matrix": work.flops / machine.flops, "memory": work.bytes / machine.bytes}
    units["special"] = work.special / machine.special
    unit = max(units, key=lambda name: units[name])
    return units[unit], unit


def attention(
    op: Operator, batch: int, heads: int, tokens: int, width: int, each: int
) -> list[Work]:
    """Work of the forward and of the backward of an operator on `batch` images.

    Of softmax 2 and 5 products of N^2 d multiply-adds. Of KArAt forward the scores, N^2 d, features
    times coefficients, N^2 K r, and N r d twice, for W^T V and its product with the hidden values;
    backward the scores again and the gradients of both sides of each. Numbers have `each` bytes.

    Raises:
        ValueError: for what is neither softmax nor low rank in Fourier features.
    """
    square, rows = tokens * tokens * batch * heads, tokens * batch * heads
    if op.options.get("kind") == "softmax":
        # q, k, v and out; then besides their gradients, and the logarithm of each row's sum
        memory = [4 * width * each + 4, 8 * width * each + 4]
        return [
            Work(2 * products * square * width, rows * numbers, square)
            for products, numbers in zip((2, 5), memory, strict=True)
        ]
    basis, options = op.basis, op.options
    plain = options.get("kind") == "low_rank" and not options["base"] and not options["project"]
    if not plain or basis is None or (basis.family, basis.options["base"]) != ("fourier", "zero"):
        raise ValueError(
            f"`attention` needs softmax or Fourier units of low rank, got {op.name!r}. Choose one."
        )
    rank, size = options["rank"], basis.size
    # W and the units' coefficients; hidden values are kept for the backward
    params = heads * tokens * rank * (size + 1) * each
    forward = square * (width + size * rank) + 2 * rows * rank * width
    backward = square * (3 * width + 2 * size * rank) + 4 * rows * rank * width
    return [
        Work(2 * forward, rows * (4 * width + rank) * each + params, 2 * square),
        Work(2 * backward, rows * (7 * width + rank) * each + 2 * params, 2 * square),
    ]


def linear(rows: int, inputs: int, outputs: int, each: int) -> list[Work]:
    """Work of the forward and of both products of the backward of a linear layer."""
    memory = (rows * inputs + inputs * outputs + rows * outputs) * each
    return [Work(2 * rows * inputs * outputs, memory)] * 3


def rest(model: Model, batch: int, tokens: int, each: int) -> list[Work]:
    """Work of what is not attention in a ViT's pass; norms and GELU as parts of what is beside."""
    c = model.config
    size, rows = c.embed_dim, batch * tokens
    hidden, pixels = int(size * c.mlp_ratio), c.in_channels * c.patch_size**2
    shapes = [(size, 3 * size), (size, size), (size, hidden), (hidden, size)] * c.depth
    layers = [kernel for a, b in shapes for kernel in linear(rows, a, b, each)]
    return (
        layers
        + linear(batch * (tokens - 1), pixels, size, each)
        + linear(batch, size, c.num_classes, each)
    )


TOKENS = (197, 1024, 4096, 16384)


def rows_of(name: str, spec: str, classes: int, batch: int) -> Iterator[list[str]]:
    """A row of text for each of `TOKENS`: this operator's figures, softmax's in brackets."""
    model = models.create(name, operator=spec, num_classes=classes)
    c = model.config
    softmax = operators.softmax()
    for tokens in TOKENS:
        sums, seconds, units = [], [], []
        for op in (model.operators[0], softmax):
            kernels = attention(op, batch, c.num_heads, tokens, c.embed_dim // c.num_heads, 2)
            sums.append(Work(*(c.depth * sum(x) for x in zip(*kernels, strict=True))))
            roofs = [roof(kernel, H100) for kernel in kernels]
            seconds.append(c.depth * sum(spent for spent, _ in roofs))
            units.append(" ".join(dict.fromkeys(unit for _, unit in roofs)))
        beside = sum(roof(kernel, H100)[0] for kernel in rest(model, batch, tokens, 2))
        (own, least), (spent, base) = sums, seconds
        yield [
            f"{name} {spec[:2]}",
            str(tokens),
            f"{own.flops / 1e9:.0f} ({least.flops / 1e9:.0f})",
            f"{own.bytes / 1e6:.0f} ({least.bytes / 1e6:.0f})",
            f"{1e3 * spent:.3f} ({1e3 * base:.3f})",
            f"{units[0]} ({units[1]})",
            f"{spent / base:.2f}",
            f"{1e3 * (spent + beside):.2f} ({1e3 * (base + beside):.2f})",
            f"{(spent + beside) / (base + beside):.2f}",
        ]


def paper(batch: int) -> str:
    """The table of the paper's models on an H100, `batch` images forward and backward."""
    rows = [
        line
        for name, spec, classes, *_ in cost.PAPER
        if spec.endswith("B")
        for line in rows_of(name, spec, classes, batch)
    ]
    header = ["model", "N", "attention GFLOP", "MB", "roofline ms", "bound by", "ratio"]
    note = (
        f"{H100.name}, batch {batch}, forward and backward; softmax's figure in brackets.\n"
        f"{H100.flops / 1e12:.1f} TFLOP/s, {H100.bytes / 1e12:.2f} TB/s, "
        f"{H100.special / 1e12:.1f} T exp, sin or cos a second.\n"
        "A bound, not a forecast: no kernel of these forms is faster. Blockwise and universal "
        "operators are\nequal here."
    )
    return tables.table(rows, [*header, "all ms", "ratio"]) + "\n\n" + note


# --- held against a CPU -------------------------------------------------------------------------

REPEATS = 7
MEASURED = ((8, 197), (1, 1024), (1, 4096))  # images and tokens


def this_cpu(clock: bench.Clock) -> Machine:
    """The rates of one thread here: its best matrix product, its best sum over 256 MiB."""
    flops = max(bench.matmul_rate("cpu", torch.float32, clock) for _ in range(3))
    large = torch.ones(2**26)
    seconds = min(clock(large.sum) for _ in range(5))
    return Machine("this CPU, one thread, float32", flops, large.nbytes / seconds)


def measured() -> str:
    """The table of softmax and Fourier attention, forward and backward: roofline and clock."""
    torch.set_num_threads(1)
    clock = bench.Clock("cpu")
    machine = this_cpu(clock)
    rows, broken = [], []
    for batch, tokens in MEASURED:
        calls, roofs = {}, {}
        for spec in ("softmax", "G1", "G3"):
            op = operators.parse(spec).operator
            inputs, probe = bench.drawn(op, batch, tokens)
            attend = bench.attend_softmax if spec == "softmax" else op.attend
            calls[spec] = functools.partial(bench.gradients, attend, inputs, probe)
            kernels = attention(op, batch, bench.HEADS, tokens, bench.WIDTH, 4)
            roofs[spec] = sum(roof(kernel, machine)[0] for kernel in kernels)
        timed = bench.interleave(calls, REPEATS, clock)
        spent = {spec: min(seconds) for spec, seconds in timed.items()}
        for spec in calls:
            share = roofs[spec] / spent[spec]
            if share > 1:
                broken.append(f"{spec} at N={tokens}")
            rows.append(
                [
                    spec,
                    str(tokens),
                    f"{1e3 * roofs[spec]:.2f}",
                    f"{1e3 * spent[spec]:.2f}",
                    f"{share:.2f}",
                    f"{roofs[spec] / roofs['softmax']:.2f}",
                    f"{spent[spec] / spent['softmax']:.2f}",
                ]
            )
    header = ["attention", "N", "roofline ms", "measured ms", "of roofline"]
    verdict = f"broken by {', '.join(broken)}" if broken else "no row is faster than its roofline"
    note = (
        f"{machine.name}: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s, best "
        f"of several.\nForward and backward, best of {REPEATS} taken in turn; {verdict}."
    )
    return tables.table(rows, [*header, "ratio by roofline", "measured ratio"]) + "\n\n" + note
