"""Counts of parameters, FLOPs and kept memory against the paper, real models and measurement."""

import functools
import json

import pytest
import torch

from kart import cli, models, operators, tree
from kart.analysis import cost

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


def test_flops_of_heads_that_differ_and_of_sums():
    parts = [operators.softmax(), operators.relative()]
    for op in (operators.hybrid(parts), operators.added(parts)):
        assert cost.product_flops(op, 2 if op.options["kind"] == "hybrid" else 1, 5, 2) == 150
        assert cost.activation_flops(op, 1, 5) == 75


def test_streaming_needs_fewer_operations_than_the_papers_form():
    model = models.create("vit_tiny", operator="G3B")
    op = model.operators[0]
    streamed = cost.streamed_flops(op, 3, 197, 64)
    naive = 2 * 197 * 197 * 64 * 3 + cost.activation_flops(op, 3, 197)
    assert streamed < 0.6 * naive
    with pytest.raises(ValueError, match="low-rank operator"):
        cost.streamed_flops(models.create("vit_tiny").operators[0], 3, 197, 64)


KEPT = [
    *("softmax", "sparsemax", "G3B", "G3U", "G1B:rank=24", "G2B:scales=true", "bspline-G4B"),
    *("rational-2/1B", "G3B:base=softmax", "G3B:project=simplex", "G2B:order=full_rank"),
    *("G2B:order=project_first", "G2B:order=two_stage", "softmax+2*G3B"),
]


@pytest.mark.parametrize("form", ["streamed", "naive"])
@pytest.mark.parametrize("operator", KEPT)
def test_counted_memory_is_what_a_step_keeps(operator, form):
    model = models.create("vit_tiny", operator=operator, **TINY)
    counted = cost.activation_memory(model, 8, form)
    if form == "naive":

        def attend(op, params, q, k, v, mask=None):
            return op.weights(params, q @ k.mT * q.shape[-1] ** -0.5) @ v

        blocks = [op._replace(attend=functools.partial(attend, op)) for op in model.operators]
        one = model.config.sharing == "universal"
        options = {**models.MODELS["vit_tiny"], **TINY, "sharing": model.config.sharing}
        model = models.vit(blocks[0] if one else blocks, **options)
    params = tree.map(lambda x: x.requires_grad_(), model.init(torch.Generator().manual_seed(0)))
    weights = sum(x.numel() * 4 for x in tree.leaves(params))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = cost.kept_bytes(lambda: model.apply(params, images)) - weights
    assert counted == pytest.approx(kept, rel=0.1)


def test_the_naive_form_keeps_what_the_paper_complains_of():
    model = models.create("vit_tiny", operator="G3B")
    softmax = models.create("vit_tiny")
    naive = cost.activation_memory(model, 32, "naive") / cost.activation_memory(softmax, 32)
    streamed = cost.activation_memory(model, 32) / cost.activation_memory(softmax, 32)
    assert naive > 2.3 and streamed < 1.05
    with pytest.raises(ValueError, match='"streamed" or "naive"'):
        cost.activation_memory(model, 1, "other")


def test_other_families_are_counted_by_drawing_and_their_operations_refused():
    blockwise, plain = (
        models.create("swin_nano", operator=o, image_size=32) for o in ("G3B", "softmax")
    )
    counted, bare = cost.parameters(blockwise), cost.parameters(plain)
    # 7 numbers a pair of unit and key at rank 12, 16 keys, and 1 + 1 + 2 + 2 heads
    assert counted.operator == 7 * 12 * 16 * 6 == counted.total - bare.total
    for call in (cost.flops, lambda model: cost.activation_memory(model, 2)):
        with pytest.raises(ValueError, match="needs a ViT.*family 'swin'"):
            call(blockwise)


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


def test_info_of_other_families_says_what_is_not_counted(capsys):
    assert cli.main(["info", "--model", "swin_nano", "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "not counted: swin" in text and "parameters" in text
    assert cli.main(["info", "--learning-rate", "1e-3"]) == 2


def test_the_help_of_info_names_the_defaults_it_has(capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default vit_tiny)" in told and "resized to it (default 224)" in told
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "vit_tiny"
