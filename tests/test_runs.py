"""Whose a run's files are: data, records, checkpoints and scores that do not fit are refused."""

import dataclasses
import errno
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from pictures import save_folder

from kart import checkpoint, cli, population, runs, train, tree
from kart.data import public
from kart.runs import identity, owned
from tests.tiny import ONE_BLOCK as TINY

FLAGS = [
    *("--epochs", "2", "--batch-size", "8", "--embed-dim", "4", "--depth", "1", "--num-heads", "1"),
    *("--patch-size", "4", "--rank", "2", "--train-limit", "24", "--threads", "1", "--quiet"),
    *("--operator", "G1B"),
]


@pytest.fixture(scope="module")
def splits():
    return train.load_data(TINY)


@pytest.fixture(scope="module")
def made(splits, tmp_path_factory):
    """A finished run of seed 0, one of seed 1, and an unfinished one of seed 2."""
    home = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        list(runs.execute(home / str(seed), [dataclasses.replace(TINY, seed=seed)], splits))
    part = runs.execute(home / "part", [dataclasses.replace(TINY, seed=2)], splits)
    next(part)
    part.close()
    return home


@pytest.fixture
def home(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def call(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def other(splits, what):
    """The splits with one thing changed."""
    first, val = splits
    if what == "pixel":
        images = first.images.copy()
        images[3, 0, 2, 2] ^= 1
        return splits._replace(train=first._replace(images=images))
    if what == "label":
        labels = val.labels.copy()
        labels[[0, 1]] = (labels[[0, 1]] + 1) % 10
        return splits._replace(val=val._replace(labels=labels))
    if what == "classes":
        swapped = ("1", "0", *first.classes[2:])
        return train.Splits(*(one._replace(classes=swapped) for one in splits))
    if what == "counts":
        return splits._replace(val=val._replace(images=val.images[:50], labels=val.labels[:50]))
    return train.Splits(*(one._replace(mean=(0.5,)) for one in splits))


@pytest.mark.parametrize("what", ["pixel", "label", "classes", "counts", "mean"])
def test_data_that_changed_are_refused_and_named(what, splits, home):
    named = {"pixel": "other images", "label": "other images"}.get(what, what)
    config = [dataclasses.replace(TINY, seed=2)]
    before = (home / "part" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        list(runs.execute(home / "part", config, other(splits, what)))
    assert (home / "part" / "metrics.jsonl").read_bytes() == before
    assert len(list(runs.execute(home / "part", config, splits))) == 2


def test_a_run_stores_what_it_needs_of_its_data(splits, home):
    own = runs.read(home / "0").data
    assert own["classes"] == list(splits.train.classes) and own["image"] == [1, 8, 8]
    assert own["counts"] == {"train": 24, "val": len(splits.val.labels)}
    assert own["mean"] == list(splits.train.mean)
    empty = owned.empty(own)
    model = train.build(TINY, empty)
    assert model.config == train.build(TINY, splits.train).config


@pytest.mark.parametrize("command", ["eval", "analyse"])
def test_reading_commands_refuse_other_data(command, home, capsys, monkeypatch):
    load = train.load_data
    monkeypatch.setattr(train, "load_data", lambda config: other(load(config), "pixel"))
    code, _, error = call(capsys, command, home / "0")
    assert code == 2 and "other images" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["eval", "analyse"])
def test_other_data_of_fewer_images_are_told_as_others(command, home, capsys, tmp_path):
    few = save_folder(tmp_path / "few", 20, size=(8, 8), mode="L")
    code, _, error = call(capsys, command, home / "0", "--data", few)
    assert code == 2 and "needs to be what" in error and "counts {'train': 24," in error


@pytest.mark.parametrize("command", ["eval", "analyse"])
def test_a_directory_that_is_not_here_is_no_public_name(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(public, "read", lambda *args: pytest.fail("asks the network"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "sets" / "mine", 60, size=(8, 8))
    config = dataclasses.replace(TINY, data="sets/mine", train_limit=None)
    assert list(runs.execute("run", [config], train.load_data(config)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, error = call(capsys, command, "../run")
    assert code == 2 and "the directory 'sets/mine' that '../run' was trained on" in error
    assert call(capsys, "eval", "../run", "--data", "../sets/mine")[0] == 0


def test_an_unfinished_run_is_not_scored(home, capsys):
    code, _, error = call(capsys, "eval", home)
    assert code == 2 and "after epoch 1 of 2" in error
    assert not list(home.glob("**/eval-*"))


def test_a_copied_run_is_not_counted_twice(home, capsys):
    shutil.rmtree(home / "part")
    shutil.copytree(home / "0", home / "copy")
    for command in ("eval", "analyse"):
        code, _, error = call(capsys, command, home)
        assert code == 2 and "counted twice" in error and "seed 0" in error


def test_a_run_whose_operator_is_written_otherwise_is_not_counted_twice(home, splits, capsys):
    two = dataclasses.replace(TINY, depth=2)
    for name, spec in (("one", "G1B"), ("each", ("G1B", "G1B"))):
        config = dataclasses.replace(two, operator=spec)
        list(runs.execute(home / "blocks" / name, [config], splits))
    for command in ("eval", "analyse"):
        code, _, error = call(capsys, command, home / "blocks")
        assert code == 2 and "counted twice" in error and "G1B seed 0" in error
    with pytest.raises(ValueError, match="different operators, got .'G1B', 'G1B'"):
        runs.homes([two, dataclasses.replace(two, operator="G1B|...")], home)
    for spec in ("fourier-1B", "G1", "G1:rank=2", "G1B|fourier-1B"):
        with pytest.raises(ValueError, match="different operators, got .'G1B'"):
            runs.homes([two, dataclasses.replace(two, operator=spec)], home)
    others = ("G1U", "G2B", "G1B:rank=3", "G1B|softmax", "G1B:init=paper")
    assert len(
        set(runs.homes([two, *(dataclasses.replace(two, operator=o) for o in others)], home))
    )


def test_scores_of_another_moment_or_run_are_not_shown(home, capsys):
    shutil.rmtree(home / "part")
    assert call(capsys, "eval", home)[0] == 0
    path = home / "0" / "eval-test-last.json"
    good = json.loads(path.read_text())
    assert good["run"] == runs.read(home / "0").id and good["step"] == 6
    for change in (
        {"step": 3},
        {"run": "0" * 16},
        {"data": {"train": "x", "val": "y"}},
        {"kart": "0"},
        {"members": []},
        {"images": -1},
        {"members": [{"seed": 0, "top1": "high", "top5": 1.0, "loss": 0.0}]},
    ):
        path.write_text(json.dumps({**good, **change}))
        code, text, error = call(capsys, "analyse", home)
        assert code == 2 and error.count("\n") == 1, change
        assert "test top-1" not in text
    # on other test images, by which the runs cannot be compared
    path.write_text(json.dumps({**good, "fingerprint": "x"}))
    code, _, error = call(capsys, "analyse", home)
    assert code == 2 and "on the same test images" in error and "Run `kart eval`" in error
    path.write_text(json.dumps(good))
    assert "test top-1" in call(capsys, "analyse", home)[1]


@pytest.mark.parametrize("command", ["train", "eval", "analyse"])
def test_a_run_that_cannot_be_written_is_told_before_anything_is_computed(
    command, home, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(train, "evaluate", lambda *args, **more: pytest.fail("computes"))
    place = ["--out", tmp_path / "new" / "run"] if command == "train" else [home / "0"]
    code, _, error = call(capsys, command, *place)
    assert code == 2 and "that can be written to, got" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_told_by_its_name(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only file system: '.*note.json'"):
        checkpoint.write_text(tmp_path / "note.json", "{}")


def test_metrics_that_do_not_fit_are_refused(splits, home):
    log = home / "0" / "metrics.jsonl"
    first, second = log.read_text().splitlines(keepends=True)
    for text, named in (
        (second, "line 1 is of epoch 2"),
        (first[:20] + "\n" + second, "line 1 is damaged"),
        (first + first, "line 2 is of epoch 1"),
        ("[]\n" + second, "files of its own"),
        ((home / "1" / "metrics.jsonl").read_text(), "files of its own"),
    ):
        log.write_text(text)
        with pytest.raises(ValueError, match=named):
            runs.read_metrics(home / "0")
    log.write_text(first)  # weights after two epochs, one record
    with pytest.raises(ValueError, match="record of every epoch"):
        list(runs.execute(home / "0", [TINY], splits))


def test_a_checkpoint_of_another_run_is_refused(splits, home):
    for name in ("last", "best"):
        shutil.copy(home / "1" / f"{name}.safetensors", home / "0" / f"{name}.safetensors")
        with pytest.raises(ValueError, match="files of its own"):
            runs.load_weights(home / "0", name)
    with pytest.raises(ValueError, match="files of its own"):
        list(runs.execute(home / "0", [TINY], splits))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"run": "0" * 16},
        {"config": {}},
        {"config": []},
        {"members": []},
        {"members": [{"seed": 0}]},
        {"members": [{"seed": "0", "learning_rate": 0.1, "weight_decay": 0.1}]},
        {"data": None},
        {"data": {"classes": ["a"]}},
        {"versions": 3},
    ],
)
def test_a_config_of_another_shape_is_one_error(change, home):
    path = home / "0" / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **change}))
    with pytest.raises(ValueError, match="whole config.json of this version"):
        runs.read(home / "0")


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", "[" * 5000, "\x00", '{"config": '])
def test_a_config_that_is_no_object_is_one_error(text, home):
    (home / "0" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="whole config.json of this version"):
        runs.read(home / "0")


def test_a_run_from_before_there_was_a_field_has_its_default(splits, home):
    path = home / "0" / "config.json"
    found = json.loads(path.read_text())
    del found["config"]["attention_from"]
    found["run"] = identity.run_id(found["config"], found["members"], found["data"])
    path.write_text(json.dumps(found))
    assert runs.read(home / "0").configs == [TINY]
    assert identity.claim(home / "0", [TINY], splits).id == found["run"]
    with pytest.raises(ValueError, match=r"another \(attention_from: None there, 'x' asked\)"):
        identity.claim(home / "0", [dataclasses.replace(TINY, attention_from="x")], splits)


def test_an_edited_config_is_noticed(home, splits):
    path = home / "0" / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"weight_decay": 0.05', '"weight_decay": 0.06'))
    with pytest.raises(ValueError, match="it was changed"):
        runs.read(home / "0")
    for name, value in (("classes", list("jihgfedcba")), ("mean", [0.5]), ("image", [1, 9, 9])):
        found = json.loads(before)
        found["data"][name] = value
        path.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="classes or statistics are not those .* was changed"):
            runs.only(home / "0")
    # a run from before there was a digest is read as it is
    found = json.loads(before)
    del found["digest"]
    path.write_text(json.dumps(found))
    assert identity.claim(home / "0", [TINY], splits) == runs.read(home / "0")


def test_a_run_inside_a_run_is_refused(home, capsys):
    code, _, error = call(capsys, "train", *FLAGS, "--out", home / "0" / "deeper" / "still")
    assert code == 2 and "inside the run" in error
    assert not (home / "0" / "deeper").exists()


@pytest.mark.parametrize("text", ['{"name": "my app"}', "[]", "// of another program"])
def test_a_config_of_another_program_above_a_run_is_none_of_ours(text, capsys, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert call(capsys, "train", *FLAGS, "--out", tmp_path / "run")[0] == 0
    # nor does damage to a run make room for one inside of it
    (tmp_path / "run" / "config.json").write_text(text[:-1] + "!")
    code, _, error = call(capsys, "train", *FLAGS, "--out", tmp_path / "run" / "deeper")
    assert code == 2 and "inside the run" in error


def test_default_directories_differ_wherever_the_commands_do(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a list is given once: FLAGS end with the operator
    for extra in ([], ["--seeds", "1"], ["--seeds", "0", "1"], ["softmax"]):
        assert call(capsys, "train", *FLAGS, *extra)[0] == 0, extra
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_nothing_is_claimed_before_all_is_in_order(capsys, tmp_path):
    out = tmp_path / "run"
    for bad in (
        ["--batch-size", "25"],
        ["--operator", "softmax", "G3X"],
        ["--trajectory", "50"],
        ["--device", "cuda:99"],
        ["--epochs", "999999999"],
        ["--seeds", "1", "1"],
        ["--group", "0", "--seeds", "0", "1"],
    ):
        code, _, error = call(capsys, "train", *FLAGS, *bad, "--out", out)
        assert code == 2 and error.count("\n") == 1, (bad, error)
        assert not out.exists(), bad
    assert call(capsys, "train", *FLAGS, "--out", out)[0] == 0


def test_images_that_are_not_square_are_refused_before_training(splits, tmp_path):
    wide = train.Splits(*(one._replace(images=one.images[:, :, :6]) for one in splits))
    with pytest.raises(ValueError, match="square images, got 'digits' of 8 x 6 .*--decode-size 6"):
        list(runs.execute(tmp_path / "run", [TINY], wide))
    assert not (tmp_path / "run").exists()


def test_a_directory_of_several_runs_names_them(home, capsys):
    code, _, error = call(capsys, "predict", home, "image.png")
    assert code == 2 and error.count("\n") == 1
    assert "directory of one run" in error and f"holds 3: {home / '0'}, {home / '1'}" in error


def test_the_layout_does_not_depend_on_the_size_of_groups(splits, tmp_path):
    configs = population.seeds(TINY, [0, 1, 2])
    for size, names in ((1, 3), (2, 2), (3, 1)):
        parts = runs.parts(configs, size, tmp_path)
        assert [directory.name for _, directory in parts] == [f"group-{i}" for i in range(names)]
    assert runs.parts(configs[:1], 1, tmp_path) == [(configs[:1], tmp_path)]


@pytest.mark.parametrize("begun", [False, True])
def test_the_state_that_a_run_begins_with_is_let_go(begun, splits, tmp_path, monkeypatch):
    configs = population.seeds(TINY, [0, 1])
    if begun:
        first = runs.execute(tmp_path, configs, splits)
        next(first)
        first.close()
    loop, held = train.loop, []

    def seen(run, state, **options):
        held.extend(weakref.ref(x) for x in tree.leaves(state.params))
        return loop(run, state, **options)

    monkeypatch.setattr(train, "loop", seen)
    for _ in runs.execute(tmp_path, configs, splits):
        assert not held or all(x() is None for x in held)
    assert held


def test_statistics_of_any_numbers_are_stored(splits, tmp_path):
    own = [
        one._replace(classes=list(one.classes), mean=np.float32(one.mean), std=np.array(one.std))
        for one in splits
    ]
    list(runs.execute(tmp_path / "run", [TINY], train.Splits(*own)))
    assert runs.read(tmp_path / "run").data["mean"] == np.float32(splits.train.mean).tolist()
    assert own[0].fingerprint == splits.train.fingerprint


def test_fingerprints_are_of_content(splits):
    copy = splits.train._replace(images=np.array(splits.train.images), name="elsewhere")
    assert copy.fingerprint == splits.train.fingerprint
    assert splits.val.fingerprint != splits.train.fingerprint


@pytest.mark.parametrize("name", ["torch", "cpu_capability"])
def test_going_on_with_another_torch_is_told(name, home, splits, capsys, monkeypatch):
    config = dataclasses.replace(TINY, seed=2)
    assert len(list(runs.execute(shutil.copytree(home / "part", home / "same"), [config], splits)))
    assert "begun with" not in capsys.readouterr().err
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**now, name: "another"})
    list(runs.execute(home / "part", [config], splits))
    assert f"begun with {name} {now[name]}, now another" in capsys.readouterr().err
    list(runs.execute(home / "part", [config], splits))  # which is finished
    assert not capsys.readouterr().err


def test_the_members_of_one_group_above_it_want_a_seed(splits, tmp_path):
    two = [dataclasses.replace(TINY, seed=seed, epochs=1) for seed in (0, 1)]
    list(runs.execute(tmp_path / "G1B" / "group-0", two, splits))
    with pytest.raises(ValueError, match=r"one of \[0, 1\].* got None. Name it with `--seed`"):
        runs.only(tmp_path / "G1B")
    assert runs.only(tmp_path / "G1B", seed=1).config.seed == 1
