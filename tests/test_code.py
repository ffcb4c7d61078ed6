"""A basis or operator of one's own by its name: it trains, round-trips, and runs only if named."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from PIL import Image

from kart import checkpoint, cli, code, models, operators, runs, train, tree
from kart.train import Config

SOURCE = '''
import os
import torch
from kart import bases, operators

with open(os.environ.get("KART_RAN", os.devnull), "a") as file:
    file.write("ran\\n")

def sinc(grid: int = 4, width: float = 1.0):
    """Shifted sinc functions."""
    centres = torch.linspace(-3, 3, grid)
    return bases.linear(lambda x: torch.sinc((x[..., None] - centres) / width), grid)

hats = bases.gaussian_rbf(3)

def waves(rank: int = 2):
    return bases.fourier(rank)

def halved(share: float = 0.5):
    return operators.from_rows("halved", lambda scores, mask: share * scores.softmax(-1))

def warm():
    def weights(params, scores, mask=None):
        return (scores * params["warmth"][:, None, None]).softmax(-1)

    def attend(params, q, k, v, mask=None):
        return weights(params, q @ k.mT * q.shape[-1] ** -0.5) @ v

    init = lambda generator, heads, tokens: {"warmth": torch.ones(heads)}
    return operators.Operator("warm", init, weights, attend)

def broken(grid: int = 2):
    raise RuntimeError("no such\\nthing")

text = "no basis"
'''
TINY = ["--epochs", "1", "--batch-size", "8", "--embed-dim", "4", "--depth", "1", "--num-heads"]
TINY += ["1", "--patch-size", "4", "--train-limit", "24", "--threads", "1", "--quiet"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with `waves.py`, in a process that was given no code."""
    (tmp_path / "waves.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "_given", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("waves", None)


@pytest.mark.parametrize(
    ("spec", "size", "sharing"),
    [
        ("waves.py:sinc-B", 4, "blockwise"),
        ("waves:sinc-6U", 6, "universal"),
        ("waves.py:sinc:rank=2,width=0.5", 4, None),
        ("./waves.py:hats-B:rank=3,base=softmax", 3, "blockwise"),
        ("2*waves.py:sinc-5B+softmax", None, "blockwise"),
        ("waves.py:sinc-B:order=full_rank", 4, "blockwise"),
    ],
)
def test_a_spec_names_a_basis_of_ones_own(spec, size, sharing, own):
    parsed = operators.parse(spec)
    assert parsed.sharing == sharing and parsed.operator.name == spec
    if size is not None:
        assert parsed.operator.basis.size == size
    model = models.create("vit_nano", spec, image_size=8, patch_size=4, num_heads=3, embed_dim=12)
    params = model.init(torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, 8, 8)
    again = models.from_config(json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert torch.equal(again.apply(params, images), model.apply(params, images))


@pytest.mark.parametrize(("letter", "leaves"), [("B", 2), ("U", 1)])
def test_an_operator_made_by_hand_has_parameters_to_share(letter, leaves, own):
    spec = f"waves.py:warm-{letter}"
    model = models.create("vit_nano", spec, image_size=8, patch_size=4, depth=2)
    names = tree.named(model.init(torch.Generator().manual_seed(0)))
    assert sum(name.endswith("operator.warmth") for name in names) == leaves
    argv = ["train", "--operator", "waves.py:warm", "--sharing", "universal", *TINY, "--out", "run"]
    assert cli.main(argv) == 0


def test_overrides_reach_it(own):
    assert operators.options("waves.py:sinc-4B") >= {"rank", "width"}
    op = operators.parse("waves.py:sinc-B", rank=2).operator
    assert op.options["rank"] == 2
    halved = operators.parse("waves.py:halved:share=0.25").operator
    assert float(halved.weights({}, torch.zeros(1, 2, 4)).sum()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("waves.py:sinc-1/2/3B", "takes 2 numbers, got 3"),
        ("waves.py:sinc-4B:grid=3", "given twice"),
        ("waves.py:sinc-B:heihgt=3", "no effect"),
        ("waves.py:broken-B", "waves.py, line 33: RuntimeError: no such thing"),
        ("waves.py:sinc-0B", "got 0. Pass a larger one."),
        ("waves.py:waves-B:rank=3", "rank is an option of low_rank and of waves: rename that of w"),
        ("waves.py", "what is in a file is named waves.py:NAME-NUMBERS, B or U behind them"),
        ("waves.py:sinc-b", "what is in a file is named waves.py:NAME-NUMBERS"),
        ("waves.py:text-B", "must be a basis or an operator"),
        ("waves.py:nothing-B", "It has"),
        ("nowhere.py:sinc-B", "there is no file"),
        ("no_such_module:sinc-B", "no_such_module"),
        ("waves.py:halved:order=full_rank", "no effect"),
        ("G3B:sinc-B", "not of the form"),
        ("softmx:rank=3", "there is no operator"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(spec, words, own):
    with pytest.raises(ValueError, match="(?s)" + words.replace(".", r"\.")) as caught:
        operators.parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["p+q", "p*q", "p|q", "p:q", "p\u00e9"])
def test_a_path_that_no_spec_can_hold_is_said(folder, own):
    (own / folder).mkdir()
    (own / "waves.py").rename(own / folder / "waves.py")
    spec = f"{folder}/waves.py:sinc-B"
    with pytest.raises(ValueError, match="name waves.py from within its folder"):
        models.create("vit_nano", spec, depth=3, image_size=8, patch_size=4)
    with pytest.raises(ValueError, match="there is no operator 'p'. Near"):
        operators.parse("p+nowhere.py:sinc-B")


def test_a_run_of_it_trains_and_is_read_only_where_its_code_is_named(own, capsys):
    argv = ["train", "--operator", "softmax", "waves.py:sinc-B:rank=2", *TINY, "--out", "runs"]
    assert cli.main(argv) == 0
    assert "waves.py:sinc-B:rank=2" in capsys.readouterr().out
    home = own / "runs" / "waves-py-sinc-B-rank-2"
    _, config = checkpoint.load(home / "last.safetensors")
    assert runs.read(home).configs[0].operator == "waves.py:sinc-B:rank=2"
    marker = own / "ran"
    env = {**os.environ, "KART_RAN": str(marker), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(code.__file__).parents[1])

    def kart(*argv):
        call = [sys.executable, "-m", "kart", *argv]
        return subprocess.run(call, cwd=own, env=env, capture_output=True, text=True)

    for argv in (["eval", str(home)], ["analyse", str(home)], ["export", str(home), "--out", "m"]):
        done = kart(*argv)
        assert done.returncode == 2 and "--code" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not marker.exists(), done.stderr
    done = kart("eval", str(home), "--code", "waves.py")
    assert done.returncode == 0 and "waves.py:sinc-B" in done.stdout, done.stderr
    assert marker.read_text() == "ran\n"


def test_reading_in_a_script_runs_nothing_and_says_what_to_do(own, capsys, monkeypatch):
    assert cli.main(["train", "--operator", "waves.py:sinc-B", *TINY, "--out", "run"]) == 0
    splits = train.load_data(Config())
    monkeypatch.setattr(code, "_given", {})
    config = runs.read("run").configs[0]
    for one in (config, dataclasses.replace(config, seed=3), Config.fromdict(config.asdict())):
        with pytest.raises(ValueError, match=r"kart\.code\.use\('waves\.py'\)"):
            train.build(copy.deepcopy(one), splits.train)
    code.use(str(own / "waves.py"))  # known by its name, wherever it lies
    assert train.build(config, splits.train).config.operator == "waves.py:sinc-B"
    assert train.build(Config(operator="waves.py:sinc-B"), splits.train)


def test_other_code_than_that_of_the_run_is_refused(own, capsys, monkeypatch):
    argv = ["train", "--operator", "waves.py:sinc-B", *TINY, "--out", "run"]
    assert cli.main(argv) == 0
    (own / "waves.py").write_text(SOURCE + "\n# another\n")
    monkeypatch.setattr(code, "_given", {})
    for again in (argv, ["eval", "run", "--code", "waves.py"]):
        capsys.readouterr()
        assert cli.main(again) == 2
        assert "code it was trained with" in capsys.readouterr().err


def test_code_that_no_run_names_is_refused(own, capsys):
    assert (
        cli.main(["train", "--operator", "waves.py:sinc-B", "softmax", *TINY, "--out", "run"]) == 0
    )
    (own / "other.py").write_text("")
    Image.new("L", (8, 8)).save("image.png")
    out = ["--out", "m.safetensors"]
    for argv in (["eval", "run"], ["analyse", "run", "--sections", "scores"]):
        assert cli.main([*argv, "--code", str(own / "waves.py")]) == 0
        capsys.readouterr()
        assert cli.main([*argv, "--code", "waves.py", "--code", "other.py"]) == 2
        assert "`--code other.py` has no effect on runs whose operators name waves.py." in (
            capsys.readouterr().err
        )
    for argv in (["predict", "run/softmax", "image.png"], ["export", "run/softmax", *out]):
        capsys.readouterr()
        assert cli.main([*argv, "--code", "waves.py"]) == 2
        assert "no effect on runs whose operators name no code" in capsys.readouterr().err
        assert cli.main(argv) == 0


def test_a_study_searches_it(own, capsys):
    text = """
    \"\"\"Which width?\"\"\"
    import dataclasses
    from kart.search import Study
    from kart.train import Config

    def own(trial, config):
        width = trial.suggest_float("width", 0.5, 2)
        return dataclasses.replace(config, operator=f"waves.py:sinc-B:rank=2,width={width:.3f}")

    STUDY = Study(Config(), {"own": own}, trials=2, seeds=1)
    """
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    (own / "width.py").write_text("\n".join(lines))
    argv = ["study", "run", "width.py", "--tiny", "--set", "confirm=1", "--quiet", "--out", "out"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert "waves.py:sinc-B" in (own / "out" / "report.html").read_text()


def test_a_search_that_went_on_confirms_it_behind_other_choices(own, monkeypatch, capsys):
    (own / "kinds.py").write_text(
        "import dataclasses\n"
        "from kart.search import Study\n"
        "from kart.train import Config\n"
        "def choose(trial, config):\n"
        "    kinds = [trial.suggest_categorical(name, ['softmax', 'own']) for name in 'ab']\n"
        "    last = 'waves.py:sinc-B:rank=2' if kinds == ['own', 'own'] else 'softmax'\n"
        "    return dataclasses.replace(config, operator=last)\n"
        "STUDY = Study(Config(), {'own': choose}, trials=1, seeds=1)\n"
    )
    # the first point, and those one choice apart from it, are softmax
    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", lambda *args: "own")
    argv = ["study", "run", "kinds.py", "--tiny", "--group", "1", "--quiet", "--out", "out"]
    for confirm in "01":
        monkeypatch.setattr(code, "_given", {})
        assert cli.main([*argv, "--confirm", confirm]) == 0, capsys.readouterr().err
    assert "waves.py:sinc-B" in (own / "out" / "report.html").read_text()
