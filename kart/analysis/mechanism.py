"""By what an operator mixes tokens: what is lost where its learned functions are made simple, what
of its output is position alone and what that part looks like, how gradients begin.

    aux = model.intermediates(params, images)
    simpler, fitted = mechanism.swap(model, params, "affine", aux)
    mechanism.verdict(mechanism.layout(aux["blocks.0.weights"].mean(0)))
"""

import dataclasses
import functools
import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kart import bases, models, operators, pages, schema, train, tree
from kart.analysis import figures
from kart.analysis.attention import static_share
from kart.analysis.section import (
    Analysis,
    Column,
    Context,
    Measured,
    Member,
    over_seeds,
    percent,
    samples,
    scalars,
    seeds_table,
    some_blocks,
    windowed,
)
from kart.bases import Basis, Params
from kart.models import Model
from kart.models.model import place
from kart.models.resize import lattice
from kart.operators import Operator
from kart.operators.contract import sum_units
from kart.operators.relative import PARTS, entry_index, flatten_table, index_of
from kart.operators.sums import parts_of, simple_parts
from kart.train import Config, Splits

# --- simpler functions in the place of the learned ones -------------------------------------------

FORMS = ("constant", "affine", "exp")
KINDS = ("position", *FORMS)


@dataclasses.dataclass(frozen=True)
class OneAndExp:
    """Features 1 and exp(x - shift); the shift keeps float32 from overflowing."""

    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        """`(...)` to `(..., 2)`."""
        return torch.stack([torch.ones_like(x), (x - self.shift).exp()], -1)


def simple_basis(form: str, shift: float = 0.0) -> Basis:
    """The family of constants, of affine functions, or of a exp(x - shift) + c."""
    if form == "exp":
        options = {"shift": shift}
        return bases.linear(OneAndExp(shift), 2, family="one_and_exp", options=options)
    return bases.polynomial(FORMS.index(form))


class Swapped(NamedTuple):
    """A model with other operators on the same backbone, and its parameters."""

    model: Model
    params: Params


def swap(
    model: Model,
    params: Params,
    kind: str,
    aux: Mapping[str, Tensor],
    blocks: Sequence[int] | None = None,
) -> Swapped:
    """A model whose learned functions of the score are replaced by the nearest simple ones.

    Each function (each unit of `low_rank`) becomes the constant, the affine function or the
    a exp(x) + c that has the least mean square distance from it over the scores that it really saw,
    those of its own head and key. What is beside the functions stays: W, softmax, tables,
    projections. "position" replaces the whole operator, of any kind, by the mean over images of its
    attention matrix, which ignores the scores. Blocks that shared an operator get one each. Windows
    count as images, but for those that the mask of a shift cuts: of the mean matrix these keep what
    it gives the keys that they see, and rows of softmax sum to less than 1 there.

    Args:
        model, params: a trained model.
        kind: "constant", "affine", "exp" or "position".
        aux: of `model.intermediates` on some images, whose scores (or weights) are those seen.
        blocks: which to change, from 0; default all.

    >>> model = models.create("vit_nano", "polynomial-1B", image_size=8, patch_size=4)
    >>> params = model.init(torch.Generator().manual_seed(0))
    >>> images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    >>> simpler, fitted = swap(model, params, "affine", model.intermediates(params, images))
    >>> torch.allclose(simpler.apply(fitted, images), model.apply(params, images), atol=1e-5)
    True
    """
    schema.check_choice("swap", "kind", kind, KINDS)
    depth = len(model.sites)
    chosen = range(depth) if blocks is None else blocks
    if not chosen or not all(schema.fits(i, int) and 0 <= i < depth for i in chosen):
        raise ValueError(
            f"`swap` needs `blocks` from 0 to {depth - 1}, got {list(chosen)}. Count from 0."
        )
    if any(op.options.get("kind") == "given" for op in model.operators):
        raise ValueError(
            "`swap` needs a model with attention of its own, got one that attends as its teacher "
            "does. Take the teacher."
        )
    seen = "weights" if kind == "position" else "scores"
    missing = [f"blocks.{i}.{seen}" for i in chosen if f"blocks.{i}.{seen}" not in aux]
    if missing:
        raise ValueError(
            f"`swap` needs `aux` with {missing[0]}, got {sorted(aux)}. Pass that of "
            "model.intermediates(params, images)."
        )
    gated = getattr(model.config, "gated_blocks", 0)
    if kind == "position" and any(i < gated for i in chosen):
        raise ValueError(
            f"`swap` needs blocks whose weights are the operator's alone for 'position', got the "
            f"{gated} gated blocks of a ConViT. Name the others in `blocks`."
        )
    if kind != "position" and not any(_learns(model.operators[i]) for i in chosen):
        raise ValueError(
            f"`swap` needs learned functions for {kind!r}, got fixed operators alone, such as "
            f'{model.operators[0].name!r}. "position" takes any operator.'
        )
    pairs = [(op, model.operator_params(params, i)) for i, op in enumerate(model.operators)]
    with torch.no_grad():
        for i in chosen:
            tensor = samples(model.sites[i], aux[f"blocks.{i}.{seen}"].detach())
            if kind == "position":
                pairs[i] = operators.static(), {"matrix": tensor.mean(0)}
            else:
                pairs[i] = _simpler(*pairs[i], kind, tensor)
    new = models.with_operators(model, [op for op, _ in pairs], sharing="blockwise")
    # an operator that blocks shared is at the top
    kept = {name: node for name, node in params.items() if name != "operator"}
    for site, (_, own) in zip(new.sites, pairs, strict=True):
        kept = place(kept, site.path, own)
    return Swapped(new, kept)


def _learns(op: Operator) -> bool:
    """Whether any part of an operator has learned functions."""
    return any(one.basis is not None for one in simple_parts(op))


def _simpler(op: Operator, params: Params, form: str, scores: Tensor) -> tuple[Operator, Params]:
    """An operator with simple functions for its learned ones, seen at scores `(B, H, N, M)`."""
    parts = parts_of(op)
    if parts:
        counts = [count for _, count in op.options.get("groups", ())]
        seen = scores.split(counts, 1) if counts else [scores] * len(parts)
        found = [
            _simpler(part, params[str(i)], form, own)
            for i, (part, own) in enumerate(zip(parts, seen, strict=True))
        ]
        new = [part for part, _ in found]
        heads = [part for part, count in zip(new, counts, strict=False) for _ in range(count)]
        whole = operators.hybrid(heads) if counts else operators.added(new)
        return whole, {str(i): own for i, (_, own) in enumerate(found)}
    if op.basis is None:
        return op, params
    units = list(_units(op, params, scores.double()))
    shift = max(float(one.seen.max()) for one in units) if form == "exp" else 0.0
    basis = simple_basis(form, shift)
    new = dict(params)
    for one in units:
        leaf = next(iter(one.leaves.values()))
        coefs = _nearest(op.basis, one, form, shift).to(leaf.dtype)
        if not bool(coefs.isfinite().all()):
            raise ValueError(
                f"`swap` needs coefficients for {form!r} that are finite in {leaf.dtype}, got nan "
                f"or inf, of scores up to {float(scores.abs().max()):.3g}. Choose another `kind`, "
                "or leave a diverged run out."
            )
        for name, part in one.back(coefs).items():
            new = place(new, name, {"coefs": part})
    return _with_basis(op, basis), new


class _Units(NamedTuple):
    """Units of one stage of an operator: leaves that lead with `(H, P, J)`, what they see,
    `(S, ...)` broadcasting against that, which of them are one function, and where the
    coefficients belong.
    """

    leaves: Params
    seen: Tensor
    same: Any  # sums what `(H, P, J)` moments are of one function
    back: Any  # coefficients to parameters by dotted path


def _rows(x: Tensor) -> Tensor:
    """What units `(H, P, J)` see of `x (B, H, N, J)`: `(B N, H, 1, J)`."""
    return x.movedim(-2, 1).flatten(0, 1)[:, :, None]


def _units(op: Operator, params: Params, scores: Tensor) -> Iterator[_Units]:
    """The units of an operator and what they see of scores `(B, H, N, M)`, in float64."""
    assert op.basis is not None
    kind = op.options.get("kind")

    def stage(path: str, leaves: Params, x: Tensor) -> _Units:
        return _Units(leaves, _rows(x), lambda y: y, lambda coefs: {path: coefs})

    if kind in ("low_rank", "full_rank"):
        yield stage("units", params["units"], scores)
    elif kind == "project_first":
        yield stage("units", params["units"], scores @ params["mix"].double().mT)
    elif kind == "two_stage":
        yield stage("first", params["first"], scores)
        # those of the second stage see what the first puts out
        hidden = sum_units(op.basis, tree.map(Tensor.double, params["first"]), scores)
        yield stage("second", params["second"], hidden)
    elif kind == "elementwise":
        leaves = {name: leaf[:, None, None] for name, leaf in params["units"].items()}
        yield stage("units", leaves, scores)._replace(same=lambda y: y.sum((-2, -1)))
    elif kind == "by_offset":
        table, given = params["table"], params["units"]
        tokens = scores.shape[-1]
        index = index_of(table).flatten()
        leaves = {}
        for name in given["offsets"]:
            entries = flatten_table({part: own[name] for part, own in given.items()})
            leaves[name] = entries.index_select(1, index).unflatten(1, (tokens, tokens))
        count = int(index.max()) + 1

        def same(y: Tensor) -> Tensor:
            return y.new_zeros(*y.shape[:-2], count).index_add(-1, index, y.flatten(-2))

        def back(coefs: Tensor) -> dict[str, Tensor]:
            shapes = {name: table[name].shape for name in PARTS if name in table}
            parts = coefs.split([shape[1] * shape[2] for shape in shapes.values()], 1)
            return {
                f"units.{name}": part.reshape(*shape, -1)
                for part, (name, shape) in zip(parts, shapes.items(), strict=True)
            }

        yield _Units(leaves, scores, same, back)
    else:
        raise ValueError(
            f"`swap` needs functions of one score, got {op.name!r}, whose functions are of the "
            'place or of something else. "position" takes any operator.'
        )


def _nearest(basis: Basis, units: _Units, form: str, shift: float) -> Tensor:
    """Coefficients `(..., K)` of the simple functions nearest to the units, over what they see."""
    leaves = tree.map(Tensor.double, units.leaves)
    shape = torch.broadcast_shapes(next(iter(leaves.values())).shape[:3], units.seen.shape[1:])
    totals = units.seen.new_zeros(5, *shape)
    # what the units give at the scores of some rows at a time
    for seen in units.seen.split(max(1, 2**22 // math.prod(shape))):
        y = basis.apply(leaves, seen)
        g = (seen - shift).exp() if form == "exp" else seen
        sums = [torch.ones_like(y), g.expand_as(y), (g * g).expand_as(y), y, g * y]
        totals += torch.stack([one.sum(0) for one in sums])
    n, g, gg, y, gy = units.same(totals) / units.same(totals[:1])
    if form == "constant":
        return y[..., None]
    spread = gg - g * g
    # scores that are all the same, up to rounding, have no slope
    varies = spread > 1e-12 * gg
    slope = torch.where(varies, (gy - g * y) / torch.where(varies, spread, 1.0), 0.0)
    return torch.stack([y - slope * g, slope], -1)


def _with_basis(op: Operator, basis: Basis) -> Operator:
    """The operator of the same call with another basis."""
    if op.call is None:
        raise ValueError(
            f"`swap` needs an operator that a factory made, got {op.name!r}, made by hand. "
            "Decorate its factory with kart.factories.remember."
        )
    bound = inspect.signature(op.call.factory).bind(*op.call.args, **op.call.kwargs)
    bound.arguments["basis"] = basis
    new = op.call.factory(*bound.args, **bound.kwargs)
    return new._replace(name=f"{op.name} {basis.family}")


def retrain(
    config: Config, model: Model, params: Params, splits: Splits, steps: int, rate: float = 0.1
) -> Params:
    """`params` of `model` after `steps` more steps of the training that `config` describes, all of
    them trained, the simple functions too.

    Batches are those that would have come next, AdamW starts anew, and the learning rate falls by a
    cosine from `rate` times the run's peak to its end.

    >>> config = Config(epochs=1, depth=1, patch_size=4, batch_size=8, train_limit=16)
    >>> splits = train.load_data(config)
    >>> model = train.build(config, splits.train)
    >>> params = model.init(torch.Generator().manual_seed(0))
    >>> retrain(config, model, params, splits, steps=0) is params
    True
    """
    fitting = schema.fits(steps, int) and schema.fits(rate, float)
    if not fitting or steps < 0 or not 0 < rate <= 1:
        raise ValueError(
            f"`retrain` needs an integer `steps` >= 0 and 0 < `rate` <= 1, got {steps!r} and "
            f"{rate!r}. Pass for example steps=50."
        )
    if not steps:
        return params
    peak = rate * config.peak_learning_rate
    short = dataclasses.replace(
        config,
        epochs=1,
        warmup_epochs=0.0,
        learning_rate=peak,
        end_learning_rate=min(config.end_learning_rate, peak),
        # averaged weights lag behind those of a few steps; frozen ones may not be there any more
        ema=0.0,
        freeze=(),
        step="eager",
        device="cpu",
    )
    source = train.batches(short, splits.train)
    functions = train.program(short, model, steps)
    state = functions.init(torch.Generator().manual_seed(config.seed))
    state = train.begin_with(state, params)
    hyper = train.Hyper(torch.tensor(peak), torch.tensor(config.weight_decay))
    done = config.epochs * source.steps_per_epoch
    for step in range(done, done + steps):
        state, _ = functions.step(state, hyper, *source.at(config.seed, step))
    return state.params


# --- gradients at the start -----------------------------------------------------------------------


def gradient_norms(model: Model, params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """How large the gradients are that reach queries, keys and values: `(L, 3)`, float64.

    The norm of the gradient of an image's cross-entropy in q, k and v of each block, all heads and
    tokens together, as the root mean square over images. Of queries and keys that position biases
    make wider it is that of their own d numbers, before q is scaled for the bias.

    >>> model = models.create("vit_nano", "polynomial-0B", image_size=8, patch_size=4)
    >>> params = model.init(torch.Generator().manual_seed(0))
    >>> found = gradient_norms(model, params, torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))
    >>> found.shape, found[:, :2].sum().item()
    (torch.Size([4, 3]), 0.0)
    """
    if images.dim() != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"`gradient_norms` needs images (B, C, height, width) and labels (B,), got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}. Pass a batch."
        )
    seen: list[Tensor] = []

    def recording(op: Operator) -> Operator:
        def attend(own: Params, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
            seen.extend((q, k, v))
            return op.attend(own, q, k, v, mask)

        return op._replace(attend=attend)

    universal = model.config.sharing == "universal"
    watched = [recording(op) for op in model.operators]
    twin = models.with_operators(model, watched[0] if universal else watched)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    with torch.enable_grad():
        targets = torch.nn.functional.one_hot(labels, model.config.num_classes)
        loss = train.cross_entropy(twin.apply(leaves, images), targets).sum()
    # an operator that ignores its scores sends nothing to q and k
    found = list(torch.autograd.grad(loss, seen, allow_unused=True, materialize_grads=True))
    for i, site in enumerate(model.sites):
        if site.biased:
            wide = found[3 * i].shape[-1]
            found[3 * i] = found[3 * i][..., : site.width] * (wide / site.width) ** 0.5
            found[3 * i + 1] = found[3 * i + 1][..., : site.width]
    norms = [one.double().reshape(len(images), -1).norm(dim=1).square().mean() for one in found]
    return torch.stack(norms).sqrt().reshape(-1, 3)


# --- what the part that is position looks like ----------------------------------------------------

# the rule of `verdict`, with its three thresholds
POOLS, DEPENDS, NEAR = 0.5, 0.5, 1.5


class Layout(NamedTuple):
    """What matrices of mean attention `(..., N, N)` look like on the lattice of patches, float64.

    `offsets (..., 2R - 1, 2C - 1)` is the mean weight by relative offset, `offsets[..., R - 1 + dy,
    C - 1 + dx]` that of a patch dy rows below and dx columns right of the query; `own (..., R, C)`
    the row of the first token without a place (the class token), None where there is none. Of the
    weights between patches: `level`, the share of their mean square that one weight for all gives;
    `by_offset` and `by_key`, the shares of their variance that functions of the offset alone and
    of the key alone give; `near`, the mean magnitude up to one row and column away over that of
    all. `chance` are `by_offset` and `by_key` of independent noise.
    """

    offsets: Tensor
    own: Tensor | None
    level: Tensor
    by_offset: Tensor
    by_key: Tensor
    near: Tensor
    chance: tuple[float, float]


def layout(matrix: Tensor) -> Layout:
    """What matrices of attention `(..., N, N)` by position look like.

    The tokens are a square of patches by rows, after tokens without a place (class, registers) if
    N is no square.

    >>> found = layout(torch.eye(17))
    >>> found.offsets.shape, float(found.by_offset), verdict(found)
    (torch.Size([7, 7]), 1.0, 'convolution')
    """
    square = matrix.dim() >= 2 and matrix.shape[-1] == matrix.shape[-2]
    if not square or not matrix.dtype.is_floating_point or matrix.shape[-1] < 4:
        raise ValueError(
            f"`layout` needs floating-point matrices (..., N, N) with N >= 4, got {matrix.dtype} "
            f"of shape {tuple(matrix.shape)}. Take the mean of the weights over images."
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("`layout` needs finite matrices, got nan or inf. Leave diverged runs out.")
    prefix, rows, columns = lattice(matrix.shape[-1])
    wide = matrix.detach().double()
    patches = wide[..., prefix:, prefix:].flatten(-2)
    index = entry_index(0, rows, columns, matrix.device).flatten()
    count = index.bincount()
    totals = patches.new_zeros(*patches.shape[:-1], len(count)).index_add(-1, index, patches)
    offsets = totals / count
    mean = patches.mean(-1, keepdim=True)
    varied = (patches - mean).square().sum(-1)
    keys = patches.unflatten(-1, (rows * columns, -1)).mean(-2)
    of_offset = (count * (offsets - mean).square()).sum(-1)
    of_key = rows * columns * (keys - mean).square().sum(-1)
    whole = patches.square().sum(-1)
    # a matrix of one weight varies by roundings alone
    varies = varied > 1e-24 * whole
    share = torch.where(varies, varied, 1.0)
    grid = (2 * rows - 1, 2 * columns - 1)
    close = torch.zeros(grid, dtype=torch.bool, device=matrix.device)
    close[rows - 2 : rows + 1, columns - 2 : columns + 1] = True
    sizes = patches.abs()
    beside = sizes[..., close.flatten()[index]].mean(-1)
    entries, cells = len(index) - 1, rows * columns
    return Layout(
        offsets.unflatten(-1, grid),
        wide[..., 0, prefix:].unflatten(-1, (rows, columns)) if prefix else None,
        torch.where(whole > 0, 1 - varied / torch.where(whole > 0, whole, 1.0), 1.0),
        torch.where(varies, of_offset / share, 0.0).clamp(0, 1),
        torch.where(varies, of_key / share, 0.0).clamp(0, 1),
        beside / sizes.mean(-1).clamp(min=torch.finfo(torch.float64).tiny),
        ((len(count) - 1) / entries, (cells - 1) / entries),
    )


def verdict(found: Layout) -> str | list[Any]:
    """What each matrix of a layout is: "global pooling" where equal rows give half of its mean
    square or more; else "convolution" where the offset gives half of its variance and weights up to
    a patch away are 1.5 times the mean; else "neither". Nested lists, as `Tensor.tolist` has them.

    >>> verdict(layout(torch.ones(17, 17)))
    'global pooling'
    """
    pools = found.level + (1 - found.level) * found.by_key >= POOLS
    convolves = (found.by_offset >= DEPENDS) & (found.near >= NEAR)
    codes = torch.where(pools, 2, torch.where(convolves, 1, 0))
    return np.array(("neither", "convolution", "global pooling"))[codes.cpu().numpy()].tolist()


def plot(found: Sequence[Layout], names: Sequence[str] | None = None) -> Any:
    """A matplotlib Figure of layouts `(H, ...)`, a row each: for every head the mean weight by
    offset, the query in the middle, and beside it the class token's row. Orange is positive, blue
    negative, and every map has its own scale, written above it.
    """
    if not found or any(one.offsets.dim() != 3 for one in found):
        shapes = [tuple(one.offsets.shape) for one in found]
        raise ValueError(
            f"`plot` needs layouts of matrices (H, N, N), one or more, got offsets of {shapes}. "
            "Pass [layout(mean)] of each block."
        )
    from matplotlib.colors import LinearSegmentedColormap

    blue, orange = figures.COLOURS[:2]
    colours = LinearSegmentedColormap.from_list("signed", [blue, "#ffffff", orange])
    heads = max(len(one.offsets) for one in found)
    each = 2 if any(one.own is not None for one in found) else 1
    fig, axes = figures.grid(len(found), each * heads, 1.05, 1.2)
    for i, (row, one) in enumerate(zip(axes, found, strict=True)):
        for ax in row:
            ax.set_axis_off()
        for h, offsets in enumerate(one.offsets):
            maps = [("by offset", offsets), ("class", None if one.own is None else one.own[h])]
            for ax, (what, values) in zip(row[each * h : each * (h + 1)], maps, strict=False):
                if values is None:
                    continue
                most = float(values.abs().max())
                scale = {"vmin": -(most or 1.0), "vmax": most or 1.0, "cmap": colours}
                ax.imshow(values.cpu().numpy(), interpolation="nearest", **scale)
                title = f"head {h + 1}, {what}\n\N{PLUS-MINUS SIGN}{most:.2g}"
                ax.set_title(title, fontsize=6.5, color=figures.INK)
        if names is not None:
            place = {"transform": row[0].transAxes, "ha": "right", "va": "center", "rotation": 90}
            row[0].text(-0.08, 0.5, names[i], fontsize=7.5, color=figures.INK, **place)
    return fig


# --- the section ----------------------------------------------------------------------------------

SEEDS = 5  # fresh initialisations whose gradients are compared


def _top1(context: Context, config: Config, model: Model, params: Params) -> Tensor:
    images, labels = context.images(config, 8 * context.examples)
    with torch.no_grad():
        parts = [model.apply(params, part).argmax(-1) for part in images.split(256)]
    return (torch.cat(parts) == labels).double().mean()


def measure(context: Context, member: Member) -> dict[str, Tensor]:
    """What a member loses by each swap, all blocks and one at a time, as it is and after a few
    steps more; and how much of its output is position.
    """
    model = context.model(member.config)
    few = context.few(model)
    most = max(site.windows * site.heads * site.tokens**2 for site in model.sites)
    held = 5 * 4 * len(model.sites) * few * most
    context.holds(f"the attention of {few} images in {member.name}", held / 2**20)
    return _swaps(context, member, model, few) | _position(context, member, model, few)


def _swaps(context: Context, member: Member, model: Model, few: int) -> dict[str, Tensor]:
    config, steps, shown = member.config, context.retrain, some_blocks(len(model.sites))

    @functools.cache
    def aux() -> dict[str, Tensor]:
        images, _ = context.images(config, few, context.splits.train)
        with torch.no_grad():
            return model.intermediates(member.params, images)

    def scored(kind: str) -> dict[str, Tensor]:
        new, blocks = Swapped(model, member.params), []
        if kind != "whole":
            new = swap(model, member.params, kind, aux())
            # a block between others may have no functions
            blocks = [i for i in shown if kind == "position" or _learns(model.operators[i])]
        found = {"top1": _top1(context, config, *new)}
        for i in blocks:
            context.check()
            one = swap(model, member.params, kind, aux(), [i])
            found[f"top1_block_{i + 1}"] = _top1(context, config, *one)
        if steps:
            context.check()
            params = retrain(config, *new, context.splits, steps)
            found["again"] = _top1(context, config, new.model, params)
        return found

    def kept(kind: str) -> dict[str, Tensor]:
        what = f"swap {kind} images={few} examples={8 * context.examples} steps={steps}"
        return context.kept(what, member, lambda: scored(kind))

    kinds = [] if getattr(model.config, "gated_blocks", 0) else ["position"]
    if all(map(_swappable, model.operators)) and any(map(_learns, model.operators)):
        kinds += FORMS
    whole = kept("whole")
    found = dict(whole)
    for kind in kinds:
        own = kept(kind)
        found[f"cost_{kind}"] = whole["top1"] - own["top1"]
        for i in shown:
            if f"top1_block_{i + 1}" in own:
                found[f"cost_{kind}_block_{i + 1}"] = whole["top1"] - own[f"top1_block_{i + 1}"]
        if steps:
            found[f"left_{kind}"] = whole["again"] - own["again"]
    return found


def _position(context: Context, member: Member, model: Model, few: int) -> dict[str, Tensor]:
    def compute() -> dict[str, Tensor]:
        with torch.no_grad():
            seen = model.intermediates(member.params, context.images(member.config, few)[0])
        found = {}
        for i, site in enumerate(model.sites):
            weights, values = (
                samples(site, seen[f"blocks.{i}.{name}"]) for name in ("weights", "values")
            )
            found[f"share_{i}"] = static_share(weights, values, fitted=False)
            found[f"mean_{i}"] = weights.mean(0)
        return found

    seen = context.kept(f"position images={few}", member, compute)
    shares = [seen[f"share_{i}"] for i in range(len(model.sites))]
    found = {name: x for name, x in seen.items() if name.startswith("mean_")}
    found["position"] = torch.cat(shares).mean()
    for i in some_blocks(len(model.sites)):
        for h, share in enumerate(shares[i]):
            found[f"position_block_{i + 1}_head_{h + 1}"] = share
    return found


# whose functions are of one score
OF_SCORE = ("low_rank", "full_rank", "project_first", "two_stage", "elementwise", "by_offset")


def _swappable(op: Operator) -> bool:
    """Whether `swap` takes all of an operator's learned functions."""
    return all(one.basis is None or one.options.get("kind") in OF_SCORE for one in simple_parts(op))


def _starts(context: Context, member: Member) -> dict[str, Tensor]:
    """`gradient_norms` of fresh initialisations, `(SEEDS, L, 3)`."""

    def compute() -> dict[str, Tensor]:
        model = context.model(member.config)
        images, labels = context.images(member.config, count, context.splits.train)
        found = []
        for seed in range(SEEDS):
            params = model.init(torch.Generator().manual_seed(seed))
            found.append(gradient_norms(model, params, images, labels))
        return {"norms": torch.stack(found)}

    count = context.few(context.model(member.config))
    return context.kept(f"gradients images={count} seeds={SEEDS}", member, compute)


def section(context: Context) -> pages.Section:
    """Tables of what swaps cost, of first gradients, of position; the mean attention by offset."""
    found = scalars(context, measure)
    shown, numbers = _costs(context, found)
    place = "Position is the place in a window, and a mean matrix that of all windows of a block."
    sites = [site for model in context.models for site in model.sites]
    if any(site.cut is not None and len(site.cut.whole) < site.cut.count for site in sites):
        place += (
            " In windows that a mask cuts it loses what it gave masked keys, so that in its place "
            "something is lost even where attention ignores the scores."
        )
    blocks: list[pages.Markup] = [*windowed(context, place), *shown]
    for part in (_gradients(context), _shares(context, found), _layouts(context)):
        blocks += part[0]
        numbers += part[1]
    return pages.Section(blocks, numbers)


Part = tuple[list[pages.Markup], list[pages.Number]]


def _points(measure: str, header: str) -> Column:
    return Column(measure, header, 1, "", 100.0, -1.0, 1.0)


def _costs(context: Context, found: Measured) -> Part:
    count = context.available(8 * context.examples)
    few = context.available(context.few(context.models[0]), context.splits.train)
    names = dict(zip(KINDS, ("its mean matrix", "constants", "affine", "exp"), strict=True))
    columns = [percent("top1", "top-1 %")]
    columns += [_points(f"cost_{kind}", names[kind]) for kind in KINDS]
    caption = (
        f"Points of top-1 on {count:,} validation images that are lost where, without training, "
        "the attention matrix is replaced by its mean over images, or each learned function by the "
        "constant, the affine function or the a exp(x) + c nearest to it over the scores that it "
        f"sees (of {few} training images, by least squares). Mean, 95 % interval over seeds; below "
        "zero it gains. A dash: no functions, or some that are not of one score; of the matrix, "
        "gated blocks, which mix it with that of positions."
    )
    table, numbers = seeds_table(found, columns, caption)
    shown = [table]
    if context.retrain:
        columns = [percent("again", "top-1 %")]
        columns += [_points(f"left_{kind}", names[kind]) for kind in KINDS]
        caption = (
            f"What is left of it after {context.retrain} more steps of training, which the model "
            "as it was has had, too (first column): all parameters, those of the simple functions "
            "among them, at a tenth of the run's learning rate."
        )
        table, more = seeds_table(found, columns, caption)
        shown.append(table)
        numbers += more
    depth = max(len(model.sites) for model in context.models)
    columns = [
        _points(f"cost_{kind}_block_{i + 1}", f"{names[kind]}, block {i + 1}")
        for kind in KINDS
        for i in some_blocks(depth)
    ]
    table, more = seeds_table(found, columns, "The same, one block at a time, without training.")
    return [*shown, pages.details("A block at a time", table)], [*numbers, *more]


def _gradients(context: Context) -> Part:
    rows, numbers, depths = [], [], []
    for result in context.results:
        norms = _starts(context, Member(result, 0))["norms"]
        depths.append(norms.shape[1])
        cells: list[Any] = [result.name]
        for i in some_blocks(norms.shape[1]):
            for j, name in enumerate("qkv"):
                values = dict(enumerate(norms[:, i, j].tolist()))
                measure = f"gradient_{name}_block_{i + 1}"
                mean, own = over_seeds(result.name, measure, values, "nats", low=0.0)
                numbers += own
                spread = mean.why or f"[{mean.low:.2g}, {mean.high:.2g}]"
                cells.append(pages.Markup(f"{mean.mean:.2g}<br>{pages.tag('small', spread)}"))
        rows.append(cells)
    count = context.available(context.few(context.models[0]), context.splits.train)
    header = ["operator"]
    header += [f"{name}, block {i + 1}" for i in some_blocks(max(depths)) for name in "qkv"]
    caption = (
        "Gradients before training: the norm of the gradient of an image's loss in the queries, "
        f"keys and values of a block, all heads together, root mean square over {count} training "
        f"images. Mean, 95 % interval over {SEEDS} initialisations, whose backbone operators "
        "share. 0 in q and k is an operator that ignores its scores at the start."
    )
    return [pages.table(header, rows, caption)], numbers


def _shares(context: Context, found: Measured) -> Part:
    measures = {
        name: None for seeds in found.values() for own in seeds.values() for name in own
        if name.startswith("position_block_")
    }  # fmt: skip
    columns = [Column("position", "all, %", 1, "", 100.0, high=1.0)]
    columns += [
        Column(name, name.removeprefix("position_").replace("_", " "), 1, "", 100.0, high=1.0)
        for name in measures
    ]
    few = context.available(context.few(context.models[0]))
    caption = (
        f"Share of the variance of a head's output over {few} validation images that position "
        "alone explains: the mean of the attention matrix over the images, times the values. "
        "100 is attention that is the same for every image; below 0 the mean matrix is further "
        "from the output than no matrix. The best constant matrix, which is fitted, explains at "
        "least as much: 100 less the share of the scores, in the section on functions."
    )
    table, numbers = seeds_table(found, columns, caption)
    return [table], numbers


def _layouts(context: Context) -> Part:
    rows, numbers, pictures = [], [], []
    chance, classes = (0.0, 0.0), False
    for k, result in enumerate(context.results):
        sites = context.model(result.configs[0]).sites
        names, shares = Counter[str](), defaultdict[str, list[float]](list)
        first: list[Layout] = []
        for index in range(len(result.configs)):
            own = measure(context, Member(result, index))
            layouts = [layout(own[f"mean_{i}"]) for i in range(len(sites))]
            first = first or layouts
            seed = result.configs[index].seed
            for i, one in enumerate(layouts):
                chance, classes = one.chance, classes or one.own is not None
                names.update(verdict(one))
                for h in range(len(one.level)):
                    for key in ("level", "by_offset", "by_key", "near"):
                        value = float(getattr(one, key)[h])
                        shares[key].append(value)
                        measured = f"layout_{key}_block_{i + 1}_head_{h + 1}"
                        numbers.append(pages.Number(result.name, measured, value, "", seed))
        means = {key: sum(values) / len(values) for key, values in shares.items()}
        rows.append(
            [
                result.name,
                *(f"{100 * means[key]:.0f}" for key in ("level", "by_offset", "by_key")),
                f"{means['near']:.2f}",
                *(str(names[n]) for n in ("convolution", "global pooling", "neither")),
            ]
        )
        chosen = some_blocks(len(first))
        fig = plot([first[i] for i in chosen], [f"block {i + 1}" for i in chosen])
        alt = f"Mean attention of {result.name} by offset"
        alt += ", and of its class token" if classes else ""
        caption = f"{result.name}, seed {result.configs[0].seed}"
        pictures.append(pages.figure(fig, f"mechanism-{k}", alt, caption))
    header = ["operator", "one weight %", "by offset %", "by key %", "near"]
    header += ["convolution", "global pooling", "neither"]
    caption = (
        "The mean attention matrix between patches, mean over heads, blocks and seeds. One weight: "
        "share of its mean square that one weight for all pairs gives. By offset, by key: share of "
        "its variance that a function of the relative offset, or of the key, gives (of independent "
        f"noise {100 * chance[0]:.0f} and {100 * chance[1]:.0f} %). Near: mean magnitude up to one "
        "patch away over that of all pairs. Then how many heads are global pooling (equal rows "
        f"give at least {100 * POOLS:.0f} % of the mean square), else convolution (the offset "
        f"gives at least {100 * DEPENDS:.0f} % of the variance, and near is at least {NEAR}), or "
        "neither."
    )
    told = (
        "Mean signed weight between patches by relative offset, the query in the middle"
        + (", and of the class token for each patch" if classes else "")
        + ". Orange is positive, blue negative, each map on its own scale."
    )
    return [pages.table(header, rows, caption), pages.text(told), pages.beside(*pictures)], numbers


ANALYSIS = Analysis(
    "mechanism",
    "How tokens are mixed",
    section,
    minutes=2.5,
    measure=measure,
    uses=("examples", "retrain", "limit_mib"),
)
