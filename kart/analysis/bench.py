"""What does learnable attention cost beside softmax? Time and peak memory, side by side in one run.

    kart bench                  # this machine's CPU, one thread, about nine minutes
    kart bench --quick          # G = 3 and G = 1 at operator level only, ten seconds
    kart bench --device cuda    # a GPU: times of CUDA graphs by events, memory by its allocator

Every figure is a ratio to `scaled_dot_product_attention` (its backend is named) measured in the
same process, variants in turn after warm-up, medians of `--repeats` with the spread of the middle
half. A short call is timed right after one of its own: the first one after another variant pays
for the caches that were left to it, up to half of its time, whichever it is. On a CPU time is that
of one thread (`process_time`), which a busy machine disturbs least, and memory the growth of the
peak resident set in a process of its own, after imports and parameters. On a GPU single operators
are timed as replays of a CUDA graph, so without the host that launches them, which a training step
has unless it is compiled or a graph itself (`--step`). Writes cost.json and, with matplotlib,
cost.png beside the table.

"naive" is the materialised form: features (N, M, K), activated matrix, backward by autograd.
Floors: FLOPs over the best matrix product rate measured at start, with 2 FLOPs a multiply-add and
no transcendental counted.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kart import checkpoint, gpu, kernels, models, operators, tables, train, tree
from kart.analysis import cost
from kart.models import blocks
from kart.train import Config

Timed = dict[str, list[float]]
Say = Callable[[str], None]  # of progress
Rows = Iterator[dict[str, Any]]
Goal = tuple[float, float | None]  # the ratio to reach, and the next one

# peak of the process in MB, where the paper had 60 GB for one image
PEAKS = {"full rank G=10, batch 1": ("reach", 1000), "full rank G=10, batch 8": ("then", 1200)}


# seconds; what takes longer is not run twice to be timed once
SHORT = 0.05
# seconds; what takes less on a GPU is timed several times in a row
ENOUGH = 0.001


class Clock:
    """Seconds of a call: events on a GPU, CPU time of this process elsewhere."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            began = time.process_time()
            call()
            return time.process_time() - began
        once = self._seconds(call, 1)
        # a launch alone takes microseconds
        return once if once > ENOUGH else self._seconds(call, math.ceil(ENOUGH / once))

    def _seconds(self, call: Callable[[], Any], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / times


def device_alone(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`call`, on a GPU as a CUDA graph: without the time of the host that launches it."""
    return gpu.record(call)[0] if device == "cuda" else call


def interleave(calls: dict[str, Callable[[], Any]], repeats: int, clock: Clock) -> Timed:
    """Seconds of each call, taken in turn so that a disturbance meets all of them; of a short one
    right after another of its own.
    """
    seconds: Timed = {name: [] for name in calls}
    last = dict.fromkeys(calls, math.inf)
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            if last[name] < SHORT:
                call()
            spent = last[name] = clock(call)
            if repeat >= 2:  # two rounds warm up
                seconds[name].append(spent)
    return seconds


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


class Setting(NamedTuple):
    """One operator, at one size and in one precision; of variants the goals that it has."""

    what: str
    spec: str
    tokens: int = 197
    precision: str | None = None
    goals: Mapping[str, Goal] = {}


SETTINGS = (
    Setting("op G=3 N=197", "G3", goals={"torch": (2.0, 1.6), "cpp": (0.8, 0.7)}),
    Setting("op G=1 N=197", "G1", goals={"torch": (1.7, None), "cpp": (0.6, 0.5)}),
    Setting("op G=5 N=197", "G5"),
    Setting("op G=3 N=197 r=24", "G3:rank=24"),
    Setting("op G=3 N=65", "G3", 65),
    Setting("op G=3 N=785", "G3", 785),
    Setting("op G=3 silu N=197", "G3:unit_base=silu", goals={"cpp": (1.3, 1.0)}),
    Setting("op G=3 gelu N=197", "G3:unit_base=gelu", goals={"cpp": (1.3, 1.0)}),
    Setting("op polynomial-1 N=197", "polynomial-1", goals={"cpp": (1.2, 0.8)}),
    Setting("op polynomial-5 N=197", "polynomial-5", goals={"cpp": (1.2, 0.8)}),
    Setting("op chebyshev-5 N=197", "chebyshev-5", goals={"cpp": (1.2, 0.8)}),
    Setting("op gaussian_rbf-8 N=197", "gaussian_rbf-G8", goals={"cpp": (2.0, 1.3)}),
    Setting("op bspline-8 N=197", "bspline-G8", goals={"cpp": (2.5, 1.5)}),
    Setting("op rational-5/4 N=197", "rational-5/4", goals={"auto": (5.0, 3.0)}),
    Setting("op mexican_hat N=197", "mexican_hat", goals={"auto": (6.0, 3.5)}),
    Setting("op morlet N=197", "morlet", goals={"auto": (6.0, 3.5)}),
    Setting("op dog N=197", "dog", goals={"auto": (6.0, 3.5)}),
    Setting("op meyer N=197", "meyer", goals={"auto": (8.0, 5.0)}),
    Setting("op shannon N=197", "shannon", goals={"auto": (8.0, 5.0)}),
    Setting("op G=3 softmax base N=197", "G3:base=softmax", goals={"cpp": (1.5, 1.35)}),
    Setting("op G=3 simplex N=197", "G3:project=simplex", goals={"cpp": (3.0, 2.0)}),
    Setting("op full rank G=3 N=197", "G3:order=full_rank", goals={"cpp": (4.5, 4.2)}),
)
IN_BFLOAT16 = Setting(
    "op G=3 N=197 bfloat16", "G3", precision="bfloat16", goals={"cpp": (1.2, 1.0)}
)
# tables by offset, a function of the score at every offset, and the same one everywhere
TABLES = (
    Setting("op softconv N=197", "softconv", goals={"auto": (1.5, 1.4)}),
    Setting("op softconv N=65", "softconv", 65, goals={"auto": (1.5, 1.4)}),
    Setting("op table inside softmax N=197", "relative:inside=true", goals={"auto": (1.5, 1.4)}),
    Setting("op by_offset G=3 N=197", "G3:order=by_offset", goals={"auto": (2.0, 1.5)}),
    Setting("op sigmoid N=197", "sigmoid", goals={"auto": (1.5, 1.2)}),
)
# operators that do not know the length
ANY_LENGTH = {
    "elementwise G=3": "G3:order=elementwise",
    "elementwise bspline-8": "bspline-8:order=elementwise",
    "elementwise G=3 inside softmax": "G3:order=elementwise,inside=true",
    "elementwise G=3 softmax base": "G3:order=elementwise,base=softmax",
    "by_distance G=3": "G3:order=by_distance",
    "by_distance G=3 inside softmax": "G3:order=by_distance,inside=true",
    "generated G=3": "G3:order=generated",
    "generated G=3 softmax base": "G3:order=generated,base=softmax",
}
LENGTH_FREE = tuple(
    Setting(f"op {name} N=197", spec, goals={"torch": (2.0, None), "cpp": (2.0, None)})
    for name, spec in ANY_LENGTH.items()
)
# one token more, with as many in the cache
CACHED = 1024
STEP = f"KV step, {CACHED:,} keys"
CACHE = {x: spec for x, spec in ANY_LENGTH.items() if x != "elementwise G=3 softmax base"}
# of what and variant
TARGETS: dict[tuple[str, str], Goal] = {
    ("step", "auto"): (0.97, 0.93),
    ("memory", "auto"): (1.0, 0.98),
    ("memory", "auto, vmap"): (1.6, 1.3),
    **{(STEP, variant): (1.5, None) for variant in CACHE},
    **{
        (setting.what, variant): goal
        for setting in (*SETTINGS, IN_BFLOAT16, *TABLES, *LENGTH_FREE)
        for variant, goal in setting.goals.items()
    },
}
HEADS, WIDTH = 3, 64
# models and batches whose attention is taken with its projections
BLOCKS = {"vit_tiny": 8, "vit_small": 8, "vit_base": 2}


def op_flops(name: str, op: operators.Operator, tokens: int, pairs: int) -> float:
    """FLOPs of the products of forward and backward over `pairs` (batch x heads) score matrices.

    Of softmax, and of a function of the score, 2 forward and 5 backward; a table or function beside
    softmax has its own product with the values. Of KArAt: scores and F C; scores again, dF, dC, dq
    and dk; from the same scores of softmax beside it P V, dP and dV. Full rank has C V in place of
    C, twice, and its two gradients; a projection needs the weights themselves. Units that are no
    products, and the share of W^T V, r N d, are left out.
    """
    square, options = tokens * tokens * pairs, op.options
    if name == "softmax":
        return square * 2 * WIDTH * 7
    beside, kind = options.get("base") == "softmax", options.get("kind")
    if op.basis is None or kind in ("elementwise", "by_offset"):
        return square * 2 * WIDTH * (7 + beside)
    if kind == "by_distance":
        # without softmax there are no scores: a product forward, two backward
        return square * 2 * WIDTH * (7 + beside if op.traits.get("softmax_base") else 3)
    rank, products = (WIDTH, 7) if kind == "full_rank" else (options["rank"], 3)
    features = op.basis.size if op.basis.expand(torch.zeros(1)) is not None else 0
    projected = options.get("project") is not None
    mixed = 3 * WIDTH * beside + (3 * WIDTH + 4 * rank) * projected
    return square * 2 * (4 * WIDTH + features * rank * products + mixed)


Attend = Callable[..., Tensor]


def attend_softmax(params: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, which takes no parameters."""
    return F.scaled_dot_product_attention(q, k, v)


def gradients(attend: Attend, inputs: tuple, probe: Tensor) -> None:
    """Forward and backward of `attend(*inputs)`, with `probe` the gradient of its output."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), inputs)
    torch.autograd.grad((attend(*leaves) * probe).sum(), tree.leaves(leaves), allow_unused=True)


def _variants(setting: Setting, device: str, inputs: tuple) -> dict[str, Attend]:
    """softmax, the materialised form, and each engine that can run this operator."""
    op = operators.parse(setting.spec).operator
    found = {"softmax": attend_softmax}
    if setting.tokens < 400:
        found["naive"] = cost.materialised(op).attend
    joint = "," if ":" in setting.spec else ":"
    linear = op.basis is not None and op.basis.features is not None
    engines = ["auto"]
    if linear and "engine" in operators.options(setting.spec):
        wanted = ["torch", "cpp"] if device == "cpu" else ["triton", "torch"]
        engines = [name for name in wanted if kernels.engines()[name] == "ready"]
    for engine in engines:
        spec = setting.spec if engine == "auto" else f"{setting.spec}{joint}engine={engine}"
        attend = operators.parse(spec).operator.attend
        try:
            attend(*inputs)
        except ValueError as error:
            if "cannot run engine" not in str(error):
                raise
            continue  # the engine has no kernels for this basis
        found[engine] = attend
    return found


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """What is measured of single operators."""
    settings = list(SETTINGS[:2] if args.quick else SETTINGS + TABLES + LENGTH_FREE)
    if args.precision == "float32" and not args.quick:
        settings.insert(2, IN_BFLOAT16)
    return settings


def drawn(
    op: operators.Operator,
    batch: int,
    tokens: int,
    width: int = WIDTH,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple, Tensor]:
    """`(params, q, k, v)` of an operator of `HEADS` heads, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, HEADS, tokens, width)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    q, k, v, probe = (x.to(device, dtype) for x in tensors)
    return (tree.to(op.init(generator, HEADS, tokens), device), q, k, v), probe


def drawn_inputs(setting: Setting, args: argparse.Namespace) -> tuple[tuple, Tensor]:
    """`drawn` of a setting."""
    dtype = getattr(torch, setting.precision or args.precision)
    batch = max(1, round(args.op_batch * (197 / setting.tokens) ** 2))
    op = operators.parse(setting.spec).operator
    return drawn(op, batch, setting.tokens, device=args.device, dtype=dtype)


def build(setting: Setting, args: argparse.Namespace) -> None:
    """Runs what a setting measures once; the kernels that Triton builds stay in its cache."""
    inputs, probe = drawn_inputs(setting, args)
    for name, attend in _variants(setting, args.device, inputs).items():
        if name not in ("softmax", "naive"):
            gradients(attend, inputs, probe)


def processes(each: int | None = None) -> ProcessPoolExecutor:
    """A pool that leaves two cores free; a process ends after `each` jobs, by default after all."""
    spawn = multiprocessing.get_context("spawn")
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=each)


def operator_level(args: argparse.Namespace, clock: Clock, progress: Say) -> Rows:
    """Forward, and forward + backward, of one attention operator."""
    rate = functools.cache(lambda dtype: matmul_rate(args.device, dtype, clock))
    for setting in settings_of(args):
        progress(setting.what)
        inputs, probe = drawn_inputs(setting, args)
        op, q, tokens = operators.parse(setting.spec).operator, inputs[1], setting.tokens
        batch, peak = q.shape[0], rate(q.dtype)
        variants = _variants(setting, args.device, inputs)
        forward, both = {}, {}
        with torch.no_grad():
            for name, attend in variants.items():
                call = functools.partial(attend, *inputs)
                forward[name] = device_alone(call, args.device)
            ahead = interleave(forward, args.repeats, clock)
        for name, attend in variants.items():
            call = functools.partial(gradients, attend, inputs, probe)
            both[name] = device_alone(call, args.device)
        timed = interleave(both, args.repeats, clock)
        # inputs and their gradients, the output and its, once each
        least = (8 * q.numel() * q.element_size()) + 2 * 4 * tree.size(inputs[0])
        for name in variants:
            flops = op_flops(name, op, tokens, batch * HEADS)
            yield {
                "what": setting.what,
                "variant": name,
                "batch": batch,
                "forward": summary(ahead[name], ahead["softmax"]),
                "both": summary(timed[name], timed["softmax"]),
                "flops": flops,
                "bytes": least,
                "floor": flops / peak / statistics.median(timed[name]),
            }


def cache_level(args: argparse.Namespace, clock: Clock, progress: Say) -> Rows:
    """A token more of one sequence, attending to itself and to those in the cache."""
    progress(STEP)
    dtype = getattr(torch, args.precision)
    generator = torch.Generator().manual_seed(0)
    more = [torch.randn(1, HEADS, 1, WIDTH, generator=generator) for _ in range(3)]
    held = [torch.randn(1, HEADS, CACHED, WIDTH, generator=generator) for _ in range(2)]
    tokens = [x.to(args.device, dtype) for x in more]
    cache = operators.Cache(*(x.to(args.device, dtype) for x in held))
    calls: dict[str, Callable[[], Any]] = {}
    for name, spec in {"softmax": "softmax", **CACHE}.items():
        op = operators.parse(spec).operator
        params = tree.to(op.init(generator, HEADS, CACHED), args.device)
        call = functools.partial(operators.step, op, params, *tokens, cache)
        with torch.no_grad():
            calls[name] = device_alone(call, args.device)
    with torch.no_grad():
        seconds = interleave(calls, 4 * args.repeats, clock)
    yield from beside_softmax(STEP, 1, seconds)


def block_level(args: argparse.Namespace, clock: Clock, progress: Say) -> Rows:
    """Attention with the projections before and after it, of one block of the paper's ViTs."""
    dtype = getattr(torch, args.precision)
    for model_name, batch in BLOCKS.items():
        what = f"attention of {model_name}, projections too"
        progress(what)
        calls: dict[str, Callable[[], Any]] = {}
        for name, spec in {"softmax": "softmax", "auto": "G3B", "auto G=1": "G1B"}.items():
            model = models.create(model_name, operator=spec, num_classes=10, depth=1)
            generator = torch.Generator().manual_seed(0)
            block, c = model.init(generator)["blocks"]["0"], model.config
            own = {part: block[part] for part in ("attn", "operator") if part in block}
            shape = (batch, c.tokens, c.embed_dim)
            x, probe = (torch.randn(shape, generator=generator) for _ in range(2))
            inputs = (tree.to(own, args.device), x.to(args.device, dtype))
            attend = functools.partial(_attention, model)
            call = functools.partial(gradients, attend, inputs, probe.to(args.device, dtype))
            calls[name] = device_alone(call, args.device)
        yield from beside_softmax(what, batch, interleave(calls, args.repeats, clock))


def _attention(model: models.Model, own: Any, x: Tensor) -> Tensor:
    attn = blocks.attention_at(model.sites[0], {"blocks": {"0": own}}, None, "")
    return attn(own["attn"], x)


def drawn_sizes(count: int) -> list[tuple[int, int, int]]:
    """`count` triples of tokens (17 to 1,025), head width (16 to 128) and rank (1 to 48), evenly in
    their logarithms.
    """
    share = torch.rand(count, 3, generator=torch.Generator().manual_seed(0)).double()
    least = torch.tensor([17.0, 16.0, 1.0], dtype=torch.float64)
    most = torch.tensor([1025.0, 128.0, 48.0], dtype=torch.float64)
    sizes = (least * (most / least) ** share).round().int().tolist()
    return [(tokens, width, rank) for tokens, width, rank in sizes]


def size_level(args: argparse.Namespace, clock: Clock, progress: Say) -> Rows:
    """Forward and backward of G = 3 at drawn sizes, beside the cost interpolated from all of them.

    The cost of a size is a sum of what it has to do: products of scores with the width and of
    features with the rank, features, and what is in proportion to the tokens, each with a price
    that is fitted.
    """
    sizes, seconds, work = drawn_sizes(args.sizes), [], []
    op_of = functools.cache(lambda rank: operators.parse(f"G3:rank={rank}").operator)
    for tokens, width, rank in sizes:
        progress(f"size N={tokens} d={width} r={rank}")
        batch, op = max(1, round(4 * (197 / tokens) ** 2)), op_of(rank)
        inputs, probe = drawn(op, batch, tokens, width, args.device)
        call = device_alone(functools.partial(gradients, op.attend, inputs, probe), args.device)
        seconds.append(min(interleave({"op": call}, 3, clock)["op"]))
        pairs, rows = batch * HEADS * tokens**2, batch * HEADS * tokens
        work.append([pairs * width, pairs * rank, pairs, rows * (width + rank), 1e6])
    measured = torch.tensor(seconds, dtype=torch.float64)
    amounts = torch.tensor(work, dtype=torch.float64) / measured[:, None]
    # a price is not negative: what would be is left out
    kept = list(range(amounts.shape[1]))
    prices = torch.zeros(0)
    while kept:
        prices = torch.linalg.lstsq(amounts[:, kept], torch.ones(len(sizes), 1).double()).solution
        if (prices >= 0).all():
            break
        kept.pop(int(prices.argmin()))
    expected = (amounts[:, kept] @ prices).squeeze(1) * measured
    for size, spent, fit in zip(sizes, seconds, expected.tolist(), strict=True):
        yield {"what": "sizes", "variant": size, "ms": 1000 * spent, "over": spent / fit}


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


def beside_softmax(what: str, batch: int, seconds: Timed) -> Rows:
    """A row for each variant of what was timed, softmax among them."""
    for name, values in seconds.items():
        both = summary(values, seconds["softmax"])
        yield {"what": what, "variant": name, "batch": batch, "both": both}


def step_call(
    operator: str,
    batch: int,
    device: str,
    precision: str = "float32",
    name: str = "vit_tiny",
    batching: str = "native",
    step: str = "eager",
) -> Callable[[], train.State]:
    """One training step of `kart train` at 224 px on random images; call it repeatedly."""
    config = Config(
        operator=operator, epochs=10, batch_size=batch, warmup_epochs=0, device=device,
        precision=precision, batching=batching, step=step,
    )  # fmt: skip
    model = models.create(name, operator=operator, num_classes=10)
    functions = train.program(config, model, steps_per_epoch=10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
    targets = F.one_hot(torch.arange(batch) % 10, 10).float().to(device)
    hyper = train.Hyper(*(torch.tensor(x, device=device) for x in (1e-3, 0.05)))
    held = [functions.init(generator)]
    advance = train.donated(config, functions)

    def call() -> train.State:
        held[0], _ = advance(held[0], hyper, images, targets)
        return held[0]

    return call


STEPS = {"softmax": "softmax", "auto": "G3B", "auto G=1": "G1B", "naive": "G3B:engine=plain"}


def step_level(args: argparse.Namespace, clock: Clock, progress: Say) -> Rows:
    """The whole training step of ViT-Tiny: loss, gradients, AdamW."""
    progress("training step")
    batch = args.step_batch
    where = batch, args.device, args.precision
    calls = {name: step_call(spec, *where) for name, spec in STEPS.items()}
    if args.device == "cuda":  # on a CPU it saves a few per cent, after a minute of compiling
        for name, step in itertools.product(("softmax", "auto"), ("compiled", "graph")):
            calls[f"{name}, {step}"] = step_call(STEPS[name], *where, step=step)
    yield from beside_softmax("step", batch, interleave(calls, max(3, args.repeats // 3), clock))


def resident_mib(peak: bool) -> float:
    """Resident set of this process in MiB: now, or its peak so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # macOS has the peak alone, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # ru_maxrss would start from what the parent of the process held
    field = "VmHWM:" if peak else "VmRSS:"
    return int(status.split(field)[1].split()[0]) / 1024


def measure_memory(
    operator: str, batch: int, device: str, precision: str, name: str, batching: str = "native"
) -> None:
    """Prints the peak memory of a training step, before and after, as JSON; in a fresh process."""
    torch.set_num_threads(1)
    # a step on a few tokens first: what libraries and engines take when they are loaded is no
    # memory of the model
    op = operators.parse(operator).operator
    inputs = [torch.randn(1, 1, 4, 8, device=device) for _ in range(3)]
    params = tree.to(op.init(torch.Generator(), 1, 4), device)
    gradients(op.attend, (params, *inputs), inputs[0])
    call = step_call(operator, batch, device, precision, name, batching)
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


def peaks(jobs: Sequence[tuple], args: argparse.Namespace, progress: Say) -> Iterator[dict]:
    """Memory of a training step of each job, `(spec, batch, model)` and perhaps how it is batched,
    measured in a process of its own; some at the same time where each counts what it allocates
    itself.
    """

    def one(job: tuple) -> dict[str, float]:
        progress(f"memory, {' '.join(map(str, job))}")
        spec, batch, name, *rest = job
        inner = [spec, str(batch), args.device, args.precision, name, *rest]
        command = [sys.executable, "-m", "kart.analysis.bench", *inner]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"measuring the memory of {name} {spec} failed:\n{result.stderr}")
        return json.loads(result.stdout.splitlines()[-1])

    with ThreadPoolExecutor(4 if args.device == "cuda" else 1) as pool:
        yield from pool.map(one, jobs)


FULL_RANK = {
    "full rank G=10, batch 1": ("G10B:order=full_rank", 1),
    "full rank G=10, batch 8": ("G10B:order=full_rank", 8),
}


def memory_level(args: argparse.Namespace, progress: Say) -> Rows:
    """Peak memory above parameters of a ViT-Tiny training step, each in a process of its own."""
    specs = {name: (spec, args.step_batch) for name, spec in STEPS.items()}
    specs |= {f"{name}, vmap": specs[name] for name in ("softmax", "auto")} | FULL_RANK
    reference = None
    jobs = [
        (spec, batch, "vit_tiny", "vmap" if name.endswith("vmap") else "native")
        for name, (spec, batch) in specs.items()
    ]
    for (name, (_, batch)), found in zip(specs.items(), peaks(jobs, args, progress), strict=True):
        grown = found["peak_mib"] - found["before_mib"]
        reference = reference or grown
        row = {"what": "memory", "variant": name, "batch": batch, **found}
        yield {**row, "grown_mib": grown, "ratio": grown / reference}


def paper_level(args: argparse.Namespace, progress: Say) -> Rows:
    """Peak memory of the nine models of the paper's Table 13 at batch 32, on a GPU as there."""
    jobs = [(spec, 32, name) for name, spec, *_ in cost.PAPER]
    for (name, spec, *_, memory), peak in zip(cost.PAPER, peaks(jobs, args, progress), strict=True):
        row = {"what": "table 13", "variant": f"{name} {spec}", "batch": 32, **peak}
        yield {**row, "paper_gb": memory}


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as text tables."""
    lines = []
    timed = [row for row in rows if "both" in row]
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
    sizes = [row for row in rows if row["what"] == "sizes"]
    if sizes:
        body = [
            [*map(str, row["variant"]), f"{row['ms']:.2f}", f"{row['over']:.2f}"] for row in sizes
        ]
        names = ["G=3, tokens", "width", "rank", "fwd+bwd ms", "of interpolated"]
        worst = max(row["over"] for row in sizes)
        goal = "met" if worst <= 1.5 else "missed"
        lines += ["", tables.table(body, names), f"worst {worst:.2f}, reach 1.5: {goal}"]
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
    nine = [row for row in rows if row["what"] == "table 13"]
    if nine:
        body = [
            [row["variant"], f"{row['peak_mib'] * 2**20 / 1e9:.2f}", f"{row['paper_gb']:.2f}"]
            for row in nine
        ]
        lines += ["", tables.table(body, ["batch 32", "peak GB", "the paper's"])]
    return "\n".join(lines)


def verdict(row: dict[str, Any]) -> str:
    """How far a row is from its goals."""
    reach, then = TARGETS.get((row["what"], row["variant"]), (None, None))
    ratio = _ratio(row)
    if row["variant"] in PEAKS:
        word, limit = PEAKS[row["variant"]]
        met = row["peak_mib"] * 2**20 / 1e6 < limit
        return f"{word} {limit} MB peak: {'met' if met else 'missed'}"
    goals = []
    for word, goal in (("reach", reach), ("then", then)):
        if goal is not None:
            far = "met" if ratio <= goal else f"missed, {ratio / goal:.2f} x of it"
            goals.append(f"{word} {goal}: {far}")
    if "floor" in row and any("missed" in goal for goal in goals):
        goals.append(f"products alone {ratio * row['floor']:.2f}")
    return "; ".join(goals)


def _ratio(row: dict[str, Any]) -> float:
    return row["ratio"] if row["what"] == "memory" else row["both"]["ratio"]


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A bar for each row, a little room between one setting and the next."""
    places, place, before = [], 0.0, None
    for row in rows:
        place += 1.0 if before in (None, row["what"]) else 1.5
        places.append(place)
        before = row["what"]
    kinds = ["#b3533b" if row["variant"] == "naive" else "#2f6f8f" for row in rows]
    values = [_ratio(row) for row in rows]
    axes.barh(places, [value - 1 for value in values], left=1, color=kinds)
    axes.set_yticks(places, [f"{row['what']}, {row['variant']}" for row in rows], fontsize=8)
    axes.set_ylim(place + 0.8, 0.2)
    axes.axvline(1.0, color="0.2", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    for value, y in zip(values, places, strict=True):
        axes.text(max(value, 1) * 1.02, y, f"{value:.2f}", va="center", fontsize=8)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios to softmax."""
    from matplotlib.figure import Figure

    chosen = [
        row
        for row in rows
        if row["what"] not in ("table 13", "sizes")
        and row["variant"] not in ("softmax", *FULL_RANK)
    ]
    # two columns of settings, cut where one begins
    half = next(
        (
            i
            for i in range(len(chosen) // 2, len(chosen))
            if chosen[i - 1]["what"] != chosen[i]["what"]
        ),
        len(chosen),
    )
    columns = [part for part in (chosen[:half], chosen[half:]) if part]
    most = 1.5 * max(map(_ratio, chosen))
    least = min(0.7, *map(_ratio, chosen))
    figure = Figure(figsize=(7 * len(columns), 0.24 * half + 1), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        _bars(axes, part)
        axes.set_xscale("log")
        axes.set_xlim(least, most)
        ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if least <= x <= most]
        axes.set_xticks(ticks, [f"{x:g} x" for x in ticks])
        axes.minorticks_off()
    figure.supxlabel(
        "time or memory, forward + backward, as a ratio to softmax attention", fontsize=10
    )
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    """Measures and prints the tables; `args` are the flags of `kart bench`."""
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("`--device cuda` needs a GPU, and torch sees none. Leave it out.")
    args.precision = args.precision or ("bfloat16" if on_gpu else "float32")
    args.op_batch = args.op_batch or (128 if on_gpu else 8)
    args.step_batch = args.step_batch or (128 if on_gpu else 8)
    torch.set_num_threads(1)
    clock = Clock(args.device)
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, one thread"
    about = {
        "machine": machine,
        "precision": args.precision,
        "sdpa_backend": sdpa_backend(args.device, getattr(torch, args.precision), 197),
        "engines": kernels.engines(),
        "versions": checkpoint.versions(),
    }
    path = Path(args.out)
    if path.suffix == ".png":
        raise ValueError(
            f"`--out` needs a name that does not end in .png, that of the plot beside it, got "
            f"{args.out!r}. Name it .json."
        )
    plotted = path.with_suffix(".png")
    checkpoint.check_replaced("bench", path, lambda found: {"about", "rows"} <= {*found}, plotted)
    began = time.monotonic()

    def progress(what: str) -> None:
        if not args.quiet:
            print(f"{time.monotonic() - began:5.0f} s  {what}", file=sys.stderr, flush=True)

    if on_gpu:
        progress("building kernels")
        with processes() as pool:
            list(pool.map(build, settings_of(args), itertools.repeat(args)))
    levels = [operator_level(args, clock, progress)]
    if not args.quick:
        if args.sizes > 0:
            levels.append(size_level(args, clock, progress))
        levels += [level(args, clock, progress) for level in (cache_level, block_level, step_level)]
        levels.append(memory_level(args, progress))
        if on_gpu:
            levels.append(paper_level(args, progress))
    rows: list[dict[str, Any]] = []
    for row in itertools.chain(*levels):
        rows.append(row)
        # what has been measured survives whatever comes
        checkpoint.write_json(path, {"about": about, "rows": rows})
    print(show(rows))
    if not args.quick:
        print("\n" + cost.paper_table())
    print(f"\n{machine}, {args.precision}, torch {torch.__version__}")
    print(f"SDPA backend: {about['sdpa_backend']}")
    plot(rows, plotted)
    print(f"written to {path} and {plotted}")


if __name__ == "__main__":
    spec, batch, *rest = sys.argv[1:]
    measure_memory(spec, int(batch), *rest)
