"""`kart bench`: what it measures and prints, not how fast anything is."""

import argparse
import json

import pytest
import torch
from torch.testing import assert_close

from kart import cli, layers, models, operators
from kart.analysis import bench
from kart.models import blocks


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
        return {"what": "memory", "variant": variant, "ratio": 0.99, "peak_mib": 900.0, **fields}

    assert bench.verdict(row("auto")) == "reach 1.0: met; then 0.98: missed, 1.01 x of it"
    assert bench.verdict(row("full rank G=10, batch 1")) == "reach 1000 MB peak: met"
    late = row("full rank G=10, batch 1", peak_mib=960.0)
    assert bench.verdict(late) == "reach 1000 MB peak: missed"
    assert bench.verdict({"what": "step", "variant": "naive", "both": {"ratio": 2.0}}) == ""


def test_a_missed_goal_is_told_with_what_its_products_take():
    row = {"what": "op G=3 N=197", "variant": "cpp", "both": {"ratio": 1.0}, "floor": 0.75}
    assert bench.verdict(row).startswith("reach 0.8: missed, 1.25 x of it; then 0.7: missed")
    assert bench.verdict(row).endswith("; products alone 0.75")


@pytest.mark.parametrize(
    ("spec", "products"),
    [
        ("softmax", 7 * 64),
        ("softconv", 8 * 64),
        ("G3:rank=12", 4 * 64 + 3 * 6 * 12),
        ("G3:rank=12,base=softmax", 7 * 64 + 3 * 6 * 12),
        ("G3:rank=12,project=simplex", 7 * 64 + 3 * 6 * 12 + 4 * 12),
        ("G3:order=full_rank", 4 * 64 + 7 * 6 * 64),
        ("mexican_hat:rank=12", 4 * 64),
        ("G3:order=elementwise", 7 * 64),
        ("G3:order=elementwise,inside=true", 7 * 64),
        ("G3:order=elementwise,base=softmax", 8 * 64),
        ("G3:order=by_distance", 3 * 64),
        ("G3:order=generated,rank=12,base=softmax", 7 * 64 + 3 * 6 * 12),
    ],
)
def test_products_of_a_pair_of_query_and_key(spec, products):
    op = operators.parse(spec).operator
    name = "softmax" if spec == "softmax" else "auto"
    assert bench.op_flops(name, op, 10, 2) == 10 * 10 * 2 * 2 * products


def test_every_goal_is_of_a_row_that_is_measured():
    known = {setting.what for setting in bench.SETTINGS + bench.TABLES + bench.LENGTH_FREE}
    known |= {"op G=3 N=197 bfloat16", "step", "memory", bench.STEP}
    assert {what for what, _ in bench.TARGETS} <= known


def test_a_token_more_is_measured_beside_softmax():
    args = argparse.Namespace(device="cpu", precision="float32", repeats=1)
    rows = list(bench.cache_level(args, bench.Clock("cpu"), quiet))
    assert [row["variant"] for row in rows] == ["softmax", *bench.CACHE]
    assert rows[0]["both"]["ratio"] == 1 and all(row["both"]["ms"] > 0 for row in rows)
    # every one of them has its goal
    assert all("reach 1.5" in bench.verdict(row) for row in rows[1:])
    assert all("KV step" in line for line in bench.show(rows).splitlines() if "G=3" in line)


def test_attention_is_measured_with_its_projections(monkeypatch):
    monkeypatch.setattr(bench, "BLOCKS", {"vit_nano": 1})
    args = argparse.Namespace(device="cpu", precision="float32", repeats=1)
    rows = list(bench.block_level(args, bench.Clock("cpu"), quiet))
    assert [row["variant"] for row in rows] == ["softmax", "auto", "auto G=1"]
    assert all(row["what"] == "attention of vit_nano, projections too" for row in rows)
    # what is timed is the attention of the model
    model = models.create("vit_nano", operator="G1B", num_classes=10, depth=1)
    block = model.init(torch.Generator().manual_seed(0))["blocks"]["0"]
    x = torch.randn(1, model.config.tokens, 64, generator=torch.Generator().manual_seed(1))
    q, k, v = blocks.split_heads(layers.linear(block["attn"]["qkv"], x), 2)
    out = model.operators[0].attend(block["operator"], q, k, v)
    wanted = layers.linear(block["attn"]["proj"], blocks.merge_heads(out))
    assert_close(bench._attention(model, block, x), wanted)


def test_a_cliff_at_some_size_is_seen(monkeypatch):
    args = argparse.Namespace(device="cpu", sizes=12)
    sizes = bench.drawn_sizes(12)
    assert all(17 <= n <= 1025 and 16 <= d <= 128 and 1 <= r <= 48 for n, d, r in sizes)
    monkeypatch.setattr(
        bench, "drawn_sizes", lambda count: [(17 + n // 20, d, r) for n, d, r in sizes]
    )
    calls = iter(range(12))

    def timed(calls_of, repeats, clock):
        # a cost of the form that is fitted, but for one size that takes three times as long
        n, d, r = bench.drawn_sizes(12)[i := next(calls)]
        pairs = max(1, round(4 * (197 / n) ** 2)) * 3 * n**2
        return {"op": [1e-9 * pairs * (d + 2 * r) * (3 if i == 5 else 1)]}

    monkeypatch.setattr(bench, "interleave", timed)
    rows = list(bench.size_level(args, bench.Clock("cpu"), quiet))
    worst = max(rows, key=lambda row: row["over"])
    assert worst is rows[5] and worst["over"] > 1.5
    assert "reach 1.5: missed" in bench.show(rows)


def test_a_plot_does_not_take_the_place_of_the_numbers(tmp_path, capsys):
    argv = ["bench", "--quick", "--repeats", "1", "--out", str(tmp_path / "c.png")]
    assert cli.main(argv) == 2
    assert "`--out` needs a name that does not end in .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_but_an_earlier_measurement_is_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "operator_level", lambda *rest: [{"what": "sizes"}])
    monkeypatch.setattr(bench, "show", lambda rows: "")
    monkeypatch.setattr(bench, "plot", lambda rows, path: path.write_text("plot"))
    monkeypatch.chdir(tmp_path)
    for name, text in (("cost.json", '{"price": 3}'), ("cost.png", "of somebody")):
        (tmp_path / name).write_text(text)
        assert cli.main(["bench", "--quick", "--quiet"]) == 2
        assert f"'{name}' of something else" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()
    for _ in range(2):
        assert cli.main(["bench", "--quick", "--quiet"]) == 0


@pytest.mark.parametrize("flag", ["--sizes", "--step-batch"])
def test_a_quick_run_takes_no_flags_of_the_others(flag, tmp_path, capsys):
    argv = ["bench", "--quick", flag, "4", "--out", str(tmp_path / "c.json")]
    assert cli.main(argv) == 2
    assert f"`{flag}` has no effect with `--quick`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_and_its_memory_are_measured():
    args = argparse.Namespace(device="cpu", precision="float32", step_batch=1, repeats=1)
    rows = list(bench.step_level(args, bench.Clock("cpu"), quiet))
    assert [row["variant"] for row in rows] == list(bench.STEPS)
    rows += list(bench.memory_level(args, quiet))
    sizes = {row["variant"]: row["grown_mib"] for row in rows if row["what"] == "memory"}
    assert 0 < sizes["auto"] < sizes["naive"] and sizes["auto"] < sizes["auto, vmap"]
    assert "full rank G=10, batch 8" in bench.show(rows)
