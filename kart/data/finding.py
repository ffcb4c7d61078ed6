"""What a name or path means: a public data set, parquet files or folders of images."""

import os
import re
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from kart import schema
from kart.data import files, folders, public, tables
from kart.data.dataset import Unused
from kart.data.names import SHORT, Public
from kart.data.source import Source

# sources that need no files, see `digits`, and where they are from
BUILT_IN = {
    "digits": "the digits of scikit-learn",
    "masked_digits": "the masked digits of scikit-learn",
}


class Options(NamedTuple):
    """How to read a source, where that is not told by itself."""

    image_column: str | None = None
    label_column: str | None = None
    config: str | None = None
    revision: str | None = None

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """Those of images and labels."""
        return self.image_column, self.label_column


def address(source: str | Path, options: Options) -> tuple[str | Path, Options]:
    """A source without the options that it names behind a question mark, and all options.

    >>> address("uoft-cs/cifar100?label_column=coarse_label", Options(config="cifar100"))[0]
    'uoft-cs/cifar100'
    """
    name, mark, text = str(source).partition("?")
    # a directory may be called so
    if not mark or Path(os.path.expanduser(str(source))).exists():
        return source, options
    try:
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        pairs = []
    given = dict(pairs)
    if (
        not given
        or len(given) < len(pairs)
        or not all(given.values())
        or set(given) - {*Options._fields}
    ):
        raise ValueError(
            f"`load` needs NAME?OPTION=VALUE&..., each of {', '.join(Options._fields)} once at "
            f"most, got {str(source)!r}. Correct what is behind the question mark."
        )
    twice = [option for option in given if getattr(options, option) is not None]
    if twice:
        raise ValueError(
            f"`load` needs each option once, got `{twice[0]}` and {str(source)!r}. Drop one."
        )
    return name, options._replace(**given)


class Finding(NamedTuple):
    """A source that was found: read already if it lies on this machine, else its public name."""

    name: str
    identity: list  # what makes it another data set, JSON
    source: Source | None
    public: Public | None
    options: Options

    def open(self, scratch: Path) -> Source:
        """The source; `scratch` is where a library may write."""
        if self.source is not None:
            return self.source
        assert self.public is not None  # where nothing is read already
        options = self.options
        return public.read(self.public, options.columns, options.revision, scratch, [*SHORT])


def find(source: str | Path, options: Options) -> Finding:
    """Looks for `source` below its directory, or among the names."""
    text = str(source)
    root = Path(os.path.expanduser(text))
    if text in SHORT:
        if root.is_dir():
            raise ValueError(
                f"`load` cannot tell the directory {text!r} from the public data set of that name. "
                f"Pass './{text}' or {SHORT[text].path!r}."
            )
        known = SHORT[text]
        options = options._replace(
            image_column=options.image_column or known.image,
            label_column=options.label_column or known.label,
        )
        return _public(known._replace(config=options.config or known.config), options)
    if root.is_dir():
        return _directory(root, text, options)
    # "data/cifar" beside a directory "data" is a mistyped path: say so before the network times out
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not root.parent.is_dir():
        return _public(Public(text, options.config), options)
    if root.exists():
        raise ValueError(
            f"`load` needs `source` to be a directory, got the file {text!r}. Unpack it if it is "
            "an archive, and name the directory."
        )
    raise ValueError(
        f"`load` needs `source` to be one of {', '.join([*BUILT_IN, *SHORT])}, a directory or a "
        f"public name like 'uoft-cs/cifar10', got {text!r}."
        + schema.near_matches(text, _candidates(text))
    )


def _public(known: Public, options: Options) -> Finding:
    identity = ["public", *known, *options.columns, options.revision]
    return Finding(known.path, identity, None, known, options)


def _directory(root: Path, text: str, options: Options) -> Finding:
    found = files.walk(root)
    images, parquet = (files.below(found.top, kind) for kind in ("images", "tables"))
    if not images and not parquet:
        seen = ", ".join(f"{item.what} ({item.count})" for item in found.unused[:8])
        raise ValueError(
            f"`load` needs a directory of parquet files or images, got {text!r} with none"
            f"{': only ' + seen if seen else ''}. Check the path, or fetch the data again."
        )
    # the footers tell, but only where there is a choice: reading them needs pyarrow
    table = bool(parquet) and (
        not images or any(tables.has_images(path, options.image_column) for path in parquet)
    )
    if options.config or options.revision or (any(options.columns) and not table):
        raise ValueError(
            f"`load` needs `config` and `revision` for public names only, and columns for "
            f"tables only, got them with the directory {text!r}. Leave them out."
        )
    if table:
        if images:
            _check_beside(root, found, len(parquet))
        source = tables.read(root, parquet, options.columns)
        source = source._replace(unused=(*found.unused, *source.unused))
        left = [
            Unused(f"*{suffix}", count, "images beside the parquet files")
            for suffix, count in sorted(Counter(path.suffix.lower() for path in images).items())
        ]
    else:
        source = folders.read(root, found)
        left = [
            Unused(str(path.relative_to(root)), 1, "a parquet file without images")
            for path in parquet
        ]
    source = source._replace(unused=(*source.unused, *left))
    infos = [(str(path.relative_to(root)), path.stat()) for path in source.files]
    notes = [(place, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for place, s in infos]
    real = Path(os.path.realpath(root))
    identity = ["directory", str(real), notes, options.columns]
    return Finding(real.name, identity, source, None, options)


def _check_beside(root: Path, found: files.Found, count: int) -> None:
    """Refuses a directory that holds a table and a whole data set in folders beside it."""
    try:
        folders.read(root, found)
    except ValueError:
        return
    raise ValueError(
        f"`load` found {count} parquet files and folders of images in {str(root)!r}, both a data "
        "set. Name the directory of the one that is meant."
    )


def _candidates(source: str) -> list[str]:
    parent = Path(os.path.expanduser(source)).parent
    beside = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return [*BUILT_IN, *SHORT, *(known.path for known in SHORT.values()), *beside]
