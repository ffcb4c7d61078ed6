"""`kart bench`: what it measures and prints, not how fast anything is."""

import argparse
import json

import pytest

from kart import cli
from kart.analysis import bench


def quiet(what):
    pass


def test_the_quick_run_measures_every_engine_and_writes_what_it_found(capsys, tmp_path):
    path = tmp_path / "cost.json"
    argv = ["bench", "--quick", "--repeats", "1", "--op-batch", "1", "--out", str(path)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert "op G=1 N=197" in printed.err and "SDPA backend" in printed.out
    found = json.loads(path.read_text())
    variants = {row["variant"] for row in found["rows"]}
    assert {"softmax", "naive", "torch"} <= variants
    for row in found["rows"]:
        assert row["both"]["ms"] > 0 and row["flops"] > 0 and row["bytes"] > 0
        assert row["variant"] != "softmax" or row["both"]["ratio"] == 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(capsys, tmp_path):
    assert cli.main(["bench", "--out", str(tmp_path / "no" / "cost.json")]) == 2
    assert "--out" in capsys.readouterr().err


def test_verdicts_follow_the_goals():
    def row(variant, **fields):
        return {"what": "memory", "variant": variant, "ratio": 1.1, "peak_mib": 900.0, **fields}

    assert bench.verdict(row("auto")) == "reach 1.2: met, then 1.05: missed"
    assert bench.verdict(row("full rank G=10, batch 1")) == "reach 1000 MB peak: met"
    late = row("full rank G=10, batch 1", peak_mib=960.0)
    assert bench.verdict(late) == "reach 1000 MB peak: missed"
    assert bench.verdict({"what": "step", "variant": "naive", "both": {"ratio": 2.0}}) == ""


@pytest.mark.slow
def test_a_step_and_its_memory_are_measured():
    args = argparse.Namespace(device="cpu", precision="float32", step_batch=1, repeats=1)
    rows = list(bench.step_level(args, bench.Clock("cpu"), quiet))
    assert [row["variant"] for row in rows] == list(bench.STEPS)
    rows += list(bench.memory_level(args, quiet))
    sizes = {row["variant"]: row["grown_mib"] for row in rows if row["what"] == "memory"}
    assert 0 < sizes["auto"] < sizes["naive"] and sizes["auto"] < sizes["auto, vmap"]
    assert "full rank G=10, batch 8" in bench.show(rows)
