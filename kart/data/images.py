"""One image file as 8-bit grey or RGB pixels, the way a viewer shows it."""

import warnings
from typing import Any, NamedTuple

from kart.data.source import INSTALL, first_line

GREY_MODES = frozenset({"1", "L", "LA", "La"})
_TURNED = "turned as EXIF says"
_DEEP = "16 bits a channel scaled to 8"
TO_COLOUR = "grey repeated in three channels"
TO_GREY = "colour to grey by luminance"


class Header(NamedTuple):
    """What a file says before its pixels are decoded."""

    size: tuple[int, int]  # width, height, as shown
    mode: str  # Pillow's
    format: str
    grey: bool
    changes: tuple[str, ...]  # what decoding changes


def pillow() -> Any:
    """Pillow's module `Image`."""
    try:
        from PIL import Image
    except ImportError as err:
        raise ValueError(f"`load` needs Pillow to decode or resize images. {INSTALL}") from err
    return Image


def header(file: Any, where: str) -> Header:
    """The size, mode and format of an image file, and what decoding it will change."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow().open(file) as opened:
                return _header(opened)
    except Exception as err:
        raise _damaged(where, err) from err


def decode(file: Any, where: str) -> tuple[Any, Header]:
    """An image file as a Pillow image of mode RGB (`header.grey` says if it was grey).

    Turned as its EXIF orientation says; transparency composited on white; palettes, CMYK and other
    colour spaces by Pillow's formulas, without their ICC profiles; 16 bits scaled to 8 over the
    whole range; of an animation the first frame.
    """
    pillow()
    from PIL import ImageOps

    try:
        # what Pillow warns of (odd EXIF, a palette with transparency) is dealt with or harmless
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow().open(file) as opened:
                # before decoding: a TIFF turns itself then, and forgets that it did
                told = _header(opened)
                opened.load()
                image = ImageOps.exif_transpose(opened) if _TURNED in told.changes else opened
                if image.mode.startswith("I"):
                    image = _to_8_bits(image)
                elif image.mode == "F":
                    raise ValueError("mode F is neither 8 nor 16 bits a channel")
                if image.has_transparency_data or image.mode in ("La", "RGBa"):
                    image = image.convert("RGBA")
                    ground = pillow().new("RGBA", image.size, "white")
                    image = pillow().alpha_composite(ground, image)
                return image.convert("RGB"), told
    # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... on a damaged file
    except Exception as err:
        raise _damaged(where, err) from err


def resize(image: Any, size: int) -> Any:
    """`image` with its shorter side scaled to `size` (bicubic) and its centre square cropped."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), resample=pillow().Resampling.BICUBIC, box=box)


def _header(opened: Any) -> Header:
    mode, changes = opened.mode, []
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
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    # 32-bit integers have no range of their own; 16-bit files are read into them by some formats
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} has values outside of 16 bits")
    return pillow().fromarray(((values + 128) // 257).astype(np.uint8))


def _damaged(where: str, err: Exception) -> ValueError:
    if isinstance(err, ValueError) and str(err).startswith("`load` needs Pillow"):
        return err
    return ValueError(
        f"`load` needs whole 8- or 16-bit images, got {where}: {first_line(err)} "
        "Replace or remove it."
    )
