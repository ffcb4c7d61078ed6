"""`kart test` and its parts: an object by its name, progress, a limit on time, an exit status."""

import re
import time
from pathlib import Path

import pytest
import torch

from kart import bases, models, operators, projections, testing
from kart.testing import check_basis, cli_main, command

OBJECTS = """
import torch
from kart import bases, models, operators, testing
from kart.kernels import plain

def cosine(**traits):
    return bases.linear(lambda x: x.cos()[..., None], 1, family="own", traits=traits)

def stray():
    return bases.linear(lambda x: torch.where(x == 0, 2.0, x.cos())[..., None], 1, family="own")

ready = cosine()

def attention():
    return operators.relu()

def project(y, dim=-1):
    return y.softmax(dim)

def inputs(generator, count):
    return tuple(torch.randn(1, 1, count, 2, generator=generator) for _ in range(3))

kernel = testing.Kernel(
    plain.softmax_attention, plain.softmax_attention, inputs, {"count": [1, 3]}
)

def line(state, batch):
    x, y = batch
    slope = torch.func.grad(lambda w: (x @ w - y).square().mean())(state["w"])
    return {"w": state["w"] - 0.1 * slope}, {}

training = testing.Training(
    lambda generator: {"w": torch.randn(3, generator=generator)},
    line,
    lambda generator, size: (
        torch.randn(size, 3, generator=generator), torch.randn(size, generator=generator)
    ),
    params=lambda state: state,
)

def model():
    sizes = {"image_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 1, "num_heads": 2}
    return models.create("vit_nano", operator="softmax", num_classes=2, **sizes)

def needs(argument):
    return cosine()

def broken():
    return 1 / 0
"""


@pytest.fixture
def objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objects.py").write_text(OBJECTS)


@pytest.mark.parametrize(
    ("kind", "name", "prop", "status"),
    [
        ("basis", "cosine", "elementwise", 0),
        ("basis", "ready", "nan_stays_nan", 0),
        ("basis", "stray", "no_stray_points", 1),
        ("operator", "attention", "queries_permute", 0),
        ("projection", "project", "on_the_simplex", 0),
        ("projection", "project", "nearest", 1),
        ("kernel", "kernel", "values", 0),
        ("step", "training", "keeps_structure", 0),
        ("model", "model", "every_parameter_counts", 0),
    ],
)
def test_every_kind_is_tested_by_its_name(kind, name, prop, status, objects, capsys):
    assert cli_main(f"objects.py:{name}", kind, max_examples=5, only=[prop]) == status
    out = capsys.readouterr().out
    word = ("holds", "FAILS")[status]
    assert re.search(rf"^  1/1  {word}  {prop}", out, re.M)
    assert f"{1 - status} hold, {status} fail, 0 not checked" in out
    if status:
        assert f"{kind} objects.py:{name} breaks `{prop}`" in out
        assert "smallest example found" in out or "nothing was drawn" in out


def test_a_module_is_found_in_the_current_folder(objects, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", ["elsewhere", *__import__("sys").path])
    Path("as_module.py").write_text(OBJECTS)
    assert cli_main("as_module:cosine", only=["nan_stays_nan"]) == 0
    assert "holds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        ("x = 1\ny = x + undefined\n", "bad.py:x", ["bad.py, line 2", "NameError", "undefined"]),
        ("def f(:\n", "bad.py:f", ["bad.py, line 1", "SyntaxError"]),
        ("import no_such_thing\n", "bad.py:f", ["bad.py, line 1", "no_such_thing"]),
        ("x = 1\n", "bad.py:y", ["bad.py", "'y'", "x"]),
        ("x = 1\n", "bad.py", ["module:name"]),
        ("x = 1\n", "bad.py:x", ["`init`", "1"]),
        ("x = 1\n", "absent.py:x", ["no file absent.py"]),
        ("x = 1\n", "absent_module:x", ["absent_module"]),
        ("def f():\n    return 1 / 0\n", "bad.py:f", ["bad.py, line 2", "ZeroDivisionError"]),
        ("def f(a):\n    return a\n", "bad.py:f", ["TypeError", "'a'"]),
    ],
)
def test_a_file_with_an_error_is_named_in_one_line(
    text, target, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(text)
    assert cli_main(target) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_an_unknown_kind_and_property_are_refused(objects, capsys):
    assert cli_main("objects.py:ready", "bases") == 2
    assert (
        "basis, operator, projection, kernel, step, model, got 'bases'" in capsys.readouterr().err
    )
    assert cli_main("objects.py:ready", only=["elementwize"]) == 2
    assert "elementwize" in capsys.readouterr().err
    assert cli_main("objects.py:ready", "kernel") == 2
    assert "kart.testing.Kernel" in capsys.readouterr().err


def slow(seconds, wrong=False):
    def expand(x):
        time.sleep(seconds)
        return (x.cos() + wrong * (x > 1))[..., None]

    return bases.linear(expand, 1, family="slow", traits={"parity": "even"})


def test_a_slow_object_is_held_to_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda target, kind: slow(0.02))
    start = time.monotonic()
    assert cli_main("slow:slow", only=["parity"], max_examples=10_000, seconds=0.3) == 0
    assert time.monotonic() - start < 20
    assert re.search(r"holds  parity  \[\d+ examples in 0.3 s\]", capsys.readouterr().out)


def test_a_failure_within_the_limit_is_reported_with_its_example(monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda target, kind: slow(0.01, wrong=True))
    assert cli_main("slow:slow", only=["parity"], seconds=0.3) == 1
    out = capsys.readouterr().out
    assert "breaks `parity`" in out and "x = [" in out and "not a function of its" not in out


def test_signatures_say_what_may_be_given():
    assert check_basis.__name__ == "check_basis" and "expected_failures" in str(
        __import__("inspect").signature(check_basis)
    )
    with pytest.raises(TypeError, match="grid"):
        check_basis(bases.fourier(2), grid=3)
    with pytest.raises(ValueError, match="bfloat16 has a property of its own"):
        check_basis(bases.fourier(2), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("check", "objects"),
    [
        (testing.check_basis, (bases.fourier(2),)),
        (testing.check_operator, (operators.softmax(),)),
        (testing.check_projection, (projections.simplex,)),
        (testing.check_model, (models.create("vit_nano", image_size=8, patch_size=4),)),
        (testing.check_kernel, (torch.sin, torch.sin, lambda generator, n: (), {"n": [1]})),
    ],
)
def test_a_trait_that_no_property_is_of_is_refused(check, objects):
    with pytest.raises(ValueError, match="needs `traits` among .*forward_mode.*, got 'smoth'"):
        check(*objects, traits={"smoth": 3}, only=["deterministic"])


def test_a_claim_that_nothing_reads_is_refused():
    sines = bases.linear(lambda x: x.sin()[..., None], 1, traits={"odd": True})
    with pytest.raises(ValueError, match="traits are among .*parity.*, got 'odd'"):
        check_basis(sines, only=["parity"])
    softmax = operators.softmax()
    misspelt = softmax._replace(traits={**softmax.traits, "lenght_free": True})
    with pytest.raises(ValueError, match="got 'lenght_free'. Near matches: length_free"):
        testing.check_operator(misspelt, only=["length_free"])
