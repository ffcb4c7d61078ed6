"""What the models are made of: embedding, heads, attention, residual blocks, classifier.

Parameters carry timm's names. The residual stream keeps the precision of the parameters; attention
and MLP compute in the dtype of the images.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from kart import layers
from kart.layers import merge_heads
from kart.models.model import Columnar, Model, Site, find, place
from kart.operators.contract import Factors, draw
from kart.operators.projected import factors_of, pays, projected

Params = dict[str, Any]
Attend = Callable[..., Tensor]  # (q, k, v, mask=None) to (..., H, N, d)


def check_images(images: Tensor, channels: int, size: int) -> None:
    """Refuses what is not floating-point images `(..., channels, size, size)`."""
    if not isinstance(images, Tensor) or not images.dtype.is_floating_point:
        raise ValueError(
            f"`apply` needs a tensor of floating-point images, got {type(images).__name__} of "
            f"{getattr(images, 'dtype', 'no dtype')}. "
            "Scale them with kart.data.normalise."
        )
    if images.dim() < 3 or tuple(images.shape[-3:]) != (channels, size, size):
        raise ValueError(
            f"`apply` needs images (..., {channels}, {size}, {size}), got shape "
            f"{tuple(images.shape)}. Resize them, or create the model for this size."
        )


def check_params(params: Params, sites: Sequence[Site], depths: Mapping[str, int]) -> None:
    """Refuses parameters without the operators of `sites`, or with other numbers of blocks than
    `depths` says by dotted path; those of more would be left out without a word.
    """

    def at(path: str) -> Any:
        node: Any = params
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    wrong = [f"no {site.path!r}" for site in sites if at(site.path) is None]
    counts = {path: len(at(path) or ()) for path in depths}
    wrong += [
        f"{counts[path]} blocks for {count} at {path!r}"
        for path, count in depths.items()
        if counts[path] != count
    ]
    if wrong:
        raise ValueError(
            f"`apply` needs the parameters of this model, got {wrong[-1]}. They are of another "
            "depth, sharing or kind of model: create it with the config that they were stored with."
        )


def with_positions(params: Params, x: Tensor) -> Tensor:
    """Tokens `x (..., N, D)` and the embeddings of their positions."""
    positions = params["pos_embed"][0]
    if positions.shape[-2] != x.shape[-2]:
        raise ValueError(
            f"`apply` needs a `pos_embed` of {x.shape[-2]} tokens, got one of "
            f"{positions.shape[-2]}, for images or patches of another size. Move the parameters "
            "with `kart.models.resize`, or create the model for their size."
        )
    return x + positions


def prepend_class(params: Params, x: Tensor) -> Tensor:
    """The class token before tokens `(..., N, D)`: `(..., 1 + N, D)`."""
    token = params["cls_token"][0].to(x.dtype)
    return torch.cat([token.expand(*x.shape[:-2], *token.shape), x], dim=-2)


def split_heads(qkv: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """`(..., N, parts D)` to `parts` tensors `(..., H, N, d)`."""
    split = qkv.split(qkv.shape[-1] // parts, -1)
    return tuple(layers.split_heads(x, heads) for x in split)


def attention_init(generator: Generator, size: int, bias: bool = True) -> Params:
    """Parameters of `attention`, with a bias of queries, keys and values or without."""
    return {
        "qkv": layers.linear_init(generator, size, 3 * size, bias),
        "proj": layers.linear_init(generator, size, size),
    }


def attention(
    params: Params,
    x: Tensor,
    heads: int,
    attend: Attend,
    factors: Factors | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention, `(..., N, D)` to `(..., N, D)`.

    `factors` are those of the weights of (q, k), where they are a product (see
    `kart.operators.projected`) and nothing is masked; `mask` is as `attend` takes it.
    """
    if factors is not None and mask is None and pays(factors, x, heads):
        size = x.shape[-1]
        parts = {name: leaf.split([2 * size, size]) for name, leaf in params["qkv"].items()}
        queries_keys, value = ({name: x[i] for name, x in parts.items()} for i in (0, 1))
        q, k = split_heads(layers.linear(queries_keys, x), heads, 2)
        return projected(factors.of(q, k), x, value, params["proj"])
    q, k, v = split_heads(layers.linear(params["qkv"], x), heads)
    return layers.linear(params["proj"], merge_heads(attend(q, k, v, mask)))


def attend_at(site: Site, params: Params, look: dict[str, Tensor] | None, name: str) -> Attend:
    """`attend` of the operator at `site`, with its parameters from those of the model.

    With `look` the weights are materialised and left there with scores and values, as
    "<name>.weights", "<name>.scores" and "<name>.values"; without, they are streamed.
    """
    operator, own = site.operator, find(params, site.path)

    def streamed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return operator.attend(own, q, k, v, mask)

    def looked_at(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        assert look is not None
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if operator.traits.get("of_scores", True):
            weights = operator.weights(own, scores, mask)
        else:  # what it makes of the identity, as it is linear in the values
            keys = v.shape[-2]
            identity = torch.eye(keys, dtype=v.dtype, device=v.device)
            weights = operator.attend(own, q, k, identity.expand(*v.shape[:-1], keys), mask)
        look[f"{name}.scores"], look[f"{name}.weights"] = scores, weights
        look[f"{name}.values"] = v
        return weights @ v

    return streamed if look is None else looked_at


def attention_at(
    site: Site, params: Params, look: dict[str, Tensor] | None, name: str
) -> Callable[..., Tensor]:
    """`attention` (parameters of its projections, x, mask=None) with the operator at `site`."""
    factors = factors_of(site.operator) if look is None else None
    if factors is not None:
        factors = factors._replace(of=functools.partial(factors.of, find(params, site.path)))
    attend = attend_at(site, params, look, name)
    return functools.partial(attention, heads=site.heads, attend=attend, factors=factors)


def block_init(generator: Generator, size: int, hidden: int, attn: Callable[..., Params]) -> Params:
    """Parameters of `block` with those of its attention, `attn(generator, size)`."""
    return {
        "norm1": layers.layer_norm_init(size),
        "attn": attn(generator, size),
        "norm2": layers.layer_norm_init(size),
        "mlp": layers.mlp_init(generator, size, hidden),
    }


def block(
    params: Params,
    x: Tensor,
    attn: Callable[[Params, Tensor], Tensor],
    dtype: torch.dtype,
    eps: float = 1e-6,
) -> Tensor:
    """A pre-norm residual block: `x + attn(norm(x))`, then `x + mlp(norm(x))`, `(..., N, D)`."""
    x = x + attn(params["attn"], layers.layer_norm(params["norm1"], x, eps).to(dtype))
    return x + layers.mlp(params["mlp"], layers.layer_norm(params["norm2"], x, eps).to(dtype))


def classifier_init(
    generator: Generator, config: Columnar, tokens: int, attns: Sequence[Callable[..., Params]]
) -> Params:
    """Parameters of a model that `classify` ends, without those of its operators: `tokens` have
    positions, and each block has the attention of `attns` (see `block_init`).
    """
    size, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    channels, patch = config.in_channels, config.patch_size
    return {
        "patch_embed": layers.patch_embed_init(generator, channels, patch, size),
        "cls_token": layers.truncated_normal(generator, 1, 1, size),
        "pos_embed": layers.truncated_normal(generator, 1, tokens, size),
        "blocks": {
            str(i): block_init(generator, size, hidden, attn) for i, attn in enumerate(attns)
        },
        "norm": layers.layer_norm_init(size),
        "head": layers.linear_init(generator, size, config.num_classes),
    }


def classify(params: Params, x: Tensor) -> Tensor:
    """Logits `(..., C)` of the class token, the first of `x (..., N, D)`."""
    return layers.linear(params["head"], layers.layer_norm(params["norm"], x[..., 0, :]))


Forward = Callable[[Params, Tensor, dict[str, Tensor] | None], Any]


def model(
    config: Any,
    init: Callable[[Generator], Params],
    forward: Forward,
    sites: Sequence[Site],
    depths: Mapping[str, int],
) -> Model:
    """The Model of `forward(params, images, look)`, which gives logits, or maps by name, and fills
    `look` where it is not None; `init` draws all but the operators, `depths` as in `check_params`.
    """

    def checked(params: Params, images: Tensor, look: dict[str, Tensor] | None) -> Any:
        check_images(images, config.in_channels, config.image_size)
        check_params(params, sites, depths)
        return forward(params, images, look)

    def apply(params: Params, images: Tensor) -> Any:
        return checked(params, images, None)

    def intermediates(params: Params, images: Tensor) -> dict[str, Tensor]:
        look: dict[str, Tensor] = {}
        found = checked(params, images, look)
        return {**look, **(found if isinstance(found, dict) else {"logits": found})}

    def drawn(generator: Generator) -> Params:
        params = init(generator)
        # after all else: models that differ in the operator alone start from the same backbone
        for site in {site.path: site for site in sites}.values():
            own = draw(site.operator, generator, site.heads, site.tokens)
            params = place(params, site.path, own)
        return params

    return Model(config, drawn, apply, intermediates, tuple(sites))
