"""`kart study`: parsing and calling."""

import argparse
import ast
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

from kart.search import question, report, storage, work
from kart.search.question import Study
from kart.search.storage import PRUNERS, SAMPLERS, Settings
from kart.search.trials import LIMITS, OBJECTIVES, loader
from kart.search.work import Home
from kart.train import Config

DESCRIPTION = """\
Search over what attention learns. A trial trains K seeds of one configuration together; a study
compares arms that are searched with the same budget, and trains its winners again.

  kart study list
  kart study run grid_rank_sharing --data digits --trials 24 --out runs/grid
  kart study report --out runs/grid

Killed or stopped with Ctrl-C, the same command goes on where it stopped. On several machines:

  kart study init grid_rank_sharing --storage postgresql://user@host/kart
  kart study work grid_rank_sharing --storage postgresql://user@host/kart     # as many as you like
  kart study report grid_rank_sharing --storage postgresql://user@host/kart --out report

To watch a study: pip install optuna-dashboard; optuna-dashboard sqlite:///runs/grid/study.db
"""

POOL_HELP = (
    "ask for N trials at once and train those of one shape as one population. The sampler then "
    "chooses N trials without seeing each other's results: searches of few trials get worse, "
    "which buys speed only where shapes repeat (default 1)"
)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _pairs(items: Sequence[str], flag: str) -> dict[str, Any]:
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ValueError(
                f"`{flag}` needs NAME=VALUE, got {item!r}. Write for example epochs=5."
            )
        found[name.replace("-", "_")] = _value(text)
    return found


def _place_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("this process")
    group.add_argument("--device", default=None, help="cpu or cuda (default cpu)")
    group.add_argument("--threads", type=int, default=None, help="CPU threads (default torch's)")
    group.add_argument("--pool", type=int, default=1, metavar="N", help=POOL_HELP)
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="start no trial after it")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _home_flags(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument(
        "--storage", metavar="URL", help="a database server, such as postgresql://user@host/kart"
    )


def _study_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="a name of `kart study list`, or a file of your own")
    group = parser.add_argument_group("what is searched (defaults: the study's own)")
    group.add_argument("--data", help="digits, a directory, or a public name")
    group.add_argument("--epochs", type=int, help="epochs of every run")
    group.add_argument("--train-limit", type=int, help="train on the first so many images")
    group.add_argument("--val-limit", type=int, help="validate on the first so many images")
    group.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of Config"
    )
    group.add_argument(
        "--fix", action="append", default=[], metavar="NAME=VALUE", help="fix a parameter"
    )
    group.add_argument("--tiny", action="store_true", help="the study's tiny setting, for a look")
    group = parser.add_argument_group("how")
    group.add_argument("--trials", type=int, help="trials, shared equally by the arms")
    group.add_argument("--seeds", type=int, help="K, the seeds of a trial")
    group.add_argument("--confirm", type=int, metavar="N", help="fresh seeds of the winners")
    group.add_argument("--sampler", choices=list(SAMPLERS), help="default tpe")
    group.add_argument("--levels", type=int, default=3, help="values of an interval in a grid (3)")
    group.add_argument("--sampler-seed", type=int, default=0, help="seed of the search (0)")
    group.add_argument(
        "--pruner",
        choices=list(PRUNERS),
        help="asha saves most, and unfairly ends what starts slowly (default median)",
    )
    group.add_argument(
        "--objectives",
        default="accuracy",
        help="comma-separated, of " + ", ".join(OBJECTIVES) + " (default accuracy)",
    )
    for name, unit in zip(LIMITS, ("", ", of one image", ", MiB"), strict=True):
        short = {"parameters": "params"}.get(name, name)
        text = f"never train what has more {name}{unit}"
        group.add_argument(f"--max-{short}", dest=f"max_{name}", type=float, help=text)
    group.add_argument("--group", type=int, help="seeds trained as one program (default: measured)")
    group.add_argument(
        "--heartbeat", type=int, default=20, help="seconds; a worker silent for three is dead (20)"
    )


def parser() -> argparse.ArgumentParser:
    """The parser of `kart study`."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("kart study", description=DESCRIPTION, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("run", help="set up, search, confirm the winners, write the report")
    _study_flags(one)
    _home_flags(one, "run directory; with --storage, where the report goes")
    _place_flags(one)
    one.set_defaults(call=_run)

    one = commands.add_parser("init", help="create a study (and tables) for workers, once")
    _study_flags(one)
    _home_flags(one, "run directory")
    one.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    one.set_defaults(call=_init, device=None, threads=None)

    one = commands.add_parser(
        "work", help="work on a study that was created; join and leave at will"
    )
    one.add_argument("study", nargs="?", help="its name, where a database has several")
    _home_flags(one, "run directory")
    one.add_argument("--data", help="where the data is on this machine")
    _place_flags(one)
    one.set_defaults(call=_work)

    one = commands.add_parser("report", help="write report.html and trials.csv")
    one.add_argument("study", nargs="?", help="its name, where a database has several")
    _home_flags(one, "run directory; with --storage, where the report goes")
    one.add_argument(
        "--confirm",
        type=int,
        default=0,
        metavar="N",
        help="first train the winners again with N fresh seeds and score them on the test split",
    )
    one.add_argument("--data", help="where the data is on this machine")
    _place_flags(one)
    one.set_defaults(call=_report)

    one = commands.add_parser("list", help="the questions there are, or the studies in a storage")
    _home_flags(one, "run directory")
    one.set_defaults(call=_list)
    return top


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that say where this process trains."""
    place: dict[str, Any] = {"threads": args.threads or torch.get_num_threads()}
    if args.device is not None:
        place["device"] = args.device
    if args.call in (_work, _report) and args.data is not None:
        place["data"] = args.data
    return place


def _set_up(args: argparse.Namespace) -> tuple[Home, Any, Settings, Study, str]:
    where = work.home(None if args.storage else args.out, args.storage)
    name, path, study, text = question.load(args.study)
    changes = dict(study.tiny) if args.tiny else {}
    given = ("data", "epochs", "train_limit", "trials", "seeds", "confirm", "sampler", "pruner")
    changes |= {n: getattr(args, n) for n in given if getattr(args, n) is not None}
    study = question.with_changes(study, {**changes, **_pairs(args.set, "--set")})
    for field, least in (("trials", len(study.arms)), ("seeds", 1), ("confirm", 0)):
        if getattr(study, field) < least:
            raise ValueError(
                f"`--{field}` needs at least {least}, got {getattr(study, field)}."
                + (f" There are {len(study.arms)} arms." if field == "trials" else "")
            )
    limits = {name: getattr(args, f"max_{name}") for name in LIMITS}
    objectives = args.objectives.split(",")
    if set(objectives) - set(OBJECTIVES):
        raise ValueError(f"`--objectives` needs some of {list(OBJECTIVES)}, got {objectives}.")
    if len(objectives) > 1:
        study = question.with_changes(study, {"pruner": "none"})
    options = {
        "objectives": objectives,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "fix": _pairs(args.fix, "--fix"),
        "sampler_seed": args.sampler_seed,
        "levels": args.levels,
        "val_limit": args.val_limit,
        "group": args.group or 0,
        "heartbeat": args.heartbeat,
    }
    load = loader(args.val_limit)
    settings = work.settings_for(name, path, study, load(study.config), options)
    place = _place(args)
    torch.set_num_threads(place["threads"])
    storage_, settings = work.set_up(
        where, settings, study, lambda: work.fastest_group(study, settings, load, place)
    )
    return where, storage_, settings, study, text


def _open(args: argparse.Namespace) -> tuple[Home, Any, Settings, Study, str]:
    """A study that is there already."""
    where = work.home(None if args.storage else args.out, args.storage)
    if where.directory is not None:
        found = storage.read_settings(where.directory)
        if found is None:
            raise ValueError(
                f"`--out` needs a directory with a study, got {args.out!r} without study.json. "
                "Create it with `kart study init NAME --out DIR`."
            )
        database = storage.open_database(where.url, found.heartbeat)
    else:
        database = storage.open_database(where.url)
        several = storage.read_database(database, args.study)
        if len(several) != 1:
            raise ValueError(
                f"`study` needs the name of one study in {where.name!r}, got {args.study!r}; there "
                f"are {sorted(several) or 'none'}. Create it with `kart study init`."
            )
        found = next(iter(several.values()))
        database = storage.open_database(where.url, found.heartbeat)
    # another machine has the file elsewhere
    here = found.source if Path(found.source).exists() else found.study
    _, _, study, text = question.load(here)
    config = Config.fromdict(found.config)
    spaces = study.spaces(config, found.fix)
    prints = {arm: work.fingerprint(space) for arm, space in spaces.items()}
    now = {"versions": storage.versions(), "spaces": prints}
    storage.check_same(found, Settings(**{**found.asdict(), **now}), where.name)
    return where, database, found, study, text


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _where(where: Home, name: str) -> str:
    if where.directory:
        return shlex.join(["--out", str(where.directory)])
    return shlex.join([name, "--storage", where.name])


def _write(
    where: Home,
    out: str,
    arms: Mapping[str, optuna.Study],
    settings: Settings,
    study: Study,
    text: str,
) -> None:
    paths = report.write(
        Path(out), arms, settings, text, _where(where, settings.study), study.answer
    )
    print("\n".join(report.lines(arms, settings)))
    found = report.results(arms)
    if study.answer is not None and found:
        print(study.answer(found))
    print("written: " + ", ".join(str(path) for path in paths))


def _search(args: argparse.Namespace, opened: tuple) -> bool:
    where, database, settings, study, _ = opened
    return work.work(
        where,
        database,
        settings,
        study,
        place=_place(args),
        pool=args.pool,
        worker=_worker(),
        quiet=args.quiet,
        timeout=args.timeout,
    )


def _run(args: argparse.Namespace) -> int:
    if args.storage and not args.out:
        raise ValueError("`run` needs `--out DIR` for the report, got none. Give a directory.")
    opened = _set_up(args)
    where, database, settings, study, text = opened
    finished = _search(args, opened)
    arms = storage.studies(database, settings)
    if finished and settings.confirm:
        work.confirm(arms, settings, settings.confirm, _place(args), args.quiet)
    _write(where, args.out, arms, settings, study, text)
    if not finished:
        print("the search is not finished; the same command goes on")
    return 0


def _init(args: argparse.Namespace) -> int:
    where, _, settings, _, _ = _set_up(args)
    print(
        f"{settings.study}: {len(settings.spaces)} arms ({', '.join(settings.spaces)}), "
        f"{settings.per_arm} trials each; start workers with: kart study work "
        f"{_where(where, settings.study)}"
    )
    return 0


def _work(args: argparse.Namespace) -> int:
    opened = _open(args)
    finished = _search(args, opened)
    where, _, settings, _, _ = opened
    if finished:
        print(f"finished; write the report with: kart study report {_where(where, settings.study)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    if not args.out:
        raise ValueError("`report` needs `--out DIR` for the report, got none. Give a directory.")
    where, database, settings, study, text = _open(args)
    arms = storage.studies(database, settings)
    if args.confirm:
        work.confirm(arms, settings, args.confirm, _place(args), args.quiet)
    _write(where, args.out, arms, settings, study, text)
    return 0


def _list(args: argparse.Namespace) -> int:
    if args.out is None and args.storage is None:
        for name, (_, text) in question.available().items():
            print(f"{name:22s} {text}")
        return 0
    where = work.home(None if args.storage else args.out, args.storage)
    if where.directory is not None and storage.read_settings(where.directory) is None:
        raise ValueError(f"`--out` needs a directory with a study, got {args.out!r}.")
    database = storage.open_database(where.url)
    for name, settings in storage.read_database(database).items():
        arms = storage.studies(database, settings)
        for arm, one in arms.items():
            state = {s.name.lower(): n for s, n in sorted(work.counts(one).items())}
            best = work.winners(one)
            shown = f"best {100 * best[0].mean:.2f} %" if best else "no value yet"
            print(f"{name}/{arm}: {state or 'no trials'}; {shown}")
    return 0


def study_main(argv: Sequence[str] | None = None) -> int:
    """Runs `kart study`; returns the exit status: 0, 2 for a mistake, 1 for a lost database,
    130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        return args.call(args)
    except KeyboardInterrupt:
        print("\nkart study: stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except optuna.exceptions.StorageInternalError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        print(f"kart study: the database is gone: {reason}. Start again.", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"kart study: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
