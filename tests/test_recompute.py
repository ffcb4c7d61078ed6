"""Blocks computed again in the backward: the same gradients under every transform, less memory."""

import pytest
import torch
from torch.testing import assert_close

from kart import models, train, tree

OPERATORS = ["softmax", "G2B", "G2U", "dog-B", "G2B:base=softmax", "G2B:order=full_rank"]


def pair(operator, **fields):
    fields = {"image_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 8, **fields}
    fields |= {"depth": 2, "num_heads": 2, "in_channels": 1}
    kinds = [models.create("vit_nano", operator, **fields, recompute=r) for r in (False, True)]
    params = tree.to(kinds[0].init(torch.Generator().manual_seed(0)), torch.float64)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    targets = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    return kinds, params, images, targets


def close(one, other):
    tree.map(lambda a, b: assert_close(a, b, rtol=1e-10, atol=1e-12), one, other)


@pytest.mark.parametrize("batching", ["native", "vmap"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_those_without(operator, batching):
    kinds, params, images, targets = pair(operator)
    losses = [train.batch_loss(model, batching) for model in kinds]
    close(*(torch.func.grad_and_value(f)(params, images, targets) for f in losses))
    if batching == "native":
        close(*(train.value_and_gradients(f)(params, images, targets) for f in losses))


@pytest.mark.parametrize("operator", ["softmax", "G2U"])
def test_per_example_gradients_populations_and_curvature(operator):
    kinds, params, images, targets = pair(operator)
    losses = [train.batch_loss(model, "native") for model in kinds]
    grads = [torch.func.grad(f) for f in losses]
    close(*(torch.func.vmap(g, (None, 0, 0))(params, images, targets) for g in grads))
    stacked = tree.stack([params, tree.map(lambda x: x * 1.1, params)])
    close(*(torch.func.vmap(g, (0, None, None))(stacked, images, targets) for g in grads))
    direction = tree.map(torch.ones_like, params)

    def hvp(g):
        return torch.func.jvp(lambda p: g(p, images, targets), (params,), (direction,))[1]

    close(*map(hvp, grads))

    # reverse over reverse
    def slope(g):
        return lambda p: sum(x.square().sum() for x in tree.leaves(g(p, images, targets)))

    close(*(torch.func.grad(slope(g))(params) for g in grads))


def test_what_is_looked_at_is_the_same():
    kinds, params, images, _ = pair("G2B")
    close(*(model.intermediates(params, images) for model in kinds))
    close(*(model.apply(params, images) for model in kinds))


def test_under_autocast_the_backward_computes_what_the_forward_did():
    kinds, params, images, targets = pair("softmax")
    params, images = tree.to(params, torch.float32), images.float()
    found = []
    for model in kinds:
        leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
        with torch.autocast("cpu", torch.bfloat16):
            loss = train.cross_entropy(model.apply(leaves, images), targets).mean()
        found.append(torch.autograd.grad(loss, tree.leaves(leaves), materialize_grads=True))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def kept(model, params, images):
    """Bytes that autograd keeps for the backward, parameters aside."""
    own = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(params)}
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    leaves = tree.map(lambda x: x.requires_grad_(), params)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.apply(leaves, images).sum()
    assert out.requires_grad
    return sum(seen.values())


def test_blocks_keep_their_input_alone():
    kinds, params, images, _ = pair("G2B", image_size=32)
    images = images.repeat(1, 1, 4, 4)
    plain, again = (kept(model, tree.map(torch.clone, params), images) for model in kinds)
    assert again < plain / 4


def test_models_and_steps_without_it_say_so():
    with pytest.raises(ValueError, match="recompute"):
        models.create("convit_nano", recompute=True)
    with pytest.raises(ValueError, match='`step` "eager" with `recompute`'):
        train.Config(recompute=True, step="compiled")
