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
from collections.abc import Callable, Collection
from typing import Any

from kart import models, search
from kart.cli import main
from kart.commands.command import standalone
from kart.train import Config


def arm(blocks: Callable[[int], Collection[int]]) -> search.Arm:
    """KArAt in the `blocks` of a depth, softmax elsewhere."""

    def fields(config: Config) -> dict[str, Any]:
        depth = config.depth or models.MODELS[config.model]["depth"]
        if depth < 3:
            raise ValueError(
                f"`placement` needs a `depth` of 3 blocks or more, which have thirds, got {depth}. "
                "Change it."
            )
        chosen = blocks(depth)
        specs = tuple("G3B" if block in chosen else "softmax" for block in range(depth))
        return {"operator": specs}

    return search.rate_only(fields)


def third(n: int) -> Callable[[int], Collection[int]]:
    """The blocks of the third `n` of a depth, from 0."""
    return lambda depth: range(round(n * depth / 3), round((n + 1) * depth / 3))


def half_of_the_heads(config: Config) -> dict[str, Any]:
    """In every block softmax in the first half of the heads, KArAt in the others."""
    heads = config.num_heads or models.MODELS[config.model]["num_heads"]
    return {"operator": f"{heads // 2}*softmax+{heads - heads // 2}*G3B"}


STUDY = search.compare(
    {
        "softmax": arm(lambda depth: ()),
        "all blocks": arm(range),
        "early third": arm(third(0)),
        "middle third": arm(third(1)),
        "late third": arm(third(2)),
        "every other block": arm(lambda depth: range(0, depth, 2)),
        "first block": arm(lambda depth: range(1)),
        "last block": arm(lambda depth: range(depth - 1, depth)),
        "half of the heads": search.rate_only(half_of_the_heads),
    },
    config=dataclasses.replace(search.SMALL_CIFAR, depth=6),
    tiny={"depth": 3, "num_heads": 2},
)

if __name__ == "__main__":
    standalone(main, ["study", "run", __file__, *sys.argv[1:]])
