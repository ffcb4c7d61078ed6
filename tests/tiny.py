"""Configs that train in a blink, for the tests of training and of runs."""

from kart.train import Config

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
