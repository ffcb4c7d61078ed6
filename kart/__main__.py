"""`python -m kart`: the `kart` command."""

import sys

from kart.cli import main

if __name__ == "__main__":
    sys.exit(main())
