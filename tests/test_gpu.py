"""What only a GPU can show: the Triton engine, half precision, no host synchronisation."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from kart import bases, data, kernels, models, operators, train, tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SIZES = [(1, 1), (2, 63), (65, 64), (197, 197), (130, 785)]


def setting(basis, n, m, rank=12, heads=3, width=64):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, x, width, generator=generator).double() for x in (n, m))
    coefs = basis.init(generator, (heads, rank, m))["coefs"].double()
    probe = torch.randn(2, heads, n, rank, generator=generator).double()
    return q, k, coefs, probe


def gradients(basis, q, k, coefs, probe, engine):
    leaves = [x.clone().requires_grad_() for x in (q, k, coefs)]
    y = kernels.contract(basis, leaves[2], leaves[0], leaves[1], engine=engine)
    return y.detach(), torch.autograd.grad((y * probe.to(y)).sum(), leaves)


@pytest.mark.parametrize("engine", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("grid", [1, 3, 7])
def test_engines_agree_with_float64_on_the_cpu(engine, dtype, n, m, grid):
    basis = bases.fourier(grid)
    q, k, coefs, probe = setting(basis, n, m)
    q, k = (x.to(dtype).double() for x in (q, k))
    wanted, wanted_grads = gradients(basis, q, k, coefs, probe, "plain")
    moved = [q.to("cuda", dtype), k.to("cuda", dtype), coefs.to("cuda", torch.float32)]
    got, got_grads = gradients(basis, *moved, probe.cuda(), engine)
    limit = 2e-2 if dtype == torch.bfloat16 else 4e-3  # tf32 products of float32 scores
    for a, b in zip((got, *got_grads), (wanted, *wanted_grads), strict=True):
        error = (a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < limit


def test_two_backward_passes_are_equal_bit_for_bit():
    basis = bases.fourier(3)
    q, k, coefs, probe = (x.float().cuda() for x in setting(basis, 197, 197))
    first = gradients(basis, q, k, coefs, probe, "triton")
    second = gradients(basis, q, k, coefs, probe, "triton")
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), first, second)


UNITS = ["mexican_hat", "rational-5/4"]
SPECS = ["softmax", "G3B", "G3U", "bspline-G5B", "G2B:order=full_rank", *UNITS]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_on_the_gpu_is_that_of_the_cpu(spec, precision):
    results = []
    for device in ("cpu", "cuda"):
        config = train.Config(operator=spec, epochs=2, batch_size=4, device=device)
        config = dataclasses.replace(config, precision=precision, warmup_epochs=0.0)
        model = models.create("vit_tiny", operator=spec, image_size=32, patch_size=4, depth=2)
        functions = train.program(config, model, 10)
        generator = torch.Generator().manual_seed(0)
        state = functions.init(generator)
        images = torch.randn(4, 3, 32, 32, generator=generator).to(device)
        targets = torch.nn.functional.one_hot(torch.arange(4), 1000).float().to(device)
        hyper = train.Hyper(*(torch.tensor(x, device=device) for x in (1e-3, 0.05)))
        state, metrics = functions.step(state, hyper, images, targets)
        results.append((float(metrics.loss), float(metrics.grad_norm)))
    limit = 5e-2 if precision == "bfloat16" else 5e-3
    assert results[1] == pytest.approx(results[0], rel=limit)


# what they make of constants, of places and of offsets is made there
MADE = ["sparsemax", "softconv", *(f"G3B:order={order}" for order in ("by_offset", "generated"))]


@pytest.mark.parametrize("spec", ["G3B", *UNITS, *MADE])
@pytest.mark.parametrize("name", ["step", "advance"])
def test_a_step_does_not_wait_for_the_device(name, spec):
    config = train.Config(operator=spec, epochs=2, batch_size=4, device="cuda")
    model = models.create("vit_tiny", operator=spec, image_size=32, patch_size=4, depth=2)
    functions = train.program(config, model, 10)
    step = getattr(functions, name)
    state = functions.init(torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 32, 32, device="cuda")
    targets = torch.nn.functional.one_hot(torch.arange(4), 1000).float().cuda()
    hyper = train.Hyper(*(torch.tensor(x, device="cuda") for x in (1e-3, 0.05)))
    state, _ = step(state, hyper, images, targets)  # builds the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state, _ = step(state, hyper, images, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.step) == 2


@pytest.mark.parametrize("name", ["none", "flip_crop", "small", "paper"])
def test_a_batch_does_not_wait_for_the_device(name):
    config = train.Config(batch_size=16, augment=name, device="cuda")
    source = train.batches(config, data.load("digits", "train"))
    source.at(0, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, targets = source.at(0, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted, labels = train.batches(
        dataclasses.replace(config, device="cpu"), data.load("digits", "train")
    ).at(0, 1)
    assert_close(images.cpu(), wanted, rtol=0, atol=1e-4)
    assert_close(targets.cpu(), labels)


@pytest.mark.parametrize("spec", ["softmax", "G3B"])
def test_a_compiled_step_is_the_eager_one(spec):
    results = []
    for how in ("eager", "compiled"):
        config = train.Config(operator=spec, epochs=2, batch_size=4, device="cuda", step=how)
        model = models.create("vit_tiny", operator=spec, image_size=32, patch_size=4, depth=2)
        functions = train.program(config, model, 10)
        step = train.whole(config, functions.step)
        state = functions.init(torch.Generator().manual_seed(0))
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
        targets = torch.nn.functional.one_hot(torch.arange(4), 1000).float().cuda()
        hyper = train.Hyper(*(torch.tensor(x, device="cuda") for x in (1e-3, 0.05)))
        for _ in range(2):
            state, metrics = step(state, hyper, images, targets)
        results.append((float(metrics.loss), float(metrics.grad_norm)))
    assert results[1] == pytest.approx(results[0], rel=5e-3)


@pytest.mark.parametrize("spec", ["G3", *UNITS])
def test_masks_on_the_gpu(spec):
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, 2, 70)
    q, k, v = (torch.randn(2, 2, 70, 32, generator=generator) for _ in range(3))
    for shape in ((2, 1, 1, 70), (70, 70)):
        mask = torch.rand(shape, generator=generator) > 0.4
        wanted = op.attend(params, q, k, v, mask)
        moved = [x.cuda() for x in (q, k, v, mask)]
        got = op.attend(tree.to(params, "cuda"), *moved)
        assert_close(got.cpu(), wanted, rtol=5e-3, atol=5e-3)
