"""What each operator scored and what it costs, beside softmax."""

from collections.abc import Sequence

from kart import pages, statistics, tables
from kart.analysis import cost
from kart.analysis.section import Analysis, Context, Result, mean_number
from kart.models import Model
from kart.operators import Operator


def verdicts(results: Sequence[Result]) -> list[str]:
    """What the differences to softmax, else to the first result, mean, over the seeds both have."""
    names = [result.name for result in results]
    base = results[names.index("softmax") if "softmax" in names else 0]
    return [_verdict(result, base) for result in results if result is not base]


def _verdict(one: Result, base: Result) -> str:
    ours, theirs = (
        {config.seed: top1 for config, top1 in zip(result.configs, result.top1, strict=True)}
        for result in (one, base)
    )
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return (
            f"{one.name} and {base.name} have no seed in common, so that their difference has no "
            "interval. Train both with the same seeds."
        )
    pairs = [ours[seed] for seed in shared], [theirs[seed] for seed in shared]
    told = statistics.verdict(one.name, pairs[0], base.name, pairs[1])
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        told += f" Left out, as one of the two has no such seed: {', '.join(map(str, alone))}."
    return told


def _words(op: Operator, name: str) -> str:
    if op.basis is None:
        if op.name != name:
            return op.name
        if op.options.get("kind") == "hybrid":
            return "heads that differ"
        return "learned, of no basis" if op.traits.get("learned", True) else "a fixed function"
    options = {k: v for k, v in op.basis.options.items() if k not in ("init", "scales")}
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in options.items()}
    units = ", ".join(f"{key} {value}" for key, value in shown.items() if value != "zero")
    units = f" ({units})" if units else ""
    kind = str(op.options.get("kind", op.name)).replace("_", " ")
    rank = f" {op.options['rank']}" if "rank" in op.options else ""
    extra = "".join(f", {k} {op.options[k]}" for k in ("project", "base") if op.options.get(k))
    return f"{kind}{rank} of {op.basis.family} units{units}{extra}"


def described(name: str, model: Model) -> str:
    """What the operator of a model is, in words, or those of its blocks."""
    blocks: dict[str, list[str]] = {}
    for i, op in enumerate(model.operators, 1):
        blocks.setdefault(_words(op, name), []).append(str(i))
    if len(blocks) > 1:
        return f"{name}: " + "; ".join(
            f"{words} in block{'s' * (len(where) > 1)} {', '.join(where)}"
            for words, where in blocks.items()
        )
    shared = "one a block"
    if model.config.sharing == "universal":
        count = len({site.path for site in model.sites})
        shared = "one for all blocks" if count == 1 else f"{count} that blocks share"
    return f"{name}: {next(iter(blocks))}" + f", {shared}" * bool(model.operators[0].basis)


def section(context: Context) -> pages.Section:
    """The table of accuracies with intervals, parameters and operations; the differences."""
    results = context.results
    tested = all(result.test is not None for result in results)
    split = "test" if tested else "validation"
    timed = all(result.step_ms is not None for result in results)
    header = ["operator", f"{split} top-1 %", "by seed", "parameters"]
    header += ["in operators", "MMACs an image"] + ["step ms"] * timed
    rows, numbers, words = [], [], []
    for result in results:
        images = result.test_images if tested else len(context.splits.val.labels)
        found = statistics.accuracy(result.top1, images)
        model = context.model(result.configs[0])
        words.append(described(result.name, model))
        counted = cost.parameters(model)
        bounds = found.why or f"[{100 * found.low:.2f}, {100 * found.high:.2f}]"
        row = [
            result.name,
            pages.Markup(f"{tables.spread(result.top1)}<br>{pages.tag('small', bounds)}"),
            ", ".join(f"{100 * value:.2f}" for value in result.top1),
            f"{counted.total:,}",
            f"{counted.operator:,}",
            "not counted" if cost.uncounted(model) else f"{cost.flops(model).total / 1e6:.2f}",
        ]
        rows.append(row + ([f"{result.step_ms:.1f}"] if timed else []))
        numbers += [
            pages.Number(result.name, f"{split}_top1", value, "", config.seed)
            for config, value in zip(result.configs, result.top1, strict=True)
        ]
        numbers += [
            mean_number(result.name, f"{split}_top1", found),
            pages.Number(result.name, "parameters", counted.total),
            pages.Number(result.name, "operator_parameters", counted.operator),
        ]
    caption = "Mean and standard deviation over seeds, below them the 95 % interval."
    chosen = any(result.epochs is not None for result in results)
    weights = "weights of the best epoch, which validation chose" if chosen else "last weights"
    if tested:
        caption += f" The test split was read once, after the last epoch, with the {weights}."
    elif chosen:
        caption += f" Of the {weights}: by the same images, so these top-1 err to the high side."
    if timed:
        caption += " Step: one training step a member, CPU time; it alone varies between runs."
    caption += " MACs by the paper's count, for the materialised form. "
    caption += "; ".join(words) + "."
    known = results[0].test_images if tested else len(context.splits.val.labels)
    chosen = f" and the choice of the {known:,} images" if known else ""
    found = verdicts(results)
    intervals = (
        f"Intervals of a mean are Student's on the scale of the logit and cover seeds{chosen}; "
        "those of a difference pair by seed, on the same images, and cover seeds alone: initial "
        "weights and order of batches, which operators share. Another data set or another recipe "
        f"is covered by neither. With few seeds, {statistics.FEW}."
    )
    blocks = [pages.table(header, rows, caption)]
    blocks += [pages.items(found)] if found else []
    return pages.Section([*blocks, pages.note(intervals)], numbers)


ANALYSIS = Analysis("scores", "", section)
