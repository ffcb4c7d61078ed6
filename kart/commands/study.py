"""`kart study`: searches over what attention learns."""

import argparse
import ast
import dataclasses
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kart import code, operators
from kart.commands.command import Command, choice, commas, integer, number, place
from kart.commands.config import THREADS, check_device, check_effects, check_effects_on, flag
from kart.train import Config, Splits

if TYPE_CHECKING:
    from kart.search import Study
    from kart.search.question import Question
    from kart.search.report import Arms
    from kart.search.storage import RDBStorage, Settings
    from kart.search.work import Home

DESCRIPTION = """\
Search over what attention learns. A trial trains K seeds of one configuration together; a study
compares arms that are searched with the same budget, and trains its winners again.

  kart study list
  kart study run grid_rank_sharing --data digits --trials 24 --out runs/grid
  kart study report --out runs/grid

Killed or stopped with Ctrl-C, the same command goes on where it stopped. On several machines:

  kart study init grid_rank_sharing --storage postgresql://user@host/kart
  kart study work grid_rank_sharing --storage postgresql://user@host/kart     # as many as you like
  kart study report --storage postgresql://user@host/kart --out report

`run`, `init` and `work` run the code of the study that you name; the others run none.
To watch a study: pip install optuna-dashboard; optuna-dashboard sqlite:///runs/grid/study.db
"""

POOL_HELP = (
    "ask for N trials at once and train those of one shape as one population. The sampler then "
    "chooses N trials without seeing each other's results: searches of few trials get worse, "
    "which buys speed only where shapes repeat (default 1)"
)
# what these flags take is named by kart.search, which needs Optuna: checked when they are used
SAMPLERS_HELP = "tpe, random, nsga2, gp, grid or brute (default the study's, mostly tpe)"
PRUNERS_HELP = "asha (saves most, and unfairly ends what starts slowly), median or none"
OBJECTIVES_HELP = "comma-separated, of accuracy, parameters, flops, memory and step_time"
REPORTED = "run directory; with --storage, where the report goes"
UNFINISHED = "the search is not finished; the same command goes on"
LIMITS_HELP = {"parameters": "parameters", "flops": "FLOPs an image", "memory": "MiB"}


# flags


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)


def _pairs(items: Sequence[str], given: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise ValueError(
                f"`{given}` needs NAME=VALUE, got {item!r}. Write for example epochs=5."
            )
        if name in found:
            raise ValueError(f"`{given}` needs each name once, got {name!r} twice. Drop one.")
        found[name] = _value(text)
    return found


def _place_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("this process").add_argument
    add("--device", default=None, help="cpu or cuda (default cpu)")
    add("--threads", type=THREADS, metavar="INT", help="CPU threads (default torch's)")
    add("--quiet", action="store_true", help="no progress bar")


def _search_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the search").add_argument
    add("--pool", type=integer(1), default=1, metavar="N", help=POOL_HELP)
    add("--timeout", type=number(0), metavar="SECONDS", help="start no trial after it")


def _home_flags(parser: argparse.ArgumentParser, out: str = "run directory") -> None:
    parser.add_argument("--out", type=place, metavar="DIR", help=out)
    parser.add_argument(
        "--storage", metavar="URL", help="a database server, such as postgresql://user@host/kart"
    )


def _wait_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage-timeout",
        type=number(0),
        metavar="SECONDS",
        help="how long to wait for a database server that is away (300)",
    )


def _study_flags(parser: argparse.ArgumentParser) -> None:
    count, positive = integer(0), integer(1)
    parser.add_argument("study", help="a name of `kart study list`, or a file of your own")
    add = parser.add_argument_group("what is searched (defaults: the study's own)").add_argument
    add("--data", help="digits, a directory, or a public name")
    add("--epochs", type=positive, metavar="INT", help="epochs of every run")
    for split, what in (("train", "train"), ("val", "validate")):
        add(f"--{split}-limit", type=positive, metavar="INT", help=f"{what} on the first so many")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of Config")
    add("--fix", action="append", default=[], metavar="NAME=VALUE", help="fix a parameter")
    add("--tiny", action="store_true", help="the study's tiny setting, for a look")
    add = parser.add_argument_group("how").add_argument
    add("--trials", type=count, metavar="INT", help="trials, shared equally by the arms")
    add("--seeds", type=positive, metavar="K", help="the seeds of a trial")
    add("--confirm", type=count, metavar="N", help="fresh seeds of the winners")
    add("--sampler", help=SAMPLERS_HELP)
    add("--levels", type=positive, metavar="INT", help="values of an interval, grid (3)")
    add("--sampler-seed", type=count, default=0, metavar="INT", help="seed of the search (0)")
    add("--pruner", help=PRUNERS_HELP)
    add("--objectives", type=commas, metavar="NAMES", default=("accuracy",), help=OBJECTIVES_HELP)
    for name, unit in LIMITS_HELP.items():
        short = {"parameters": "params"}.get(name, name)
        add(
            f"--max-{short}",
            dest=f"max_{name}",
            type=number(0),
            metavar="NUMBER",
            help=f"never train what has more ({unit})",
        )
    add("--group", type=positive, metavar="INT", help="seeds trained as one (default: measured)")
    add(
        "--heartbeat",
        type=positive,
        default=20,
        metavar="INT",
        help="seconds; a worker silent for three is dead (20)",
    )


def _init_flags(parser: argparse.ArgumentParser, out: str = "run directory") -> None:
    _study_flags(parser)
    _home_flags(parser, out)
    _wait_flags(parser)
    _place_flags(parser)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    _init_flags(parser, REPORTED)
    _search_flags(parser)


def _work_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="the study that was created: its name, or your file of it")
    _home_flags(parser)
    _wait_flags(parser)
    parser.add_argument("--data", help="where the data is on this machine")
    _place_flags(parser)
    _search_flags(parser)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", help="its name, where a database has several")
    _home_flags(parser, REPORTED)
    parser.add_argument(
        "--confirm",
        type=integer(0),
        default=0,
        metavar="N",
        help="first train the winners again with N fresh seeds and score them on the test split",
    )
    parser.add_argument("--data", help="where the data is on this machine")
    _place_flags(parser)


# calls


class Opened(NamedTuple):
    """A study that is there: where, database, settings, its question if its code was named."""

    where: "Home"
    database: "RDBStorage"
    settings: "Settings"
    study: "Study | None"


def _home(args: argparse.Namespace) -> "Home":
    """Where the study is: in the database server if one is named, else in a directory."""
    from kart.search import work

    # those that write no report have no use for both
    if args.storage and args.out and args.call not in (_run, _report):
        raise ValueError(
            f"`kart study {args.command}` needs `--out` or `--storage`, got {args.out!r} and "
            f"{work.home(None, args.storage).name!r}. Leave one of them out."
        )
    return work.home(None if args.storage else args.out, args.storage)


def _wait_s(args: argparse.Namespace) -> float:
    """How long to wait for a database server, where there is one."""
    if "storage_timeout" not in args:
        return 0.0
    if args.storage_timeout is not None and not args.storage:
        raise ValueError(
            "`--storage-timeout` needs `--storage`, got it without: no server is waited for in a "
            "directory. Leave it out."
        )
    return 300.0 if args.storage_timeout is None else args.storage_timeout


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that say where this process trains."""
    check_device(args.device)
    place: dict[str, Any] = {"threads": args.threads or torch.get_num_threads()}
    if args.device is not None:
        place["device"] = args.device
    return place


def _elsewhere(args: argparse.Namespace) -> dict[str, Any]:
    """The place of a process that works on a study of others, whose data may lie elsewhere."""
    return _place(args) | ({} if args.data is None else {"data": args.data})


def _give_code(study: "Study", fix: Mapping[str, Any], arms: "Arms | None" = None) -> None:
    """Runs the user's own code that the operators of the study's arms name, as its file does: at
    the points of `probe`, and at the winners of `arms`.
    """
    from kart.search import space, work

    for arm, one in study.spaces(study.config, fix).items():
        found = work.winners(arms[arm]) if arms is not None else []
        configs = space.probe(one)[1] + [space.at(one, best.trial.params) for best in found]
        for config in filter(None, configs):
            for name in sorted(operators.sources(config.operator)):
                code.use(name)


def _asked(args: argparse.Namespace, study: "Study") -> tuple["Study", dict[str, Any], list[str]]:
    """`study` as the flags change it, the parameters that they fix and the objectives; raises
    ValueError for flags that it cannot take or that change nothing in it.
    """
    from kart.search import question, space, storage
    from kart.search.trials import OBJECTIVES, check_objectives

    given = ("data", "epochs", "train_limit", "trials", "seeds", "confirm", "sampler", "pruner")
    flags = {n: getattr(args, n) for n in given if getattr(args, n) is not None}
    asked, fix = _pairs(args.set, "--set"), _pairs(args.fix, "--fix")
    for name in sorted(asked.keys() & flags.keys()):
        told = f"{name!r} beside `{flag(name)}`"
        raise ValueError(f"`--set` needs fields that no flag gives, got {told}.")
    changes = {**flags, **asked}
    before = question.with_changes(study, study.tiny if args.tiny else {})
    study = question.with_changes(before, changes)
    question.check_effects(before, study, changes, fix)
    firsts = [space.first(arm) for arm in study.spaces(study.config, fix).values()]
    check_effects(asked, firsts, lambda name: f"--set {name}")
    pruner = changes.get("pruner", "none")
    if pruner != "none" and all(one.epochs == 1 for one in firsts):
        raise ValueError(
            f"`--pruner {pruner}` has no effect on runs of one epoch: it looks at those "
            "before the last. Leave it out."
        )
    if args.levels is not None and study.sampler != "grid":
        raise ValueError("`--levels` needs `--sampler grid`, got it without. Leave it out.")
    if args.levels is not None and not question.has_intervals(study, fix):
        raise ValueError(
            "`--levels` has no effect on a study that searches no interval: all values of a choice "
            "are taken. Leave it out."
        )
    choice("--sampler", study.sampler, list(storage.SAMPLERS))
    choice("--pruner", study.pruner, storage.PRUNERS)
    if args.group is not None and args.group > study.seeds:
        raise ValueError(
            f"`--group` needs at most the {study.seeds} seeds of a trial, got {args.group}."
        )
    for field, least in (("trials", len(study.arms)), ("seeds", 1), ("confirm", 0)):
        if getattr(study, field) < least:
            raise ValueError(
                f"`--{field}` needs at least {least}, got {getattr(study, field)}."
                + (f" There are {len(study.arms)} arms." if field == "trials" else "")
            )
    objectives = [choice("--objectives", n, list(OBJECTIVES)) for n in args.objectives]
    check_objectives(objectives)
    if len(objectives) > 1:
        if pruner != "none":
            raise ValueError(
                f"`--pruner` needs one objective, got {pruner} with {len(objectives)}: Optuna "
                "prunes by one value. Leave it out."
            )
        study = question.with_changes(study, {"pruner": "none"})
    return study, fix, objectives


def _check_rounding(
    args: argparse.Namespace,
    study: "Study",
    fix: Mapping[str, Any],
    load: Callable[[Config], Splits],
) -> None:
    """Raises ValueError for fields of `--set` of which rounding leaves nothing in any arm."""
    from kart.search import space

    names, idle = set(_pairs(args.set, "--set")), []
    arms = [space.first(arm) for arm in study.spaces(study.config, fix).values()]
    for config in arms:
        images = load(config).train.images
        size, steps = config.image_size or images.shape[-1], len(images) // config.batch_size
        try:
            check_effects_on(names, config, size, max(1, steps), lambda name: f"--set {name}")
        except ValueError as error:
            idle.append(error)
    if len(idle) == len(arms):
        raise idle[0]


def _set_up(args: argparse.Namespace) -> Opened:
    from kart.search import question, work
    from kart.search.trials import LIMITS, loader

    where = _home(args)
    found = question.load(args.study)
    study, fix, objectives = _asked(args, found.study)
    _give_code(study, fix)
    load = loader(args.val_limit)
    _check_rounding(args, study, fix, load)
    limits = {name: getattr(args, f"max_{name}") for name in LIMITS}
    options = {
        "objectives": objectives,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "fix": fix,
        "sampler_seed": args.sampler_seed,
        "levels": args.levels or 3,
        "val_limit": args.val_limit,
        "group": args.group or 0,
        "heartbeat": args.heartbeat,
    }
    settings = work.settings_for(found._replace(study=study), load(study.config), options)
    place = _place(args)
    torch.set_num_threads(place["threads"])
    database, settings = work.set_up(
        where,
        settings,
        study,
        lambda: work.fastest_group(study, settings, load, place),
        _wait_s(args),
    )
    return Opened(where, database, settings, study)


def _open(args: argparse.Namespace, name: str | None, asked: "Question | None" = None) -> Opened:
    """A study that is there; runs no code. `asked` is its own, where the command line named it."""
    from kart.search import journal, storage, work

    where = _home(args)
    wait_s = _wait_s(args)
    if where.directory is not None:
        found = storage.read_settings(where.directory)
        if found is None:
            raise ValueError(
                f"`--out` needs a directory with a study, got {args.out!r} without study.json. "
                "Create it with `kart study init NAME --out DIR`."
            )
        if name is not None and name != found.study:
            raise ValueError(
                f"`study` needs to be {found.study!r}, which {args.out!r} holds, got {name!r}."
            )
    else:
        several = storage.read_database(storage.open_database(where.url, wait_s=wait_s), name)
        if len(several) != 1:
            raise ValueError(
                f"`study` needs the name of one study in {where.name!r}, got {name!r}; there "
                f"are {sorted(several) or 'none'}. Create it with `kart study init`."
            )
        found = next(iter(several.values()))
    now = storage.changed(found, versions=storage.versions())
    if asked is not None:
        spaces = asked.study.spaces(Config.fromdict(found.config), found.fix)
        prints = {arm: work.fingerprint(space) for arm, space in spaces.items()}
        now = storage.changed(now, spaces=prints, source=asked.source)
    storage.check_same(found, now, where.name)
    Config.fromdict(found.config)  # of this version, it is whole
    if where.directory is not None and asked is not None:
        work.mend(where, found, asked.study)
    elif where.directory is not None:
        journal.check(where.directory, found.names.values())
    database = storage.open_database(where.url, found.heartbeat, wait_s=wait_s)
    return Opened(where, database, found, None if asked is None else asked.study)


def _named(opened: Opened) -> str:
    """The flags that name a study's home, quoted for a shell."""
    if opened.where.directory:
        return shlex.join(["--out", str(opened.where.directory)])
    return shlex.join([opened.settings.study, "--storage", opened.where.name])


def _write(opened: Opened, out: str, arms: "Arms") -> None:
    from kart.search import report, work

    settings = opened.settings
    found = report.results(arms)
    if opened.study is not None and opened.study.answer is not None and found:
        try:
            told = opened.study.answer(found)
        except Exception as error:
            raise ValueError(
                f"`answer` of {settings.study!r} failed: {code.where(error, settings.named)}. What "
                "was confirmed is kept; without an answer the report is written by `kart study "
                f"report {_named(opened)}`."
            ) from error
        work.save_answer(arms, told)
    answer = work.stored_answer(arms)
    paths = report.write(report.View(arms, settings, _named(opened), Path(out), answer))
    print("\n".join(report.lines(arms, settings)))
    if answer is not None:
        print(answer)
    print("written: " + ", ".join(str(path) for path in paths))


def _check_data(args: argparse.Namespace, opened: Opened) -> None:
    """Raises ValueError unless the data are here what the study was started with."""
    from kart.search import storage, work
    from kart.search.trials import loader

    found = opened.settings
    config = dataclasses.replace(Config.fromdict(found.config), **_elsewhere(args))
    now = work.describe_data(loader(found.val_limit)(config))
    storage.check_same(found, storage.changed(found, dataset=now), opened.where.name)


def _search(args: argparse.Namespace, opened: Opened, place: Mapping[str, Any]) -> bool:
    from kart.search import storage, work

    assert opened.study is not None
    with storage.reachable(opened.where.name):
        return work.work(
            opened.where,
            opened.database,
            opened.settings,
            opened.study,
            place=place,
            pool=args.pool,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            quiet=args.quiet,
            timeout=args.timeout,
        )


def _run(args: argparse.Namespace) -> int:
    from kart.search import storage, work

    if args.storage and not args.out:
        raise ValueError("`run` needs `--out DIR` for the report, got none. Give a directory.")
    opened = _set_up(args)
    settings = opened.settings
    finished = _search(args, opened, _place(args))
    arms = storage.studies(opened.database, settings)
    if finished and settings.confirm:
        assert opened.study is not None
        _give_code(opened.study, settings.fix, arms)
        work.confirm(arms, settings, settings.confirm, _place(args), args.quiet)
    _write(opened, args.out, arms)
    if not finished:
        print(UNFINISHED)
    return 0


def _init(args: argparse.Namespace) -> int:
    opened = _set_up(args)
    settings = opened.settings
    opened.database.engine.dispose()  # its files are whole when this returns
    home = ["--storage", opened.where.name] if args.storage else ["--out", args.out]
    command = shlex.join(["kart", "study", "work", args.study, *home])
    print(
        f"{settings.study}: {len(settings.spaces)} arms ({', '.join(settings.spaces)}), "
        f"{settings.per_arm} trials each; start workers with: {command}"
    )
    return 0


def _work(args: argparse.Namespace) -> int:
    from kart.search import question

    name = Path(args.study).stem if args.study.endswith(".py") else args.study
    asked = question.load(args.study)
    opened = _open(args, name, asked)
    _give_code(asked.study, opened.settings.fix)
    _check_data(args, opened)
    if _search(args, opened, _elsewhere(args)):
        print(f"finished; write the report with: kart study report {_named(opened)}")
    else:
        print(UNFINISHED)
    return 0


def _report(args: argparse.Namespace) -> int:
    from kart.search import storage, work

    if not args.out:
        raise ValueError("`report` needs `--out DIR` for the report, got none. Give a directory.")
    for name in ("data", "device", "threads", "code"):
        if getattr(args, name) not in (None, []) and not args.confirm:
            raise ValueError(
                f"`--{name}` needs `--confirm`, got it without: nothing is trained. Leave it out."
            )
    opened = _open(args, args.study)
    arms = storage.studies(opened.database, opened.settings)
    if args.confirm:
        _check_data(args, opened)
        work.confirm(arms, opened.settings, args.confirm, _elsewhere(args), args.quiet)
    _write(opened, args.out, arms)
    return 0


def _list(args: argparse.Namespace) -> int:
    from kart.search import question

    for name, (_, text) in question.available().items():
        print(f"{name:22s} {text}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from kart.search import journal, storage, work

    where = _home(args)
    if where.directory is not None:
        found = storage.read_settings(where.directory)
        if found is None:
            raise ValueError(f"`--out` needs a directory with a study, got {args.out!r}.")
        journal.check(where.directory, found.names.values())
    database = storage.open_database(where.url)
    for name, settings in storage.read_database(database).items():
        for arm, one in storage.studies(database, settings).items():
            state = {s.name.lower(): n for s, n in sorted(work.counts(one).items())}
            best = work.winners(one)
            shown = f"best {100 * best[0].mean:.2f} %" if best else "no value yet"
            print(f"{name}/{arm}: {state or 'no trials'}; {shown}")
    return 0


COMMAND = Command(
    "study",
    "Optuna studies: run, init, work, report, status, list",
    description=DESCRIPTION,
    commands=(
        Command(
            "run",
            "set up, search, confirm the winners, write the report",
            _run_flags,
            _run,
            reads=True,
        ),
        Command("init", "create a study (and tables) for workers, once", _init_flags, _init),
        Command(
            "work",
            "work on a study that was created; join and leave at will",
            _work_flags,
            _work,
            reads=True,
        ),
        Command("report", "write report.html and trials.csv", _report_flags, _report, reads=True),
        Command("status", "the studies in a directory or database", _home_flags, _status),
        Command("list", "the questions there are", lambda parser: None, _list),
    ),
)
