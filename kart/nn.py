"""Row operators as `torch.nn` modules: thin, over the pure functions of `kart.operators`.

A module owns parameters, nothing else: names are those of the operator's tree (`units.coefs`), and
every forward hands that tree to the pure functions. Nothing is drawn from torch's global generator:
a module draws from the `generator` it is given, or from a fresh one of seed 0, so that modules made
without one start alike. Give one generator to all modules of a model.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kart import layers, operators, schema, tree
from kart.kernels.transforms import autocasting
from kart.layers import merge_heads, split_heads
from kart.operators import Cache
from kart.operators.contract import check_mask, check_padded, check_qkv, draw
from kart.operators.resize import Tokens, lattice
from kart.operators.sums import CHANGED, meaning, same_meaning

Params = dict[str, Any]


# --- tensors --------------------------------------------------------------------------------------


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values `(..., G, M, d)` of grouped-query attention for `heads` heads, each group's
    repeated for the heads / G queries that share it.
    """
    whole = schema.fits(heads, int) and heads > 0
    if not whole or x.dim() < 3 or not x.shape[-3] or heads % x.shape[-3]:
        raise ValueError(
            f"`repeat_heads` needs `x` (..., G, M, d) with {heads} heads divisible by G, got "
            f"{tuple(x.shape)}. Choose heads that divide."
        )
    groups = x.shape[-3]
    return x if groups == heads else x.repeat_interleave(heads // groups, -3)


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Boolean `(N, M)`, True where a query may attend: the queries are the last N of the M tokens,
    and each sees itself and those before.

    >>> causal_mask(2, 3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    if not 0 <= queries <= keys:
        raise ValueError(
            f"`causal_mask` needs no more queries than keys, got {queries} and {keys}. The queries "
            "are the last tokens of the keys."
        )
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


# --- parameters -----------------------------------------------------------------------------------

# hooks of torch that set a parameter from others, but at calls of the very module alone
COMPUTING = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
# where a module keeps what calls of it run
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Tree(torch.nn.Module):
    """A nested dict of tensors as parameters, by the same dotted names."""

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self._names: list[str] = []
        self.register(params)

    def register(self, params: Mapping[str, Any]) -> None:
        """Makes parameters of the leaves."""
        for name, value in params.items():
            if hasattr(self, name) or not name or "." in name:
                raise ValueError(
                    f"`Tree` needs names that a torch.nn.Module has not itself, got {name!r}. "
                    "Rename that leaf in `init` of the basis or operator."
                )
            if isinstance(value, Mapping):
                self.add_module(name, Tree(value))
            else:
                self.register_parameter(name, torch.nn.Parameter(value))
            self._names.append(name)

    def tree(self) -> Params:
        """The parameters as nested dicts, as the pure functions take them; those that torch
        computes, as of `torch.nn.utils.parametrize`, `prune` and `weight_norm`, as they are now.
        """
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, COMPUTING):
                hook(self, ())
        # by name: a parametrisation has parameters and modules of its own beside these
        found = {name: getattr(self, name) for name in self._names}
        return {name: x.tree() if isinstance(x, Tree) else x for name, x in found.items()}


def check_device(name: str, module: torch.nn.Module, x: Tensor) -> None:
    """Raises ValueError where a parameter of `module` is on another device than the input."""
    for own, leaf in module.named_parameters():
        if leaf.device != x.device:
            raise ValueError(
                f"`{name}` needs parameters on the device of its input, got `{own}` on "
                f"{leaf.device} and an input on {x.device}. Move the whole module with "
                f"`.to({str(x.device)!r})`."
            )


def check_dtype(name: str, argument: str, weight: Tensor, x: Tensor) -> None:
    """Raises ValueError where a weight is not of its input's dtype, and no autocast makes it so."""
    if weight.is_floating_point() and weight.dtype != x.dtype and not autocasting(x):
        raise ValueError(
            f"`{name}` needs `{argument}` in the dtype of its parameters, {weight.dtype}, got "
            f"{x.dtype}. Convert either with `.to`."
        )


def check_unhooked(module: torch.nn.Module) -> None:
    """Raises ValueError where calls of `module` run hooks, which its `step` is none of; those that
    compute parameters it runs, too.
    """
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    others = [hook for hook in hooks if not isinstance(hook, COMPUTING)]
    if others:
        raise ValueError(
            f"`step` needs a module without hooks of its calls, got {others[0]!r:.100}, which "
            "`step` would leave out. Remove it, or put it on a module around this one."
        )


def seeded(generator: Generator | None) -> Generator:
    """The generator, or a fresh one of seed 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def placed(device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Where and in what parameters of a module are kept, by default as those of torch's modules."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"a module needs a floating-point `dtype`, got {dtype}.")
    return {
        "device": torch.get_default_device() if device is None else device,
        "dtype": torch.get_default_dtype() if dtype is None else dtype,
    }


def linear(
    generator: Generator,
    in_size: int,
    out_size: int,
    bias: bool = True,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Linear:
    """A `torch.nn.Linear` with weights of `layers.linear_init`, drawn from `generator`."""
    drawn = layers.linear_init(generator, in_size, out_size, bias)
    # on the meta device torch's own initialisation draws nothing
    made = torch.nn.Linear(in_size, out_size, bias=bias, device="meta")
    for name, leaf in drawn.items():
        setattr(made, name, torch.nn.Parameter(leaf.to(**placed(device, dtype))))
    return made


# --- modules --------------------------------------------------------------------------------------


def named_operator(spec: "str | operators.Operator", shared: bool = False) -> operators.Operator:
    """The operator of a spec, which may ask for universal sharing only where that is done."""
    if isinstance(spec, operators.Operator):
        return spec
    parsed = operators.parse(spec)
    if parsed.sharing == "universal" and not shared:
        raise ValueError(
            f"`operator` needs a spec of one module, got {spec!r}, which is shared by all blocks. "
            "Make one `kart.nn.operator(...)` and pass it to every block."
        )
    return parsed.operator


class Operator(Tree):
    """A row operator with its parameters: q `(..., H, N, d)`, k, v `(..., H, M, d)` to `(..., H, N,
    d)`.

    `kart.nn.operator` makes one. The parameters have the names of the operator's tree.
    """

    def __init__(
        self,
        op: operators.Operator,
        heads: int,
        tokens: int | None,
        generator: Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__({})
        if tokens is None and not op.traits.get("length_free"):
            raise ValueError(
                f"`operator` needs `tokens`, the number of keys, for {op.name}, got None. "
                "Operators of any length do without."
            )
        self.op = op
        self.heads = heads
        self.tokens = tokens
        drawn = draw(op, seeded(generator), heads, 1 if tokens is None else tokens)
        self.register(tree.to(drawn, **placed(device, dtype)))

    def extra_repr(self) -> str:
        return f"{self.op.name}, heads={self.heads}, tokens={self.tokens}"

    def _meaning(self) -> Any:
        # as what `torch.load` reads: no numbers of numpy
        return json.loads(json.dumps(meaning(self.op, CHANGED, self.tokens)))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # beside the version of torch's: no tensor more, and files of tensors alone do without
        if hasattr(destination, "_metadata"):
            told = {"operator": self.op.name, "meaning": self._meaning()}
            destination._metadata[prefix[:-1]] |= told

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # torch keeps what is wrong in the last of its arguments, and raises it at the end
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        # what comes without parameters of this operator, as of softmax, has none of another meaning
        taken = any(prefix + name in state_dict for name, _ in self.named_parameters())
        own = self._meaning()
        if taken and not same_meaning(local_metadata.get("meaning", own), own):
            rest[-1].append(
                f"`{prefix[:-1] or 'operator'}` needs parameters of {self.op.name!r}, got those of "
                f"{local_metadata.get('operator')!r}, which mean something else. Make the module "
                "with that operator."
            )

    def ready(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Params, Tensor, Tensor, Tensor]:
        """Parameters, and q, k, v with as many heads each."""
        check_padded("operator", q, k, v)
        if q.dim() < 3 or q.shape[-3] != self.heads:
            raise ValueError(
                f"`operator` needs `q` (..., {self.heads}, N, d), got {tuple(q.shape)}. Put "
                f"the {self.heads} heads before the tokens."
            )
        check_device("operator", self, q)
        return self.tree(), q, repeat_heads(k, self.heads), repeat_heads(v, self.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        params, q, k, v = self.ready(q, k, v)
        return self.op.attend(params, q, k, v, mask)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights `(..., H, N, M)`, materialised, for looking."""
        params, q, k, _ = self.ready(q, k, k)
        check_qkv("operator", q, k, k, mask)
        return self.op.weights(params, q @ k.mT * q.shape[-1] ** -0.5, mask)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Causal attention of some more tokens (see `kart.operators.step`)."""
        check_unhooked(self)
        params, q, k, v = self.ready(q, k, v)
        tokens = None if self.op.traits.get("length_free") else self.tokens
        return operators.step(self.op, params, q, k, v, cache, tokens)

    def resize(self, old_tokens: Tokens, new_tokens: Tokens) -> "Operator":
        """This module, its parameters moved to another number of keys by `kart.operators.resize`.

        The parameters are new ones, those that are frozen frozen: make the optimiser after it.
        """
        own = dict(self.named_parameters(remove_duplicate=False))
        found = tree.map(lambda x: x.detach(), self.tree())
        computed = sorted(tree.named(found).keys() - own.keys())
        if computed:
            raise ValueError(
                f"`resize` needs parameters of the module's own, got {computed[0]!r}, which is "
                "computed of others. Make it one first, by prune.remove or "
                "parametrize.remove_parametrizations of torch.nn.utils."
            )
        moved = operators.resize(self.op, found, old_tokens, new_tokens)
        before, after = (lattice("tokens", one) for one in (old_tokens, new_tokens))
        if self.tokens is not None:
            prefix = self.tokens - before.patches
            # parameters of any length do not say it
            if prefix < 0 or {before.prefix, after.prefix} - {None, prefix}:
                raise ValueError(
                    f"`resize` needs `old_tokens` to be the {self.tokens} keys of the module, and "
                    f"`new_tokens` with as many prefix tokens, got {tuple(before)} and "
                    f"{tuple(after)}. Name the lattice, (prefix, rows, columns)."
                )
        for name in moved:
            delattr(self, name)
        self._names.clear()
        self.register(moved)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(own[name].requires_grad)
        if self.tokens is not None:
            self.tokens += after.patches - before.patches
        return self


def operator(
    op: "str | operators.Operator",
    heads: int,
    tokens: int | None = None,
    *,
    generator: Generator | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Operator:
    """A module of one row operator: (q, k, v, mask=None) to the output of every head.

    k and v may have fewer heads, a divisor of H (grouped-query attention).

    Args:
        op: an Operator or a spec string.
        heads: H.
        tokens: M, the number of keys; None for operators of any length.
        generator: draws the parameters; None is a fresh one of seed 0.
        device, dtype: of the parameters; None is torch's default.
    """
    return Operator(named_operator(op, shared=True), heads, tokens, generator, device, dtype)


class Attention(torch.nn.Module):
    """Multi-head attention with a row operator, `(B, N, dim)` to `(B, N, dim)`.

    `qkv` and `proj` are named as in timm's ViT; the operator's parameters are
    `operator.<name>`.

    Args:
        dim: D, of the input and the output.
        heads: H, a divisor of D.
        tokens: the number of keys; None for operators of any length.
        operator: a spec string, an Operator, or a module of `kart.nn.operator`, which several
            layers may share.
        kv_heads: heads of keys and values, a divisor of H (grouped-query attention); default H.
        bias, proj_bias: whether the projections have one.
        generator: draws the parameters; None is a fresh one of seed 0.
        device, dtype: of the parameters; None is torch's default.

    >>> attend = Attention(64, heads=4, tokens=17, operator="G3B")
    >>> attend(torch.ones(2, 17, 64)).shape
    torch.Size([2, 17, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int | None = None,
        operator: "str | operators.Operator | Operator" = "G3B",
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        proj_bias: bool = True,
        generator: Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        schema.check_integer("Attention", "dim", dim, 1)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`Attention` needs a floating-point `dtype`, got {dtype}.")
        groups = heads if kv_heads is None else kv_heads
        for name, whole, part in (("heads", dim, heads), ("kv_heads", heads, groups)):
            if not schema.fits(part, int) or part < 1 or whole % part:
                raise ValueError(
                    f"`Attention` needs `{name}` to divide {whole}, got {part!r}. Choose a divisor."
                )
        generator = seeded(generator)
        self.dim, self.heads, self.kv_heads = dim, heads, groups
        width = dim // heads
        given = {"device": device, "dtype": dtype}
        self.qkv = linear(generator, dim, (heads + 2 * groups) * width, bias, **given)
        self.proj = linear(generator, dim, dim, proj_bias, **given)
        self.operator = own_or_shared(operator, heads, tokens, generator, **given)

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, H, N, d)` of `x`, k and v `(B, G, M, d)` of `context`, which is `x` by default."""
        # one of another library may take what it likes, and adds to its weight what it likes
        own = type(self.qkv) is torch.nn.Linear
        # what only calls of it would run: hooks, such as those of pruned weights
        hooked = any(getattr(self.qkv, kind) for kind in HOOKS)
        for name, given in (("x", x), ("context", x if context is None else context)):
            check_padded("Attention", given)
            if given.dim() < 2 or given.shape[-1] != self.dim:
                raise ValueError(
                    f"`Attention` needs `{name}` (B, N, {self.dim}), got {tuple(given.shape)}. "
                    "Project it to this width."
                )
            check_device("Attention", self, given)
            if own:
                check_dtype("Attention", name, self.qkv.weight, given)
        width = self.dim // self.heads
        parts = [self.heads * width, 2 * self.kv_heads * width]
        if context is None:
            q, kv = self.qkv(x).split(parts, -1)
        elif hooked or not own:
            (q, _), (_, kv) = (self.qkv(y).split(parts, -1) for y in (x, context))
        else:
            weights = self.qkv.weight.split(parts)
            biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(parts)
            q = functional.linear(x, weights[0], biases[0])
            kv = functional.linear(context, weights[1], biases[1])
        k, v = kv.chunk(2, -1)
        groups = self.kv_heads
        return split_heads(q, self.heads), split_heads(k, groups), split_heads(v, groups)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """`(B, N, dim)` to `(B, N, dim)`.

        Args:
            x: the tokens that attend.
            mask: boolean, True = attend, broadcasting to (B, H, N, M); of keys alone it is
                (B, 1, 1, M).
            is_causal: whether a token sees none that come after it (see `causal_mask`).
            context: (B, M, dim), the tokens that are attended to; default x.
        """
        q, k, v = self.project(x, context)
        if is_causal:
            queries, keys = q.shape[-2], k.shape[-2]
            causal = causal_mask(queries, keys, q.device)
            check_mask("Attention", mask, queries, keys, *(y.shape[:-2] for y in (q, k)))
            mask = causal if mask is None else causal & mask
        return self.join(self.operator(q, k, v, mask))

    def join(self, out: Tensor) -> Tensor:
        """What the heads put out, `(B, H, N, d)`, side by side and projected, `(B, N, dim)`."""
        return self.proj(merge_heads(out))

    def step(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Causal attention of some more tokens `(B, N, dim)`, with the keys and values so far.

        Tokens given in parts equal one call of all with `is_causal=True`.
        """
        check_unhooked(self)
        out, cache = self.operator.step(*self.project(x), cache)
        return self.join(out), cache


def own_or_shared(
    op: "str | operators.Operator | Operator",
    heads: int,
    tokens: int | None,
    generator: Generator,
    **given: Any,
) -> Operator:
    """The module of a layer: a new one, or `op` itself where it is one for these heads and keys."""
    if not isinstance(op, Operator):
        return Operator(named_operator(op), heads, tokens, generator, **given)
    if op.heads != heads or tokens not in (None, op.tokens):
        raise ValueError(
            f"`operator` needs a module of {heads} heads and {tokens} tokens, got one of "
            f"{op.heads} and {op.tokens}. Make it with `kart.nn.operator(op, {heads}, {tokens})`."
        )
    return op
