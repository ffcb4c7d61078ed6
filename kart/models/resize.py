"""Parameters of a model for images of another size: positions and operators by bicubic."""

import math

from torch import Tensor

from kart import layers, operators, tree
from kart.models.model import Model, Params, find, place
from kart.operators.contract import check_params


def move(old: Model, new: Model, params: Params) -> Params:
    """The parameters of `new`, which is `old` for images of another size, from those of `old`.

    Learned positions are resized as timm does, with antialiasing on the way down; operators whose
    rows get another number of keys by `kart.operators.resize`. The attention of positions of a
    ConViT, of offsets in patches, keeps its reach in the picture. All else does not depend on the
    size. The windows of a Swin must stay, as its tables of relative positions belong to them.
    """
    before, after = (getattr(model.config, "windows", None) for model in (old, new))
    if before != after:
        raise ValueError(
            f"`resize` needs an `image_size` that keeps the windows, got {new.config.image_size} "
            f"with windows of {after} by stage, which were {before}: a window is no larger than "
            "the grid of its stage. Create and train a model of this size."
        )
    sides = old.config.side, new.config.side
    check_params("resize", params)
    if "pos_embed" in params:
        grids = [(side, side) for side in sides]
        moved = layers.resize_positions(params["pos_embed"], *grids)
        params = {**params, "pos_embed": moved}
    ratio = sides[0] / sides[1]

    def reaching(name: str, leaf: Tensor) -> Tensor:
        if not name.endswith(".attn.pos_proj.weight"):
            return leaf
        return leaf * leaf.new_tensor([ratio, ratio, ratio**2])

    params = tree.map_named(reaching, params)
    pairs = {was.path: (was, now) for was, now in zip(old.sites, new.sites, strict=True)}
    for path, (was, now) in pairs.items():
        # a state dict has nothing of an operator without parameters
        if was.tokens != now.tokens and was.operator.traits.get("learned", True):
            sizes = lattice(was.tokens), lattice(now.tokens)
            own = operators.resize(was.operator, find(params, path), *sizes)
            params = place(params, path, own)
    return params


def lattice(tokens: int) -> tuple[int, int, int]:
    """Keys as (tokens without a place, rows, columns) of a square of patches.

    >>> lattice(197), lattice(49)
    ((1, 14, 14), (0, 7, 7))
    """
    side = math.isqrt(tokens)
    return tokens - side * side, side, side
