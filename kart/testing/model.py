"""Properties of a model: images to logits, as pure functions of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.func import grad, vmap

from kart import tree
from kart.testing import draw, laws
from kart.testing.compare import agree, agree_trees, close, same, spread, unit
from kart.testing.core import Property, Suite, dtypes_of, require, with_traits
from kart.testing.draw import Theta
from kart.testing.laws import vjp
from kart.testing.operator.subject import key_axes

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
    params, images = s.params(seed, torch.float32), s.batch(seed, 6, dtype)
    logits = s.model.apply(params, images)
    for name, view, wanted in (
        ("one image", images[0], logits[0]),
        ("leading axes (2, 3)", images.unflatten(0, (2, 3)), logits.unflatten(0, (2, 3))),
        ("leading axes (2, 2)", images[:4].unflatten(0, (2, 2)), logits[:4].unflatten(0, (2, 2))),
        ("leading axes (3, 1)", images[:3, None], logits[:3, None]),
        ("a batch of one", images[:1], logits[:1]),
    ):
        got = s.model.apply(params, view)
        # in half types other blockings round otherwise
        scale = float(logits.abs().max()) + 1
        eps = torch.finfo(dtype).eps * (4 if dtype in draw.HALF_TYPES else 64)
        agree(got, wanted, eps * scale, f"logits of {name}", "those of the batch")


def init_follows_its_generator(s: Subject, seed: int) -> None:
    """init(generator) is a function of the generator: finite float32 leaves under string keys.

    Parameters that come from elsewhere make runs that cannot be repeated.
    """
    laws.follows_its_generator(s.model.init, seed, lambda leaf: True, "")


def inputs_untouched(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """apply, intermediates and gradients write to neither parameters nor images, nor to anything
    global, give the same bits when asked again, the same logits under torch.no_grad(), and follow
    what is written into parameters.

    In-place changes and hidden states reach whoever else uses the model; what is kept of parameters
    is stale once an optimizer has written to them.
    """
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    with laws.world_untouched(), laws.untouched(params=params, images=images):
        logits, pullback = vjp(s.model.apply, params, images)
        pullback(torch.ones_like(logits))
        s.model.intermediates(params, images)
        same(s.model.apply(params, images), logits, "logits asked again", "logits")
    with torch.no_grad():
        got = s.model.apply(params, images)
        agree_trees(got, logits, 64, "under no_grad the logits", "the logits")
        moved = tree.map(lambda leaf: leaf * 0.5 + 0.01, (params, images))
        laws.keeps_nothing(s.model.apply, (params, images), moved)


def intermediates_agree(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """intermediates(params, images)["logits"] = apply(params, images), and every intermediate of an
    image in a batch is that of the image alone.

    What is looked at is not what is trained, or is of another image.
    """
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    aux = s.model.intermediates(params, images)
    wanted = s.model.apply(params, images)
    agree(aux["logits"], wanted, _slack(s, params, images), "logits of intermediates", "apply")
    laws.all_finite(aux)
    for b, image in enumerate(images):
        alone = s.model.intermediates(params, image)
        # what has no leading axes of images is of all
        own = {k: v[b] if v.dim() > alone[k].dim() else v for k, v in aux.items() if k in alone}
        agree_trees(own, alone, 64, f"of image {b} in a batch,", "of the image alone,")


def _blocks(names: Sequence[str], params: Params) -> dict[str, list[str]]:
    """The intermediates of each block in order: of the longest path shared with parameters."""
    paths = {
        ".".join(parts[:n])
        for parts in (name.split(".") for name in tree.named(params))
        for n in range(1, len(parts))
    }
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        owner = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
        block = next((path for path in owner if path in paths), None)
        if block is not None:
            found.setdefault(block, []).append(name)
    return found


def intermediates_are_of_their_block(s: Subject, seed: int) -> None:
    """What `intermediates` names by a block ("blocks.1.weights") changes with the parameters of
    that block, and not with those of later ones.

    A block's weights are shown under another's name: figures and measures are of the wrong block.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    aux = s.model.intermediates(params, images)
    blocks = _blocks(list(aux), params)
    for i, block in enumerate(blocks):
        source = draw.generator(seed + 3)

        def move(name: str, leaf: Tensor, block: str = block, source: Generator = source) -> Tensor:
            other = leaf + 0.5 * torch.randn(leaf.shape, generator=source).double()
            return other if name.startswith(f"{block}.") else leaf

        after = s.model.intermediates(tree.map_named(move, params), images)
        for j, other in enumerate(blocks):
            for name in blocks[other]:
                kept = torch.equal(after[name], aux[name])
                if kept != (j < i) and j <= i:
                    verb = "does not change" if kept else "changes"
                    raise AssertionError(f"{name} {verb} with the parameters of {block}")


def queries_come_before_keys(s: Subject, seed: int) -> None:
    """intermediates name by block i scores and weights (.., H, N, M) and values (.., H, M, d): if
    the weights are the transpose of what the operator makes of the scores, or what it makes of the
    transpose, they are what it makes of the scores.

    Rows are taken for columns: maps, spectra and entropies are those of the keys.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    aux = s.model.intermediates(params, images)
    for i, site in enumerate(s.model.sites):
        scores, weights, values = (
            aux[f"blocks.{i}.{name}"] for name in ("scores", "weights", "values")
        )
        if values.shape[-2] != scores.shape[-1]:
            raise AssertionError(f"blocks.{i}.values is {tuple(values.shape)}: wanted a row a key")
        if scores.shape[-2] != scores.shape[-1]:
            continue
        own = s.model.operator_params(params, i)
        made = site.operator.weights(own, scores)
        # windows and gates make others of them, which are none of the three
        differs = bool((weights - made).abs().amax() > 1e-9)
        for name, turned in (
            ("weights", made.mT),
            ("scores", site.operator.weights(own, scores.mT)),
        ):
            if differs and bool((weights - turned).abs().amax() <= 1e-9):
                raise AssertionError(f"blocks.{i}.{name} is transposed")


def layout_does_not_matter(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """apply sees numbers, not strides: images with channels last, parameters that are transposed,
    and any gradient handed to the backward count as their copies.

    A `.view` or a raw pointer assumes contiguous memory.
    """
    params, images = s.params(seed, dtype), s.batch(seed, 2, dtype)
    wanted, limit = s.model.apply(params, images), _slack(s, params, images)
    last = images.movedim(1, -1).contiguous().movedim(-1, 1)
    turned = tree.map(laws.transposed, params)
    for name, given in (
        ("with channels last", (params, last)),
        ("of transposed memory", (params, laws.transposed(images))),
        ("under transposed parameters", (turned, images)),
    ):
        agree(s.model.apply(*given), wanted, limit, f"logits {name}", "of copies")
    laws.any_cotangent(s.model.apply, params, images)


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
    """vmap(apply) over examples and over populations is the loop, whichever axis is mapped and
    within another vmap.

    Per-example gradients and populations of models are vmapped.
    """
    images = s.batch(seed, 3, dtype)
    members = [s.params(seed + i, dtype) for i in range(2)]
    wanted = torch.stack([s.model.apply(members[0], image) for image in images])
    limits = [_slack(s, member, images) for member in members]
    for how, got in laws.vmaps(s.model.apply, (None, 0), (members[0], images)).items():
        agree(got, wanted, limits[0], f"vmap{how} over examples", "the loop")
    wanted = torch.stack([s.model.apply(member, images) for member in members])
    for how, got in laws.vmaps(s.model.apply, (0, None), (tree.stack(members), images)).items():
        agree(got, wanted, torch.stack(limits), f"vmap{how} over a population", "the loop")


def _loss(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda params, images: apply(params, images).sin().sum()


def per_example_gradients(s: Subject, seed: int) -> None:
    """sum_b vmap(grad(f))(params, images[b]) = grad(sum_b f)(params, images).

    Examples mix in the backward.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 3, torch.float64)
    each = vmap(grad(_loss(s.model.apply)), in_dims=(None, 0))(params, images)
    whole = grad(_loss(s.model.apply))(params, images)
    summed = tree.map(lambda leaf: leaf.sum(0), each)
    agree_trees(summed, whole, 1024, "summed gradients of", "the gradient of")


def gradient_is_right(s: Subject, seed: int) -> None:
    """The derivative of the logits along any line of parameters is that of difference quotients.

    A gradient is cut or wrong somewhere in the model.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    laws.check_line(lambda p: s.model.apply(p, images), (params,), seed + 2, 0.1)


def curvature_is_right(s: Subject, seed: int) -> None:
    """The second derivative of the logits along any line of parameters is that of difference
    quotients of the first.

    Sharpness and loss landscapes need Hessians; a custom backward is often not differentiable
    itself, or silently constant.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)

    def slopes(params: Params) -> Tensor:
        return tree.ravel(grad(_loss(s.model.apply))(params, images))

    laws.check_line(slopes, (params,), seed + 2, 0.1)


def forward_meets_reverse(s: Subject, seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of apply in (params, images).

    Hessian-vector products, and with them all measures of sharpness, are wrong or fail.
    """
    x = (s.params(seed, torch.float64), s.batch(seed, 2, torch.float64))
    laws.adjoint(s.model.apply, x, seed + 2, 64.0)


def every_parameter_counts(s: Subject, seed: int) -> None:
    """d apply / d theta is not zero for any leaf theta.

    A parameter is drawn, counted and saved, but not used.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    laws.every_leaf_counts(lambda params: s.model.apply(params, images), params, seed + 2)


def float32_follows_float64(s: Subject, seed: int) -> None:
    """apply in float32 is apply in float64 up to rounding times its condition.

    Something is computed in lower precision than the parameters.
    """
    params, images = s.params(seed, torch.float32), s.batch(seed, 2, torch.float32)
    wanted = s.model.apply(*tree.to((params, images), torch.float64))
    limit = _slack(s, params, images)
    agree(s.model.apply(params, images), wanted, 4 * limit, "apply in float32", "in float64")


def half_follows_float32(s: Subject, seed: int, dtype: torch.dtype) -> None:
    """apply to images in bfloat16 or float16, with float32 parameters, is apply to the same numbers
    in float32, within 1e-2 of the norm of the logits and what one rounding of the parameters does.

    Scores, features or norms are computed in half precision, where roundings add up over blocks.
    """
    params, images = s.params(seed, torch.float32), s.batch(seed, 8, dtype)
    wanted = s.model.apply(params, images.float())
    # logits that cancel are known no better than their terms
    rounded = tree.map(lambda p: p.to(dtype).float(), params)
    slip = float((s.model.apply(rounded, images.float()) - wanted).norm())
    close(s.model.apply(params, images), wanted, 1e-2, f"logits in {dtype}", "in float32", slip)


def finite(s: Subject, seed: int, kind: str) -> None:
    """Logits, intermediates and gradients are finite in float32 for images that are black, of one
    colour, or 1e4 times as bright, and logits of alike images are alike.

    A norm divides by the spread of an image that has none, or a score overflows.
    """
    params, images = s.params(seed, torch.float32), s.batch(seed, 2, torch.float32)
    images = {"black": images * 0, "one colour": images * 0 + 0.7, "bright": images * 1e4}[kind]
    logits, pullback = vjp(s.model.apply, params, images)
    slopes = tree.named(pullback(torch.ones_like(logits)))
    found = {"logits": logits, **s.model.intermediates(params, images)}
    laws.all_finite(found | {f"gradient {name}": leaf for name, leaf in slopes.items()})
    if kind != "bright":
        limit = 64 * unit(torch.float32) * (float(logits.abs().max()) + 1)
        agree(logits[0], logits[1], limit, "logits of an image", "those of its copy")


def patches_permute(s: Subject, seed: int) -> None:
    """apply(params, images) = apply(P params, P images) for permutations P of the patches that move
    position embeddings and the operators' axes of keys along.

    A patch is known by something else than its embedding: tokens are flattened in another order
    than positions, or a class token is not first.
    """
    params, images = s.params(seed, torch.float64), s.batch(seed, 2, torch.float64)
    config = s.model.config
    side, patch = config.image_size // config.patch_size, config.patch_size
    order = torch.randperm(side * side, generator=draw.generator(seed))
    prefix = params["pos_embed"].shape[-2] - side * side
    tokens = torch.cat([torch.arange(prefix), order + prefix])
    # (B, C, height, width) to (B, patches, C, p, p) and back
    cells = images.unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order].unflatten(1, (side, side))
    moved = cells.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)

    # not by their length, which others may have too
    counts = len(tokens), prefix + (side + 1) ** 2
    axes = {
        f"{site.path}.{name}": found
        for site in getattr(s.model, "sites", ())
        for name, found in key_axes(site.operator, site.heads, counts).items()
    }

    def permuted(name: str, leaf: Tensor) -> Tensor:
        if name == "pos_embed":
            return leaf[..., tokens, :]
        for axis in axes.get(name, ()):
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
    agree_trees(shared, summed, 1024, "the gradient of", "the sum over blocks of")


SEED: dict[str, Any] = {"seed": draw.seeds}
PAIR: dict[str, Any] = {"seed": draw.seeds, "dtype": draw.dtypes}
KINDS = st.sampled_from(["black", "one colour", "bright"])


def _no_patches(s: Subject) -> str | None:
    params = s.model.init(draw.generator(0))
    config = getattr(s.model, "config", None)
    known = "pos_embed" in params and hasattr(config, "patch_size")
    if not known:
        return "has no `pos_embed` and no patches"
    own = any("operator" in name.split(".") for name in tree.named(params))
    if own and not hasattr(s.model, "sites"):
        return "has operators and no `sites`, which say what of them counts keys"
    # ConViT knows the class token by its block and patches by their offsets, too
    whole = params["pos_embed"].shape[-2] == getattr(config, "tokens", None)
    return None if whole else "has tokens without a position in `pos_embed`"


PROPERTIES = (
    Property(keeps_shape_and_dtype, {**SEED, "dtype": draw.all_types}),
    Property(init_follows_its_generator, SEED),
    Property(inputs_untouched, PAIR),
    Property(intermediates_agree, PAIR),
    Property(intermediates_are_of_their_block, SEED),
    Property(
        queries_come_before_keys,
        SEED,
        unfit=lambda s: None if hasattr(s.model, "sites") else "has no `sites` of operators",
    ),
    Property(layout_does_not_matter, PAIR),
    Property(examples_stand_alone, {**PAIR, "poke": st.sampled_from([50.0, float("nan")])}),
    Property(vmap_is_a_loop, PAIR, "vmap"),
    Property(per_example_gradients, SEED, "vmap"),
    Property(gradient_is_right, SEED),
    Property(curvature_is_right, SEED, "second_derivative"),
    Property(forward_meets_reverse, SEED, "forward_mode"),
    Property(every_parameter_counts, SEED),
    Property(float32_follows_float64, SEED),
    Property(half_follows_float32, {**SEED, "dtype": draw.half_types}),
    Property(finite, {**SEED, "kind": KINDS}),
    Property(patches_permute, SEED, unfit=_no_patches),
    Property(
        universal_is_tied,
        SEED,
        unfit=lambda s: None if s.tied is not None else "no blockwise model was given as `tied`",
    ),
)


def suite(
    obj: Any,
    *,
    images: Callable[[Generator, int], Tensor] | None = None,
    tied: Any = None,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Suite:
    """Puts a model through its suite.

    Args:
        obj: anything with `init(generator)`, `apply(params, images)` and
            `intermediates(params, images)`.
        images: `images(generator, size)` gives a float32 batch; None draws what `obj.config` takes.
        tied: the blockwise model of a universal one, of which it ties the operators.
    """
    require("model", obj, ("init", "apply", "intermediates"), "`kart.models.create` makes one.")
    config = getattr(obj, "config", None)
    if images is None and not hasattr(config, "image_size"):
        raise ValueError(
            "`model_suite` needs `images` for a model whose config has no `image_size`, got None. "
            "Pass a function from (generator, size) to a batch of images."
        )

    def drawn(generator: Generator, size: int) -> Tensor:
        shape = (size, config.in_channels, config.image_size, config.image_size)  # pyright: ignore[reportOptionalMemberAccess]
        return torch.randn(shape, generator=generator)

    declared = with_traits("model", PROPERTIES, laws.TRANSFORMS, traits)
    subject = Subject(obj, images or drawn, tied, declared, dtypes_of(dtype))
    named = name or f"model with {getattr(config, 'operator', type(obj).__name__)}"
    return Suite("model", named, subject, declared, PROPERTIES)
