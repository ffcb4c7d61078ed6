"""What a GPU would refuse or wait for, found without one: tensors of torch's meta device, which has
no numbers to give, under modes that also refuse what mixes it with the CPU and copies to it.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kart import augment, bases, data, models, operators, train, tree
from kart.analysis import functions
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import Product, family_of
from tests.tiny import CONVIT, SWIN

GPU = "meta"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# of values that are on the CPU
MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


def devices(*args):
    return {x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim()}


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert len(devices(args, kwargs)) < 2, f"{func} mixes devices"
        assert func not in COPIES or devices(args[-1]) in ({GPU}, devices(out)), f"{func} waits"
        return out


class _Makers(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # what is on the device already is not copied
        made = func in MAKERS and not isinstance(args[func is MAKERS[2]], torch.Tensor)
        assert not made or out.device.type != GPU, f"{func.__name__} waits"
        return out


@contextlib.contextmanager
def no_wait():
    with _Operations(), _Makers():
        yield


def test_what_waits_is_seen():
    x = torch.ones(3, device=GPU)
    waits = [
        lambda: float(x.sum()),
        lambda: x[x > 0],
        lambda: x + torch.ones(3),
        lambda: x[torch.tensor([0])],
        lambda: x.cpu(),
        lambda: torch.ones(3).to(GPU),
        lambda: torch.empty_like(x).copy_(torch.ones(3)),
        lambda: torch.tensor([1.0], device=GPU),
        lambda: x.new_tensor(1.0),
    ]
    for wait in waits:
        with pytest.raises((AssertionError, RuntimeError)), no_wait():
            wait()
    with no_wait():
        torch.full((), 2.0, device=GPU) + x.to(torch.float64)


def stepped(model, which="step", **options):
    """A step of training, as `train.loop` takes it, on the device."""
    c = model.config
    config = train.Config(epochs=2, batch_size=4, device=GPU, **options)
    program = train.program(config, model, 10)
    state = program.init(torch.Generator().manual_seed(0))
    hyper = train.Hyper(*(torch.full((), x, device=GPU) for x in (1e-3, 0.05)))
    images = torch.empty(4, c.in_channels, c.image_size, c.image_size, device=GPU)
    given: Any = state, hyper, images, torch.empty(4, c.num_classes, device=GPU)
    step: Any = program.advance if which == "advance" else program.step
    if which == "vmap":
        step = torch.func.vmap(step)
        given = tree.map(lambda x: torch.stack([x, x]), given)
    with no_wait():
        state, _ = step(*given)
    assert {x.device.type for x in tree.leaves(state)} == {GPU}


VIT = {"image_size": 16, "patch_size": 4, "in_channels": 1, "num_classes": 5}
VIT |= {"depth": 1, "embed_dim": 8, "num_heads": 2}
SPECS = [
    *(f"{x}:width=4" if x in ("synthesizer", "performer") else x for x in operators.EXAMPLES),
    "softmax+G3B",
    "static:rank=3,base=softmax",
    "relative:inside=true",
    "relative:normalise=softmax",
    "G3B:base=softmax",
    "G3B:project=simplex",
    "G3B:order=full_rank,project=simplex",
    "mexican_hat-B:project=simplex",
    "G3B:order=elementwise,normalise=count",
    "G3B:order=elementwise,inside=true",
    "G3B:order=by_offset,base=softmax",
    "G3B:order=by_distance,normalise=count",
    "G3B:order=generated,normalise=count",
    "G3B:order=generated,reach=none,features=17,prefix=1",
    "rational-5/4B:order=elementwise",
    "G3B:engine=plain",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_waits_for_nothing(spec):
    stepped(models.create("vit_nano", spec, **VIT))


OPTIONS = [
    {"accumulate": 2},
    {"ema": 0.9},
    {"batching": "vmap"},
    {"precision": "bfloat16"},
    {"label_smoothing": 0.1},
    {"freeze": ("patch_embed",)},
]


@pytest.mark.parametrize("which", ["advance", "vmap"])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_no_option_of_a_step_waits(which, options):
    stepped(models.create("vit_nano", "G3B", **VIT), which, **options)


@pytest.mark.parametrize("spec", ["softmax", "G3B", "softconv"])
@pytest.mark.parametrize("name", ["vit_nano", "swin_nano", "convit_nano"])
def test_no_model_waits(name, spec):
    sizes = {"vit_nano": VIT | {"recompute": True}, "swin_nano": SWIN, "convit_nano": CONVIT}
    stepped(models.create(name, spec, **sizes[name]))


@pytest.mark.parametrize("spec", SPECS)
def test_masks_and_forward_mode_wait_for_nothing(spec):
    op = operators.parse(spec).operator
    tokens = 17 if "prefix=1" in spec else 9
    params = tree.to(op.init(torch.Generator(), 2, tokens), GPU)
    q, k, v = torch.empty(3, 2, 2, tokens, 4, device=GPU)
    with no_wait():
        for shape in ((tokens, tokens), (2, 1, 1, tokens)):
            mask = torch.empty(shape, dtype=torch.bool, device=GPU)
            op.attend(params, q, k, v, mask)
            if op.traits.get("of_scores", True):
                op.weights(params, q @ k.mT, mask)
        if op.basis is None or op.basis.features is not None:  # those of the others take seconds
            torch.func.jvp(lambda q: op.attend(params, q, k, v), (q,), (q,))


@pytest.mark.parametrize("spec", ["softmax", "G3B", "bspline-8B", "chebyshev-4B:base=softmax"])
def test_a_product_with_the_hessian_waits_for_nothing(spec):
    op = operators.parse(spec).operator
    params = tree.to(op.init(torch.Generator(), 2, 9), GPU)
    q, k, v = torch.empty(3, 2, 2, 9, 4, device=GPU)

    def slopes(q):
        return torch.func.grad(lambda q: op.attend(params, q, k, v).square().sum())(q)

    with no_wait():
        torch.func.jvp(slopes, (q,), (q,))


@pytest.mark.parametrize("name", ["none", "crop", "flip_crop", "paper", "paper_half", "small"])
def test_augmentation_copies_by_pinned_memory_alone(name, monkeypatch):
    def onto(x, device):
        # as `tree.onto` does to a GPU
        return tree.map(lambda t: torch.empty_like(t, device=device), x)

    monkeypatch.setattr(tree, "onto", onto)
    images = torch.empty(16, 3, 8, 8, device=GPU)
    labels = torch.empty(16, dtype=torch.int64, device=GPU)
    for seed in range(4):
        with no_wait():
            generator = torch.Generator().manual_seed(seed)
            done, targets = augment.pipeline(name)(generator, images, labels, 10, 12)
            done = data.normalise(done, (0.5,) * 3, (0.5,) * 3)
        assert done.device.type == targets.device.type == GPU


BASES = [bases.fourier(3), bases.bspline(5), bases.mexican_hat(), bases.rational()]


class Launched:
    """Stands for a kernel of Triton and looks where its arguments are."""

    def __getitem__(self, grid):
        return lambda **arguments: devices(arguments) == {GPU} or pytest.fail("the CPU's")


@pytest.mark.parametrize("basis", BASES, ids=lambda basis: basis.family)
def test_the_triton_engine_packs_on_the_device(basis, monkeypatch):
    pytest.importorskip("triton")
    from kart.kernels import triton as engine
    from kart.kernels.triton import device, device_coefs, device_units

    walks, coefs = ("forward", "query_gradient", "key_gradient"), ("pack", "unpack")
    for room, kernels in ((device, walks), (device_units, walks), (device_coefs, coefs)):
        for kernel in kernels:
            monkeypatch.setattr(room, kernel, Launched())
    family = family_of(basis)
    q, k = torch.empty(2, 2, 3, 17, 16, device=GPU)
    coefs = torch.empty(1, 3, 4, 17, family.width, device=GPU)
    mask = torch.empty(2, 1, 1, 17, dtype=torch.bool, device=GPU)
    for given in (None, mask):
        product = Product(family, q, k, coefs, given, 0.25)
        with no_wait():
            y = engine.forward(product)
            found = engine.backward(product, torch.empty_like(y))
        assert {x.device.type for x in (y, *found)} == {GPU}


@pytest.mark.parametrize("basis", [*BASES, None], ids=lambda x: "table" if x is None else x.family)
def test_the_triton_engine_weighs_on_the_device(basis, monkeypatch):
    pytest.importorskip("triton")
    from kart.kernels.triton import device_entries, entries

    for kernel in ("forward", "query_gradient", "key_gradient", "table_gradient"):
        monkeypatch.setattr(device_entries, kernel, Launched())
    family = None if basis is None else family_of(basis)
    q, k, v = torch.empty(3, 2, 3, 17, 16, device=GPU)
    theta = torch.empty(1, 3, 33 if family is None else family.width, device=GPU)
    mask = torch.empty(2, 1, 1, 17, dtype=torch.bool, device=GPU)
    factor = torch.empty(1, 1, 17, 1, device=GPU)
    for form in ("inside", "beside"):
        x = Weighted(family, form, q, k, v, theta, mask, factor, 0.25)
        with no_wait():
            results = entries.forward(x)
            found = entries.backward(x, torch.empty_like(results[0]), *results)
        assert {x.device.type for x in (*results, *found)} == {GPU}


@pytest.mark.parametrize("spec", ["G3B", "G3B:base=softmax", "mexican_hat-B"])
def test_functions_are_looked_at_where_they_are(spec):
    op, x = operators.parse(spec).operator, torch.linspace(-1, 1, 5)
    params = tree.to(op.init(torch.Generator(), 2, 9), GPU)
    scores = torch.empty(3, 2, 9, 9, device=GPU)
    assert functions.curves(op, params, x).device.type == GPU
    for given in (None, scores):
        assert functions.response(op, params, x, given).device.type == GPU
    assert functions.softmax_response(x, 9, scores).device.type == GPU
