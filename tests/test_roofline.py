"""The roofline's counts by hand, against torch's own counter and the kernels' tensors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kart import cli, models, operators
from kart.analysis import cost, roofline
from kart.analysis.roofline import Machine, Work


def operator(spec):
    return operators.parse(spec).operator


def test_softmax_by_hand():
    # 2 images of 3 heads: 6 pairs; 5 tokens, 30 rows, 150 scores; heads of 4 numbers of 2 bytes
    forward, backward = roofline.attention(operator("softmax"), 2, 3, 5, 4, 2)
    assert forward == Work(2 * 2 * 150 * 4, 4 * 30 * 4 * 2 + 30 * 4, 150)
    assert backward == Work(2 * 5 * 150 * 4, 8 * 30 * 4 * 2 + 30 * 4, 150)


def test_fourier_by_hand():
    # K = 4 features, rank 2: 3 heads of 5 keys have 5 * 2 * 4 coefficients and 5 * 2 of W, shared
    # by both images
    forward, backward = roofline.attention(operator("G2:rank=2"), 2, 3, 5, 4, 2)
    params = 3 * 5 * 2 * 5 * 2
    scores, features, mixed = 150 * 4, 150 * 4 * 2, 30 * 2 * 4
    assert forward == Work(
        2 * (scores + features + 2 * mixed), (4 * 30 * 4 + 30 * 2) * 2 + params, 2 * 150
    )
    assert backward == Work(
        2 * (3 * scores + 2 * features + 4 * mixed), (7 * 30 * 4 + 30 * 2) * 2 + 2 * params, 2 * 150
    )


def test_streaming_needs_fewer_operations_than_the_papers_form():
    op = operator("G3")
    square, rank = 197 * 197, 12
    streamed = 3 * (square * 64 + square * 6 * rank + 2 * 197 * rank * 64)
    assert roofline.attention(op, 1, 3, 197, 64, 2)[0].flops == 2 * streamed
    assert streamed < 0.6 * (3 * 2 * square * 64 + cost.activation_flops(op, 3, 197))


def test_products_are_those_that_torch_counts():
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    forward, backward = roofline.attention(operator("softmax"), 2, 3, 5, 4, 4)
    with FlopCounterMode(display=False) as counter:
        (torch.softmax(q @ k.mT, -1) @ v).sum().backward()
    # autograd keeps the scores' weights: it has one product less than the fused backward
    assert counter.get_total_flops() == forward.flops + backward.flops - 2 * 150 * 4
    model = models.create(
        "vit_tiny", image_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=4
    )
    params = model.init(torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model.apply(params, images)
    # the counter does not know the CPU's fused attention
    beside = sum(work.flops for work in roofline.rest(model, 2, 5, 4)) / 3
    assert counter.get_total_flops() == beside


def test_a_linear_layer_by_hand():
    assert roofline.linear(7, 3, 5, 2) == [Work(2 * 7 * 3 * 5, 2 * (7 * 3 + 3 * 5 + 7 * 5))] * 3


@pytest.mark.parametrize(
    ("work", "seconds", "unit"),
    [
        (Work(8, 9, 0), 4, "matrix"),
        (Work(8, 15, 0), 5, "memory"),
        (Work(8, 15, 66), 6, "special"),
    ],
)
def test_the_slowest_unit_binds(work, seconds, unit):
    assert roofline.roof(work, Machine("", 2, 3, 11)) == (seconds, unit)
    if unit == "special":
        assert roofline.roof(work, Machine("", 2, 3)) == (5, "memory")


def test_the_table_of_the_paper(capsys):
    assert cli.main(["info", "--roofline", "--batch-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("vit_") for line in lines) == 3 * len(roofline.TOKENS)
    row = next(line.split() for line in lines if line.startswith("vit_tiny G3   16384"))
    forward, backward = roofline.attention(operator("G3"), 4, 3, 16384, 64, 2)
    assert row[3] == f"{12 * (forward.flops + backward.flops) / 1e9:.0f}"
    # forward bound by sines and cosines, backward by products
    special, matrix = forward.special / 3.9e12, backward.flops / 989.4e12
    assert row[7] == f"{12e3 * (special + matrix):.3f}"
    assert lines[-3].startswith("989.4 TFLOP/s, 3.35 TB/s, 3.9 T")


@pytest.mark.parametrize(
    "spec", ["polynomial-2", "G3:base=softmax", "sigmoid", "G3:unit_base=silu"]
)
def test_what_is_not_counted_is_refused(spec):
    with pytest.raises(ValueError, match="needs softmax or Fourier units of low rank"):
        roofline.attention(operator(spec), 1, 1, 5, 4, 2)
