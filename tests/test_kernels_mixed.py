"""`y (mix^T v)` with the values in place: the expression it stands for, under every transform."""

import shutil

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kart import models
from kart.kernels import factored_values
from kart.kernels.cpp import mix as compiled

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler"
)

# B, H, N, M, r, e: rests of every block, and whole ones
SHAPES = [(2, 3, 5, 7, 2, 4), (1, 1, 3, 3, 5, 1), (3, 2, 33, 50, 12, 64), (2, 1, 17, 17, 30, 48)]


def drawn(shape, own=False, dtype=torch.float32):
    """y, mix and v, v a view as a model makes it."""
    B, H, N, M, r, e = shape
    g = torch.Generator().manual_seed(sum(shape))
    y = torch.randn(B, H, N, r, generator=g, dtype=dtype)
    mix = torch.randn(*((B,) if own else ()), H, M, r, generator=g, dtype=dtype)
    qkv = torch.randn(B, M, 3, H, e, generator=g, dtype=dtype)
    return y, mix, qkv.movedim(-3, 0).transpose(-3, -2)[2]


def plain(y: Tensor, mix: Tensor, v: Tensor) -> Tensor:
    return y @ (mix.mT @ v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_every_gradient(shape, own, dtype):
    tensors = drawn(shape, own, dtype)
    probe = torch.randn(*shape[:3], shape[5], generator=torch.Generator().manual_seed(1)).to(dtype)
    probe = probe.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection's backward has it
    found = []
    for product in (factored_values, plain):
        leaves = [x.clone().requires_grad_() for x in tensors[:2]]
        leaves.append(tensors[2].detach().requires_grad_())
        out = product(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, probe)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_autocast_around_the_backward_rounds_nothing():
    leaves = [x.requires_grad_() for x in drawn(SHAPES[0])]
    expected = torch.autograd.grad(plain(*leaves).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = factored_values(*leaves)
        found = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives_and_forward_mode(own, shape):
    tensors = drawn(shape, own)
    directions = tuple(torch.ones_like(x) for x in tensors)

    def derivatives(product):
        def loss(*tensors):
            return product(*tensors).sin().sum()

        gradient = torch.func.grad(loss, (0, 1, 2))
        pushed = torch.func.jvp(product, tensors, directions)[1]
        hvp = torch.func.jvp(gradient, tensors, directions)[1]
        leaves = [x.detach().requires_grad_() for x in tensors]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sum() for x in first), leaves)
        return pushed, *hvp, *second

    for a, b in zip(derivatives(factored_values), derivatives(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0)])
def test_vmap_of_values_and_gradients(dims):
    members = [drawn(SHAPES[0]), drawn(SHAPES[0])]
    members[1] = tuple(2 * x + 1 for x in members[1])
    stacked = [
        members[0][i] if dim is None else torch.stack([m[i] for m in members])
        for i, dim in enumerate(dims)
    ]
    probe = torch.randn(plain(*members[0]).shape, generator=torch.Generator().manual_seed(2))

    def gradients(product):
        def loss(*tensors):
            return (product(*tensors) * probe).sum()

        return torch.func.grad_and_value(loss, (0, 1, 2))

    mapped, value = torch.func.vmap(gradients(factored_values), dims)(*stacked)
    for i in range(2):
        one = [x if dim is None else x[i] for x, dim in zip(stacked, dims, strict=True)]
        expected, total = gradients(plain)(*one)
        torch.testing.assert_close(value[i], total)
        for a, b in zip(mapped, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_beside_is_added_in_every_derivative(own, shape):
    more = torch.randn(*shape[:3], shape[5], generator=torch.Generator().manual_seed(3))
    more = more.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = tuple(0.3 * x for x in (*drawn(shape, own), more))  # sines of numbers about 1

    def fast(y, mix, v, x):
        return factored_values(y, mix, v, beside=x)

    def derivatives(product):
        def loss(*tensors):
            return product(*tensors).sin().sum()

        leaves = [x.detach().requires_grad_() for x in tensors]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sum() for x in first), leaves)
        pushed = torch.func.jvp(product, tensors, tensors)[1]
        stacked = [torch.stack([x, 2 * x]) for x in tensors]
        mapped = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(*stacked)
        return product(*tensors), *first, *second, pushed, *mapped

    wanted = derivatives(lambda y, mix, v, x: plain(y, mix, v) + x)
    for a, b in zip(derivatives(fast), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


def test_nothing_but_the_inputs_is_kept():
    y, mix, v = (x.detach().requires_grad_() for x in drawn(SHAPES[2]))
    kept: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.data_ptr()) or x, lambda x: x
    )
    with keep:
        out = factored_values(y, mix, v)
    # besides the output: v as it lies in memory, not a copy, and r values of each head
    assert v.data_ptr() in kept and out.transpose(1, 2).is_contiguous()
    assert len({*kept} - {y.data_ptr(), mix.data_ptr(), v.data_ptr(), out.data_ptr()}) == 1


def test_a_model_is_the_same_with_and_without(monkeypatch):
    model = models.create("vit_nano", operator="G3B", image_size=16, patch_size=4, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    params, images = model.init(generator), torch.randn(2, 3, 16, 16, generator=generator)
    fast = model.apply(params, images)
    monkeypatch.setattr(compiled, "engine", lambda: None)
    torch.testing.assert_close(fast, model.apply(params, images))


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_infinite_in_a_sample_stays_there(width, where):
    tensors = [x.detach() for x in drawn((2, 2, 7, 9, 3, width), own=True)]
    alone = [x[1:].clone().requires_grad_() for x in tensors]
    tensors[where][0] = torch.inf
    both = [x.clone().requires_grad_() for x in tensors]
    found, expected = (
        (out, *torch.autograd.grad(out.sin().sum(), leaves))
        for leaves in (both, alone)
        for out in (factored_values(*leaves),)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[1:], b)


def test_threads_change_nothing():
    tensors = [x.detach().requires_grad_() for x in drawn(SHAPES[2])]
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(torch.autograd.grad(factored_values(*tensors).sum(), tensors))
        finally:
            torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 3, 5, 9), (3, 7, 4), (2, 3, 7, 6)), r"got \[\(2, 3, 5, 9\), \(3, 7, 4\), "),
        (((2, 3, 5, 4), (3, 700, 4), (2, 3, 7, 6)), r"`mix` \(..., M, r\), .* \(3, 700, 4\)"),
        (((2, 3, 5, 4), (4, 3, 7, 4), (2, 3, 7, 6)), r"leading axes that .* `mix` \(4, 3\)"),
        (((2, 3, 5, 4), (3, 7, 4), (2, 3, 7, 6), (2, 3, 5, 1)), r"`beside` \(..., N, e\), got "),
    ],
)
def test_what_a_kernel_would_read_beyond_its_end_is_refused(shapes, words):
    y, mix, v, *beside = map(torch.ones, shapes)
    with pytest.raises(ValueError, match=words):
        factored_values(y, mix, v, beside=beside[0] if beside else None)


def test_a_mix_of_each_sample_meets_values_that_all_share():
    y, mix, v = torch.randn(1, 2, 5, 4), torch.randn(3, 2, 7, 4), torch.randn(1, 2, 7, 6)
    found = factored_values(y, mix, v)
    assert_close(found, plain(y, mix, v), rtol=1e-4, atol=1e-4)
