"""One page that shows a comparison: table, curves, learned functions, attention maps, settings.

The page is a single file without any outside resource; it follows the reader's light or dark
setting and the width of the screen.
"""

import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart import augment, checkpoint, data, tables, train
from kart.analysis import attention, cost, figures, functions, training
from kart.models import Model
from kart.train import Config, Params, Record, Splits


class Result(NamedTuple):
    """Seeds of one configuration, trained.

    `records[epoch][member]` are those of `population.fit`; `params` the weights of each member;
    `test` its scores on the test split, {"top1", "top5", "loss"}, where they were read; `step_ms`
    the time of a training step a member, where it was measured.
    """

    name: str
    configs: Sequence[Config]
    records: Sequence[Sequence[Record]]
    params: Sequence[Params]
    test: Sequence[Mapping[str, float]] | None = None
    step_ms: float | None = None

    @property
    def top1(self) -> list[float]:
        """Top-1 fraction of each member, on the test split if it was read, else validation."""
        if self.test is not None:
            return [scores["top1"] for scores in self.test]
        return training.history(self.records, "val_top1")[:, -1].tolist()


def verdicts(results: Sequence[Result]) -> list[str]:
    """What the differences to softmax mean (to the first result, where softmax is not there)."""
    names = [result.name for result in results]
    base = results[names.index("softmax") if "softmax" in names else 0]
    return [
        training.verdict(result.name, result.top1, base.name, base.top1)
        for result in results
        if result is not base
    ]


def write(
    path: str | os.PathLike,
    results: Sequence[Result],
    splits: Splits,
    *,
    title: str,
    command: str,
    shown: int = 4,
) -> None:
    """Writes the page of `results`, all on the data of `splits`, to `path`, whole or not at all.

    Functions and attention are of the first member of each result; attention maps are over the
    first `shown` validation images, unselected. `command` is what a reader would run again.
    """
    checkpoint.write_text(path, page(results, splits, title=title, command=command, shown=shown))


def page(
    results: Sequence[Result], splits: Splits, *, title: str, command: str, shown: int = 4
) -> str:
    """The page as HTML; see `write`."""
    if not results:
        raise ValueError("`report` needs at least one result, got none. Train something first.")
    seen = [_Look.of(result, splits, shown) for result in results]
    seeds = len(results[0].configs)
    config = results[0].configs[0]
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_setting(seen[0].model, config, splits, seeds)}</p>',
        _headline(results, seen),
        _curves(results),
        _functions(seen),
        _attention(seen, shown),
        _making(results, command),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


class _Look(NamedTuple):
    """The first member of a result, looked into on a few validation images."""

    result: Result
    model: Model
    params: Params
    initial: Params
    pixels: Tensor  # in [0, 1], (B, C, height, width)
    aux: dict[str, Tensor]

    @classmethod
    def of(cls, result: Result, splits: Splits, least: int) -> "_Look":
        config = result.configs[0]
        model = train.build(config, splits.train)
        c = model.config
        # weights and scores are N x N a head and block: as many images as stay small
        count = max(least, min(64, 2**22 // (c.num_heads * c.tokens**2)))
        chosen = torch.arange(min(count, len(splits.val.labels)))
        pixels = data.as_float(data.take(splits.val, chosen)[0])
        images = train.prepare(pixels, splits.val, config)
        with torch.no_grad():
            aux = model.intermediates(result.params[0], images)
        if pixels.shape[-1] != c.image_size:
            pixels = augment.resize(pixels, c.image_size)
        initial = model.init(torch.Generator().manual_seed(config.seed))
        return cls(result, model, result.params[0], initial, pixels, aux)

    def operator_params(self, params: Params, block: int) -> Params:
        if self.model.config.sharing == "universal":
            return params["operator"]
        return params["blocks"][str(block)]["operator"]


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'</div><p class="quiet">{_text(caption)}</p>'
    )


def _figure(fig: Any, name: str, alt: str, caption: str = "") -> str:
    image = figures.svg(fig, name).replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" ', 1
    )
    above = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{above}{image}</figure>"


def _described(look: _Look) -> str:
    """What an operator is, in words."""
    op, sharing = look.model.operators[0], look.model.config.sharing
    name = look.result.name
    if op.basis is None:
        return f"{name}: {'a fixed function' if op.options.get('kind') == name else op.name}"
    options = {k: v for k, v in op.basis.options.items() if k not in ("init", "scales")}
    units = ", ".join(f"{key} {value}" for key, value in options.items() if value != "zero")
    kind = str(op.options.get("kind", op.name)).replace("_", " ")
    rank = f" {op.options['rank']}" if "rank" in op.options else ""
    shared = "one for all blocks" if sharing == "universal" else "one a block"
    extra = "".join(f", {k} {op.options[k]}" for k in ("project", "base") if op.options.get(k))
    return f"{name}: {kind}{rank} of {op.basis.family} units ({units}){extra}, {shared}"


def _setting(model: Model, config: Config, splits: Splits, seeds: int) -> str:
    c = model.config
    return _text(
        f"{os.path.basename(config.data)}, {len(splits.train.labels):,} training images of "
        f"{c.image_size} x {c.image_size}. {config.model}: {c.depth} blocks, {c.num_heads} heads, "
        f"width {c.embed_dim}, patches of {c.patch_size}, {c.tokens} tokens. "
        f"{config.epochs} epochs in batches of {config.batch_size}, AdamW at "
        f"{config.peak_learning_rate:g} with warm-up and cosine, weight decay "
        f"{config.weight_decay:g}. {seeds} seed{'s' if seeds > 1 else ''} each; all operators with "
        "the same recipe."
    )


def _headline(results: Sequence[Result], seen: Sequence[_Look]) -> str:
    tested = results[0].test is not None
    split = "test" if tested else "validation"
    timed = all(result.step_ms is not None for result in results)
    header = ["operator", f"{split} top-1 %", "by seed", "parameters", "in operators"]
    header += ["MMACs an image"] + ["step ms"] * timed
    rows = []
    for result, look in zip(results, seen, strict=True):
        counted = cost.parameters(look.model)
        row = [
            result.name,
            tables.spread(result.top1),
            ", ".join(f"{100 * value:.2f}" for value in result.top1),
            f"{counted.total:,}",
            f"{counted.operator:,}",
            f"{cost.flops(look.model).total / 1e6:.2f}",
        ]
        rows.append(row + ([f"{result.step_ms:.1f}"] if timed else []))
    caption = "Mean and standard deviation over seeds."
    if tested:
        caption += " The test split was read once, after the last epoch, with the last weights."
    if timed:
        caption += " Step: one training step a member, CPU time; it alone varies between runs."
    caption += " MACs by the paper's count, for the materialised form."
    found = verdicts(results)
    notes = "".join(f"<li>{_text(sentence)}</li>" for sentence in found)
    caption += " " + "; ".join(_described(look) for look in seen) + "."
    return (
        f"<section>{_table(header, rows, caption)}"
        + (f"<ul>{notes}</ul>" if found else "")
        + '<p class="quiet">Intervals are over seeds, that is initial weights and order of '
        f"batches, which operators share. They do not cover another choice of the {split} "
        "images, another data set or another recipe.</p></section>"
    )


def _curves(results: Sequence[Result]) -> str:
    shown = []
    for key, label, scale, log in (
        ("val_top1", "validation top-1, %", 100.0, False),
        ("train_loss", "training loss, nats", 1.0, True),
    ):
        series = {result.name: training.history(result.records, key) for result in results}
        ends = ", ".join(f"{n} {scale * float(v[:, -1].mean()):.3g}" for n, v in series.items())
        alt = f"{label} over epochs; mean over seeds at the end: {ends}"
        shown.append(_figure(training.plot(series, label, scale, log), key, alt))
    return (
        f'<section><h2>Training</h2><div class="pair">{"".join(shown)}</div>'
        '<p class="quiet">Line: mean over seeds. Band: lowest to highest seed.</p></section>'
    )


def _some_blocks(depth: int) -> list[int]:
    return list(range(depth)) if depth <= 3 else [0, depth // 2, depth - 1]


def _functions(seen: Sequence[_Look]) -> str:
    shown = []
    for look in seen:
        universal = look.model.config.sharing == "universal"
        for block in [0] if universal else _some_blocks(look.model.config.depth):
            operator = look.model.operators[block]
            now, then = (look.operator_params(p, block) for p in (look.params, look.initial))
            groups = list(functions.learned_groups(operator, now))
            if not groups:
                continue
            names = range(look.model.config.depth) if universal else [block]
            scores = torch.cat([look.aux[f"blocks.{i}.scores"] for i in names])
            x = functions.score_range(scores, groups[0].operator)
            distances = [
                100 * float(value)
                for a, b in zip(groups, functions.learned_groups(operator, then), strict=True)
                for value in functions.moved(
                    functions.curves(a.operator, a.params, x),
                    functions.curves(b.operator, b.params, x),
                )
            ]
            where = "all blocks (shared)" if universal else f"block {block + 1}"
            far = ", ".join(f"{value:.0f}\N{NO-BREAK SPACE}%" for value in distances)
            caption = f"{look.result.name}, {where}. Change by training, head by head: {far}."
            fig = functions.plot(operator, now, x, scores=scores, initial=then)
            name = f"functions-{len(shown)}"
            shown.append(_figure(fig, name, f"Learned functions of {caption}", caption))
            if operator.options.get("kind") == "low_rank":
                caption = f"{look.result.name}, {where}. A key's weight by its own score."
                fig = functions.plot_response(operator, now, x, scores=scores)
                shown.append(_figure(fig, f"functions-{len(shown)}", caption, caption))
    if not shown:
        return ""
    return (
        "<section><h2>The functions that each head learned</h2>"
        "<p>Each panel is a head, seed "
        f"{seen[0].result.configs[0].seed}. Solid: the four units that move its weights most; "
        "dotted: the same units before training. Grey band: 90 % of all its units. Silhouette: "
        "where the scores of validation images lie, which is where the functions are used. The "
        "change is the root mean square over all units of a head, relative to the initial "
        "functions.</p><p>A key's weight by its own score is the sum over p of W[m, p] "
        "φ_pm(score), less its mean: thin lines are keys m, the band the middle 80 % of them, "
        "orange their median; dotted is what softmax has there, exp(score) / N.</p>"
        f'<div class="pair">{"".join(shown)}</div></section>'
    )


def _attention(seen: Sequence[_Look], shown: int) -> str:
    pictures = []
    for i, look in enumerate(seen):
        last = look.model.config.depth - 1
        maps = attention.class_maps(look.aux[f"blocks.{last}.weights"][:shown])
        fig = attention.plot(look.pixels[:shown], maps)
        alt = f"Attention maps of {look.result.name}, last block, over {len(maps)} images"
        pictures.append(_figure(fig, f"attention-{i}", alt, look.result.name))
    depth = max(look.model.config.depth for look in seen)
    blocks = _some_blocks(depth)
    rows = []
    for look in seen:
        shares = [attention.static_share(look.aux[f"blocks.{i}.weights"]) for i in blocks]
        rows.append(
            [look.result.name, *(", ".join(f"{100 * s:.0f}" for s in share) for share in shares)]
        )
    header = ["operator", *(f"block {i + 1}" for i in blocks)]
    count = len(seen[0].pixels)
    caption = (
        "Share of the attention weights that is the same for all images, %, head by head: the "
        f"squared norm of their mean over {count} images, over the mean of their squared norms. "
        "100 would be attention that ignores the image."
    )
    return (
        "<section><h2>Attention</h2><p>The class token's row of the last block over the first "
        f"{min(shown, count)} validation images, seed {seen[0].result.configs[0].seed}; negative "
        "weights count as none, and every map is scaled to its own maximum. Region: the fewest "
        "patches that hold half of the weight of the head with the most.</p>"
        f'<div class="three">{"".join(pictures)}</div>{_table(header, rows, caption)}</section>'
    )


def _making(results: Sequence[Result], command: str) -> str:
    rows = [
        [
            f"{result.name}, seed {config.seed}",
            f"{100 * last['val_top1']:.2f}",
            f"{last['val_loss']:.3f}",
            f"{last['train_loss']:.3f}",
            *([f"{100 * result.test[i]['top1']:.2f}"] if result.test else []),
        ]
        for result in results
        for i, (config, last) in enumerate(zip(result.configs, result.records[-1], strict=True))
    ]
    header = ["run", "val top-1 %", "val loss", "train loss"]
    header += ["test top-1 %"] * (results[0].test is not None)
    settings = {
        "members": [
            {"operator": result.name, "seeds": [config.seed for config in result.configs]}
            for result in results
        ],
        "config": dataclasses.asdict(results[0].configs[0]),
        "versions": checkpoint.versions(),
    }
    return (
        "<section><h2>How this was made</h2>"
        f"<pre>{_text(command)}</pre>"
        "<details><summary>Every run</summary>"
        f"{_table(header, rows, 'After the last epoch.')}</details>"
        "<details><summary>Configuration and versions</summary>"
        f"<pre>{_text(json.dumps(settings, indent=1))}</pre></details></section>"
    )


STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #22262c; --quiet: #6a6f78;
  --line: #dcdee2; --code: #f1f2f3; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e4e6e9; --quiet: #9aa0a9;
  --line: #34383e; --code: #1e2125; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; font-weight: 650; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; font-weight: 650; }
p, ul { max-width: 46rem; margin: .6rem 0; }
ul { padding-left: 1.2rem; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
figcaption { color: var(--ink); margin-bottom: .3rem; }
.wide { overflow-x: auto; margin: 1.2rem 0 .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { color: var(--quiet); border-bottom: 1px solid var(--ink); font-size: .8125rem; }
tbody th { font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th:first-child { text-align: left; }
.pair, .three { display: grid; gap: 1rem 2rem; align-items: start; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
figure { margin: .4rem 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
pre { background: var(--code); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto;
  font-size: .8125rem; line-height: 1.4; }
summary { cursor: pointer; margin: .6rem 0; }
"""
