"""Flags and configs that train in a blink and models of a few numbers, for the tests."""

import torch

from kart import tree
from kart.train import Config

CONVIT = {"image_size": 12, "patch_size": 4, "in_channels": 2, "num_classes": 5} | {
    "embed_dim": 8,
    "depth": 3,
    "num_heads": 4,
    "gated_blocks": 2,
}
SWIN = {"image_size": 32, "patch_size": 2, "in_channels": 2, "num_classes": 5} | {
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 3),
    "window_size": 4,
}


def over(flags, *given):
    """The arguments `flags` with those of `given` over them, which name flags of one value."""
    kept = list(flags)
    for word in given:
        if str(word).startswith("--") and word in kept:
            at = kept.index(word)
            del kept[at : at + 2]
    return [*kept, *given]


def drawn(model, size=0.3, dtype=torch.float64):
    """Parameters, all off their initialisation and none zero, and two images."""
    generator = torch.Generator().manual_seed(0)
    params = tree.map(
        lambda x: (x + size * torch.randn(x.shape, generator=generator)).to(dtype),
        model.init(generator),
    )
    c = model.config
    images = torch.randn(2, c.in_channels, c.image_size, c.image_size, generator=generator)
    return params, images.to(dtype)


ONE_BLOCK = Config(
    operator="G1B",
    epochs=2,
    batch_size=8,
    embed_dim=4,
    depth=1,
    num_heads=1,
    patch_size=4,
    rank=2,
    train_limit=24,
    threads=1,
)

TWO_BLOCKS = Config(
    operator="G2B",
    epochs=3,
    batch_size=8,
    embed_dim=8,
    depth=2,
    num_heads=2,
    patch_size=4,
    rank=3,
    train_limit=24,
    threads=1,
)
