"""The main job: do softmax, G3B and G3U learn real images, and what does each cost?

    make demo            or: python -m studies.demo [--out report.html]

Trains a small vision transformer on scikit-learn's handwritten digits (1077 training images of
8 x 8, 17 tokens) with three attention operators, three seeds each, by one recipe, and scores the
last weights on the test split of 360 images. Each operator's seeds train as one vmapped population
of fixed size, with a fixed number of threads: the same digits on every run of one machine and
version; only the time of a step varies. Prints a table and writes a self-contained report.html.
Expected: G3B and G3U above softmax, which learns more slowly on so few patches; about two minutes
on two cores.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

from torch.func import vmap
from tqdm import tqdm

from kart import data, population, train, tree
from kart.analysis import report
from kart.tables import table
from kart.train import Config

OPERATORS = ("softmax", "G3B", "G3U")
RECIPE = Config(
    patch_size=2,
    epochs=20,
    batch_size=64,
    learning_rate=3e-3,
    warmup_epochs=3.0,
    threads=2,
)


def train_operator(
    operator: str, seeds: Sequence[int], epochs: int, splits: train.Splits, test: data.Dataset
) -> report.Entry:
    """Trains one operator on all seeds together and scores it on `test`."""
    fields = {**RECIPE.asdict(), "operator": operator, "epochs": epochs}
    configs = population.seeds(Config.fromdict(fields), seeds)
    model = train.build(configs[0], splits.train)
    run = population.stacked(configs, splits, model)
    records: list[list[train.Record]] = [[] for _ in seeds]
    params: train.Params = {}
    marks = [time.perf_counter()]
    with tqdm(total=epochs * run.steps_per_epoch, desc=f"{operator:8}", unit="step") as bar:

        def on_step(state: train.State, metrics: train.Metrics) -> None:
            marks.append(time.perf_counter())
            bar.update(1)

        for state, record in train.loop(run, on_step=on_step):
            params = train.weights_for_evaluation(state)
            for own, one in zip(records, population.split_record(record, len(seeds)), strict=True):
                own.append(one)
            mean = statistics.fmean(own[-1]["val_top1"] for own in records)
            bar.set_postfix_str(f"val {100 * mean:.1f} %")
    steps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    # the median leaves out the steps that an evaluation follows
    step_ms = 1000 * statistics.median(steps) / len(seeds)
    scores = train.evaluate(vmap(model.apply, (0, None)), params, test, configs[0])
    return report.Entry(
        config=configs[0],
        model=model,
        records=records,
        params=tree.unstack(params),
        scores=[
            {name: float(values[i]) for name, values in scores.items()} for i in range(len(seeds))
        ],
        split="test",
        step_ms=step_ms,
    )


def conclusion(entries: Sequence[report.Entry]) -> str:
    """What the table says, in a sentence, with the spread of the seeds in view."""
    reference, *others = entries
    base = [score["top1"] for score in reference.scores]
    parts = []
    for entry in others:
        top1 = [score["top1"] for score in entry.scores]
        gain = 100 * (statistics.fmean(top1) - statistics.fmean(base))
        if len(base) > 1:
            # standard error of a difference of means
            error = (
                100 * ((statistics.variance(top1) + statistics.variance(base)) / len(base)) ** 0.5
            )
            clear = "clear of" if abs(gain) > 2 * error else "within"
            parts.append(
                f"{entry.name} {gain:+.1f} points ({clear} two standard errors, {error:.1f})"
            )
        else:
            parts.append(f"{entry.name} {gain:+.1f} points (one seed: no spread)")
    return f"Against {reference.name} at this size and recipe: {'; '.join(parts)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="report.html", help="the report (default report.html)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--train-limit", type=int, help="fewer training images, for a quick look")
    args = parser.parse_args(argv)
    splits = train.Splits(
        data.load("digits", "train", train_limit=args.train_limit), data.load("digits", "val")
    )
    # read here alone, after training, by a script that says so
    test = data.load("digits", "test")
    entries = [
        train_operator(operator, args.seeds, args.epochs, splits, test) for operator in OPERATORS
    ]
    print(f"\nHandwritten digits, {len(splits.train.labels)} training images, test split of "
          f"{len(test.labels)}: mean ± standard deviation\n")  # fmt: skip
    print(table(report.rows(entries), report.HEADER))
    said = conclusion(entries)
    print(f"\n{said}\nOnly `ms a step` (per seed, three trained at once) varies between runs.")
    report.write(
        args.out,
        entries,
        test,
        title="Softmax and learnable attention on handwritten digits",
        summary=said,
        command="make demo",
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
