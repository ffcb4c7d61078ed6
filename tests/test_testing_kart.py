"""kart's own operators, projections, kernels, models and training step through their suites."""

import doctest
import types

import pytest
import torch
from hypothesis import settings

from kart import bases, kernels, layers, models, operators, optim, projections, train
from kart.guides import write_a_basis_from_zero
from kart.kernels import plain
from kart.models import blocks
from kart.testing import (
    AdamW,
    Training,
    basis_suite,
    check_model,
    check_operator,
    formulas,
    kernel_suite,
    model_suite,
    operator_suite,
    projection_suite,
    step_suite,
)

# shares of the profile's number: an example here runs a whole head, model or step several times
FEW, FEWER = max(8, settings().max_examples // 4), max(4, settings().max_examples // 10)
WINDOW = "the printed window runs over the keys"


def of(spec, **expected):
    op = operators.parse(spec).operator
    return operator_suite(op, expected_failures=expected, max_examples=FEW)


def hats():
    """The basis that the guide writes."""
    scope = {}
    for example in doctest.DocTestParser().get_examples(write_a_basis_from_zero.__doc__ or ""):
        exec(example.source, scope)
        if "hats" in scope:
            return scope["hats"]
    raise AssertionError("the guide defines no `hats`")


@basis_suite(hats()(grid=7), expected_failures={})
def test_the_basis_of_the_guide(): ...


@of("softmax")
def test_softmax(): ...


@of("sigmoid")
def test_sigmoid(): ...


@of("relu")
def test_relu(): ...


@of("sparsemax")
def test_sparsemax(): ...


@of("G2:rank=3")
def test_low_rank(): ...


@of("bspline-G4:rank=2,degree=2,base=silu,scales=true")
def test_low_rank_splines_with_base_and_scales(): ...


@of("G2:rank=3,base=softmax,mix=scaled")
def test_low_rank_over_softmax(): ...


@of("G2:rank=3,project=simplex")
def test_low_rank_projected(): ...


@of("rational:rank=2")
def test_low_rank_rational(): ...


@of("shannon:rank=2,reading=index", keys_permute_with_parameters=WINDOW, masking_is_deleting=WINDOW)
def test_low_rank_with_a_window_over_keys(): ...


def test_outputs_that_are_large_are_no_wrong_curvature():
    op = operators.low_rank(bases.polynomial(5), rank=3)
    [result] = check_operator(op, only=["curvature_is_right"], max_examples=30)
    assert result.passed, result.message


@of("G2:order=full_rank")
def test_full_rank(): ...


@of("dog:order=full_rank")
def test_full_rank_wavelets(): ...


@of("G2:order=project_first,rank=3")
def test_project_first(): ...


@of("G2:order=two_stage,rank=3")
def test_two_stage(): ...


@of("2*softmax+G2:rank=3")
def test_hybrid_heads(): ...


@projection_suite(projections.simplex)
def test_simplex(): ...


# 16 queries and 64 keys are the sides of blocks; the chunked engine cuts where it likes. All share
# one number, so that axes are of equal length at times
SIZES = {
    "batch": [1, 2],
    "heads": [1, 2],
    "queries": [1, 2, 17],
    "keys": [1, 2, 33, 65],
    "width": [1, 2, 4],
    "rank": [1, 2, 3],
}
FOURIER, SPLINES, HAT = bases.fourier(2), bases.bspline(3, 2), bases.mexican_hat()


def scores(generator, batch, heads, queries, keys, width):
    q = torch.randn(batch, heads, queries, width, generator=generator)
    k = torch.randn(batch, heads, keys, width, generator=generator)
    return q, k, torch.rand(batch, 1, 1, keys, generator=generator) > 0.3


def contraction(basis, masked):
    def inputs(generator, rank, **sizes):
        q, k, mask = scores(generator, **sizes)
        coefs = torch.randn(sizes["heads"], rank, sizes["keys"], basis.size, generator=generator)
        return coefs, q, k, mask if masked else None

    return inputs


def contract(module, basis, **options):
    return lambda coefs, q, k, mask: module.contract(basis, coefs, q, k, mask, **options)


@kernel_suite(
    contract(kernels, FOURIER, engine="torch"),
    contract(plain, FOURIER),
    contraction(FOURIER, masked=True),
    SIZES,
    max_examples=FEW,
    name="contract, torch engine",
)
def test_contract(): ...


@kernel_suite(
    contract(kernels, SPLINES),
    contract(plain, SPLINES),
    contraction(SPLINES, masked=False),
    SIZES,
    max_examples=FEW,
    name="contract of splines",
)
def test_contract_of_splines(): ...


def full_inputs(generator, rank, **sizes):
    q, k, mask = scores(generator, **sizes)
    heads, keys = sizes["heads"], sizes["keys"]
    coefs = torch.randn(heads, keys, keys, FOURIER.size, generator=generator) / keys
    return coefs, q, k, torch.randn(*k.shape[:-1], rank, generator=generator), mask


@kernel_suite(
    lambda coefs, q, k, v, mask: kernels.contract_values(FOURIER, coefs, q, k, v, mask),
    lambda coefs, q, k, v, mask: plain.contract(FOURIER, coefs, q, k, mask) @ v,
    full_inputs,
    {**SIZES, "keys": [1, 2, 33]},
    # the product of coefficients and values is kept in the dtype of the values
    traits={"half": 4},
    max_examples=FEWER,
    name="contract_values",
)
def test_contract_values(): ...


def needs_cpp():
    if (reason := kernels.engines()["cpp"]) != "ready":
        pytest.skip(reason)


@kernel_suite(
    contract(kernels, FOURIER, engine="cpp"),
    contract(plain, FOURIER),
    contraction(FOURIER, masked=True),
    SIZES,
    dtype=torch.float32,
    traits={"half": False},
    max_examples=FEW,
    name="contract, C++ engine",
)
def test_contract_cpp():
    needs_cpp()


def unit_inputs(generator, rank, **sizes):
    q, k, mask = scores(generator, **sizes)
    shape = (sizes["heads"], rank, sizes["keys"])
    weight, shift, scale = (torch.randn(shape, generator=generator) for _ in range(3))
    return weight, shift * 0.3, 1.5 + 0.1 * scale, q, k, mask


def units(module):
    def product(weight, shift, scale, q, k, mask):
        leaves = {"weight": weight, "shift": shift, "scale": scale}
        return module.contract_units(HAT, leaves, q, k, mask)

    return product


@kernel_suite(
    units(kernels),
    units(plain),
    unit_inputs,
    {**SIZES, "keys": [1, 2, 33]},
    traits={"half": False},
    max_examples=FEWER,
    name="contract_units",
)
def test_contract_units(): ...


def mixed_inputs(generator, rank, **sizes):
    q, k, _ = scores(generator, **sizes)
    *lead, n, _ = q.shape
    m = k.shape[-2]
    y = torch.randn(*lead, n, rank, generator=generator)
    mix = torch.randn(lead[-1], m, rank, generator=generator)
    return y, mix, k, torch.rand(n, m, generator=generator) > 0.3


@kernel_suite(
    kernels.mix_values, plain.mix_values, mixed_inputs, SIZES, max_examples=FEW, name="mix_values"
)
def test_mix_values(): ...


def softmax_inputs(generator, **sizes):
    q, k, mask = scores(generator, **sizes)
    return q, k, torch.randn(k.shape, generator=generator), mask


@kernel_suite(
    kernels.softmax_attention,
    plain.softmax_attention,
    softmax_inputs,
    {name: values for name, values in SIZES.items() if name != "rank"},
    max_examples=FEW,
    name="softmax_attention",
)
def test_softmax_attention(): ...


TINY = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "embed_dim": 8,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}


def tiny(operator):
    return models.create("vit_nano", operator=operator, **TINY)


@model_suite(tiny("softmax"), max_examples=FEW)
def test_vit_softmax(): ...


@model_suite(tiny("G2B:rank=3"), max_examples=FEW)
def test_vit_blockwise(): ...


@model_suite(tiny("G2U:rank=3"), tied=tiny("G2B:rank=3"), max_examples=FEW)
def test_vit_universal(): ...


def test_patches_permute_without_a_class_token():
    base = tiny("softmax")
    config = base.config

    def init(generator):
        params = base.init(generator)
        del params["cls_token"]
        return {**params, "pos_embed": params["pos_embed"][:, 1:]}

    def apply(params, images):
        x = layers.patch_embed(params["patch_embed"], images) + params["pos_embed"][0]
        for i, site in enumerate(base.sites):
            attend = blocks.attention_at(site, params, None, f"blocks.{i}")
            x = blocks.block(params["blocks"][str(i)], x, attend, images.dtype)
        return layers.linear(params["head"], layers.layer_norm(params["norm"], x.mean(-2)))

    names = ("image_size", "patch_size", "in_channels")
    told = {name: getattr(config, name) for name in names}
    told["tokens"] = (config.image_size // config.patch_size) ** 2
    model = base._replace(config=types.SimpleNamespace(**told), init=init, apply=apply)
    [result] = check_model(model, only=["patches_permute"], max_examples=FEW)
    assert result.passed, result


@pytest.mark.parametrize("operator, fields", [("polynomial-4B", {}), ("G3B", {"num_heads": 5})])
def test_patches_permute_where_features_or_heads_are_as_many_as_tokens(operator, fields):
    sizes = {"image_size": 4, "patch_size": 2, "embed_dim": 10, "depth": 1, "num_heads": 2}
    model = models.create("vit_nano", operator=f"{operator}:rank=3", **{**sizes, **fields})
    [result] = check_model(model, only=["patches_permute"], max_examples=FEW)
    assert result.passed, result


def test_patches_permute_whatever_leads_the_positions():
    base = tiny("softmax")

    def init(generator):
        params = base.init(generator)
        return {**params, "pos_embed": params["pos_embed"][0]}

    model = base._replace(
        init=init,
        apply=lambda p, images: base.apply({**p, "pos_embed": p["pos_embed"][None]}, images),
    )
    [result] = check_model(model, only=["patches_permute"], max_examples=FEW)
    assert result.passed, result


def training(operator, rate=1e-3, decay=0.05, **fields):
    """The step of `kart.train` on random images, with schedules that start at once."""
    given = {**TINY, "operator": operator}
    count, classes = given.pop("in_channels"), given.pop("num_classes")
    model = models.create("vit_nano", **given, in_channels=count, num_classes=classes)
    # a schedule of 20 updates, which falls at each of the first
    config = train.Config(epochs=1, warmup_epochs=0, end_learning_rate=0.0, **fields)
    program = train.program(config, model, steps_per_epoch=20)

    def at(rate, decay):
        hyper = train.Hyper(torch.tensor(rate), torch.tensor(decay))
        return lambda state, batch: program.step(state, hyper, *batch)

    def batch(generator, size):
        images = torch.randn(size, 1, 8, 8, generator=generator)
        labels = torch.randint(0, classes, (size,), generator=generator)
        return images, torch.nn.functional.one_hot(labels, classes).float()

    def frozen(mask):
        optimizer = optim.chain(optim.freeze(mask), optim.adamw(rate), optim.freeze(mask))

        def step(state, batch):
            gradients, loss = program.gradients(state, *batch)
            own = optimizer.init(state.params)
            updates, _ = optimizer.update(gradients, own, state.params)
            return state._replace(params=optim.apply_updates(state.params, updates)), loss

        return step

    return Training(
        program.init,
        at(rate, decay),
        batch,
        gradients=lambda state, batch: program.gradients(state, *batch)[0],
        loss=lambda state, batch: program.gradients(state, *batch)[1],
        still=at(0.0, 0.0),
        freeze=frozen,
        formula=AdamW(
            formulas.warmup_cosine(rate, 0, 20, start=0.0, end=0.0),
            weight_decay=decay,
            max_norm=config.max_norm,
            decays=optim.decay_mask(),
            keeps=lambda i: min(config.ema, (1 + i) / (10 + i)),
        ),
        average=(lambda state: state.average.average) if config.ema else None,
    )


@step_suite(training("G2B:rank=3", ema=0.9, max_norm=0.5), max_examples=FEWER, name="kart.train")
def test_step(): ...


@step_suite(
    training("softmax", batching="vmap", label_smoothing=0.1),
    max_examples=FEWER,
    name="kart.train, per-example loss",
)
def test_step_of_a_mapped_loss(): ...
