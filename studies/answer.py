"""Is learnable attention better than softmax, and which part of it: a table over sizes and data.

    python -m studies.answer plan                                       # what there is to train
    python -m studies.answer work --data uoft-cs/cifar10 --out runs/answer --minutes 30
    python -m studies.answer report --out runs/answer                   # answer.html, answer.csv

Factors: what mixes the tokens (`ARMS`), in `CELLS` that change one thing each (width, depth,
training images, epochs, patches) from a common centre. Every arm has the same tuning budget: in the
centre, the learning rates in `RATES`, one seed each, chosen by validation. Then fresh seeds are
trained at that rate in every cell and scored once on the test split; nothing is chosen by the test
split. First every arm gets `SEEDS` seeds; then, while there is time, the arms whose interval
against softmax holds 0 get more, up to `MOST_SEEDS`.

Work is cut into units of seconds to minutes, each a file below `--out` that is written whole or not
at all: it can be killed and started again, and any number of processes may share the directory.
"""

import argparse
import dataclasses
import fcntl
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kart import checkpoint, data, tables, train
from kart.train import Config

RATES = (5e-4, 1e-3, 2e-3)
TUNING_SEED = 1000
SEEDS, MOST_SEEDS = 3, 8

CENTRE = Config(
    train_limit=8000,
    augment="flip_crop",
    model="vit_nano",
    image_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    epochs=10,
    threads=1,
)

# one factor at a time
CENTRE_CELL = "centre"
CELLS: dict[str, dict[str, Any]] = {
    CENTRE_CELL: {},
    "width 32": {"embed_dim": 32},
    "2,000 images": {"train_limit": 2000},
    "width 128": {"embed_dim": 128},
    "20,000 images": {"train_limit": 20000},
    "depth 4": {"depth": 4},
    "30 epochs": {"epochs": 30},
    "patch 4": {"patch_size": 4},
}


class Arm(NamedTuple):
    """What mixes the tokens: fields of Config, and what it sees of the scores."""

    fields: Mapping[str, Any]
    sees: str


# (K + 1) r is 84 for every low-rank arm: K parameters a unit and one of the mix; tables have fewer
ARMS: dict[str, Arm] = {
    "softmax": Arm({"operator": "softmax"}, "exp"),
    "relative": Arm({"operator": "relative"}, "nothing"),
    "softmax + relative": Arm({"operator": "relative", "base": "softmax"}, "exp"),
    "softmax(S + relative)": Arm({"operator": "relative:inside=true"}, "exp"),
    "static": Arm({"operator": "static"}, "nothing"),
    "polynomial-0": Arm({"operator": "polynomial-0B", "rank": 42}, "nothing"),
    "polynomial-1": Arm({"operator": "polynomial-1B", "rank": 28}, "an affine function"),
    "G1": Arm({"operator": "G1B", "rank": 28}, "a learned function"),
    "G3": Arm({"operator": "G3B", "rank": 12}, "a learned function"),
    "softmax + polynomial-0": Arm(
        {"operator": "polynomial-0B", "rank": 42, "base": "softmax"}, "exp"
    ),
    "softmax + polynomial-1": Arm(
        {"operator": "polynomial-1B", "rank": 28, "base": "softmax"}, "exp and an affine function"
    ),
    "softmax + G1": Arm(
        {"operator": "G1B", "rank": 28, "base": "softmax"}, "exp and a learned function"
    ),
    "softmax + G3": Arm(
        {"operator": "G3B", "rank": 12, "base": "softmax"}, "exp and a learned function"
    ),
}


class Unit(NamedTuple):
    """A piece of work: one arm in one cell at one rate, trained with a seed."""

    cell: str
    arm: str
    rate: float
    seed: int

    @property
    def tuning(self) -> bool:
        """Whether it chooses the rate: such a unit never reads the test split."""
        return self.seed == TUNING_SEED

    def path(self, out: Path) -> Path:
        """Its file; units of the same name are the same work."""
        return (
            out / _name(self.cell) / _name(self.arm) / f"rate-{self.rate:g}-seed-{self.seed}.json"
        )

    def config(self, source: str) -> Config:
        """What is trained."""
        fields = {**CELLS[self.cell], **ARMS[self.arm].fields}
        return dataclasses.replace(
            CENTRE, data=source, learning_rate=self.rate, seed=self.seed, **fields
        )


def _name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-+" else "-" for c in text)


def read(out: Path) -> list[dict[str, Any]]:
    """The finished units below `out`."""
    found = []
    for path in sorted(out.glob("*/*/rate-*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`answer` needs whole records, got a damaged {str(path)!r} ({error}). Remove it: "
                "`work` trains that unit again."
            ) from None
    return found


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each arm whose tuning is finished: highest validation top-1, the lower rate where
    two are equal.
    """
    scores: dict[str, dict[float, float]] = {}
    for one in records:
        if one["tuning"]:
            scores.setdefault(one["arm"], {})[one["rate"]] = one["val_top1"]
    return {
        arm: max(sorted(own), key=lambda rate, own=own: own[rate])
        for arm, own in scores.items()
        if len(own) == len(RATES)
    }


def tested(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """Test top-1 by seed of each (cell, arm); a diverged seed counts with what it scored."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for one in records:
        if not one["tuning"]:
            found.setdefault((one["cell"], one["arm"]), {})[one["seed"]] = one["test_top1"]
    return found


def planned(records: Sequence[Mapping[str, Any]], cells: Sequence[str]) -> Iterator[Unit]:
    """What is left to do and can be done now, in order: the tuning of an arm and its first seeds,
    cell by cell, then more seeds where the interval of the difference to softmax holds 0.
    """
    rates, scores = best_rates(records), tested(records)
    done = {(one["arm"], one["rate"]) for one in records if one["tuning"]}
    for arm, rate in itertools.product(ARMS, RATES):
        if (arm, rate) not in done:
            yield Unit(CENTRE_CELL, arm, rate, TUNING_SEED)
    for cell, arm, seed in itertools.product(cells, ARMS, range(SEEDS)):
        if arm in rates and seed not in scores.get((cell, arm), {}):
            yield Unit(cell, arm, rates[arm], seed)
    for n, cell in itertools.product(range(SEEDS, MOST_SEEDS), cells):
        open_arms = [arm for arm in ARMS if undecided(scores, cell, arm, n)]
        # pairs need the same seeds of softmax
        for arm in ["softmax", *open_arms] if open_arms else []:
            if len(scores.get((cell, arm), {})) == n:
                yield Unit(cell, arm, rates[arm], n)


def undecided(
    scores: Mapping[tuple[str, str], Mapping[int, float]], cell: str, arm: str, n: int
) -> bool:
    """Whether an arm with `n` seeds may be better or worse than softmax in `cell`."""
    from kart import search

    own, base = scores.get((cell, arm), {}), scores.get((cell, "softmax"), {})
    pairs = sorted(set(own) & set(base))
    if arm == "softmax" or len(own) != n or len(pairs) < 2:
        return False
    _, low, high = search.interval([own[seed] - base[seed] for seed in pairs])
    return low < 0 < high


def execute(unit: Unit, source: str) -> dict[str, Any]:
    """Trains a unit and scores it; the test split is read for fresh seeds alone."""
    config = unit.config(source)
    splits = train.load_data(config)
    model = train.build(config, splits.train)
    began, spent = time.perf_counter(), time.process_time()
    last = list(train.fit(config, splits))[-1]
    scores = {name: last[name] for name in ("val_top1", "val_loss", "train_loss", "diverged")}
    if not unit.tuning:
        weights = train.weights_for_evaluation(last["state"])
        found = train.evaluate(model.apply, weights, data.load(source, "test"), config)
        scores |= {f"test_{name}": float(value) for name, value in found.items()}
    return {
        **unit._asdict(),
        **scores,
        "tuning": unit.tuning,
        "config": config.asdict(),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - spent, 2),
        "versions": checkpoint.versions(),
    }


def work(source: str, out: Path, minutes: float, cells: Sequence[str]) -> int:
    """Does units until none is left or the time is up; returns how many it did."""
    torch.set_num_threads(1)
    until, count = time.monotonic() + 60 * minutes, 0
    busy: set[Path] = set()  # claimed by other processes when last seen
    with tables.bar(desc="answer", unit="unit") as bar:
        while time.monotonic() < until:
            todo = [unit for unit in planned(read(out), cells) if unit.path(out) not in busy]
            if not todo:
                break
            unit = todo[0]
            path = unit.path(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    busy.add(path)
                    continue
                if not path.exists():
                    bar.set_postfix_str(f"{unit.cell}, {unit.arm}, {unit.rate:g}, {unit.seed}")
                    record = execute(unit, source)
                    checkpoint.write_text(path, json.dumps(record, indent=1) + "\n")
                    count += 1
                    bar.update(1)
                path.with_suffix(".lock").unlink(missing_ok=True)
            busy.clear()
    return count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("what", choices=["plan", "work"])
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/answer"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    args = parser.parse_args(argv)
    if args.what == "plan":
        units = list(planned(read(args.out), args.cells))
        for unit in units:
            print(unit.path(args.out))
        print(f"{len(units)} units known to be left")
        return 0
    print(f"{work(args.data, args.out, args.minutes, args.cells)} units done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
