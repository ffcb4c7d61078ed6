"""Pytrees: structure kept, names as documented, mismatches told apart."""

from typing import NamedTuple

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from kart import tree


class State(NamedTuple):
    step: torch.Tensor
    total: dict


def example():
    return {
        "blocks": {"0": {"weight": torch.ones(2, 3), "extra": {}}},
        "state": State(torch.tensor(1), {"bias": torch.zeros(3)}),
        "pair": (torch.arange(2.0), [torch.arange(3.0)]),
    }


NAMES = ["blocks.0.weight", "state.step", "state.total.bias", "pair.0", "pair.1.0"]


def test_map_keeps_containers_and_empty_ones():
    doubled = tree.map(lambda x: 2 * x, example())
    assert isinstance(doubled["state"], State)
    assert doubled["blocks"]["0"]["extra"] == {}
    assert isinstance(doubled["pair"], tuple)
    assert_close(doubled["pair"][1][0], torch.tensor([0.0, 2.0, 4.0]))
    assert tree.map(lambda x: x, {}) == {}


def test_leaves_names_and_map_named_agree():
    assert list(tree.named(example())) == NAMES
    assert len(tree.leaves(example())) == len(NAMES)
    seen = []
    tree.map_named(lambda name, leaf: seen.append((name, tuple(leaf.shape))), example())
    assert [name for name, _ in seen] == NAMES
    assert dict(seen)["blocks.0.weight"] == (2, 3)


def test_map_pairs_leaves_by_key_whatever_the_order_of_the_keys():
    both = tree.map(
        lambda a, b: a + b, {"x": 1, "y": {"z": 2, "w": 3}}, {"y": {"w": 30, "z": 20}, "x": 10}
    )
    assert both == {"x": 11, "y": {"z": 22, "w": 33}}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"x": 1}, "got 2 and 1 leaves, of which only one tree has y.z"),
        ({"x": 1, "y": {"z": 2, "w": 3}}, "only one tree has y.w"),
        ({"x": 1, "y": 2}, "only one tree has y, y.z"),
        ({"x": 1, "y": {"z": {"deep": 2}}}, "only one tree has y.z, y.z.deep"),
        ({"x": 1, "y": {"z": {}}}, "only one tree has y.z"),
        ({"x": 1, "y": State(torch.tensor(1), {})}, "only one tree has"),
        (3, "needs trees of one structure"),
    ],
)
def test_map_names_what_does_not_match(other, words):
    with pytest.raises(ValueError, match=words):
        tree.map(lambda a, b: a, {"x": 1, "y": {"z": 2}}, other)


def test_map_refuses_other_containers_of_equal_names():
    with pytest.raises(ValueError, match="in other containers"):
        tree.map(lambda a, b: a, {"x": [1, 2]}, {"x": (1, 2)})


def test_unflatten_inverts_named():
    nested = {"blocks": {"0": {"bias": 1, "weight": 2}, "1": {"bias": 3}}, "head": 4}
    assert tree.unflatten(tree.named(nested)) == nested


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"a": 1, "a.b.c": 2}])
def test_unflatten_loses_no_leaf(flat):
    with pytest.raises(ValueError, match="`tree.unflatten` needs paths none of which begins anoth"):
        tree.unflatten(flat)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unstack_inverts_stack(dim):
    trees = [
        {"a": torch.full((2, 3), float(i)), "b": (torch.full((4,), -float(i)),)} for i in range(5)
    ]
    stacked = tree.stack(trees, dim)
    assert stacked["a"].shape[dim] == stacked["b"][0].shape[dim] == 5
    assert_close(tree.unstack(stacked, dim), trees)


def test_stack_and_unstack_refuse_what_has_no_one_size():
    with pytest.raises(ValueError, match="at least one tree"):
        tree.stack([])
    with pytest.raises(ValueError, match=r"one size along axis 0, got sizes \[2, 3\]"):
        tree.unstack({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="got sizes"):
        tree.unstack({})


def test_norm_is_global_at_least_float32_and_differentiable_at_zero():
    flat = torch.tensor([3.0, 4.0, 12.0])
    assert_close(tree.norm({"a": flat[:2], "b": [flat[2]]}), torch.tensor(13.0))
    # 300 squared overflows float16
    half = tree.norm({"a": torch.full((100,), 300.0, dtype=torch.float16)})
    assert_close(half, torch.tensor(3000.0))
    assert tree.norm({"a": flat.double(), "b": flat}).dtype == torch.float64
    assert_close(vmap(tree.norm)({"a": flat[:, None], "b": flat}), flat * 2**0.5)
    assert_close(grad(lambda x: tree.norm({"a": x}))(torch.zeros(3)), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one leaf"):
        tree.norm({"a": {}})


def test_size_and_to():
    assert tree.size(example()) == 6 + 1 + 3 + 2 + 3
    moved = tree.to({"a": torch.ones(2)}, torch.float64)
    assert moved["a"].dtype == torch.float64


def test_ravel_and_unravel_are_inverse():
    drawn = torch.Generator().manual_seed(0)
    params = {
        "a": torch.randn(2, 3, generator=drawn),
        "b": {"c": torch.randn((), generator=drawn, dtype=torch.float64), "empty": {}},
    }
    vector = tree.ravel(params)
    assert vector.shape == (7,) and vector.dtype == torch.float64
    back = tree.unravel(vector, params)
    assert back["b"]["empty"] == {} and back["a"].dtype == torch.float32
    assert torch.equal(back["a"], params["a"]) and torch.equal(back["b"]["c"], params["b"]["c"])
    many = tree.unravel(torch.stack([vector, 2 * vector]), params)
    assert many["a"].shape == (2, 2, 3) and torch.equal(many["b"]["c"][1], 2 * params["b"]["c"])
    mapped = torch.func.vmap(lambda p: tree.ravel(p))(many)
    assert torch.equal(mapped[0], vector)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tree.ravel({}), "at least one leaf"),
        (
            lambda: tree.unravel(torch.ones(3), {"a": torch.ones(2)}),
            r"\(\.\.\., 2\).*got shape \(3",
        ),
    ],
)
def test_ravel_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="a path for each leaf, got two at 'a.b'"):
        tree.named({"a.b": 1, "a": {"b": 2}})


def test_what_has_no_such_axis_is_not_unstacked():
    with pytest.raises(ValueError, match="leaves with an axis 0, got one without"):
        tree.unstack({"a": torch.tensor(1.0)})
