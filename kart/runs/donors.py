"""What a run begins with, where its config names another run or a file of weights: a donor of all
parameters (`start`), or a teacher of attention (`attention_from`).
"""

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
    state = run.init()
    about: dict[str, Any] = {}
    if run.config.start is not None:
        state, about = _begun(run, state, configs, splits)
    if run.config.attention_from is None:
        return state, about
    one = train.teacher(run.config, splits.train)
    members = []
    own = population.members(state.params, len(configs))
    for config, params in zip(configs, own, strict=True):
        assert config.attention_from is not None
        donor = read(config.attention_from, config.seed, "attention_from")
        members.append(transfer.teach(params, one, donor.params, donor.model))
    params = tree.to(population.together(members), run.config.device)
    return train.begin_with(state, params), {**about, "attention_from": run.config.attention_from}


def _begun(
    run: Run, state: State, configs: Sequence[Config], splits: Splits
) -> tuple[State, dict[str, Any]]:
    model = train.build(run.config, splits.train)
    ours = list(splits.train.classes)
    members, drawn, channels = [], [], None
    for config in configs:
        assert config.start is not None
        donor = read(config.start, config.seed)
        # names are known of runs and exports alone; else their number decides
        same = donor.classes is None or donor.classes == ours
        generator = torch.Generator().manual_seed(config.seed)
        channels = transfer.channels_of(donor.params)
        params, drawn = transfer.begin(model, donor.params, generator, donor.model, same)
        members.append(params)
    params = population.together(members)
    leaves = len(tree.leaves(params))
    told = {"start": run.config.start, "taken": leaves - len(drawn), "drawn": drawn}
    if channels not in (None, model.config.in_channels):
        told["channels"] = channels
    return train.begin_with(state, tree.to(params, run.config.device)), told


def told(directory: Path) -> str:
    """What the run in `directory` took of its donor, in a line; empty without one."""
    path = directory / "start.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    looks = f"attends as {found['attention_from']} does" if "attention_from" in found else ""
    if "start" not in found:
        return looks
    drawn = sorted({name.rpartition(".")[0] for name in found["drawn"]})
    rest = f"; drawn: {', '.join(drawn[:4])}{', ...' if len(drawn) > 4 else ''}" if drawn else ""
    began = f"began with {found['start']}, {found['taken']} tensors of it{rest}"
    if "channels" in found:
        began += f"; its filters, for images of {found['channels']} channels, made to fit"
    return f"{began}; {looks}" if looks else began
