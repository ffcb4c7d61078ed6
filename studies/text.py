"""Do operators that do not know the length hold on text, and on text longer than they trained on?

    python -m studies.text --out runs/text [--seeds 3] [--minutes 25]

A causal language model of characters, on the help topics that ship with Python
(`pydoc_data.topics`, 465,000 characters under the PSF licence), the last tenth held out. Windows of
16 to 64 characters are mixed in training; evaluated at 64, and at 128 and 256, which no training
window had. The model has no positions of its own: what a token knows of order is the causal mask's
and its operator's. Arms differ in the operator alone; all start from the same backbone and see the
same windows, by seed. `by_distance` alone and `polynomial-0` are controls that ignore the scores.
`results.jsonl` keeps what is done: the same command goes on from there. Expected (n = 3, twenty
minutes on one core): at 64 characters 2.922 [2.872, 2.973] bits a character with a function of the
distance inside softmax, 3.305 [3.270, 3.340] with softmax.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from kart import layers, nn, operators, optim, schema, statistics, tables, tree
from kart.commands.command import integer, number, standalone
from kart.models import blocks
from kart.operators import Operator

Params = dict[str, Any]

# specs; "+" would be heads that differ, so what stands beside softmax says so by `base`
DISTANCE = "order=by_distance,reach=64"
GENERATED = "order=generated,rank=8,features=16,reach=64,normalise=count"
ARMS = {
    "softmax": "softmax",
    "softmax, distance inside": f"bspline-8:{DISTANCE},inside=true",
    "softmax + distance": f"bspline-8:{DISTANCE},normalise=count,base=softmax",
    "distance alone (control)": f"bspline-8:{DISTANCE},normalise=count",
    "elementwise": "G3:order=elementwise,normalise=count",
    "softmax(S + phi(S))": "G3:order=elementwise,inside=true",
    "softmax + elementwise": "G3:order=elementwise,normalise=count,base=softmax",
    "softmax + generated G3": f"G3:{GENERATED},base=softmax",
    "generated polynomial-0 (control)": f"polynomial-0:{GENERATED}",
}
LENGTHS = (64, 128, 256)
RECORD = ("arm", "seed", "bits", "seconds", "parameters")  # beside the settings


# --- the text -------------------------------------------------------------------------------------


def read_text() -> tuple[Tensor, Tensor, int]:
    """Training and held-out characters as numbers, and how many kinds there are."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    kinds = {kind: i for i, kind in enumerate(sorted(set(text)))}
    codes = torch.tensor([kinds[kind] for kind in text])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:], len(kinds)


def windows(codes: Tensor, starts: Tensor, length: int) -> Tensor:
    """`(B, length + 1)`: what is read, and one character on, what is to be guessed."""
    return codes[starts[:, None] + torch.arange(length + 1)]


# --- the model ------------------------------------------------------------------------------------


def init(generator: Generator, op: Operator, kinds: int, args: argparse.Namespace) -> Params:
    """Parameters; the operators' last, so that the backbone is the same for all of them."""
    size = args.width
    params: Params = {
        "embed": layers.truncated_normal(generator, kinds, size, std=0.1),
        "norm": layers.layer_norm_init(size),
        "blocks": {
            str(i): blocks.block_init(generator, size, 4 * size, blocks.attention_init)
            for i in range(args.depth)
        },
    }
    for block in params["blocks"].values():
        block["operator"] = op.init(generator, args.heads, max(args.lengths))
    return params


def apply(op: Operator, heads: int, params: Params, codes: Tensor) -> Tensor:
    """Characters `(B, N)` to the logits `(B, N, C)` of the next ones."""
    x, mask = params["embed"][codes], nn.causal_mask(codes.shape[-1], codes.shape[-1])
    for block in params["blocks"].values():
        attend = functools.partial(op.attend, block["operator"])
        attn = functools.partial(blocks.attention, heads=heads, attend=attend, mask=mask)
        x = blocks.block(block, x, attn, x.dtype)
    # the embedding is the head, too
    return layers.layer_norm(params["norm"], x) @ params["embed"].mT


def loss(op: Operator, heads: int, params: Params, window: Tensor) -> Tensor:
    """Bits a character, `()`."""
    logits = apply(op, heads, params, window[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) / math.log(2)


# --- one run --------------------------------------------------------------------------------------


def train(op: Operator, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one seed; bits a character on the held-out text, by length."""
    training, held_out, kinds = read_text()
    params = init(Generator().manual_seed(seed), op, kinds, args)
    rate = optim.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    descent = optim.adamw(rate, weight_decay=0.05, max_norm=1.0)
    state, began = descent.init(params), time.process_time()
    draw = Generator().manual_seed(1000 + seed)
    gradient = torch.func.grad(lambda params, window: loss(op, args.heads, params, window))
    for _ in range(args.steps):
        length = args.lengths[int(torch.randint(len(args.lengths), (), generator=draw))]
        # as many characters a step, whatever the length
        count = max(1, args.batch * max(args.lengths) // length)
        starts = torch.randint(len(training) - length, (count,), generator=draw)
        updates, state = descent.update(
            gradient(params, windows(training, starts, length)), state, params
        )
        params = optim.apply_updates(params, updates)
    seconds = time.process_time() - began
    bits = {}
    for length in args.evaluate:
        # windows side by side: the same characters at every length, but for the end
        starts = torch.arange(0, min(len(held_out) - length - 1, args.held_out), length)
        parts = windows(held_out, starts, length).split(max(1, 4096 // length))
        with torch.no_grad():
            total = sum(float(loss(op, args.heads, params, part)) * len(part) for part in parts)
        bits[str(length)] = total / len(starts)
    return {"bits": bits, "seconds": seconds, "parameters": tree.size(params)}


# --- the study ------------------------------------------------------------------------------------


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """What is done, by arm and seed; raises ValueError where it was done otherwise."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    text = path.read_text(errors="replace") if path.exists() else ""
    for place, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            record = None
        if record is None:
            raise ValueError(
                f"`text` needs whole lines in {path}, got line {place} that is cut off. Remove "
                "it: what it was to hold is trained again."
            )
        if not isinstance(record, dict) or not {*RECORD, "settings"} <= record.keys():
            raise ValueError(
                f"`text` needs what it wrote itself in {path}, got line {place}, {line!r:.80}. "
                "Choose another --out."
            )
        if record["settings"] != settings:
            raise ValueError(
                f"`text` needs the settings of {path}, {record['settings']}, got {settings}. "
                "Choose another --out."
            )
        found.setdefault(record["arm"], {})[record["seed"]] = record
    return found


def show(found: dict[str, dict[int, dict[str, Any]]], lengths: Sequence[int]) -> str:
    """Bits a character by arm and length, with 95 % intervals over seeds."""
    rows, told = [], []
    for arm in ARMS:
        records = list(found.get(arm, {}).values())
        fine = [r for r in records if not _diverged(r)]
        if records:
            cells = [
                statistics.interval([r["bits"][str(n)] for r in fine], low=0.0).text(1.0, 3)
                if fine
                else ""
                for n in lengths
            ]
            seconds = sum(r["seconds"] for r in records) / len(records)
            rows.append(
                [arm, str(len(fine)), str(records[0]["parameters"]), *cells, f"{seconds:.0f}"]
            )
            told += [
                f"{arm}, seed {r['seed']}, diverged: left out" for r in records if r not in fine
            ]
    header = ["bits a character", "n", "parameters", *(f"{n} characters" for n in lengths), "CPU s"]
    return "\n".join([tables.table(rows, header), *told])


def _diverged(record: dict[str, Any]) -> bool:
    # what is not finite stands as null in a file
    return any(bits is None or not math.isfinite(bits) for bits in record["bits"].values())


def main(argv: Sequence[str] | None = None) -> int:
    """Trains seed by seed, all arms of one before the next, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seeds", type=integer(1), default=3)
    parser.add_argument(
        "--minutes", type=number(0), default=math.inf, help="start no run after these"
    )
    parser.add_argument("--arms", default=None, help=f"separated by ;, of {'; '.join(ARMS)}")
    parser.add_argument("--steps", type=integer(1), default=600)
    parser.add_argument("--batch", type=integer(1), default=16, help="windows of the longest (16)")
    parser.add_argument("--width", type=integer(1), default=64)
    parser.add_argument("--depth", type=integer(1), default=2)
    parser.add_argument("--heads", type=integer(1), default=4)
    parser.add_argument("--learning-rate", type=number(0), default=3e-3)
    parser.add_argument("--lengths", type=integer(1), nargs="+", default=[16, 32, 48, 64])
    parser.add_argument("--evaluate", type=integer(1), nargs="+", default=list(LENGTHS))
    parser.add_argument("--held-out", type=integer(1), default=20000, help="characters (20000)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    given = vars(args)
    settings = {k: v for k, v in given.items() if k not in ("out", "seeds", "minutes", "arms")}
    arms = list(ARMS) if args.arms is None else [arm.strip() for arm in args.arms.split(";")]
    path, began = Path(args.out) / "results.jsonl", time.monotonic()
    try:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"`text` needs `--arms` in {list(ARMS)}, got {unknown}. Choose those.")
        if args.width % args.heads:
            raise ValueError(
                f"`text` needs `--width` in as many equal parts as `--heads`, got {args.width} "
                f"and {args.heads}. Change one of them."
            )
        longest, held_out = max([*args.lengths, *args.evaluate]), len(read_text()[1])
        if longest + 1 >= held_out:
            raise ValueError(
                f"`text` needs windows shorter than the {held_out} characters that are held out, "
                f"got {longest}. Choose shorter ones."
            )
        found = read_results(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for seed in range(args.seeds):
        for arm in arms:
            if seed in found.get(arm, {}) or time.monotonic() - began > 60 * args.minutes:
                continue
            record = train(operators.parse(ARMS[arm]).operator, seed, args)
            record = {"arm": arm, "seed": seed, **record, "settings": settings}
            found.setdefault(arm, {})[seed] = record
            with path.open("a") as file:
                file.write(schema.dumps(record) + "\n")
            bits = ", ".join(f"{n}: {b:.3f}" for n, b in record["bits"].items())
            print(f"{arm}, seed {seed}: {bits} ({record['seconds']:.0f} s)", flush=True)
    print(show(found, args.evaluate))
    return 0


if __name__ == "__main__":
    standalone(main)
