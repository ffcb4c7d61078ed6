"""KArAt in models of transformers, through its attention interface.

    kart.bridges.transformers.register("kart")
    model = AutoModel.from_config(config, attn_implementation="kart")
    kart.bridges.transformers.attach(model, "G3B", tokens=197)

`register` names the attention and the masks, `attach` gives every attention layer its operator.
"""

import importlib
from typing import Any

import torch
from torch import Generator, Tensor

from kart import nn, operators
from kart.bridges import arguments

NAME = "kart_operator"


def check_cached(
    op: operators.Operator, keys: int, mask: Tensor | None, window: int | None
) -> None:
    """Raises ValueError where the keys of a cache are not where the operator takes them to be, or
    later tokens change what it cached.
    """
    placed = op.traits.get("by_place") or not op.traits.get("length_free")
    wrong = None
    if op.traits.get("by_length"):
        wrong = "weights by the number of all tokens, which a cache does not know"
    elif placed and window is not None and keys >= window:
        wrong = f"functions of the places of keys, which a window of {window} moves"
    elif op.traits.get("queries_last") and mask is not None and not mask[..., -1, -1].any():
        wrong = "functions of the distance from the last key, behind which a static cache has room"
    if wrong:
        raise ValueError(
            f"`attention` cannot run {op.name} with this cache: it has {wrong}. Generate with "
            "use_cache=False."
        )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in an attention layer: the output `(B, N, H, d)`, and the weights
    `(B, H, N, M)` where they are asked for.

    Args:
        module: the layer, which `attach` has given an operator.
        query: (B, H, N, d).
        key, value: (B, G, M, d), G a divisor of H.
        attention_mask: boolean, True = attend, or of 0 and -inf; None is what `is_causal` says.
        scaling: of the scores; default d^-1/2.
        dropout: 0, for there are no weights to drop.
        is_causal: default what the layer says, as for transformers' own functions.
        kwargs: what else the model hands to every such function. `output_attentions` is heeded;
            what would change the result and is not known here is refused.
    """
    op = getattr(module, NAME, None)
    if not isinstance(op, nn.Operator):
        raise ValueError(
            f"`attention` needs layers with an operator, got {type(module).__name__} without. Call "
            "`kart.bridges.transformers.attach(model, operator, tokens)` after making the model."
        )
    arguments.check_no_dropout("attention", "dropout", dropout)
    for name in ("softcap", "s_aux", "sinks", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`attention` needs a model without `{name}`, got one. It belongs to softmax: "
                "choose another model or attn_implementation."
            )
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    queries, keys = query.shape[-2], key.shape[-2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            attention_mask = arguments.from_additive("attention", "attention_mask", attention_mask)
        attention_mask = attention_mask[..., :keys]
    elif queries > 1 and causal:
        if queries != keys:
            raise ValueError(
                f"`attention` needs a mask for {queries} causal queries of {keys} keys, got None. "
                "Register the masks too: `kart.bridges.transformers.register(name)`."
            )
        attention_mask = nn.causal_mask(queries, keys, query.device)
    if causal and queries != keys:
        check_cached(op.op, keys, attention_mask, kwargs.get("sliding_window"))
    out = op(query, key, value, attention_mask).transpose(1, 2).contiguous()
    if not kwargs.get("output_attentions"):
        return out, None
    return out, op.weights(query, key, attention_mask)


def register(name: str = "kart") -> None:
    """Registers `attention` and the masks of "sdpa" with transformers as an `attn_implementation`.

    Without masks under the same name transformers would pass none, and drop the causal one.
    """
    try:
        # by name: to a type checker this file is `transformers`, too
        library = importlib.import_module("transformers")
        sdpa_mask = importlib.import_module("transformers.masking_utils").sdpa_mask
    except ImportError as error:
        raise ValueError(
            f"`register` needs transformers >= 4.53, which does not import here ({error}). Run "
            "`pip install transformers`."
        ) from error

    def masks(**given: Any) -> Tensor | None:
        # of other queries than keys sdpa leaves the mask of a static cache to a flag
        skip = given.get("q_length") == given.get("kv_length")
        given["allow_is_causal_skip"] = given.get("allow_is_causal_skip", True) and skip
        return sdpa_mask(**given)

    library.AttentionInterface.register(name, attention)
    library.AttentionMaskInterface.register(name, masks)


def heads_of(layer: torch.nn.Module) -> int | None:
    """The number of heads of an attention layer of transformers, None for other modules."""
    if not hasattr(layer, "is_causal") or not hasattr(layer, "config"):
        return None
    names = ("num_heads", "num_attention_heads")
    found = [getattr(one, n, None) for one in (layer, layer.config) for n in names]
    return next((n for n in found if isinstance(n, int)), None)


def passed_over(layer: torch.nn.Module) -> str | None:
    """The `attn_implementation` of a layer where it is one of transformers' own, which would leave
    an operator aside.
    """
    name = getattr(layer.config, "_attn_implementation", None)
    if name is None:
        return None
    library = importlib.import_module("transformers")
    found = library.AttentionInterface().get(name)
    own = found is None or found.__module__.startswith("transformers.")
    return name if own else None


def without_sdpa(model: torch.nn.Module, name: str) -> str | None:
    """The class of the innermost model around the layer `name`, where it is one of transformers'
    that cannot run with "sdpa", whose masks `register` takes: it may add them to its scores.
    """
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if (supported := getattr(around, "_supports_sdpa", None)) is not None:
            return None if supported else type(around).__name__
    return None


def attach(
    model: torch.nn.Module,
    operator: str | operators.Operator = "G3B",
    tokens: int | None = None,
    *,
    generator: Generator | None = None,
    sharing: str | None = None,
) -> list[str]:
    """Gives every attention layer of a model an operator, as its submodule `kart_operator`; returns
    the names of the layers.

    Before the optimiser is made and weights are loaded: `from_pretrained` makes a model without
    operators and leaves out theirs, so load a `state_dict` of a model with operators behind this. A
    layer is a module with `is_causal` and `config`, as transformers' own have.

    Args:
        model: of transformers.
        operator: a spec string or an Operator.
        tokens: the number of keys; None for operators of any length.
        generator: draws the parameters; None is a fresh one of seed 0.
        sharing: "blockwise" or "universal"; default what the spec says, else blockwise.
    """
    op, universal = arguments.operator_and_sharing("attach", operator, sharing)
    found = {name: layer for name, layer in model.named_modules() if heads_of(layer) is not None}
    if not found:
        raise ValueError(
            f"`attach` needs a model with attention layers (with `is_causal` and `config`), got "
            f"{type(model).__name__} without. Update transformers, or set `{NAME}` of its layers."
        )
    for name, layer in found.items():
        if hasattr(layer, NAME):
            raise ValueError(
                f"`attach` needs layers without an operator, got {name!r} with one, which an "
                f"optimiser may hold. Make the model anew, or delete `{NAME}` of its layers first."
            )
        if (other := passed_over(layer)) is not None:
            raise ValueError(
                f"`attach` needs layers that call kart's attention, got {name!r} with "
                f"attn_implementation={other!r}, which would leave its operator aside. Make the "
                'model with attn_implementation="kart", the name given to `register`, or attach to '
                "the part of it that has that."
            )
        if (around := without_sdpa(model, name)) is not None:
            raise ValueError(
                f'`attach` needs a model that runs with attn_implementation="sdpa", got {name!r} '
                f"in {around}, which does not: masks that are boolean, or left out where a layer "
                "is causal, may mean something else there. Choose another model."
            )
    heads = [heads_of(layer) or 0 for layer in found.values()]
    if universal and len(set(heads)) > 1:
        raise ValueError(
            f"`attach` needs layers of as many heads for universal sharing, got {set(heads)}. "
            "Share blockwise."
        )
    source = nn.seeded(generator)
    one: nn.Operator | None = None
    for layer, count in zip(found.values(), heads, strict=True):
        like = next(layer.parameters(), torch.zeros(()))
        if one is None or not universal:
            one = nn.operator(op, count, tokens, generator=source, device=like.device)
        setattr(layer, NAME, one)
    if universal and one is not None and hasattr(model, "_tied_weights_keys"):
        # else `save_pretrained` takes what layers share for a mistake
        first, *others = (f"{name}.{NAME}" for name in found)
        leaves = [name for name, _ in one.named_parameters()]
        ties = {f"{other}.{leaf}": f"{first}.{leaf}" for other in others for leaf in leaves}
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}  # type: ignore
    return list(found)
