"""What a run begins with, where its config names another run or a file of weights: a donor of all
parameters (`start`), or a teacher of attention (`attention_from`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from kart import checkpoint, models, population, train, transfer, tree
from kart.models import Model
from kart.runs import weights
from kart.train import Config, Run, Splits, State


class Donor(NamedTuple):
    """Parameters by timm's names, with their model and classes where they are known."""

    params: Mapping[str, Any]
    model: Model | None
    classes: list[str] | None


def read(path: str, seed: int, argument: str = "start") -> Donor:
    """The donor at `path`: a finished run (of several seeds the one that is `seed`), a file of
    `kart export`, or a safetensors file with timm's names.
    """
    place = Path(path)
    if place.is_dir():
        several = len(weights.below(place)) > 1
        found = weights.only(place, seed=seed if several else None)
        return Donor(found.params, found.model, list(found.identity.data["classes"]))
    if not place.is_file():
        raise ValueError(
            f"`{argument}` needs a run or a safetensors file, got {path!r}, which is not there. "
            "Check the path."
        )
    try:
        with safetensors.safe_open(str(place), framework="pt") as file:
            own = "kart" in (file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{argument}` needs a whole safetensors file, got {path!r} ({error}). Convert "
            "weights of another kind with `safetensors.torch.save_file(state_dict, path)`."
        ) from None
    if not own:
        return Donor(safetensors.torch.load_file(str(place)), None, _classes(place))
    params, config = checkpoint.load(place)
    if not isinstance(config, dict) or "operator" not in config:
        raise ValueError(
            f"`{argument}` needs a run, or a file of `kart export`, got {path!r} from inside "
            "of a run. Name the directory of the run."
        )
    return Donor(params, models.from_config(config), _classes(place))


def _classes(path: Path) -> list[str] | None:
    """What `kart export` wrote beside its file."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return list(found["classes"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def check(configs: Sequence[Config], splits: Splits) -> None:
    """Raises ValueError unless each of `configs` can begin with its donor, if it names one."""
    for config in configs:
        if config.start is not None or config.attention_from is not None:
            begin(train.solo(config, splits), [config], splits)


def begin(run: Run, configs: Sequence[Config], splits: Splits) -> tuple[State, dict[str, Any]]:
    """The first state of a run, and what `start.json` says of the donor; without a donor nothing.

    Raises ValueError for a donor that does not fit.
    """
    state, begun, source = run.init(), _begun, _source(run.config)
    if source is None:
        return state, {}
    if source[0] == "attention_from":
        begun = _taught
    found = [_read(config) for config in configs]
    params, about = begun(run, state, configs, found, splits)
    about |= {source[0]: source[1], "fingerprints": [_fingerprint(donor) for donor in found]}
    return train.begin_with(state, tree.to(params, run.config.device)), about


def check_same(directory: Path, configs: Sequence[Config]) -> None:
    """Raises ValueError where what the run in `directory` began with is another; it may be gone."""
    source, known = _source(configs[0]), _about(directory).get("fingerprints")
    if source is None or known is None:
        return
    try:
        now = [_fingerprint(_read(config)) for config in configs]
    except ValueError:
        return  # no donor any more, or one that is being trained
    if now != known:
        raise ValueError(
            f"`{source[0]}` needs to be what {str(directory)!r} began with, got other weights in "
            f"{source[1]!r}. Put those back, or train into a new directory."
        )


def _source(config: Config) -> tuple[str, str] | None:
    """The field of a config that names what it begins with, and the path there."""
    for name in ("start", "attention_from"):
        path = getattr(config, name)
        if path is not None:
            return name, path
    return None


def _read(config: Config) -> Donor:
    source = _source(config)
    assert source is not None
    return read(source[1], config.seed, source[0])


def _fingerprint(donor: Donor) -> str:
    """Sixteen hex digits that name the weights of a donor."""
    digest = hashlib.sha256()
    for name, leaf in tree.named(dict(donor.params)).items():
        digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


Found = tuple[train.Params, dict[str, Any]]


def _taught(
    run: Run, state: State, configs: Sequence[Config], found: Sequence[Donor], splits: Splits
) -> Found:
    one = train.build(dataclasses.replace(run.config, attention_from=None), splits.train)
    own = population.members(state.params, len(configs))
    pairs = zip(own, found, strict=True)
    taught = [transfer.teach(params, one, donor.params, donor.model) for params, donor in pairs]
    return population.together(taught), {}


def _begun(
    run: Run, state: State, configs: Sequence[Config], found: Sequence[Donor], splits: Splits
) -> Found:
    model = train.build(run.config, splits.train)
    ours = list(splits.train.classes)
    members, drawn, channels = [], [], None
    for config, donor in zip(configs, found, strict=True):
        # names are known of runs and exports alone; else their number decides
        same = donor.classes is None or donor.classes == ours
        generator = torch.Generator().manual_seed(config.seed)
        channels = transfer.channels_of(donor.params)
        params, drawn = transfer.begin(model, donor.params, generator, donor.model, same)
        members.append(params)
    params = population.together(members)
    about: dict[str, Any] = {"taken": len(tree.leaves(params)) - len(drawn), "drawn": drawn}
    if channels not in (None, model.config.in_channels):
        about["channels"] = channels
    return params, about


def _about(directory: Path) -> dict[str, Any]:
    """What `start.json` says of a run, nothing where there is none."""
    path = directory / "start.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def told(directory: Path) -> str:
    """What the run in `directory` took of its donor, in a line; empty without one."""
    found = _about(directory)
    if "start" not in found:
        return f"attends as {found['attention_from']} does" if found else ""
    drawn = sorted({name.rpartition(".")[0] for name in found["drawn"]})
    rest = f"; drawn: {', '.join(drawn[:4])}{', ...' if len(drawn) > 4 else ''}" if drawn else ""
    began = f"began with {found['start']}, {found['taken']} tensors of it{rest}"
    if "channels" in found:
        began += f"; its filters, for images of {found['channels']} channels, made to fit"
    return began
