"""Which blocks and heads should have learnable attention: early, middle, late, some, or all?

    kart study run placement --data uoft-cs/cifar10 --out runs/placement

The other blocks and heads keep softmax. Every arm chooses its learning rate out of three on one
seed; the winners are trained again with five fresh seeds. The paper has one such figure, hybrid
heads (App. C.5.2), and its reviewers asked for the rest.

Expected in the setting of studies/README.md (n = 5, 52 minutes on one core): the last block alone
has +7.9 [+6.1, +9.7] of the +8.7 [+8.5, +8.9] points over softmax of all six, the first +5.4 [+4.1,
+6.6].
"""

import dataclasses
import sys
from typing import Any

from kart import models, search
from kart.cli import main
from kart.commands.command import standalone
from kart.train import Config


def arm(first: float, last: float, every: int = 1) -> search.Arm:
    """KArAt in every so many blocks of the share [first, last) of the depth, softmax elsewhere."""

    def fields(config: Config) -> dict[str, Any]:
        depth = config.depth or models.MODELS[config.model]["depth"]
        chosen = range(round(first * depth), round(last * depth), every)
        specs = tuple("G3B" if block in chosen else "softmax" for block in range(depth))
        return {"operator": specs}

    return search.rate_only(fields)


def half_of_the_heads(config: Config) -> dict[str, Any]:
    """In every block softmax in the first half of the heads, KArAt in the others."""
    heads = config.num_heads or models.MODELS[config.model]["num_heads"]
    return {"operator": f"{heads // 2}*softmax+{heads - heads // 2}*G3B"}


STUDY = search.compare(
    {
        "softmax": arm(0, 0),
        "all blocks": arm(0, 1),
        "early third": arm(0, 1 / 3),
        "middle third": arm(1 / 3, 2 / 3),
        "late third": arm(2 / 3, 1),
        "every other block": arm(0, 1, 2),
        "first block": arm(0, 1 / 6),
        "last block": arm(5 / 6, 1),
        "half of the heads": search.rate_only(half_of_the_heads),
    },
    config=dataclasses.replace(search.SMALL_CIFAR, depth=6),
    tiny={"depth": 3, "num_heads": 2},
)

if __name__ == "__main__":
    standalone(main, ["study", "run", __file__, *sys.argv[1:]])
