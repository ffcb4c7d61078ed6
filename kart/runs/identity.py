"""What a run directory is: its config, members and data, who may write into it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kart import checkpoint, code, operators, population, recipes, schema
from kart.runs import owned, room
from kart.train import Config, Splits

FORMAT = 3  # of a run directory: raised when its files, or what they mean, change


class Identity(NamedTuple):
    """What a run is: `id` names it by its configs and data, wherever it lies."""

    id: str
    configs: list[Config]  # one a member
    data: dict[str, Any]  # see `kart.runs.owned`
    versions: dict[str, str]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second process out of `directory` until the block ends, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"`out` needs a directory no other process trains in, got {str(directory)!r}. "
                "Wait for that process, or choose another directory."
            ) from None
        yield


def run_id(config: dict[str, Any], members: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """Sixteen hex digits that name a run: its config, its members, the images it is trained on."""
    return schema.digest([config, members, data["fingerprint"]])[:16]


def describe(configs: Sequence[Config], splits: Splits) -> dict[str, Any]:
    """What config.json says of a run of `configs` on `splits`."""
    members = [{name: getattr(c, name) for name in population.FREE} for c in configs]
    config, data = configs[0].asdict(), json.loads(json.dumps(owned.facts(splits)))
    return {
        "format": FORMAT,
        "run": run_id(config, members, data),
        "config": config,
        "overridden": recipes.overridden(configs[0]),  # where it departs from its recipe
        "members": members,
        "data": data,
        "digest": schema.digest(data),  # of `data`, of which the run's id names the images alone
        "code": _code(configs[0]),
        "versions": checkpoint.versions(),
    }


def _code(config: Config) -> dict[str, str | None]:
    """Fingerprints of the user's own sources that the operators of `config` name."""
    return {name: code.fingerprint(name) for name in sorted(operators.sources(config.operator))}


def _check_code(where: str, config: Config, own: dict[str, str | None]) -> None:
    for name, now in _code(config).items():
        if now is not None and own.get(name) not in (None, now):
            raise ValueError(
                f"`run` needs the code it was trained with, got another {name!r} than that of "
                f"{where!r}. Put that one back, or train into a new directory."
            )


def _holds_run(directory: Path) -> bool:
    """Whether a directory is a run, or was before its config.json was damaged: others have files of
    that name.
    """
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return (directory / ".lock").exists()
    return isinstance(found, dict) and {"run", "members"} <= found.keys()


def check_place(directory: Path) -> None:
    """Raises ValueError where a run in `directory` would lie inside another one, or lie over files
    that are no run.
    """
    for parent in directory.absolute().parents:
        if _holds_run(parent):
            raise ValueError(
                f"`out` needs a directory outside of other runs, got {str(directory)!r} inside "
                f"the run {str(parent)!r}. Choose another directory."
            )
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`out` needs a directory, got the file {str(directory)!r}.")
    room.check_writable(directory)
    if not directory.exists() or (directory / "config.json").exists():
        return
    others = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    if others:
        raise ValueError(
            f"`out` needs a new or empty directory, or a run, got {str(directory)!r} with "
            f"{', '.join(sorted(others)[:5])}. Choose another directory."
        )


def claim(directory: Path, configs: Sequence[Config], splits: Splits) -> Identity:
    """Makes `directory` the run of `configs` on `splits`, or checks that it already is.

    Raises ValueError where it holds another configuration or other data, or files that are no run.
    """
    check_place(directory)
    path = directory / "config.json"
    wanted = describe(configs, splits)
    if not path.exists():
        checkpoint.write_json(path, wanted)
        return read(directory)
    found = read_config(directory)
    old, new = {**Config().asdict(), **found["config"]}, dict(wanted["config"])
    if found["members"] != wanted["members"] or old != new:
        there, asked = found["members"], wanted["members"]
        if len(there) + len(asked) > 2:
            for fields, members in ((old, there), (new, asked)):
                fields |= {k: [member[k] for member in members] for k in population.FREE}
        keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked" for k in keys)
        raise ValueError(
            f"`out` needs a new directory or one with the same configuration, got "
            f"{str(directory)!r} with another ({shown}). Choose another directory."
        )
    owned.check(str(directory), found["data"], splits)
    kart = {"there": found["versions"].get("kart"), "now": wanted["versions"]["kart"]}
    if kart["there"] != kart["now"]:
        raise ValueError(
            f"`out` needs a run of this version of kart, got {str(directory)!r} of "
            f"{kart['there']}, this is {kart['now']}. Choose another directory."
        )
    return read(directory)


def place_of(directory: Any) -> Path:
    """The path that a caller means as a run directory."""
    if not isinstance(directory, str | os.PathLike) or "\0" in str(directory):
        raise ValueError(f"`run` needs the path of a directory, got {directory!r:.100}.")
    return Path(directory)


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """`config.json` of a run directory, checked: see `describe` for what is in it."""
    path = place_of(directory) / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        below: list[str] = []
        with contextlib.suppress(OSError):  # as of a name that is too long
            below = sorted(str(one.parent) for one in path.parent.glob("**/config.json"))
        if below:
            raise ValueError(
                f"`run` needs the directory of one run, got {str(directory)!r:.200}, which holds "
                f"{len(below)}: {', '.join(below[:5])}{', ...' if below[5:] else ''}. Name one."
            ) from None
        raise ValueError(
            f"`run` needs a directory that `kart train` wrote, got {str(directory)!r:.200} "
            "without config.json. Check the path."
        ) from None
    try:
        found = json.loads(text)
        problem = _problem(found)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"`run` needs a whole config.json of this version of kart, got a damaged or other one "
            f"in {str(directory)!r} ({problem}). Train into a new directory."
        )
    return found


SHAPE: dict[str, Any] = {
    "format": int,
    "run": str,
    "config": dict,
    "members": [dict],
    "versions": dict,
    "code": dict,
    "data": {
        "name": str,
        "classes": [str],
        "image": [int],
        "mean": [float],
        "std": [float],
        "counts": {"train": int, "val": int},
        "fingerprint": {"train": str, "val": str},
    },
}


def _problem(found: Any) -> str:
    """What is wrong with a config.json, empty if nothing is."""
    wrong = _misfit(found, SHAPE, "")
    if wrong:
        return wrong
    if found["format"] != FORMAT:
        return f"format {found['format']}, this kart reads {FORMAT}"
    hints = typing.get_type_hints(Config)
    for name, kind in hints.items():
        # a field that there was not yet when the run was made has its default
        if name in found["config"] and not schema.fits(found["config"][name], kind):
            return f"config.{name} is {found['config'][name]!r:.60}"
    unknown = sorted(set(found["config"]) - set(hints))
    if unknown:
        return f"config has {unknown[0]!r}, which is no field of Config"
    for member in found["members"]:
        if set(member) != set(population.FREE):
            return f"a member has {sorted(member)}, not {sorted(population.FREE)}"
        if not all(schema.fits(value, hints[name]) for name, value in member.items()):
            return f"a member is {member!r:.100}"
    if not found["members"]:
        return "no members"
    if found["run"] != run_id(found["config"], found["members"], found["data"]):
        return "its run id is not that of its config, members and data: it was changed"
    # what was written before there was a digest has none
    if found.get("digest", schema.digest(found["data"])) != schema.digest(found["data"]):
        return "its classes or statistics are not those that it was written with: it was changed"
    return ""


def _misfit(value: Any, shape: Any, name: str) -> str:
    """Where `value` has another shape than `shape`: a type, a list of one, a dict of several."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name or 'the file'} is no object"
        for key, inner in shape.items():
            if key not in value:
                return f"{name or 'it'} has no {key!r}"
            wrong = _misfit(value[key], inner, f"{name}.{key}" if name else key)
            if wrong:
                return wrong
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next(
            filter(None, (_misfit(one, shape[0], f"an item of {name}") for one in value)), ""
        )
    return "" if schema.fits(value, shape) else f"{name} is {value!r:.60}"


def read(directory: str | os.PathLike) -> Identity:
    """The identity of the run in a directory."""
    found = read_config(directory)
    base = Config.fromdict(found["config"])
    _check_code(str(directory), base, found["code"])
    configs = [dataclasses.replace(base, **free) for free in found["members"]]
    return Identity(found["run"], configs, found["data"], found["versions"])


def members(directory: str | os.PathLike) -> list[Config]:
    """The configs of the members of a run directory."""
    return read(directory).configs


def check_owner(path: Path, found: Any, run: str) -> None:
    """Raises ValueError unless a record or checkpoint says that it belongs to the run `run`."""
    own = found.get("run") if isinstance(found, dict) else None
    if own != run:
        raise ValueError(
            f"`run` needs files of its own, got {str(path)!r} of the run {own!r}, not {run!r}. "
            "Put the right file back, or train into a new directory."
        )
