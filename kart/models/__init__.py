"""Vision transformers with a swappable row operator: `create(name, operator=...)`."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from kart.models.vit import Model, ViTConfig, vit
from kart.operators import Operator

__all__ = ["MODELS", "Model", "ViTConfig", "create", "from_config", "vit"]

# "vit_nano" is kart's own size for laptops and studies on small images; the others have the
# widths of Dosovitskiy et al. 2021 and Touvron et al. 2021, as the paper uses them (Table 1)
MODELS: dict[str, dict[str, int]] = {
    "vit_nano": {"embed_dim": 64, "depth": 4, "num_heads": 2},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


def create(
    name: str, operator: str | Operator | Sequence[str | Operator] = "softmax", **overrides: Any
) -> Model:
    """A vision transformer by name: "vit_nano", "vit_tiny", "vit_small" or
    "vit_base".

    `operator` is a spec string (see `kart.operators.parse`), an Operator, or one of either per
    block. `overrides` are the fields of `ViTConfig`: image_size, patch_size, in_channels,
    num_classes, embed_dim, depth, num_heads, mlp_ratio, sharing ("blockwise" or "universal"), and
    the options that
    a spec leaves open: rank, project, base.

    >>> model = create("vit_tiny", operator="G3B", image_size=32, patch_size=4, depth=2)
    >>> model.config.tokens, model.config.sharing
    (65, 'blockwise')
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.3) or list(MODELS)
        raise ValueError(
            f"`create` needs a model name in {list(MODELS)}, got {name!r}. "
            f"Near matches: {', '.join(near)}."
        )
    fields = {field.name for field in dataclasses.fields(ViTConfig)} - {"operator"}
    unknown = sorted(set(overrides) - fields)
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=3, cutoff=0.3)
        raise ValueError(
            f"`create` needs overrides among {sorted(fields)}, got {unknown}. "
            f"Near matches: {', '.join(near) or 'none'}."
        )
    return vit(operator, **{**MODELS[name], **overrides})


def from_config(config: dict[str, Any]) -> Model:
    """The model whose `dataclasses.asdict(model.config)` is `config`, as checkpoints store it."""
    fields = dict(config)
    try:
        return vit(fields.pop("operator"), **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"`from_config` needs the fields of ViTConfig, got {sorted(config)} ({error}). "
            "Pass the config stored in a kart checkpoint."
        ) from None
