"""Swin: windows by hand, an independent reference, operators in windows."""

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F
from torch.testing import assert_close

from kart import models, tree
from kart.models import swin, windows
from tests.tiny import SWIN, drawn


def small(operator="softmax", **overrides):
    return models.create("swin_tiny", operator=operator, **{**SWIN, **overrides})


# --- windows by hand ------------------------------------------------------------------------------


def test_windows_are_cut_in_reading_order():
    grid = torch.arange(16).view(4, 4, 1)
    wanted = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    cut = windows.partition(grid, 2)
    assert cut[..., 0].tolist() == wanted
    assert torch.equal(windows.merge(cut, 4, 4), grid)
    tall = torch.arange(2 * 6 * 4 * 3).view(2, 6, 4, 3)
    assert torch.equal(windows.merge(windows.partition(tall, 2), 6, 4), tall)


def test_shifted_windows_attend_only_to_what_was_near():
    # 4 x 4 rolled by -1: rows 1 2 3 0 and columns 1 2 3 0, in windows of 2
    mask = windows.shift_mask(4, 2, 1, torch.device("cpu"))
    assert mask.shape == (4, 1, 4, 4)
    every, left, top, own = (mask[i, 0].long().tolist() for i in range(4))
    assert every == [[1] * 4] * 4  # rows 1 2, columns 1 2
    # rows 1 2, columns 3 0: the two columns are far from each other
    assert left == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert top == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert own == torch.eye(4).long().tolist()


def test_offsets_are_counted_row_by_row():
    # query less key in a window of 2, plus one: (down, right) in 0..2, counted as 3 down + right
    wanted = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert windows.position_bias(torch.arange(9)[:, None], 2)[0].tolist() == wanted


def test_padding_is_no_key():
    mask = windows.padding_mask(3, 2, 2, torch.device("cpu"))
    assert mask is not None and mask.shape == (2, 1, 1, 4)
    assert mask[:, 0, 0].long().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert windows.padding_mask(4, 2, 2, torch.device("cpu")) is None
    assert windows.pad(torch.ones(3, 2, 1), 2)[..., 0].tolist() == [[1, 1]] * 3 + [[0, 0]]


@pytest.mark.parametrize(("side", "window", "shift"), [(4, 2, 0), (4, 2, 1), (6, 3, 1), (7, 3, 0)])
def test_whole_windows_are_those_without_a_mask(side, window, shift):
    cut = windows.Cut(side, window, shift)
    device = torch.device("cpu")
    mask = windows.padding_mask(side, side, window, device)
    if shift:
        mask = windows.shift_mask(side, window, shift, device)
    whole = [True] * cut.count if mask is None else mask.flatten(1).all(1).tolist()
    assert len(whole) == cut.count
    assert cut.whole == [i for i, one in enumerate(whole) if one]


def test_sites_say_how_the_grid_is_cut():
    model = small()
    cuts = [(16, 4, 0), (16, 4, 2), (8, 4, 0), (8, 4, 2)]
    assert [site.cut for site in model.sites] == cuts
    _, images = params_and_images = drawn(model)
    aux = model.intermediates(*params_and_images)
    for i, site in enumerate(model.sites):
        assert site.windows == (site.cut.side // site.cut.window) ** 2
        shape = (len(images), site.windows, site.heads, site.tokens)
        assert aux[f"blocks.{i}.weights"].shape == (*shape, site.tokens)
        assert aux[f"blocks.{i}.values"].shape == (*shape, site.width)


def test_biased_scores_are_scores_plus_the_bias():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 3, 4, 6, generator=generator).double()
    bias = torch.randn(3, 4, 4, generator=generator).double()
    wide_q, wide_k = windows.biased(q, k, bias)
    scores = wide_q @ wide_k.mT * wide_q.shape[-1] ** -0.5
    assert_close(scores, q @ k.mT * 6**-0.5 + bias)


def test_four_tokens_become_one_in_the_order_of_the_original():
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[..., None]
    norm = {"weight": torch.ones(4), "bias": torch.zeros(4)}
    merged = swin.downsample(
        {"norm": norm, "reduction": {"weight": torch.eye(4)}}, grid, torch.float32
    )
    # x0 = top left, x1 = below it, x2 = right of it, x3 = below that
    order = merged.flatten().argsort().tolist()
    assert merged.shape == (1, 1, 4) and order == [0, 2, 1, 3]


# --- an independent reference, from the paper's equations -----------------------------------------


def reference(params, images, config):
    """Liu et al. 2021, one window, one head and one token pair at a time, with explicit loops."""
    p = tree.named(params)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def near(a, b, side, window, shift):
        """Whether rolled positions of one window lay within one window's reach before the roll."""
        for u, v in zip(a, b, strict=True):
            if abs((u + shift) % side - (v + shift) % side) >= window:
                return False
        return True

    def attention(x, name, heads, window, shift):
        side, width = x.shape[-2], x.shape[-1]
        d, table = width // heads, p[f"{name}.relative_position_bias_table"]
        x = torch.roll(x, (-shift, -shift), (1, 2))
        out = torch.zeros_like(x)
        for top in range(0, side, window):
            for left in range(0, side, window):
                places = [(top + i, left + j) for i in range(window) for j in range(window)]
                tokens = torch.stack([x[:, i, j] for i, j in places], 1)
                q, k, v = linear(tokens, f"{name}.qkv").split(width, -1)
                bias = torch.zeros(heads, len(places), len(places), dtype=x.dtype)
                for n, a in enumerate(places):
                    for m, b in enumerate(places):
                        row = (a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1]
                        bias[:, n, m] = table[row + window - 1]
                        if shift and not near(a, b, side, window, shift):
                            bias[:, n, m] = -torch.inf
                parts = []
                for h in range(heads):
                    cut = slice(h * d, (h + 1) * d)
                    scores = q[..., cut] @ k[..., cut].mT / d**0.5 + bias[h]
                    parts.append(scores.softmax(-1) @ v[..., cut])
                done = linear(torch.cat(parts, -1), f"{name}.proj")
                for n, (i, j) in enumerate(places):
                    out[:, i, j] = done[:, n]
        return torch.roll(out, (shift, shift), (1, 2))

    x = F.conv2d(
        images,
        p["patch_embed.proj.weight"],
        p["patch_embed.proj.bias"],
        stride=config.patch_size,
    ).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        if stage:
            x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
            x = linear(
                norm(x, f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction"
            )
        side = x.shape[1]
        window = min(side, config.window_size)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shift = window // 2 if block % 2 == 1 and side > window else 0
            x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn", heads, window, shift)
            hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + linear(hidden, f"{name}.mlp.fc2")
    return linear(norm(x, "norm").mean((1, 2)), "head.fc")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"window_size": 8, "depths": (2, 1)},  # the second stage is one window
        {"window_size": 3, "image_size": 24, "depths": (1, 2)},  # shift of one, odd windows
    ],
)
def test_swin_equals_the_papers_equations(overrides):
    model = small(**overrides)
    params, images = drawn(model)
    wanted = reference(params, images, model.config)
    assert wanted.std() > 0.1
    assert_close(model.apply(params, images), wanted, rtol=1e-10, atol=1e-10)
    single = model.apply(tree.to(params, torch.float32), images.float())
    assert_close(single, wanted.float(), rtol=1e-5, atol=1e-5)


# --- operators in windows -------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U", "2*softmax+G1B"])
def test_what_is_looked_at_is_what_is_trained(operator):
    model = small(operator, num_heads=(3, 3))
    params, images = drawn(model)
    aux = model.intermediates(params, images)
    assert_close(aux["logits"], model.apply(params, images))
    # blocks count through the stages: 16 windows of 16 tokens, then 4
    assert aux["blocks.1.weights"].shape == (2, 16, 3, 16, 16)
    assert aux["blocks.2.weights"].shape == (2, 4, 3, 16, 16)
    assert aux["blocks.3.tokens"].shape == (2, 64, 24)
    # the last window of a shifted block holds four corners, which do not see each other
    corner = aux["blocks.1.weights"][:, -1].reshape(2, 3, 4, 4, 4, 4)
    assert not corner[..., :2, :2, 2:, :].any() and corner[..., :2, :2, :2, :2].any()


def test_operators_have_windows_for_rows_and_one_set_a_block_or_a_stage():
    generator = torch.Generator().manual_seed(0)
    blockwise, universal = (small(spec).init(generator) for spec in ("G2B", "G2U"))
    for stage, heads in enumerate((2, 3)):
        for block in range(2):
            own = blockwise["layers"][str(stage)]["blocks"][str(block)]["operator"]
            assert own["mix"].shape == (heads, 16, 12)
        assert universal["operator"][str(stage)]["mix"].shape == (heads, 16, 12)
    assert "operator" not in universal["layers"]["0"]["blocks"]["0"]


def test_universal_is_blockwise_with_operators_tied_by_stage():
    universal, blockwise = small("G2U"), small("G2B")
    params, images = drawn(universal)
    tied = {name: value for name, value in params.items() if name != "operator"}
    tied["layers"] = {
        stage: {
            **layer,
            "blocks": {
                b: {**block, "operator": params["operator"][stage]}
                for b, block in layer["blocks"].items()
            },
        }
        for stage, layer in params["layers"].items()
    }
    assert_close(universal.apply(params, images), blockwise.apply(tied, images))
    for block, stage in enumerate("0011"):
        assert universal.operator_params(params, block) is params["operator"][stage]
        assert blockwise.operator_params(tied, block) is params["operator"][stage]


def test_bfloat16_is_near_float32():
    model = small("G2B")
    params, images = drawn(model, size=0.02, dtype=torch.float32)
    rough = model.apply(params, images.bfloat16())
    assert_close(rough.float(), model.apply(params, images), rtol=0.1, atol=0.02)
    slopes = grad(lambda p: model.apply(p, images.bfloat16()).float().square().sum())(params)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in tree.leaves(slopes))


# paper.md has no parameter totals for Swin; Liu et al. 2021, Table 1, gives 29M with 1000 classes
@pytest.mark.parametrize(
    ("operator", "total"),
    [
        ("softmax", 28_288_354),
        # rank x keys x (2 G + 3) a head, of which there are 138 in the blocks and 45 in the stages
        ("G3B:scales=true", 28_288_354 + 138 * 12 * 49 * 9),
        ("G3U:scales=true", 28_288_354 + 45 * 12 * 49 * 9),
    ],
)
def test_parameter_totals(operator, total):
    model = models.create("swin_tiny", operator=operator)
    assert tree.size(model.init(torch.Generator().manual_seed(0))) == total


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"depths": (2, 2, 2)}, "as many `depths` as `num_heads`"),
        ({"depths": ()}, "`depths` >= 1"),
        ({"depths": (2, 0)}, r"`depths` >= 1, got \(2, 0\)"),
        (
            {"image_size": 30},
            "can be halved 1 times, got 15 x 15. Make `image_size` a multiple of 4",
        ),
        ({"window_size": 5}, "a grid of 16 and windows of 5 in stage 0"),
        ({"embed_dim": 13}, "width 13, 2 heads"),
        ({"num_heads": (2, 10**30)}, "`num_heads` <= 2147483647, got an integer of 31 digits"),
        ({"embed_dim": 6 * 10**6}, "GiB, most of them in the blocks"),
        ({"operator": ["G2B"] * 3}, "one for each of 4 blocks, got 3"),
        ({"depth": 3}, "Near matches: depths"),
    ],
)
def test_bad_configurations_say_what_is_wrong(overrides, words):
    with pytest.raises(ValueError, match=words):
        small(**overrides)


def test_parameters_of_other_windows_are_refused():
    model, other = small(window_size=2), small(window_size=4)
    params, images = drawn(other)
    with pytest.raises(ValueError, match=r"bias_table` of 9 offsets, for windows of 2, got 49"):
        model.apply(params, images)
