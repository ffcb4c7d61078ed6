"""What a configuration costs before it is trained: parameters, FLOPs, memory kept for the backward.

Counts follow the paper's convention (Table 13): "FLOPs" are multiply-accumulates of the matrix
products, plus 5 N D a layer norm and 3 N^2 a head for softmax. For Fourier units they are those
that reproduce its column, 3G + 1 a pair of unit and score: 2G products with the coefficients, G for
the harmonics, 1 for W. Every family of models is counted by it: its sites say what the operators
do, its `work` what is beside them. In windows all pairs count, those with padding and those that a
mask takes out, too, since all are computed; biases that are added are not counted, and neither is
what a matrix of low rank takes more where a mask needs it whole.

    cost.parameters(model).operator
    cost.flops(model).total
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kart import layers, models, pages, schema, tables, train, tree
from kart.analysis import curvature
from kart.analysis.section import Analysis, Context, own_params
from kart.models import Model, Site
from kart.models.blocks import merge_heads
from kart.models.model import find
from kart.operators import Operator, hybrid
from kart.operators.projected import factors_of, pays, projected
from kart.operators.sums import parts_of, simple_parts


class Parameters(NamedTuple):
    """Numbers of parameters: all, and those of the attention operators among them."""

    total: int
    operator: int


class Flops(NamedTuple):
    """Multiply-accumulates of one image's forward pass, by part.

    `activation` is the operators', from scores to weights; `attention` the products with q, k and v
    and the attention of positions that a ConViT has besides; `head` all behind the blocks, the
    pyramid of a ViTDet, too.
    """

    embed: int
    linear: int
    attention: int
    activation: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def parameters(model: Model) -> Parameters:
    """Parameters of `model` but a teacher's; those of a ViT without drawing the backbone."""
    c = model.config
    if c.family != "vit":
        drawn = model.init(Generator().manual_seed(0))
        named = tree.named(own_params(drawn))
        learned = sum(x.numel() for path, x in named.items() if "operator" in path.split("."))
        return Parameters(sum(x.numel() for x in named.values()), learned)
    size, hidden = c.embed_dim, int(c.embed_dim * c.mlp_ratio)
    embed = size * (c.in_channels * c.patch_size**2 + 1) + size * (1 + c.tokens)
    block = 4 * size + 4 * size * (size + 1) + 2 * size * hidden + size + hidden
    ends = 2 * size + c.num_classes * (size + 1)
    owned = {site.path: site.operator for site in model.sites}.values()
    sizes = {
        key: tree.size(op.init(Generator().manual_seed(0), c.num_heads, c.tokens))
        for key, op in {id(op): op for op in owned}.items()
    }
    learned = sum(sizes[id(op)] for op in owned)
    return Parameters(embed + c.depth * block + ends + learned, learned)


def _unseen(site: Site) -> tuple[int, int]:
    """How many heads of a block have one output whatever their queries, and whatever their keys."""
    generator, width = Generator().manual_seed(0), site.width + site.tokens * site.biased
    drawn = site.operator.init(generator, site.heads, site.tokens)
    # at a start of zero what is learned does not show
    params = tree.map(lambda x: x + 0.1 * torch.randn(x.shape, generator=generator), drawn)
    q, k, v = torch.randn(3, 1, site.heads, site.tokens, width, generator=generator).unbind(0)
    with torch.enable_grad():
        out = site.operator.attend(params, q.requires_grad_(), k.requires_grad_(), v).sum()
    if not out.requires_grad:
        return site.heads, site.heads
    slopes = torch.autograd.grad(out, (q, k), materialize_grads=True)
    queries, keys = (site.heads - int(x.flatten(2).any(-1).sum()) for x in slopes)
    return queries, keys


SCALES = "operator.scale_base"  # of `unused`


def unused(model: Model) -> dict[str, int]:
    """Numbers of parameters that are drawn, counted and trained without effect, by the layer of
    attention that they are in: those that make queries, keys and biases of the scores for heads
    whose operator ignores them, and scales of a base activation that units do not have.

    A student that attends as its teacher does is not looked at.

    >>> unused(models.create("vit_nano", operator="static", image_size=32, patch_size=8))
    {'attn.qkv': 33280}
    """
    if _attends_as_a_teacher(model):
        return {}
    seen: dict[Any, tuple[int, int]] = {}
    for site in model.sites:
        key = id(site.operator), site.heads, site.tokens, site.width
        if key not in seen:
            seen[key] = _unseen(site)
    owners = {site.path: site.operator for site in model.sites}
    if not any(map(sum, seen.values())) and not any(map(_scaled_alone, owners.values())):
        return {}
    params = model.init(Generator().manual_seed(0))
    blocks = dict.fromkeys(
        path.partition(".attn.")[0] for path in tree.named(params) if ".attn." in path
    )
    found: dict[str, int] = {}
    for block, site in zip(blocks, model.sites, strict=True):
        queries, keys = seen[id(site.operator), site.heads, site.tokens, site.width]
        parts = {"qkv": (3, queries + keys), "qk": (2, queries + keys)}
        parts["relative_position_bias_table"] = (1, queries)
        for layer, leaves in find(params, f"{block}.attn").items():
            every, some = parts.get(layer, (1, 0))
            if some:
                count = tree.size(leaves) * some // (every * site.heads)
                found[f"attn.{layer}"] = found.get(f"attn.{layer}", 0) + count
    scales = sum(_idle_scales(op, find(params, path)) for path, op in owners.items())
    return found | ({SCALES: scales} if scales else {})


def _scaled_alone(op: Operator) -> bool:
    """Whether units of an operator, or of one of its parts, scale a base activation of zero."""
    options = [one.basis.options for one in simple_parts(op) if one.basis is not None]
    return any(bool(own.get("scales")) and own.get("base") == "zero" for own in options)


def _idle_scales(op: Operator, params: Any) -> int:
    """The scales of a base activation of zero among the parameters of an operator."""
    if parts := parts_of(op):
        return sum(_idle_scales(one, params[str(i)]) for i, one in enumerate(parts))
    named = tree.named(params).items() if _scaled_alone(op) else ()
    return sum(leaf.numel() for path, leaf in named if path.split(".")[-1] == "scale_base")


def told(unused: Mapping[str, int]) -> str:
    """What `unused` found, in words, "" for nothing."""
    scores = {name: count for name, count in unused.items() if name != SCALES}
    lines = []
    if scores:
        count = sum(scores.values())
        lines.append(f"{count:,} in {', '.join(scores)}, as operators ignore the scores")
    if SCALES in unused:
        lines.append(f"{unused[SCALES]:,} in {SCALES}, as units have no base activation")
    return "; ".join(lines)


def unit_flops(op: Operator) -> int:
    """Operations of one learned unit on one score: those of its trait "operations", 3G for Fourier
    as the paper counts, else one a feature.
    """
    basis = op.basis
    if basis is None:
        raise ValueError(
            f"`unit_flops` needs an operator with learned units, got {op.name!r}. Look at "
            "`activation_flops`."
        )
    count = basis.traits.get("operations", basis.size)
    return count + (basis.options.get("base", "zero") != "zero")


def _counted(op: Operator, heads: int) -> Iterator[tuple[Operator, int]]:
    """The operators that one is made of until they say what they cost, and the heads of each."""
    parts = op.options.get("groups") or [(one, heads) for one in op.options.get("parts", ())]
    if "activation_flops" in op.traits or not parts:
        yield op, heads
        return
    for one, count in parts:
        yield from _counted(one, count)


def activation_flops(op: Operator, heads: int, tokens: int) -> int:
    """Operations from scores to weights of `heads` heads of `tokens` queries and keys."""
    for one, _ in _counted(op, heads):
        if "activation_flops" not in one.traits:
            raise ValueError(
                f"`activation_flops` needs operators that have it as a trait, got {one.name!r}. "
                "Give it that trait (see `Operator`)."
            )
    return sum(
        count * one.traits["activation_flops"](tokens, unit_flops(one) if one.basis else 0)
        for one, count in _counted(op, heads)
    )


def product_flops(op: Operator, heads: int, tokens: int, width: int) -> int:
    """Multiply-accumulates with q, k and v of `heads` heads: for weights of scores q k^T and the
    product with the values, fewer for those that ignore the scores or never make N x M weights.
    """
    total = 0
    for one, count in _counted(op, heads):
        declared = one.traits.get("product_flops")
        total += count * (declared(tokens, width) if declared else 2 * tokens**2 * width)
    return total


def _attends_as_a_teacher(model: Model) -> bool:
    return any(op.options.get("kind") == "given" for op in model.operators)


def uncounted(model: Model) -> str | None:
    """Why `flops` does not know the operations of `model`, or None."""
    if _attends_as_a_teacher(model):
        return "it attends as its teacher does, whose pass is no part of its configuration"
    for site in model.sites:
        if site.biased and not site.operator.traits.get("of_scores", True):
            return f"{site.operator.name} takes queries and keys, which position biases make wider"
        for one, _ in _counted(site.operator, 1):
            if "activation_flops" not in one.traits:
                return f"{one.name} has no trait `activation_flops`"
    return None


def flops(model: Model) -> Flops:
    """Operations of a forward pass of one image, in the paper's convention.

    >>> f"{flops(models.create('swin_tiny')).total / 1e9:.2f} G"
    '4.52 G'
    """
    if why := uncounted(model):
        raise ValueError(
            f"`flops` needs operators whose operations it knows, got one it does not: {why}. "
            "Take another, or give it what it lacks."
        )
    parts = dict.fromkeys(Flops._fields, 0)
    for part, count in models.FAMILIES[model.config.family].work(model.config):
        parts[part] += count
    for site in model.sites:
        sizes = site.operator, site.heads, site.tokens
        parts["attention"] += site.windows * product_flops(*sizes, site.width)
        parts["activation"] += site.windows * activation_flops(*sizes)
    return Flops(**parts)


def kept_bytes(call: Callable[[], Any], beside: Any = ()) -> int:
    """Bytes of distinct storages that `call` saves for the backward of what it gives, those of the
    tensors in `beside`, as of parameters, left out.
    """
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved = tensor.detach()  # a result that is kept would keep its own graph
        kept.append(weakref.ref(saved))
        return saved

    call()  # the first may build an engine and check it, which saves tensors of its own
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        held = call()
    # what is saved for a part that the result does not depend on is gone by now
    found = [x.untyped_storage() for x in (one() for one in kept) if x is not None]
    storages = {storage.data_ptr(): storage.nbytes() for storage in found}
    del held
    for tensor in tree.leaves(beside):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def materialised(op: Operator) -> Operator:
    """The operator with `attend` by its N x N weights, as in the paper; of a hybrid each group."""
    if op.options.get("kind") == "hybrid":
        groups = [(materialised(part), count) for part, count in op.options["groups"]]
        return hybrid([part for part, count in groups for _ in range(count)])

    def attend(params: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return op.weights(params, q @ k.mT * q.shape[-1] ** -0.5, mask) @ v

    return op._replace(attend=attend)


def _kept_by_heads(
    op: Operator, heads: int, tokens: int, width: int, form: str, size: int
) -> tuple[int, int]:
    """Bytes that `heads` keep from q, k and v (included) to the projection behind them, whose input
    may be what they keep themselves: an image, and once. `form` "projected" is from q and k to the
    output of the block, of width `size`.
    """
    generator = Generator().manual_seed(0)
    op = materialised(op) if form == "naive" else op
    params = tree.map(lambda x: x.requires_grad_(), op.init(generator, heads, tokens))
    own = 4 * tree.size(params)

    def projected_kept(images: int) -> int:
        qk = torch.randn(images, tokens, 2, heads, width, generator=generator, requires_grad=True)
        x = torch.randn(images, tokens, size, generator=generator, requires_grad=True)
        inner = heads * width
        drawn = (layers.linear_init(generator, *sides) for sides in ((size, inner), (inner, size)))
        projections = [tree.map(lambda x: x.requires_grad_(), layer) for layer in drawn]

        def attend() -> Tensor:
            assert op.factors is not None  # as `pays` says
            q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
            return projected(op.factors.of(params, q, k), x, *projections)

        # the tokens are the input of the projections, and these are parameters
        return kept_bytes(attend, (x, projections))

    def kept(images: int) -> int:
        if form == "projected":
            return projected_kept(images)
        # all three in one storage, as the projection to them leaves them
        qkv = torch.randn(images, tokens, 3, heads, width, generator=generator, requires_grad=True)
        weight = torch.ones(1, heads * width, requires_grad=True)

        def attend() -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return F.linear(merge_heads(op.attend(params, q, k, v)), weight)

        return kept_bytes(attend, weight)

    # from two images on, for what is repeated along a batch
    two, three = kept(2), kept(3)
    return three - two, max(0, 3 * two - 2 * three - own)


def weighed(model: Model) -> bool:
    """Whether `activation_memory` counts what the blocks of `model` keep."""
    return model.config.family == "vit" and not _attends_as_a_teacher(model)


def materialises(model: Model) -> bool:
    """Whether `model` has a "naive" form: a ViT whose own scores determine all weights."""
    return weighed(model) and all(op.traits.get("of_scores", True) for op in model.operators)


def _kept_by_model(model: Model, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward pass keeps beside the parameters: an image, and once."""
    generator = Generator().manual_seed(0)
    params, c = tree.map(lambda x: x.requires_grad_(), model.init(generator)), model.config

    def kept(images: int) -> int:
        shape = (images, c.in_channels, c.image_size, c.image_size)
        drawn = torch.randn(shape, generator=generator).to(dtype)
        return kept_bytes(lambda: model.apply(params, drawn), params)

    two, three = kept(2), kept(3)
    return three - two, 3 * two - 2 * three


def activation_memory(model: Model, batch: int, form: str = "streamed", bytes_each: int = 4) -> int:
    """Bytes that a training step keeps from the forward for the backward.

    Counted per block, in floats of N D an image: the inputs of both norms (2) and of three linear
    layers (1 + 1 + 4), and the GELU's input (4). From q, k and v (3) to the output of the heads,
    which the fourth takes, the operator is asked: `kept_bytes` of two heads, of a hybrid one of
    all, on two and three random images, at the model's N and d. `form` "streamed" is kart's
    `attend`: KArAt keeps q, k, v, its hidden values (N r a head), W^T V and the batch's copies of
    W; in float32, where attention meets its projections first (see `kart.operators.projected`),
    neither v nor the output of the heads.
    "naive" is the materialised form of the paper: for KArAt scores, features, what their
    derivatives need and weights, each N^2 a head; for softmax the weights. Blocks that are computed
    again (`recompute`) keep their inputs, and of one of them, at its turn in the backward, all of
    this.

    Of other families, and of models that attend as a teacher does, there is the streamed form
    alone, measured: `kept_bytes` of a forward pass of two and of three random images.
    """
    if form not in ("streamed", "naive"):
        raise ValueError(
            f'`activation_memory` needs `form` "streamed" or "naive", got {form!r}. Choose one.'
        )
    schema.check_integer("activation_memory", "batch", batch, 1)
    c = model.config
    if form == "naive" and not materialises(model):
        raise ValueError(
            '`activation_memory` needs a ViT with weights of its own scores for `form` "naive", '
            f"got a model of the family {c.family!r} with {model.operators[0].name!r}. Take "
            '"streamed", or measure a call with `kept_bytes`.'
        )
    if not weighed(model):
        each, once = _kept_by_model(model, torch.float32 if bytes_each == 4 else torch.bfloat16)
        return batch * each + once
    n, hidden = c.tokens, int(c.embed_dim * c.mlp_ratio)
    block = n * (4 * c.embed_dim + 2 * hidden)
    images = (n - 1) * c.in_channels * c.patch_size**2
    blocks: list[float] = []
    known: dict[int, tuple[int, int]] = {}
    width, like = c.embed_dim // c.num_heads, torch.empty(n, c.embed_dim)
    for operator in model.operators:
        floats = float(batch * block)
        way = form
        if form == "streamed" and bytes_each == 4 and pays(factors_of(operator), like, c.num_heads):
            way = "projected"
        # a single head is laid out otherwise, and those of a hybrid one differ
        mixed = operator.options.get("kind") == "hybrid"
        few = c.num_heads if mixed else min(2, c.num_heads)
        if id(operator) not in known:
            known[id(operator)] = _kept_by_heads(operator, few, n, width, way, c.embed_dim)
        each, once = known[id(operator)]
        floats += c.num_heads / few * (batch * each + once) / 4
        blocks.append(floats)
    kept = c.depth * batch * n * c.embed_dim + max(blocks) if c.recompute else sum(blocks)
    return int((kept + batch * (images + n * c.embed_dim)) * bytes_each)


# paper, Tables 1, 13 and 18: total and operator parameters (millions), activation and total GFLOPs,
# GPU memory (GB, batch 32)
PAPER: tuple[tuple[str, str, int, float, float, float, float, float], ...] = (
    ("vit_tiny", "softmax", 10, 5.53, 0.0, 0.005, 1.262, 2.94),
    ("vit_tiny", "G3B", 10, 6.29, 0.76, 0.168, 1.425, 7.48),
    ("vit_tiny", "G3U", 10, 5.59, 0.06, 0.168, 1.425, 7.29),
    ("vit_small", "softmax", 1000, 22.05, 0.0, 0.008, 4.614, 4.15),
    ("vit_small", "G3B", 1000, 23.58, 1.53, 0.335, 4.941, 11.73),
    ("vit_small", "G3U", 1000, 22.18, 0.13, 0.335, 4.941, 11.21),
    ("vit_base", "softmax", 10, 85.81, 0.0, 0.016, 17.595, 7.44),
    ("vit_base", "G1B", 10, 87.51, 1.70, 0.268, 17.847, 17.36),
    ("vit_base", "G1U", 10, 85.95, 0.14, 0.268, 17.847, 16.97),
)


def paper_table() -> str:
    """Parameters, FLOPs and memory of the paper's nine models, counted, beside the paper's."""
    rows = []
    for name, operator, classes, total, learned, activation, gflops, memory in PAPER:
        spec = operator if operator == "softmax" else f"{operator}:scales=true"
        model = models.create(name, operator=spec, num_classes=classes)
        bare = parameters(models.create(name, operator=operator, num_classes=classes))
        counted, operations = parameters(model), flops(model)
        kept = 16 * counted.total + activation_memory(model, 32)
        rows.append(
            [
                f"{name} {operator}",
                f"{counted.total / 1e6:.2f} ({total:.2f})",
                f"{counted.operator / 1e6:.2f} ({learned:.2f})",
                f"{bare.operator / 1e6:.2f}",
                f"{operations.activation / 1e9:.3f} ({activation:.3f})",
                f"{operations.total / 1e9:.3f} ({gflops:.3f})",
                f"{kept / 1e9:.2f} ({memory:.2f})",
            ]
        )
    header = ["model", "parameters M", "operator M", "at 2G+1", "activation G", "total G"]
    note = (
        "kart's figure (the paper's). Parameters with 2G + 3 a unit, as the paper's tables count\n"
        "(scales=true); `at 2G+1` as its eq. 2 has it, kart's default. Memory: float32 weights,\n"
        "gradients, two moments and what kart's streamed form keeps at batch 32; the paper's is\n"
        "its measured peak."
    )
    return tables.table(rows, [*header, "memory GB, batch 32"]) + "\n\n" + note


# --- the section ----------------------------------------------------------------------------------

REPEATS = 7


def _calls(
    context: Context, config: train.Config, images: Tensor, labels: Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed of a config, on the CPU, wherever it was trained."""
    model = context.model(config)
    here = dataclasses.replace(config, device="cpu")
    functions = train.program(here, model, steps_per_epoch=10)
    held = [functions.init(context.generator("init"))]
    hyper = train.Hyper(torch.tensor(1e-3), torch.tensor(0.05))
    targets = F.one_hot(labels, len(context.splits.train.classes)).float()
    params, losses = model.init(context.generator("init")), context.losses(model)

    def step() -> None:
        held[0], _ = functions.advance(held[0], hyper, images, targets)

    def forward() -> None:
        with torch.no_grad():
            model.apply(params, images)

    def loss(params: Any) -> Tensor:
        return losses(params, images, labels).mean()

    return {
        "step": step,
        "forward": forward,
        "gradient": functools.partial(torch.func.grad(loss), params),
        "hvp": functools.partial(curvature.hvp, loss, params, params),
    }


def section(context: Context) -> pages.Section:
    """Training step, forward pass and memory of every operator beside softmax, and a product with
    the Hessian beside a gradient, measured now.
    """
    from kart.analysis import bench  # which imports this room

    config = context.results[0].configs[0]
    names = [result.name for result in context.results]
    configs = {result.name: result.configs[0] for result in context.results}
    if "softmax" not in configs:
        unset = {"rank": None, "project": None, "base": None}
        configs = {"softmax": dataclasses.replace(config, operator="softmax", **unset), **configs}
    batch = min(32, config.batch_size)
    images, labels = context.images(config, batch)
    calls = {name: _calls(context, one, images, labels) for name, one in configs.items()}
    kept = {name: activation_memory(context.model(one), batch) for name, one in configs.items()}
    products: dict[str, float] = {}
    clock, threads = bench.Clock("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time is that of all of them
    try:
        stepped, passed = (
            bench.interleave({name: own[what] for name, own in calls.items()}, REPEATS, clock)
            for what in ("step", "forward")
        )
        for name, own in calls.items():
            if context.left() > 0:  # the dearest part, and the one that can be left out
                both = {what: own[what] for what in ("gradient", "hvp")}
                taken = bench.interleave(both, REPEATS, clock)
                products[name] = bench.summary(taken["hvp"], taken["gradient"])["ratio"]
    finally:
        torch.set_num_threads(threads)
    rows, numbers = [], []
    for name in configs:
        both = bench.summary(stepped[name], stepped["softmax"])
        ahead = bench.summary(passed[name], passed["softmax"])
        spread = f"{both['low_ms']:.1f} to {both['high_ms']:.1f}"
        own, least = kept[name], kept["softmax"]
        memory = [f"{own / 2**20:.1f}", f"{own / least:.2f}"] if own and least else ["", ""]
        rows.append(
            [name, f"{both['ms']:.1f}", spread, f"{both['ratio']:.2f}"]
            + [f"{ahead['ms']:.1f}", f"{ahead['ratio']:.2f}", *memory]
            + [f"{products[name]:.2f}" if name in products else "no time left"]
        )
        if name in names:
            numbers += [
                pages.Number(name, "step_ms", both["ms"], "ms"),
                pages.Number(name, "step_over_softmax", both["ratio"]),
                pages.Number(name, "forward_ms", ahead["ms"], "ms"),
                pages.Number(name, "forward_over_softmax", ahead["ratio"]),
            ]
            if name in products:
                numbers.append(pages.Number(name, "hvp_over_gradient", products[name]))
            if own and least:
                numbers.append(pages.Number(name, "kept_mib", own / 2**20, "MiB"))
    header = ["operator", "step ms", "middle half", "x softmax", "forward ms", "x softmax"]
    header += ["kept MiB", "x softmax", "HVP x gradient"]
    caption = (
        f"CPU time of one thread, {len(labels)} images a batch, median of {REPEATS} taken in turn "
        "in one process, after two that warm up. Kept: what the forward pass leaves for the "
        "backward, counted. HVP: a product with the Hessian of the loss, as the curvature takes "
        "it, beside a gradient of the same loss."
    )
    return pages.Section([pages.table(header, rows, caption)], numbers)


ANALYSIS = Analysis("cost", "Cost beside softmax", section, minutes=1.0)
