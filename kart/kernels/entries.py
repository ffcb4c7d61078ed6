"""Attention whose weights are functions of one score each, or of it and of the place of its key.

One function a head needs no matrix product to be evaluated: the compiled engines do it in registers
between the product of the scores and that with the values. In torch every operation is a
pass over memory, so a block is small, its features stand one after the other, and what they are
multiplied with is one product: that of the coefficients and of those of the derivative.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kart import schema
from kart.kernels import fused, plain, stream
from kart.kernels.arguments import broadcast_leading, check, flat_mask, four_axes
from kart.kernels.cpp import weights as compiled
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import family_of
from kart.kernels.plain import wide, wide_dtype
from kart.kernels.transforms import forward_levels, no_autocast
from kart.kernels.triton import entries as triton

ENGINES = ("auto", "torch", "cpp", "triton", "plain")


def entry_attention(
    basis: Any,
    units: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    form: str = "plain",
    factor: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """`w v`, `(..., H, N, e)`, for weights w of entries `y = phi_h(s)` of the scores `s = scale q
    k^T`, one function a head, or of a table of every offset.

    By `form` w is "plain" `f y`, f a factor of each query; "l1" `y / sum |y|`; "softmax"
    `softmax(y)`; "inside" `softmax(s + y)`; "beside" `f y + softmax(s)`; "simplex" y projected onto
    the simplex. Scores are computed again in the backward; no N x M matrix is kept. A query without
    keys gets zeros, one whose softmax is of -inf alone NaN.

    Args:
        basis: the family of the functions, or None.
        units: its parameters, leaves `(H, ...)`; without a basis `{"table": (H, N + M - 1)}`, at n
            - m + M - 1 the entry of query n and key m, for the forms "inside" and "beside".
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, M, e)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.
        factor: f, broadcasting to `(..., H, N, 1)`; the forms but "plain" and "beside", in which it
            has no place, do not read it.
        scale: of the scores; default `d^-1/2`.
        engine: "auto" (by device), "torch", "cpp", "triton", or "plain", the materialised
            reference.

    Raises:
        ValueError: names the argument that does not fit.
    """
    name = "entry_attention"
    for argument, value, allowed in (("form", form, plain.FORMS), ("engine", engine, ENGINES)):
        schema.check_choice(name, argument, value, allowed)
    if basis is None and form not in ("inside", "beside"):
        raise ValueError(
            f"`{name}` needs `form` inside or beside for a table, got {form!r}. Without softmax of "
            "the scores the weights are those of every sample: multiply them with `v`."
        )
    check(name, q, k, mask, scale, v=v)
    if v.dim() < 3 or v.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"`{name}` needs `v` (..., H, {k.shape[-2]}, e) for the keys of `k`, got "
            f"{tuple(v.shape)}. Project v from the same tokens as k."
        )
    if factor is not None:
        # each by itself: `in` of torch.compile tells a size that it knows from one that it does not
        rows, one = (1, 1, *factor.shape)[-2:] if isinstance(factor, Tensor) else (0, 0)
        if one != 1 or (rows != 1 and rows != q.shape[-2]):
            got = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
            raise ValueError(
                f"`{name}` needs `factor` as a tensor broadcasting to (..., H, {q.shape[-2]}, 1), "
                f"got {got}. It is one of each query."
            )
    leaves = _leaves(basis, units, q.shape[-2] + k.shape[-2] - 1)
    unit_heads = {f"units[{leaf!r}]": x.shape[:1] for leaf, x in leaves.items()}
    *lead, heads = broadcast_leading(name, q=q, k=k, v=v, mask=mask, factor=factor, **unit_heads)
    q, k, v = four_axes([*lead, heads], q, k, v)
    own = wide_dtype(q)
    values = [x.to(own).expand(heads, *x.shape[1:])[None] for x in leaves.values()]
    factor = None if factor is None else factor.to(own)
    mask, factor = (None if x is None else flat_mask(x, lead) for x in (mask, factor))
    factor_of_scores = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with no_autocast(q):
        out = _apply(
            basis, list(leaves), form, factor_of_scores, engine, q, k, v, mask, factor, *values
        )
    return out.reshape(*lead, *out.shape[1:])


def _leaves(basis: Any, units: Mapping[str, Tensor], offsets: int) -> dict[str, Tensor]:
    """What is learned, `(H, ...)`: of a linear family and a table one tensor, "theta"."""
    if not hasattr(units, "keys") or (basis is None and "table" not in units):
        raise ValueError(
            f"`entry_attention` needs `units` as a dict, of a table one with 'table', got "
            f"{units!r:.100}. Pass what `init` of the basis drew, or the table."
        )
    if basis is None:
        table = units["table"]
        if table.dim() != 2 or table.shape[-1] != offsets:
            raise ValueError(
                f"`entry_attention` needs a `table` (H, {offsets}) for the offsets of these "
                f"queries and keys, got {tuple(table.shape)}. Pass an entry for each."
            )
        return {"theta": table}
    if basis.coefficients is None:
        return dict(units)
    theta = basis.coefficients(dict(units))
    _check_axes(theta.dim() == 2, units)
    return {"theta": theta}


def _check_axes(fits: bool, units: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless units are one function a head: kernels would read some of more."""
    if not fits:
        shapes = {name: tuple(leaf.shape) for name, leaf in units.items()}
        raise ValueError(
            f"`entry_attention` needs `units` of one function a head, (H,), got leaves {shapes}. "
            "Call `init(generator, (heads,))` of the basis."
        )


def _apply(
    basis: Any,
    names: list[str],
    form: str,
    scale: float,
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    *leaves: Tensor,
) -> Tensor:
    """`entry_attention` of four axes, leaves `(B or 1, H, ...)`, by the engine that can."""
    reference = partial(_plain, basis, names, form, scale)
    if engine == "plain" or torch.compiler.is_exporting():
        return reference(q, k, v, mask, factor, *leaves)
    numbers = 1 if basis is None else basis.size
    # features of so few queries take no more than their keys
    few = engine == "auto" and q.shape[2] * numbers <= q.shape[3]
    expression = reference if few else partial(_in_blocks, reference, numbers)
    if torch.compiler.is_compiling() or forward_levels() or not q.shape[0]:
        return expression(q, k, v, mask, factor, *leaves)
    family = None if basis is None else family_of(basis)

    def theta_of(*leaves: Tensor) -> Tensor:
        # without pieces no engine takes them, of which it asks the dtype
        if names == ["theta"] or family is None or family.pieces is None:
            return leaves[0]
        units = dict(zip(names, leaves, strict=True))
        found = family.stacked(units)
        _check_axes(found.dim() == 3, units)
        return found

    def weighted(q, k, v, mask, factor, *leaves) -> Weighted:
        return Weighted(family, form, q, k, v, theta_of(*leaves), mask, factor, scale)

    chosen = _engine_for(engine, weighted(q, k, v, mask, factor, *leaves))
    if chosen is None or (few and chosen is not compiled):
        return expression(q, k, v, mask, factor, *leaves)

    def forward(*inputs):
        return chosen.forward(weighted(*inputs))

    def backward(gradients, inputs, results):
        if few and inputs[0].shape[2] < 4:
            # most of a block of queries would be empty
            q, k, v, mask, factor, *leaves = inputs

            def expressed(q, k, v, *leaves):
                return expression(q, k, v, mask, factor, *leaves)

            return plain.pullback(expressed, q, k, v, *leaves)(gradients[0])
        dq, dk, dv, dtheta = chosen.backward(weighted(*inputs), *gradients, *results)
        if names == ["theta"]:
            return dq, dk, dv, dtheta
        return dq, dk, dv, *plain.pullback(theta_of, *inputs[5:])(dtheta)

    learned = (0, 1, 2, *range(5, 5 + len(leaves)))
    op = fused.Fused(
        forward, backward, lambda *x: (expression(*x),), 1, learned, (3, 4, *learned[3:])
    )
    return fused.apply(op, q, k, v, mask, factor, *leaves)[0]


def _engine_for(engine: str, x: Weighted) -> Any:
    """The module or class of a raw forward and backward, None where torch has the expression alone;
    ValueError where the engine that was asked for cannot.
    """
    device = x.q.device.type
    on_cpu = device == "cpu"
    compilers = {"cpu": ("cpp", compiled), "cuda": ("triton", triton)}
    name, kernels = compilers.get(device, ("", None))
    if engine == "triton":  # its interpreter runs on the CPU
        name, kernels = "triton", triton
    if engine in ("auto", name) and kernels is not None:
        reason = kernels.refuses(x)
        if not reason:
            return kernels
    else:
        reason = f"it does not run on {device} tensors"
    if engine in ("cpp", "triton"):
        raise ValueError(
            f"`entry_attention` cannot run engine={engine!r} here: {reason}. Pass engine='auto'."
        )
    known = x.family is None or x.family.own("fill") and x.family.own("fold")
    return Blocks if known and on_cpu else None


# --- the expression -------------------------------------------------------------------------------


def _plain(
    basis: Any,
    names: list[str],
    form: str,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    *leaves: Tensor,
    place: Tensor | None = None,
) -> Tensor:
    units = dict(zip(names, leaves, strict=True))
    return plain.entry_attention(basis, units, q, k, v, mask, factor, form, scale, place)


def _in_blocks(
    reference: Callable[..., Tensor],
    numbers: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor | None,
    *leaves: Tensor,
) -> Tensor:
    """The expression, a block of queries at a time, which can be differentiated."""
    rows, keys = q.shape[2], k.shape[2]
    shapes = [leaf.shape[2:] for leaf in leaves]
    place = torch.arange(rows, device=q.device)[:, None] + keys - 1
    factor = None if factor is None else factor.expand(*factor.shape[:2], rows, 1)

    def some(q: Tensor, place: Tensor, factor: Tensor | None, *rest: Any) -> Tensor:
        k, v, *leaves, mask = rest
        own = [x.reshape(*x.shape[:2], *shape) for x, shape in zip(leaves, shapes, strict=True)]
        return reference(q, k, v, mask, factor, *own, place=place)

    # leading axes as those of q: what a block holds is counted by them; a wavelet's leaves have
    # none after the heads
    flat = [leaf[:, :, None, None].flatten(3) for leaf in leaves]
    # features, their sum, and what derivatives need of them
    return stream.by_queries(some, [q, place, factor], [k, v, *flat], mask, 2 * (numbers + 2))


# --- blocks of torch operations -------------------------------------------------------------------


# numbers of a score beside its features: the scores, entries, slopes, weights, two gradients
ROOM = 6


class _Block:
    """Scores of some queries of some samples in one head, and the features of them.

    Beside what is multiplied, a call into torch costs as much as a pass over a block: there are as
    few as can be. What is large is written into `buffer`: memory that is asked of the system again
    and again costs as much as the passes.
    """

    def __init__(self, x: Weighted, buffer: Tensor, theta: Tensor, q: Tensor, k: Tensor, *rest):
        self.x, self.q, self.k = x, q, k  # (S, n, d), scaled, and (S, M, d)
        hidden, self.factor, self.first = rest
        self.theta = theta  # (P, K), or the table (1, offsets)
        shape = (*q.shape[:2], k.shape[1])
        count = math.prod(shape)
        rows = buffer[: buffer.numel() // count * count].view(-1, *shape)
        self.scores, *self.room = rows[:ROOM].unbind(0)
        torch.bmm(q, k.mT, out=self.scores)  # (S, n, M)
        self.hidden = hidden
        if hidden is not None:
            self.scores.masked_fill_(hidden, 0)
        if x.family is not None:
            self.features = rows[ROOM : ROOM + x.family.width].view(-1, count)
            self.sums = rows[1 : 1 + len(theta)]
            x.family.pieces.fill(self.features[None], self.scores.view(1, count))

    def entries(self) -> tuple[Tensor, Tensor | None]:
        """Entries, and their slopes where `theta` has those too."""
        if self.x.family is not None:
            torch.mm(self.theta, self.features, out=self.sums.view(len(self.theta), -1))
            return self.room[0], self.room[1]
        rows, keys = self.scores.shape[1:]
        part = self.theta[:, self.first : self.first + rows + keys - 1]
        return self.room[0].copy_(part.flip(1).unfold(1, keys, 1).flip(1)), None

    def weigh(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of entries, and those of softmax beside them."""
        form, hidden = self.x.form, self.hidden
        if form == "softmax":
            return self._softmax(y), None
        if form == "inside":
            return self._softmax(torch.add(self.scores, y, out=self.room[2])), None
        if form == "simplex":
            return plain.simplex_rows(y, None if hidden is None else ~hidden), None
        if hidden is not None:
            y = y.masked_fill(hidden, 0)
        if form == "l1":
            return torch.div(y, self._sizes(y), out=self.room[2]), None
        y = y if self.factor is None else torch.mul(y, self.factor, out=self.room[3])
        if form == "plain":
            return y, None
        soft = self._softmax(self.scores)
        return torch.add(y, soft, out=self.room[3]), soft

    def _softmax(self, y: Tensor) -> Tensor:
        if self.hidden is None:
            return torch.softmax(y, -1, out=self.room[2])
        y = y.masked_fill(self.hidden, -math.inf)
        return torch.softmax(y, -1, out=self.room[2]).masked_fill_(self.hidden, 0)

    def _sizes(self, y: Tensor) -> Tensor:
        return y.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)

    def pulled(self, y: Tensor, w: Tensor, soft: Tensor | None, dw: Tensor) -> tuple[Tensor, Any]:
        """The gradients of entries, and of scores beside them, from that of the weights."""
        form, hidden = self.x.form, self.hidden
        if form in ("softmax", "inside"):
            g = _softmax_backward(dw, w, self.room[3])
            return g, g if form == "inside" else None
        if form == "simplex":
            kept = (w > 0).to(w.dtype)
            mean = (kept * dw).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
            return kept * (dw - mean) * y.isfinite(), None
        if form == "l1":
            y = y if hidden is None else y.masked_fill(hidden, 0)
            g = (dw - y.sign() * (w * dw).sum(-1, keepdim=True)) / self._sizes(y)
        else:
            g = dw if self.factor is None else dw * self.factor
        g = g if hidden is None else g.masked_fill(hidden, 0)
        return g, None if soft is None else _softmax_backward(dw, soft, self.room[3])

    def add_parameters(self, g: Tensor, out: Tensor) -> None:
        """Adds the gradient of `theta (K)` or of the table, from that of the entries."""
        if self.x.family is not None:
            out.addmv_(self.features, g.reshape(-1))
            return
        rows, keys = g.shape[1:]
        # row r, shifted by r, has its offsets where the others have them
        own = functional.pad(g.sum(0).flip(0), (0, rows)).flatten()[: rows * (rows + keys - 1)]
        out[self.first : self.first + rows + keys - 1] += own.view(rows, -1).sum(0).flip(0)


def _softmax_backward(gradient: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    dtype = weights.dtype
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, dtype, grad_input=out)


class Blocks:
    """The raw forward and backward of a family that has all features and their derivatives in one
    buffer, or of a table.
    """

    @staticmethod
    def _of(
        x: Weighted, theta: Tensor, by_query: list[Tensor], by_key: list[Tensor]
    ) -> Iterator[tuple[Any, ...]]:
        """Each block, its sample and head, and the parts of the tensors: those of queries, `(B, H,
        N, ..)`, and those of keys.
        """
        batch, heads, rows, _ = x.q.shape
        width, keys = 1 if x.family is None else x.family.width, x.k.shape[2]
        # 4 MiB of float32: smaller blocks would stay in the level-2 cache, and cost more in calls
        budget = stream.CHUNK * torch.get_num_threads()
        each = keys * (width + ROOM)
        step = max(1, min(rows, budget // each))
        samples = max(1, budget // (each * step)) if x.theta.shape[0] == 1 and step == rows else 1
        samples = min(samples, batch)
        q = wide(x.q) * x.scale
        buffer = q.new_empty(samples * step * each)
        hidden = None if x.mask is None else ~x.mask
        shape = (batch, heads, rows)

        def parts(y: Tensor | None, queries: bool) -> list[list[Any]]:
            """`y` of this head, by samples and then by queries."""
            if y is None:
                return [[None] * -(-rows // step)] * -(-batch // samples)
            own = y.expand(*shape[: 3 if queries else 2], *y.shape[3 if queries else 2 :])[:, h]
            groups = own.split(samples)
            return [list(y.split(step, 1)) if queries else [y] * -(-rows // step) for y in groups]

        for h in range(heads):
            queried = [parts(y, True) for y in (q, hidden, x.factor, *by_query)]
            keyed = [parts(wide(y), False) for y in (x.k, x.v, *by_key)]
            for b in range(-(-batch // samples)):
                own = theta[b if len(theta) > 1 else 0, h]
                for n in range(-(-rows // step)):
                    qs, hide, factor, *others = (y[b][n] for y in queried)
                    ks, vs, *sums = (y[b][n] for y in keyed)
                    block = _Block(x, buffer, own, qs, ks, hide, factor, n * step)
                    yield block, b if len(theta) > 1 else 0, h, vs, others, sums

    @staticmethod
    def forward(x: Weighted) -> tuple[Tensor, ...]:
        """As `kart.kernels.cpp.weights.forward`."""
        out = wide(x.v.new_empty(*x.q.shape[:3], x.v.shape[3]))
        for block, _, _, v, (part,), _ in Blocks._of(x, wide(x.theta)[:, :, None], [out], []):
            w, _ = block.weigh(block.entries()[0])
            part.copy_(torch.bmm(w, v))
        return (out.to(x.v.dtype),)

    @staticmethod
    def backward(x: Weighted, dout: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """As `kart.kernels.cpp.weights.backward`."""
        dq, dk, dv, dtheta = (torch.zeros_like(wide(y)) for y in (x.q, x.k, x.v, x.theta))
        theta = wide(x.theta)[:, :, None]
        if x.family is not None:
            slopes = x.family.pieces.fold(theta.mT).mT
            theta = torch.cat([theta, slopes], 2)
        for block, b, h, v, (pull, dqs), (dks, dvs) in Blocks._of(
            x, theta, [wide(dout), dq], [dk, dv]
        ):
            y, slope = block.entries()
            w, soft = block.weigh(y)
            dvs.baddbmm_(w.mT, pull)
            dw = torch.bmm(pull, v.mT, out=block.room[4])
            g, ds = block.pulled(y, w, soft, dw)
            block.add_parameters(g, dtheta[b, h])
            if slope is not None:
                slope.mul_(g)
                if x.form == "simplex":
                    # the slope at an infinite score is NaN, and counts for nothing
                    slope.masked_fill_(g == 0, 0)
                ds = slope if ds is None else slope.add_(ds)
            if ds is not None:
                dqs.baddbmm_(ds, block.k, alpha=x.scale)
                dks.baddbmm_(ds.mT, block.q)
        found = zip((dq, dk, dv, dtheta), (x.q, x.k, x.v, x.theta), strict=True)
        return tuple(y.to(like.dtype) for y, like in found)
