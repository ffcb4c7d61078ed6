"""Attention together with its projections: the numbers of attention that forms values and outputs,
under every transform, and nothing of their size in memory.
"""

import functools

import pytest
import torch
from torch import func
from torch.testing import assert_close

from kart import bases, models, operators, tree
from kart.models import blocks
from kart.operators.projected import pays
from tests import tiny

# one head of few columns for its width, so that a small model takes this way
SHORT = {"image_size": 8, "patch_size": 2, "in_channels": 2, "num_classes": 3, "embed_dim": 32}
SHORT |= {"depth": 2, "num_heads": 2, "rank": 2}
SPECS = ["G2B", "G2U", "polynomial-0B", "mexican_hat-B", "bspline-G4B", "linformer"]


def model_of(spec, **more):
    own = {**SHORT, **more}
    if spec == "linformer":
        own["rank"] = None
        spec = operators.linformer(2)
    return models.create("vit_nano", operator=spec, **own)


def drawn(model, dtype=torch.float64):
    return tiny.drawn(model, dtype=dtype)


@pytest.fixture
def taken(monkeypatch):
    """How often a block took this way."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return operators_projected(*arguments)

    operators_projected = blocks.projected
    monkeypatch.setattr(blocks, "projected", counted)
    return calls


@pytest.fixture
def spelled_out(monkeypatch):
    """A function that turns this way off."""
    return lambda: monkeypatch.setattr(blocks, "pays", lambda *arguments: False)


@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_those_of_the_weights_that_are_looked_at(spec, taken):
    model = model_of(spec)
    params, images = drawn(model)
    logits = model.apply(params, images)
    assert len(taken) == 2  # both blocks
    assert_close(logits, model.intermediates(params, images)["logits"], rtol=1e-10, atol=1e-10)
    assert len(taken) == 2  # where weights are looked at values are formed


@pytest.mark.parametrize("spec", SPECS)
def test_every_gradient_is_that_of_values_and_outputs(spec, taken, spelled_out):
    model = model_of(spec)
    params, images = drawn(model)
    loss = lambda params, images: model.apply(params, images).square().sum()  # noqa: E731
    found = func.grad(loss, argnums=(0, 1))(params, images)
    assert taken
    spelled_out()
    wanted = func.grad(loss, argnums=(0, 1))(params, images)
    for a, b in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9 * float(1 + b.abs().max()))


def test_transforms(taken, spelled_out):
    """Populations, gradients by example, tangents and second derivatives."""
    model = model_of("G2B")
    params, images = drawn(model)
    stacked = tree.map(lambda x: torch.stack([x, 0.7 * x]), params)
    tangent = tree.map(torch.sin, params)
    loss = lambda params, image: model.apply(params, image).square().sum()  # noqa: E731

    def hvp(params):
        return func.jvp(lambda p: func.grad(loss)(p, images), (params,), (tangent,))[1]

    def everything():
        return {
            "population": func.vmap(model.apply, (0, None))(stacked, images),
            "examples": func.vmap(func.grad(loss), (None, 0))(params, images),
            "tangent": func.jvp(lambda p: model.apply(p, images), (params,), (tangent,))[1],
            "hvp": hvp(params),
        }

    found = everything()
    assert taken
    spelled_out()
    for a, b in zip(tree.leaves(found), tree.leaves(everything()), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-8 * float(1 + b.abs().max()))


def test_convit_takes_it_where_its_attention_has_no_gate(taken):
    fields = {**tiny.CONVIT, "embed_dim": 64, "rank": 1, "operator": "G2B"}
    model = models.create("convit_tiny", **fields)  # no bias of queries, keys and values
    params, images = drawn(model)
    logits = model.apply(params, images)
    assert len(taken) == 1
    assert_close(logits, model.intermediates(params, images)["logits"], rtol=1e-10, atol=1e-10)


def test_leading_axes_and_one_image(taken):
    model = model_of("G2B")
    params, images = drawn(model)
    both = model.apply(params, images)
    assert_close(model.apply(params, images[0]), both[0])
    assert_close(model.apply(params, images[None, :, None]), both[None, :, None])
    assert model.apply(params, images[:0]).shape == (0, 3)
    assert len(taken) == 8


def test_half_precision_and_autocast_keep_to_values(taken):
    model = model_of("G2B")
    params, images = drawn(model, torch.float32)
    model.apply(params, images.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        model.apply(params, images)
    assert not taken
    model.apply(params, images)
    assert taken


@pytest.mark.parametrize(
    "spec",
    ["softmax", "G2B:base=softmax", "G2B:project=simplex", "G2B:order=full_rank", "softconv"],
)
def test_weights_that_are_no_product_keep_to_values(spec, taken):
    fields = {**SHORT, "rank": None, "operator": spec}
    model = models.create("vit_nano", **fields)
    params, images = drawn(model)
    model.apply(params, images)
    assert not taken


def test_an_attend_of_ones_own_is_used(taken):
    op = operators.parse("G2B:rank=2").operator
    own = op._replace(attend=lambda params, q, k, v, mask=None: torch.zeros_like(v))
    fields = {**SHORT, "rank": None}
    model, plain = (models.create("vit_nano", operator=x, **fields) for x in (own, op))
    params, images = drawn(plain)
    assert not torch.equal(model.apply(params, images), plain.apply(params, images))
    assert len(taken) == 2
    materialised = models.create("vit_nano", operator="G2B:rank=2,engine=plain", **fields)
    assert_close(materialised.apply(params, images), plain.apply(params, images))
    assert len(taken) == 4


def test_a_wrong_number_of_tokens_is_said_as_elsewhere():
    model, other = model_of("G2B"), model_of("G2B", image_size=12)
    params, images = drawn(model)
    moved = {**params, "blocks": drawn(other)[0]["blocks"]}
    with pytest.raises(ValueError, match="was initialised for rows of 37 keys, got 17"):
        model.apply(moved, images)


def test_it_is_taken_by_count():
    """r (1 + d / N) terms a token and head against d, twice over."""
    factors = operators.low_rank(bases.fourier(3), rank=12).factors
    assert factors is not None and factors.rank == 12

    def takes(tokens, size, heads):
        return pays(factors, torch.empty(2, tokens, size), heads)

    assert takes(197, 192, 3) and takes(197, 768, 12) and takes(65, 64, 2)
    assert not takes(17, 64, 2) and not takes(17, 192, 3)
    assert not pays(None, torch.empty(2, 197, 192), 3)
    assert not pays(factors, torch.empty(2, 197, 192, dtype=torch.bfloat16), 3)


def test_nothing_of_the_size_of_the_tokens_is_kept_but_them_and_their_queries_and_keys():
    heads, tokens, size, batch = 2, 50, 64, 5
    op = operators.parse("G1B:rank=3").operator
    generator = torch.Generator().manual_seed(0)
    learned = tree.map(torch.Tensor.requires_grad_, op.init(generator, heads, tokens))
    params = tree.map(torch.Tensor.requires_grad_, blocks.attention_init(generator, size))
    x = torch.randn(batch, tokens, size, generator=generator, requires_grad=True)

    def kept(attention):
        found = {}

        def pack(saved):
            found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // 4
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            attention()
        large = [n for n in found.values() if n >= x.numel()]
        return sorted(n // x.numel() for n in large)

    factors = op.factors._replace(of=functools.partial(op.factors.of, learned))
    attend = functools.partial(op.attend, learned)
    blocks.attention(params, x, heads, attend)  # the first call builds and checks the engine
    short = kept(lambda: blocks.attention(params, x, heads, attend, factors))
    long = kept(lambda: blocks.attention(params, x, heads, attend))
    assert short == [1, 2]  # x; queries and keys
    assert long == [1, 1, 3]  # and values, and what the heads found


def test_windows_take_it_but_for_those_with_padding(taken):
    """Of a ViTDet: windows of 4 on a grid of 8, one padded to 9, and blocks of the whole grid."""
    fields = {"in_channels": 2, "embed_dim": 32, "num_heads": 1, "depth": 2, "pyramid_dim": 4}
    fields |= {"patch_size": 4, "global_blocks": (1,), "operator": "G2B", "rank": 2}
    for window, count in ((4, 2), (3, 1)):
        taken.clear()
        model = models.create("vitdet_tiny", image_size=32, window_size=window, **fields)
        params, images = drawn(model)
        found, looked = model.apply(params, images), model.intermediates(params, images)
        assert len(taken) == count
        for stride, level in found.items():
            assert_close(level, looked[stride], rtol=1e-9, atol=1e-9)
