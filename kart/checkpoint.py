"""Checkpoints: pytrees of tensors, config and versions in one safetensors file, replaced whole.

A file holds every leaf under `<tree>.<dotted path>`, so any safetensors reader can look inside, and
one metadata entry `kart`: JSON with the format, the versions of kart and torch, the config, the
containers, and digests of every tree and of the JSON itself: damage is found when it is read.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Generator, Tensor

import kart
from kart import layers, schema, tree

Params = Any
Tree = Any

FORMAT = 2
# errno of a disk without room
FULL = (errno.ENOSPC, errno.EDQUOT)
DEPTH = 64  # of containers in containers
# older than this, an unfinished file is what a killed process left, not what another one is writing
STALE_S = 3600.0
# where other trainers put a state dict, and what they put before its names
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
# what to do about a donor with others than the model has
OTHER_OPERATORS = (
    "Create the model with the donor's operators (kart train: --operator), or leave them out of "
    "the donor's weights to draw them anew."
)


def save(path: str | os.PathLike, params: Params, config: Any, **trees: Tree) -> None:
    """Writes `params`, `config` and any further trees to `path`, whole or not at all.

    The data goes to a hidden file in the same directory, is forced to disk and renamed over `path`:
    whoever reads, also after a crash at any moment, finds the old file or the new one. What a
    killed process left behind is removed by a later `save` to the same path.

    Args:
        path: the file to write; its directory must exist.
        params: nested dicts, lists and tuples of tensors.
        config: a dataclass, or anything JSON can hold; tuples come back as lists.
        trees: more trees by name, such as `optimiser=state`; they may hold NamedTuples too.

    Raises:
        ValueError: a leaf that is no dense tensor, a config JSON cannot hold, no such directory.
    """
    path = _path("save", path)
    if not path.parent.is_dir():
        raise ValueError(
            f"`save` needs an existing directory, got {str(path.parent)!r}. Create it first."
        )
    if path.is_dir():
        raise ValueError(f"`save` needs a file name, got the directory {str(path)!r}. Add a name.")
    tensors: dict[str, Tensor] = {}
    structures = {
        name: _describe("save", node, name, tensors)
        for name, node in {"params": params, **trees}.items()
    }
    for name, leaf in tensors.items():
        if leaf.is_meta or leaf.layout != torch.strided:
            raise ValueError(
                f"`save` needs dense tensors with data, got {leaf.layout} on {leaf.device} at "
                f"{name!r}. Convert it with `to_dense`, or initialise it."
            )
    # a view that says how its memory is to be read has no bytes of its own
    tensors = {name: x.detach().resolve_conj().resolve_neg() for name, x in tensors.items()}
    if _has_namedtuple(structures["params"]):
        raise ValueError(
            "`save` needs `params` of dicts, lists and tuples, got a NamedTuple, which `load` "
            "could not make again. Convert it with `_asdict`, or pass it as a further tree."
        )
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    header = {
        "format": FORMAT,
        "kart": kart.__version__,
        "torch": torch.__version__,
        "config": config,
        "trees": structures,
        "digests": {
            name: _digest({leaf: tensors[leaf] for leaf in _leaf_names(structure)})
            for name, structure in structures.items()
        },
    }
    try:
        _check_keys(config)
        text = _sealed(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`save` needs a config of JSON values, got {config!r} ({error}). Convert it to "
            f"numbers, strings, lists and dicts with string keys."
        ) from error
    # copies: leaves may share storage or be strided, which safetensors refuses
    whole = {
        name: x.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, x in tensors.items()
    }
    write_tensors(path, whole, {"kart": text})
    # the renaming, too, must outlive a crash; Windows cannot sync directories
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[Params, Any]:
    """The `(params, config)` that `save` wrote to `path`.

    Raises:
        ValueError: `path` is missing, truncated, not by kart, or by a newer kart.
    """
    with _open("load", path) as (file, header):
        structure, found = header["trees"]["params"], _read("load", path, file, header, "params")
        try:
            tensors = {name: _own(x, torch.device(device)) for name, x in found.items()}
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(
                f"`load` needs a `device` that torch has, got {device!r} "
                f"({' '.join(str(error).split())[:100]}). Choose another."
            ) from error
        return _build(structure, tensors), header["config"]


def load_state(path: str | os.PathLike, **like: Tree) -> dict[str, Tree]:
    """The trees of `path` named by the keywords, each in the containers of its template.

    `load_state(path, optimiser=optimiser.init(params))["optimiser"]` is the state that
    `save(path, params, config, optimiser=state)` was given. Only structure, shapes and dtypes of a
    template count, and the device: leaves come back on it, or on the CPU for `meta` tensors.

    Raises:
        ValueError: as `load`; no such tree in the file; a template of other names, shapes or
            dtypes.
    """
    with _open("load_state", path) as (file, header):
        trees = {}
        for name, template in like.items():
            if name not in header["trees"]:
                raise ValueError(
                    f"`load_state` needs a tree that {str(path)!r} holds, got {name!r}. It holds "
                    f"{', '.join(header['trees'])}."
                )
            stored = _read("load_state", path, file, header, name)
            trees[name] = _restore(path, stored, header["trees"][name], name, template)
        return trees


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What `path` says of itself: format, versions of kart and torch, config, names of trees."""
    with _open("describe", path) as (_, header):
        del header["digests"]
        return {**header, "trees": sorted(header["trees"])}


def from_timm(
    model: Any,
    state_dict: Mapping[str, Any],
    strict_head: bool = True,
    generator: Generator | None = None,
    *,
    resize: bool = False,
) -> Params:
    """Parameters of `model` with the weights of a donor that has timm's names.

    Attention operators that the donor has nothing of keep their initialisation. The dict may lie in
    a checkpoint, as its only entry of WRAPPERS, and its names may all begin with PREFIXES.

    Args:
        model: has `init(generator)` and a `config` with `image_size` and `patch_size`.
        state_dict: the donor's tensors by dotted name, cast to the dtypes of the model; operators
            by kart's names or as a timm model with layers of `kart.bridges.timm` has them.
        strict_head: False keeps the initialised classifier where the donor's has other classes, or
            none.
        generator: draws what the donor does not give; None is seed 0.
        resize: True resizes position embeddings of another grid, bicubically with antialiasing, as
            timm does; the class token's are kept.

    Raises:
        ValueError: names every leaf that is missing, unexpected, of another shape or without
            floating-point numbers.
    """
    donors = donor_leaves(model, state_dict)
    params = model.init(generator or torch.Generator().manual_seed(0))
    own = tree.named(params)
    taken: dict[str, Tensor] = {}
    missing, unread, wrong, hints = [], [], [], _hints(own, donors)
    given = {"", *map(_operator, donors)}  # what is of no operator is not drawn either
    for name, leaf in own.items():
        donor = donors.get(name)
        if donor is not None and (donor.is_meta or not donor.is_floating_point()):
            unread.append(f"{name} ({'no data' if donor.is_meta else donor.dtype})")
            continue
        if donor is not None and donor.shape != leaf.shape and name == "pos_embed":
            moved = _resized(donor, leaf, model.config)
            if not resize and moved is not donor:
                hints.append("Pass resize=True to resize the positions.")
            donor = moved if resize else donor
        if donor is not None and donor.shape == leaf.shape:
            taken[name] = donor.detach().to(leaf.device, leaf.dtype, copy=True)
        elif donor is None and _operator(name) not in given or _is_head(name) and not strict_head:
            taken[name] = leaf
        elif donor is None:
            missing.append(name)
        else:
            wrong.append(f"{name} {tuple(donor.shape)} for {tuple(leaf.shape)}")
        if _is_head(name) and name not in taken:
            hints.append("Pass strict_head=False to start the classifier anew.")
    unexpected = [n for n in donors if n not in own and (strict_head or not _is_head(n))]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": wrong,
        "that are no floating-point numbers": unread,
    }
    found = [f"{kind} {_some(names)}" for kind, names in problems.items() if names]
    if found:
        if all(map(_operator, (*missing, *unexpected, *(told.split()[0] for told in wrong)))):
            hints.append(OTHER_OPERATORS)
        advice = " ".join(dict.fromkeys(hints)) or (
            "Create the model with the donor's width, depth, heads and patch size, "
            "and remove what the model has no place for."
        )
        raise ValueError(
            f"`from_timm` needs a donor that fits the model, got leaves {'; '.join(found)}. "
            f"{advice}"
        )
    return tree.map_named(lambda name, _: taken[name], params)


def versions() -> dict[str, str]:
    """Versions that may change a result."""
    return {
        "kart": kart.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # a full disk says no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # where nothing can be written, nothing can be removed: that is told by what came before
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` to `path` as JSON for readers, whole or not at all; see `schema.dumps`."""
    write_text(path, schema.dumps(value, indent=1) + "\n")


def check_replaced(
    function: str, path: Path, is_own: Callable[[dict[str, Any]], bool], *others: Path
) -> None:
    """Raises ValueError where `path`, JSON that is to be written beside the files `others`, is
    there and not `is_own`, or one of them without it: what somebody else wrote is not replaced.
    """
    there = [one for one in (path, *others) if one.exists()]
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path in there else None
    except (OSError, ValueError, RecursionError):
        found = None
    if there and not (isinstance(found, dict) and is_own(found)):
        raise ValueError(
            f"`{function}` replaces what it wrote itself alone, got {str(there[0])!r} of something "
            "else, where it is to write. Choose another name, or remove that file."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _describe(
    function: str, node: Tree, name: str, tensors: dict[str, Tensor], depth: int = 0
) -> Any:
    """The containers of `node` as JSON, a leaf being its stored name; leaves go into `tensors`."""
    if depth > DEPTH:
        raise ValueError(
            f"`{function}` needs trees at most {DEPTH} containers deep, got {name[:60]!r}... "
            "Flatten it."
        )
    if isinstance(node, Tensor):
        if name in tensors:
            raise ValueError(
                f"`{function}` needs one leaf per dotted name, got two at {name!r}. "
                f"Rename a key that has a dot in it."
            )
        tensors[name] = node
        return name
    if isinstance(node, dict):
        kind, items = "dict", node
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        kind, items = "namedtuple", node._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        items = {str(i): child for i, child in enumerate(node)}
    else:
        raise ValueError(
            f"`{function}` needs trees of tensors, got {type(node).__name__} at {name!r}. "
            f"Make it a tensor, or put it into the config."
        )
    for key in items:
        if not isinstance(key, str):
            raise ValueError(
                f"`{function}` needs strings as keys, got {key!r} in {name!r}. Convert it with "
                f"`str`."
            )
    parts = {
        key: _describe(function, child, f"{name}.{key}", tensors, depth + 1)
        for key, child in items.items()
    }
    return {kind: parts}


def _has_namedtuple(structure: Any) -> bool:
    if isinstance(structure, str):
        return False
    ((kind, parts),) = structure.items()
    return kind == "namedtuple" or any(_has_namedtuple(part) for part in parts.values())


def _leaf_names(structure: Any) -> list[str]:
    if isinstance(structure, str):
        return [structure]
    ((_, parts),) = structure.items()
    return [name for part in parts.values() for name in _leaf_names(part)]


def _build(structure: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(structure, str):
        return tensors[structure]
    ((kind, parts),) = structure.items()
    built = {key: _build(part, tensors) for key, part in parts.items()}
    return {"dict": dict, "list": list, "tuple": tuple}[kind](
        built if kind == "dict" else built.values()
    )


def _restore(
    path: str | os.PathLike, stored: dict[str, Tensor], structure: Any, name: str, template: Tree
) -> Tree:
    wanted: dict[str, Tensor] = {}
    wanted_structure = _describe("load_state", template, name, wanted)
    problems = {
        "missing in the file": [n for n in wanted if n not in stored],
        "missing in the template": [n for n in stored if n not in wanted],
        "different": [
            f"{n} {_kind(stored[n])} for {_kind(wanted[n])}"
            for n in wanted
            if n in stored and _kind(stored[n]) != _kind(wanted[n])
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if not found and structure != wanted_structure:
        found = ["lists, tuples, dicts or NamedTuples in other places"]
    if found:
        raise ValueError(
            f"`load_state` needs a template like what {str(path)!r} holds as {name!r}, got leaves "
            f"{'; '.join(found)}. Make it with the model and optimiser of the saved config."
        )

    def placed(leaf_path: str, leaf: Tensor) -> Tensor:
        found = stored[f"{name}.{leaf_path}" if leaf_path else name]
        return _own(found, torch.device("cpu") if leaf.is_meta else leaf.device)

    return tree.map_named(placed, template)


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _own(x: Tensor, device: torch.device) -> Tensor:
    # a copy: what safetensors returns is mapped from the file, and would change or crash with it
    return x.to(device, copy=True)


@contextlib.contextmanager
def _open(function: str, path: str | os.PathLike) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its kart header."""
    path = _path(function, path)
    where = repr(str(path))
    if not path.is_file():
        raise ValueError(
            f"`{function}` needs a checkpoint file, got {where}, which is "
            f"{'no file' if path.exists() else 'not there'}. Check the path."
        )
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("kart")
            if text is None:
                raise ValueError(
                    f"`{function}` needs a checkpoint written by kart, got {where} without kart's "
                    f"metadata. Weights with timm's names go through `from_timm`."
                )
            header = _header(function, where, text)
            named = {leaf for tree_ in header["trees"].values() for leaf in _leaf_names(tree_)}
            if named != set(file.keys()):
                raise _damaged(function, where, "its metadata names other tensors than it holds")
            yield file, header
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"`{function}` needs a whole safetensors file, got {where} "
            f"({' '.join(str(error).split())[:200]}). It is damaged or truncated, or of another "
            "kind: copy it again, or take an earlier checkpoint."
        ) from error


def _header(function: str, where: str, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text, parse_constant=_no_number)
        version, writer = header["format"], header["kart"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(function, where, repr(error)[:200]) from error
    if type(version) is not int or not isinstance(writer, str):
        raise _damaged(function, where, f"its format is {version!r:.50}, its writer {writer!r:.50}")
    if version != FORMAT:
        raise ValueError(
            f"`{function}` needs a file of format {FORMAT}, got format {version} in {where}, "
            f"written by kart {writer[:50]}. Update kart, or read it with that version."
        )
    if _sealed(header) != text:
        raise _damaged(function, where, "it is not what was written")
    names = ("format", "kart", "torch", "config", "trees", "digests")
    trees, digests = header.get("trees"), header.get("digests")
    if set(header) != {*names, "seal"} or not isinstance(trees, dict) or "params" not in trees:
        raise _damaged(function, where, f"it has {sorted(header)}")
    for name, structure in trees.items():
        wrong = _misshapen(structure, name)
        if wrong:
            raise _damaged(function, where, wrong)
    if not isinstance(digests, dict) or set(digests) != set(trees):
        raise _damaged(function, where, "it has digests of other trees")
    return {key: header[key] for key in names}


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _misshapen(structure: Any, name: str, depth: int = 0) -> str:
    """What is wrong with the containers of a tree, empty if nothing is."""
    if depth > DEPTH:
        return f"{name[:50]!r} is nested more than {DEPTH} deep"
    if isinstance(structure, str):
        return "" if structure == name else f"{name!r} is stored as {structure!r:.50}"
    kinds = ("dict", "list", "tuple", "namedtuple")
    if not isinstance(structure, dict) or len(structure) != 1 or [*structure][0] not in kinds:
        return f"{name!r} is no container: {structure!r:.50}"
    ((kind, parts),) = structure.items()
    if not isinstance(parts, dict):
        return f"{name!r} has no parts: {parts!r:.50}"
    if kind in ("list", "tuple") and list(parts) != [str(i) for i in range(len(parts))]:
        return f"{name!r} has items {list(parts)!r:.50}"
    wrong = (_misshapen(part, f"{name}.{key}", depth + 1) for key, part in parts.items())
    return next(filter(None, wrong), "")


def _damaged(function: str, where: str, why: str) -> ValueError:
    return ValueError(
        f"`{function}` needs a checkpoint as kart wrote it, got {where}, which is damaged: {why}. "
        "Take an earlier checkpoint."
    )


def _check_keys(value: Any) -> None:
    """Raises TypeError where a dict has keys that JSON would turn into strings."""
    for key in value if isinstance(value, Mapping) else ():
        if not isinstance(key, str):
            raise TypeError(f"the key {key!r} is no string")
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts if isinstance(value, Mapping | list | tuple) else ():
        _check_keys(part)


def _sealed(header: dict[str, Any]) -> str:
    """A header as JSON, with a digest of the rest of it."""
    bare = json.dumps({k: v for k, v in header.items() if k != "seal"}, allow_nan=False)
    seal = hashlib.sha256(bare.encode()).hexdigest()
    return f'{bare[:-1]}, "seal": "{seal}"}}'


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].to("cpu").contiguous()
        digest.update(f"{name} {_kind(x)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(
    function: str, path: str | os.PathLike, file: Any, header: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    """The tensors of one tree of an open file, after a check that they are what was written."""
    where = repr(str(path))
    try:
        found = {leaf: file.get_tensor(leaf) for leaf in _leaf_names(header["trees"][name])}
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(function, where, f"{error!r:.200}") from error
    if _digest(found) != header["digests"][name]:
        raise _damaged(function, where, f"the tensors of {name!r} are not what was written")
    return found


def _path(function: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ValueError(f"`{function}` needs `path` to be the path of a file, got {path!r:.100}.")
    try:
        Path(path).exists()
    except OSError as error:  # too long a name
        raise ValueError(
            f"`{function}` needs `path` to be the path of a file, got {str(path)!r:.100} "
            f"({error.strerror})."
        ) from error
    return Path(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes contiguous tensors on the CPU as safetensors, whole or not at all, by the umask."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > STALE_S:
                shutil.rmtree(stale, ignore_errors=True)
    # a directory: safetensors first writes a file of its own beside the one that it is to write,
    # under a name that nobody could tell and readable by its owner alone
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        written = temporary / path.name
        try:
            safetensors.torch.save_file(dict(tensors), written, metadata=metadata)
        except safetensors.SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        written.chmod(temporary.stat().st_mode & 0o666)
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def donor_leaves(model: Any, given: Any) -> dict[str, Tensor]:
    """The tensors of a donor by the names of `model`: out of its wrapper, without prefixes, and
    operators of `kart.bridges.timm` where `model` has them.
    """
    if isinstance(model, Mapping) and hasattr(given, "init"):
        raise ValueError(
            "`from_timm` needs the model first, got a dict first and a model second. "
            "Call `from_timm(model, state_dict)`."
        )
    if not hasattr(model, "init") or not hasattr(model, "config"):
        raise ValueError(
            f"`from_timm` needs a model of `kart.models.create`, got {type(model).__name__}. "
            "Call `from_timm(model, state_dict)`."
        )
    if not isinstance(given, Mapping):
        advice = "Pass its `state_dict()`." if hasattr(given, "state_dict") else "Load it first."
        raise ValueError(
            f"`from_timm` needs a dict of tensors by name, got {type(given).__name__}. {advice}"
        )
    wrapped = [key for key in WRAPPERS if isinstance(given.get(key), Mapping)]
    if len(wrapped) > 1:
        raise ValueError(
            f"`from_timm` needs one state dict, got {', '.join(wrapped)}. Pass one of them, as in "
            f"`torch.load(...)[{wrapped[0]!r}]`."
        )
    found: Mapping[Any, Any] = given[wrapped[0]] if wrapped else given
    odd = [name for name, leaf in found.items() if not isinstance(leaf, Tensor)]
    if odd:
        raise ValueError(
            f"`from_timm` needs tensors by dotted name, got {type(found[odd[0]]).__name__} under "
            f"{odd[0]!r}. Pass the inner dict, as in `torch.load(...)[{odd[0]!r}]`."
        )
    names = {str(name): leaf for name, leaf in found.items()}
    while lead := next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), ""):
        names = {name.removeprefix(lead): leaf for name, leaf in names.items()}
    config: Any = model.config  # type: ignore
    return _unbridged(names, getattr(config, "sharing", None) == "universal")


# where a layer of `kart.bridges.timm` has its operator, and where a block of kart's has it
BRIDGED, OWN = ".attn.operator.", ".operator."


def bridged(params: Params) -> dict[str, Tensor]:
    """The leaves of a ViT as a timm model with layers of `kart.bridges.timm` names them."""
    found: dict[str, Tensor] = {}
    for name, leaf in tree.named(params).items():
        shared = name.startswith(OWN[1:])
        blocks = [f"blocks.{i}." for i in params["blocks"]] if shared else [""]
        found |= {(prefix + name).replace(OWN, BRIDGED, 1): leaf for prefix in blocks}
    return found


def _unbridged(names: Mapping[str, Tensor], universal: bool) -> dict[str, Tensor]:
    """Leaves named as by `bridged`, or by kart, as kart names them."""
    found: dict[str, Tensor] = {}
    for name, leaf in names.items():
        block, bridge, rest = name.partition(BRIDGED)
        own = name if not bridge else OWN[1:] + rest if universal else block + OWN + rest
        if own in found and not torch.equal(found[own], leaf):
            raise ValueError(
                f"`from_timm` needs one operator for all blocks, got several, which differ in "
                f"{rest!r}. Create the model with blockwise sharing."
            )
        found[own] = leaf
    return found


def _hints(own: Mapping[str, Tensor], donors: Mapping[str, Tensor]) -> list[str]:
    """What to do about donors that are known not to fit."""
    hints = []
    if any(name.startswith(("dist_token", "head_dist.")) for name in donors):
        hints.append(
            "The donor is a distilled DeiT, with a second token and head that kart's models lack: "
            "take the checkpoint without distillation."
        )
    if any(name.endswith((".relative_position_index", ".attn_mask")) for name in donors):
        hints.append(
            "The donor is of the original Swin repository: convert its names with timm's "
            "`checkpoint_filter_fn`."
        )
    half = [n for n in donors if n not in own and n.startswith(PREFIXES)]
    if half:
        hints.append(
            f"Some names begin with a prefix ({half[0]}) and others do not: pass one model's."
        )
    ours, theirs = (x.get("patch_embed.proj.weight") for x in (own, donors))
    if ours is not None and theirs is not None and theirs.ndim == 4:
        if theirs.shape[1] != ours.shape[1]:
            hints.append(
                f"The donor reads images of {theirs.shape[1]} channels, the model of "
                f"{ours.shape[1]}: create the model with in_channels={theirs.shape[1]} (kart "
                "train: take data with as many)."
            )
        if theirs.shape[2:] != ours.shape[2:] and theirs.shape[2] == theirs.shape[3]:
            hints.append(
                f"Create the model with the donor's patch_size={theirs.shape[2]} (kart train: "
                f"--patch-size {theirs.shape[2]})."
            )
    return hints


def _operator(name: str) -> str:
    """The path of the operator that a leaf belongs to, "" where it belongs to none."""
    before, found, _ = f".{name}.".partition(".operator.")
    return before + found if found else ""


def _is_head(name: str) -> bool:
    return name.split(".")[0] == "head"


def _resized(donor: Tensor, own: Tensor, config: Any) -> Tensor:
    """Positions of a square grid on that of `config`; the donor itself where they cannot fit."""
    grid = _grid(config)
    prefix = own.shape[-2] - grid[0] * grid[1]
    if donor.ndim != 3 or donor.shape[-1] != own.shape[-1]:
        return donor
    side = math.isqrt(max(0, donor.shape[-2] - prefix))
    if side < 1 or side**2 != donor.shape[-2] - prefix:
        return donor
    return layers.resize_positions(donor.detach(), (side, side), grid)


def _grid(config: Any) -> tuple[int, int]:
    def pair(size: int | tuple[int, int]) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    (height, width), (rows, columns) = pair(config.image_size), pair(config.patch_size)
    return height // rows, width // columns
