"""The flags of `train.Config`, one line a field, for the commands that take them."""

import argparse
import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kart import models, operators, recipes, runs, train
from kart.commands import command
from kart.commands.command import choice, commas, integer, number
from kart.train import Config

OPERATORS_HELP = (
    textwrap.fill(
        "operators: by name, or FAMILY-NUMBERS followed by B (blockwise) or U (universal), such as "
        + ", ".join(operators.EXAMPLES)
        + ". Options follow a colon: G3B:rank=24,base=softmax. Heads that differ are joined by +: "
        "2*softmax+G3B; blocks by |: 'softmax|...|G3B', where ... repeats what is before it. "
        "A basis or operator of your own: my_module:sinc-B, sinc.py:sinc-8U:rank=4 "
        "(numbers are the first arguments of its factory). Naming it runs that code.",
        96,
    )
    + "\n"
)

Parse = Callable[[str], Any]


def _rate(text: str) -> float | None:
    return None if text == "paper" else number(0)(text)


def _switch(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"needs yes or no, got {text!r}")
    return text == "yes"


WHOLE, COUNT, REAL = integer(0), integer(1), number()
# torch ends the process where the machine cannot start as many
THREADS = integer(1, most=max(64, os.cpu_count() or 1))

# one line for each field of Config that is a flag; argparse's help of `kart train`
FLAGS: dict[str, dict[str, tuple[Parse, str]]] = {
    "recipe": {"recipe": (str, "paper or small: what it sets, every other flag stands over")},
    "data": {
        "data": (
            str,
            'digits, a directory (parquet or images), or a public name "uoft-cs/cifar10"; behind a '
            "? what kart data has as flags: 'NAME?label_column=fine_label&revision=main'",
        ),
        "train_limit": (COUNT, "train on the first so many images"),
        "decode_size": (COUNT, "side to cut images to when reading, where they differ"),
        "stream": (_switch, "yes or no: decode images when drawn, not into the cache (by size)"),
        "augment": (str, "none, crop, flip_crop, paper, paper_half or small"),
        "eval_crop": (REAL, "share of the side that evaluation sees, the centre (paper: 0.9)"),
    },
    "model": {
        "model": (
            str,
            f"{', '.join(filter(models.classifies, models.MODELS))}; of `kart info` all models",
        ),
        "sharing": (str, "blockwise or universal, where the operator's letter is left out"),
        "rank": (WHOLE, "rank r of the operators (12)"),
        "project": (str, "simplex: project rows of weights onto the probability simplex"),
        "base": (str, "softmax: add rows of softmax to the learned weights"),
        "image_size": (COUNT, "side of the model's images; those of the data are resized to it"),
        "patch_size": (COUNT, "side of a patch (16 from 128 px on, else 8 x 8 of them or 4 x 4)"),
        "embed_dim": (COUNT, "width D"),
        "depth": (COUNT, "number of blocks L"),
        "num_heads": (COUNT, "number of heads H"),
        "mlp_ratio": (REAL, "width of the MLP over D"),
        "start": (
            str,
            "weights to begin with: a run, a file of kart export, or one with timm's names",
        ),
        "attention_from": (
            str,
            "as --from, of the same --operator and sizes: train with its attention, which is held",
        ),
        "freeze": (commas, "parameters not to train, by comma: blocks,cls_token or *.qkv.*"),
    },
    "optimisation": {
        "epochs": (COUNT, "passes over the training images"),
        "batch_size": (COUNT, "images a step"),
        "learning_rate": (_rate, "peak of the schedule; `paper` for 5e-4 * batch / 512"),
        "start_learning_rate": (REAL, "where the warm-up begins"),
        "end_learning_rate": (REAL, "where the cosine ends"),
        "warmup_epochs": (REAL, "linear warm-up, <= --epochs; half of the run at most"),
        "weight_decay": (REAL, "decoupled weight decay"),
        "adam_eps": (REAL, "epsilon of AdamW"),
        "max_norm": (REAL, "global norm to which gradients are clipped"),
        "label_smoothing": (REAL, "share of a target spread over all classes"),
        "ema": (REAL, "decay of the average of the weights that is evaluated; 0 for none"),
        "ema_warmup": (bool, "average less at first, for runs shorter than the average"),
        "trajectory": (WHOLE, "snapshots of the weights to keep for kart analyse; 0 for none"),
    },
    "execution": {
        "batching": (str, "native, or vmap: a per-example loss mapped by torch.func.vmap"),
        "step": (str, "eager; compiled, by torch.compile as a whole; or graph, a CUDA graph"),
        "accumulate": (
            COUNT,
            "parts of a batch, one after another: the same result in less memory",
        ),
        "recompute": (bool, "compute blocks again in the backward: less memory, more time"),
        "precision": (str, "float32 or bfloat16"),
        "device": (str, "cpu or cuda"),
        "threads": (THREADS, "CPU threads; recorded, since they change the last bits of a result"),
    },
}

DEVICES = ("cpu", "cuda", "mps", "xpu")

METAVARS: dict[Parse, str] = {
    str: "STR",
    WHOLE: "INT",
    COUNT: "INT",
    THREADS: "INT",
    REAL: "FLOAT",
    _rate: "FLOAT",
    commas: "PATTERNS",
    _switch: "YES|NO",
}


FIELDS = frozenset(name for group in FLAGS.values() for name in group)

# fields that the command line calls otherwise
NAMES = {"start": "from"}


def add_config_flags(
    parser: argparse.ArgumentParser,
    groups: Sequence[str] = tuple(FLAGS),
    fields: Collection[str] | None = None,
    shown_defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Adds the flags of `Config` in `groups` to `parser`, or those of `fields` alone; what is not
    given is not in its result, so that a recipe can stand below what is. The help names
    `shown_defaults` over those of `Config`.
    """
    defaults = {**vars(Config()), **shown_defaults}
    for title in groups:
        group = parser.add_argument_group(title)
        for name, (kind, text) in FLAGS[title].items():
            if fields is not None and name not in fields:
                continue
            default = defaults[name]
            shown = "" if default in (None, ()) else f" (default {default})"
            options: dict[str, Any] = {"type": kind, "metavar": METAVARS.get(kind)}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            group.add_argument(
                flag(name), dest=name, default=argparse.SUPPRESS, help=text + shown, **options
            )


def config_of(args: argparse.Namespace, **changes: Any) -> Config:
    """The Config that the flags in `args` describe, over their recipe if they name one."""
    known = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in known}
    given |= changes
    recipe = given.pop("recipe", None)
    return Config(**given) if recipe is None else recipes.config(recipe, **given)


def configs_of(args: argparse.Namespace) -> list[Config]:
    """One Config for each operator; options of operators are for those that leave them open."""
    specs = [config_of(args, operator=text).operator for text in args.operator]
    some = set[str]().union(*map(runs.options_of, specs))
    configs = [
        config_of(args, operator=spec, **dict.fromkeys(some - runs.options_of(spec)))
        for spec in specs
    ]
    check_effects({name for name in vars(args) if name in FIELDS}, configs)
    return configs


def _learned(spec: str | tuple[str, ...]) -> bool:
    ones = [spec] if isinstance(spec, str) else spec
    return any(operators.parse(one).operator.traits.get("learned", True) for one in ones)


def flag(name: str) -> str:
    """A field of Config as the command line has it."""
    return command.flag(NAMES.get(name, name))


def check_effects(
    given: Collection[str], configs: Sequence[Config], asked: Callable[[str], str] = flag
) -> None:
    """Refuses fields that were `given`, as `asked` names them, and change nothing in `configs`."""
    idle = {
        "ema_warmup": (f"`{asked('ema')}`", not any(one.ema for one in configs)),
        "start_learning_rate": (
            f"a warm-up (`{asked('warmup_epochs')}`)",
            not any(one.warmup_epochs for one in configs),
        ),
        "sharing": ("an operator that learns", not any(_learned(one.operator) for one in configs)),
    }
    for name, (needed, is_idle) in idle.items():
        if name in given and is_idle:
            raise ValueError(f"`{asked(name)}` has no effect without {needed}. Leave it out.")


def check_effects_on(
    given: Collection[str],
    config: Config,
    image_size: int,
    steps_per_epoch: int,
    asked: Callable[[str], str] = flag,
) -> None:
    """Refuses fields that were `given`, as `asked` names them, and change nothing in a run of
    images and steps like these, where rounding leaves nothing of them.
    """
    total = config.epochs * steps_per_epoch
    warmup = train.warmup_steps(config, steps_per_epoch)
    run = f"in a run of {total} steps, {steps_per_epoch} an epoch"
    cropped = math.floor(image_size / config.eval_crop) == image_size and config.eval_crop < 1
    most = math.floor(100 * image_size / (image_size + 1)) / 100
    scaled = f"on images of {image_size} pixels, which stay so over {config.eval_crop:g}"
    idle = {
        "warmup_epochs": (
            config.warmup_epochs > 0 and not warmup,
            f"{run}, where {config.warmup_epochs:g} epochs, and half of the run at most, are none. "
            "Give 0, or more",
        ),
        "start_learning_rate": (not warmup, f"{run}, none of them of the warm-up. Leave it out"),
        "end_learning_rate": (
            total - warmup < 2,
            f"{run}, the last of them at the peak. Leave it out",
        ),
        "eval_crop": (cropped, f"{scaled}. Give {most:g} or less"),
    }
    for name, (is_idle, why) in idle.items():
        if name in given and is_idle:
            raise ValueError(f"`{asked(name)}` has no effect {why}.")


def check_code(given: Sequence[str], *directories: str) -> None:
    """Refuses code that was `given` and that none of the runs at or below `directories` names."""
    if not given:
        return
    found = [runs.read_config(directory)["config"] for directory in runs.find(*directories)]
    named = set[str]().union(*(operators.sources(one["operator"]) for one in found))
    # a file is known by its own name, wherever it lies
    known = named | {Path(name).name for name in named if name.endswith(".py")}
    for name in given:
        if not {name, Path(name).name if name.endswith(".py") else name} & known:
            raise ValueError(
                f"`--code {name}` has no effect on runs whose operators name "
                f"{', '.join(sorted(named)) or 'no code'}. Leave it out."
            )


def check_device(name: str | None) -> None:
    """Raises ValueError unless torch can compute on the device `name`; None is no choice."""
    if name is None:
        return
    kind, _, index = name.partition(":")
    choice("--device", kind, DEVICES)
    if kind == "cpu":
        count = 1
    elif kind == "mps":
        count = int(torch.backends.mps.is_available())
    else:
        count = getattr(torch, kind).device_count()
    if not re.fullmatch("[0-9]{0,3}", index) or int(index or 0) >= count:
        raise ValueError(
            f"`--device {name}` needs a device that torch sees, and it sees {count} of {kind}. "
            "Leave it out, or choose another."
        )
