"""ConViT: an independent reference, locality by hand, operators in the content part."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from kart import models, tree
from kart.models import convit
from tests.tiny import CONVIT, drawn


def small(operator="softmax", **overrides):
    return models.create("convit_tiny", operator=operator, **{**CONVIT, **overrides})


def reference(params, images, config):
    """d'Ascoli et al. 2021, eqs. 2, 5 to 8, one head and one pair of patches at a time."""
    p = tree.named(params)
    side, heads = config.image_size // config.patch_size, config.num_heads
    d = config.embed_dim // heads

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def positional(name, h):
        weight, bias = p[f"{name}.pos_proj.weight"][h], p[f"{name}.pos_proj.bias"][h]
        scores = torch.zeros(side**2, side**2, dtype=images.dtype)
        for n in range(side**2):
            for m in range(side**2):
                right, down = m % side - n % side, m // side - n // side
                scores[n, m] = weight @ weight.new_tensor([right, down, right**2 + down**2]) + bias
        return scores.softmax(-1)

    x = F.conv2d(
        images,
        p["patch_embed.proj.weight"],
        p["patch_embed.proj.bias"],
        stride=config.patch_size,
    )
    x = x.flatten(2).mT + p["pos_embed"]
    for i in range(config.depth):
        name, gated = f"blocks.{i}.attn", i < config.gated_blocks
        if i == config.gated_blocks:
            x = torch.cat([p["cls_token"].expand(len(x), 1, -1), x], 1)
        y = norm(x, f"blocks.{i}.norm1")
        if gated:
            (q, k), v = linear(y, f"{name}.qk").chunk(2, -1), linear(y, f"{name}.v")
        else:
            q, k, v = linear(y, f"{name}.qkv").chunk(3, -1)
        outs = []
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            weights = (q[..., cut] @ k[..., cut].mT / d**0.5).softmax(-1)
            if gated:
                g = torch.sigmoid(p[f"{name}.gating_param"][h])
                weights = (1 - g) * weights + g * positional(name, h)
                weights = weights / weights.sum(-1, keepdim=True)  # eq. 8
            outs.append(weights @ v[..., cut])
        x = x + linear(torch.cat(outs, -1), f"{name}.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("overrides", [{}, {"gated_blocks": 0}, {"num_heads": 2, "image_size": 20}])
def test_convit_equals_the_papers_equations(overrides):
    model = small(**overrides)
    params, images = drawn(model)
    wanted = reference(params, images, model.config)
    assert wanted.std() > 0.1
    assert_close(model.apply(params, images), wanted, rtol=1e-10, atol=1e-10)
    single = model.apply(tree.to(params, torch.float32), images.float())
    assert_close(single, wanted.float(), rtol=1e-5, atol=1e-5)


def test_heads_are_drawn_to_look_at_a_square_of_neighbours():
    params = convit.gated_attention_init(torch.Generator().manual_seed(0), 18, 9, 50.0)
    weights = convit.positions(params, 5)
    centre = 2 * 5 + 2
    for head in range(9):
        down, right = head % 3 - 1, head // 3 - 1
        wanted = F.one_hot(torch.tensor(centre + 5 * down + right), 25).float()
        assert_close(weights[head, centre], wanted, rtol=0, atol=1e-6)
    # two by two: the four corners around the query, by half a step: 50 % each of four patches
    params = convit.gated_attention_init(torch.Generator().manual_seed(0), 8, 4, 50.0)
    corner = convit.positions(params, 5)[0, centre]
    assert_close(corner[[6, 7, 11, 12]], torch.full((4,), 0.25), rtol=1e-5, atol=1e-6)
    # without locality all patches count alike
    params = convit.gated_attention_init(torch.Generator().manual_seed(0), 8, 4, 0.0)
    assert_close(convit.positions(params, 3), torch.full((4, 9, 9), 1 / 9))
    assert torch.equal(params["v"]["weight"], torch.eye(8))


def test_offsets_run_from_the_query_to_the_key():
    # head 0 rises to the right, head 1 downwards
    pos_proj = {"weight": torch.tensor([[9.0, 0, 0], [0, 9.0, 0]]), "bias": torch.zeros(2)}
    right, down = convit.positions({"pos_proj": pos_proj}, 2).round().unbind(0)
    assert_close(right, torch.tensor([[0.0, 1, 0, 1]] * 4) / 2, atol=0.5, rtol=0)
    assert right[0, 1] + right[0, 3] == down[0, 2] + down[0, 3]
    exact = convit.positions({"pos_proj": pos_proj}, 2)
    assert_close(exact[0, 0, [1, 3]].sum(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert_close(exact[1, 0, [2, 3]].sum(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_resized_positions_keep_their_reach_in_the_picture():
    model = small("G2B")
    params, _ = drawn(model)
    _, moved = models.resize(model, params, 24)
    own, finer = (x["blocks"]["1"]["attn"] for x in (params, moved))
    assert torch.equal(own["pos_proj"]["bias"], finer["pos_proj"]["bias"])
    # every second patch of a grid twice as fine is as far from the others as before
    every = (torch.arange(0, 6, 2)[:, None] * 6 + torch.arange(0, 6, 2)).flatten()
    found = convit.positions(finer, 6)[:, every][..., every]
    assert_close(found / found.sum(-1, keepdim=True), convit.positions(own, 3))
    assert models.resize(model, params, 12)[1] is params


@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U", "2*softmax+2*G1B"])
def test_what_is_looked_at_is_what_is_trained(operator):
    model = small(operator)
    params, images = drawn(model)
    aux = model.intermediates(params, images)
    assert_close(aux["logits"], model.apply(params, images))
    assert aux["blocks.1.weights"].shape == (2, 4, 9, 9)
    assert aux["blocks.2.weights"].shape == (2, 4, 10, 10)
    assert aux["blocks.1.tokens"].shape == (2, 9, 8) and aux["blocks.2.tokens"].shape == (2, 10, 8)


def test_the_gate_mixes_the_operators_rows_with_the_softmax_of_positions():
    model = small("G2B")
    params, images = drawn(model)
    aux = model.intermediates(params, images)
    attn = params["blocks"]["0"]["attn"]
    site = model.sites[0]
    content = site.operator.weights(params["blocks"]["0"]["operator"], aux["blocks.0.scores"])
    gate = attn["gating_param"].sigmoid()[:, None, None]
    positional = convit.positions(attn, 3)
    assert_close(positional.sum(-1), torch.ones(4, 9).double())
    assert_close(aux["blocks.0.weights"], (1 - gate) * content + gate * positional)
    # signed rows are not divided by their sums
    sums = gate[..., 0] + (1 - gate[..., 0]) * content.sum(-1)
    assert_close(aux["blocks.0.weights"].sum(-1), sums)


def test_universal_is_blockwise_with_operators_tied_by_kind():
    universal, blockwise = small("G2U"), small("G2B")
    params, images = drawn(universal)
    assert params["operator"]["gated"]["mix"].shape == (4, 9, 12)
    assert params["operator"]["plain"]["mix"].shape == (4, 10, 12)
    tied = {name: value for name, value in params.items() if name != "operator"}
    tied["blocks"] = {
        i: {**block, "operator": params["operator"]["gated" if i != "2" else "plain"]}
        for i, block in params["blocks"].items()
    }
    assert_close(universal.apply(params, images), blockwise.apply(tied, images))


# paper.md has no totals; timm's ConViT-Tiny has 5,710,512. (2 G + 3) parameters a pair, r = 12
GATED, PLAIN = 4 * 12 * 196 * 9, 4 * 12 * 197 * 9


@pytest.mark.parametrize(
    ("operator", "extra"),
    [
        ("softmax", 0),
        ("G3B:scales=true", 10 * GATED + 2 * PLAIN),
        ("G3U:scales=true", GATED + PLAIN),
    ],
)
def test_parameter_totals(operator, extra):
    model = models.create("convit_tiny", operator=operator)
    assert tree.size(model.init(torch.Generator().manual_seed(0))) == 5_710_512 + extra


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gated_blocks": 3}, "`gated_blocks` in 0 .. depth - 1, got 3 of 3.*gated_blocks=1"),
        ({"depth": 2}, "got 2 of 2"),
        ({"locality": -1.0}, "`locality` >= 0"),
        ({"locality": 2.0, "gated_blocks": 0}, "`gated_blocks` for `locality`, got 2.0"),
        ({"num_heads": 3}, "`embed_dim` divisible by `num_heads`"),
        ({"depth": 10**30}, "`depth` <= 2147483647, got an integer of 31 digits"),
    ],
)
def test_bad_configurations_say_what_is_wrong(overrides, words):
    with pytest.raises(ValueError, match=words):
        small(**overrides)
