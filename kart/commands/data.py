"""`kart data`: what would be read of a source of images."""

import argparse
from pathlib import Path

from kart import data
from kart.commands.command import Command

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="digits, a directory, or a public name")
    parser.add_argument("--sheet", metavar="PNG", help="draw some images of each class into a file")
    parser.add_argument("--image-column", metavar="NAME", help="the column of the images")
    parser.add_argument("--label-column", metavar="NAME", help="the column of the labels")
    parser.add_argument("--config", metavar="NAME", help="configuration of a public name")
    parser.add_argument("--revision", metavar="NAME", help="git revision of a public name")


def _run(args: argparse.Namespace) -> int:
    sheet = None if args.sheet is None else Path(args.sheet)
    if sheet is not None and (sheet.suffix.lower() not in PICTURES or not sheet.parent.is_dir()):
        raise ValueError(
            f"`--sheet` needs a file name that ends in {', '.join(PICTURES)} in a directory that "
            f"is there, got {args.sheet!r}."
        )
    names = ("image_column", "label_column", "config", "revision")
    options = {name: getattr(args, name) for name in names}
    found = data.describe(args.source, **options)
    root = Path(args.source.partition("?")[0]).expanduser()
    if sheet is not None and root.is_dir() and sheet.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"`--sheet` needs a file outside of the data, got {args.sheet!r}, which would be "
            "one of their images. Choose another place."
        )
    print(data.summary(found))
    if sheet is not None:
        data.contact_sheet(args.source, **options).save(sheet)
        print(f"written to {sheet}")
    return 0


COMMAND = Command(
    "data",
    "show what would be read: splits, classes, counts, sizes, what is left out or changed",
    _flags,
    _run,
)
