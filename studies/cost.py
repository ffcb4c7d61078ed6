"""Can learnable attention be had at softmax's price? Time and memory beside softmax, in one run.

    python -m studies.cost [--quick] [--device cuda] [--out cost.json]

The measurement is `kart bench` (kart/analysis/bench.py), which says what is measured and how.
Expected on one AVX-512 core, G = 3, N = 197: the torch engine at 2.3 times softmax's time (G = 1:
1.6), the naive form at 6.6 (2.4). About six minutes.
"""

import sys

from kart.cli import main
from kart.commands.command import standalone

if __name__ == "__main__":
    standalone(main, ["bench", *sys.argv[1:]])
