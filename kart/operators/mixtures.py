"""Mixtures of operators: heads of one block that differ."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from kart.bases import Params
from kart.factories import remember
from kart.kernels.core import no_autocast
from kart.operators.contract import Operator, check_qkv, check_scores, check_sizes
from kart.operators.sums import of_parts, own_params


@remember
def hybrid(operators: Sequence[Operator]) -> Operator:
    """One operator a head, e.g. 2 softmax + 1 KArAt (App. C.5.2).

    Heads that follow each other with the same operator (the same object) run as one group; group i
    has its parameters under `str(i)`.
    """
    if not operators or not all(isinstance(op, Operator) for op in operators):
        raise ValueError(
            f"`hybrid` needs one Operator per head, got {list(operators)!r}. "
            "Pass for example [softmax(), softmax(), low_rank(basis)]."
        )
    heads_wanted = len(operators)
    groups: list[tuple[Operator, int]] = []
    for op in operators:
        if groups and groups[-1][0] is op:
            groups[-1] = (op, groups[-1][1] + 1)
        else:
            groups.append((op, 1))
    counts = [count for _, count in groups]

    def check(heads: int) -> None:
        if heads != heads_wanted:
            raise ValueError(
                f"`hybrid` needs as many heads as operators, {heads_wanted}, got {heads}. "
                "Give one operator per head."
            )

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_sizes(heads, tokens)
        check(heads)
        return {str(i): op.init(generator, count, tokens) for i, (op, count) in enumerate(groups)}

    def by_group(
        form: Callable[[Operator], Callable[..., Tensor]],
        params: Params,
        mask: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        for tensor in tensors:
            check(tensor.shape[-3] if tensor.dim() >= 3 else 0)
        columns = [tensor.split(counts, dim=-3) for tensor in tensors]
        if mask is not None and mask.dim() >= 3 and mask.shape[-3] > 1:
            masks: Sequence[Tensor | None] = mask.split(counts, dim=-3)
        else:
            masks = [mask] * len(groups)
        own = own_params("hybrid", [op for op, _ in groups], params)
        parts = [
            form(op)(own[i], *(column[i] for column in columns), masks[i])
            for i, (op, _) in enumerate(groups)
        ]
        # which autocast would refuse of half types other than its own
        with no_autocast(parts[0]):
            return torch.cat(parts, dim=-3)

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        check_scores("hybrid", scores, mask)
        return by_group(lambda op: op.weights, params, mask, scores)

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        check_qkv("hybrid", q, k, v, mask)
        return by_group(lambda op: op.attend, params, mask, q, k, v)

    options = {"kind": "hybrid", "groups": groups}
    name = "+".join(f"{count}*{op.name}" for op, count in groups)
    return Operator(
        name, init, weights, attend, None, options, **of_parts([op for op, _ in groups])
    )
