"""Image files as 8-bit grey or RGB pixels, the way a viewer shows them, and what that changes."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kart.data.dataset import Converted
from kart.data.source import first_line, library

GREY_MODES = frozenset({"1", "L", "LA", "La"})
_TURNED = "turned as EXIF says"
_DEEP = "16 bits a channel scaled to 8"
_TO_COLOUR = "grey repeated in three channels"
_TO_GREY = "colour to grey by luminance"

Box = Callable[[int, int], tuple[int, int, int, int]]


class Header(NamedTuple):
    """What a file says before its pixels are decoded."""

    size: tuple[int, int]  # width, height, as shown
    mode: str  # Pillow's
    format: str
    grey: bool
    changes: tuple[str, ...]  # what decoding changes


def pillow() -> Any:
    """Pillow's module `Image`."""
    return library("PIL.Image", "Pillow to decode or resize images")


def header(file: Any, where: str) -> Header:
    """The size, mode and format of an image file, and what decoding it will change."""
    with _opened(file, where) as (_, told):
        return told


def decode(file: Any, where: str) -> tuple[Any, Header]:
    """An image file as a Pillow image of mode RGB (`header.grey` says if it was grey).

    Turned as its EXIF orientation says; transparency composited on white; palettes, CMYK and other
    colour spaces by Pillow's formulas, without their ICC profiles; 16 bits scaled to 8 over the
    whole range; of an animation the first frame.
    """
    with _opened(file, where) as (opened, told):
        return _pixels(opened, told), told


def cut(file: Any, where: str, box: Box, size: int) -> Any:
    """The part `box(height, width)`, `(top, left, height, width)`, of an image file as `decode` has
    it, scaled to `size` x `size`: bilinear, antialiased when smaller, as Pillow and torchvision.

    Where a JPEG has six times the pixels a side that are needed, or more, libjpeg scales it by 2 or
    4 while it decodes, and leaves three times as many: the difference is below one grey level in
    the mean, since the filter of the first step is hardly seen from there on (by 8 it is).
    """
    with _opened(file, where) as (opened, told):
        width, height = told.size
        top, left, rows, columns = box(height, width)
        spare = min(rows, columns) // (3 * size)
        scale = max(power for power in (1, 2, 4) if power <= max(1, spare))
        # a turn would bring the filled-up edge of a scaled one to the front
        if opened.format != "JPEG" or _TURNED in told.changes:
            scale = 1
        if scale > 1:
            opened.draft(None, (opened.width // scale, opened.height // scale))
        image = _pixels(opened, told)
        edges = (left, top, left + columns, top + rows)
        place = tuple(edge / scale for edge in edges)
        return image.resize((size, size), pillow().Resampling.BILINEAR, box=place)


@contextlib.contextmanager
def _opened(file: Any, where: str) -> Iterator[tuple[Any, Header]]:
    try:
        # what Pillow warns of (odd EXIF, a palette with transparency) is dealt with or harmless
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow().open(file) as opened:
                # before decoding: a TIFF turns itself then, and forgets that it did
                yield opened, _header(opened)
    # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... on a damaged file
    except Exception as err:
        raise _damaged(where, err) from err


def _pixels(opened: Any, told: Header) -> Any:
    from PIL import ImageOps

    opened.load()
    image = ImageOps.exif_transpose(opened) if _TURNED in told.changes else opened
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        image = image.convert("RGBA")
        ground = pillow().new("RGBA", image.size, "white")
        image = pillow().alpha_composite(ground, image)
    return image.convert("RGB")


def resize(image: Any, size: int) -> Any:
    """`image` with its shorter side scaled to `size` (bicubic) and its centre square cropped."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), resample=pillow().Resampling.BICUBIC, box=box)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Grey `(..., )` of RGB `(..., 3)` by ITU-R 601 as Pillow rounds it; grey pixels stay."""
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((pixels @ weights + 0x8000) >> 16).astype(np.uint8)


def channels_first(pixels: np.ndarray, channels: int) -> np.ndarray:
    """RGB `(..., height, width, 3)` as `(..., channels, height, width)`, with one channel grey."""
    if channels == 1:
        return luminance(pixels)[..., None, :, :]
    return np.moveaxis(pixels, -1, -3)


def tally(
    changes: Sequence[tuple[str, ...]],
    grey: np.ndarray,
    index: np.ndarray,
    channels: int,
    renumbered: int = 0,
) -> tuple[Converted, ...]:
    """The changes at `index`, counted by kind, of images that come out with `channels`.

    `changes` and `grey`, bool `(n,)`, are those of each image's `Header`.
    """
    counts = Counter(what for i in index for what in changes[i])
    turned = int(grey[index].sum())
    counts[_TO_COLOUR if channels == 3 else _TO_GREY] += (
        turned if channels == 3 else len(index) - turned
    )
    counts["labels renumbered to agree by name"] += renumbered
    return tuple(Converted(what, count) for what, count in sorted(counts.items()) if count)


def _header(opened: Any) -> Header:
    mode, changes = opened.mode, []
    if mode == "F":
        raise ValueError("mode F is neither 8 nor 16 bits a channel")
    if mode == "I" and opened.format == "TIFF":
        # what is white in one is not said anywhere: as 16 bits a mask of 0 to 255 would be black
        raise ValueError("mode I has values outside of 16 bits, or may: they are of 32 or signed")
    raw = str(opened.tile[0][3]) if opened.tile else ""
    if mode.startswith("I") or ";16" in raw:
        changes.append(_DEEP)
    if opened.has_transparency_data or mode in ("La", "RGBa"):
        changes.append("transparency composited on white")
    if mode in ("P", "PA"):
        changes.append("palette to RGB")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        changes.append(f"{mode} to RGB")
    size: tuple[int, int] = opened.size
    if opened.format == "TIFF":
        # as stored; Pillow's own are turned already in some versions
        size = (int(opened.tag_v2[256]), int(opened.tag_v2[257]))
    # a PNG is decoded by it: this may stand behind the pixels
    turn = opened.getexif().get(0x0112, 1)
    if turn in range(2, 9):
        changes.append(_TURNED)
    if turn in range(5, 9):
        size = (size[1], size[0])
    if getattr(opened, "is_animated", False):
        changes.append("first frame of several")
    grey = mode in GREY_MODES or mode.startswith("I")
    return Header(size, mode, opened.format or "unknown", grey, tuple(changes))


def _to_8_bits(image: Any) -> Any:
    values = np.asarray(image).astype(np.int64)
    # files of 16 bits are read into 32 by some formats
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} has values outside of 16 bits")
    pixels = ((values + 128) // 257).astype(np.uint8)
    # of a PNG: the one grey that is transparent, which 8 bits could not tell from its neighbours
    if isinstance(clear := image.info.get("transparency"), int):
        pixels[values == clear] = 255
    return pillow().fromarray(pixels)


def _damaged(where: str, err: Exception) -> ValueError:
    if isinstance(err, ValueError) and str(err).startswith("`load` needs Pillow"):
        return err
    if isinstance(err, OSError) and err.errno is not None:
        return ValueError(
            f"`load` could not read the image {where}: {err.strerror}. Check the path and its "
            "permissions."
        )
    # Pillow's own words end in the address of the file in memory
    unknown = type(err).__name__ == "UnidentifiedImageError"
    told = "cannot identify the image file." if unknown else first_line(err)
    return ValueError(
        f"`load` needs whole 8- or 16-bit images, got {where}: {told} Replace or remove it."
    )
