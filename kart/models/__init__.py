"""Vision models with a swappable row operator: `create(name, operator=...)`.

Each model is a file that composes `blocks.py` and ends in its `FAMILY`; FAMILIES lists them.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from kart import code, operators, schema
from kart.models import resize as resizing
from kart.models.convit import FAMILY as CONVIT
from kart.models.convit import ConViTConfig
from kart.models.model import Choice, Family, Model, Params, Site
from kart.models.swin import FAMILY as SWIN
from kart.models.swin import SwinConfig
from kart.models.vit import FAMILY as VIT
from kart.models.vit import ViTConfig, vit
from kart.models.vitdet import FAMILY as VITDET
from kart.models.vitdet import ViTDetConfig
from kart.operators import Operator

__all__ = ["FAMILIES", "MODELS", "ConViTConfig", "Model", "Site", "SwinConfig", "ViTConfig"]
__all__ += [
    "ViTDetConfig",
    "classifies",
    "create",
    "from_config",
    "resize",
    "vit",
    "with_operators",
]

FAMILIES: dict[str, Family] = {
    family.config.family: family for family in (VIT, SWIN, CONVIT, VITDET)
}
MODELS: dict[str, Mapping[str, Any]] = {
    name: sizes for family in FAMILIES.values() for name, sizes in family.sizes.items()
}


def create(name: str, operator: Choice = "softmax", **overrides: Any) -> Model:
    """A model by name, one of MODELS: "vit_tiny", "vit_small", ...

    `operator` is a spec string (see `kart.operators.parse`), an Operator, one of either per block,
    or those of all blocks as "softmax|...|G3B". `overrides` are the fields of the model's config,
    of `ViTConfig` for "vit_tiny": image_size, patch_size, in_channels, num_classes, embed_dim,
    depth, num_heads, mlp_ratio, sharing ("blockwise" or "universal"), and the options that a spec
    leaves open: rank, project, base.

    >>> model = create("vit_tiny", operator="G3B", image_size=32, patch_size=4, depth=2)
    >>> model.config.tokens, model.config.sharing
    (65, 'blockwise')
    """
    operator = each_block(operator, name, **overrides)
    each = operator if isinstance(operator, list | tuple) else [operator]
    # an Operator is a tuple itself
    if not isinstance(operator, Operator) and not all(isinstance(x, str | Operator) for x in each):
        raise ValueError(
            f"`create` needs `operator` to be a spec, an Operator or one of either a block, got "
            f"{operator!r:.100}. Pass for example 'G3B'."
        )
    found = [f for f in FAMILIES.values() if isinstance(name, str) and name in f.sizes]
    if not found:
        near = schema.near_matches(name, MODELS)
        raise ValueError(f"`create` needs a model name in {list(MODELS)}, got {name!r}.{near}")
    fields = {f.name for f in dataclasses.fields(found[0].config) if f.init} - {"operator"}
    unknown = sorted(set(overrides) - fields)
    if unknown:
        near = schema.near_matches(unknown[0], fields)
        raise ValueError(f"`create` needs overrides among {sorted(fields)}, got {unknown}.{near}")
    hints = typing.get_type_hints(found[0].config)
    for field, value in overrides.items():
        optional = value is None and field == "sharing"  # left to the spec
        if field in hints and not optional:
            schema.check_type("create", field, value, hints[field])
    return found[0].build(operator, **{**found[0].sizes[name], **overrides})


def classifies(name: str) -> bool:
    """Whether models called `name` give logits of classes, and not maps as detectors take them.

    >>> classifies("swin_tiny"), classifies("vitdet_tiny")
    (True, False)
    """
    return any(hasattr(f.config, "num_classes") for f in FAMILIES.values() if name in f.sizes)


def each_block(operator: Any, name: str, **sizes: Any) -> Any:
    """`operator` as the model `name` of `sizes` takes it: a spec of all blocks, "softmax|...|G3B",
    as one a block (see `operators.each_block`), anything else as it is.
    """
    if not isinstance(operator, str) or not isinstance(name, str) or name not in MODELS:
        return operator
    field = "depths" if "depths" in MODELS[name] else "depth"
    given = sizes.get(field)
    size = MODELS[name][field] if given is None else given
    parts = size if isinstance(size, list | tuple) else [size]
    if not all(isinstance(x, int) for x in parts):
        return operator  # the config says what is wrong with it
    return operators.each_block(operator, sum(parts))


def from_config(config: Mapping[str, Any]) -> Model:
    """The model whose `dataclasses.asdict(model.config)` is `config`, as checkpoints store it.

    A config without `family`, as kart wrote them before there was more than one, is a ViT's. Code
    of one's own that its `operator` names is not run: see `kart.code.use`.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"`from_config` needs the config of a model as a dict, got {type(config).__name__}. "
            "Pass the config stored in a kart checkpoint."
        )
    fields = dict(config)
    family = FAMILIES.get(str(fields.pop("family", "vit")))
    if family is None:
        raise ValueError(
            f"`from_config` needs a `family` in {list(FAMILIES)}, got {config['family']!r}. "
            "The config was written by another version of kart."
        )
    try:
        return family.build(code.stored(fields.pop("operator")), **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"`from_config` needs the fields of {family.config.__name__}, got {sorted(config)} "
            f"({error}). Pass the config stored in a kart checkpoint."
        ) from None


def with_operators(model: Model, chosen: Operator | Sequence[Operator], **fields: Any) -> Model:
    """`model` with other row operators, one for all blocks or one a block; `fields` of its config
    change with them.

    >>> from kart import operators
    >>> model = with_operators(create("vit_nano"), operators.static())
    >>> model.operators[0].name, model.config.depth
    ('static', 4)
    """
    config = model.config
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    # the operators are there, so what chose them is not asked again
    for name in ("operator", "rank", "project", "base"):
        del kept[name]
    return FAMILIES[config.family].build(chosen, **{**kept, **fields})


def resize(model: Model, params: Params, image_size: int) -> tuple[Model, Params]:
    """`model` and `params` for square images of another size.

    Positions are resized bicubically (with antialiasing, as timm does), operators by
    `kart.operators.resize`, and a ConViT's attention of positions keeps its reach in the picture,
    where timm keeps it in patches; the patch size stays, so there are more or fewer patches. The
    same size is the identity to the bit. A Swin keeps its parameters, as its windows have fixed
    sizes; sizes that make a window larger or smaller are refused.

    >>> import torch
    >>> model = create("vit_nano", image_size=32, patch_size=4, num_classes=10)
    >>> params = model.init(torch.Generator().manual_seed(0))
    >>> model, params = resize(model, params, image_size=48)
    >>> model.config.image_size, params["pos_embed"].shape
    (48, torch.Size([1, 145, 64]))
    """
    config = model.config
    if image_size == config.image_size:
        return model, params
    names = {name: getattr(config, name) for name in ("operator", "rank", "project", "base")}
    single = isinstance(names["operator"], str)
    chosen = model.operators[0] if single else model.operators
    new = with_operators(model, chosen, image_size=image_size)
    new = new._replace(config=dataclasses.replace(new.config, **names))
    return new, resizing.move(model, new, params)
