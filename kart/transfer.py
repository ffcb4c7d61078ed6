"""Training that begins with another model: with its weights, or with its attention alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Generator, Tensor

from kart import checkpoint, models, tree
from kart.models import Model
from kart.models.model import find, place
from kart.operators import Operator
from kart.operators.sums import CHANGED, DRAWN, meaning

Params = dict[str, Any]


TEACHER = "teacher"  # where a student of `with_attention` has the parameters of its teacher


class Begun(NamedTuple):
    """Parameters to begin with, and which of them are not the donor's but drawn."""

    params: Params
    drawn: list[str]


def begin(
    model: Model,
    donor: Mapping[str, Any],
    generator: Generator,
    like: Model | None = None,
    same_classes: bool = True,
) -> Begun:
    """Parameters of `model` with those of a donor, named as timm's or kart's.

    Positions, and the donor's operators, are resized to the images of `model`. Filters of grey
    images on colour ones see the mean of the channels; those of colour on grey ones see the grey in
    every channel. The classifier is drawn anew where the donor's has other classes, or none.
    Operators that the donor lacks are drawn; low-rank ones with `base=softmax` start with a mix of
    zero, so that on a donor with softmax the logits are the donor's.

    Args:
        model: what will be trained.
        donor: a state dict, or nested parameters.
        generator: draws what the donor does not give.
        like: the donor's model, where it is one of kart's; without it operators must fit as they
            are, and are taken for those of `model`.
        same_classes: False replaces the classifier in any case.

    Raises:
        ValueError: names every leaf that is missing, unexpected or of another shape, or an operator
            of the donor whose parameters mean something else.
    """
    params = dict(donor)
    if like is not None:
        _check_operators("begin", model, like, CHANGED)
    if like is not None and like.config.patch_size == model.config.patch_size:
        nested = tree.unflatten(tree.named(params))
        _, params = models.resize(like, nested, model.config.image_size)
    named: Mapping[str, Any] = checkpoint.donor_leaves(model, tree.named(params))
    if not same_classes:
        named = {name: leaf for name, leaf in named.items() if name.split(".")[0] != "head"}
    named = _with_channels(named, model.config.in_channels)
    found = checkpoint.from_timm(model, named, strict_head=False, generator=generator, resize=True)
    mine = tree.named(found)
    fits = {name for name, leaf in mine.items() if _shape(named.get(name)) == leaf.shape}
    return Begun(found, [name for name in mine if name not in fits and name != "pos_embed"])


def _check_operators(function: str, model: Model, like: Model, free: frozenset[str]) -> None:
    """Refuses a donor with parameters of other functions, which their shapes need not tell."""
    for ours, theirs in zip(model.sites, like.sites, strict=False):
        learned = all(one.operator.traits.get("learned", True) for one in (ours, theirs))
        told = [meaning(one.operator, free, one.tokens) for one in (ours, theirs)]
        if learned and ours.path == theirs.path and told[0] != told[1]:
            raise ValueError(
                f"`{function}` needs a donor with the operators of the model, got "
                f"{theirs.operator.name!r} for {ours.operator.name!r} at {ours.path!r}: its "
                f"parameters mean something else. {checkpoint.OTHER_OPERATORS}"
            )


FILTERS = "patch_embed.proj.weight"


def channels_of(donor: Mapping[str, Any]) -> int | None:
    """The channels of a donor's images, by its first filters; None where they are not found."""
    shape = _shape(tree.named(dict(donor)).get(FILTERS))
    return shape[1] if shape is not None and len(shape) == 4 else None


def _with_channels(named: Mapping[str, Any], channels: int) -> Mapping[str, Any]:
    """The donor with its first filters made for grey or colour images."""
    if {channels_of(named), channels} != {1, 3}:
        return named
    filters = named[FILTERS]
    spread = filters.expand(-1, 3, -1, -1) / 3
    return {**named, FILTERS: spread if channels == 3 else filters.sum(1, keepdim=True)}


def _shape(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Tensor) else None


def given() -> Operator:
    """The operator whose weights are its parameters `{"weights": (..., H, N, M)}`, whatever the
    scores are: `with_attention` puts a teacher's there.
    """

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        return {}

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return taught(params, mask).to(scores.dtype)

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return taught(params, mask).to(v.dtype) @ v

    options = {"kind": "given"}
    traits = {"learned": False, "length_free": True, "whole": True}
    return Operator("given", init, weights, attend, options=options, traits=traits)


def taught(params: Params, mask: Tensor | None) -> Tensor:
    """The weights among the parameters of `given`; ValueError where there are none, or a mask."""
    if mask is not None:
        raise ValueError("`given` needs no mask, got one: the weights are the teacher's.")
    if "weights" not in params:
        raise ValueError(
            "`given` needs weights among its parameters, got none. Put the model into "
            "`with_attention`, whose teacher has them."
        )
    return params["weights"]


def with_attention(student: Model, teacher: Model) -> Model:
    """`student`, in each block of which the heads attend with the weights that the teacher has for
    the same images, and learn all else.

    Its parameters are the student's, and below `teacher` those of the teacher, which get no
    gradients. Queries and keys of the student, and the gates and positions of a ConViT, are without
    effect. The paper trains ViT-Tiny so on the attention of ViT-Tiny with G3B.

    Args:
        student: a model made with `operator=given()`.
        teacher: a model of as many blocks, heads and tokens, for the same images.

    Reference: Li et al., "On the surprising effectiveness of attention transfer for vision
        transformers", 2024, arXiv:2411.09702 (there "attention copy").
    """
    odd = [one.name for one in student.operators if one.options.get("kind") != "given"]
    if odd or len({site.path for site in student.sites}) < len(student.sites):
        raise ValueError(
            "`with_attention` needs a student whose blocks have `given()` operators of their own, "
            f"got {odd[0] if odd else 'one that all share'}. Create it with operator=given()."
        )
    shapes = [[(one.heads, one.tokens) for one in m.sites] for m in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`with_attention` needs a teacher of {len(shapes[0])} blocks with (heads, tokens) "
            f"{shapes[0][0]}, got {len(shapes[1])} with {shapes[1][0]}. Match the two models."
        )

    def init(generator: Generator) -> Params:
        return {**student.init(generator), TEACHER: teacher.init(generator)}

    def looking(params: Params, images: Tensor) -> Params:
        seen = teacher.intermediates(params[TEACHER], images)
        params = {name: node for name, node in params.items() if name != TEACHER}
        for i, site in enumerate(student.sites):
            own = find(params, site.path)
            own = {**own, "weights": seen[f"blocks.{i}.weights"].detach()}
            params = place(params, site.path, own)
        return params

    def apply(params: Params, images: Tensor) -> Any:
        return student.apply(looking(params, images), images)

    def intermediates(params: Params, images: Tensor) -> dict[str, Tensor]:
        return student.intermediates(looking(params, images), images)

    return student._replace(init=init, apply=apply, intermediates=intermediates, call=None)


def teach(
    params: Params, teacher: Model, donor: Mapping[str, Any], like: Model | None = None
) -> Params:
    """`params` of `with_attention` with those of a donor for the teacher's.

    Its classifier plays no part: where it has other classes the drawn one stays.

    Raises:
        ValueError: for a donor that is not such a model, or has other operators.
    """
    if like is not None:
        _check_operators("attention_from", teacher, like, DRAWN)
    donor = checkpoint.donor_leaves(teacher, tree.named(dict(donor)))
    rest = {name: leaf for name, leaf in donor.items() if name.split(".")[0] != "head"}
    wrong = "`attention_from` needs a teacher with the operators of `operator`, got one"
    channels = channels_of(donor)
    if channels not in (None, teacher.config.in_channels):
        raise ValueError(
            f"{wrong} for images of {channels} channels. Give one of as many as the data's."
        )
    try:
        head = tree.named({"head": params[TEACHER]["head"]})
        found = begin(teacher, {**rest, **head}, Generator(), like)
    except ValueError as error:
        raise ValueError(f"{wrong} that does not fit: {error}") from None
    if found.drawn:
        raise ValueError(
            f"{wrong} without {found.drawn[0]!r}. Give the teacher's operator, model and sizes."
        )
    return {**params, TEACHER: found.params}
