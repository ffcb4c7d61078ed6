"""Nobody else's code is run, nothing is lost or believed that is damaged, and no call crashes."""

import dataclasses
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from kart import bases, checkpoint, cli, data, models, operators, projections, runs, train
from kart.analysis import attention, curvature, landscape, spectra, weights
from kart.runs import records, room
from kart.train import Config
from tests.tiny import ONE_BLOCK as TINY

WORTHLESS = [
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), "", "foo", "\0", b"x", [], [1], {}, {"a": 1}),
    *((), object(), print, torch.ones(2), Path("nowhere"), "é", "x" * 5000, [[]], {1: 2}),
]


@pytest.fixture(scope="module")
def splits():
    return train.load_data(TINY)


# damaged checkpoints


def damage(draw, path):
    """Damages a checkpoint in one drawn way; returns what was done."""
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), bytes(raw[8 + size :])

    def rewrite(changed):
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)

    own = json.loads(header["__metadata__"]["kart"])

    def rewrite_own(text):
        rewrite({**header, "__metadata__": {"kart": text}})

    kind = draw.choice(["cut", "bit", "zeros", "noise", "key", "value", "deep", "nan", "header"])
    if kind == "cut":
        path.write_bytes(raw[: draw.randrange(len(raw))])
    elif kind == "bit":
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
    elif kind in ("zeros", "noise"):
        start = draw.randrange(len(raw) - 1)
        length = draw.randint(1, len(raw) - start)
        patch = bytes(length) if kind == "zeros" else draw.randbytes(length)
        patched = bytes(raw[:start]) + patch + bytes(raw[start + length :])
        path.write_bytes(patched if patched != raw else raw[:-1])
    elif kind == "key":
        del own[draw.choice(sorted(own))]
        rewrite_own(json.dumps(own))
    elif kind == "value":
        key = draw.choice(sorted(own))
        own[key] = draw.choice([v for v in (None, [], {}, "x", -1, [[1]], True) if v != own[key]])
        rewrite_own(json.dumps(own))
    elif kind == "deep":
        opening, closing = draw.choice([("[", "]"), ('{"dict":', "}")])
        deep = opening * 10**5 + "1" + closing * 10**5
        rewrite_own(json.dumps(own)[:-1] + f', "{draw.choice(sorted(own))}": {deep}}}')
    elif kind == "nan":
        own["config"] = {"best": draw.choice([float("nan"), float("inf")])}
        rewrite_own(json.dumps(own))
    else:
        name = draw.choice([key for key in header if key != "__metadata__"])
        field = draw.choice(["dtype", "shape", "data_offsets"])
        values = ["X", [], [10**30], None, [2**63, 1], "F8_E5M2"]
        header[name][field] = draw.choice([v for v in values if v != header[name][field]])
        rewrite(header)
    return kind


def damaged_checkpoints(seed, count, folder):
    """How reading each of `count` damaged checkpoints ended: "refused", or what went wrong."""
    draw = random.Random(f"checkpoints {seed}")
    good = folder / "good.safetensors"
    params = {"a": torch.randn(3, 2), "b": [torch.ones(()), torch.arange(5)]}
    checkpoint.save(good, params, {"depth": 1, "rate": 0.5}, state=(torch.zeros(2),))
    path = folder / "bad.safetensors"
    found = []
    for _ in range(count):
        shutil.copy(good, path)
        kind = damage(draw, path)
        for read in (
            lambda: checkpoint.load(path),
            lambda: checkpoint.load_state(path, state=(torch.zeros(2),)),
        ):
            try:
                read()
                found.append((kind, "silent"))
            except ValueError as error:
                found.append((kind, "refused" if "\n" not in str(error) else "traceback"))
            except Exception as error:
                found.append((kind, f"traceback {error!r:.200}"))
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_damaged_checkpoints_are_refused(seed, tmp_path):
    found = damaged_checkpoints(seed, 50, tmp_path)
    # damage to one tree may leave the other whole
    wrong = [one for one in found if one[1] not in ("refused", "silent")]
    assert not wrong, wrong
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert not [pair for pair in pairs if all(how == "silent" for _, how in pair)]


# full disks


def test_a_full_disk_is_waited_for_and_nothing_is_lost(splits, tmp_path, monkeypatch, capsys):
    whole = list(runs.execute(tmp_path / "whole", [TINY], splits))
    save, full = checkpoint.save, [3]

    def failing(*args, **kwargs):
        if "state" in kwargs and full[0]:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    monkeypatch.setattr(room, "PAUSE_S", 0.01)
    found = list(runs.execute(tmp_path / "out", [TINY], splits, space_timeout=5))
    assert full == [0]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "disk is full" in told[0] and "room again" in told[1]
    for one in (*whole, *found):
        del one["seconds"]
    assert found == whole
    # without time to wait: one line, and the same command goes on
    full[0] = 10**6
    with pytest.raises(OSError, match="MiB are needed in .* goes on from it") as caught:
        list(runs.execute(tmp_path / "third", [TINY], splits))
    assert "\n" not in str(caught.value)
    full[0] = 0
    again = list(runs.execute(tmp_path / "third", [TINY], splits))
    assert [one["val_loss"] for one in again] == [one["val_loss"] for one in whole]


def test_a_run_that_diverges_on_a_full_disk_waits_as_well(splits, tmp_path, monkeypatch, capsys):
    wild = dataclasses.replace(TINY, learning_rate=1e25, warmup_epochs=0.0, max_norm=1e20)
    save, full = checkpoint.save, [2]

    def failing(path, *args, **kwargs):
        if path.name == records.DIVERGED and full[0]:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    monkeypatch.setattr(room, "PAUSE_S", 0.01)
    with pytest.raises(train.Diverged, match="first in `"):
        list(runs.execute(tmp_path / "out", [wild], splits, space_timeout=5))
    assert "waiting for room" in capsys.readouterr().err
    assert list(runs.diverged(tmp_path / "out")) == [wild.seed]


def test_a_line_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_text("first\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        room.append(path, "second\n")
    assert path.read_text() == "first\n"


def test_a_run_that_cannot_fit_is_refused_before_it_begins(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ValueError, match="room for its checkpoints, about .* MiB"):
        list(runs.execute(tmp_path / "out", [TINY], splits))
    assert not (tmp_path / "out" / "config.json").exists()


# calls with worthless arguments


def drawn_calls(draw):
    """A name and a call of the public contract with a worthless argument."""
    value = draw.choice(WORTHLESS)
    fields = ("epochs", "batch_size", "learning_rate", "weight_decay", "operator", "data", "seed")
    fields += ("ema", "trajectory", "threads", "precision", "model", "depth", "device", "augment")
    field = draw.choice(fields)
    over = draw.choice(["depth", "embed_dim", "num_heads", "rank", "sharing", "image_size"])
    over = draw.choice([over, "patch_size", "num_classes", "in_channels", "mlp_ratio", "project"])
    good = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    return draw.choice(
        [
            ("Config", lambda: Config(**{field: value})),
            ("create", lambda: models.create(value)),
            ("create", lambda: models.create("vit_nano", value, **good)),
            ("create", lambda: models.create("vit_nano", "G1B", **{**good, over: value})),
            ("from_config", lambda: models.from_config(value)),
            ("parse", lambda: operators.parse(value)),
            ("parse", lambda: operators.parse("G3B", **{draw.choice(["rank", "base"]): value})),
            ("load", lambda: data.load(value)),
            ("load", lambda: data.load("digits", value)),
            ("load", lambda: data.load("digits", image_size=value)),
            ("checkpoint.load", lambda: checkpoint.load(value)),
            ("checkpoint.load", lambda: checkpoint.load_state(value, a=value)),
            ("checkpoint.save", lambda: checkpoint.save(value, {"a": torch.ones(1)}, {})),
            ("checkpoint.save", lambda: checkpoint.save("x.safetensors", value, {})),
            ("read", lambda: runs.read(value)),
            ("compare", lambda: runs.compare(value)),
            ("load_weights", lambda: runs.load_weights(value)),
            *measures(value),
        ]
    )


def measures(value):
    """Calls of what takes tensors, with a worthless one."""
    one, flat = torch.ones(1, 3, 4), torch.ones(4)
    op, small = operators.parse("G1").operator, {"image_size": 8, "patch_size": 4}
    model = models.create("vit_nano", **small)
    params, basis, some = op.init(torch.Generator(), 1, 3), bases.fourier(1), torch.Generator()
    return [
        ("attend", lambda: op.attend(params, one, value, one)),
        ("attend", lambda: op.attend(value, one, one, one)),
        ("attend", lambda: op.attend(params, one, one, one, value)),
        ("weights", lambda: op.weights(params, value)),
        ("resize", lambda: operators.resize(op, value, 3, 5)),
        ("simplex", lambda: projections.simplex(value, -1)),
        ("simplex", lambda: projections.simplex(one, value)),
        ("init", lambda: basis.init(some, value)),
        ("apply", lambda: basis.apply(value, flat)),
        ("apply", lambda: bases.rational().apply(value, flat)),
        ("apply", lambda: basis.apply(basis.init(some, (1,)), value)),
        ("expand", lambda: basis.expand(value)),
        ("apply", lambda: model.apply(value, torch.ones(1, 3, 8, 8))),
        ("resize", lambda: models.resize(model, value, 16)),
        ("singular_values", lambda: spectra.singular_values(value)),
        ("pointing_game", lambda: attention.pointing_game(value, one > 0)),
        ("best_iou", lambda: attention.best_iou(one, value)),
        ("hill", lambda: weights.hill(value)),
        ("hill", lambda: weights.hill(flat, value)),
        ("kurtosis", lambda: weights.kurtosis(value)),
        ("directions", lambda: landscape.directions(value)),
        ("surface", lambda: landscape.surface(torch.sum, flat, value, 1.0, 2)),
        ("surface", lambda: landscape.surface(torch.sum, flat, torch.ones(2, 4), value, 2)),
        ("hvp", lambda: curvature.hvp(torch.sum, flat, value)),
        ("trace", lambda: curvature.trace(torch.sum, flat, 2, value)),
        ("top_eigenvalues", lambda: curvature.top_eigenvalues(torch.sum, flat, value, some)),
    ]


def wrong_calls(seed, count):
    """What is not a ValueError of one line among `count` drawn calls."""
    draw = random.Random(f"calls {seed}")
    wrong = []
    for _ in range(count):
        name, call = drawn_calls(draw)
        try:
            call()
        except ValueError as error:
            if "\n" in str(error):
                wrong.append((name, f"{error!r:.300}"))
        except Exception as error:
            wrong.append((name, f"{error!r:.300}"))
    return wrong


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_worthless_arguments_are_value_errors(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not wrong_calls(seed, 300)


# code of others


def test_nothing_that_a_study_names_is_run_by_reading_it(tmp_path, monkeypatch, capsys):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "run", "grid_rank_sharing", "--tiny", "--quiet", "--out", "s"]) == 0
    settings = json.loads((tmp_path / "s" / "study.json").read_text())
    for name in ("named", "question", "study"):
        (tmp_path / "s" / "study.json").write_text(json.dumps({**settings, name: str(evil)}))
        for argv in (["report", "--out", "s"], ["status", "--out", "s"], ["list"]):
            cli.main(["study", *argv])
    settings["config"]["operator"] = "evil.py:basis-B"
    (tmp_path / "s" / "study.json").write_text(json.dumps(settings))
    for argv in (["report", "--out", "s"], ["status", "--out", "s"]):
        cli.main(["study", *argv])
    cli.main(["study", "work", "grid_rank_sharing", "--out", "s", "--quiet"])
    assert not (tmp_path / "ran").exists()


def test_the_traceback_of_what_nobody_foresaw_lies_in_the_run(
    splits, tmp_path, monkeypatch, capsys
):
    list(runs.execute(tmp_path / "run", [TINY], splits))

    def fail(*args):
        raise KeyError("what nobody foresaw")

    monkeypatch.setattr(train, "evaluate", fail)
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unforeseen" in error
    (file,) = (tmp_path / "run").glob("traceback-*.txt")
    assert "what nobody foresaw" in file.read_text() and str(file) in error
    assert file.stat().st_mode & 0o077 == 0
