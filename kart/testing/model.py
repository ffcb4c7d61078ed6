"""Properties of a model: images to logits, as pure functions of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.func import grad, vmap

from kart import tree
from kart.testing import draw
from kart.testing.basis import check_slope, global_state, restore, show_changes
from kart.testing.core import Property
from kart.testing.draw import Theta, agree, jvp, same, spread, unit, vjp

Params = dict[str, Any]


class Subject(NamedTuple):
    """A model as the checks see it; `tied` is the blockwise model that it shares operators of."""

    model: Any
    images: Callable[[Generator, int], Tensor]
    tied: Any
    traits: Mapping[str, Any]
    dtypes: Sequence[torch.dtype]

    def params(self, seed: int, dtype: torch.dtype) -> Params:
        drawn = self.model.init(draw.generator(seed))
        # off the initialisation, where biases and some mixes are zero
        return tree.to(draw.jittered(drawn, Theta(seed, 0.1)), dtype)

    def batch(self, seed: int, size: int, dtype: torch.dtype) -> Tensor:
        return self.images(draw.generator(seed + 1), size).to(dtype)


def _slack(s: Subject, params: Params, images: Tensor) -> Tensor:
    return spread(s.model.apply, (params, images), images.dtype)


def keeps_shape_and_dtype(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """apply maps images (.., Cin, height, width) to logits (.., C), with any leading axes.

    A model that needs exactly one batch axis breaks under vmap, or mixes what it flattens.
    """
    params, images = s.params(seed, torch.float32), s.batch(seed, 2, dtype)
    logits = s.model.apply(params, images)
    for name, view, wanted in (
        ("one image", images[0], logits[0]),
        ("two leading axes", images[None].expand(2, *images.shape), logits.expand(2, -1, -1)),
    ):
        got = s.model.apply(params, view)
        # in bfloat16 other blockings round otherwise
        scale = float(logits.abs().max()) + 1
        eps = torch.finfo(dtype).eps * (4 if dtype == torch.bfloat16 else 64)
        agree(got, wanted, eps * scale, f"logits of {name}", "those of the batch")


def init_follows_its_generator(s: Subject, seed: int) -> None:
    """init(generator) is a function of the generator: finite float32 leaves under string keys.

    Parameters that come from elsewhere make runs that cannot be repeated.
    """
    first = tree.named(s.model.init(draw.generator(seed)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 7)
        again = tree.named(s.model.init(draw.generator(seed)))
    for name, leaf in first.items():
        if leaf.dtype != torch.float32 or not bool(leaf.isfinite().all()):
            raise AssertionError(f"{name} is {leaf.dtype}, or not finite: wanted finite float32")
        same(again[name], leaf, f"{name} of a second init", "that of the first")


def inputs_untouched(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """apply, intermediates and gradients write to neither parameters nor images, nor to anything
    global, and give the same bits when asked again.

    In-place changes and hidden states reach whoever else uses the model.
    """
    state = global_state()
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    before = tree.map(torch.clone, {"params": params, "images": images})
    logits, pullback = vjp(s.model.apply, params, images)
    pullback(torch.ones_like(logits))
    s.model.intermediates(params, images)
    same(s.model.apply(params, images), logits, "logits asked again", "logits")
    for name, leaf in tree.named({"params": params, "images": images}).items():
        same(leaf, tree.named(before)[name], f"{name} afterwards", "it before")
    after = global_state()
    restore(state)
    show_changes(state, after)


def intermediates_agree(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """intermediates(params, images)["logits"] = apply(params, images).

    What is looked at is not what is trained.
    """
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    aux = s.model.intermediates(params, images)
    wanted = s.model.apply(params, images)
    agree(aux["logits"], wanted, _slack(s, params, images), "logits of intermediates", "apply")
    odd = [name for name, leaf in aux.items() if not bool(leaf.isfinite().all())]
    if odd:
        raise AssertionError(f"not finite: {odd}")


def examples_stand_alone(s: Subject, seed: int, poke: float, dtype: torch.dtype) -> None:
    """apply(params, images)[b] depends on images[b] alone.

    An example leaks into another: the result depends on the batch.
    """
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    for b in (0, 1):
        spoiled = images.clone()
        spoiled[1 - b] = poke
        wanted = s.model.apply(params, images[b])
        limit = spread(s.model.apply, (params, images[b]), dtype)
        got = s.model.apply(params, spoiled)[b]
        agree(got, wanted, limit, f"logits of image {b} among others", "alone")


def vmap_is_a_loop(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """vmap(apply) over examples and over populations is the loop.

    Per-example gradients and populations of models are vmapped.
    """
    images = s.batch(seed, 3, dtype)
    members = [s.params(seed + i, dtype) for i in range(2)]
    got = vmap(s.model.apply, in_dims=(None, 0))(members[0], images)
    wanted = torch.stack([s.model.apply(members[0], image) for image in images])
    limits = [_slack(s, member, images) for member in members]
    agree(got, wanted, limits[0], "vmap over examples", "the loop")
    got = vmap(s.model.apply, in_dims=(0, None))(tree.stack(members), images)
    wanted = torch.stack([s.model.apply(member, images) for member in members])
    agree(got, wanted, torch.stack(limits), "vmap over a population", "the loop")


def _loss(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda params, images: apply(params, images).sin().sum()


def per_example_gradients(s: Subject, seed: int) -> None:
    """sum_b vmap(grad(f))(params, images[b]) = grad(sum_b f)(params, images).

    Examples mix in the backward.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 3, torch.float64)
    each = vmap(grad(_loss(s.model.apply)), in_dims=(None, 0))(params, images)
    whole = tree.named(grad(_loss(s.model.apply))(params, images))
    for name, leaf in tree.named(each).items():
        limit = 1024 * unit(torch.float64) * (1 + float(leaf.abs().max()))
        agree(leaf.sum(0), whole[name], limit, f"summed gradients of {name}", "the gradient")


def gradient_is_right(s: Subject, seed: int) -> None:
    """The derivative of the logits along any line of parameters is that of difference quotients.

    A gradient is cut or wrong somewhere in the model.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    source = draw.generator(seed + 2)
    line = tree.map(lambda p: torch.randn(p.shape, generator=source).double(), params)
    probe = torch.randn(s.model.apply(params, images).shape, generator=source).double()

    def along(t: Tensor) -> Tensor:
        flat = [
            (s.model.apply(tree.map(lambda p, d, t=t: p + t * d, params, line), images) * probe)
            for t in 0.1 * t.flatten()
        ]
        return torch.stack([x.sum() for x in flat]).reshape(t.shape)

    check_slope(along, torch.zeros(1, dtype=torch.float64), 1.0, "the derivative")


def forward_meets_reverse(s: Subject, seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of apply in (params, images).

    Hessian-vector products, and with them all measures of sharpness, are wrong or fail.
    """
    x = (s.params(seed, torch.float64), s.batch(seed, 2, torch.float64))
    source = draw.generator(seed + 2)
    tangents = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), x)
    logits, forward = jvp(s.model.apply, x, tangents)
    u = torch.randn(logits.shape, generator=source).double()
    reverse = vjp(s.model.apply, *x)[1](u)
    terms = tree.leaves(tree.map(lambda a, b: (a * b).flatten(), reverse, tangents))
    right = torch.cat(terms)
    limit = 64 * unit(torch.float64) * (right.abs().sum() + (u * forward).abs().sum())
    agree((u * forward).sum(), right.sum(), limit, "<u, J v>", "<J^T u, v>")


def every_parameter_counts(s: Subject, seed: int) -> None:
    """d apply / d theta is not zero for any leaf theta.

    A parameter is drawn, counted and saved, but not used.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    slopes = tree.named(grad(_loss(s.model.apply))(params, images))
    dead = [name for name, leaf in slopes.items() if not bool(leaf.any())]
    if dead:
        raise AssertionError(f"without influence: {dead}")


def float32_follows_float64(s: Subject, seed: int) -> None:
    """apply in float32 is apply in float64 up to rounding times its condition.

    Something is computed in lower precision than the parameters.
    """
    params, images = s.params(seed, torch.float32), s.batch(seed, 2, torch.float32)
    wanted = s.model.apply(*tree.to((params, images), torch.float64))
    limit = _slack(s, params, images)
    agree(s.model.apply(params, images), wanted, 4 * limit, "apply in float32", "in float64")


def patches_permute(s: Subject, seed: int) -> None:
    """apply(params, images) = apply(P params, P images) for permutations P of the patches that move
    position embeddings and the operators' axes of keys along.

    A patch is known by something else than its embedding: tokens are flattened in another order
    than positions, or the class token is not first.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    config = s.model.config
    side, patch = config.image_size // config.patch_size, config.patch_size
    order = torch.randperm(side * side, generator=draw.generator(seed))
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    # (B, C, height, width) to (B, patches, C, p, p) and back
    cells = images.unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order].unflatten(1, (side, side))
    moved = cells.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)

    def permuted(name: str, leaf: Tensor) -> Tensor:
        if name == "pos_embed":
            return leaf[:, tokens]
        if "operator" not in name.split("."):
            return leaf
        for axis, size in enumerate(leaf.shape):
            if size == len(tokens):
                leaf = leaf.index_select(axis, tokens)
        return leaf

    wanted = s.model.apply(params, images)
    limit = 16 * _slack(s, params, images)
    got = s.model.apply(tree.map_named(permuted, params), moved)
    agree(got, wanted, limit, "apply(P params, P images)", "apply(params, images)")


def _tie(s: Subject, params: Params) -> Params:
    """The parameters of the blockwise model with the one operator in every block."""
    blocks = {
        name: {**block, "operator": params["operator"]} for name, block in params["blocks"].items()
    }
    rest = {name: value for name, value in params.items() if name not in ("operator", "blocks")}
    return {**rest, "blocks": blocks}


def universal_is_tied(s: Subject, seed: int) -> None:
    """apply_universal(theta) = apply_blockwise(theta in every block), and d universal / d theta is
    the sum over the blocks of d blockwise / d theta_l.

    Sharing does not share, or a block's gradient is lost.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    tied = _tie(s, params)
    limit = _slack(s, params, images)
    got, wanted = s.model.apply(params, images), s.tied.apply(tied, images)
    agree(got, wanted, limit, "the universal model", "the tied blockwise one")
    shared = grad(_loss(s.model.apply))(params, images)["operator"]
    blocks = grad(_loss(s.tied.apply))(tied, images)["blocks"]
    summed = tree.map(lambda *xs: torch.stack(xs).sum(0), *(b["operator"] for b in blocks.values()))
    for name, leaf in tree.named(shared).items():
        other = tree.named(summed)[name]
        size = 1024 * unit(torch.float64) * (1 + float(other.abs().max()))
        agree(leaf, other, size, f"the gradient of {name}", "the sum over blocks")


SEED: dict[str, Any] = {"seed": draw.seeds}
PAIR: dict[str, Any] = {"seed": draw.seeds, "dtype": draw.dtypes}
THREE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def _no_patches(s: Subject) -> str | None:
    params = s.model.init(draw.generator(0))
    config = getattr(s.model, "config", None)
    known = "pos_embed" in params and hasattr(config, "patch_size")
    return None if known else "has no `pos_embed` and no patches"


EVERYONE = (
    Property(keeps_shape_and_dtype, {**SEED, "dtype": THREE}),
    Property(init_follows_its_generator, SEED),
    Property(inputs_untouched, PAIR),
    Property(intermediates_agree, PAIR),
    Property(examples_stand_alone, {**PAIR, "poke": st.sampled_from([50.0, float("nan")])}),
    Property(vmap_is_a_loop, PAIR),
    Property(per_example_gradients, SEED),
    Property(gradient_is_right, SEED),
    Property(forward_meets_reverse, SEED),
    Property(every_parameter_counts, SEED),
    Property(float32_follows_float64, SEED),
    Property(patches_permute, SEED, unfit=_no_patches),
    Property(
        universal_is_tied,
        SEED,
        unfit=lambda s: None if s.tied is not None else "no blockwise model was given as `tied`",
    ),
)
