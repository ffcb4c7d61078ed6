"""Does the order of mixing and learned functions matter: W Phi, Phi W, Phi Phi, or full rank?

    kart study run order_variants --data uoft-cs/cifar10 --out runs/order_variants

Every order searches grid size and learning rate with the same number of trials, at rank 12; full
rank has no W and many more parameters (the table gives them). The paper, ViT-Tiny G11B on CIFAR-10:
W Phi 75.41, Phi W 67.04, Phi Phi 33.09; full rank did not fit its memory.

Expected in the setting of studies/README.md (n = 5, 42 minutes on one core): all alike, W Phi +7.7
[+6.7, +8.6] points over softmax, Phi W +7.8 [+6.5, +9.2], Phi Phi +7.0 [+6.1, +7.9], full rank +7.8
[+6.3, +9.3].
"""

import dataclasses
import sys

import optuna

from kart import search
from kart.cli import main
from kart.commands.command import standalone
from kart.search import Arm
from kart.train import Config


def arm(order: str | None) -> Arm:
    """The space of one order; None is softmax."""

    def space(trial: optuna.Trial, config: Config) -> Config:
        rate = trial.suggest_float("learning_rate", 3e-4, 3e-3, log=True)
        if order is None:
            return dataclasses.replace(config, operator="softmax", learning_rate=rate)
        grid = trial.suggest_int("grid", 1, 9, step=2)
        return dataclasses.replace(config, operator=f"G{grid}B:order={order}", learning_rate=rate)

    return space


ARMS = {
    "softmax": arm(None),
    "W Phi": arm("low_rank"),
    "Phi W": arm("project_first"),
    "Phi Phi": arm("two_stage"),
    "full rank": arm("full_rank"),
}

STUDY = search.Study(
    config=search.SMALL_CIFAR,
    arms=ARMS,
    trials=8 * len(ARMS),
    seeds=1,
    confirm=5,
    tiny={**search.TINY, "trials": len(ARMS)},
)

if __name__ == "__main__":
    standalone(main, ["study", "run", __file__, *sys.argv[1:]])
