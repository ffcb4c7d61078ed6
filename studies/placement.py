"""Which blocks and heads should have learnable attention: early, middle, late, some, or all?

    kart study run placement --data uoft-cs/cifar10 --out runs/placement

The other blocks and heads keep softmax. Every arm chooses its learning rate out of three on one
seed; the winners are trained again with five fresh seeds. The paper has one such figure, hybrid
heads (App. C.5.2), and its reviewers asked for the rest.
"""

import dataclasses
import sys

import optuna

from kart import models, search
from kart.search import Arm
from kart.train import Config

CONFIG = Config(
    data="uoft-cs/cifar10",
    train_limit=8000,
    augment="flip_crop",
    image_size=32,
    patch_size=4,
    epochs=20,
    depth=6,
)


def arm(first: float, last: float, every: int = 1) -> Arm:
    """KArAt in every so many blocks of the share [first, last) of the depth, softmax elsewhere."""

    def space(trial: optuna.Trial, config: Config) -> Config:
        depth = config.depth or models.MODELS[config.model]["depth"]
        chosen = range(round(first * depth), round(last * depth), every)
        specs = tuple("G3B" if block in chosen else "softmax" for block in range(depth))
        return with_rate(trial, config, specs)

    return space


def with_rate(trial: optuna.Trial, config: Config, operator: str | tuple[str, ...]) -> Config:
    """A config with this operator, its learning rate open."""
    rate = trial.suggest_categorical("learning_rate", [5e-4, 1e-3, 2e-3])
    return dataclasses.replace(config, operator=operator, learning_rate=rate)


def half_of_the_heads(trial: optuna.Trial, config: Config) -> Config:
    """In every block softmax in the first half of the heads, KArAt in the others."""
    heads = config.num_heads or models.MODELS[config.model]["num_heads"]
    return with_rate(trial, config, f"{heads // 2}*softmax+{heads - heads // 2}*G3B")


STUDY = search.Study(
    config=CONFIG,
    arms={
        "softmax": arm(0, 0),
        "all blocks": arm(0, 1),
        "early third": arm(0, 1 / 3),
        "middle third": arm(1 / 3, 2 / 3),
        "late third": arm(2 / 3, 1),
        "every other block": arm(0, 1, 2),
        "first block": arm(0, 1 / 6),
        "last block": arm(5 / 6, 1),
        "half of the heads": half_of_the_heads,
    },
    trials=27,
    seeds=1,
    confirm=5,
    sampler="brute",
    pruner="none",
    tiny={**search.TINY, "depth": 3, "num_heads": 2, "trials": 9},
)

if __name__ == "__main__":
    sys.exit(search.study_main(["run", __file__, *sys.argv[1:]]))
