"""Which tiles of the Triton kernels are fastest on this GPU?

    python -m studies.tiles [--specs G3 G1] [--precision float32] [--tokens 197] [--out tiles.json]

Each kernel of a product, "forward", "query_gradient" and "key_gradient", gets every tile of a list
while the other has its default; the pass that it is part of is timed as a CUDA graph. Kernels are
built first, in processes beside each other; what does not build or run is counted. Prints the
default of each and the fastest. `tiles` of `kart.kernels.triton.linear` and `.units` holds what is
chosen. Expected: about two minutes on an H200 with 16 cores for the specs below at one size.
"""

import argparse
import functools
import itertools
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import checkpoint, gpu, kernels, operators, tables
from kart.analysis.bench import Clock, processes
from kart.commands.command import file, integer, standalone
from kart.kernels import triton as engine
from kart.kernels.family import Product, family_of
from kart.kernels.triton import linear, units
from kart.kernels.triton.launch import Tiles

SPECS = ("G3", "G1", "chebyshev-5", "gaussian_rbf-G8", "bspline-G8", "mexican_hat", "rational-5/4")
KERNELS = ("forward", "query_gradient", "key_gradient")


class Job(NamedTuple):
    """One kernel of one product with one tile, None for its default."""

    spec: str
    precision: str
    tokens: int
    batch: int
    kernel: str
    tile: Tiles | None


def candidates(kernel: str, held: int) -> list[Tiles]:
    """The tiles that are tried; `held` is the number of features, or ranks, of the default.

    None has one stage: without a pipeline ptxas 12.8 reads what nothing wrote (`tests/sass.py`).
    """
    queries, keys = ((16, 32, 64), (32, 64)) if kernel == "key_gradient" else ((64, 128), (32, 64))
    shapes = itertools.product(queries, keys, ((4, 2), (4, 3), (8, 2)))
    return [Tiles(n, m, warps, stages, held) for n, m, (warps, stages) in shapes]


def default(product: Product, kernel: str) -> Tiles:
    """What a kernel of this product is launched with."""
    kept: dict[str, Tiles] = {}
    choose = _choose(product)

    def noted(name: str, *rest: Any) -> Tiles:
        kept[name] = choose(name, *rest)
        return kept[name]

    run(product, kernel, noted)
    return kept[kernel]


def _choose(product: Product) -> Any:
    return units.tiles if product.family.basis.features is None else linear.tiles


def drawn(job: Job, device: str) -> Product:
    """The product of an operator as a model has it: q and k of one projection, r = 12."""
    dtype = getattr(torch, job.precision)
    generator = torch.Generator().manual_seed(0)
    op = operators.parse(job.spec).operator
    assert op.basis is not None
    shape = (job.batch, job.tokens, 3, 3, 64)
    q, k, _ = torch.randn(shape, generator=generator).to(device, dtype).permute(2, 0, 3, 1, 4)
    own = op.init(generator, 3, job.tokens)["units"]
    family = family_of(op.basis)
    coefs = (
        family.pieces.leaves(own) if op.basis.coefficients is None else op.basis.coefficients(own)
    )
    return Product(family, q, k, coefs[None].to(device), None, 64**-0.5)


def run(product: Product, kernel: str, choose: Any) -> Tensor | tuple[Tensor, ...]:
    """The pass that a kernel is part of."""
    if kernel == "forward":
        return engine.forward(product, choose=choose)
    dy = product.q.new_ones(*product.q.shape[:3], product.coefs.shape[2])
    return engine.backward(product, dy, choose=choose)


def with_tile(product: Product, kernel: str, tile: Tiles | None) -> Any:
    """The choice of tiles in which one kernel has `tile`."""
    choose = _choose(product)
    return lambda name, *rest: tile if tile and name == kernel else choose(name, *rest)


def attempt(job: Job) -> str:
    """Builds and runs a job; why it failed, or ""."""
    product = drawn(job, "cuda")
    try:
        run(product, job.kernel, with_tile(product, job.kernel, job.tile))
        torch.cuda.synchronize()
    except Exception as error:  # of Triton or of the driver: no tile of this list, then
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def attempts(jobs: list[Job], each: int | None = None) -> dict[Job, str]:
    """Why each job failed, or "", of processes that end after `each` jobs."""
    with processes(each) as pool:
        return dict(zip(jobs, pool.map(attempt, jobs), strict=True))


def measure(jobs: list[Job], repeats: int) -> dict[Job, float]:
    """Microseconds of the pass of each job."""
    clock, found = Clock("cuda"), {}
    for job in jobs:
        product = drawn(job, "cuda")
        choose = with_tile(product, job.kernel, job.tile)
        replay, _ = gpu.record(functools.partial(run, product, job.kernel, choose))
        found[job] = 1e6 * statistics.median(clock(replay) for _ in range(repeats))
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and writes all times where `--out` says."""
    parser = argparse.ArgumentParser(prog="studies.tiles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--specs", nargs="+", default=list(SPECS), metavar="SPEC")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=integer(1), default=[197], metavar="INT")
    parser.add_argument("--repeats", type=integer(1), default=5, metavar="INT")
    parser.add_argument("--out", type=file, help="JSON of all times")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or kernels.engines()["triton"] != "ready":
        raise ValueError(f"`tiles` needs a GPU and Triton, got: {kernels.engines()['triton']}.")
    jobs: list[Job] = []
    for spec, tokens, kernel in itertools.product(args.specs, args.tokens, KERNELS):
        batch = max(1, round(128 * (197 / tokens) ** 2))
        first = Job(spec, args.precision, tokens, batch, kernel, None)
        held = default(drawn(first._replace(batch=1), "cuda"), kernel).held
        jobs += [first, *(first._replace(tile=tile) for tile in candidates(kernel, held))]
    reasons = attempts(jobs)
    # a kernel that reads wrong memory takes along what its process does after it
    reasons |= attempts([job for job in jobs if reasons[job]], 1)
    found = measure([job for job in jobs if not reasons[job]], args.repeats)
    rows = []
    for first in (job for job in found if job.tile is None):
        same = {job: us for job, us in found.items() if job._replace(tile=None) == first}
        best = sorted(same, key=lambda job: same[job])[:3]
        shown = [f"{same[job]:.1f} {tuple(job.tile) if job.tile else 'default'}" for job in best]
        rows.append([first.spec, str(first.tokens), first.kernel, f"{found[first]:.1f}", *shown])
    head = ["spec", "tokens", "kernel", "default us", "fastest", "second", "third"]
    print(tables.table(rows, head))
    failed = sorted({reason for reason in reasons.values() if reason})
    print(f"{sum(map(bool, reasons.values()))} of {len(jobs)} tiles failed: {'; '.join(failed)}")
    if args.out:
        every = [{**job._asdict(), "us": us} for job, us in found.items()]
        checkpoint.write_json(args.out, {"machine": torch.cuda.get_device_name(), "rows": every})
    return 0


if __name__ == "__main__":
    standalone(main)
