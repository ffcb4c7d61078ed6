"""Contracts over the whole package: imports point down, importing does nothing, docs are there."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kart
from kart import kernels, models, operators, optim, statistics
from kart.analysis import attention, curvature, functions, landscape, spectra, symbolic, weights

ROOT = Path(kart.__file__).parent
# top to bottom: a room may import the rooms that stand below it
HOUSE = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"testing", "search"},
    {"runs"},
    {"analysis"},
    {"export", "population", "recipes", "distributed"},
    {"train"},
    {"transfer"},
    {"models", "bridges"},
    {"nn"},
    {"operators", "optim", "checkpoint", "gpu"},
    {"layers"},
    {"tree", "bases", "projections", "kernels", "data", "augment"},
    {"factories"},
    {"code", "pages", "schema", "statistics", "tables"},
]
FLOOR = {room: len(HOUSE) - i for i, rooms in enumerate(HOUSE) for room in rooms}
# within a floor
BESIDE = {
    ("optim", "tree"),
    ("checkpoint", "tree"),
    ("augment", "data"),
    ("augment", "tree"),
    ("data", "tree"),
    ("kernels", "projections"),
}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kart":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kart."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("kart."))


def test_rooms_import_only_downwards():
    for path in ROOT.rglob("*.py"):
        here = room(path)
        if here == "__init__":
            continue
        for there in imported_rooms(path):
            down = FLOOR[there] < FLOOR[here] or there == here or (here, there) in BESIDE
            assert down, f"{path.relative_to(ROOT)} imports {there}, which is not below it"


def test_optuna_and_hypothesis_have_one_owner_each():
    owners = {"optuna": "search", "hypothesis": "testing"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                owner = owners.get(name.split(".")[0])
                assert owner in (None, room(path)), f"{path.name} imports {name}"


def test_importing_has_no_side_effects(tmp_path):
    program = """
import os, sys, torch
before = (torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype())
import kart, kart.cli, kart.population, kart.runs
assert torch.equal(before[0], torch.random.get_rng_state())
assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())
heavy = {"optuna", "hypothesis", "matplotlib", "sklearn", "datasets", "pytest"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not os.listdir("."), os.listdir(".")
"""
    env = {"PYTHONPATH": str(ROOT.parent), "HOME": str(tmp_path), "PATH": ""}
    run = [sys.executable, "-B", "-c", program]
    result = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_files_of_a_room_are_there_after_importing_kart_alone():
    program = """
import kart
print(kart.bridges.timm.attention, kart.bridges.transformers.attach, kart.bridges.multihead)
print(kart.analysis.spectra.effective_rank)
for room in (kart.bridges, kart.analysis):
    assert not hasattr(room, "torch") and not hasattr(room, "__wrapped__")
"""
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=ROOT.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_defaults_of_torch_change_nothing_and_first_use_may_be_under_any():
    program = """
import logging, torch
from kart import models, operators, tree

specs = ["softmax", "G2", "rational", "static:base=softmax", "G2:order=full_rank", "tempered"]
specs += ["G2:order=elementwise", "sparsemax", "relative:inside=true", "gated", "linformer"]
specs += ["G2:order=by_offset", "G2:base=softmax,mix=linear", "synthesizer:width=3", "dog"]
specs += ["G2:order=generated", "G2:order=generated,reach=none,prefix=1,features=5", "softconv"]


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def found():
    for spec in specs:
        op, generator = operators.parse(spec).operator, torch.Generator().manual_seed(0)
        params = op.init(generator, 2, 5)
        q, k, v = (draw(generator, 2, 2, 5, 3) for _ in range(3))
        yield params, op.attend(params, q, k, v)
        if spec in ("softconv", "G2:order=by_offset"):
            yield operators.resize(op, params, 5, 10), draw(generator, 0)
    for name in ("vit_nano", "convit_tiny", "swin_tiny", "vitdet_tiny"):
        sizes = {"image_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 4}
        sizes |= {"depth": 2, "gated_blocks": 1} if name == "convit_tiny" else {}
        sizes |= {"global_blocks": (0,)} if name == "vitdet_tiny" else {}
        if name == "swin_tiny":
            sizes = {"image_size": 32, "patch_size": 4, "depths": (1,), "num_heads": (4,)}
            sizes |= {"embed_dim": 8, "window_size": 4}
        model = models.create(name, operator="G2B", **sizes)
        yield model.init(torch.Generator().manual_seed(0)), draw(torch.Generator(), 0)


class Heard(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())


logging.getLogger("kart").addHandler(Heard())
torch.set_default_dtype(torch.float64)
with torch.inference_mode(), torch.device("meta"):
    odd = list(found())
torch.set_default_dtype(torch.float32)
for one, other in zip(odd, found(), strict=True):
    for x, y in zip(tree.leaves(one[0]), tree.leaves(other[0]), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert torch.equal(one[1], other[1])
# what was kept from then can be differentiated
for spec in specs:
    op = operators.parse(spec).operator
    params = tree.map(lambda x: x.requires_grad_(), op.init(torch.Generator(), 2, 5))
    q = torch.ones(2, 2, 5, 3, requires_grad=True)
    op.attend(params, q, q, q).sum().backward()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_first_use_may_be_under_a_checkpoint():
    program = """
import logging, torch
from torch.utils.checkpoint import checkpoint
from kart import operators, tree


class Heard(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())


logging.getLogger("kart").addHandler(Heard())
for spec in ("G2", "rational", "G1:base=softmax", "dog:order=elementwise", "static:base=softmax"):
    op = operators.parse(spec).operator
    params = tree.map(lambda x: x.requires_grad_(), op.init(torch.Generator(), 2, 5))
    x = torch.ones(2, 2, 5, 3, requires_grad=True)
    for reentrant in (False, True):
        out = checkpoint(lambda x: op.attend(params, x, x, x), x, use_reentrant=reentrant)
        out.sum().backward()
    assert all(leaf.grad is not None for leaf in tree.leaves(params))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_module_and_public_function_has_a_docstring():
    for info in pkgutil.walk_packages(kart.__path__, "kart."):
        if "triton" in info.name.split(".")[-1] or ".triton" in info.name:
            continue  # needs triton to import
        module = __import__(info.name, fromlist=["_"])
        assert module.__doc__, info.name
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == info.name
            if own and not name.startswith("_") and inspect.isfunction(value):
                assert value.__doc__, f"{info.name}.{name}"


GRID = torch.linspace(-1, 1, 9)
MANY = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def square(params):
    return (params**2).sum()


def curved(measure, *count, **options):
    return measure(square, torch.ones(3), *count, torch.Generator().manual_seed(0), **options)


# calls with a number
NUMBERS = {
    "level": lambda x: statistics.accuracy([0.1, 0.2], level=x),
    "images": lambda x: statistics.accuracy([0.1, 0.2], images=x),
    "tolerance": lambda x: curved(curvature.top_eigenvalues, 1, tolerance=x),
    "limit": lambda x: curved(curvature.top_eigenvalues, 1, limit=x),
    "vectors": lambda x: curved(curvature.top_eigenvalues, 1, vectors=x),
    "width": lambda x: curved(curvature.spectral_density, 2, width=x),
    "chunk": lambda x: curvature.noise_scale(torch.dot, torch.ones(3), MANY, chunk=x),
    "`tolerance": lambda x: spectra.numerical_rank(torch.eye(3), x),
    "floor": lambda x: spectra.log_profile(torch.ones(2, 3), x),
    "share": lambda x: attention.region(torch.ones(3, 3), x),
    "height": lambda x: attention.enlarge(torch.ones(2, 2), x, 4),
    "fraction": lambda x: weights.near_zero(GRID, x),
    "similarity": lambda x: symbolic.clusters(GRID[None], GRID, similarity=x),
    "count": lambda x: symbolic.clusters(GRID[None], GRID, count=x),
    "margin": lambda x: symbolic.candidate(GRID.sin(), GRID, margin=x),
    "radius": lambda x: landscape.sharpness(torch.ones(5, 5), landscape.axes(1.0, 5), x),
    "batch": lambda x: landscape.mean_loss(torch.mul, GRID, batch=x),
    "`count": lambda x: functions.strongest(torch.ones(1, 2, 3, 4), count=x),
    "points": lambda x: functions.score_range(None, operators.softmax(), points=x),
    "scale": lambda x: kernels.softmax_attention(MANY[None], MANY[None], MANY[None], scale=x),
    "learning_rate": lambda x: optim.adamw(learning_rate=x),
    "locality": lambda x: models.convit.convit(image_size=8, patch_size=4, locality=x),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["x", True, [1]])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=name.lstrip("`")):
        NUMBERS[name](value)


# measures of one tensor
MEASURES = {
    "class_maps": attention.class_maps,
    "region": attention.region,
    "dominant_head": attention.dominant_head,
    "rollout": lambda x: attention.rollout([x, x]),
    "row_sums": attention.row_sums,
    "negative_share": attention.negative_share,
    "entropy": attention.entropy,
    "head_diversity": attention.head_diversity,
    "static_share": attention.static_share,
    "enlarge": lambda x: attention.enlarge(x, 6, 6),
    "log_profile": spectra.log_profile,
    "density": lambda x: functions.density(x, GRID),
    "score_range": lambda x: functions.score_range(x, operators.softmax()),
    "strongest": functions.strongest,
    "moved": lambda x: functions.moved(x, x),
    "fits": lambda x: functions.fits(x, GRID),
    "curves": lambda x: functions.curves(operators.softmax(), {}, x),
    "candidate": lambda x: symbolic.candidate(x, GRID),
    "clusters": lambda x: symbolic.clusters(x, GRID),
    "coordinates": lambda x: landscape.coordinates(x, torch.eye(2)),
    "roughness": lambda x: landscape.roughness(x, landscape.axes(1.0, 3)),
    "the curvature": lambda x: curved_at(curvature.trace, x, 2),
    "`top_eigenvalues": lambda x: curved_at(curvature.top_eigenvalues, x, 1),
    "noise_scale": lambda x: curvature.noise_scale(torch.mul, torch.ones(()), x),
    "mean_loss": lambda x: landscape.mean_loss(torch.mul, x),
}


def curved_at(measure, params, count):
    return measure(square, params, count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_names_what_is_no_tensor_and_what_is_empty(name):
    for wrong in (7.0, [[1.0]], torch.zeros(0)):
        with pytest.raises(ValueError, match=name.lstrip("`")):
            MEASURES[name](wrong)


def test_what_is_not_a_number_is_not_passed_over():
    nan = torch.full((1, 1, 1, 4), torch.nan)
    assert functions.moved(nan, torch.ones(1, 1, 1, 4)).isnan().all()
    with pytest.raises(ValueError, match="`density` needs scores that are numbers, got 1 of 2 nan"):
        functions.density(torch.tensor([0.0, torch.nan]), GRID)
    with pytest.raises(ValueError, match="`region` needs finite maps .* with 4 values nan or inf"):
        attention.region(nan[0])
    with pytest.raises(ValueError, match=r"`fits` needs values .*, x \(X\) and a density"):
        functions.fits(GRID, GRID.log())
