"""A trained model as one file: for kart, for timm's names, for torch.export and ONNX.

Each form maps images, standardised as `kart.data.normalise` does it, to logits; how to standardise
and what the classes are called stands in a JSON file beside it.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kart import checkpoint, models, operators, schema, transfer, tree
from kart.kernels import family, plain
from kart.models import Model

Params = dict[str, Any]


class Exported(nn.Module):
    """A model with its parameters, `(B, Cin, height, width)` to logits `(B, C)`."""

    def __init__(self, model: Model, params: Params):
        super().__init__()
        self._apply_model = model.apply
        self._like = params
        # a name of a buffer has no dots
        self._names = {name: name.replace(".", "__") for name in tree.named(params)}
        for name, leaf in tree.named(params).items():
            if self._names[name] in self._buffers:
                raise ValueError(
                    f"`export` needs names that differ where dots are {'__'!r}, got two at "
                    f"{self._names[name]!r}. Rename a leaf in `init` of the operator."
                )
            self.register_buffer(self._names[name], leaf)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of `images`."""
        params = tree.map_named(lambda name, _: getattr(self, self._names[name]), self._like)
        return self._apply_model(params, images)


def _safetensors(model: Model, params: Params, path: Path) -> None:
    config = dataclasses.asdict(model.config)
    try:
        # code of one's own is run where it is named alone
        if not operators.sources(model.config.operator):
            models.from_config(config)
    except ValueError as error:
        raise ValueError(
            "`export` needs a model made of specs for safetensors, whose config can make it again, "
            f"got operators {model.config.operator!r}. Name them by specs, or choose torch or onnx."
        ) from error
    checkpoint.save(path, params, config)


def _timm(model: Model, params: Params, path: Path) -> None:
    # the names of kart's leaves are timm's, of a ViT's operators those of `kart.bridges.timm`
    named = checkpoint.bridged(params) if model.config.family == "vit" else tree.named(params)
    # copies: safetensors holds no tensor twice
    tensors = {name: leaf.clone().contiguous() for name, leaf in named.items()}
    checkpoint.write_tensors(path, tensors)


PRODUCT = torch.ops.kart.contract_forward.default


def _materialised(
    q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None, scale: float, basis: str, engine: str
) -> Tensor:
    """The product of `kart.kernels.core` in operations of torch: features of all scores at once."""
    return plain.contract(family.family_named(basis).basis, coefs, q, k, mask, scale)


def graph(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """The graph of `torch.export` of a module with operators of kart inside, in operations of torch
    alone: it runs where kart is not installed, and `torch.onnx.export` takes it.

    Args:
        module: a `torch.nn` module, such as a timm model of yours with attention of `kart.bridges`,
            on the CPU; it is recorded in the mode that it is in, so call `eval` first.
        inputs: an example of its arguments. torch takes a size of one for a constant: give two
            images where the batch is to be free.
        dynamic_shapes: which sizes are free, as `torch.export.export` takes it: the batch, and the
            number of tokens of an operator of any length.
    """
    with torch.no_grad():
        # an engine looks once at the values of a basis, which it cannot while it is traced
        module(*inputs)
        first: Any = torch.export.export(
            module, inputs, dynamic_shapes=dynamic_shapes, strict=False
        ).module()
        for node in first.graph.find_nodes(op="call_function", target=PRODUCT):
            node.target = _materialised
        first.recompile()
        # recorded anew, the constants of a basis are those of the graph
        return torch.export.export(first, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def program(model: Model, params: Params) -> torch.export.ExportedProgram:
    """`graph` of a model with its parameters, for any number of images."""
    config = model.config
    example = torch.zeros(2, config.in_channels, config.image_size, config.image_size)
    batch = {"images": {0: torch.export.Dim("batch")}}
    return graph(Exported(model, params).eval(), (example,), batch)


@contextlib.contextmanager
def _errors_alone(*names: str) -> Iterator[None]:
    """A block in which loggers say what failed, not what they skipped."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _onnx(model: Model, params: Params, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`export` needs {' and '.join(missing)} for ONNX. Run `pip install onnx onnxscript`."
        )
    with warnings.catch_warnings(), _errors_alone("onnxscript", "torch.onnx"):
        # of torch's own use of what it has deprecated
        warnings.simplefilter("ignore")
        found = torch.onnx.export(
            program(model, params),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert found is not None
    found.save(str(path), external_data=False)


FORMATS: dict[str, Callable[[Model, Params, Path], None]] = {
    "safetensors": _safetensors,
    "timm": _timm,
    "torch": lambda model, params, path: torch.export.save(program(model, params), path),
    "onnx": _onnx,
}
SUFFIXES = {"safetensors": ".safetensors", "timm": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}


def write(
    path: str | Path, model: Model, params: Params, about: Mapping[str, Any], form: str
) -> None:
    """Writes the model to `path` in the form `form`, and `about` as JSON beside it.

    Args:
        path: a file that ends in the suffix of the form; an earlier export is replaced whole, and
            of several forms beside one JSON file all are to be of the same `about`.
        model: a model; for "safetensors" made of specs, by which its config makes it again.
        params: its parameters, on the CPU.
        about: how images are standardised, classes, whose weights they are.
        form: "safetensors" (kart's own), "timm", "torch" or "onnx".
    """
    path = Path(path)
    schema.check_choice("export", "form", form, FORMATS)
    if path.suffix != SUFFIXES[form]:
        raise ValueError(
            f"`export` needs a file that ends in {SUFFIXES[form]} for {form}, got {str(path)!r}."
        )
    if form in ("safetensors", "timm") and transfer.TEACHER in params:
        raise ValueError(
            f"`export` needs a model with attention of its own for {form}, got one that attends as "
            "its teacher does, which neither a config nor timm can say. Choose torch or onnx."
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"`export` needs a file in a directory that exists, got {str(path)!r}. Make it first."
        )
    told = json.loads(schema.dumps({"format": form, **about, "versions": checkpoint.versions()}))
    beside = path.with_suffix(".json")

    forms = {path.with_suffix(suffix) for suffix in SUFFIXES.values()} - {path}
    alone = not any(other.exists() for other in forms)

    def is_own(found: dict[str, Any]) -> bool:
        same = all(found.get(name) == told[name] for name in about)
        return found.get("format") in FORMATS and (same or (found["format"] == form and alone))

    checkpoint.check_replaced("export", beside, is_own, path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        # a copy: a member of several is a part of their tensors, which torch would write whole
        own = tree.map(lambda leaf: leaf.detach().cpu().clone(), params)
        try:
            FORMATS[form](model, own, temporary)
        # torch's exporters have many errors, all of them of this kind
        except RuntimeError as err:
            raise ValueError(
                f"`export` cannot write {model.config.operator!r} as {form}: torch says "
                f"{str(err).strip().splitlines()[0]!r:.200}. Choose safetensors, for kart."
            ) from err
        # before the file, which is known for an export by it
        checkpoint.write_json(beside, told)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
