"""The records of a run directory: metrics by epoch, scores of `kart eval`."""

import json
import math
import os
from pathlib import Path
from typing import Any

import kart
from kart import checkpoint, schema
from kart.data import Dataset
from kart.runs import identity
from kart.runs.identity import Identity
from kart.train import Record

# what every record says of where it belongs, beside what it records
OWNER = "run"
# the last good weights of a run of which no member was left
DIVERGED = "diverged.safetensors"


def line(run: str, record: Record) -> str:
    """A record as it stands in metrics.jsonl."""
    return schema.dumps({OWNER: run, **record}) + "\n"


def _number(value: Any) -> Any:
    """A value of a record as it was before it was written: null is no number."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    return math.nan if value is None else value


def by_member(value: Any) -> list[Any]:
    """A value of a record for each member; a run of one has the value itself.

    >>> by_member(0.5), by_member([0.5, 0.25])
    ([0.5], [0.5, 0.25])
    """
    return value if isinstance(value, list) else [value]


def read_metrics(directory: str | os.PathLike) -> list[Record]:
    """The records of a run directory so far; a last line that a kill cut short is left out.

    Raises ValueError for a damaged line in the middle, an epoch that is missing, or records of
    another run.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    own = identity.read(directory).id
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            if number == len(lines):
                break  # cut by a kill: nothing is written after such a line
            raise _damaged(path, f"line {number} is damaged") from None
        identity.check_owner(path, found, own)
        if found.get("epoch") != number:
            raise _damaged(path, f"line {number} is of epoch {found.get('epoch')}")
        records.append({name: _number(value) for name, value in found.items() if name != OWNER})
    return records


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"`run` needs a whole metrics.jsonl, one line an epoch, got {str(path)!r} where {what}. "
        "Put the right file back, or train into a new directory."
    )


def check_finished(directory: Path, records: list[Record]) -> None:
    """Raises ValueError unless `records` are those of a run that has come to its end."""
    epochs = identity.read(directory).configs[0].epochs
    if len(records) < epochs:
        for seed, step in diverged(directory).items():
            raise ValueError(
                f"`run` needs finished runs, got {str(directory)!r}, which diverged: seed {seed} "
                f"at step {step}. Train it into a new directory with a lower learning rate."
            )
        raise ValueError(
            f"`run` needs finished runs, got {str(directory)!r} after epoch {len(records)} of "
            f"{epochs}. Train it further with the same command."
        )


def diverged(directory: str | os.PathLike) -> dict[int, int]:
    """The seeds of a run directory that diverged, each with the step at which it has stood still
    since: those that did while others went on, or all, which ends a run.
    """
    own = identity.read(directory)
    seeds = [config.seed for config in own.configs]
    found = read_metrics(directory)
    last, path = found[-1:], Path(directory) / DIVERGED
    steps = by_member(last[0]["diverged"]) if last else []
    # one that was trained to its end after all has left the file behind
    if len(found) < own.configs[0].epochs and path.exists():
        about = checkpoint.describe(path)["config"]
        identity.check_owner(path, about, own.id)
        steps = by_member(about["diverged"])
    return {seed: step for seed, step in zip(seeds, steps, strict=False) if step >= 0}


def _scores_path(directory: Path, split: str, which: str) -> Path:
    return directory / f"eval-{split}-{which}.json"


def _scored(directory: Path, own: Identity, split: str, which: str) -> dict[str, Any]:
    """What scores say of the run that they are of, and of what was scored."""
    return {
        "step": read_metrics(directory)[-1]["step"],
        "data": own.data["fingerprint"],
        "kart": kart.__version__,
        "split": split,
        "checkpoint": which,
    }


def write_scores(
    directory: Path, split: str, which: str, scores: list[dict[str, float]], dataset: Dataset
) -> None:
    """Stores what `kart eval` found of the members of a finished run on a split of its data."""
    own = identity.read(directory)
    report = {
        OWNER: own.id,
        **_scored(directory, own, split, which),
        "images": len(dataset.labels),
        "fingerprint": dataset.fingerprint,
        "members": scores,
        "versions": checkpoint.versions(),
    }
    checkpoint.write_json(_scores_path(directory, split, which), report)


def read_scores(directory: Path, split: str, which: str) -> dict[str, Any] | None:
    """What `write_scores` stored, None where it has not.

    Raises ValueError for scores of another run, other data, an earlier step or version.
    """
    path = _scores_path(directory, split, which)
    if not path.exists():
        return None
    own = identity.read(directory)
    again = f"Run `kart eval {directory}` again."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        identity.check_owner(path, found, own.id)
        members, images = found["members"], found["images"]
        seeds = [member["seed"] for member in members]
        for member in members:
            member["loss"] = _number(member["loss"])
        numbers = [member[name] for member in members for name in ("top1", "top5", "loss")]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`run` needs whole scores, got a damaged {str(path)!r} ({error}). {again}"
        ) from None
    for name, value in _scored(directory, own, split, which).items():
        if found.get(name) != value:
            raise ValueError(
                f"`run` needs scores of its own, got {str(path)!r} with {name} "
                f"{found.get(name)!r}, not {value!r}. {again}"
            )
    is_count = schema.fits(images, int) and images > 0
    fits = all(schema.fits(number, float) for number in numbers)
    if seeds != [c.seed for c in own.configs] or not is_count or not fits:
        raise ValueError(f"`run` needs scores of its members, got a damaged {str(path)!r}. {again}")
    return found
