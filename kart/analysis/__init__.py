"""Measurements of models and operators: tensors in, tensors out, each beside its plot."""

from typing import Any

import kart


def __getattr__(name: str) -> Any:
    return kart.file(__name__, name)
