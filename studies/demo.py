"""Does a transformer with learnable attention read handwritten digits better than one with softmax?

    make demo                  # or: python -m studies.demo

Trains softmax, G3B and G3U (paper's names: Fourier units of grid 3, one operator a block or one for
all) on scikit-learn's digits, three seeds each, all with one recipe. Prints a table and writes
report.html: training curves, the functions that each head learned, attention maps over the images
and how well they find objects, spectra.

The recipe is kart's default but for the number of epochs, blocks and images a batch, chosen so that
all three learn well in the time; nothing was tuned for one of them. The seeds of an operator train
as one vmapped population on one thread, so the digits are the same on every run on one machine,
whatever else it does and however many cores it has. The three operators are three processes: more
than two cores, since the shortest leaves a core to the others when it is done.

Expected (n = 3, about 90 s on two cores): G3B and G3U about two points above softmax, and most of
their functions still close to where they started, see the report.
"""

import argparse
import dataclasses
import multiprocessing
import os
import queue
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kart import data, population, tables, train, tree
from kart.analysis import cost, report, scores, training
from kart.analysis.section import Context
from kart.commands.command import standalone
from kart.train import Config

OPERATORS = ("softmax", "G3B", "G3U")
# the quick part of the dissection; `kart analyse` has all of it
SECTIONS = ("scores", "training", "functions", "attention", "spectra")
RECIPE = Config(depth=2, patch_size=2, epochs=25, batch_size=32, threads=1)


def result_of(configs: Sequence[Config], on_step: Callable[[], None]) -> report.Result:
    """Trains `configs` as one population, then scores the last weights on the test split."""
    config = configs[0]
    splits = train.load_data(config)
    marks: list[float] = []

    def stepped(state: train.State, metrics: train.Metrics) -> None:
        # time of this process: others on the machine do not count
        marks.append(time.process_time())
        on_step()

    records, params = [], []
    for state, record in train.loop(population.run(configs, splits), on_step=stepped):
        records.append(population.split_record(record, len(configs)))
        weights = train.weights_for_evaluation(state)
        params = [weights] if len(configs) == 1 else tree.unstack(weights)
    test = data.load(config.data, "test", image_size=config.decode_size)
    images = len(test.labels)
    model = train.build(config, test)
    found = [
        {name: float(value) for name, value in one.items()}
        for one in (train.evaluate(model.apply, own, test, config) for own in params)
    ]
    steps = [later - sooner for sooner, later in zip(marks, marks[1:], strict=False)]
    step_ms = 1000 * statistics.median(steps) / len(configs)
    return report.Result(str(config.operator), configs, records, params, found, step_ms, images)


def _work(number: int, configs: Sequence[Config], messages: Any) -> None:
    """One operator in a process of its own; sends (number, None) a step, then (number, result)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    try:
        found = result_of(configs, lambda: messages.put((number, None)))
    except Exception as error:
        messages.put((number, f"{configs[0].operator}: {error}"))
        raise
    # arrays: tensors would travel as shared memory, which ends with this process
    weights = [tree.map(lambda leaf: leaf.numpy(), own) for own in found.params]
    messages.put((number, found._replace(params=weights)))


def _in_processes(plans: Sequence[Sequence[Config]], bar: Any) -> list[report.Result]:
    # spawn: a fork of a process that has run torch may hang
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    workers = [
        context.Process(target=_work, args=(i, configs, messages), daemon=True)
        for i, configs in enumerate(plans)
    ]
    for worker in workers:
        worker.start()
    results: dict[int, report.Result] = {}
    while len(results) < len(plans):
        try:
            number, message = messages.get(timeout=1)
        except queue.Empty:
            lost = [i for i, w in enumerate(workers) if w.exitcode not in (None, 0)]
            if lost:
                raise RuntimeError(
                    f"the process that trains {plans[lost[0]][0].operator} ended with status "
                    f"{workers[lost[0]].exitcode}"
                ) from None
            continue
        if message is None:
            bar.update()
        elif isinstance(message, str):
            raise RuntimeError(message)
        else:
            params = [tree.map(torch.from_numpy, own) for own in message.params]
            results[number] = message._replace(params=params)
    for worker in workers:
        worker.join()
    return [results[i] for i in range(len(plans))]


def printed(results: Sequence[report.Result], splits: train.Splits, test_images: int) -> str:
    """The table and what it means."""
    rows = []
    for result in results:
        counted = cost.parameters(train.build(result.configs[0], splits.train))
        top1 = tables.spread(result.top1)
        numbers = [f"{counted.total:,}", f"{counted.operator:,}", f"{result.step_ms:.1f}"]
        rows.append([result.name, top1, *numbers])
    header = ["operator", "test top-1 %", "parameters", "in operators", "step ms"]
    seeds = len(results[0].configs)
    lines = [
        tables.table(rows, header),
        "",
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, on the "
        f"{test_images} test images (one is {100 / test_images:.2f} points),",
        "which are read once, after the last epoch, as `kart eval` does. Step: CPU time of one",
        "training step of one seed on one thread, as measured: the only column that varies.",
        *scores.verdicts(results),
        *training.warnings(results),
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    raw = argparse.RawDescriptionHelpFormatter
    one = argparse.ArgumentParser("studies.demo", description=__doc__, formatter_class=raw)
    one.add_argument("--out", default="report.html", help="the page to write (report.html)")
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    one.add_argument("--epochs", type=int, help=f"({RECIPE.epochs})")
    one.add_argument("--processes", type=int, choices=[1, len(OPERATORS)],
                     default=len(OPERATORS) if (os.cpu_count() or 1) > 1 else 1,
                     help="operators trained at a time; the result is the same")  # fmt: skip
    one.add_argument("--quick", action="store_true", help="one epoch of 128 images, to try it out")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    return one


def _run(args: argparse.Namespace, command: str) -> None:
    out = Path(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(
            f"`--out` needs a file in a directory that exists, got {args.out!r}. Make it first."
        )
    if args.quick and args.epochs is not None:
        raise ValueError(
            f"`--epochs` has no effect with `--quick`, which is of one, got {args.epochs}. Leave "
            "one of them out."
        )
    torch.set_num_threads(1)
    epochs = RECIPE.epochs if args.epochs is None else args.epochs
    changes = {"epochs": 1, "train_limit": 128} if args.quick else {"epochs": epochs}
    recipe = dataclasses.replace(RECIPE, **changes)
    plans = [
        population.seeds(dataclasses.replace(recipe, operator=operator), args.seeds)
        for operator in OPERATORS
    ]
    splits = train.load_data(recipe)
    steps = len(plans) * recipe.epochs * (len(splits.train.labels) // recipe.batch_size)
    label = f"{', '.join(OPERATORS)}: {len(args.seeds)} seeds each"
    with tables.bar(total=steps, desc=label, unit="step", disable=args.quiet) as bar:
        if args.processes == 1:
            results = [result_of(configs, bar.update) for configs in plans]
        else:
            results = _in_processes(plans, bar)
    images = len(data.load(recipe.data, "test", image_size=recipe.decode_size).labels)
    print(printed(results, splits, images))
    title = f"{', '.join(OPERATORS[:-1])} and {OPERATORS[-1]} on handwritten digits"
    context = Context(results, splits)
    report.analyse(context, report.select(SECTIONS), out=out, title=title, command=command)
    print(f"\nreport: {out.absolute()}, its numbers beside it as .json and .csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(parser().parse_args(given), shlex.join(["python", "-m", "studies.demo", *given]))
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, train.Diverged) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    standalone(main)
