"""KArAt in models of other libraries, one file a library: `kart.bridges.timm`, `.transformers`,
`.multihead` (torch's own). None of them imports its library before it is needed.
"""

from typing import Any

import kart


def __getattr__(name: str) -> Any:
    return kart.file(__name__, name)
