"""A database that is lost under a search: noticed at the next trial, rebuilt from the journal."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import optuna
import pytest

from kart import cli
from kart.search import journal, storage, work

QUESTION = '''
"""Which rate?"""

import dataclasses
import os
from pathlib import Path

from kart.search import Study
from kart.train import Config

CONFIG = Config(train_limit=40, epochs=1, batch_size=20, embed_dim=8, num_heads=1, depth=1,
                patch_size=4)

def rate(trial, config):
    chosen = trial.suggest_categorical("rate", [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3])
    return dataclasses.replace(config, learning_rate=chosen)

STUDY = Study(CONFIG, {"one": rate, "two": rate}, trials=6, seeds=1, confirm=0, sampler="%s")
'''
FLAGS = ["--val-limit", "20", "--threads", "1", "--quiet", "--group", "1"]


def lose(directory, how):
    path = directory / "study.db"
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, 3000)
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "overwritten":
        with open(path, "r+b") as file:
            file.write(os.urandom(path.stat().st_size))
    elif how == "older":
        shutil.copy(directory / "older.db", path)
    else:
        path.unlink()
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE trials (study_id, number, state)")
            other.execute("CREATE TABLE studies (study_id, study_name)")


def trials(directory):
    arms = storage.studies(
        storage.open_database(storage.directory_url(directory)), storage.read_settings(directory)
    )
    return {
        (arm, trial.number): (trial.state.name, trial.params, trial.values)
        for arm, study in arms.items()
        for trial in study.get_trials()
    }


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "rate.py"

    def ask(sampler, out):
        path.write_text(textwrap.dedent(QUESTION % sampler))
        return ["study", "run", str(path), "--out", str(tmp_path / out), *FLAGS]

    return ask


@pytest.mark.parametrize(
    ("how", "sampler"),
    [
        ("deleted", "tpe"),
        pytest.param("truncated", "random", marks=pytest.mark.slow),
        ("emptied", "grid"),
        pytest.param("overwritten", "tpe", marks=pytest.mark.slow),
        pytest.param("older", "random", marks=pytest.mark.slow),
        pytest.param("another", "tpe", marks=pytest.mark.slow),
    ],
)
def test_a_lost_database_is_noticed_and_rebuilt(how, sampler, asked, tmp_path, capsys, monkeypatch):
    assert cli.main(asked(sampler, "whole")) == 0
    expected = trials(tmp_path / "whole")
    argv, out = asked(sampler, "out"), tmp_path / "out"
    done = []
    plain = work.trial_batch

    def losing(*args):
        if len(done) == 1 and how == "older":
            shutil.copy(out / "study.db", out / "older.db")
        if len(done) == 3:
            lose(out, how)
        done.append(None)
        return plain(*args)

    monkeypatch.setattr(work, "trial_batch", losing)
    capsys.readouterr()
    code = cli.main(argv)
    error = capsys.readouterr().err
    if code == 0 and how == "older":
        # SQLite's log, which lies beside the file, still had what the file lost: nothing is lost
        assert trials(out) == expected
        return
    assert code == 2 and error.count("\n") == 1, error
    assert "study.db" in error and "study.jsonl" in error and "the same command" in error
    assert len(journal.read(out)) >= 3 and len(done) == 4  # no further trial was begun
    monkeypatch.undo()
    for reads in (["report", "--out", str(out)], ["status", "--out", str(out)]):
        if how == "truncated":
            break
        assert cli.main(["study", *reads]) == 2
        assert "study.jsonl" in capsys.readouterr().err
    assert cli.main(argv) == 0
    # what is cut may still be whole in SQLite's log, which mends it
    assert "rebuilt" in capsys.readouterr().err or how == "truncated"
    found = {key: value for key, value in trials(out).items() if value[0] != "FAIL"}
    if sampler == "grid":  # the order of the queue is not kept, its points are
        assert sorted(map(repr, found.values())) == sorted(map(repr, expected.values()))
    else:
        assert found == expected


def test_a_reader_that_leaves_takes_nothing_from_a_worker(asked, tmp_path, capsys):
    # the worker looks after its file, another process reads it and leaves: the log must stay
    assert cli.main(asked("grid", "out")) == 0
    out = tmp_path / "out"
    settings = storage.read_settings(out)
    database = storage.open_database(storage.directory_url(out))
    arms = storage.studies(database, settings)
    before = arms["one"].get_trials()
    journal.check(out, settings.names.values())
    status = "import sys; from kart import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", status, "study", "status", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    arms["one"].add_trial(before[0])
    journal.check(out, settings.names.values())
    database.engine.dispose()
    database.remove_session()
    assert len(trials(out)) == 7


def test_a_journal_cut_by_a_kill_is_read(tmp_path):
    lines = [json.dumps({"arm": "a", "number": n, "state": "FAIL"}) for n in range(3)]
    (tmp_path / journal.NAME).write_text("\n".join(lines)[:-5])
    assert sorted(journal.read(tmp_path)) == [("a", 0), ("a", 1)]
    (tmp_path / journal.NAME).write_bytes(b"\xff\xfe[[[\n" + lines[0].encode() + b"\n[]\n1\n")
    assert sorted(journal.read(tmp_path)) == [("a", 0)]
    assert sys.getrecursionlimit() < 10**5
    (tmp_path / journal.NAME).write_text("[" * 10**5 + "\n" + lines[1])
    assert sorted(journal.read(tmp_path)) == [("a", 1)]


def test_retries_are_those_of_the_numbers_that_trials_have_when_rebuilt(tmp_path):
    study = optuna.create_study(direction="maximize")
    for _ in range(3):
        study.ask()  # 0 and 1 are never finished
    study.tell(2, state=optuna.trial.TrialState.FAIL)
    storage.retry(None)(study, study.trials[2])
    study.tell(study.ask(), 0.5)
    assert [storage.original(trial) for trial in study.trials] == [0, 1, 2, 2]
    journal.append(tmp_path, {"a": study})
    new = optuna.create_study(direction="maximize")
    journal.restore(tmp_path, {"a": new}, None)
    assert [trial.state.name for trial in new.trials] == ["FAIL", "COMPLETE"]
    assert [storage.original(trial) for trial in new.trials] == [0, 0]
    assert [one["number"] for one in journal.read(tmp_path).values()] == [0, 1]


def test_an_arm_may_have_a_slash_in_its_name(tmp_path):
    database = storage.open_database(storage.directory_url(tmp_path), create=True)
    study = optuna.create_study(study_name="odd/with/half", storage=database)
    study.add_trial(optuna.trial.create_trial(value=0.5))
    journal.append(tmp_path, {"with/half": study})
    assert journal.problem(tmp_path, ["odd/with/half"], journal.read(tmp_path)) == ""


def test_a_locked_database_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "LOCKED_S", 0.1)
    database = storage.open_database(storage.directory_url(tmp_path), create=True)
    study = optuna.create_study(study_name="odd/one", storage=database)
    study.add_trial(optuna.trial.create_trial(value=0.5))
    journal.append(tmp_path, {"one": study})
    database.engine.dispose()
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match="another program has locked for 0.1 s. End that"):
            journal.problem(tmp_path, ["odd/one"], journal.read(tmp_path))
    assert journal.problem(tmp_path, ["odd/one"], journal.read(tmp_path)) == ""
