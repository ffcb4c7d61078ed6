"""Can learnable attention be had at softmax's price? Time and memory beside softmax, in one run.

    python -m studies.cost [--quick] [--device cuda] [--out cost.json]

The measurement is `kart bench` (kart/analysis/bench.py), which says what is measured and how.
Expected on one core with AVX-512 and AMX, G = 3, N = 197: the C++ engine at 1.0 times softmax's
time (G = 1: 0.7), the torch engine at 3.2 (1.7), the naive form at 14 (2.8), see studies/cost.md.
About nine minutes.
"""

import sys

from kart.cli import main
from kart.commands.command import standalone

if __name__ == "__main__":
    standalone(main, ["bench", *sys.argv[1:]])
