"""Recipes are the published numbers, and say where a config departs from them."""

import math

import pytest
import torch
from torch.testing import assert_close

from kart import optim, recipes, train
from kart.train import Config


def test_the_papers_recipe_is_its_table_5():
    config = recipes.config("paper", operator="G3B", model="vit_tiny", data="cifar10")
    assert config.peak_learning_rate == 5e-4 * 32 / 512
    assert (config.start_learning_rate, config.end_learning_rate) == (1e-6, 1e-5)
    assert (config.adam_eps, config.weight_decay, config.max_norm) == (1e-6, 0.05, 1.0)
    assert (config.warmup_epochs, config.epochs, config.batch_size) == (5, 100, 32)
    assert (config.ema, config.ema_warmup, config.eval_crop) == (0.99992, False, 0.9)
    assert (config.augment, config.image_size, config.patch_size) == ("paper", 224, 16)


def test_the_schedule_is_linear_warm_up_and_half_a_cosine():
    schedule = optim.warmup_cosine(5e-4, 50, 1000, 1e-6, 1e-5)
    for step in (0, 1, 25, 49, 50, 51, 500, 999, 1000):
        if step < 50:  # timm: warmup_lr + step * (base - warmup_lr) / warmup_t
            wanted = 1e-6 + step * (5e-4 - 1e-6) / 50
        else:  # timm, with warmup_prefix
            share = (step - 50) / 950
            wanted = 1e-5 + 0.5 * (5e-4 - 1e-5) * (1 + math.cos(math.pi * share))
        assert_close(float(schedule(torch.tensor(step))), wanted, rtol=1e-12, atol=0)


def test_without_warm_up_the_average_is_the_plain_recursion():
    average = optim.ema(0.9)
    params = {"a": torch.tensor([1.0, 2.0])}
    state, expected = average.init(params), params["a"].clone()
    for i in range(5):
        params = {"a": params["a"] + i}
        state = average.update(state, params)
        expected = 0.9 * expected + 0.1 * params["a"]
    assert_close(state.average["a"], expected)


def test_what_is_given_stands_over_the_recipe_and_is_named():
    config = recipes.config("small", epochs=30, operator="G3U")
    assert recipes.overridden(config) == {"epochs": 30} and config.recipe == "small"
    assert recipes.overridden(Config()) == {}
    assert Config.fromdict(config.asdict()) == config


def test_bad_recipes_and_fields_name_themselves():
    with pytest.raises(ValueError, match="Near: paper"):
        recipes.config("papr")
    with pytest.raises(ValueError, match=r"got \['paper'\]"):
        recipes.config(["paper"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Near: epochs"):
        recipes.config("paper", epoch=3)
    with pytest.raises(ValueError, match="smooths by 0.1 itself"):
        recipes.config("paper", label_smoothing=0.1)


def test_a_short_run_of_a_recipe_warms_up_for_half_of_itself_and_says_so():
    short = recipes.config("paper", epochs=1)
    assert recipes.overridden(short) == {"epochs": 1, "warmup_epochs": 0.5}
    assert recipes.overridden(recipes.config("paper", epochs=10)) == {"epochs": 10}
    with pytest.raises(ValueError, match="`warmup_epochs` <= epochs, 1, got 5"):
        recipes.config("paper", epochs=1, warmup_epochs=5.0)
    with pytest.raises(ValueError, match="`epochs`"):
        recipes.config("paper", epochs="1")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_trains(name):
    config = recipes.config(
        name, epochs=1, batch_size=8, learning_rate=1e-3, train_limit=16,
        image_size=16, patch_size=8, threads=1, operator="G2B", embed_dim=8, depth=1, num_heads=2,
    )  # fmt: skip
    splits = train.load_data(config)
    val = splits.val._replace(images=splits.val.images[:20], labels=splits.val.labels[:20])
    record = list(train.fit(config, train.Splits(splits.train, val)))[-1]
    assert math.isfinite(record["val_loss"])
    assert record["state"].params["pos_embed"].shape[-2] == 5
