"""What several studies share: a setting, and the comparison that searches learning rates alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from kart.search.question import TINY, Arm, Study
from kart.train import Config

# 8,000 images of CIFAR-10 and a model that a core trains in minutes
SMALL_CIFAR = Config(
    data="uoft-cs/cifar10",
    train_limit=8000,
    augment="flip_crop",
    image_size=32,
    patch_size=4,
    epochs=20,
    batch_size=64,
)


def rate_only(fields: Callable[[Config], Mapping[str, Any]]) -> Arm:
    """The arm of the config with `fields(config)` changed: its learning rate, one of three."""

    def space(trial: optuna.Trial, config: Config) -> Config:
        rate = trial.suggest_categorical("learning_rate", [5e-4, 1e-3, 2e-3])
        return dataclasses.replace(config, **fields(config), learning_rate=rate)

    return space


def compare(
    arms: Mapping[str, Arm],
    config: Config = SMALL_CIFAR,
    tiny: Mapping[str, Any] | None = None,
    answer: Callable[[Mapping[str, Any]], str] | None = None,
) -> Study:
    """A study whose arms are of `rate_only`: each tries its three learning rates on one seed, and
    the winners are trained again with five fresh ones.
    """
    return Study(
        config=config,
        arms=arms,
        trials=3 * len(arms),
        seeds=1,
        confirm=5,
        sampler="brute",
        pruner="none",
        tiny={**TINY, "trials": len(arms), **(tiny or {})},
        answer=answer,
    )
