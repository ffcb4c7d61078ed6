"""Seeds that diverge: named and left out, and the others as they would be without them."""

import json
import sys

import pytest
import safetensors.torch
import torch

from kart import checkpoint, cli, code, runs

# weights of attention that are infinite for one seed
SOURCE = """
import torch
from kart import operators

def coin(unlucky: int = 0):
    def init(generator, heads, tokens):
        return {"lost": torch.full((heads, 1, 1), float(generator.initial_seed() == unlucky))}

    def weights(params, scores, mask=None):
        return torch.where(params["lost"] > 0.5, torch.inf, scores.softmax(-1))

    def attend(params, q, k, v, mask=None):
        return weights(params, q @ k.mT) @ v

    traits = {"learned": True, "length_free": True}
    return operators.Operator("coin", init, weights, attend, traits=traits)
"""
TINY = [
    *("--epochs", "2", "--batch-size", "8", "--train-limit", "24", "--embed-dim", "4"),
    *("--depth", "1", "--num-heads", "1", "--patch-size", "4", "--threads", "1", "--quiet"),
]


def call(capsys, *argv):
    status = cli.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()


@pytest.fixture
def coin(tmp_path, monkeypatch):
    """The spec of an operator with which seed 1 diverges at once and seeds 3 and 5 do not."""
    (tmp_path / "coin.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code, "_given", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "coin.py:coin:unlucky=1"
    sys.modules.pop("coin", None)


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_seed_that_diverges_stops_no_other_whatever_the_groups(coin, capsys, tmp_path):
    tables, line = set(), f"{coin}, seed 1, diverged at step 0 and is left out of the means."
    for group in (1, 2, 3):
        out = tmp_path / f"by-{group}"
        argv = ["train", *TINY, "--operator", coin, "--seeds", 1, 3, 5, "--group", group]
        status, text, error = call(capsys, *argv, "--out", out)
        assert status == 0 and line in text
        assert error.count("seed 1: training stopped at step 0") == (group == 1)
        assert text.splitlines()[-1].endswith(f"kart eval {out} --code coin.py")
        scored = call(capsys, "eval", out, "--code", "coin.py")
        assert scored[0] == 0 and line in scored[1]
        sections = ["--sections", "scores,training", "--code", "coin.py"]
        status, text, error = call(capsys, "analyse", out, *sections)
        assert status == 0 and line in text, error
        tables.add((scored[1].splitlines()[2], text.splitlines()[2]))
    assert len(tables) == 1 and all(row.endswith(" 2") for row in tables.pop())
    for path in (tmp_path / "by-3").rglob("*.json*"):
        for one in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strict(one)
    group = tmp_path / "by-3" / "group-0"
    scores = json.loads((group / "eval-test-last.json").read_text())["members"]
    assert [one["diverged"] for one in scores] == [0, -1, -1] and scores[0]["loss"] is None
    read = runs.read_metrics(group)[-1]
    assert torch.tensor(read["val_loss"]).isnan().tolist() == [True, False, False]


def test_where_no_seed_is_left_there_is_nothing_to_score(coin, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TINY, "--operator", coin, "--seeds", 1, "--out", out]
    status, text, error = call(capsys, *argv)
    assert status == 1 and error.count("\n") == 1 and "training stopped at step 0" in error
    assert "operator" not in text and "kart eval" not in text
    for command in ("eval", "analyse"):
        status, _, error = call(capsys, command, out, "--code", "coin.py")
        assert status == 2 and "did not diverge" in error and error.count("\n") == 1


def test_an_operator_that_lost_all_its_seeds_is_named(coin, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TINY, "--operator", "softmax", coin, "--seeds", 1, "--out", out]
    assert call(capsys, *argv)[0] == 1
    sections = ["--sections", "scores,training", "--code", "coin.py"]
    status, text, error = call(capsys, "analyse", out, *sections)
    line = f"{coin}, seed 1, diverged at step 0 and is left out of the means."
    assert status == 0 and line in text, error
    assert line in (out / "report.html").read_text()


def test_a_member_that_diverged_predicts_nothing(coin, capsys, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    out = tmp_path / "run"
    argv = ["train", *TINY, "--operator", coin, "--seeds", 1, 3, "--group", 2, "--out", out]
    assert call(capsys, *argv)[0] == 0
    predict, export = ["predict", out, "image.png"], ["export", out, "--out", "file.safetensors"]
    for command in (predict, export):
        status, _, error = call(capsys, *command, "--seed", 1, "--code", "coin.py")
        assert status == 2 and "did not diverge, got 1" in error and "another of [3]" in error
        assert call(capsys, *command, "--seed", 3, "--code", "coin.py")[0] == 0


def test_a_run_of_bfloat16_predicts_as_it_was_scored(capsys, tmp_path):
    from PIL import Image

    out = tmp_path / "run"
    argv = ["train", *TINY, "--precision", "bfloat16", "--learning-rate", 0.3, "--out", out]
    assert call(capsys, *argv)[0] == 0
    one = runs.only(out)
    own = one.identity.data

    def shown(pixels, dtype):
        image = (pixels / 255 - own["mean"][0]) / own["std"][0]
        scores = one.model.apply(one.params, image[None, None].to(dtype)).float()
        return f"{100 * scores.softmax(-1).max():.1f} %"

    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8) for _ in range(99))
    in_half = {x: shown(x, torch.bfloat16) for x in drawn}
    pixels = next(x for x, told in in_half.items() if told != shown(x, torch.float32))
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    status, text, _ = call(capsys, "predict", out, tmp_path / "image.png", "--top", 1)
    assert status == 0 and text.splitlines()[2].endswith(in_half[pixels])
    assert call(capsys, "export", out, "--out", tmp_path / "file.safetensors")[0] == 0
    assert json.loads((tmp_path / "file.json").read_text())["precision"] == "bfloat16"
    params, _ = checkpoint.load(tmp_path / "file.safetensors")
    assert all(x.dtype == torch.float32 for x in params["head"].values())


def test_one_run_is_found_by_its_seed_below_a_directory(capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TINY, "--seeds", 0, 1, 2, "--group", 2, "--out", out]
    assert call(capsys, *argv)[0] == 0
    for seed, where, member in ((0, "group-0", 0), (1, "group-0", 1), (2, "group-1", None)):
        name = tmp_path / f"{seed}.safetensors"
        assert call(capsys, "export", out, "--seed", seed, "--out", name)[0] == 0
        found = safetensors.torch.load_file(name)
        stored = safetensors.torch.load_file(out / where / "last.safetensors")
        wanted = stored["params.cls_token"]
        wanted = wanted if member is None else wanted[member]
        assert torch.equal(found["params.cls_token"], wanted)
    status, _, error = call(capsys, "export", out, "--seed", 7, "--out", name)
    assert status == 2 and "one of [0, 1, 2], those of" in error and "got 7" in error
    status, _, error = call(capsys, "export", out, "--out", name)
    assert status == 2 and "directory of one run" in error
    # a donor's member is that of the seed
    argv = ["train", *TINY, "--from", out, "--learning-rate", 0, "--start-learning-rate", 0]
    argv += ["--end-learning-rate", 0, "--seeds", 2, "--out", tmp_path / "later"]
    assert call(capsys, *argv)[0] == 0
    later = safetensors.torch.load_file(tmp_path / "later" / "last.safetensors")
    assert torch.equal(later["params.cls_token"], wanted)


def test_other_members_or_groups_than_those_begun_are_named(capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TINY, "--out", out, "--seeds"]
    assert call(capsys, *argv, 0, 1, "--group", 2)[0] == 0
    status, _, error = call(capsys, *argv, 0, 1, "--group", 1)
    assert status == 2 and f"begun in {str(out)!r}, 2, got 1" in error
    status, _, error = call(capsys, *argv, 0, 2)
    assert status == 2 and "seed: [0, 1] there, [0, 2] asked" in error
