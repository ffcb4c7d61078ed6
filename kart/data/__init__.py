"""Data sets as arrays: fixed splits, a memory-mapped cache or files, batches as pure functions."""

from kart.data.batches import as_float, batch_indices, generator_for, normalise, take
from kart.data.dataset import SPLITS, Converted, Dataset, Unused
from kart.data.loading import load, notes, read_images
from kart.data.names import SHORT
from kart.data.overview import Description, SplitDescription, contact_sheet, describe, summary
from kart.data.pictures import Pictures
from kart.data.reading import Cut, Reader, reader
from kart.data.stream import STREAM_LIMIT

__all__ = [
    "SHORT",
    "SPLITS",
    "STREAM_LIMIT",
    "Converted",
    "Cut",
    "Dataset",
    "Description",
    "Pictures",
    "Reader",
    "SplitDescription",
    "Unused",
    "as_float",
    "batch_indices",
    "contact_sheet",
    "describe",
    "generator_for",
    "load",
    "normalise",
    "notes",
    "read_images",
    "reader",
    "summary",
    "take",
]
