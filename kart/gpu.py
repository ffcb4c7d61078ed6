"""What keeps a GPU at work: steps as CUDA graphs, batches made while it computes.

A graph is what a function launches, recorded once and replayed without the host. What is recorded
may not wait for the device, and runs again as it ran: on the same memory, with the same shapes,
past all Python.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from kart import tree

Result = TypeVar("Result")
Step = Callable[..., tuple[Any, Any]]


def record(
    call: Callable[[], Result], device: torch.device | None = None
) -> tuple[Callable[[], None], Result]:
    """`(replay, result)`: each `replay()` does what `call()` does on `device`, by default the
    current one, and writes over `result`.

    Before it is recorded, `call` runs three times: what is built and chosen at first is done then.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    return graph.replay, result


def replayed(step: Step, *, donate: bool = False) -> Step:
    """`step(state, *inputs) -> (state, metrics)`, replayed: recorded at the first call, and again
    for inputs of other shapes.

    All arguments are pytrees of tensors on one GPU. The state lives in the graph: it is copied in
    where it is not what the last call returned, and, without `donate`, copied out. With it the
    tensors that a call returns are written over by the next; `step` itself may write over its
    state.
    """
    kept: dict[Any, tuple[Any, Any, Callable[[], None], Any]] = {}

    def run(state: Any, *inputs: Any) -> tuple[Any, Any]:
        key = tuple((x.shape, x.dtype) for x in tree.leaves((state, inputs)))
        if key not in kept:
            own, held = tree.map(torch.clone, (state, inputs))

            def call() -> Any:
                following, metrics = step(own, *held)
                _copy(own, following)
                return metrics

            kept[key] = own, held, *record(call, tree.leaves(own)[0].device)
        own, held, replay, metrics = kept[key]
        _copy((own, held), (state, inputs))
        replay()
        metrics = tree.map(torch.clone, metrics)
        return own if donate else tree.map(torch.clone, own), metrics

    return run


def ahead(make: Callable[[int], Any], steps: range, device: str) -> Iterator[Any]:
    """`make(step)` for each of `steps`; on a GPU on a stream of its own, each made when the one
    before it has been used.

    What `make` copies to the GPU then waits for no step.
    """
    if torch.device(device).type != "cuda":
        yield from map(make, steps)
        return
    stream = torch.cuda.Stream(device)
    for step in steps:
        with torch.cuda.stream(stream):
            made = make(step)
        main = torch.cuda.current_stream(device)
        main.wait_stream(stream)
        for x in tree.leaves(made):
            # its memory may be used again when the step that reads it is done
            x.record_stream(main)
        yield made


def _copy(into: Any, source: Any) -> None:
    """Writes the leaves of a tree into those of another, but for those that they share."""
    by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for a, b in zip(tree.leaves(into), tree.leaves(source), strict=True):
        if a is not b:
            by_type.setdefault(a.dtype, []).append((a, b))
    for pairs in by_type.values():
        targets, values = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, values)  # type: ignore[attr-defined]  # no stubs
