"""Training as pure functions: a config, a step, a loop that yields records, exact resume.

    for record in train.fit(train.Config(operator="G3B"), train.load_data(config)):
        print(record["epoch"], record["val_top1"])

A step is a pure function of (state, hyperparameters, batch); the batch of step t is a pure function
of (seed, t). So a run is determined by its config, and resuming needs the state alone.
"""

import dataclasses
import fnmatch
import functools
import json
import math
import time
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from kart import augment, code, data, gpu, kernels, models, optim, schema, transfer, tree
from kart.data import Dataset
from kart.models import Model

Params = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Everything that determines a run. Fields of the model that are None take the model's default.

    `recipe` is the name that `kart.recipes.config` notes, and sets nothing by itself.
    `learning_rate` None is the paper's rule, 5e-4 * batch / 512. `threads` None takes torch's
    number; a run records it, since on a CPU the number of threads changes the last bits. The
    warm-up is half of the run at most, whatever `warmup_epochs`.
    """

    recipe: str | None = None  # the name of the one in kart.recipes that it was made of
    # data
    data: str = "digits"
    train_limit: int | None = None
    decode_size: int | None = None  # side to which images are cut when read, where they differ
    stream: bool | None = None  # decode images when drawn, not into the cache; None: by their size
    augment: str = "none"
    eval_crop: float = 1.0  # at evaluation: the side of the centre that is seen, over the image's
    # model
    model: str = "vit_nano"
    operator: str | tuple[str, ...] = "softmax"
    sharing: str | None = None
    rank: int | None = None
    project: str | None = None
    base: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    start: str | None = None  # a run, or a file of weights, to begin with: see kart.runs.donors
    attention_from: str | None = None  # as `start`, a teacher: see kart.transfer.with_attention
    freeze: tuple[str, ...] = ()  # patterns of the paths of parameters that are not trained
    # optimisation
    epochs: int = 40
    batch_size: int = 32
    learning_rate: float | None = 1e-3
    start_learning_rate: float = 1e-6  # where the warm-up begins
    end_learning_rate: float = 1e-5
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    adam_eps: float = 1e-8
    max_norm: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    ema_warmup: bool = True  # average less at first: see kart.optim.ema
    seed: int = 0
    trajectory: int = 0  # snapshots of the weights that a run keeps, from the first to the last
    # execution
    batching: str = "native"  # or "vmap": a per-example loss mapped by torch.func.vmap
    step: str = "eager"  # or "compiled", by torch.compile as a whole, or "graph", a CUDA graph
    accumulate: int = 1  # parts of a batch that go through the model one after another
    recompute: bool = False  # the model's blocks again in the backward: less memory, more time
    precision: str = "float32"  # or "bfloat16", with float32 parameters, scores and loss
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(
                    f"`Config` needs `{name}` {what}, got {getattr(self, name)!r}. Change it."
                )

        for name, kind in typing.get_type_hints(Config).items():
            need(schema.fits(getattr(self, name), kind), name, f"of type {schema.name(kind)}")
        # "softmax|...|G3B" is one spec a block
        blocks = models.each_block(self.operator, self.model, depth=self.depth)
        object.__setattr__(self, "operator", blocks)
        for name in ("epochs", "batch_size", "accumulate"):
            need(getattr(self, name) >= 1, name, "an integer >= 1")
        for name in ("start_learning_rate", "end_learning_rate", "warmup_epochs", "weight_decay"):
            need(0 <= getattr(self, name) < math.inf, name, ">= 0 and finite")
        for name in ("adam_eps", "max_norm"):
            need(0 < getattr(self, name) < math.inf, name, "> 0 and finite")
        rate = self.learning_rate
        need(rate is None or 0 <= rate < math.inf, "learning_rate", ">= 0, or None")
        peak = self.peak_learning_rate
        for name in ("start_learning_rate", "end_learning_rate"):
            used = name != "start_learning_rate" or self.warmup_epochs > 0
            need(getattr(self, name) <= peak or not used, name, f"at most the peak, {peak:g}")
        need(self.warmup_epochs <= self.epochs, "warmup_epochs", f"<= epochs, {self.epochs}")
        need(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        need(0 <= self.ema < 1, "ema", "in [0, 1)")
        # the whole image is scaled to 1 / eval_crop of the model's side
        need(0.1 <= self.eval_crop <= 1, "eval_crop", "in [0.1, 1]")
        smoothed = augment.smoothing(self.augment)
        need(
            not (smoothed and self.label_smoothing),
            "label_smoothing",
            f"0 with augment={self.augment!r}, which smooths by {smoothed} itself",
        )
        need(self.batching in ("native", "vmap"), "batching", '"native" or "vmap"')
        need(self.step in ("eager", "compiled", "graph"), "step", '"eager", "compiled" or "graph"')
        # a compiled step plans its memory by itself
        need(not self.recompute or self.step != "compiled", "step", '"eager" with `recompute`')
        need(self.precision in ("float32", "bfloat16"), "precision", '"float32" or "bfloat16"')
        need(_is_device(self.device), "device", 'one that torch knows, such as "cpu" or "cuda:0"')
        need(self.threads is None or self.threads >= 1, "threads", ">= 1, or None")
        need(self.seed >= 0, "seed", "an integer >= 0")
        need(self.trajectory == 0 or self.trajectory >= 3, "trajectory", "0, or 3 and more")
        parts = self.accumulate
        need(self.batch_size % parts == 0, "accumulate", f"to divide the batch, {self.batch_size}")
        alone = self.attention_from is None or self.start is None
        need(alone, "attention_from", "None with `start`: a student begins anew")
        need(isinstance(self.freeze, tuple) and all(self.freeze), "freeze", "a tuple of patterns")

    def asdict(self) -> dict[str, Any]:
        """The config as JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def fromdict(cls, fields: Mapping[str, Any]) -> "Config":
        """The config of `asdict`; unknown fields are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) - known:
            raise ValueError(
                f"`Config` needs fields among {sorted(known)}, got {sorted(set(fields) - known)}. "
                "The run was written by another version of kart."
            )
        values: dict[str, Any] = dict(fields)
        if "operator" in values:  # JSON has no tuples; what was read runs no code
            values["operator"] = code.stored(values["operator"])
        if isinstance(values.get("freeze"), list):
            values["freeze"] = tuple(values["freeze"])
        return cls(**values)

    @property
    def hash(self) -> str:
        """Twelve hex digits that name the config, the same on every machine."""
        return schema.digest(self.asdict())[:12]

    @property
    def held(self) -> tuple[str, ...]:
        """Patterns of the parameters that are not trained: those of `freeze`, and a teacher."""
        return (*self.freeze, *((transfer.TEACHER,) if self.attention_from else ()))

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        if self.learning_rate is None:
            return optim.paper_learning_rate(self.batch_size)
        return self.learning_rate


class Splits(NamedTuple):
    """What training may see: the training and the validation split."""

    train: Dataset
    val: Dataset

    def check(self) -> None:
        """Raises ValueError unless both are data sets (see `Dataset.check`) of the same classes,
        channels and statistics: a model that is trained on one can be scored on the other.
        """
        for dataset in self:
            dataset.check()
        for name in ("classes", "channels", "mean", "std"):
            first, other = (getattr(dataset, name) for dataset in self)
            if not np.array_equal(first, other):
                raise ValueError(
                    f"`Splits` needs training and validation images of the same `{name}`, got "
                    f"{first!r:.200} and {other!r:.200}. Take those of the training images."
                )
        if not len(self.val.labels):
            raise ValueError(
                f"`Splits` needs one validation image or more, got none in {self.val.name!r}. Hold "
                "some out of the training images."
            )


def _is_device(name: str) -> bool:
    try:
        return bool(torch.device(name).type)
    except RuntimeError:
        return False


def load_data(config: Config, **options: Any) -> Splits:
    """Training and validation split of `config.data`; `options` go to `kart.data.load`."""
    options = {"image_size": config.decode_size, "stream": config.stream, **options}
    return Splits(
        data.load(config.data, "train", train_limit=config.train_limit, **options),
        data.load(config.data, "val", **options),
    )


def default_patch_size(image_size: int, model: str = "vit_nano") -> int:
    """The largest side that divides the image's and is at most 16, the paper's, from 128 px on (4
    where the model halves its grid, as Swin's); leaves a grid of 8 x 8 or more from 32 px on, of
    4 x 4 or more below.

    >>> [default_patch_size(size) for size in (8, 28, 32, 64, 224)]
    [2, 7, 4, 8, 16]
    >>> default_patch_size(224, "swin_tiny")
    4
    """
    most = 16 if image_size >= 128 else image_size // (8 if image_size >= 32 else 4)
    if "depths" in models.MODELS.get(model, {}):
        most = min(most, 4)
    return max(side for side in range(1, max(1, most) + 1) if image_size % side == 0)


OPERATOR_FIELDS = ("sharing", "rank", "project", "base")
MODEL_FIELDS = (*OPERATOR_FIELDS, *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"))


def check_sizes(model: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError for fields of Config that models called `model` do not have, or have one of
    a stage, and for a `depth` that leaves no block behind a ConViT's gated ones.
    """
    for family in models.FAMILIES.values():
        if model not in family.sizes:
            continue
        hints = typing.get_type_hints(family.config)
        for name, value in given.items():
            if name not in hints or not schema.fits(value, hints[name]):
                raise ValueError(
                    f"`build` needs fields of which {model!r} has one, got {name!r}, {value!r}. "
                    "Leave it out, or choose another model."
                )
        usual = getattr(family.config, "gated_blocks", 0)
        gated = family.sizes[model].get("gated_blocks", usual)
        if given.get("depth", gated + 1) <= gated:
            raise ValueError(
                f"`build` needs `depth` > {gated} for {model!r}, whose first {gated} blocks are "
                f"gated and whose class token enters behind them, got {given['depth']}. Change it."
            )


def build(config: Config, dataset: Dataset) -> Model:
    """The model of `config` for the images and classes of `dataset`.

    With `attention_from` a student; `operator` and the other fields of the model are those of both.
    """
    dataset.check()
    given = {name: getattr(config, name) for name in MODEL_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if config.recompute:
        given["recompute"] = True
    check_sizes(config.model, given)
    height, width = dataset.images.shape[-2:]
    if height != width:
        raise ValueError(
            f"`build` needs square images, got {dataset.name!r} of {width} x {height} (width, "
            f"height). Cut them when they are read: `decode_size` (kart train: `--decode-size "
            f"{min(height, width)}`)."
        )
    image_size = config.image_size or width
    if "patch_size" not in given:
        side = given["patch_size"] = default_patch_size(image_size, config.model)
        if side < 4 and image_size // side > 64:
            raise ValueError(
                f"`build` needs `patch_size` for images of {image_size} pixels a side: the largest "
                f"side to 16 that divides it is {side}, of which there are "
                f"{(image_size // side) ** 2:,}. Pass `patch_size`, or another `image_size`, say "
                f"{image_size // 16 * 16} (kart train: --patch-size, --image-size)."
            )
    shape = {
        "image_size": image_size,
        "in_channels": dataset.images.shape[1],
        "num_classes": len(dataset.classes),
    }
    if config.model in models.MODELS and not models.classifies(config.model):
        raise ValueError(
            f"`build` needs a model that classifies, got {config.model!r}, a backbone of "
            f"detectors. Choose one of {', '.join(filter(models.classifies, models.MODELS))}."
        )
    model = models.create(config.model, operator=config.operator, **shape, **given)
    if config.attention_from is None:
        return model
    sizes = {name: value for name, value in given.items() if name not in OPERATOR_FIELDS}
    student = models.create(config.model, operator=transfer.given(), **shape, **sizes)
    return transfer.with_attention(student, model)


class Hyper(NamedTuple):
    """Hyperparameters that fix no shape, as tensors: each member of a population has its own."""

    learning_rate: Tensor
    weight_decay: Tensor


class State(NamedTuple):
    """All that a run carries from step to step; tensors only, so it can be saved, stacked, vmapped.

    `bad_step` is the first step whose loss or gradient was not finite, else -1; from there on the
    state stands still. `loss_sum` adds up the losses of the epoch.
    """

    params: Params
    optimizer: Any
    average: Any
    step: Tensor
    bad_step: Tensor
    loss_sum: Tensor


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: Tensor
    grad_norm: Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, logits and soft targets `(..., C)` to `(...)`, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -(targets * logits.log_softmax(-1)).sum(-1)


def batch_loss(model: Model, batching: str) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """Mean loss over a batch: "native" batches in the model, "vmap" maps a per-example loss."""

    def losses(params: Params, images: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model.apply(params, images), targets)

    def mean(params: Params, images: Tensor, targets: Tensor) -> Tensor:
        each = losses if batching == "native" else vmap(losses, in_dims=(None, 0, 0))
        return each(params, images, targets).mean()

    return mean


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """The steps of the warm-up: a run shorter than two of them warms up for half of itself."""
    return min(int(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch // 2)


def _schedule(config: Config, steps_per_epoch: int, peak: Tensor) -> optim.Schedule:
    rising, total = warmup_steps(config, steps_per_epoch), config.epochs * steps_per_epoch
    return optim.warmup_cosine(
        peak, rising, total, config.start_learning_rate, config.end_learning_rate
    )


Step = Callable[[State, Hyper, Tensor, Tensor], tuple[State, Metrics]]


class Program(NamedTuple):
    """`init(generator) -> state` and `step(state, hyper, images, targets) -> (state, metrics)`.

    `advance` is `step` written into the tensors of the state it is given, which is used up (as by
    buffer donation in JAX): the same result in less memory. It works under no transform.
    """

    init: Callable[[torch.Generator], State]
    step: Step
    advance: Step
    gradients: Callable[[State, Tensor, Tensor], tuple[Params, Tensor]]


def value_and_gradients(loss: Callable[..., Tensor]) -> Callable[..., tuple[Params, Tensor]]:
    """`(gradients, value)` of `loss` in its first argument, as `torch.func.grad_and_value`.

    That one keeps the graph of its own backward, in case it is differentiated again, which more
    than doubles the memory of a step (`kart bench` measures it). It is used where
    it is needed: under a transform, in a graph of torch.compile, for parameters that require
    gradients. Elsewhere autograd does the same without.
    """
    under_transform = grad_and_value(loss)

    def run(params: Params, *rest: Any) -> tuple[Params, Tensor]:
        flat = tree.leaves(params)
        plain = not torch.compiler.is_compiling() and not kernels.transforming()
        if not plain or any(leaf.requires_grad for leaf in flat):
            return under_transform(params, *rest)
        with torch.enable_grad():
            leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
            value = loss(leaves, *rest)
            # an unused parameter has a gradient of zeros, as under torch.func
            found = torch.autograd.grad(
                value, tree.leaves(leaves), allow_unused=True, materialize_grads=True
            )
        return tree.with_leaves(params, found), value.detach()

    return run


def frozen(config: Config, params: Params) -> set[str]:
    """The dotted paths of `params` that `config.held` names; a `*` stands for any characters.

    Raises ValueError for a pattern that names none, and for patterns that leave none to train.
    """
    names = list(tree.named(params))
    held: set[str] = set()
    for pattern in config.held:
        found = fnmatch.filter(names, pattern) + fnmatch.filter(names, f"{pattern}.*")
        if not found:
            some = sorted({name.rpartition(".")[0] or name for name in names})[:4]
            raise ValueError(
                f"`freeze` needs patterns of parameters, got {pattern!r}, which matches none of "
                f"{', '.join(some)}, ... Name one, or some with *."
            )
        held.update(found)
    if len(held) == len(names):
        raise ValueError(
            f"`freeze` needs parameters left to train, got {', '.join(config.freeze)}, which "
            "matches all of them. Leave one out."
        )
    return held


Differentiate = Callable[[Params, Tensor, Tensor], tuple[Params, Tensor]]


def trained_alone(held: Collection[str], loss: Callable[..., Tensor]) -> Differentiate:
    """`(gradients, value)` of `loss` where parameters are `held`: gradients of zeros there."""

    def of_free(free: Params, params: Params, images: Tensor, targets: Tensor) -> Tensor:
        merged = tree.map_named(lambda name, leaf: free.get(name, leaf), params)
        return loss(merged, images, targets)

    differentiate = value_and_gradients(of_free)

    def run(params: Params, images: Tensor, targets: Tensor) -> tuple[Params, Tensor]:
        free = {name: leaf for name, leaf in tree.named(params).items() if name not in held}
        grads, value = differentiate(free, params, images, targets)
        zeros = torch.zeros_like
        return tree.map_named(lambda n, x: grads[n] if n in grads else zeros(x), params), value

    return run


def accumulated(parts: int, differentiate: Differentiate) -> Differentiate:
    """`(gradients, value)` of a batch from `parts` equal parts of it, one after another.

    The means over the batch, up to rounding, for any loss that is a mean over examples; one part's
    activations at a time.
    """
    if parts == 1:
        return differentiate

    def run(params: Params, images: Tensor, targets: Tensor) -> tuple[Params, Tensor]:
        pieces = zip(images.chunk(parts), targets.chunk(parts), strict=True)
        total = differentiate(params, *next(pieces))
        for piece in pieces:
            total = tree.map(torch.add, total, differentiate(params, *piece))
        return tree.map(lambda x: x / parts, total)

    return run


class Ranks(NamedTuple):
    """The processes that train one run together, of which this is one: see `kart.distributed`.

    `total(tree)` is the sum of their trees, `share(tree)` the tree of rank 0.
    """

    rank: int = 0
    size: int = 1
    total: Callable[[Any], Any] = lambda tree: tree
    share: Callable[[Any], Any] = lambda tree: tree


ALONE = Ranks()


def program(config: Config, model: Model, steps_per_epoch: int, ranks: Ranks = ALONE) -> Program:
    """The pure functions that train `model` by `config`; both work under `vmap`, by one rank."""
    loss = batch_loss(model, config.batching)
    schedule = functools.partial(_schedule, config, steps_per_epoch)
    average = optim.ema(config.ema, warmup=config.ema_warmup)
    dtype = getattr(torch, config.precision)
    # before a step: torch.compile cannot follow how patterns are matched
    held = frozen(config, model.init(torch.Generator())) if config.held else set[str]()
    one = trained_alone(held, loss) if held else value_and_gradients(loss)
    differentiated = accumulated(config.accumulate, one)
    clip = optim.clip_by_global_norm(config.max_norm)

    decays = optim.decay_mask()

    def mask(name: str, leaf: Tensor) -> bool:
        # of a frozen parameter the gradient is zero and so is its step, without decay
        return name not in held and decays(name, leaf)

    def adamw(hyper: Hyper) -> optim.Transformation:
        rate = schedule(hyper.learning_rate)
        return optim.adamw(rate, hyper.weight_decay, eps=config.adam_eps, mask=mask)

    def init(generator: torch.Generator) -> State:
        params = tree.to(model.init(generator), config.device)
        zero = torch.zeros((), dtype=torch.int64, device=config.device)
        hyper = Hyper(torch.tensor(config.peak_learning_rate), torch.tensor(config.weight_decay))
        return State(
            params,
            optim.chain(clip, adamw(hyper)).init(params),
            average.init(params) if config.ema else {},
            zero,
            zero - 1,
            torch.zeros((), device=config.device),
        )

    def smooth(targets: Tensor) -> Tensor:
        eps = config.label_smoothing
        return targets * (1 - eps) + eps / targets.shape[-1] if eps else targets

    def gradients(state: State, images: Tensor, targets: Tensor) -> tuple[Params, Tensor]:
        found = differentiated(state.params, images.to(dtype), smooth(targets))
        if ranks.size == 1:
            return found
        return tree.map(lambda x: x / ranks.size, ranks.total(found))

    def counted(state: State, value: Tensor, norm: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The counters of a state after a step, and whether the step is finite and none before it
        was not: else it changes nothing, so that the state stays the last good one without asking
        the device after every step.
        """
        fine = value.isfinite() & norm.isfinite() & (state.bad_step < 0)
        bad_step = torch.where(fine | (state.bad_step >= 0), state.bad_step, state.step)
        loss_sum = state.loss_sum + value.detach()
        return {"step": state.step + 1, "bad_step": bad_step, "loss_sum": loss_sum}, fine

    def step(state: State, hyper: Hyper, images: Tensor, targets: Tensor) -> tuple[State, Metrics]:
        grads, value = gradients(state, images, targets)
        optimizer = optim.chain(clip, adamw(hyper))
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        norm = opt_state[0].norm
        params = optim.apply_updates(state.params, updates)
        mean = average.update(state.average, params) if config.ema else state.average
        counters, fine = counted(state, value, norm)

        keep = functools.partial(torch.where, fine)
        # made anew: what `_replace` gives lacks fields in a compiled step of torch 2.11
        following = State(
            tree.map(keep, params, state.params),
            tree.map(keep, opt_state, state.optimizer),
            tree.map(keep, mean, state.average),
            **counters,
        )
        return following, Metrics(value, norm)

    def advance(
        state: State, hyper: Hyper, images: Tensor, targets: Tensor
    ) -> tuple[State, Metrics]:
        grads, value = gradients(state, images, targets)
        grads, clip_state = optim.clip_in_place(config.max_norm, grads)
        norm = clip_state.norm
        counters, fine = counted(state, value, norm)
        moments = state.optimizer[1]
        after = optim.apply_in_place(adamw(hyper), grads, moments, state.params, fine, mask)
        del grads
        clip_state = tree.map(lambda a, b: torch.where(fine, a, b), clip_state, state.optimizer[0])
        mean = state.average
        if config.ema:
            mean = optim.average_in_place(average, mean, state.params, fine)
        following = state._replace(optimizer=(clip_state, after), average=mean, **counters)
        return following, Metrics(value, norm)

    return Program(init, step, advance, gradients)


def whole(config: Config, step: Step, *, donate: bool = False) -> Step:
    """`step`, or its compiled or recorded form if the config asks for it: no part of it may stay
    outside. For `donate` see `kart.gpu.replayed`.

    Raises ValueError where the device has no such form. A config may name it: where it was made,
    or where others score its run, need not be where it trains.
    """
    if config.step == "graph":
        if torch.device(config.device).type != "cuda":
            raise ValueError(
                f"`train` needs `step` not \"graph\" on device {config.device!r}, got 'graph'. "
                'Leave it out, or train on a GPU, with device="cuda".'
            )
        return gpu.replayed(step, donate=donate)
    return torch.compile(step, fullgraph=True) if config.step == "compiled" else step


def donated(config: Config, functions: Program) -> Step:
    """A step that may write over the state that it is given, in the form the config asks for."""
    step = functions.step if config.step == "compiled" else functions.advance
    return whole(config, step, donate=True)


def batches(config: Config, dataset: Dataset, ranks: Ranks = ALONE) -> data.Reader:
    """`at(seed, step)` gives images `(B, C, height, width)`, normalised, and targets `(B,
    classes)`; with several ranks, the part of them that is this one's.

    Each rank augments the whole batch, as mixup needs it, and then takes its part: together they
    see what one process sees, to the bit.
    """
    dataset.check()
    count = len(dataset.labels)
    if count < config.batch_size:
        raise ValueError(
            f"`batch_size` needs to be at most the {count} training images, got "
            f"{config.batch_size}. Lower it."
        )
    share, rest = divmod(config.batch_size, ranks.size)
    if rest or share % config.accumulate:
        raise ValueError(
            f"`batch_size` needs to be a multiple of the processes times `accumulate`, "
            f"{ranks.size} x {config.accumulate}, got {config.batch_size}. Change one of them."
        )
    own = slice(ranks.rank * share, (ranks.rank + 1) * share)
    classes, size = len(dataset.classes), config.image_size or dataset.images.shape[-1]
    # images that stream are cut from the resolution of their files, before they are a batch
    streams = isinstance(dataset.images, data.Pictures)
    after_cut = augment.after_crop(config.augment) if streams else None
    pipeline = after_cut or augment.pipeline(config.augment)
    cut = data.Cut(augment.random_box, size) if after_cut else None
    steps_per_epoch, read = data.reader(dataset, config.batch_size, cut)

    def at(seed: int, step: int) -> tuple[Tensor, Tensor]:
        pixels, labels = read(seed, step)
        pixels, labels = tree.onto((pixels, labels), config.device)
        images, generator = data.as_float(pixels), data.generator_for("augment", seed, step)
        images, targets = pipeline(generator, images, labels, classes, size)
        return data.normalise(images[own], dataset.mean, dataset.std), targets[own]

    return data.Reader(steps_per_epoch, at)


def prepare(images: Tensor, dataset: Dataset, config: Config) -> Tensor:
    """Images in [0, 1] as a model of `config` is given them outside of training: scaled, the
    centre cut if asked, standardised by channel.
    """
    size = config.image_size or images.shape[-1]
    images = augment.center_crop(images, size, config.eval_crop)
    return data.normalise(images, dataset.mean, dataset.std)


def evaluate(
    apply: Callable[[Params, Tensor], Tensor],
    params: Params,
    dataset: Dataset,
    config: Config,
    batch_size: int = 256,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Top-1, top-5 (fractions) and mean loss (nats) of `apply(params, images)` over a split.

    Logits may lead with a population axis, `(K, B, C)`; the results then are `(K,)`. Top-5 counts
    the best five classes, or all where there are fewer. Ranks take the batches in turn.
    """
    totals: dict[str, Tensor] = {}
    dataset.check()
    count = len(dataset.labels)
    if not count:
        raise ValueError(
            f"`evaluate` needs one image or more, got none in {dataset.name!r}. Add images."
        )
    schema.check_integer("evaluate", "batch_size", batch_size, 1)
    dtype = getattr(torch, config.precision)
    with torch.no_grad():
        starts = list(range(0, count, batch_size))
        mine = starts[ranks.rank :: ranks.size]
        # a rank that no batch is left for has zeros of the same shapes to add
        for start in mine or starts[:1]:
            chosen = torch.arange(start, min(start + batch_size, count))
            pixels, labels = data.take(dataset, chosen)
            pixels, labels = tree.onto((pixels, labels), config.device)
            images = prepare(data.as_float(pixels), dataset, config)
            logits = apply(params, images.to(dtype)).float()
            if logits.shape[-1] != len(dataset.classes):
                raise ValueError(
                    f"`evaluate` needs logits of the {len(dataset.classes)} classes of "
                    f"{dataset.name!r}, got {logits.shape[-1]}. Take the model of these data."
                )
            hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
            losses = cross_entropy(logits, F.one_hot(labels, logits.shape[-1]))
            sums = {
                "top1": hits[..., 0].double().sum(-1),
                "top5": hits.any(-1).double().sum(-1),
                "loss": losses.double().sum(-1),
            }
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value * bool(mine)
        totals = ranks.total(totals)
    return {name: value / count for name, value in totals.items()}


class Diverged(RuntimeError):
    """A loss or gradient that is not finite; `step` and `parameter` say where it was first seen."""

    def __init__(self, step: int, parameter: str, detail: str):
        super().__init__(
            f"training stopped at step {step}: {detail}, first in `{parameter}`. The state before "
            "this step is kept. Lower the learning rate, or choose a smaller initialisation."
        )
        self.step = step
        self.parameter = parameter


def diagnose(program: Program, state: State, images: Tensor, targets: Tensor) -> Diverged:
    """The error for the step at which `state` stands still, from its gradients computed again."""
    grads, value = program.gradients(state, images, targets)
    named = tree.named(state.params)
    bad = [name for name, grad in tree.named(grads).items() if not bool(grad.isfinite().all())]
    detail = "a gradient is not finite"
    if not bool(value.isfinite()):
        # every gradient is NaN then: the parameter that has grown largest says more
        bad = [max(named, key=lambda name: float(named[name].abs().nan_to_num(math.inf).max()))]
        detail = f"the loss is {float(value)}"
    largest = float(named[bad[0]].abs().max()) if bad else math.nan
    detail += f" (largest value there {largest:.3g})"
    return Diverged(int(state.bad_step), bad[0] if bad else "the global norm", detail)


class Run(NamedTuple):
    """One or several members trained together: what the loop needs of them, stacked or not.

    `batch(step)`, `step(state, hyper, images, targets)`, `advance` (see `Program`) and
    `evaluate(params)` agree on whether there is a leading axis of members; `size` is their number,
    1 without that axis.
    """

    config: Config
    size: int
    init: Callable[[], State]
    hyper: Hyper
    step: Step
    advance: Step
    batch: Callable[[int], tuple[Tensor, Tensor]]
    evaluate: Callable[[Params], dict[str, Tensor]]
    diagnose: Callable[[State, int], Diverged]
    steps_per_epoch: int


def solo(config: Config, splits: Splits, model: Model | None = None, ranks: Ranks = ALONE) -> Run:
    """The run of one config, or with several ranks this one's part in it."""
    if ranks.size > 1 and config.step != "eager":
        raise ValueError(
            f'`solo` needs step="eager" with {ranks.size} processes, got {config.step!r}: the '
            "gradients leave the step to be averaged. Leave it out."
        )
    splits.check()
    model = model or build(config, splits.train)
    source = batches(config, splits.train, ranks)
    functions = program(config, model, source.steps_per_epoch, ranks)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return source.at(config.seed, step)

    return Run(
        config,
        1,
        lambda: functions.init(torch.Generator().manual_seed(config.seed)),
        Hyper(
            torch.tensor(config.peak_learning_rate, device=config.device),
            torch.tensor(config.weight_decay, device=config.device),
        ),
        whole(config, functions.step),
        donated(config, functions),
        batch,
        lambda params: evaluate(model.apply, params, splits.val, config, ranks=ranks),
        lambda state, member: diagnose(functions, state, *batch(int(state.bad_step))),
        source.steps_per_epoch,
    )


def begin_with(state: State, params: Params) -> State:
    """A fresh `state` with other parameters of the same shapes, averaged ones included."""
    if not state.average:
        return state._replace(params=params)
    average = tree.map(lambda a, x: x.to(a.dtype, copy=True), state.average.average, params)
    return state._replace(params=params, average=state.average._replace(average=average))


def weights_for_evaluation(state: State) -> Params:
    """The averaged weights where the run keeps them, else the weights."""
    return state.average.average if state.average else state.params


def loop(
    run: Run,
    state: State | None = None,
    *,
    donate: bool = False,
    on_step: Callable[[State, Metrics], None] | None = None,
) -> Iterator[tuple[State, Record]]:
    """Trains from `state` (default: the start) to the end; yields after every epoch.

    Yields `(state, record)`; a record has `epoch` (from 1), `step`, `train_loss`, `val_top1`,
    `val_top5`, `val_loss`, `learning_rate`, `grad_norm`, `diverged` (the step, or -1) and
    `seconds`; values are lists, one entry a member, for a population. The result does not depend on
    where it was resumed. With `donate` the tensors of a state are written over by later steps,
    `state` itself included: the same result in less memory, for callers that keep no state.

    Raises Diverged when no member is left whose loss and gradients are finite.
    """
    config = run.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if state is None:
        donor = config.start or config.attention_from
        if donor is not None:
            raise ValueError(
                f"`loop` needs the state to begin with, got none for the donor {donor!r}. Make it "
                "with `begin_with(run.init(), params)` and kart.transfer's `begin(...).params` or "
                "`teach(...)`, or train in a directory."
            )
        if config.trajectory and on_step is None:
            raise ValueError(
                f"`loop` needs `on_step` to keep the {config.trajectory} snapshots of "
                "`trajectory`, got none. Leave `trajectory` out, or train in a directory."
            )
        state = run.init()
    first = int(state.step.max())
    total = config.epochs * run.steps_per_epoch

    def rate(peak: Tensor) -> Tensor:
        return _schedule(config, run.steps_per_epoch, peak)(now)

    # reading a flag back stalls a GPU, so it is asked for less often there; nothing is lost by it,
    # since a state that went bad stands still
    check_every = 1 if config.device == "cpu" else 50
    advance = run.advance if donate else run.step
    started = time.perf_counter()
    steps = range(first, total)
    made = gpu.ahead(run.batch, steps, config.device)
    for step, (images, targets) in zip(steps, made, strict=True):
        state, metrics = advance(state, run.hyper, images, targets)
        if on_step is not None:
            on_step(state, metrics)
        last_of_epoch = (step + 1) % run.steps_per_epoch == 0
        if (last_of_epoch or (step + 1) % check_every == 0) and bool((state.bad_step >= 0).all()):
            raise run.diagnose(state, 0)
        if not last_of_epoch:
            continue
        now = torch.tensor(step, device=config.device)
        peaks = run.hyper.learning_rate
        record: Record = {
            "epoch": step // run.steps_per_epoch + 1,
            "step": step + 1,
            "train_loss": (state.loss_sum / run.steps_per_epoch).tolist(),
            "grad_norm": metrics.grad_norm.tolist(),
            "learning_rate": (vmap(rate) if peaks.dim() else rate)(peaks).tolist(),
            "diverged": state.bad_step.tolist(),
        }
        scores = run.evaluate(weights_for_evaluation(state))
        record |= {f"val_{name}": value.tolist() for name, value in scores.items()}
        state = state._replace(loss_sum=torch.zeros_like(state.loss_sum))
        record["seconds"] = round(time.perf_counter() - started, 3)
        yield state, record


def fit(config: Config, splits: Splits | None = None) -> Iterator[Record]:
    """Trains `config` in memory; yields one record an epoch (see `loop`), `state` included."""
    for state, record in loop(solo(config, splits or load_data(config))):
        yield {**record, "state": state}
