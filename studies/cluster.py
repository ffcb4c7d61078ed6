"""Do workers on a database server survive one of them being killed? (`make study-cluster`)

    python -m studies.cluster [--workers 4] [--trials 24]

Starts a PostgreSQL server of its own on loopback, from the system's package (installed with apt
where it is missing, which needs root), and four `kart study work` processes on one study; kills one
of them with SIGKILL in the middle of a trial; shows that the trial is retried with the same
parameters and that no trial is lost. The server and its data are removed at the end. One to two
minutes.
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from kart.commands.command import integer, standalone
from kart.search import storage
from kart.tables import table

ROOT = Path(__file__).resolve().parents[1]


def binaries() -> Path | None:
    """The folder of PostgreSQL's server programs: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def install() -> Path:
    """Installs Debian's PostgreSQL and returns its folder of programs."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ValueError(
            "`studies.cluster` needs PostgreSQL's server, got none. Install it (on Debian or "
            "Ubuntu `sudo apt-get install postgresql`) and run this again."
        )
    print("installing postgresql with apt-get")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
        subprocess.run(["apt-get", "-qq", *command], check=True, env=env, stdout=subprocess.DEVNULL)
    found = binaries()
    assert found is not None
    return found


@contextlib.contextmanager
def server(programs: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server on loopback with a data directory of its own; yields its URL and the environment
    that holds its password.
    """
    home = Path(tempfile.mkdtemp(prefix="kart-postgres-"))
    # the server refuses to run as root
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    password = secrets.token_urlsafe(16)
    (home / "password").write_text(password)
    if prefix:
        for path in (home, home / "password"):
            shutil.chown(path, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program: str, *args: str) -> None:
        command = [*prefix, str(programs / program), "-D", str(home / "data"), *args]
        # not captured through a pipe: the server would keep it open
        with open(home / "output", "a") as output:
            status = subprocess.run(command, cwd=home, stdout=output, stderr=output).returncode
        if status:
            raise RuntimeError(f"{program} failed: {(home / 'output').read_text()}")

    options = f"-h 127.0.0.1 -p {port} -k {home} -c fsync=off"
    try:
        secret = f"--pwfile={home / 'password'}"
        call("initdb", "-U", "kart", "-A", "scram-sha-256", secret, "-E", "UTF8", "--no-sync")
        call("pg_ctl", "-w", "-l", str(home / "log"), "-o", options, "start")
        try:
            env = {**os.environ, "PGPASSWORD": password, "OMP_NUM_THREADS": "1"}
            env["PGDATA"] = str(home / "data")
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
            yield f"postgresql://kart@127.0.0.1:{port}/postgres", env
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


def restart(programs: Path, data: str, mode: str, down_s: float) -> None:
    """Stops the server at `data` ("fast" or "immediate") and starts it again after `down_s`."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    words = shlex.split((Path(data) / "postmaster.opts").read_text())[1:]
    place = words.index("-D")
    options = shlex.join(words[:place] + words[place + 2 :])
    control = [*prefix, str(programs / "pg_ctl"), "-D", data, "-w"]
    with open(Path(data).parent / "output", "a") as output:
        where = {"cwd": Path(data).parent, "stdout": output, "stderr": output}
        subprocess.run([*control, "-m", mode, "stop"], check=True, **where)
        time.sleep(down_s)
        log = str(Path(data).parent / "log")
        subprocess.run([*control, "-l", log, "-o", options, "start"], check=True, **where)


class Seen(NamedTuple):
    """What became of the study, and of the trial whose worker was killed."""

    killed: FrozenTrial
    retried: FrozenTrial | None
    trials: dict[str, list[FrozenTrial]]
    wanted: int  # trials an arm
    workers: int  # that did at least one trial


def kart_study(*argv: str) -> list[str]:
    """The command line of `kart study`, by this Python."""
    return [sys.executable, "-m", "kart", "study", *argv]


def watch(url: str, env: dict[str, str], workers: int, trials: int, flags: Sequence[str]) -> Seen:
    """Runs a study with `workers` processes, of which one is killed in the middle of a trial."""
    name = "grid_rank_sharing"
    init = kart_study("init", name, "--storage", url, "--trials", str(trials), *flags)
    subprocess.run(init, check=True, env=env, cwd=ROOT)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    kart_study("work", name, "--storage", url, "--threads", "1", "--quiet"),
                    env=env,
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                )
            )
            for _ in range(workers)
        ]
        stack.callback(lambda: [process.kill() for process in started])
        secret = url.replace("kart@", f"kart:{env['PGPASSWORD']}@", 1)
        database = storage.open_database(secret)
        settings = storage.read_database(database, name)[name]
        arms = storage.studies(database, settings)
        killed = _kill_one(arms, started)
        print(f"killed a worker during trial {killed.number}; the other {workers - 1} go on")
        for process in started:
            process.wait(timeout=600)
        found = {arm: study.get_trials() for arm, study in arms.items()}
        database.engine.dispose()
    everything = [trial for one in found.values() for trial in one]
    again = [
        trial
        for trial in everything
        if trial.system_attrs.get("retry_history", [])[-1:] == [killed.number]
        and trial.user_attrs.get("key") == killed.user_attrs.get("key")
    ]
    names = {trial.user_attrs["worker"] for trial in everything}
    return Seen(killed, again[0] if again else None, found, settings.per_arm, len(names))


def _kill_one(arms: dict[str, optuna.Study], started: list[subprocess.Popen]) -> FrozenTrial:
    """Kills a worker whose trial has begun to report; returns the trial as it was then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for study in arms.values():
            for trial in study.get_trials(states=(TrialState.RUNNING,)):
                pid = int(trial.user_attrs.get("worker", ":0").rpartition(":")[2])
                owner = [process for process in started if process.pid == pid]
                if owner and trial.intermediate_values:
                    owner[0].kill()
                    owner[0].wait()
                    left = study.get_trials()[trial.number]
                    if left.state == TrialState.RUNNING:
                        return left
                    raise RuntimeError("the trial ended before its worker was killed; run it again")
        time.sleep(0.05)
    raise RuntimeError("no worker began a trial in five minutes")


def report(seen: Seen) -> str:
    """What is to be seen, as text."""
    rows = []
    for arm, trials in seen.trials.items():
        states = [trial.state.name for trial in trials]
        rows.append([arm, *(str(states.count(s)) for s in ("COMPLETE", "PRUNED", "FAIL"))])
        rows[-1].append(str(sum(not trial.state.is_finished() for trial in trials)))
    lines = [table(rows, ["arm", "complete", "pruned", "killed", "unfinished"])]
    again = seen.retried
    if again is None:
        lines.append("the killed trial was NOT retried")
    else:
        same = "the same" if again.params == seen.killed.params else "OTHER"
        lines.append(
            f"trial {seen.killed.number} was retried as trial {again.number} with {same} "
            f"parameters: {again.state.name.lower()}"
        )
    lines.append(f"{seen.wanted} trials an arm were wanted; {seen.workers} workers did some")
    return "\n".join(lines)


FLAGS = [
    *("--tiny", "--set", "epochs=30", "--pruner", "none", "--confirm", "0"),
    *("--group", "2", "--heartbeat", "1"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Shows it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=integer(1), default=4)
    parser.add_argument("--trials", type=integer(1), default=24)
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with server(binaries() or install()) as (url, env):
        print(f"PostgreSQL at {url}, {args.workers} workers")
        seen = watch(url, env, args.workers, args.trials, FLAGS)
    print(report(seen))
    return 0 if seen.retried is not None and seen.retried.state == TrialState.COMPLETE else 1


if __name__ == "__main__":
    standalone(main)
