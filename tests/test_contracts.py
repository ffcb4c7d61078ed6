"""Contracts over the whole package: imports point down, importing does nothing, docs are there."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import kart

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
    {"operators", "optim", "checkpoint"},
    {"layers"},
    {"tree", "bases", "projections", "kernels", "data", "augment", "tables"},
    {"factories"},
    {"code", "pages", "schema", "statistics"},
]
FLOOR = {room: len(HOUSE) - i for i, rooms in enumerate(HOUSE) for room in rooms}
# within a floor
BESIDE = {
    ("optim", "tree"),
    ("checkpoint", "tree"),
    ("augment", "data"),
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
