"""Pytrees of tensors: map, dotted paths, stack, norm; the one user of torch's private pytrees."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

Tree = Any


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001
    """Applies `fn` to every leaf of `tree` and the matching ones of `rest`, keeping the structure.

    >>> map(lambda a, b: a + b, {"x": 1, "y": {"z": 2}}, {"x": 10, "y": {"z": 20}})
    {'x': 11, 'y': {'z': 22}}
    """
    first, spec = _pytree.tree_flatten(tree)
    columns = [first, *(_matching_leaves(tree, spec, other) for other in rest)]
    return _pytree.tree_unflatten([fn(*column) for column in zip(*columns, strict=True)], spec)


def _matching_leaves(tree: Tree, spec: _pytree.TreeSpec, other: Tree) -> list[Any]:
    found, found_spec = _pytree.tree_flatten(other)
    if found_spec == spec:
        return found
    # dicts whose keys stand in another order have another spec, but are the same tree
    try:
        found = spec.flatten_up_to(other)
    except ValueError:
        found = [other]
    if len(found) == spec.num_leaves and all(_pytree.tree_is_leaf(x) for x in found):
        return found
    here, there = named(tree), named(other)
    odd = sorted(here.keys() ^ there.keys())
    raise ValueError(
        f"`tree.map` needs trees of one structure, got {len(here)} and {len(there)} leaves, "
        + (f"of which only one tree has {', '.join(odd[:8])}" if odd else "in other containers")
        + ". Build them with the same `init`."
    )


def leaves(tree: Tree) -> list[Any]:
    """Leaves of `tree`, in a fixed order."""
    return _pytree.tree_leaves(tree)


def with_leaves(tree: Tree, values: Iterable[Any]) -> Tree:
    """`tree` with other leaves, in the order of `leaves`."""
    return _pytree.tree_unflatten(values, _pytree.tree_structure(tree))


def _name(path: Sequence[Any]) -> str:
    keys = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
    return ".".join(str(key) for key in keys)


def named(tree: Tree) -> dict[str, Any]:
    """Leaves of `tree` by dotted path.

    >>> named({"blocks": {"0": {"bias": 1}}, "head": 2})
    {'blocks.0.bias': 1, 'head': 2}
    """
    pairs = _pytree.tree_flatten_with_path(tree)[0]
    found = {_name(path): leaf for path, leaf in pairs}
    if len(found) < len(pairs):
        twice = next(name for name in found if [_name(path) for path, _ in pairs].count(name) > 1)
        raise ValueError(
            f"`tree.named` needs a path for each leaf, got two at {twice!r}. Rename a key that has "
            "a dot in it."
        )
    return found


def map_named(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """As `map`, with each leaf's dotted path as the first argument of `fn`."""
    return _pytree.tree_map_with_path(lambda path, leaf: fn(_name(path), leaf), tree)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted path: what `named` gives, for dicts alone and at once.

    >>> flatten({"blocks": {"0": {"bias": 1}}, "head": 2})
    {'blocks.0.bias': 1, 'head': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from dotted paths, the inverse of `named` on nested dicts; empty ones, which
    have no leaf, do not come back.

    >>> unflatten({"blocks.0.bias": 1, "head": 2})
    {'blocks': {'0': {'bias': 1}}, 'head': 2}
    """
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = root
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"`tree.unflatten` needs paths none of which begins another, got {path!r} beside "
                "such a one. Rename it."
            )
        node[last] = leaf
    return root


def stack(trees: Sequence[Tree], dim: int = 0) -> Tree:
    """One tree whose leaves are those of `trees`, stacked along a new axis `dim`."""
    if not trees:
        raise ValueError("`tree.stack` needs at least one tree, got none.")
    return map(lambda *xs: torch.stack(xs, dim), *trees)


def unstack(tree: Tree, dim: int = 0) -> list[Tree]:
    """The list of trees that `stack` was given."""
    if any(not -leaf.dim() <= dim < leaf.dim() for leaf in leaves(tree)):
        raise ValueError(f"`tree.unstack` needs leaves with an axis {dim}, got one without.")
    sizes = {leaf.shape[dim] for leaf in leaves(tree)}
    if len(sizes) != 1:
        raise ValueError(
            f"`tree.unstack` needs leaves of one size along axis {dim}, got sizes {sorted(sizes)}."
        )
    return [map(lambda x, i=i: x.select(dim, i), tree) for i in range(sizes.pop())]


def norm(tree: Tree) -> Tensor:
    """Global Euclidean norm of all leaves, `()`, accumulated in at least float32."""
    norms = [
        torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in leaves(tree)
    ]
    if not norms:
        raise ValueError("`tree.norm` needs at least one leaf, got an empty tree.")
    # the norm of norms: unlike the root of a sum of squares, its derivative at zero is not NaN
    widest = functools.reduce(torch.promote_types, (x.dtype for x in norms))
    return torch.linalg.vector_norm(torch.stack([x.to(widest) for x in norms]))


def ravel(tree: Tree) -> Tensor:
    """All leaves as one vector `(P,)`, in the order of `leaves`; `unravel` is the inverse.

    >>> ravel({"a": torch.ones(2), "b": torch.zeros(1, 1)})
    tensor([1., 1., 0.])
    """
    found = leaves(tree)
    if not found:
        raise ValueError("`tree.ravel` needs at least one leaf, got an empty tree.")
    return torch.cat([x.reshape(-1) for x in found])


def unravel(vector: Tensor, like: Tree) -> Tree:
    """`vector (..., P)` as a tree shaped like `like`, each leaf `(..., *shape)` of its dtype."""
    sizes = [x.numel() for x in leaves(like)]
    if vector.dim() < 1 or vector.shape[-1] != sum(sizes):
        raise ValueError(
            f"`tree.unravel` needs a vector (..., {sum(sizes)}) for this tree, got shape "
            f"{tuple(vector.shape)}. Make it with `tree.ravel` of a tree of the same structure."
        )
    lead, parts = vector.shape[:-1], iter(vector.split(sizes, dim=-1))
    return map(lambda x: next(parts).reshape((*lead, *x.shape)).to(x.dtype), like)


def size(tree: Tree) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.numel() for leaf in leaves(tree))


def check_floating(function: str, tree: Tree) -> None:
    """Raises ValueError where a leaf of `tree` is not of floating point, and has no derivatives."""
    for name, leaf in named(tree).items():
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_floating_point:
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"`{function}` needs parameters of floating point, got {kind} at {name!r}. "
                "Hold it in the loss, outside of the parameters."
            )


def to(tree: Tree, *args: Any, **kwargs: Any) -> Tree:
    """Every leaf moved as by `Tensor.to`."""
    return map(lambda x: x.to(*args, **kwargs), tree)


def onto(tree: Tree, device: str | torch.device) -> Tree:
    """Every leaf on `device`. What a GPU is given of the CPU goes through pinned memory, and so
    waits for nothing that the GPU has still to do.
    """
    gpu = torch.device(device).type == "cuda"

    def moved(x: Tensor) -> Tensor:
        if gpu and x.device.type == "cpu":
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device)

    return map(moved, tree)
