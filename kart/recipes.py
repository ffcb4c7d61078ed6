"""Recipes: named settings of training, as fields of `kart.train.Config`.

    config = recipes.config("paper", operator="G3B", model="vit_tiny", data="cifar10")

What is given stands over the recipe; `overridden` says where it did, and runs record both.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kart import schema
from kart.train import Config, default_patch_size

# Table 5 of the paper; the batch is its CIFAR's, ImageNet takes 128. Its label smoothing of 0.1 is
# in the pipeline, since it comes before mixup
PAPER = {
    "augment": "paper",
    "image_size": 224,
    "patch_size": 16,
    "eval_crop": 0.9,
    "epochs": 100,
    "batch_size": 32,
    "learning_rate": None,  # 5e-4 * batch / 512
    "start_learning_rate": 1e-6,
    "end_learning_rate": 1e-5,
    "warmup_epochs": 5.0,
    "weight_decay": 0.05,
    "adam_eps": 1e-6,
    "max_norm": 1.0,
    "ema": 0.99992,
    "ema_warmup": False,
}

# for small images from scratch, after Lee et al. 2021 (arXiv:2112.13492) and Hassani et al. 2021
# (arXiv:2104.05704): AdamW, cosine, RandAugment, mixup and cutmix, patches of an eighth of the side
SMALL = {
    "augment": "small",
    "image_size": 32,
    "patch_size": 4,
    "epochs": 100,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "warmup_epochs": 10.0,
    "weight_decay": 0.05,
    "max_norm": 1.0,
    "ema": 0.9995,
}

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"paper": MappingProxyType(PAPER), "small": MappingProxyType(SMALL)}
)


def fields(name: str) -> dict[str, Any]:
    """The fields of `Config` that the recipe `name` sets."""
    if not isinstance(name, str) or name not in RECIPES:
        near = ", ".join(schema.near(name, RECIPES) or RECIPES)
        raise ValueError(f"`recipe` needs one of {list(RECIPES)}, got {name!r}. Near: {near}.")
    return dict(RECIPES[name])


def config(name: str, **given: Any) -> Config:
    """The Config of the recipe `name`, with `given` fields over it. Its own warm-up is half of
    `epochs` at most, its own patches those of a Swin, which halves their grid, where that is the
    model.

    >>> config("paper", operator="G3B", epochs=300).epochs
    300
    >>> config("paper", operator="G3B", epochs=1).warmup_epochs
    0.5
    >>> config("paper", model="vit_tiny").patch_size, config("paper", model="swin_tiny").patch_size
    (16, 4)
    """
    known = {field.name for field in dataclasses.fields(Config)} - {"recipe"}
    unknown = sorted(set(given) - known)
    if unknown:
        near = ", ".join(schema.near(unknown[0], known)) or "none"
        raise ValueError(f"`config` needs fields of Config, got {unknown[0]!r}. Near: {near}.")
    values = {**fields(name), **given, "recipe": name}
    if "warmup_epochs" not in given and isinstance(values["epochs"], int):
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 2)
    if "patch_size" not in given:
        most = default_patch_size(224, values.get("model", Config.model))
        values["patch_size"] = min(values["patch_size"], most)
    return Config(**values)


def overridden(config: Config) -> dict[str, Any]:
    """The fields in which a config departs from its recipe; empty without one.

    >>> overridden(config("paper", epochs=300))
    {'epochs': 300}
    """
    if config.recipe is None:
        return {}
    return {
        name: getattr(config, name)
        for name, value in fields(config.recipe).items()
        if getattr(config, name) != value
    }
