"""The `kart` command: parsing, progress and tables; everything else is called."""

import argparse
import dataclasses
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kart import operators, tables, train, tree
from kart.tables import spread, table
from kart.train import Config, Record

if TYPE_CHECKING:
    from kart.analysis import report

DESCRIPTION = """\
Train, evaluate and study vision transformers with learnable attention (KArAt).

  kart train --operator softmax G3B G3U --seeds 0 1 2 --out runs/digits
  kart eval runs/digits
  kart analyse runs/digits
  kart info --model vit_tiny --operator G3B
"""

OPERATORS_HELP = """\
operators: softmax, sigmoid, relu, sparsemax, or FAMILY-NUMBERS followed by B (blockwise) or U
(universal): G3B (Fourier, grid 3), bspline-G8B, gaussian_rbf-G8B, polynomial-0B, chebyshev-4B,
rational-5/4B, mexican_hat-B, morlet-B, dog-B, meyer-B, shannon-B. Options follow a colon:
G3B:rank=24,base=softmax. Heads that differ are joined by +: 2*softmax+G3B.
"""

# one line for each field of Config that is a flag; argparse's help of `kart train`
FLAGS: dict[str, dict[str, tuple[type, str]]] = {
    "data": {
        "data": (
            str,
            'digits, a directory (parquet or images), or a public name "uoft-cs/cifar10"',
        ),
        "train_limit": (int, "train on the first so many images"),
        "decode_size": (int, "side to cut images to when reading, where they differ"),
        "augment": (str, "none, crop, flip_crop, paper, paper_half or small"),
        "eval_crop": (float, "share of the side that evaluation sees, the centre (paper: 0.9)"),
    },
    "model": {
        "model": (str, "vit_nano, vit_tiny, vit_small or vit_base"),
        "sharing": (str, "blockwise or universal, where the operator's letter is left out"),
        "rank": (int, "rank r of the operators (12)"),
        "project": (str, "simplex: project rows of weights onto the probability simplex"),
        "base": (str, "softmax: add rows of softmax to the learned weights"),
        "image_size": (int, "side of the model's images; those of the data are resized to it"),
        "patch_size": (int, "side of a patch (16 from 128 px on, else an eighth of the side)"),
        "embed_dim": (int, "width D"),
        "depth": (int, "number of blocks L"),
        "num_heads": (int, "number of heads H"),
        "mlp_ratio": (float, "width of the MLP over D"),
    },
    "optimisation": {
        "epochs": (int, "passes over the training images"),
        "batch_size": (int, "images a step"),
        "learning_rate": (float, "peak of the schedule; `paper` for 5e-4 * batch / 512"),
        "start_learning_rate": (float, "where the warm-up begins"),
        "end_learning_rate": (float, "where the cosine ends"),
        "warmup_epochs": (float, "linear warm-up, half of the run at most"),
        "weight_decay": (float, "decoupled weight decay"),
        "adam_eps": (float, "epsilon of AdamW"),
        "max_norm": (float, "global norm to which gradients are clipped"),
        "label_smoothing": (float, "share of a target spread over all classes"),
        "ema": (float, "decay of the average of the weights that is evaluated; 0 for none"),
        "trajectory": (int, "snapshots of the weights to keep for kart analyse; 0 for none"),
    },
    "execution": {
        "batching": (str, "native, or vmap: a per-example loss mapped by torch.func.vmap"),
        "step": (str, "eager, or compiled: the whole step as one graph of torch.compile"),
        "precision": (str, "float32 or bfloat16"),
        "device": (str, "cpu or cuda"),
        "threads": (int, "CPU threads; recorded, since they change the last bits of a result"),
    },
}


def _rate(text: str) -> float | None:
    return None if text == "paper" else float(text)


def add_config_flags(parser: argparse.ArgumentParser, groups: Sequence[str] = tuple(FLAGS)) -> None:
    """Adds the flags of `Config` in `groups` to `parser`, with Config's defaults."""
    defaults = Config()
    for title in groups:
        group = parser.add_argument_group(title)
        for name, (kind, text) in FLAGS[title].items():
            default = getattr(defaults, name)
            shown = "" if default is None else f" (default {default})"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=_rate if name == "learning_rate" else kind,
                default=default,
                metavar=kind.__name__.upper(),
                help=text + shown,
            )


def config_of(args: argparse.Namespace, **changes: Any) -> Config:
    """The Config that the flags in `args` describe."""
    known = {field.name for field in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in known}
    return Config(**{**given, **changes})


# fields of Config that belong to the operator
OPTIONS = {"rank", "project", "base"}


def options_of(operator: str | tuple[str, ...]) -> set[str]:
    """Those of `OPTIONS` that the spec of an operator, or one of those of the blocks, leaves
    open.
    """
    specs = [operator] if isinstance(operator, str) else operator
    return OPTIONS & set[str]().union(*map(operators.options, specs))


def configs_of(args: argparse.Namespace) -> list[Config]:
    """One Config for each of the operators; each option of operators is for those that leave it
    open.
    """
    some = set[str]().union(*map(options_of, args.operator))
    return [
        config_of(args, operator=spec, **dict.fromkeys(some - options_of(spec)))
        for spec in args.operator
    ]


def slug(operator: str) -> str:
    """A directory name for a spec string."""
    return re.sub(r"[^A-Za-z0-9]+", "-", operator).strip("-")


def _train(args: argparse.Namespace) -> int:
    import torch

    from kart import population, runs

    if args.threads is None:
        args.threads = torch.get_num_threads()
    named = configs_of(args)
    if len({slug(spec) for spec in args.operator}) != len(args.operator):
        raise ValueError(f"`--operator` needs different operators, got {args.operator}.")
    splits = train.load_data(named[0])
    for config in named:
        train.build(config, splits.train)  # a bad operator is found before the first one trains
    out = Path(args.out or f"runs/{slug(Path(args.data).name)}-{named[0].hash}")
    results: list[tuple[str, int, list[Record]]] = []
    for config in named:
        configs = population.seeds(config, args.seeds)
        home = out if len(named) == 1 else out / slug(str(config.operator))
        parts = _groups(configs, splits, args.group, home)
        last: list[Record] = []
        for part, directory in parts:
            last += _train_group(part, splits, directory, args.quiet)
        size = tree.size(runs.load_weights(parts[0][1])[0])
        results.append((str(config.operator), size, last))
    rows = [
        [
            operator,
            spread([record["val_top1"] for record in last]),
            spread([record["val_top5"] for record in last]),
            spread([record["val_loss"] for record in last], 3, 1.0),
            f"{size:,}",
            str(len(last)),
        ]
        for operator, size, last in results
    ]
    print(table(rows, ["operator", "val top-1 %", "val top-5 %", "val loss", "parameters", "n"]))
    print(f"written to {out}; score it on the test split with: kart eval {out}")
    return 0


def _groups(
    configs: Sequence[Config], splits: train.Splits, group: str, home: Path
) -> list[tuple[list[Config], Path]]:
    """The members that train together, each group with its directory."""
    from kart import population, runs

    started = sorted(home.glob("group-*/config.json"))
    if (home / "config.json").exists() or len(configs) == 1:
        size = len(configs)
    elif started:
        size = len(runs.members(started[0].parent))
    elif group == "auto":
        size, seconds = population.fastest_group(configs, splits)
        shown = ", ".join(f"{k}: {1000 * s:.1f} ms" for k, s in seconds.items())
        print(f"{configs[0].operator}: {size} at a time (ms per member and step: {shown})")
    else:
        size = int(group)
    parts = population.groups(configs, size)
    if len(parts) == 1:
        return [(parts[0], home)]
    return [(part, home / f"group-{i}") for i, part in enumerate(parts)]


def _train_group(
    configs: list[Config], splits: train.Splits, directory: Path, quiet: bool
) -> list[Record]:
    from kart import population, runs

    seeds = ",".join(str(config.seed) for config in configs)
    label = f"{configs[0].operator} seed {seeds}"
    record: Record = {}
    with tables.bar(desc=label, unit="step", disable=quiet) as bar:

        def on_step(step: int, total: int, loss: Any) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = bar.n = step - 1
            bar.update(1)

        for record in runs.execute(directory, configs, splits, on_step=on_step):
            top1 = [one["val_top1"] for one in population.split_record(record, len(configs))]
            shown = spread(top1)
            bar.set_postfix_str(f"epoch {record['epoch']}/{configs[0].epochs} val {shown} %")
    return population.split_record(record, len(configs))


def run_directories(path: str) -> list[Path]:
    """The run directories at or below `path`, sorted."""
    found = sorted(config.parent for config in Path(path).glob("**/config.json"))
    if not found:
        raise ValueError(
            f"`run` needs a directory that `kart train` wrote, got {path!r} without any "
            "config.json. Check the path."
        )
    return found


def _eval(args: argparse.Namespace) -> int:
    import torch

    from kart import checkpoint, data, runs

    by_operator: dict[str, list[dict[str, float]]] = {}
    for directory in run_directories(args.run):
        configs = runs.members(directory)
        if args.data is not None:
            configs = [dataclasses.replace(config, data=args.data) for config in configs]
        config = configs[0]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        config = dataclasses.replace(config, device=args.device or config.device)
        dataset = data.load(config.data, args.split, image_size=config.decode_size)
        model = train.build(config, dataset)
        scores = []
        for member, params in zip(
            configs, runs.load_weights(directory, args.checkpoint), strict=True
        ):
            params = tree.to(params, config.device)
            values = train.evaluate(model.apply, params, dataset, config)
            scores.append(
                {"seed": member.seed, **{name: float(value) for name, value in values.items()}}
            )
        text = {"split": args.split, "checkpoint": args.checkpoint, "images": len(dataset.labels)}
        report = {**text, "members": scores, "versions": checkpoint.versions()}
        path = directory / f"eval-{args.split}-{args.checkpoint}.json"
        checkpoint.write_text(path, json.dumps(report, indent=1) + "\n")
        key = str(config.operator)
        by_operator.setdefault(key, []).extend(scores)
    rows = [
        [
            operator,
            spread([score["top1"] for score in scores]),
            spread([score["top5"] for score in scores]),
            spread([score["loss"] for score in scores], 3, 1.0),
            str(len(scores)),
        ]
        for operator, scores in by_operator.items()
    ]
    names = ["operator", *(f"{args.split} {what}" for what in ("top-1 %", "top-5 %", "loss")), "n"]
    print(table(rows, names))
    return 0


def results_of(path: str, which: str = "last") -> "list[report.Result]":
    """The runs at or below `path` as results, one an operator, with test scores where all have
    been scored by `kart eval`.

    Raises ValueError for runs that differ in more than operator and seed, or are unfinished.
    """
    from kart import population, runs
    from kart.analysis import report

    found: dict[str, list[tuple[Config, list[Record], train.Params, Any, Path]]] = {}
    images: set[int] = set()
    for directory in run_directories(path):
        configs = runs.members(directory)
        epochs = [
            population.split_record(one, len(configs)) for one in runs.read_metrics(directory)
        ]
        if len(epochs) < configs[0].epochs:
            raise ValueError(
                f"`run` needs finished runs, got {str(directory)!r} after epoch {len(epochs)} of "
                f"{configs[0].epochs}. Train it further with the same command."
            )
        scored = directory / f"eval-test-{which}.json"
        scores: list[Any] = [None] * len(configs)
        if scored.exists():
            stored = json.loads(scored.read_text(encoding="utf-8"))
            scores = stored["members"]
            images.add(stored["images"])
        for i, params in enumerate(runs.load_weights(directory, which)):
            own = [records[i] for records in epochs]
            found.setdefault(str(configs[i].operator), []).append(
                (configs[i], own, params, scores[i], directory)
            )
    every = [one for members in found.values() for one in members]
    unset = dict.fromkeys(OPTIONS)
    settings = {dataclasses.replace(one[0], operator="softmax", seed=0, **unset) for one in every}
    given = {(name, getattr(one[0], name)) for one in every for name in options_of(one[0].operator)}
    if len(settings) > 1 or len(given) > len({name for name, _ in given}):
        raise ValueError(
            f"`run` needs runs that differ in operator and seed alone, got others below {path!r}. "
            "Analyse them one by one."
        )
    tested = all(one[3] is not None for one in every)
    results = []
    for operator, members in found.items():
        members.sort(key=lambda one: one[0].seed)
        configs, records, params, scores, homes = (list(c) for c in zip(*members, strict=True))
        by_epoch = [list(epoch) for epoch in zip(*records, strict=True)]
        results.append(
            report.Result(
                operator,
                configs,
                by_epoch,
                params,
                test=scores if tested else None,
                test_images=next(iter(images)) if len(images) == 1 and tested else None,
                homes=homes,
                snapshots=functools.partial(_snapshots, homes, [c.seed for c in configs]),
            )
        )
    return sorted(results, key=lambda one: one.name != "softmax")


def _snapshots(
    homes: Sequence[Path], seeds: Sequence[int], index: int
) -> list[tuple[int, train.Params]]:
    from kart import runs

    own = [config.seed for config in runs.members(homes[index])].index(seeds[index])
    return [(step, params[own]) for step, params in runs.load_trajectory(homes[index])]


def _analyse(args: argparse.Namespace) -> int:
    from kart.analysis import cost, report, scores, training

    results = results_of(args.run, args.checkpoint)
    config = results[0].configs[0]
    if args.data is not None:
        config = dataclasses.replace(config, data=args.data)
    splits = train.load_data(config)
    out = Path(args.out or Path(args.run) / "report.html")
    title = args.title or f"{', '.join(one.name for one in results)} on {splits.train.name}"
    done = report.analyse(
        results,
        splits,
        report.select(args.sections.split(",")) if args.sections else report.SECTIONS,
        args.minutes,
        out,
        title=title,
        command=shlex.join(["kart", *args.given]),
        shown=args.images,
        cache=Path(args.run) / "analysis",
        say=lambda line: print(line, file=sys.stderr),
    )
    split = "val" if results[0].test is None else "test"
    rows = []
    for result in results:
        counted = cost.parameters(train.build(result.configs[0], splits.train))
        numbers = [f"{counted.total:,}", f"{counted.operator:,}", str(len(result.configs))]
        rows.append([result.name, spread(result.top1), *numbers])
    print(table(rows, ["operator", f"{split} top-1 %", "parameters", "in operators", "n"]))
    print("\n".join([*scores.verdicts(results), *training.warnings(results)]))
    for one in done:
        if one.problem:
            print(f"{one.name} is not shown: {one.problem}")
    print(f"written to {out}, its numbers beside it as .json and .csv")
    return 0


def _info(args: argparse.Namespace) -> int:
    from kart import kernels, models
    from kart.analysis import cost

    if args.paper:
        print(cost.paper_table())
        return 0
    config = config_of(args, operator=args.operator)
    given = {name: getattr(config, name) for name in train.MODEL_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("patch_size", train.default_patch_size(args.image_size))
    model = models.create(
        config.model,
        operator=args.operator,
        image_size=args.image_size,
        in_channels=args.in_channels,
        num_classes=args.num_classes,
        **given,
    )
    counted, operations = cost.parameters(model), cost.flops(model)
    batch = config.batch_size
    width = 2 if config.precision == "bfloat16" else 4
    kept = cost.activation_memory(model, batch, bytes_each=width)
    naive = cost.activation_memory(model, batch, "naive", bytes_each=width)
    found = {
        "model": config.model,
        "operator": model.config.operator,
        "sharing": model.config.sharing,
        "tokens": model.config.tokens,
        "parameters": counted.total,
        "operator_parameters": counted.operator,
        "gflops": operations.total / 1e9,
        "activation_gflops": operations.activation / 1e9,
        "batch": batch,
        "kept_for_backward_mib": kept / 2**20,
        "kept_by_the_naive_form_mib": naive / 2**20,
        # float32 weights, gradients and two moments, and what the backward needs
        "training_memory_mib": (16 * counted.total + kept) / 2**20,
        "engines": kernels.engines(),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [
        ("model", f"{config.model}, {args.operator}, {model.config.sharing}"),
        ("tokens", f"{model.config.tokens}"),
        ("parameters", f"{counted.total:,}, {counted.operator:,} of them in the operators"),
        ("GFLOPs an image", f"{found['gflops']:.3f}, {found['activation_gflops']:.3f} of them in "
         "the activation (the paper's count: multiply-accumulates)"),
        (f"kept for backward, batch {batch}", f"{kept / 2**20:.0f} MiB "
         f"(materialised as in the paper: {naive / 2**20:.0f} MiB)"),
        ("training memory, AdamW", f"{found['training_memory_mib']:.0f} MiB"),
        *((f"engine {name}", state) for name, state in found["engines"].items()),
    ]  # fmt: skip
    print("\n".join(f"{name:32} {value}" for name, value in rows))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from kart.analysis import bench

    bench.main(args.rest)
    return 0


def _study(args: argparse.Namespace) -> int:
    from kart import search

    return search.study_main(args.rest)


def _test_basis(args: argparse.Namespace) -> int:
    import importlib

    from kart import testing

    module, colon, name = args.target.partition(":")
    sys.path.insert(0, "")  # as `python -m` does: a module of the current directory
    try:
        obj = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`test-basis` needs an importable module:object, got {args.target!r} ({error}). "
            "Name it as in my_module:my_basis."
        ) from None
    if callable(obj):  # a factory with defaults
        obj = obj()
    results = testing.check_basis(obj, name=args.target)
    states = {True: "passed", False: "FAILED", None: "skipped"}
    rows = [
        [one.name, states[one.passed], one.message.split("\n")[0][:90] if not one.passed else ""]
        for one in results
    ]
    print(table(rows, ["property", "result", "why"]))
    failed = [one for one in results if one.passed is False]
    for one in failed:
        print(f"\n{one.name}\n{one.message}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("kart", description=DESCRIPTION, formatter_class=raw)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser(
        "train",
        help="train one or several operators on one or several seeds",
        description="Trains a vision transformer. Killed and started again with the same command "
        "it goes on where it stopped, to the same result.",
        epilog=OPERATORS_HELP,
        formatter_class=raw,
    )
    one.add_argument("--operator", nargs="+", default=["softmax"], metavar="SPEC", help="see below")
    one.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="INT", help="seeds (default 0)"
    )
    one.add_argument(
        "--group",
        default="auto",
        help="seeds that train as one vmapped program; auto (default) measures what is fastest",
    )
    one.add_argument("--out", help="run directory (default runs/<data>-<hash of the config>)")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    add_config_flags(one)
    one.set_defaults(call=_train)

    one = commands.add_parser(
        "eval",
        help="score runs on the test split",
        description="Scores every run at or below a directory. This is the only command that "
        "reads the test split.",
    )
    one.add_argument("run", help="directory that `kart train` wrote")
    one.add_argument("--split", default="test", choices=["test", "val", "train"])
    one.add_argument("--checkpoint", default="last", choices=["last", "best"])
    one.add_argument("--data", help="where the data is now, if it has moved")
    one.add_argument("--device", help="cpu or cuda (default that of the run)")
    one.set_defaults(call=_eval)

    one = commands.add_parser(
        "analyse",
        help="one page on runs: curves, learned functions, attention maps",
        description="Compares the operators that `kart train` trained at or below a directory, and "
        "writes a self-contained page: training curves, the functions that each head learned, "
        "attention maps over validation images. Scores are those of the test split where `kart "
        "eval` has scored every run, else of the validation split.",
    )
    one.add_argument("run", help="directory that `kart train` wrote")
    one.add_argument("--out", metavar="HTML", help="the page (default RUN/report.html)")
    one.add_argument("--title", help="its headline")
    one.add_argument("--images", type=int, default=4, help="images with attention maps (4)")
    one.add_argument("--sections", metavar="NAMES", help="comma-separated; default all")
    one.add_argument(
        "--minutes", type=float, default=float("inf"), help="for all slow sections together"
    )
    one.add_argument("--checkpoint", default="last", choices=["last", "best"])
    one.add_argument("--data", help="where the data is now, if it has moved")
    one.set_defaults(call=_analyse)

    one = commands.add_parser(
        "info",
        help="parameters, FLOPs and memory of a configuration, before training it",
        epilog=OPERATORS_HELP,
        formatter_class=raw,
    )
    one.add_argument("--operator", default="softmax", metavar="SPEC", help="see below")
    one.add_argument("--num-classes", type=int, default=10, metavar="INT", help="(default 10)")
    one.add_argument("--in-channels", type=int, default=3, metavar="INT", help="(default 3)")
    one.add_argument("--paper", action="store_true", help="the paper's nine models beside kart's")
    one.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(one, ("model", "optimisation", "execution"))
    one.set_defaults(call=_info, image_size=224, model="vit_tiny")

    for name, call, text in (
        ("bench", _bench, "time and memory of each engine beside softmax (see kart bench --help)"),
        ("study", _study, "Optuna studies: run, init, work, report, list (see kart study --help)"),
    ):
        one = commands.add_parser(name, help=text, add_help=False)
        one.set_defaults(call=call)

    one = commands.add_parser(
        "test-basis", help="put a basis of your own through the property suite of kart.testing"
    )
    one.add_argument("target", help="module:object, for example my_module:my_basis")
    one.set_defaults(call=_test_basis)
    return top


PASSED_ON = (["bench"], ["study"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 for a failed run, 2 for a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser().parse_known_args(argv[:1] if argv[:1] in PASSED_ON else argv)
    # what follows `bench` and `study` is theirs, `--help` included
    args.rest, args.given = argv[1:], argv
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    call: Callable[[argparse.Namespace], int] = args.call
    try:
        return call(args)
    except KeyboardInterrupt:
        print("\nkart: stopped; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    except train.Diverged as error:
        print(f"kart: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"kart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
