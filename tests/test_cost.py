"""Counts of parameters, FLOPs and kept memory against the paper, real models and measurement."""

import functools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kart import cli, models, operators, tree
from kart.analysis import cost, roofline
from tests.tiny import drawn

TINY = {"image_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
OPERATORS = ["softmax", "G3B", "G3U", "G2B:order=full_rank", "morlet-B", "2*softmax+G1B"]
OPERATORS += [
    "static",
    "static-U:rank=4",
    "softconv",
    "G2:order=by_offset",
    "tempered",
    "linformer",
]
OPERATORS += ["G2B:order=beside_relative", "synthesizer:width=16", "performer:width=16", "gated"]


@pytest.mark.parametrize("row", cost.PAPER, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_papers_tables(row):
    name, operator, classes, total, learned, activation, gflops, _ = row
    spec = operator if operator == "softmax" else f"{operator}:scales=true"
    model = models.create(name, operator=spec, num_classes=classes)
    counted = cost.parameters(model)
    assert abs(counted.total / 1e6 - total) < 0.006
    assert abs(counted.operator / 1e6 - learned) < 0.006
    found = cost.flops(model)
    assert found.total / 1e9 == pytest.approx(gflops, rel=0.01)
    assert abs(found.activation / 1e9 - activation) < 0.0015


@pytest.mark.parametrize("operator", OPERATORS)
def test_counted_parameters_are_those_of_the_model(operator):
    model = models.create("vit_tiny", operator=operator, **TINY)
    params = model.init(torch.Generator().manual_seed(0))
    counted = cost.parameters(model)
    assert counted.total == tree.size(params)
    own = [x.numel() for name, x in tree.named(params).items() if "operator" in name.split(".")]
    assert counted.operator == sum(own)


def test_flops_by_hand():
    model = models.create(
        "vit_tiny", operator="softmax", image_size=4, patch_size=2, in_channels=1, num_classes=3,
        embed_dim=2, depth=1, num_heads=1,
    )  # fmt: skip
    # 5 tokens; 4 patches of 4 pixels to width 2; linear 5 (4 * 4 + 2 * 2 * 8); two of 25 * 2
    assert cost.flops(model) == cost.Flops(32, 240, 100, 75, 150, 6)
    assert cost.flops(model).total == 603


# 5 tokens, heads of 2 numbers: 25 pairs, 50 multiply-accumulates a product with q, k or v
@pytest.mark.parametrize(
    ("operator", "attention", "activation"),
    [
        ("static", 50, 0),
        ("static:rank=3", 2 * 5 * 3 * 2, 0),
        ("static:rank=3,normalise=softmax", 50, 25 * (3 + 3)),
        ("static:signed=false", 50, 25 * 2),
        ("relative", 50, 0),
        ("softconv", 100, 25 * 4),
        ("relative:inside=true", 100, 25 * 4),
        ("G2:order=by_offset", 100, 25 * (6 + 1)),
        ("G2:order=by_offset,base=softmax", 100, 25 * (6 + 1 + 4)),
        ("G2:order=beside_relative,rank=3", 100, 25 * ((6 + 1) * 3 + 5)),
        ("entmax", 100, 25 * 8),
        ("tempered", 100, 25 * 4),
        ("gated", 100, 25 * 11),
        ("synthesizer:width=2", 5 * 2 * 2 + 50 + 50, 25 * 3),
        ("synthesizer:width=2,base=softmax", 5 * 2 * 2 + 50 + 50 + 50, 25 * 7),
        ("linformer:rank=3", 4 * 5 * 3 * 2, 3 * 5 * 3),
        ("performer:width=2,features=3", 4 * 5 * 3 * 2, 6 * 5 * 3),
        ("cosformer", 4 * 5 * 2 * 2 + 8 * 5 * 2, 0),
    ],
)
def test_flops_of_an_operator_that_says_them(operator, attention, activation):
    model = models.create(
        "vit_tiny", operator=operator, image_size=4, patch_size=2, in_channels=1, num_classes=3,
        embed_dim=2, depth=1, num_heads=1,
    )  # fmt: skip
    assert cost.flops(model) == cost.Flops(32, 240, attention, activation, 150, 6)


# every family, in sizes where windows shift (swin), are padded (vitdet: 12 in windows of 5) and are
# the whole grid (the last stage of swin, the global block of vitdet)
SMALL = {
    "vit_tiny": TINY,
    "swin_nano": {"image_size": 32, "num_classes": 7, "window_size": 4, "in_channels": 2},
    "convit_tiny": {"image_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 3}
    | {"gated_blocks": 2, "num_classes": 7},
    "vitdet_tiny": {"image_size": 96, "patch_size": 8, "embed_dim": 24, "depth": 3}
    | {"window_size": 5, "global_blocks": (1,), "pyramid_dim": 10},
}


def multiplied(model, look=True):
    """Multiply-accumulates of the products of one image, as torch counts them."""
    c = model.config
    generator = torch.Generator().manual_seed(0)
    params = model.init(generator)
    images = torch.randn(1, c.in_channels, c.image_size, c.image_size, generator=generator)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (model.intermediates if look else model.apply)(params, images)
    return counter.get_total_flops() // 2


def beside_products(model, found):
    """What is counted and is no product: norms, and the softmax of a ConViT's positions."""
    gated, n = getattr(model.config, "gated_blocks", 0), model.config.tokens - 1
    return found.norms + 3 * gated * model.sites[0].heads * n * n


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("operator", ["softmax", "G2B", "full", "softmax+static"])
def test_flops_of_every_family_are_those_that_torch_counts(name, operator):
    spec = "polynomial-2B:order=full_rank" if operator == "full" else operator
    sizes = SMALL[name]
    if operator == "softmax+static":
        # one a block, in turn
        depth = models.create(name, **sizes).config.depth
        spec = ["softmax", "static"] * (depth // 2) + ["softmax"] * (depth % 2)
    model = models.create(name, operator=spec, **sizes)
    found = cost.flops(model)
    wanted = found.total - beside_products(model, found)
    # who looks computes the positions of a ConViT again
    wanted += getattr(model.config, "gated_blocks", 0) * 3 * 4 * 9**2
    for site in model.sites:
        pairs = site.windows * site.heads * site.tokens**2
        if site.biased:
            # the bias goes with the queries, so that scores are products of d + M numbers
            wanted += pairs * site.tokens
        if site.operator.name == "static":
            # scores are looked at, too
            wanted += pairs * site.width
        elif site.operator.name == "softmax":
            wanted -= 3 * pairs
        elif operator == "G2B":
            # a harmonic of a unit is no product
            wanted -= 2 * 12 * pairs
    assert multiplied(model) == wanted


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("operator", ["static", "static:rank=3"])
def test_flops_of_what_takes_no_scores_are_those_of_the_model_itself(name, operator):
    # under the masks of a shift a matrix of low rank is built, which is not counted
    unshifted = {"window_size": 8} if name == "swin_nano" and "rank" in operator else {}
    model = models.create(name, operator=operator, **{**SMALL[name], **unshifted})
    found = cost.flops(model)
    assert multiplied(model, look=False) == found.total - beside_products(model, found)


def test_flops_of_windows_by_hand():
    # 4 patches a side in 4 windows of 2, shifted in the second block, then one of 2 x 2
    model = models.create(
        "swin_tiny", image_size=4, patch_size=1, in_channels=1, num_classes=3, embed_dim=2,
        depths=(2, 1), num_heads=(1, 2), window_size=2,
    )  # fmt: skip
    assert [site.windows for site in model.sites] == [4, 4, 1]
    assert cost.flops(model) == cost.Flops(
        embed=16 * 2,
        # blocks of 16 tokens of width 2 and of 4 of width 4, and 4 times 8 numbers to 4
        linear=2 * 16 * 12 * 2**2 + 4 * 12 * 4**2 + 4 * 8 * 4,
        # windows, heads, pairs, width, twice
        attention=2 * (4 * 1 * 16 * 2 * 2) + 1 * 2 * 16 * 2 * 2,
        activation=3 * (2 * 4 * 16 + 2 * 16),
        norms=5 * (16 * 2 + 2 * 2 * 16 * 2 + 4 * 8 + 2 * 4 * 4 + 4 * 4),
        head=4 * 3,
    )


def test_padded_windows_count_whole():
    sizes = {**SMALL["vitdet_tiny"], "depth": 1, "global_blocks": ()}
    padded = cost.flops(models.create("vitdet_tiny", **sizes))
    # 12 patches a side are 9 windows of 5, as 14 are
    more = cost.flops(models.create("vitdet_tiny", **{**sizes, "image_size": 112}))
    assert padded.attention == more.attention == 9 * 3 * 25**2 * 8 * 2
    assert padded.activation == more.activation
    assert padded.linear == 225 * 4 * 24**2 + 144 * 8 * 24**2 < more.linear


# multiply-accumulates of products, as torch counts them of timm 1.0.31's models without fused
# attention; ConViT there mixes weights, where kart mixes outputs, a product more a gated block
TIMM = {
    "vit_tiny": 1_253_683_200,
    "vit_small": 4_598_882_304,
    "swin_tiny": 4_490_566_656,
    "convit_tiny": 1_252_360_320 + 10 * 4 * 196**2 * 48,
}


@pytest.mark.parametrize("name", TIMM)
def test_flops_of_known_sizes_are_those_of_timms_models(name):
    model = models.create(name)
    found = cost.flops(model)
    products = found.total - found.activation - beside_products(model, found)
    assert products == TIMM[name]


def test_what_takes_biased_queries_and_keys_is_not_counted(capsys):
    spec = "cosformer"
    model = models.create("swin_nano", operator=spec, image_size=32)
    with pytest.raises(ValueError, match="`flops` needs operators.*cosformer takes queries"):
        cost.flops(model)
    assert cost.flops(models.create("vitdet_tiny", operator=spec, **SMALL["vitdet_tiny"])).total
    argv = ["info", "--model", "swin_nano", "--image-size", "32", "--operator", spec]
    assert cli.main(argv) == 0
    assert "not counted: cosformer takes queries and keys" in capsys.readouterr().out


def test_flops_of_heads_that_differ_and_of_sums():
    parts = [operators.softmax(), operators.relative()]
    for op in (operators.hybrid(parts), operators.added(parts)):
        assert cost.product_flops(op, 2 if op.options["kind"] == "hybrid" else 1, 5, 2) == 150
        assert cost.activation_flops(op, 1, 5) == 75


def test_what_is_not_known_of_an_operator_is_said():
    for spec in ("G3B:order=elementwise", "softmax+G3B:order=by_distance"):
        with pytest.raises(ValueError, match="as a trait, got 'G3B:order=(elementwise|by_dist)"):
            cost.activation_flops(operators.parse(spec).operator, 2, 17)
    with pytest.raises(ValueError, match="learned units, got 'softmax'"):
        cost.unit_flops(operators.softmax())


KEPT = [
    *("softmax", "sparsemax", "G3B", "G3U", "G1B:rank=24", "G2B:scales=true", "bspline-G4B"),
    *("rational-2/1B", "G3B:base=softmax", "G3B:project=simplex", "G2B:order=full_rank"),
    *("G2B:order=project_first", "G2B:order=two_stage", "softmax+2*G3B", "2*softmax+G3B"),
    # where attention meets its projections first
    *("G1B:rank=3", "G1U:rank=3"),
]


def test_what_the_result_does_not_depend_on_is_not_kept():
    x = torch.randn(64, 64, requires_grad=True)

    def call():
        _ = x.exp() * x.cos()
        return x.sin()

    assert cost.kept_bytes(call) == x.nbytes


@pytest.mark.parametrize("form", ["streamed", "naive"])
@pytest.mark.parametrize("operator", KEPT)
def test_counted_memory_is_what_a_step_keeps(operator, form):
    model = models.create("vit_tiny", operator=operator, **TINY)
    counted = cost.activation_memory(model, 8, form)
    if form == "naive":

        def attend(op, params, q, k, v, mask=None):
            return op.weights(params, q @ k.mT * q.shape[-1] ** -0.5) @ v

        def materialised(op):
            if op.options["kind"] != "hybrid":
                return op._replace(attend=functools.partial(attend, op))
            parts = [(materialised(part), count) for part, count in op.options["groups"]]
            return operators.hybrid([part for part, count in parts for _ in range(count)])

        blocks = [materialised(op) for op in model.operators]
        one = model.config.sharing == "universal"
        options = {**models.MODELS["vit_tiny"], **TINY, "sharing": model.config.sharing}
        model = models.vit(blocks[0] if one else blocks, **options)
    params = tree.map(lambda x: x.requires_grad_(), model.init(torch.Generator().manual_seed(0)))
    weights = sum(x.numel() * 4 for x in tree.leaves(params))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = cost.kept_bytes(lambda: model.apply(params, images)) - weights
    assert counted == pytest.approx(kept, rel=0.04)


@pytest.mark.parametrize("operator", ["softmax", "G3B", "rational-2/1B", "softmax+2*G3B"])
def test_blocks_that_are_computed_again_keep_their_inputs_and_one_of_them_all(operator):
    fields = {**TINY, "depth": 4, "recompute": True}
    model = models.create("vit_tiny", operator=operator, **fields)
    params = tree.map(lambda x: x.requires_grad_(), model.init(torch.Generator().manual_seed(0)))
    weights = sum(x.numel() * 4 for x in tree.leaves(params))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = cost.kept_bytes(lambda: model.apply(params, images)) - weights
    shallow, deep = (
        cost.activation_memory(models.create("vit_tiny", operator, **{**TINY, "depth": depth}), 8)
        for depth in (1, 2)
    )
    assert cost.activation_memory(model, 8) == pytest.approx(kept + deep - shallow, rel=0.04)


def test_the_naive_form_keeps_what_the_paper_complains_of():
    model = models.create("vit_tiny", operator="G3B")
    softmax = models.create("vit_tiny")
    naive = cost.activation_memory(model, 32, "naive") / cost.activation_memory(softmax, 32)
    streamed = cost.activation_memory(model, 32) / cost.activation_memory(softmax, 32)
    assert naive > 2.3 and streamed < 1.05
    with pytest.raises(ValueError, match='"streamed" or "naive"'):
        cost.activation_memory(model, 1, "other")


def test_other_families_are_counted_by_drawing():
    blockwise, plain = (
        models.create("swin_nano", operator=o, image_size=32) for o in ("G3B", "softmax")
    )
    counted, bare = cost.parameters(blockwise), cost.parameters(plain)
    # 7 numbers a pair of unit and key at rank 12, 16 keys, and 1 + 1 + 2 + 2 heads
    assert counted.operator == 7 * 12 * 16 * 6 == counted.total - bare.total
    with pytest.raises(ValueError, match="needs a ViT.*\"naive\", got .* family 'swin'"):
        cost.activation_memory(blockwise, 2, "naive")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("swin_nano", "softmax"),
        ("swin_nano", "G3B"),
        ("convit_nano", "G1B"),
        ("vitdet_tiny", "G1B"),
    ],
)
def test_memory_of_other_families_is_what_a_step_keeps(name, operator, dtype):
    sizes = {"image_size": 32, "patch_size": 4}
    sizes |= {"embed_dim": 48, "depth": 2, "window_size": 4} if name == "vitdet_tiny" else {}
    sizes |= {"global_blocks": (1,)} if name == "vitdet_tiny" else {}
    model = models.create(name, operator=operator, **sizes)
    params = tree.map(lambda x: x.requires_grad_(), model.init(torch.Generator().manual_seed(0)))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = cost.kept_bytes(lambda: model.apply(params, images), params)
    width = 4 if dtype is torch.float32 else 2
    assert cost.activation_memory(model, 8, bytes_each=width) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--paper", "--operator", "G3B"], "--operator"),
        (["--paper", "--roofline"], "--roofline"),
        (["--roofline", "--depth", "3"], "--depth"),
        (["--roofline", "cpu", "--batch-size", "4"], "--batch-size"),
    ],
)
def test_a_table_of_fixed_models_takes_no_option_that_it_ignores(argv, named, capsys):
    assert cli.main(["info", *argv]) == 2
    assert f"stand without {named}," in capsys.readouterr().err


def test_info_of_other_families(capsys):
    assert cli.main(["info", "--model", "swin_nano", "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "training memory" in text and "materialised" not in text and "parameters" in text
    assert "GFLOPs an image                  0.004, 0.000 of them in the activation" in text
    assert cli.main(["info", "--learning-rate", "1e-3"]) == 2


@pytest.mark.parametrize("spec", ["cosformer", "synthesizer", "performer", "2*softmax+cosformer"])
def test_info_of_weights_that_scores_do_not_determine_has_no_materialised_form(spec, capsys):
    assert cli.main(["info", "--operator", spec, "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "kept for backward" in text and "materialised" not in text


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit_nano", "65"),
        ("swin_nano", "16 in 4 windows, 16"),
        ("convit_nano", "64, 65"),
        ("vitdet_tiny", "196, 16"),
    ],
)
def test_info_counts_every_family(name, tokens, capsys):
    sizes = {"image_size": 32, "patch_size": 8 if name == "vitdet_tiny" else 4}
    argv = ["info", "--model", name, "--image-size", "32", "--patch-size", f"{sizes['patch_size']}"]
    classes = {"num_classes": 10} if models.classifies(name) else {}
    total = cost.flops(models.create(name, operator="softmax", **sizes, **classes)).total
    assert cli.main(argv) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["tokens"].strip() == tokens
    assert rows["GFLOPs an image"].split()[0] == f"{total / 1e9:.3f},"
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gflops"] == total / 1e9


def test_the_help_of_info_names_the_defaults_it_has(capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default vit_tiny)" in told and "resized to it (default 224)" in told
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "vit_tiny"


def test_an_operator_that_does_not_tell_its_operations_is_not_counted():
    sizes = {"image_size": 32, "num_classes": 10, "depth": 1, "num_heads": 2, "embed_dim": 16}
    untold = {f"G3B:order={name}" for name in ("elementwise", "by_distance", "generated")}
    for spec in operators.EXAMPLES:
        told = cost.uncounted(models.create("vit_nano", spec, **sizes))
        assert (told is not None) == (spec in untold), spec
    own = operators.from_rows("halved", lambda scores, mask: 0.5 * scores.softmax(-1))
    bare = own._replace(options={})
    for op in (own, bare, operators.parse("softmax").operator):
        told = cost.uncounted(models.create("vit_nano", op, **sizes))
        assert (told == "halved has no trait `activation_flops`") == (op.name == "halved")
    mixed = operators.hybrid([operators.softmax(), own])
    assert (
        cost.uncounted(models.create("vit_nano", mixed, **sizes))
        == "halved has no trait `activation_flops`"
    )
    with pytest.raises(ValueError, match="needs .* got 'halved'"):
        roofline.attention(bare, 1, 2, 5, 4, 4)
    counted = own._replace(traits={**own.traits, "activation_flops": lambda n, unit: 4 * n * n})
    model = models.create("vit_nano", counted, **sizes)
    tokens = model.sites[0].tokens
    assert cost.flops(model).activation == 2 * 4 * tokens**2
    for spec in sorted(untold):
        assert cli.main(["info", "--operator", spec, "--image-size", "32"]) == 0


BLIND = ["static", "polynomial-0", "relative", "G2:order=by_distance", "2*static+G1"]
# a synthesizer's relu may be zero for the one query that a ViT reads in its last block
CASES = [(name, one) for name in ("vit", "swin", "convit", "vitdet") for one in BLIND]
CASES += [("swin", "synthesizer:width=8"), ("vitdet", "synthesizer:width=4")]
CASES += [("vit", "polynomial-0:order=by_offset")]


@pytest.mark.parametrize(("name", "operator"), CASES)
def test_parameters_without_effect_are_those_without_gradient(name, operator):
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "embed_dim": 12, "num_heads": 3}
    if name == "swin":
        sizes |= {"depths": (1, 1), "num_heads": (3, 6), "window_size": 2}
        operator = operator if "+" not in operator else ["2*static+G1", "G1+5*static"]
    else:
        sizes |= {"depth": 2}
    if name == "convit":
        sizes["gated_blocks"] = 1
    if name == "vitdet":
        sizes |= {"window_size": 2, "global_blocks": (1,), "patch_size": 4, "pyramid_dim": 4}
        sizes["image_size"] = 16
    model = models.create(f"{name}_tiny", operator=operator, **sizes)
    params, images = drawn(model)
    slopes = torch.func.grad(
        lambda p: sum(x.sin().sum() for x in tree.leaves(model.apply(p, images)))
    )(params)
    counted: dict[str, int] = {}
    for path, leaf in tree.named(slopes).items():
        layer = path.partition(".attn.")[2].split(".")[0]
        if layer in ("qkv", "qk", "relative_position_bias_table") and not leaf.all():
            counted[f"attn.{layer}"] = counted.get(f"attn.{layer}", 0) + int((leaf == 0).sum())
    assert counted and cost.unused(model) == counted


@pytest.mark.parametrize("operator", ["softmax", "G2", "softconv", "static:inside=true", "gated"])
def test_operators_of_the_scores_leave_nothing_without_effect(operator):
    model = models.create("convit_nano", operator=operator, image_size=8, patch_size=2)
    assert cost.unused(model) == {}


@pytest.mark.parametrize(
    "operator",
    [
        *("G2B:scales=true", "G2U:scales=true", "rational-2/2:scales=true", "dog:scales=true"),
        *("G2:order=generated,scales=true", "G1+G2:scales=true", "softmax|G2:scales=true"),
        "G2:order=beside_relative,scales=true",
    ],
)
def test_scales_of_no_base_activation_are_those_without_gradient(operator):
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "depth": 2}
    model = models.create("vit_nano", operator=operator, **sizes)
    params, images = drawn(model)
    slopes = tree.named(torch.func.grad(lambda p: model.apply(p, images).sin().sum())(params))
    idle = sum(x.numel() for path, x in slopes.items() if "scale_base" in path and not x.any())
    assert idle and cost.unused(model) == {"operator.scale_base": idle}
    assert cost.told(cost.unused(model)).endswith("as units have no base activation")
    based = operator.replace("scales=true", "scales=true,unit_base=silu")
    if "generated" not in operator:
        assert cost.unused(models.create("vit_nano", operator=based, **sizes)) == {}


def test_info_names_parameters_without_effect(capsys):
    argv = ["info", "--model", "swin_nano", "--image-size", "32", "--operator", "static"]
    assert cli.main(argv) == 0
    words = "in attn.relative_position_bias_table, attn.qkv, as operators ignore the scores"
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = rows["without effect"].strip()
    assert cli.main([*argv, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["unused_parameters"]
    assert found == f"{sum(counts.values()):,} {words}"
