"""Every study runs in a tiny setting; what they conclude is checked by hand."""

import argparse
import ast
import csv
import dataclasses
import json
import re
import subprocess
import time

import optuna
import pytest
import torch
from pictures import save_folder
from torch.testing import assert_close

from kart import cli, data, models, operators, runs, train
from kart.analysis import cost
from kart.commands import command
from kart.search import question, space, storage, work
from kart.search.work import Confirmed
from studies import (
    answer,
    batching,
    cluster,
    controls,
    full_rank,
    loader,
    paper,
    per_block,
    placement,
    population_speed,
    resolution,
    samplers,
    text,
)
from tests.tiny import over

STUDIES = sorted(question.available())


def test_the_studies_are_found_and_ask_something():
    assert set(STUDIES) >= {
        *("grid_rank_sharing", "controls", "basis_family", "base_and_projection", "placement"),
        *("order_variants", "per_block"),
    }
    for name in STUDIES:
        path, text = question.available()[name]
        assert text.endswith("?"), name
        assert f"kart study run {name} " in path.read_text()


@pytest.mark.parametrize("name", [*STUDIES, "answer", "resolution", "samplers", "text"])
def test_a_study_says_what_to_expect_and_how_long_it_takes(name):
    told = ast.get_docstring(ast.parse((question.folder() / f"{name}.py").read_text())) or ""
    text = " ".join(told.split())
    written = " ".join((question.folder() / "README.md").read_text().replace("*", "").split())
    assert "Expected" in text and "n = " in text
    assert re.search("second|minute|hour", text)
    found = re.findall(r"[+-]?[\d.]+ \[[^]]+\]", text)
    assert found and not [one for one in found if one not in written]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_in_its_tiny_setting(name, tmp_path, capsys):
    flags = ["--tiny", "--val-limit", "16", "--threads", "1", "--group", "1", "--quiet"]
    assert cli.main(["study", "run", name, "--out", str(tmp_path / "out"), *flags]) == 0
    settings = storage.read_settings(tmp_path / "out")
    assert settings is not None
    database = storage.open_database(storage.directory_url(tmp_path / "out"))
    for arm, study in storage.studies(database, settings).items():
        assert len(study.trials) == settings.per_arm >= 1, arm
        assert work.winners(study), arm
    assert "report.html" in capsys.readouterr().out


def first_configs(study, **changes):
    config = dataclasses.replace(study.config, data="digits", train_limit=64, **changes)
    return {arm: space.first(one) for arm, one in study.spaces(config, {}).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 32, "patch_size": 4},
        {"image_size": 16, "patch_size": 4, "embed_dim": 96, "num_heads": 3, "depth": 2},
        {"image_size": 64, "patch_size": 4, "model": "vit_tiny"},
    ],
)
def test_the_controls_have_equal_parameters(changes):
    counts = {}
    for arm, config in first_configs(controls.STUDY, **changes).items():
        model = train.build(config, train.load_data(config).train)
        counts[arm] = cost.parameters(model)
    learned = {one.operator for arm, one in counts.items() if not arm.startswith("softmax")}
    assert len(learned) == 1
    total = counts["G3"].total
    # one hidden unit of each block is the smallest step of the wider MLP
    depth, width = changes.get("depth", 12), changes.get("embed_dim", 192)
    assert abs(counts["softmax, wider MLP"].total - total) <= depth * (2 * width + 1) / 2
    assert counts["softmax"].total < total


def test_placements_put_karat_where_they_say():
    configs = first_configs(placement.STUDY)
    karat = {
        arm: [i for i, s in enumerate(c.operator) if s != "softmax"] for arm, c in configs.items()
    }
    assert karat["softmax"] == [] and karat["all blocks"] == [0, 1, 2, 3, 4, 5]
    assert karat["early third"] == [0, 1] and karat["middle third"] == [2, 3]
    assert karat["late third"] == [4, 5] and karat["every other block"] == [0, 2, 4]
    assert karat["first block"] == [0] and karat["last block"] == [5]
    assert configs["half of the heads"].operator == "1*softmax+1*G3B"


@pytest.mark.parametrize("depth", [3, 4, 9, 12])
def test_the_first_and_the_last_block_are_one_block_at_any_depth(depth):
    configs = first_configs(placement.STUDY, depth=depth)
    specs = {arm: config.operator for arm, config in configs.items()}
    assert specs["first block"] == ("G3B", *["softmax"] * (depth - 1))
    assert specs["last block"] == (*["softmax"] * (depth - 1), "G3B")
    thirds = [specs[f"{name} third"] for name in ("early", "middle", "late")]
    assert [blocks.count("G3B") for blocks in zip(*thirds, strict=True)] == [1] * depth
    with pytest.raises(ValueError, match="`depth` of 3 blocks or more, .* got 2"):
        first_configs(placement.STUDY, depth=2)


def test_per_block_draws_one_operator_a_block():
    config = first_configs(per_block.STUDY)["per block"]
    assert config.operator == ("G1B:rank=4",) * 4


def confirmed(test):
    return Confirmed("", {}, [], test, test, [], 0.0)


def test_the_answer_of_the_controls_by_hand():
    found = {
        "softmax": confirmed({0: 0.50, 1: 0.52, 2: 0.54}),
        "polynomial-0": confirmed({0: 0.56, 1: 0.57, 2: 0.60}),
        "G3": confirmed({0: 0.60, 1: 0.62, 2: 0.64}),
    }
    text = controls.answer(found)
    assert "G3: +10.00 points over softmax (3 equal seeds), n = 3" in text
    assert "polynomial-0: +5.67 points over softmax [+4.23, +7.10], n = 3" in text
    # gains 6, 5, 6 of 10: mean 5.667 +- 4.3027 * 0.57735 / sqrt 3 = 1.434, over exactly 10
    assert "left in polynomial-0: 0.57 [0.42, 0.71], n = 3" in text
    assert controls.answer({}) == "softmax has no result."
    # of seeds that all three have, whichever diverged in each
    del found["polynomial-0"].test[1]
    found["G3"] = confirmed({0: 0.60, 1: 0.9, 2: 0.64, 3: 0.9})
    text = controls.answer(found)
    assert "left in polynomial-0: 0.60 (2 equal seeds), n = 2" in text


def test_population_speed_measures(capsys):
    argv = ["--seeds", "2", "--repeats", "2", "--threads", "1", "--settings", "1"]
    population_speed.main(argv)
    out = capsys.readouterr().out
    assert "alone / together" in out and out.count("17 tokens") == 2


def write_table(path, points):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "state", "values", "param.a", "param.b", "param.c"])
        writer.writeheader()
        for a, b in points:
            row = {"arm": "KArAt", "state": "complete", "param.a": a, "param.b": b, "param.c": 1}
            writer.writerow({**row, "values": 1 - 0.01 * (a - 3) ** 2 - 0.1 * (b != "x")})


def test_samplers_are_compared_on_a_table(tmp_path, capsys):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tmp_path / "trials.csv"
    write_table(path, [(a, b) for a in range(8) for b in "xyz"])
    names, levels, points = samplers.read(path, "KArAt")
    assert names == ["param.a", "param.b"] and len(points) == 24
    regret = samplers.regrets("random", 0, 30, names, levels, points)
    assert regret == sorted(regret, reverse=True) and regret[-1] >= 0
    assert regret == samplers.regrets("random", 0, 30, names, levels, points)
    samplers.main(["--table", str(path), "--trials", "6", "--seeds", "3"])
    assert "24 points (a, b)" in capsys.readouterr().out
    # two seeds say little, but no regret is larger than that of the worst point
    samplers.main(["--table", str(path), "--trials", "1", "--seeds", "2"])
    bounds = re.findall(r"([0-9.]+)\]", capsys.readouterr().out)
    assert bounds and max(map(float, bounds)) <= 26
    write_table(path, [(a, b) for a in range(8) for b in "xyz"][1:])
    with pytest.raises(ValueError, match="23 of 24"):
        samplers.read(path, "KArAt")


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.skipif(cluster.binaries() is None, reason="no PostgreSQL server on this machine")
def test_a_killed_worker_loses_nothing_on_postgresql():
    programs = cluster.binaries()
    assert programs is not None
    with cluster.server(programs) as (url, env):
        seen = cluster.watch(url, env, workers=4, trials=12, flags=cluster.FLAGS)
    assert seen.retried is not None and seen.retried.params == seen.killed.params
    assert seen.retried.state == optuna.trial.TrialState.COMPLETE
    for trials in seen.trials.values():
        assert all(trial.state.is_finished() for trial in trials)
        done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
        # workers that ask at the same moment may start one trial more each
        assert seen.wanted <= len(done) < seen.wanted + 4
        failed = [trial for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
        assert [trial.number for trial in failed] in ([], [seen.killed.number])
    assert seen.workers == 4


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.skipif(cluster.binaries() is None, reason="no PostgreSQL server on this machine")
@pytest.mark.parametrize(("mode", "down_s"), [("fast", 0.0), ("immediate", 4.0)])
def test_a_restart_of_postgresql_loses_nothing(mode, down_s, tmp_path):
    programs = cluster.binaries()
    assert programs is not None
    name, each = "grid_rank_sharing", ["--set", "epochs=10", "--tiny", "--confirm", "0"]
    with cluster.server(programs) as (url, env):
        place = ["--storage", url]
        init = cluster.kart_study("init", name, *place, "--trials", "8", "--group", "1", *each)
        subprocess.run(init, check=True, env=env, stdout=subprocess.DEVNULL)
        database = storage.open_database(url.replace("kart@", f"kart:{env['PGPASSWORD']}@"))
        settings = storage.read_database(database, name)[name]
        work = cluster.kart_study("work", name, *place, "--threads", "1", "--quiet")
        worker = subprocess.Popen(
            [*work, "--storage-timeout", "60"], env=env, stderr=subprocess.PIPE, text=True
        )
        studies = storage.studies(database, settings).values()
        while not any(one.get_trials() for one in studies) and worker.poll() is None:
            time.sleep(0.2)
        database.engine.dispose()
        cluster.restart(programs, env["PGDATA"], mode, down_s)
        _, error = worker.communicate(timeout=300)
        found = [one.get_trials() for one in storage.studies(database, settings).values()]
        database.engine.dispose()
    assert worker.returncode == 0, error
    lines = error.splitlines()
    assert all(line.startswith("kart: the database") for line in lines), error
    assert len(lines) in (0, 2) and env["PGPASSWORD"] not in error
    states = [trial.state.name for trials in found for trial in trials]
    assert set(states) <= {"COMPLETE", "PRUNED"} and len(states) == settings.trials


def test_full_rank_training_prints_loss_and_memory(capsys):
    argv = ["--data", "digits", "--model", "vit_nano", "--image-size", "8", "--steps", "20"]
    full_rank.main([*argv, "--batch-size", "8", "--images", "80", "--learning-rate", "3e-3"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if len(row) == 3 and row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(2, 21, 2))
    losses, peaks = ([float(row[i]) for row in rows] for i in (1, 2))
    assert losses[-1] < losses[0] and peaks == sorted(peaks)


def test_full_rank_training_that_diverges_says_so_in_a_line():
    argv = ["--data", "digits", "--model", "vit_nano", "--image-size", "8", "--steps", "20"]
    argv += ["--batch-size", "8", "--images", "80", "--learning-rate", "1e20"]
    with pytest.raises(SystemExit, match="^full_rank: training stopped at step .* Lower the"):
        full_rank.main(argv)


def test_the_table_of_other_sizes_by_hand():
    found = {
        "softmax": {8: {0: 0.50, 1: 0.60}, 16: {0: 0.40, 1: 0.48}},
        "G3B": {8: {0: 0.70, 1: 0.70}, 16: {0: 0.65, 1: 0.64}},
    }
    lines = resolution.table(found, 8, 100).splitlines()[2:]
    assert len(lines) == 4 and lines[0].split()[:3] == ["softmax", "8", "55.00"]
    assert "-11.00 [-23.71, +1.71]" in lines[1] and "+5.50" not in lines[1]
    assert "-5.50 [-11.85, +0.85]" in lines[3] and "+5.50 [-0.85, +11.85]" in lines[3]


def test_runs_are_scored_at_other_sizes(tmp_path, capsys):
    out = str(tmp_path / "runs")
    flags = ["--seeds", "0", "1", "--group", "1", "--epochs", "1", "--train-limit", "64"]
    flags += ["--embed-dim", "8", "--depth", "1", "--num-heads", "1", "--threads", "1", "--quiet"]
    argv = ["train", "--operator", "softmax", "G1B:rank=2", *flags, "--out", out]
    assert cli.main(argv) == 0
    found, size, images = resolution.measure([out], [8, 16], limit=50)
    assert (size, images) == (8, 50) and set(found) == {"softmax", "G1B:rank=2"}
    one = runs.only(f"{out}/softmax/group-0")
    test = data.load("digits", "test")
    test = test._replace(images=test.images[:50], labels=test.labels[:50])
    own = train.evaluate(one.model.apply, one.params, test, one.config)["top1"]
    assert found["softmax"][8][0] == own.item()
    model, params = models.resize(one.model, one.params, 16)
    config = dataclasses.replace(one.config, image_size=16)
    assert found["softmax"][16][0] == train.evaluate(model.apply, params, test, config)["top1"]
    capsys.readouterr()
    assert resolution.main([out, "--sizes", "8", "12", "--limit", "20"]) == 0
    assert "change from 8 px" in capsys.readouterr().out
    # another depth would take the place of the seeds of the same operator
    other = str(tmp_path / "other")
    argv = ["train", "--operator", "softmax", *over(flags, "--depth", "2"), "--out", other]
    assert cli.main(argv) == 0
    for argv, words in (
        ([str(tmp_path)[:-1] + "-nowhere"], "run"),
        ([out, other, "--sizes", "12"], "differ in operator and seed alone"),
    ):
        with pytest.raises(SystemExit) as caught:
            resolution.main(argv)
        assert caught.value.code == 2 and words in capsys.readouterr().err


def test_other_sizes_of_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    save_folder(tmp_path / "own/pictures", 30, size=(8, 8))
    monkeypatch.chdir(tmp_path / "own")
    flags = ["--data", "pictures", "--epochs", "1", "--embed-dim", "8", "--depth", "1", "--threads"]
    flags += [
        "1",
        "--num-heads",
        "1",
        "--batch-size",
        "9",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(["train", "--operator", "softmax", *flags]) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        resolution.main([str(tmp_path / "run"), "--sizes", "16"])
    assert "needs the directory 'pictures'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "argv", "words"),
    [
        (batching, ["--repeats", "0"], "--repeats: needs an integer >= 1, got 0"),
        (cluster, ["--workers", "0"], "--workers: needs an integer >= 1, got 0"),
        (full_rank, ["--data", "digits", "--steps", "0"], "--steps: needs an integer >= 1"),
        (full_rank, ["--data", "digits", "--images", "3"], "--images needs at least --batch-size"),
        (loader, ["--images", "20"], "--images: needs an integer >= 40, got 20"),
        (loader, ["--model", "vit_tniy"], "invalid choice: 'vit_tniy'"),
        (answer, ["work", "--minutes", "nan"], "--minutes: needs a finite number, got 'nan'"),
        (paper, ["tiny-g3b-cifar10", "--minutes", "inf"], "--minutes: needs a finite number"),
        (samplers, ["--samplers", "tpee"], "invalid choice: 'tpee'"),
        (samplers, ["--samplers", "grid"], "invalid choice: 'grid'"),  # which drew at random
        (samplers, ["--table", __file__], "every point of a grid, got 0"),
        (text, ["--out", "new", "--minutes", "nan"], "--minutes: needs a finite number"),
        (text, ["--out", "new", "--learning-rate", "-1"], "needs a number >= 0, got -1"),
        (population_speed, ["--seeds", "0"], "--seeds: needs an integer >= 1, got 0"),
        (resolution, ["RUN", "--limit", "-5"], "--limit: needs an integer >= 1, got -5"),
        (samplers, ["--trials", "0"], "--trials: needs an integer >= 1, got 0"),
        (samplers, ["--table", "nowhere.csv"], "nowhere.csv"),
        (text, ["--out", "new", "--steps", "0"], "--steps: needs an integer >= 1, got 0"),
    ],
)
def test_studies_refuse_numbers_that_are_none(study, argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        study.main(argv)
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_study_as_a_process_names_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["controls.py"])
    argv = ["--out", str(tmp_path / "out"), "--settings", "standrad"]
    with pytest.raises(SystemExit) as caught:
        command.standalone(controls.main, argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "controls: error: `--settings` needs one of standard," in error


def test_text_refuses_what_it_cannot_train(tmp_path, capsys):
    out = tmp_path / "out"
    for argv, words in (
        (["--heads", "3"], "`--width` in as many equal parts as `--heads`, got 64 and 3"),
        (["--evaluate", "100000000"], "`text` needs windows shorter than"),
    ):
        assert text.main(["--out", str(out), *argv]) == 2
        assert words in capsys.readouterr().err and not out.exists()
    out.mkdir()
    (out / "results.jsonl").write_text('{"arm": "softmax", "see')
    assert text.main(["--out", str(out)]) == 2
    assert "whole lines in" in capsys.readouterr().err
    # the next record would stand on the same line
    (out / "results.jsonl").write_text('{"arm": "softmax"}')
    assert text.main(["--out", str(out)]) == 2
    assert "line 1 that is cut off" in capsys.readouterr().err
    for other in ('{"arm": "softmax"}\n', "[1]\n"):
        (out / "results.jsonl").write_text(other)
        assert text.main(["--out", str(out)]) == 2
        assert "what it wrote itself" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert text.main(["--out", str(tmp_path / "file")]) == 2


def test_text_is_resumed_and_refuses_other_settings(tmp_path, capsys):
    tiny = ["--steps", "2", "--batch", "1", "--width", "8", "--depth", "1", "--heads", "2"]
    tiny += ["--lengths", "4", "8", "--evaluate", "8", "16", "--held-out", "64"]
    argv = ["--out", str(tmp_path), *tiny]
    assert text.main([*argv, "--seeds", "1"]) == 0
    first = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in first] == list(text.ARMS)
    assert text.main([*argv, "--seeds", "2", "--arms", "softmax"]) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert lines[:-1] == first and json.loads(lines[-1])["seed"] == 1
    one, other = (json.loads(line)["bits"]["16"] for line in (lines[0], lines[-1]))
    mean = f"{(one + other) / 2:.3f} ["
    assert mean in capsys.readouterr().out
    # nothing is started after the minutes, and what was done otherwise is not mixed in
    assert text.main([*argv, "--seeds", "3", "--minutes", "0"]) == 0
    assert text.main(["--out", str(tmp_path), "--steps", "3"]) == 2
    assert text.main([*argv, "--arms", "softmux"]) == 2
    err = capsys.readouterr().err
    assert "Choose another --out." in err and "got ['softmux']" in err
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines


def test_a_text_that_diverges_is_strict_json_and_left_out(tmp_path, capsys):
    tiny = ["--steps", "2", "--batch", "1", "--width", "8", "--depth", "1", "--heads", "2"]
    tiny += ["--lengths", "4", "--evaluate", "8", "--held-out", "64", "--learning-rate", "1e30"]
    argv = ["--out", str(tmp_path), *tiny, "--seeds", "1", "--arms", "softmax"]
    assert text.main(argv) == 0
    [line] = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["bits"] == {"8": None}
    assert text.main(argv) == 0  # read again
    assert capsys.readouterr().out.count("softmax, seed 0, diverged: left out") == 2


def test_text_starts_all_arms_from_one_backbone_and_learns():
    args = argparse.Namespace(width=8, depth=1, heads=2, lengths=[8])
    made = {}
    for arm in ("softmax", "elementwise"):
        op = operators.parse(text.ARMS[arm]).operator
        params = text.init(torch.Generator().manual_seed(0), op, 5, args)
        params["blocks"]["0"].pop("operator")
        made[arm] = params
    assert_close(made["softmax"], made["elementwise"], rtol=0, atol=0)
    codes, held_out, kinds = text.read_text()
    assert kinds > 80
    assert len(codes) > 8 * len(held_out) and int(codes.max()) < kinds
    window = text.windows(torch.arange(20), torch.tensor([0, 5]), 3)
    assert window.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
