"""Directions of planted paths, surfaces of quadratics, and pictures that share their scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from kart import models, pages, tables, tree
from kart.analysis import landscape


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(seed=0, size=40, count=7, ratio=0.2):
    """A float64 path in a known plane, off the origin: path, plane, its coordinates."""
    drawn = seeded(seed)
    plane = torch.linalg.qr(torch.randn(size, 2, generator=drawn).double())[0].mT
    at = torch.randn(count, 2, generator=drawn).double() * torch.tensor([1.0, ratio]).double()
    at[0] = at[0].abs() + 3 * torch.tensor([1.0, ratio])
    at[-1] = 0
    # along uncorrelated axes, so that they are the principal ones
    at[:-1] = torch.linalg.qr(at[:-1])[0] * torch.tensor([5.0, 2.0]).double()
    return torch.randn(size, generator=drawn).double() + at @ plane, plane, at


def test_directions_of_a_planted_plane():
    path, plane, at = planted()
    found, explained = landscape.directions(path)
    assert_close(found @ found.mT, torch.eye(2).double())
    signs = (found * plane).sum(-1).sign()
    assert_close(found, signs[:, None] * plane)
    assert_close(explained, torch.tensor([25 / 29, 4 / 29]).double())
    coordinates = landscape.coordinates(path, found)
    assert_close(coordinates, at * signs)
    farthest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    assert (farthest > 0).all()
    assert_close(path, path[-1] + coordinates @ found)


def test_directions_do_not_depend_on_how_columns_are_cut(monkeypatch):
    path = torch.randn(6, 23, generator=seeded()).double()
    found, explained = landscape.directions(path)
    monkeypatch.setattr(landscape, "COLUMNS", 5)
    again, shares = landscape.directions(path)
    assert_close(again, found)
    assert_close(shares, explained)
    assert_close(landscape.coordinates(path, found), landscape.coordinates(path, again))
    difference = path[:-1] - path[-1]
    _, values, rows = torch.linalg.svd(difference, full_matrices=False)
    assert_close(explained, values[:2] ** 2 / (values**2).sum())
    assert_close(found.abs(), rows[:2].abs())


@given(st.integers(0, 10**6))
def test_directions_turn_with_the_path(seed):
    path, _, _ = planted(seed)
    path = path + 0.1 * torch.randn(path.shape, generator=seeded(seed)).double()
    turn = torch.linalg.qr(torch.randn(40, 40, generator=seeded(seed + 1)).double())[0]
    found, explained = landscape.directions(path)
    turned, shares = landscape.directions(path @ turn + 7)
    assert_close(turned, found @ turn, rtol=1e-6, atol=1e-6)
    assert_close(shares, explained, rtol=1e-6, atol=1e-9)
    bigger, same = landscape.directions(100 * path)
    assert_close(bigger, found, rtol=1e-6, atol=1e-6)
    assert_close(same, explained)


def test_a_weak_second_direction_is_found_beside_a_strong_first():
    path, plane, _ = planted()
    at = landscape.coordinates(path, plane) * torch.tensor([1.0, 1e-6]).double()
    found, explained = landscape.directions(at @ plane)
    assert_close((found * plane).sum(-1).abs(), torch.ones(2).double(), rtol=0, atol=1e-8)
    assert float(explained[1]) == pytest.approx(1e-12 * 4 / 25, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_path_on_a_line_leaves_the_second_direction_open(dtype):
    line = torch.tensor([3.0, 0.0, 4.0], dtype=dtype)
    path = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=dtype)[:, None] * line
    found, explained = landscape.directions(path)
    assert_close(found @ found.mT, torch.eye(2, dtype=dtype))
    assert_close(found[0], line / 5)
    assert_close(explained, torch.tensor([1.0, 0.0], dtype=dtype))


def quadratic(seed=0, size=6):
    root = torch.randn(size, size, generator=seeded(seed)).double()
    matrix = root + root.mT
    params = {
        "a": torch.randn(2, 2, generator=seeded(seed + 1)).double(),
        "b": torch.zeros(2).double(),
    }

    def loss(params):
        w = tree.ravel(params)
        return w @ matrix @ w / 2 + w.sum()

    return loss, params, matrix


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_surface_of_a_quadratic(chunk):
    loss, params, matrix = quadratic()
    plane = torch.linalg.qr(torch.randn(6, 2, generator=seeded(5)).double())[0].mT
    extent = ((-1.0, 2.0), (-0.5, 0.5))
    z = landscape.surface(loss, params, plane, extent, 7, chunk=chunk)
    a, b = landscape.axes(extent, 7)
    steps = a[:, None, None] * plane[0] + b[None, :, None] * plane[1]
    w = tree.ravel(params) + steps
    expected = torch.einsum("xyi,ij,xyj->xy", w, matrix, w) / 2 + w.sum(-1)
    assert z.dtype == torch.float64
    assert_close(z, expected, rtol=1e-10, atol=1e-10)


def test_the_surface_of_a_vit_and_its_progress():
    model = models.create(
        "vit_nano",
        "G2B:rank=2",
        embed_dim=8,
        depth=1,
        num_heads=2,
        image_size=8,
        patch_size=4,
        in_channels=1,
        num_classes=3,
    )
    params = model.init(seeded())
    images = torch.randn(10, 1, 8, 8, generator=seeded(1))
    labels = torch.arange(10) % 3

    def losses(params, images, labels):
        return F.cross_entropy(model.apply(params, images), labels, reduction="none")

    loss = landscape.mean_loss(losses, images, labels, batch=4)
    plane = landscape.random_directions(seeded(2), params)
    seen = []

    def progress(chunks):
        for chunk in chunks:
            seen.append(len(chunk))
            yield chunk

    mapped = landscape.surface(loss, params, plane, 0.5, 5, chunk=8, progress=progress)
    assert seen == [8, 8, 8, 1]
    looped = landscape.surface(loss, params, plane, 0.5, 5, progress=tables.bar)
    assert_close(mapped, looped, rtol=1e-4, atol=1e-6)
    assert_close(looped[2, 2], losses(params, images, labels).double().mean(), rtol=1e-5, atol=0)
    moved = tree.map(lambda x, d: x + 0.5 * d, params, tree.unravel(plane[0], params))
    assert_close(looped[4, 2], loss(moved), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ["G2B:rank=2", "G2U:rank=2", "softmax"])
def test_random_directions_are_of_the_size_of_each_filter(spec):
    model = models.create(
        "vit_nano", spec, embed_dim=8, depth=2, num_heads=2, image_size=8, patch_size=4
    )
    params = tree.map(lambda x: x + 1, model.init(seeded()))
    plane = landscape.random_directions(seeded(1), params)
    assert torch.equal(plane, landscape.random_directions(seeded(1), params))
    assert not torch.allclose(plane[0], plane[1])
    for name, found in tree.named(tree.unravel(plane[0], params)).items():
        leaf = tree.named(params)[name]
        if leaf.dim() < 2:
            assert not found.any(), name
            continue
        first = 2 if "operator" in name else 1
        sizes = found.flatten(first).norm(dim=-1)
        assert_close(sizes, leaf.flatten(first).norm(dim=-1), msg=name)


def test_sharpness_and_roughness_of_a_bowl():
    grid = landscape.axes(1.0, 41)
    a, b = grid[0][:, None], grid[1]
    bowl = 3 + 2 * (a * a + b * b)
    largest, mean = landscape.sharpness(bowl, grid, 0.5)
    assert float(largest) == pytest.approx(0.5, abs=1e-12)  # 2 r^2
    assert float(mean) == pytest.approx(0.25, rel=0.03)  # half of it
    assert float(landscape.roughness(bowl, grid)) < 1e-20
    assert float(landscape.roughness(a * b - 3 * a, grid)) < 1e-20
    assert float(landscape.roughness(torch.ones(41, 41), grid)) == 0
    # a ripple of variance 1/2 across which no quadratic can help, on a bowl of known variance
    ripple = torch.sin(torch.pi * 10 * a) * torch.sin(torch.pi * 10 * b)
    found = float(landscape.roughness(bowl + ripple, grid))
    assert found == pytest.approx(float(ripple.var() / (bowl + ripple).var()), rel=0.02)


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-5, 5))
def test_roughness_has_no_unit(seed, factor, shift):
    grid = landscape.axes(1.0, 7)
    z = torch.randn(7, 7, generator=seeded(seed)).double()
    found = landscape.roughness(z, grid)
    assert 0 < found <= 1
    assert_close(landscape.roughness(factor * z + shift, grid), found)
    assert_close(landscape.roughness(z, 100 * grid), found)
    assert_close(landscape.roughness(z.mT, grid), found)
    assert_close(landscape.roughness(z.flip(0), grid), found)
    rises = torch.stack(landscape.sharpness(z, grid, 0.8))
    assert_close(torch.stack(landscape.sharpness(factor * z + shift, grid, 0.8)), factor * rises)


def test_pictures_share_levels():
    grid = landscape.axes(1.0, 9)
    bowl = grid[0][:, None] ** 2 + grid[1] ** 2
    surfaces, axes = {"softmax": bowl, "G3B": 3 * bowl}, {"softmax": grid, "G3B": 2 * grid}
    paths = {"G3B": torch.tensor([[1.0, 0.5], [0.2, 0.1], [0.0, 0.0]])}
    fig = landscape.plot(surfaces, axes, paths, {"G3B": torch.tensor([0.8, 0.1])})
    left, right, bar = fig.axes
    assert left.get_title() == "softmax" and "80 %" in right.get_xlabel()
    assert left.collections[0].levels.tolist() == right.collections[0].levels.tolist()
    assert bar.get_ylabel() == "loss" and right.get_xlim() == (-2, 2)
    assert "<svg" in pages.svg(fig, "one")
    fig = landscape.plot_surfaces(surfaces, axes)
    assert [ax.get_zlim() for ax in fig.axes[:2]] == [(0, 6), (0, 6)]
    assert "<svg" in pages.svg(fig, "two")
    holes = bowl.clone()
    holes[0, 0] = torch.nan
    assert "<svg" in pages.svg(landscape.plot({"a": holes}, {"a": grid}), "three")


@pytest.mark.parametrize("span", [0.03, 5.0])
def test_levels_are_told_apart(span):
    grid = landscape.axes(1.0, 9)
    bowl = 2.26 + span * (grid[0][:, None] ** 2 + grid[1] ** 2) / 2
    fig = landscape.plot({"a": bowl}, {"a": grid})
    fig.draw_without_rendering()
    told = [text.get_text() for text in fig.axes[-1].get_yticklabels()]
    assert len(set(told)) == len(told) > 3


def test_an_extent_may_be_a_tensor():
    assert landscape.axes(torch.tensor(2.0), 3).tolist() == landscape.axes(2.0, 3).tolist()
    ranges = ((0.0, 1.0), (-1.0, 3.0))
    assert_close(landscape.axes(torch.tensor(ranges), 3), landscape.axes(ranges, 3))


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_loss_may_draw_numbers(chunk):
    found = landscape.surface(
        lambda w: (w * torch.rand(3)).sum(), torch.ones(3), torch.eye(3)[:2], 1e-9, 3, chunk=chunk
    )
    assert len(found.unique()) == 9


GRID = landscape.axes(1.0, 5)
LOSS, PARAMS, _ = quadratic()
PLANE = torch.eye(6).double()[:2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: landscape.directions(torch.randn(2, 9)), r"T >= 3 snapshots.*\(2, 9\)"),
        (lambda: landscape.directions(torch.ones(4, 9)), "moves, got 4 equal snapshots"),
        (lambda: landscape.directions(torch.tensor([[1.0, 2], [torch.nan, 1], [0, 0]])), r"\[1\]"),
        (lambda: landscape.directions(torch.ones(4, 9).long()), "int64"),
        (lambda: landscape.coordinates(torch.randn(3, 5), torch.ones(2, 4)), r"\(2, 5\)"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE[:, :5], 1.0, 3), r"directions \(2, 6\)"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE * torch.nan, 1.0, 3), "finite directions"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE, -1.0, 3), "`extent` > 0"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE, ((0, 1),), 3), "two ranges"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE, 1.0, 1), "`points` >= 2"),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE, 1.0, 3, chunk=0), "`chunk` >= 1"),
        (lambda: landscape.surface(lambda p: p["a"], PARAMS, PLANE, 1.0, 3), "one number"),
        (lambda: landscape.mean_loss(len, torch.ones(3), torch.ones(2)), "as many examples"),
        (
            lambda: landscape.mean_loss(lambda w, x: (w * x).mean(), torch.ones(3), batch=2)(1.0),
            r"losses \(2,\) of 2 examples, got shape \(\)",
        ),
        (lambda: landscape.surface(LOSS, PARAMS, PLANE, (1, 2), 3), "two ranges"),
        (lambda: landscape.surface(LOSS, tree.to(PARAMS, torch.int64), PLANE, 1.0, 3), "int64 at"),
        (
            lambda: landscape.random_directions(seeded(), {"n": torch.ones(2, 2).long()}),
            "int64 at 'n'",
        ),
        (lambda: landscape.sharpness(torch.ones(5, 5), GRID, 0.1), r"got 1 within"),
        (lambda: landscape.sharpness(torch.ones(4, 4), landscape.axes(1.0, 4), 1.0), "odd number"),
        (lambda: landscape.sharpness(torch.ones(5, 4), GRID, 1.0), "its axes"),
        (lambda: landscape.sharpness(torch.ones(5, 5), GRID, 1.5), "`radius` <= 1, how far"),
        (lambda: landscape.coordinates(torch.eye(3), torch.ones(2, 3)), "that span a plane"),
        (lambda: landscape.roughness(torch.full((5, 5), torch.inf), GRID), "25 points nan or inf"),
        (lambda: landscape.plot({}, {}), "of the same names"),
        (lambda: landscape.plot({"a": torch.full((5, 5), torch.nan)}, {"a": GRID}), "got none"),
    ],
)
def test_what_landscape_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
