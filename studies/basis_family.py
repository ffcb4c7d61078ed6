"""Which basis family serves attention best, at which size and initialisation?

    kart study run basis_family --data uoft-cs/cifar10 --out runs/basis_family

Every family gets the same eight trials over its size, its initialisation ("scaled" or as the
paper prints it), the rank and the learning rate; the best of each is trained again with five fresh
seeds and scored on the test split. The paper's order on CIFAR-10 with ViT-Tiny: Fourier 76.69, DOG
73.89, Shannon 71.41, Meyer 71.13, Morlet 70.84, Mexican hat 69.62, rational 69.22; it trained no
B-spline attention.

Expected (n = 5, 34 minutes for two processes of one thread, `kart study work` beside it): Fourier
+6.4 [+5.8, +7.2] points over softmax and nine families within 1.2 points, B-splines +7.1 [+6.5,
+7.7] the first, Meyer +2.9 [+1.5, +4.4] the last.
"""

import dataclasses
import sys

import optuna

from kart import bases, search
from kart.cli import main
from kart.commands.command import standalone
from kart.search import Arm
from kart.train import Config

# two blocks, 17 tokens, 4,000 images: half a minute a run
CONFIG = dataclasses.replace(
    search.SMALL_CIFAR,
    train_limit=4000,
    patch_size=8,
    embed_dim=64,
    depth=2,
    epochs=10,
)


def softmax(trial: optuna.Trial, config: Config) -> Config:
    """The baseline."""
    return dataclasses.replace(config, operator="softmax", learning_rate=rate(trial))


def rate(trial: optuna.Trial) -> float:
    """The learning rate, the one nuisance parameter."""
    return trial.suggest_float("learning_rate", 3e-4, 3e-3, log=True)


def arm(family: str) -> Arm:
    """The space of a family."""

    def space(trial: optuna.Trial, config: Config) -> Config:
        spec = search.suggest_operator(
            trial, [family], grid=(2, 9), degree=(1, 8), rank=(6, 24), sharing=("blockwise",)
        )
        init = trial.suggest_categorical("init", ["scaled", "paper"])
        return dataclasses.replace(
            config, operator=f"{spec},init={init}", learning_rate=rate(trial)
        )

    return space


STUDY = search.Study(
    config=CONFIG,
    arms={"softmax": softmax, **{family: arm(family) for family in bases.FAMILIES}},
    trials=8 * (1 + len(bases.FAMILIES)),
    seeds=1,
    confirm=5,
    tiny={**search.TINY, "trials": 1 + len(bases.FAMILIES)},
)

if __name__ == "__main__":
    standalone(main, ["study", "run", __file__, *sys.argv[1:]])
