"""What a run owns of its data: classes, statistics, sizes and fingerprints, so that it can be told
whether data are its own, and be used without them.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from kart import data, train
from kart.data import Dataset, finding
from kart.train import Config, Splits


def facts(splits: Splits) -> dict[str, Any]:
    """The facts of `splits` that a run stores, as JSON has them."""
    first = splits.train
    return {
        "name": first.name,
        "classes": list(first.classes),
        "image": list(first.images.shape[1:]),  # channels, height, width
        "mean": [float(x) for x in first.mean],
        "std": [float(x) for x in first.std],
        "counts": {"train": len(first.labels), "val": len(splits.val.labels)},
        "fingerprint": {"train": first.fingerprint, "val": splits.val.fingerprint},
    }


def differences(own: dict[str, Any], now: dict[str, Any]) -> str:
    """How the facts `now` differ from those of a run, in words; empty where they do not."""
    told = []
    for name in ("classes", "image", "mean", "std", "counts", "fingerprint"):
        if own[name] == now[name]:
            continue
        if name == "classes":
            gone = [one for one in own[name] if one not in now[name]]
            new = [one for one in now[name] if one not in own[name]]
            what = f"without {gone[:5]}, with {new[:5]}" if gone or new else "in another order"
            told.append(f"classes {what}")
        elif name == "fingerprint":
            told.append("other images or labels")
        else:
            told.append(f"{name} {own[name]} there, {now[name]} now")
    return "; ".join(told)


def check(where: str, own: dict[str, Any], splits: Splits) -> None:
    """Raises ValueError, naming what differs, unless `splits` are the data of the run `where`."""
    told = differences(own, facts(splits))
    if told:
        raise ValueError(
            f"`data` needs to be what {where!r} was trained on, got others ({told}). Put them "
            "back, or name where they are now with `--data`."
        )


def place(where: str, own: dict[str, Any], named: str, given: str | None) -> str:
    """Where the data of a run are now: what is `given`, else what the run `named`.

    Raises ValueError for a directory that is not there: its name is no public one to ask for.
    """
    if given is not None:
        return given
    public = named.partition("?")[0]
    # of a public set the name is the whole of what was asked for, of a directory its last part
    known = own["name"] == public and "/" in public
    known = known or public in data.SHORT or public in finding.BUILT_IN
    here = any(Path(os.path.expanduser(one)).is_dir() for one in (named, public))
    if not known and not here:
        raise ValueError(
            f"`data` needs the directory {named!r} that {where!r} was trained on, which is not "
            "here. Say where it is now with `--data`, or start this where it was trained."
        )
    return named


def empty(own: dict[str, Any]) -> Dataset:
    """A data set of no images with the run's classes and statistics, to build its model of."""
    return Dataset(
        np.zeros((0, *own["image"]), np.uint8),
        np.zeros(0, np.int64),
        tuple(own["classes"]),
        own["name"],
        tuple(own["mean"]),
        tuple(own["std"]),
    )


def load(where: str, own: dict[str, Any], config: Config) -> Splits:
    """Training and validation data of a run, after a check that they are its own."""
    # of others there may be fewer than the run took
    every = train.load_data(dataclasses.replace(config, train_limit=None))
    splits = every._replace(train=every.train.part(slice(config.train_limit)))
    check(where, own, splits)
    return splits


def load_split(where: str, own: dict[str, Any], config: Config, split: str) -> Dataset:
    """One split of a run's data, with its classes and statistics, after the check of the others."""
    splits = load(where, own, config)
    if split != "test":
        return getattr(splits, split)
    test = data.load(config.data, "test", image_size=config.decode_size, stream=config.stream)
    for name, value in (("classes", test.classes), ("image", test.images.shape[1:])):
        if list(value) != own[name]:
            raise ValueError(
                f"`data` needs a test split with the {name} of {where!r}, {own[name]}, got "
                f"{list(value)}. Put the data back that it was trained on."
            )
    return test._replace(mean=tuple(own["mean"]), std=tuple(own["std"]))
