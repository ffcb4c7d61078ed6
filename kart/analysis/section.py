"""What a section of the page of runs is, and what it may ask for.

A section is a function of a `Context` that returns a `pages.Section`: blocks of the page, and the
numbers in them. Its file names it, and `report.SECTIONS` lists it:

    def section(context: Context) -> pages.Section:
        found = {one: context.kept("rank", one, lambda: measured(one)) for one in context.members()}
        ...
        return pages.Section([pages.text(...), pages.figure(fig, "spectra", alt)], numbers)

    ANALYSIS = Analysis("spectra", "Spectra of the weights", section, minutes=2.0)

Where a member takes long, `Analysis.measure(context, member)` computes and keeps what `section`
needs of it, so that several processes can share the members.

What cannot be done with these runs raises ValueError, which the page shows in one line among the
other sections. What takes long keeps its parts (`context.kept`) and calls `context.check()` between
them: a section is whole or not shown, never thinner for a lack of time.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from kart import augment, checkpoint, data, pages, statistics, train, transfer, tree
from kart.models import Model, Site
from kart.train import Config, Params, Record, Splits


class Result(NamedTuple):
    """Seeds of one configuration, trained.

    `records[epoch][member]` are those of `population.fit`; `params` the weights of each member;
    `test` its scores on the test split, {"top1", "top5", "loss"}, where they were read, on
    `test_images` images; `step_ms` the time of a training step a member, where it was measured;
    `homes` the run directory of each member, where it has one; `snapshots(member)` reads the
    trajectory of a member, (step, weights) in order, where it kept one; `epochs` which of the
    records is that of the weights of each member, where it is not the last; `diverged` the seeds
    that are no members because they diverged, with the step; `lost`, the same in all results, the
    operators that are none because all their seeds did.
    """

    name: str
    configs: Sequence[Config]
    records: Sequence[Sequence[Record]]
    params: Sequence[Params]
    test: Sequence[Mapping[str, float]] | None = None
    step_ms: float | None = None
    test_images: int | None = None
    homes: Sequence[Path] | None = None
    snapshots: Callable[[int], list[tuple[int, Params]]] | None = None
    epochs: Sequence[int] | None = None
    diverged: Mapping[int, int] | None = None
    lost: Mapping[str, Mapping[int, int]] | None = None

    @property
    def own_records(self) -> list[Record]:
        """Of each member the record of the epoch that its weights are of."""
        if self.epochs is None:
            return list(self.records[-1])
        return [self.records[epoch][i] for i, epoch in enumerate(self.epochs)]

    @property
    def top1(self) -> list[float]:
        """Top-1 fraction of each member, on the test split if it was read, else validation."""
        if self.test is not None:
            return [scores["top1"] for scores in self.test]
        return [record["val_top1"] for record in self.own_records]


class Member(NamedTuple):
    """One seed of a result."""

    result: Result
    index: int

    @property
    def name(self) -> str:
        """The operator."""
        return self.result.name

    @property
    def config(self) -> Config:
        """Its config."""
        return self.result.configs[self.index]

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    @property
    def params(self) -> Params:
        """Its trained weights."""
        return self.result.params[self.index]

    @property
    def home(self) -> Path | None:
        """Its run directory, where it has one."""
        return None if self.result.homes is None else self.result.homes[self.index]

    def snapshots(self) -> list[tuple[int, Params]]:
        """Its trajectory, (step, weights) in order; see `trajectories`."""
        if self.result.snapshots is None:
            raise ValueError(
                f"`snapshots` needs a run with a trajectory, got {self.name} without one. Train it "
                "into a new directory with `kart train ... --trajectory 60`."
            )
        return self.result.snapshots(self.index)

    @property
    def key(self) -> str:
        """Twelve hex digits that name its config and weights."""
        digest = hashlib.sha256(json.dumps(self.config.asdict(), sort_keys=True).encode())
        for name, leaf in tree.named(self.params).items():
            digest.update(name.encode())
            digest.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


class Look(NamedTuple):
    """The first member of a result, looked into on a few validation images, unselected."""

    result: Result
    model: Model
    params: Params
    initial: Params | None  # the weights before training, where they are known
    pixels: Tensor  # in [0, 1], (B, C, height, width)
    aux: dict[str, Tensor]  # of `model.intermediates`

    @property
    def seed(self) -> int:
        """The seed of the member."""
        return self.result.configs[0].seed

    def seen(self, kind: str, block: int) -> Tensor:
        """The "scores", "weights" or "values" of `block`, as `samples` has them."""
        return samples(self.model.sites[block], self.aux[f"blocks.{block}.{kind}"])


def own_params(params: Params) -> Params:
    """The parameters of a model that are its own: all but a teacher's, which are held."""
    return {name: node for name, node in params.items() if name != transfer.TEACHER}


def samples(site: Site, tensor: Tensor) -> Tensor:
    """Scores or weights of the block at `site`, `(..., H, N, M)`, or values, as those of one batch
    `(B, H, N, M)`.

    Windows of an image are samples as images are, `B` of them together, since they share their
    operator and do not know their place. Those that a mask cuts, as a shifted grid's last, are left
    out: scores there are of tokens that do not see each other, and the weights of them are zero.
    """
    if site.cut is not None:
        if not site.cut.whole:
            raise ValueError(
                f"`samples` needs windows that no mask cuts, got a grid of {site.cut.side} in "
                f"windows of {site.cut.window}. Take smaller windows."
            )
        tensor = tensor.index_select(-4, torch.tensor(site.cut.whole, device=tensor.device))
    return tensor.reshape(-1, *tensor.shape[-3:])


def some_images(split: data.Dataset, count: int) -> tuple[Tensor, Tensor]:
    """`count` images of a split, as `Dataset.spread` has them, `(B, C, height, width)` in [0, 1],
    fewer where there are no more, and their labels `(B,)`.
    """
    pixels, labels = data.take(split, torch.from_numpy(split.spread(count)))
    return data.as_float(pixels), labels


# the fields of Context that a reader chooses
OPTIONS = ("shown", "examples", "points", "retrain", "limit_mib")


class OutOfTime(Exception):
    """A section has used up its minutes; what it has kept is there for the next call."""


@dataclass(frozen=True)
class Context:
    """Everything that a section may ask for.

    Args:
        results: seeds of each operator, the baseline (softmax where it is there) first.
        splits: the data all of them were trained on; the test split is not among them.
        shown: how many images to show where images are shown.
        cache: directory that `kept` writes to for members without a home; None writes nothing.
        say: called with a line of progress.
        name: of the section that runs, a part of what is kept and of its generators.
        version: of that section.
        deadline: `time.monotonic()` at which it should be done.
        examples: on how many validation images a loss is taken.
        points: a side of the surfaces of each operator's first seed; 10 n + 1.
        limit_mib: what a section may hold at a time.
        retrain: steps of training after a swap of learned functions, 0 for none.
    """

    results: Sequence[Result]
    splits: Splits
    shown: int = 4
    cache: Path | None = None
    say: Callable[[str], None] = lambda line: None
    name: str = ""
    version: int = 1
    deadline: float = float("inf")
    examples: int = 256
    points: int = 21
    limit_mib: int = 4096
    retrain: int = 50
    memory: dict[str, Any] = field(default_factory=dict)  # shared by the sections of a page

    def members(self) -> Iterator[Member]:
        """Every seed of every operator, operator by operator."""
        for result in self.results:
            yield from (Member(result, i) for i in range(len(result.configs)))

    def model(self, config: Config) -> Model:
        """The model of a config, for these data."""
        return train.build(config, self.splits.train)

    @property
    def models(self) -> list[Model]:
        """The model of each result."""
        return [self.model(result.configs[0]) for result in self.results]

    def images(
        self, config: Config, count: int, split: data.Dataset | None = None
    ) -> tuple[Tensor, Tensor]:
        """`count` images of a split (`some_images`), by default of validation, as the model
        evaluates them, and their labels: the same for all operators, fewer where there are no more.
        """
        split = self.splits.val if split is None else split
        pixels, labels = some_images(split, count)
        return train.prepare(pixels, split, config), labels

    def available(self, count: int, split: data.Dataset | None = None) -> int:
        """How many images of a split, by default of validation, `images` gives for `count`."""
        return min(count, len((self.splits.val if split is None else split).labels))

    def losses(self, model: Model, beside: Params | None = None) -> Callable[..., Tensor]:
        """The loss of each example, `(params, images, labels) -> (n,)`, in nats; `beside` has the
        parameters that those of `own_params` lack.
        """
        # rows of it, since `one_hot` reads values, which `vmap` refuses
        targets = torch.eye(len(self.splits.train.classes))

        def losses(params: Params, images: Tensor, labels: Tensor) -> Tensor:
            whole = {**(beside or {}), **params}
            return train.cross_entropy(model.apply(whole, images), targets[labels])

        return losses

    def holds(self, what: str, mib: float) -> None:
        """Raises ValueError where `what` takes more memory than a section may hold."""
        if mib > self.limit_mib:
            raise ValueError(
                f"`{self.name}` needs {mib:,.0f} MiB for {what}, got a limit of {self.limit_mib:,} "
                "MiB. Raise it with `--memory-mib`."
            )

    @property
    def first_seeds(self) -> str:
        """Of which seeds the first members are, in words: those of pictures."""
        seeds = {result.name: result.configs[0].seed for result in self.results}
        if len(set(seeds.values())) == 1:
            return f"seed {next(iter(seeds.values()))}"
        return "seed " + ", ".join(f"{seed} of {name}" for name, seed in seeds.items())

    @property
    def most_keys(self) -> float:
        """The largest number of keys of any block."""
        return float(max(site.tokens for model in self.models for site in model.sites))

    def few(self, model: Model) -> int:
        """On how many images weights and scores, N x N a head and window, stay small per block."""
        most = max(site.windows * site.heads * site.tokens**2 for site in model.sites)
        return max(4, min(64, 2**22 // most))

    def look(self, result: Result, count: int | None = None) -> Look:
        """The first member of `result` on `count` or `few` validation images, once a page."""
        config = result.configs[0]
        model = self.model(config)
        c = model.config
        count = self.few(model) if count is None else count
        key = f"look {result.name} {count}"
        if key in self.memory:
            return self.memory[key]
        pixels, _ = some_images(self.splits.val, count)
        pixels = augment.center_crop(pixels, c.image_size, config.eval_crop)
        with torch.no_grad():
            aux = model.intermediates(result.params[0], self.images(config, count)[0])
        # weights that came from elsewhere are kept by a trajectory alone
        initial = None
        if config.start is None:
            initial = model.init(torch.Generator().manual_seed(config.seed))
        elif config.trajectory and result.snapshots is not None:
            initial = result.snapshots(0)[0][1]
        self.memory[key] = Look(result, model, result.params[0], initial, pixels, aux)
        return self.memory[key]

    @property
    def data_key(self) -> str:
        """Eight hex digits that name the data."""
        if "data" not in self.memory:
            self.memory["data"] = fingerprint(self.splits)
        return self.memory["data"]

    def generator(self, *keys: int | str) -> Generator:
        """A generator of the section and `keys` alone: the same for operators to be compared."""
        return data.generator_for("analysis", self.name, *keys)

    def left(self) -> float:
        """Seconds that the section has left."""
        return self.deadline - time.monotonic()

    def check(self) -> None:
        """Raises OutOfTime where none are left."""
        if self.left() <= 0:
            raise OutOfTime

    def kept(
        self, what: str, member: Member, compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of `compute()`, read again where they were kept by an earlier call with the
        same weights, section and version, else computed and kept beside the run.

        Call it member by member (or finer), so that a kill or the end of the time loses one of
        them. All that the tensors depend on besides the member belongs into `what`.
        """
        folder = self.cache if member.home is None else member.home / "analysis"
        if self.cache is None or folder is None:
            return dict(compute())
        safe = "".join(c if c.isalnum() or c in ".=" else "-" for c in what)
        known = f"{self.data_key}-{member.key}-v{self.version}"
        path = folder / f"{self.name}-{safe}-{known}.safetensors"
        if path.exists():
            return checkpoint.load(path)[0]
        self.check()
        found = dict(compute())
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, found, {"section": self.name, "what": what, "seed": member.seed})
        return found


class Analysis(NamedTuple):
    """A section as `report.SECTIONS` lists it.

    Args:
        name: for `--sections`, files and the JSON.
        title: its heading on the page, "" for none.
        section: makes it; see this module.
        version: raised when what it computes changes, so that nothing old is read again.
        minutes: how long it may take; 0 is a quick one, which always runs to its end.
        measure: computes and keeps what the section needs of one member, and returns it; several
            processes may call it before the section does.
        needs: given the context, says in one line what is missing, or None; the page shows the
            line in place of the section.
        uses: which of OPTIONS it depends on.
    """

    name: str
    title: str
    section: Callable[[Context], pages.Section]
    version: int = 1
    minutes: float = 0.0
    needs: Callable[[Context], str | None] | None = None
    measure: Callable[[Context, Member], Mapping[str, Tensor]] | None = None
    uses: Sequence[str] = ()


def trajectories(context: Context) -> str | None:
    """For `Analysis.needs`: what is missing where a run keeps less than three snapshots."""
    for result in context.results:
        count = result.configs[0].trajectory if result.snapshots is not None else 0
        if count < 3:
            return (
                f"it needs three snapshots of the weights or more, got {count} of {result.name}. "
                "Train with `kart train ... --trajectory 60`."
            )
    return None


def fingerprint(splits: Splits) -> str:
    """Eight hex digits that name the data: labels, classes, statistics, 16 MB of images a split."""
    digest = hashlib.sha256()
    for one in splits:
        described = [one.name, one.classes, one.mean, one.std, one.images.shape]
        digest.update(json.dumps(described).encode())
        digest.update(one.labels.tobytes())
        few = one.images[: max(1, 2**24 // max(1, one.images[:1].nbytes))]
        digest.update(np.asarray(few).tobytes())  # those that stream are decoded
        index = one.spread(64)
        if index[-1] >= len(index):  # others than the first are looked at
            digest.update(index.tobytes())
    return digest.hexdigest()[:8]


def over_seeds(
    operator: str,
    measure: str,
    values: Mapping[int, float],
    unit: str = "",
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[statistics.Interval, list[pages.Number]]:
    """The interval of `values` in [low, high] by seed, and the numbers that a page reports of
    them: each seed's, and the mean with its interval.
    """
    found = statistics.interval(list(values.values()), low=low, high=high)
    numbers = [pages.Number(operator, measure, v, unit, seed) for seed, v in values.items()]
    return found, [*numbers, mean_number(operator, measure, found, unit)]


Measured = Mapping[str, Mapping[int, Mapping[str, float]]]  # by operator, seed and measure


class Column(NamedTuple):
    """A measure in a table of operators: `digits` of `scale` times its values, in [low, high]."""

    measure: str
    header: str
    digits: int = 2
    unit: str = ""
    scale: float = 1.0
    low: float = -math.inf
    high: float = math.inf


def percent(measure: str, header: str) -> Column:
    """A column of a share in [0, 1], shown in per cent."""
    return Column(measure, header, 1, "", 100.0, 0.0, 1.0)


def scalars(
    context: Context, measure: Callable[[Context, Member], Mapping[str, Tensor]]
) -> dict[str, dict[int, dict[str, float]]]:
    """What `measure` finds of every member, those of its tensors that are single numbers."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for member in context.members():
        own = measure(context, member)
        numbers = {name: float(x) for name, x in own.items() if x.dim() == 0}
        found.setdefault(member.name, {})[member.seed] = numbers
    return found


def seeds_table(
    found: Measured, columns: Sequence[Column], caption: str
) -> tuple[pages.Markup, list[pages.Number]]:
    """A table of operators by measures, each mean over its interval over seeds, and the numbers in
    it. A measure that an operator does not have is a dash; seeds without a finite value are
    counted.
    """
    rows, numbers = [], []
    for operator, seeds in found.items():
        cells: list[Any] = [operator]
        for measure, _, digits, unit, scale, least, most in columns:
            known = {seed: own[measure] for seed, own in seeds.items() if measure in own}
            finite = {seed: x for seed, x in known.items() if math.isfinite(x)}
            odd = len(known) - len(finite)
            if not known:
                cells.append("\N{EN DASH}")
                continue
            if not finite:
                cells.append("infinite" if math.inf in known.values() else "undefined")
                continue
            mean, own = over_seeds(operator, measure, finite, unit, least, most)
            numbers += own
            # + 0.0: no minus before a zero
            shown, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in mean[:3])
            spread = mean.why or f"[{low}, {high}]"
            spread += f"; {odd} of {len(known)} not finite" if odd else ""
            cells.append(pages.Markup(f"{shown}<br>{pages.tag('small', spread)}"))
        rows.append(cells)
    header = ["operator", *(column.header for column in columns)]
    return pages.table(header, rows, caption), numbers


def differences(found: Measured, measure: str, what: str, column: Column) -> list[str]:
    """A sentence an operator: how its `what` differs from that of the first, seed by seed, and
    which seeds it leaves out, as only one of the two has them or a finite value there. The interval
    is cut to what two values in [low, high] can be apart.
    """
    most = column.high - column.low
    names = list(found)
    base = {seed: own[measure] for seed, own in found[names[0]].items() if measure in own}
    lines = []
    for name in names[1:]:
        own = {seed: one[measure] for seed, one in found[name].items() if measure in one}
        if not own or not base:
            continue
        apart = {
            seed: own[seed] - base[seed]
            for seed in sorted(own.keys() & base.keys())
            if math.isfinite(own[seed] - base[seed])
        }
        alone = ", ".join(map(str, sorted((own.keys() | base.keys()) - apart.keys())))
        if not apart:
            lines.append(f"{what} of {name} and of {names[0]}: no seed has finite values of both.")
            continue
        mean = statistics.interval(list(apart.values()), low=-most, high=most)
        clear = not mean.why and not mean.low <= 0 <= mean.high
        nearest, digits = column.scale * min(abs(mean.low), abs(mean.high)), column.digits
        while clear and round(nearest, digits) == 0:  # or it would read as zero
            digits += 1
        text = mean.text(column.scale, digits, "+")
        verdict = "more than seeds explain" if clear else "not clear of the noise of seeds"
        line = f"{what} of {name} less that of {names[0]}: {text}, {verdict}."
        lines.append(
            line + f" Left out, as one of the two has no such value: seed {alone}." * bool(alone)
        )
    return lines


def mean_number(
    operator: str, measure: str, found: statistics.Interval, unit: str = ""
) -> pages.Number:
    """The mean of an interval as a number of a page; without bounds where there are none."""
    low, high = (None, None) if found.why else (found.low, found.high)
    return pages.Number(operator, measure, found.mean, unit, None, low, high, found.n)


def windowed(context: Context, what: str) -> list[pages.Markup]:
    """A line for pages of models with windows: what their samples are, and `what` besides."""
    sites = [site for model in context.models for site in model.sites]
    cuts = [site.cut for site in sites if site.cut is not None]
    if not cuts:
        return []
    line = "Attention is in windows here: each window of an image is a sample."
    if any(len(cut.whole) < cut.count for cut in cuts):
        line += " Windows that the mask of a shift cuts are left out."
    return [pages.note(f"{line} {what}".strip())]


def some_blocks(depth: int) -> list[int]:
    """The first, the middle and the last block, or all of three."""
    return list(range(depth)) if depth <= 3 else [0, depth // 2, depth - 1]
