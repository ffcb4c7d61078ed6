"""What does learnable attention cost beside softmax? Time and peak memory, side by side in one run.

    kart bench                  # this machine's CPU, one thread, about ten minutes
    kart bench --quick          # G = 3 and G = 1 at operator level only, one minute
    kart bench --device cuda    # a GPU: times by events, memory by its allocator

Every figure is a ratio to `scaled_dot_product_attention` (its backend is named) measured in the
same process, variants in turn after warm-up, medians of `--repeats` with the spread of the middle
half. On a CPU time is that of one thread (`process_time`), which a busy machine disturbs least, and
memory the growth of the peak resident set in a process of its own, after imports and parameters.
Writes cost.json and, with matplotlib, cost.png beside the table.

"naive" is the materialised form: features (N, M, K), activated matrix, backward by autograd.
Floors: FLOPs over the best matrix product rate measured at start, with 2 FLOPs a multiply-add and
no transcendental counted.
"""

import argparse
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kart import bases, checkpoint, kernels, models, operators, tables, train, tree
from kart.train import Config

Timed = dict[str, list[float]]

# (what, variant, ratio to reach, then): issue of record for the README's table
TARGETS = {
    ("op G=3 N=197", "torch"): (2.5, None),
    ("op G=3 N=197", "cpp"): (None, 1.25),
    ("op G=1 N=197", "torch"): (1.7, None),
    ("op G=1 N=197", "cpp"): (None, 0.95),
    ("step", "auto"): (1.4, 1.1),
    ("memory", "auto"): (1.2, 1.05),
}


class Clock:
    """Seconds of a call: events on a GPU, CPU time of this process elsewhere."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            began = time.process_time()
            call()
            return time.process_time() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def interleave(calls: dict[str, Callable[[], Any]], repeats: int, clock: Clock) -> Timed:
    """Seconds of each call, taken in turn so that a disturbance meets all of them."""
    seconds: Timed = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            spent = clock(call)
            if repeat >= 2:  # two rounds warm up
                seconds[name].append(spent)
    return seconds


def engines_for(device: str) -> list[str]:
    """The engines of `kernels.contract` that can run on `device`, the default first."""
    ready = [name for name, state in kernels.engines().items() if state == "ready"]
    wanted = ["torch", "cpp"] if device == "cpu" else ["triton", "torch"]
    return [name for name in wanted if name in ready]


def sdpa_backend(device: str, dtype: torch.dtype, tokens: int) -> str:
    """The kernel that `scaled_dot_product_attention` takes for this setting."""
    if device == "cpu":
        return "flash (CPU)"
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(2, 3, tokens, 64, device=device, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        F.scaled_dot_product_attention(q, q, q)
    names = " ".join(event.key.lower() for event in profiled.key_averages())
    for word in ("cudnn", "flash", "efficient"):
        if word in names:
            return word
    return "math"


def matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of a large matrix product, the floor's unit."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(clock(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / best


def op_flops(family: str, grid: int, rank: int, tokens: int, width: int, pairs: int) -> float:
    """FLOPs of forward and backward over `pairs` (batch x heads) score matrices.

    Softmax attention: 2 products forward, 5 backward. KArAt: scores, F C and its share of W^T V
    (which is small, r N d) forward; backward scores again, dF, dC, dq, dk.
    """
    square = tokens * tokens * pairs
    if family == "softmax":
        return square * 2 * width * 7
    return square * (2 * width * 4 + 2 * 2 * grid * rank * 3)


Attend = Callable[..., Tensor]


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _naive(op: operators.Operator) -> Attend:
    def attend(params: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op.weights(params, q @ k.mT * q.shape[-1] ** -0.5) @ v

    return attend


def _streamed(basis: bases.Basis, engine: str) -> Attend:
    def attend(params: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = kernels.contract(basis, params["units"]["coefs"], q, k, engine=engine)
        return hidden @ (params["mix"].to(v.dtype).mT @ v)

    return attend


def _gradients(attend: Attend, inputs: tuple, probe: Tensor) -> None:
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), inputs)
    torch.autograd.grad((attend(*leaves) * probe).sum(), tree.leaves(leaves))


def operator_level(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of one attention operator."""
    dtype = getattr(torch, args.precision)
    rate = matmul_rate(args.device, dtype, clock)
    rows = []
    settings = [(3, 12, 197), (1, 12, 197)]
    if not args.quick:
        settings += [(5, 12, 197), (3, 24, 197), (3, 12, 65), (3, 12, 785)]
    for grid, rank, tokens in settings:
        batch = max(1, round(args.op_batch * (197 / tokens) ** 2))
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, tokens, 64)
        tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
        q, k, v, probe = (x.to(args.device, dtype) for x in tensors)
        basis = bases.fourier(grid)
        op = operators.low_rank(basis, rank=rank)
        params = tree.to(op.init(generator, 3, tokens), args.device)

        variants: dict[str, tuple[Attend, tuple]] = {"softmax": (_softmax, (q, k, v))}
        if tokens < 400 and args.device == "cpu":
            variants["naive"] = (_naive(op), (params, q, k, v))
        for engine in engines_for(args.device):
            variants[engine] = (_streamed(basis, engine), (params, q, k, v))
        forward = {
            name: functools.partial(call, *inputs) for name, (call, inputs) in variants.items()
        }
        both = {
            name: functools.partial(_gradients, call, inputs, probe)
            for name, (call, inputs) in variants.items()
        }
        with torch.no_grad():
            ahead = interleave(forward, args.repeats, clock)
        timed = interleave(both, args.repeats, clock)
        for name in variants:
            flops = op_flops(name, grid, rank, tokens, 64, batch * 3)
            rows.append(
                {
                    "what": f"op G={grid} N={tokens}" + (f" r={rank}" if rank != 12 else ""),
                    "variant": name,
                    "batch": batch,
                    "forward": summary(ahead[name], ahead["softmax"]),
                    "both": summary(timed[name], timed["softmax"]),
                    "floor": flops / rate / statistics.median(timed[name]),
                }
            )
    return rows


def summary(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and middle half in ms, and the ratio of medians to `reference`."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    median = statistics.median(ordered)
    return {
        "ms": 1000 * median,
        "low_ms": 1000 * ordered[quarter],
        "high_ms": 1000 * ordered[-1 - quarter],
        "ratio": median / statistics.median(reference),
    }


def step_call(
    operator: str, batch: int, device: str, precision: str = "float32"
) -> Callable[[], train.State]:
    """One functional training step of ViT-Tiny at 224 px on random images; call it repeatedly."""
    config = Config(
        operator=operator, epochs=10, batch_size=batch, warmup_epochs=0, device=device,
        precision=precision,
    )  # fmt: skip
    model = models.create("vit_tiny", operator=operator, num_classes=10)
    functions = train.program(config, model, steps_per_epoch=10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
    targets = F.one_hot(torch.arange(batch) % 10, 10).float().to(device)
    hyper = train.Hyper(*(torch.tensor(x, device=device) for x in (1e-3, 0.05)))
    held = [functions.init(generator)]

    def call() -> train.State:
        held[0], _ = functions.step(held[0], hyper, images, targets)
        return held[0]

    return call


STEPS = {"softmax": "softmax", "auto": "G3B", "auto G=1": "G1B", "naive": "G3B:engine=plain"}


def step_level(args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """The whole training step of ViT-Tiny: loss, gradients, AdamW."""
    batch = args.step_batch
    calls = {
        name: step_call(spec, batch, args.device, args.precision) for name, spec in STEPS.items()
    }
    seconds = interleave(calls, max(3, args.repeats // 3), clock)
    return [
        {
            "what": "step",
            "variant": name,
            "batch": batch,
            "both": summary(values, seconds["softmax"]),
        }
        for name, values in seconds.items()
    ]


def resident_mib(peak: bool) -> float:
    """Resident set of this process in MiB: now, or its peak so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS has the peak alone, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # ru_maxrss would start from what the parent of the process held
    field = "VmHWM:" if peak else "VmRSS:"
    return int(status.split(field)[1].split()[0]) / 1024


def measure_memory(operator: str, batch: int, device: str, precision: str) -> None:
    """Prints the peak memory of a training step, before and after, as JSON; in a fresh process."""
    torch.set_num_threads(1)
    call = step_call(operator, batch, device, precision)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resident_mib(peak=False)
    for _ in range(2):
        call()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident_mib(True)
    print(json.dumps({"before_mib": before, "peak_mib": peak}))


def memory_level(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory above parameters of a ViT-Tiny training step, each in a process of its own."""
    specs = {**STEPS, "full rank G=10, batch 1": "G10B:order=full_rank"}
    specs["full rank G=10, batch 8"] = specs["full rank G=10, batch 1"]
    rows, reference = [], 0.0
    for name, spec in specs.items():
        batch = int(name.rsplit(" ", 1)[1]) if "batch" in name else args.step_batch
        inner = [spec, str(batch), args.device, args.precision]
        command = [sys.executable, "-m", "kart.analysis.bench", "--memory-of", *inner]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"measuring the memory of {spec} failed:\n{result.stderr}")
        found = json.loads(result.stdout.splitlines()[-1])
        grown = found["peak_mib"] - found["before_mib"]
        reference = reference or grown
        row = {"what": "memory", "variant": name, "batch": batch, **found}
        rows.append({**row, "grown_mib": grown, "ratio": grown / reference})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as text tables."""
    lines = []
    timed = [row for row in rows if row["what"] != "memory"]
    body = []
    for row in timed:
        cells = [row["what"], row["variant"], str(row["batch"])]
        for key in ("forward", "both"):
            one = row.get(key)
            cells += [f"{one['ms']:.1f}", f"{one['ratio']:.2f}"] if one else ["", ""]
        spread = row["both"]
        cells.append(f"{spread['low_ms']:.1f}-{spread['high_ms']:.1f}")
        cells.append(f"{100 * row['floor']:.0f}%" if "floor" in row else "")
        body.append([*cells, verdict(row)])
    header = ["what", "variant", "batch", "fwd ms", "ratio", "fwd+bwd ms", "ratio", "middle half"]
    lines.append(tables.table(body, [*header, "of floor", "goal"]))
    memory = [row for row in rows if row["what"] == "memory"]
    if memory:
        body = [
            [
                row["variant"],
                str(row["batch"]),
                f"{row['peak_mib']:.0f}",
                f"{row['grown_mib']:.0f}",
                f"{row['ratio']:.2f}" if "full" not in row["variant"] else "",
                verdict(row),
            ]
            for row in memory
        ]
        names = ["memory of a ViT-Tiny step", "batch", "peak MiB", "above parameters", "ratio"]
        lines += ["", tables.table(body, [*names, "goal"])]
    return "\n".join(lines)


def verdict(row: dict[str, Any]) -> str:
    """How far a row is from its goals."""
    reach, then = TARGETS.get((row["what"], row["variant"]), (None, None))
    ratio = row["ratio"] if row["what"] == "memory" else row["both"]["ratio"]
    goals = []
    for word, goal in (("reach", reach), ("then", then)):
        if goal is not None:
            goals.append(f"{word} {goal}: {'met' if ratio <= goal else 'missed'}")
    return ", ".join(goals)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios to softmax."""
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["variant"] != "softmax" and "full" not in row["variant"]]
    labels = [f"{row['what']}, {row['variant']}" for row in chosen]
    values = [row["ratio"] if row["what"] == "memory" else row["both"]["ratio"] for row in chosen]
    figure = Figure(figsize=(8, 0.32 * len(chosen) + 1), layout="constrained")
    axes = figure.add_subplot()
    kinds = ["#b3533b" if row["variant"] == "naive" else "#2f6f8f" for row in chosen]
    axes.barh(range(len(chosen)), values, color=kinds)
    axes.set_yticks(range(len(chosen)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.2", linewidth=1)
    axes.set_xlabel("time or memory, forward + backward, as a ratio to softmax attention")
    for i, value in enumerate(values):
        axes.text(value, i, f" {value:.2f}", va="center", fontsize=8)
    axes.set_xlim(0, max(values) * 1.12)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kart bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--op-batch", type=int, help="batch at N = 197 (default 8; GPU 128)")
    parser.add_argument("--step-batch", type=int, help="batch of a step (default 8; GPU 128)")
    parser.add_argument("--quick", action="store_true", help="operator level only")
    parser.add_argument("--out", default="cost.json", help="JSON; the plot goes beside it")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        spec, batch, device, precision = args.memory_of
        measure_memory(spec, int(batch), device, precision)
        return
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("cost: --device cuda needs a GPU, and torch sees none")
    args.precision = args.precision or ("bfloat16" if gpu else "float32")
    args.op_batch = args.op_batch or (128 if gpu else 8)
    args.step_batch = args.step_batch or (128 if gpu else 8)
    torch.set_num_threads(1)
    clock = Clock(args.device)
    rows = operator_level(args, clock)
    if not args.quick:
        rows += step_level(args, clock)
        rows += memory_level(args)
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, one thread"
    about = {
        "machine": machine,
        "precision": args.precision,
        "sdpa_backend": sdpa_backend(args.device, getattr(torch, args.precision), 197),
        "engines": kernels.engines(),
        "versions": checkpoint.versions(),
    }
    print(show(rows))
    print(f"\n{machine}, {args.precision}, torch {torch.__version__}")
    print(f"SDPA backend: {about['sdpa_backend']}")
    path = Path(args.out)
    checkpoint.write_text(path, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
