"""Run directories: one training run on disk, written so that it can be killed at any moment.

    config.json       config of the run and its members, its data, versions; written once
    metrics.jsonl     one record an epoch, in order
    last.safetensors  weights and the whole state after the last finished epoch
    best.safetensors  weights of the epoch with the best validation top-1, each member's own
    start.json        what was taken of the weights that it began with, if it did
    trajectory/       `Config.trajectory` snapshots of the weights, evenly spaced over the steps

A directory that is opened again with the same config and data goes on where it stopped, to the same
result. Every record and checkpoint carries the id of its run, and is checked when it is read.

| module | what it holds |
|---|---|
| `identity` | what makes a directory a run, and whose it is |
| `owned` | what a run owns of its data |
| `names` | the names of runs |
| `donors` | what a run begins with, where that is another one |
| `training` | training in a directory |
| `records` | metrics by epoch, scores of `kart eval` |
| `weights` | checkpoints and the trajectory |
| `room` | room on the disk, and waiting for it |
| `results` | the runs below a directory, compared |
"""

from kart.runs.identity import check_place, claim, describe, locked, members, read, read_config
from kart.runs.names import OPTIONS, default_directory, homes, options_of, slug
from kart.runs.records import check_finished, diverged, read_metrics, read_scores, write_scores
from kart.runs.results import baseline_first, compare, distinct, find, group_size, parts
from kart.runs.room import check_writable
from kart.runs.training import execute, restore, snapshot_steps
from kart.runs.weights import Trained, load_trajectory, load_weights, only

__all__ = [
    "OPTIONS",
    "Trained",
    "baseline_first",
    "check_finished",
    "check_place",
    "check_writable",
    "claim",
    "compare",
    "default_directory",
    "describe",
    "distinct",
    "diverged",
    "execute",
    "find",
    "group_size",
    "homes",
    "load_trajectory",
    "load_weights",
    "locked",
    "members",
    "only",
    "options_of",
    "parts",
    "read",
    "read_config",
    "read_metrics",
    "read_scores",
    "restore",
    "slug",
    "snapshot_steps",
    "write_scores",
]
