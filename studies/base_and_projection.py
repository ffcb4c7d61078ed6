"""Do a base activation, softmax beside the learned rows, or the simplex projection help KArAt?

    kart study run base_and_projection --data uoft-cs/cifar10 --out runs/base_and_projection

A unit's base b(x) (the paper's eq. 5) is zero, identity, SiLU or GELU; `+ softmax` adds rows of
softmax to the learned ones; `simplex` projects rows onto the probability simplex (Alg. 1). Every
arm chooses its learning rate out of three on one seed; the winners are trained again with five
fresh seeds. The paper, ViT-Tiny G3B on CIFAR-10: identity 75.90, SiLU 76.25, GELU 76.48, zero
76.69; with the projection 41.99.

Expected in the setting of studies/README.md (n = 5, 50 minutes on one core): no base activation
shows, zero +7.2 [+6.7, +7.8] points over softmax, GELU +7.5 [+6.8, +8.3]; the simplex costs one or
two of them, +5.9 [+5.0, +6.7].
"""

import sys

from kart import search
from kart.cli import main
from kart.commands.command import standalone

OPERATORS = {
    "softmax": "softmax",
    "G3, zero": "G3B",
    "G3, identity": "G3B:base=identity",
    "G3, SiLU": "G3B:base=silu",
    "G3, GELU": "G3B:base=gelu",
    "G3 + softmax": "G3B:base=softmax",
    "G3, simplex": "G3B:project=simplex",
    "G3 + softmax, simplex": "G3B:base=softmax,project=simplex",
}


def arm(operator: str) -> search.Arm:
    """The space of one operator."""
    return search.rate_only(lambda config: {"operator": operator})


STUDY = search.compare({name: arm(operator) for name, operator in OPERATORS.items()})

if __name__ == "__main__":
    standalone(main, ["study", "run", __file__, *sys.argv[1:]])
