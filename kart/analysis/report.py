"""One self-contained HTML page about runs: table, curves, learned functions, attention maps."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kart import checkpoint, data, train, tree
from kart.analysis import attention, cost, functions
from kart.models import Model
from kart.tables import spread
from kart.train import Config, Params, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Entry(NamedTuple):
    """What the report needs of one configuration.

    `records` has, for each member, its records by epoch; `params` the members' weights; `scores`
    the members' results on the split `split`; `step_ms` the median time of a member's step.
    """

    config: Config
    model: Model
    records: list[list[Record]]
    params: list[Params]
    scores: list[dict[str, float]]
    split: str
    step_ms: float | None = None

    @property
    def name(self) -> str:
        """The operator's spec."""
        return str(self.config.operator)


HEADER = ("operator", "top-1 %", "top-5 %", "loss", "parameters", "in operators", "ms a step", "n")
COLOURS = ("#5b6770", "#2f6f8f", "#b3533b", "#6a8f2f", "#7a5195", "#c28f2c")


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """The table of the report, under `HEADER`."""
    body = []
    for entry in entries:
        counted = cost.parameters(entry.model)
        body.append(
            [
                entry.name,
                spread([score["top1"] for score in entry.scores]),
                spread([score["top5"] for score in entry.scores]),
                spread([score["loss"] for score in entry.scores], 3, 1.0),
                f"{counted.total:,}",
                f"{counted.operator:,}",
                "" if entry.step_ms is None else f"{entry.step_ms:.1f}",
                str(len(entry.scores)),
            ]
        )
    return body


def curves(entries: Sequence[Entry]) -> "Figure":
    """Validation top-1 and training loss by epoch: mean of the members and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label, factor in (
        (panels[0], "val_top1", "validation top-1, %", 100.0),
        (panels[1], "train_loss", "training loss, nats", 1.0),
    ):
        for entry, colour in zip(entries, COLOURS * 9, strict=False):
            epochs = [record["epoch"] for record in entry.records[0]]
            values = torch.tensor([[r[key] for r in member] for member in entry.records]) * factor
            mean = values.mean(0)
            axes.plot(epochs, mean, color=colour, label=entry.name, linewidth=1.6)
            low, high = values.amin(0), values.amax(0)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _operator_params(entry: Entry, block: int) -> Params:
    params = entry.params[0]
    universal = entry.model.config.sharing == "universal"
    return params["operator"] if universal else params["blocks"][str(block)]["operator"]


def learned(entry: Entry) -> list[tuple[str, "Figure"]]:
    """Figures of the functions learned in the first and the last block (one where shared)."""
    depth = entry.model.config.depth
    universal = entry.model.config.sharing == "universal"
    figures = []
    for block in dict.fromkeys([0] if universal else [0, depth - 1]):
        op = entry.model.operators[block]
        if op.options.get("kind") != "low_rank":
            continue
        where = "all blocks" if universal else f"block {block + 1} of {depth}"
        title = f"{entry.name}, {where}"
        figures.append((title, functions.plot(op, _operator_params(entry, block), title=title)))
    return figures


def maps(entries: Sequence[Entry], dataset: data.Dataset, count: int = 8) -> "Figure":
    """The class token's attention in the last block, dominant head, over images of `dataset`."""
    chosen = torch.linspace(0, len(dataset.labels) - 1, count).long()
    pixels, labels = data.take(dataset, chosen)
    images = data.as_float(pixels)
    shown: dict[str, Any] = {}
    for entry in entries:
        config = entry.config
        with torch.no_grad():
            params = tree.to(entry.params[0], "cpu")
            aux = entry.model.intermediates(
                params, train.prepare(images, dataset, config.image_size)
            )
        weights = aux[f"blocks.{entry.model.config.depth - 1}.weights"]
        head = attention.dominant_head(weights)
        each = attention.class_maps(weights)
        shown[entry.name] = each[torch.arange(count), head]
    names = [dataset.classes[int(label)] for label in labels]
    return attention.plot(images, shown, names)


def _image(figure: "Figure", alt: str) -> str:
    buffer = io.BytesIO()
    # no date in the file: the same run gives the same page
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "kart"})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{encoded}">'


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px;
  box-sizing: border-box; margin: .3rem 0; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
.note { color: #777; font-size: .9rem; }
"""


def write(
    path: str | Path,
    entries: Sequence[Entry],
    dataset: data.Dataset,
    *,
    title: str,
    summary: str,
    command: str,
) -> None:
    """Writes the page about `entries` to `path`, whole or not at all. It loads nothing from outside.

    Args:
        path: the HTML file.
        entries: the configurations, at least one.
        dataset: the split whose images the attention maps are drawn over.
        title, summary: of the page; the summary says what was found.
        command: what makes the page again.
    """
    if not entries:
        raise ValueError("`write` needs at least one entry, got none. Pass the runs to report.")
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows(entries)
    )
    header = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    pictures = [
        _image(figure, f"Functions learned by {name}")
        for entry in entries
        for name, figure in learned(entry)
    ]
    config = {entry.name: entry.config.asdict() for entry in entries}
    details = json.dumps({"versions": checkpoint.versions(), "configs": config}, indent=1)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summary)}</p>
<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{cells}</tbody></table></div>
<p class="note">Mean ± standard deviation over n seeds on the {html.escape(entries[0].split)} split,
which took no part in training or choosing. The time of a step varies from run to run; nothing else
does on one machine.</p>
<h2>Training</h2>
{_image(curves(entries), "Validation accuracy and training loss by epoch")}
<p class="note">Mean of the seeds; the band is their range.</p>
<h2>Functions the heads learned</h2>
<p class="note">A key's weight as a function of its own score, sum over p of W[m, p] phi_pm(s), less
its mean; red: the median over keys, band: the middle 80 %, thin: single keys. Softmax has exp(s)
here, for every head and key. First seed.</p>
{"".join(pictures) or "<p>No learned functions: only fixed operators.</p>"}
<h2>Where the class token looks</h2>
{_image(maps(entries, dataset), "Attention maps of the class token over images")}
<p class="note">Last block, dominant head, negative weights dropped, each map scaled to its largest
value. First seed; images of the {html.escape(entries[0].split)} split.</p>
<h2>How this was made</h2>
<pre>{html.escape(command)}</pre>
<details><summary>Configurations and versions</summary><pre>{html.escape(details)}</pre></details>
</body></html>
"""
    checkpoint.write_text(path, page)
