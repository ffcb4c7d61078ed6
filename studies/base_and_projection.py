"""Do a base activation, softmax beside the learned rows, or the simplex projection help KArAt?

    kart study run base_and_projection --data uoft-cs/cifar10 --out runs/base_and_projection

A unit's base b(x) (the paper's eq. 5) is zero, identity, SiLU or GELU; `+ softmax` adds rows of
softmax to the learned ones; `simplex` projects rows onto the probability simplex (Alg. 1). Every
arm chooses its learning rate out of three on one seed; the winners are trained again with five
fresh seeds. The paper, ViT-Tiny G3B on CIFAR-10: identity 75.90, SiLU 76.25, GELU 76.48, zero
76.69; with the projection 41.99.
"""

import dataclasses
import sys

import optuna

from kart import search
from kart.search import Arm
from kart.train import Config

CONFIG = Config(
    data="uoft-cs/cifar10",
    train_limit=8000,
    augment="flip_crop",
    image_size=32,
    patch_size=4,
    epochs=20,
)


def arm(operator: str) -> Arm:
    """The space of one operator: nothing but the learning rate."""

    def space(trial: optuna.Trial, config: Config) -> Config:
        rate = trial.suggest_categorical("learning_rate", [5e-4, 1e-3, 2e-3])
        return dataclasses.replace(config, operator=operator, learning_rate=rate)

    return space


ARMS = {
    "softmax": arm("softmax"),
    "G3, zero": arm("G3B"),
    "G3, identity": arm("G3B:base=identity"),
    "G3, SiLU": arm("G3B:base=silu"),
    "G3, GELU": arm("G3B:base=gelu"),
    "G3 + softmax": arm("G3B:base=softmax"),
    "G3, simplex": arm("G3B:project=simplex"),
    "G3 + softmax, simplex": arm("G3B:base=softmax,project=simplex"),
}

STUDY = search.Study(
    config=CONFIG,
    arms=ARMS,
    trials=3 * len(ARMS),
    seeds=1,
    confirm=5,
    sampler="brute",
    pruner="none",
    tiny={**search.TINY, "trials": len(ARMS)},
)

if __name__ == "__main__":
    sys.exit(search.study_main(["run", __file__, *sys.argv[1:]]))
