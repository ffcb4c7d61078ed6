"""Data sets as arrays: fixed splits, a memory-mapped cache, batches as pure functions."""

from kart.data.batches import as_float, batch_indices, generator_for, normalise, take
from kart.data.dataset import SPLITS, Converted, Dataset, Unused
from kart.data.loading import load, notes, read_image
from kart.data.names import SHORT
from kart.data.overview import Description, SplitDescription, contact_sheet, describe, summary

__all__ = [
    "SHORT",
    "SPLITS",
    "Converted",
    "Dataset",
    "Description",
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
    "read_image",
    "summary",
    "take",
]
