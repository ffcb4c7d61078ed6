"""Which name means which split, and the fixed cuts of a source that lacks some."""

import math
import re
from collections.abc import Collection, Iterable

import numpy as np

_SPLIT_SEED = 1905  # fixes the shuffle behind every split, never a user's choice
# the one table, for folders, parquet files and splits of public sets alike; compared in lower case
_WORDS = {
    "train": r"train[\W_]*val(?:idation)?|training|train|trn",
    "val": r"validation|validate|valid|val|development|devel|dev",
    "test": r"testing|test|tst",
    # held out, without saying for which of the two ends
    "held": r"evaluation|eval|hold[\W_]*out|held[\W_]*out",
    # no labels, or none that a split is made of
    "other": r"predictions?|predict|pred|unlabell?ed|unsupervised|unsup|extra",
}
# what may stand around such a word without changing its meaning: "train_images", "valset2017"
_FILL = (
    r"(?:datasets?|subset|split|sets?|data|images?|imgs?|pictures?|pics?|photos?|samples?|"
    r"examples?|files?|folder|directory|dir|part|\d+|[\W_]+)*"
)
_ANY = "|".join(f"(?P<{role}>{words})" for role, words in _WORDS.items())
_PLAIN = re.compile(f"{_FILL}(?:{_ANY}){_FILL}")
_APART = re.compile(rf"(?P<before>(?:.*[\W_])?)(?:{_ANY})(?P<after>(?:[\W_\d].*)?)")
# inside of a longer word: "trainA", "mytestingset"
_GLUED = re.compile(
    r"(?P<before>.*?)(?:(?P<train>training|train)|(?P<val>validation|valid|val)|"
    r"(?P<test>testing|test))(?P<after>.*)"
)
# the number of a shard behind the name of a file, as in `train-00000-of-00005`
SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+(?:-[0-9a-f]+)?$")


def role(name: str) -> str | None:
    """What a name says by itself: "train", "val", "test", "held", "other", or None.

    >>> [role(name) for name in ("Train", "valset2017", "test_images", "holdout", "train_station")]
    ['train', 'val', 'test', 'held', None]
    """
    match = _PLAIN.fullmatch(name.casefold())
    return match.lastgroup if match else None


def roles(names: Iterable[str]) -> dict[str, str]:
    """The role of each name that has one, by itself or beside the others.

    What stands around two roles does not matter if it is the same: `seg_train` and `seg_test`,
    `trainA` and `testA` are splits, `train_station` and `test_tube` are not.

    >>> roles(["seg_train", "seg_test", "seg_pred", "bus"])
    {'seg_train': 'train', 'seg_test': 'test', 'seg_pred': 'other'}
    """
    names = list(names)
    found = {name: known for name in names if (known := role(name))}
    for pattern in (_APART, _GLUED):
        around: dict[tuple[str, str], dict[str, str]] = {}
        for name in names:
            if name not in found and (match := pattern.fullmatch(name.casefold())):
                rest = (match["before"], match["after"])
                told = next(
                    known for known, word in match.groupdict().items() if word and known in _WORDS
                )
                around.setdefault(rest, {})[name] = told
        for group in around.values():
            if "train" in group.values() and len(set(group.values())) > 1:
                found |= group
    return {name: found[name] for name in names if name in found}


def fills(name: str) -> bool:
    """Whether a name says nothing, like "images" or "data"."""
    return re.fullmatch(_FILL, name.casefold()) is not None and not name.isdigit()


def resolve(found: dict[str, str], where: str) -> dict[str, str]:
    """`{"train": name, ...}` of names and their roles; one name a split, or a ValueError.

    A lone split is the training split, a lone held-out split the test split, and a name such as
    `eval` takes the place that is free, test first.
    """
    by_role: dict[str, list[str]] = {}
    for name, known in found.items():
        by_role.setdefault(known, []).append(name)
    by_role.pop("other", None)
    held = by_role.pop("held", [])
    for known, names in by_role.items():
        if len(names) > 1:
            raise ValueError(
                f"`load` needs one {known!r} split in {where!r}, got {sorted(names)}. "
                "Put them together, or rename or move away all but one."
            )
    own = {known: names[0] for known, names in by_role.items()}
    if len(held) > 1 or (held and {"val", "test"} <= own.keys()):
        names = sorted([*held, *(own[known] for known in ("val", "test") if known in own)])
        raise ValueError(
            f"`load` cannot tell the validation from the test split among {names} in {where!r}. "
            "Rename them to 'val' and 'test', and move others away."
        )
    if held:
        own["val" if "test" in own else "test"] = held[0]
    if len(own) == 1:
        own = {"train": next(iter(own.values()))}
    if "train" not in own:
        raise ValueError(
            f"`load` needs a split named 'train' in {where!r}, got {sorted(own.values())}. "
            "Rename the training split, or name one split's own directory to cut it in three."
        )
    if "test" not in own and "val" in own:
        own["test"] = own.pop("val")
    return {split: own[split] for split in ("train", "val", "test") if split in own}


def cuts(own: Collection[str]) -> dict[str, float]:
    """The fractions of the training images that become the splits a source does not have."""
    if "val" in own:
        return {}
    return {"val": 0.1} if "test" in own else {"test": 0.2, "val": 0.2}


def partition(labels: np.ndarray, held: dict[str, float]) -> dict[str, np.ndarray]:
    """Disjoint indices of "train" and of each fraction in `held`, stratified, in shuffled order."""
    n = len(labels)
    counts = {split: math.ceil(fraction * n) for split, fraction in held.items()}
    if n <= sum(counts.values()):
        raise ValueError(
            f"`load` needs more than {sum(counts.values())} training images to cut the splits "
            f"{sorted(counts)} out of them, got {n}. Add images."
        )
    # NumPy guarantees the raw stream of a bit generator for all versions, `permutation` it does not
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(n), kind="stable")
    rest = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    owner = np.full(n, "train", dtype="<U5")
    for split, count in counts.items():
        # evenly spaced over the classes: each gets its share, to within one image
        places = (2 * np.arange(count) + 1) * len(rest) // (2 * count)
        owner[rest[places]] = split
        rest = np.delete(rest, places)
    return {split: order[owner[order] == split] for split in ("train", *held)}
