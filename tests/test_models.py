"""The vision transformer: paper counts, sharing, placement, intermediates, dtypes, bad input."""

import copy
import dataclasses
import io
import json
import pickle

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from kart import bases, checkpoint, layers, models, operators, testing, tree
from tests.tiny import CONVIT, SWIN, drawn

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10} | {
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
}


def small(operator="G2B", **overrides):
    return models.create("vit_tiny", operator=operator, **{**SMALL, **overrides})


def start(model, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    config = model.config
    params = tree.to(model.init(generator), dtype)
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    return params, torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "operator",
    [
        *("softmax", "G2B", "G2U", "2*softmax+G1B", "morlet-U"),
        *("cosformer", "performer:width=4", "linformer", "G2B+cosformer+softmax"),
    ],
)
def test_intermediates_agree_with_apply(operator):
    model = small(operator)
    params, images = start(model)
    aux = model.intermediates(params, images)
    assert_close(aux["logits"], model.apply(params, images))
    for i in range(2):
        assert aux[f"blocks.{i}.scores"].shape == (2, 3, 5, 5)
        assert aux[f"blocks.{i}.weights"].shape == (2, 3, 5, 5)
        assert aux[f"blocks.{i}.tokens"].shape == (2, 5, 12)


@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U"])
def test_any_leading_axes_and_vmap_over_examples(operator):
    model = small(operator)
    params, images = start(model)
    logits = model.apply(params, images)
    assert logits.shape == (2, 10)
    assert_close(model.apply(params, images[0]), logits[0])
    assert_close(model.apply(params, images[None, :, None])[0, :, 0], logits)
    assert_close(vmap(model.apply, (None, 0))(params, images), logits)


def test_the_one_block_of_a_list_of_one_shares_with_itself():
    listed, plain = (small(spec, depth=1) for spec in ("G2U|...", "G2U"))
    params, images = start(plain)
    assert_close(listed.apply(params, images), plain.apply(params, images), rtol=0, atol=0)


def test_universal_is_blockwise_with_tied_operators_and_its_gradient_the_sum():
    universal, blockwise = small("G2U"), small("G2B")
    params, images = start(universal)
    tied = {name: value for name, value in params.items() if name != "operator"}
    tied["blocks"] = {i: {**b, "operator": params["operator"]} for i, b in params["blocks"].items()}
    assert_close(universal.apply(params, images), blockwise.apply(tied, images))

    one = grad(lambda p: universal.apply(p, images).square().sum())(params)["operator"]
    each = grad(lambda p: blockwise.apply(p, images).square().sum())(tied)["blocks"]
    total = tree.map(torch.add, each["0"]["operator"], each["1"]["operator"])
    tree.map(assert_close, one, total)


def test_models_that_differ_in_the_operator_start_from_one_backbone():
    backbones = []
    for operator in ("softmax", "G2B", "G2U", "polynomial-0B"):
        named = tree.named(small(operator).init(torch.Generator().manual_seed(3)))
        backbones.append({k: v for k, v in named.items() if "operator" not in k.split(".")})
    for other in backbones[1:]:
        assert other.keys() == backbones[0].keys()
        assert all(torch.equal(other[name], backbones[0][name]) for name in other)


def test_softmax_base_starts_as_the_softmax_model_and_takes_its_weights():
    plain, added = small("softmax"), small("G2B:base=softmax")
    params, images = start(plain, torch.float32)
    moved = checkpoint.from_timm(added, tree.named(params))
    assert_close(added.apply(moved, images), plain.apply(params, images))


def test_one_operator_a_block():
    model = small(["softmax", "G2B"])
    params, images = start(model)
    assert "units" not in params["blocks"]["0"]["operator"]
    assert "units" in params["blocks"]["1"]["operator"]
    assert model.apply(params, images).isfinite().all()
    assert model.config.operator == ("softmax", "G2B")


def test_an_operator_of_ones_own():
    model = small(operators.parse("G2").operator, sharing="universal")
    assert "operator" in model.init(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "operator",
    [
        operators.relative(base="softmax")._replace(traits={}),
        operators.hybrid([operators.softmax(), operators.relative(base="softmax")]),
        operators.parse("G1B", base="softmax").operator,
        operators.low_rank(bases.fourier(1), 2)._replace(name="G1B"),
        operators.from_rows("softmax", lambda scores, mask: scores.relu()),
        operators.softmax()._replace(attend=lambda params, q, k, v, mask=None: v),
    ],
)
def test_a_config_of_an_operator_is_not_that_of_another(operator):
    model = models.create("vit_nano", operator, image_size=8, patch_size=4, num_classes=3)
    with pytest.raises(ValueError, match="there is no operator"):
        models.from_config(dataclasses.asdict(model.config))


@pytest.mark.parametrize(
    "operator",
    [
        operators.relative(),
        operators.hybrid([operators.softmax(), operators.relative()]),
        operators.parse("G1B:base=softmax,rank=2").operator,
        operators.relative("softmax", prefix=1),
        operators.static(signed=False, base=None),
        operators.linformer(rank=2),
        operators.gated(locality=0.5),
    ],
)
def test_a_config_of_an_operator_that_is_a_spec_makes_it_again(operator):
    model = models.create("vit_nano", operator, image_size=8, patch_size=4, num_classes=3)
    again = models.from_config(dataclasses.asdict(model.config))
    params = tree.map(lambda x: x + 0.1, model.init(torch.Generator().manual_seed(0)))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.apply(params, images), again.apply(params, images))


def test_config_rebuilds_the_model():
    model = small("G3U", rank=4)
    again = models.from_config(dataclasses.asdict(model.config))
    assert again.config == model.config and again.config.sharing == "universal"
    params, images = start(model)
    assert_close(again.apply(params, images), model.apply(params, images))
    with pytest.raises(ValueError, match="fields of ViTConfig"):
        models.from_config({"depth": 3})
    with pytest.raises(
        ValueError, match="`family` in .'vit', 'swin', 'convit', 'vitdet'., got 'vi'"
    ):
        models.from_config({"family": "vi", "operator": "softmax"})


def test_a_config_from_before_there_were_families_is_a_vits():
    model = small("G3U")
    fields = dataclasses.asdict(model.config)
    assert fields.pop("family") == "vit"
    assert models.from_config(fields).config == model.config


def test_every_model_is_known_by_its_name_and_comes_back_from_its_config():
    for name in models.MODELS:
        model = models.create(name)
        again = models.from_config(json.loads(json.dumps(dataclasses.asdict(model.config))))
        assert again.config == model.config and len(again.sites) == model.config.depth


# small ones of the other families, and what makes the kit's smaller
OTHERS = {
    "convit_tiny": (CONVIT, {"image_size": 8, "depth": 2, "gated_blocks": 1}),
    "swin_tiny": (
        SWIN,
        {"image_size": 8, "depths": (2, 1), "window_size": 2, "embed_dim": 6, "num_heads": (2, 2)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_kit_finds_nothing_in_other_families(name):
    fields, smaller = OTHERS[name]
    model = models.create(name, operator="G2B:rank=3", **{**fields, **smaller})
    results = testing.check_model(model, max_examples=2)
    assert [result for result in results if result.passed is False] == []
    assert sum(result.passed is True for result in results) >= 10


@pytest.mark.parametrize("name", OTHERS)
def test_small_configs_of_other_families_come_back_from_json(name):
    model = models.create(name, operator="G2U", rank=3, **OTHERS[name][0])
    again = models.from_config(json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config


def test_bfloat16_images_compute_in_bfloat16_near_float32():
    model = small("G2B")
    params, images = start(model, torch.float32)
    exact = model.apply(params, images)
    rough = model.apply(params, images.bfloat16())
    assert_close(rough.float(), exact, rtol=0.1, atol=0.02)
    grads = grad(lambda p: model.apply(p, images.bfloat16()).float().square().sum())(params)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in tree.leaves(grads))


def test_the_global_seed_is_neither_read_nor_set():
    before = torch.random.get_rng_state()
    first = small().init(torch.Generator().manual_seed(1))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    second = small().init(torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), first, second)
    torch.random.set_rng_state(before)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"patch_size": 3}, "`image_size` divisible by `patch_size`"),
        ({"num_heads": 5}, "`embed_dim` divisible by `num_heads`"),
        ({"depth": 0}, "`depth` >= 1"),
        ({"rank": 0}, "`rank` >= 1"),
        ({"sharing": "everywhere"}, '"blockwise" or "universal"'),
        ({"sharing": "universal"}, "one way of sharing"),
        ({"operator": ["G2B"] * 3}, "one for each of 2 blocks, got 3"),
        ({"operator": ["G2U"] * 2}, "one operator for universal sharing"),
        ({"mlp_ratio": 0.0}, "`mlp_ratio` > 0"),
        ({"mlp_ratio": 0.01}, "an MLP of one hidden value or more, got none with `mlp_ratio` 0.01"),
        ({"embed": 3}, "embed_dim"),
        ({"depth": 10**30}, "`depth` <= 2147483647, got an integer of 31 digits"),
        ({"embed_dim": 3 * 10**6}, "GiB, most of them in the blocks"),
        ({"depth": 10**9}, "GiB, most of them in the blocks"),
        ({"num_classes": 2 * 10**9, "embed_dim": 192}, "most of them in the classifier"),
        ({"image_size": 4 * 10**6}, "most of them in the positions"),
        ({"mlp_ratio": "4"}, "`mlp_ratio` of type float, got '4'"),
        ({"embed_dim": 12.0}, "`embed_dim` of type int, got 12.0"),
        ({"operator": "G2X"}, "Near matches"),
    ],
)
def test_bad_configurations_say_what_is_wrong(overrides, words):
    with pytest.raises(ValueError, match="needs") as caught:
        small(**overrides)
    assert words in str(caught.value)


def test_bad_names_and_images_say_what_is_wrong():
    with pytest.raises(ValueError, match="Near matches: vit_tiny"):
        models.create("vit_tinny")
    model = small()
    params, images = start(model)
    with pytest.raises(ValueError, match="floating-point images"):
        model.apply(params, images.to(torch.uint8))
    with pytest.raises(ValueError, match="floating-point images, got ndarray of float64"):
        model.apply(params, images.numpy())
    with pytest.raises(ValueError, match="1, 8, 8"):
        model.apply(params, images[..., :7])


# --- images of another size -----------------------------------------------------------------------

SIZES = {
    "vit_tiny": {"depth": 2, "embed_dim": 12, "num_heads": 3, "patch_size": 4},
    "convit_tiny": {"depth": 2, "embed_dim": 8, "num_heads": 4, "patch_size": 4}
    | {"gated_blocks": 1},
    "vitdet_tiny": {"depth": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 4}
    | {"window_size": 2, "global_blocks": (1,), "pyramid_dim": 4},
    "swin_tiny": {"depths": (2, 1), "embed_dim": 6, "num_heads": (2, 2), "patch_size": 2}
    | {"window_size": 4},
}


@pytest.mark.parametrize("operator", ["softmax", "G2B:rank=3", "G2U:rank=3", "own"])
@pytest.mark.parametrize("name", SIZES)
def test_resizing_fits_every_leaf_and_keeps_what_has_no_size(name, operator):
    given = operators.parse("G2").operator if operator == "own" else operator
    model = models.create(name, operator=given, image_size=16, in_channels=2, **SIZES[name])
    params, images = start(model)
    assert models.resize(model, params, image_size=16) == (model, params)
    larger, moved = models.resize(model, params, image_size=32)
    assert larger.config == dataclasses.replace(model.config, image_size=32)
    wanted = tree.named(larger.init(torch.Generator().manual_seed(0)))
    found, before = tree.named(moved), tree.named(params)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in wanted.items()}
    changed = {k for k in found if found[k] is not before[k]}
    # of a ConViT, whose offsets are in patches
    reach = {k for k in found if k.endswith(".attn.pos_proj.weight")}
    assert bool(reach) == name.startswith("convit")
    assert all(k == "pos_embed" or "operator" in k.split(".") for k in changed - reach)
    assert changed == reach | {k for k in found if found[k].shape != before[k].shape}
    generator = torch.Generator().manual_seed(1)
    outputs = larger.apply(moved, torch.randn(2, 2, 32, 32, generator=generator).double())
    assert all(x.isfinite().all() for x in tree.leaves(outputs))


def test_resized_positions_and_operators_are_those_of_their_rooms():
    model = small("G2B", image_size=16)
    params, _ = start(model)
    _, moved = models.resize(model, params, image_size=8)
    wanted = layers.resize_positions(params["pos_embed"], (4, 4), (2, 2))
    assert torch.equal(moved["pos_embed"], wanted)
    for i, op in enumerate(model.operators):
        own = params["blocks"][str(i)]["operator"]
        wanted = operators.resize(op, own, (1, 4, 4), (1, 2, 2))
        tree.map(
            lambda a, b: assert_close(a, b, rtol=0, atol=0),
            moved["blocks"][str(i)]["operator"],
            wanted,
        )


def test_up_and_down_again_loses_little_of_smooth_positions():
    model = small("softmax", image_size=32)
    params, _ = start(model)
    place = (torch.arange(8.0).double() + 0.5) / 8
    waves = torch.cos(torch.pi * torch.arange(12) * place[:, None] / 8)
    smooth = (waves[:, None] * waves).reshape(1, 64, 12)
    params["pos_embed"] = torch.cat([params["pos_embed"][:, :1], smooth], dim=1)
    larger, up = models.resize(model, params, image_size=64)
    _, back = models.resize(larger, up, image_size=32)
    assert_close(back["pos_embed"], params["pos_embed"], rtol=0, atol=0.05)


def test_sizes_that_do_not_fit_are_refused():
    model = small()
    params, _ = start(model)
    with pytest.raises(ValueError, match="`image_size` divisible by `patch_size`, got 10 and 4"):
        models.resize(model, params, image_size=10)
    swin = models.create("swin_tiny", image_size=16, **SIZES["swin_tiny"])
    params = swin.init(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"keeps the windows, got 8 with windows of \(4, 2\)"):
        models.resize(swin, params, image_size=8)


def saved(x):
    """As a file of `torch.save` brings it back."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, saved, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("name", SIZES)
def test_models_pickle_and_deepcopy(name, duplicate):
    sizes = {"image_size": 16, "in_channels": 2, **SIZES[name]}
    model = models.create(name, operator="sigmoid", sharing="universal", **sizes)
    params, images = start(model)
    larger, moved = models.resize(model, params, image_size=32)
    for one, own, batch in ((model, params, images), (larger, moved, images.repeat(1, 1, 2, 2))):
        again = duplicate(one)
        assert again.config == one.config
        wanted, found = one.apply(own, batch), again.apply(own, batch)
        assert all(map(torch.equal, tree.leaves(wanted), tree.leaves(found)))
    assert copy.deepcopy(small("G2U")).config == small("G2U").config
    mixed = models.create("vit_tiny", operator=["softmax", operators.relu()], **SMALL)
    assert duplicate(mixed).config == mixed.config


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vit", {"depth": 3}, "3 blocks for 2 at 'blocks'"),
        ("vit", {"depth": 1}, "1 blocks for 2 at 'blocks'"),
        ("vit", {"operator": "G2U"}, "no 'blocks.1.operator'"),
        ("vit", {"operator": "G2B"}, "`softmax` has no parameters, got units, mix, which"),
        ("convit", {"operator": "softmax", "sharing": "universal"}, "no 'blocks.2.operator'"),
        ("convit", {"depth": 4}, "4 blocks for 3 at 'blocks'"),
        ("vit", {"image_size": 12}, "a `pos_embed` of 5 tokens, got one of 10, for images"),
        ("convit", {"image_size": 4}, "a `pos_embed` of 9 tokens, got one of 1, for images"),
        ("swin", {"depths": (2, 3)}, "3 blocks for 2 at 'layers.1.blocks'"),
        ("swin", {"operator": "G2B"}, "`softmax` has no parameters, got units, mix, which"),
    ],
)
def test_parameters_of_another_model_are_named(name, changes, words):
    sizes = {"convit": CONVIT, "swin": SWIN, "vit": SMALL}[name]
    model = models.create(f"{name}_tiny", **sizes)
    other = models.create(f"{name}_tiny", **{**sizes, **changes})
    params, _ = drawn(other)
    _, images = drawn(model)
    with pytest.raises(ValueError, match=words):
        model.apply(params, images)
    with pytest.raises(ValueError, match=words):
        model.intermediates(params, images)
