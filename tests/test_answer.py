"""The study of the answer on made-up records with known gains, and one unit trained."""

import csv
import dataclasses
import itertools
import json
import random

import pytest

from kart import statistics
from studies import answer


def record(cell, arm, seed, top1, rate=answer.RATES[0]):
    unit = answer.Unit(cell, arm, rate, seed)
    return {
        **unit._asdict(),
        "tuning": unit.tuning,
        "val_top1": top1,
        "test_top1": top1,
        "config": unit.config("digits").asdict(),
    }


def made_up(gains, seeds=3, noise=0.0):
    """Records of every cell: `gains[arm](doublings of images, of width)` in points over softmax."""
    draw = random.Random(0)
    found = []
    doublings = {
        "centre": (0, 0),
        "width 32": (0, -1),
        "width 128": (0, 1),
        "2,000 images": (-2, 0),
        "16,000 images": (1.0, 0),
    }
    for cell, seed in itertools.product(doublings, range(seeds)):
        base = 0.4 + 0.01 * draw.gauss(0, 1)
        found.append(record(cell, "softmax", seed, base))
        for arm, gain in gains.items():
            points = gain(*doublings[cell]) + noise * draw.gauss(0, 1)
            found.append(record(cell, arm, seed, base + points / 100))
    return found


def test_the_plan_tunes_first_and_then_trains_seeds_at_the_best_rate():
    units = list(answer.planned([], ["centre"]))
    assert len(units) == len(answer.ARMS) * len(answer.RATES) and all(u.tuning for u in units)
    fast = answer.RATES[-1]
    tuned = [
        record("centre", "G3", answer.TUNING_SEED, 0.5 if rate == fast else 0.4, rate)
        for rate in answer.RATES
    ]
    assert answer.best_rates(tuned) == {"G3": fast} and answer.best_rates(tuned[:-1]) == {}
    seeds = [u for u in answer.planned(tuned, ["centre", "width 32"]) if not u.tuning]
    assert [(u.cell, u.arm, u.rate, u.seed) for u in seeds] == [
        (cell, "G3", fast, seed) for cell in ("centre", "width 32") for seed in range(answer.SEEDS)
    ]
    assert len({u.path(answer.Path("x")) for u in units + seeds}) == len(units + seeds)
    more = answer.planned(tuned, ["centre"], seeds=answer.SEEDS + 2)
    assert len([u for u in more if not u.tuning]) == answer.SEEDS + 2


def test_more_seeds_go_where_the_interval_holds_zero():
    found = made_up({"G3": lambda *_: 5.0, "relative": lambda *_: 0.1}, noise=0.4)
    rates = [record("centre", arm, answer.TUNING_SEED, 0.4, r)
             for arm in answer.ARMS for r in answer.RATES]  # fmt: skip
    left = [u for u in answer.planned(found + rates, ["centre"]) if u.seed >= answer.SEEDS]
    assert {u.arm for u in left if u.seed == answer.SEEDS} == {"softmax", "relative"}


def test_rates_of_their_own_are_shown_beside_those_of_the_centre():
    cell, slow, fast = "45,000 images", *answer.RATES[1:3]
    found = []
    for arm, gain in (("softmax", 0.0), ("G3", 0.02)):
        for rate in answer.RATES:
            found.append(record("centre", arm, answer.TUNING_SEED, 0.5 + (rate == slow), rate))
        for rate in answer.RATES_IN[cell]:
            found.append(record(cell, arm, answer.TUNING_SEED, 0.5 + (rate == fast), rate))
        for seed in range(3):  # the gain of G3 is gone at the rate that the cell chose
            found.append(record(cell, arm, seed, 0.4 + 0.01 * seed + gain, slow))
            found.append(record(cell, arm, seed, 0.5 + 0.01 * seed, fast))
    assert answer.gain(answer.tested(found), cell, "G3").mean == pytest.approx(0)
    head, rows = answer.tuning(found)
    shown = {tuple(row[:2]): dict(zip(head, row, strict=True)) for row in rows}
    g3 = shown[cell, "G3"]
    assert g3[f"{fast:g}"] == "150.0*" and g3[f"{slow:g}"] == "50.0"
    assert g3["gain"].startswith("+0.00") and g3["at the centre's"].startswith("+2.00")
    # while a rate is to be tried yet none is chosen, and runs at several are not mixed
    last = max(answer.RATES_IN[cell])
    unfinished = [one for one in found if not (one["tuning"] and one["rate"] == last)]
    assert (cell, "G3") not in answer.tested(unfinished)
    fast_alone = [one for one in unfinished if one["tuning"] or one["rate"] == fast]
    assert len(answer.tested(fast_alone)[cell, "G3"]) == 3
    # one that was tried afterwards is shown, and not chosen
    later = next(one for one in found if one["tuning"] and one["cell"] == cell)
    more = [*found, later | {"rate": 1e-5, "val_top1": 3.0}]
    assert answer.best_rates(more, cell) == answer.best_rates(found, cell)
    assert "300.0" in sum(answer.tuning(more)[1], [])
    lowest = [r | {"val_top1": 2.0} if r["rate"] == answer.RATES[0] else r for r in found]
    assert "200.0* lowest" in answer.tuning(lowest)[1][0]
    assert shown["centre", "G3"][f"{slow:g}"].endswith("*") and not shown["centre", "G3"]["gain"]
    assert shown[cell, "softmax"]["gain"] == ""


def test_the_share_of_the_scores_and_the_trends_are_found_again():
    gains = {
        "polynomial-0": lambda images, width: 4.0 + 0.5 * images,
        "polynomial-1": lambda images, width: 4.5,
        "G3": lambda images, width: 5.0 - 0.5 * images - 1.0 * width,
    }
    found = made_up(gains, noise=0.05)
    scores = answer.tested(found)
    assert answer.gain(scores, "centre", "G3").mean == pytest.approx(0.05, abs=2e-3)
    share = answer.score_share(scores, "centre")
    assert share.low < 0.2 < share.high and share.high - share.low < 0.15
    trend = answer.trends(found)["G3"]
    assert trend.centre[0] == pytest.approx(5.0, abs=0.15) and trend.runs == 15
    for field, wanted in (("train_limit", -0.5), ("embed_dim", -1.0)):
        slope, low, high = trend.slopes[field]
        assert slope == pytest.approx(wanted, abs=0.1) and low < slope < high < 0
    # five points at one a doubling of the width: crossed after five doublings
    assert "width" in answer.crossing(trend) and "images" in answer.crossing(trend)


def test_trends_cover_lines_that_cells_and_seeds_lie_beside():
    wanted = {
        "centre": 5.0,
        "width 32": 5.5,
        "width 128": 4.5,
        "2,000 images": 7.0,
        "4,000 images": 6.0,
        "16,000 images": 4.0,
    }
    found = [
        record(cell, arm, seed, 0.4)
        for cell, arm, seed in itertools.product(wanted, ("softmax", "G3"), range(3))
    ]
    draw, hits, count = random.Random(0), [0, 0, 0], 200
    for _ in range(count):
        # what all seeds of a cell share, as a gain that bends has it
        points = {cell: own + 2 * draw.gauss(0, 1) for cell, own in wanted.items()}
        for one in found:
            if one["arm"] == "G3":
                one["test_top1"] = 0.4 + (points[one["cell"]] + draw.gauss(0, 1)) / 100
        trend = answer.trends(found)["G3"]
        lines = trend.centre, trend.slopes["train_limit"], trend.slopes["embed_dim"]
        for i, (true, (_, low, high)) in enumerate(zip((5.0, -1.0, -0.5), lines, strict=True)):
            hits[i] += low < true < high
    assert all(0.91 < hit / count < 0.99 for hit in hits)


def test_arms_in_no_more_cells_than_numbers_have_no_trend():
    found = made_up({"G3": lambda images, width: 5.0 - images}, noise=0.1)
    few = [one for one in found if one["cell"] in ("centre", "width 32", "2,000 images")]
    assert answer.trends(few) == {} and answer.trends(found)["G3"].runs == 15


def test_how_often_an_arm_like_softmax_is_clear_of_zero_when_seeds_are_added():
    draw, clear, count = random.Random(0), 0, 1500
    for _ in range(count):
        gains = [draw.gauss(0, 0.01) for _ in range(answer.MOST_SEEDS)]
        for n in range(answer.SEEDS, answer.MOST_SEEDS + 1):
            found = statistics.interval(gains[:n])
            if not found.low < 0 < found.high:
                clear += 1
                break
    assert clear / count == pytest.approx(0.14, abs=0.02) and "in 14 of 100" in answer.LOOKS_WORDS


def test_a_unit_trains_and_reads_the_test_split_for_fresh_seeds_alone(tmp_path, monkeypatch):
    tiny = {"train_limit": 64, "embed_dim": 8, "depth": 1, "num_heads": 1, "epochs": 1}
    centre = dataclasses.replace(answer.CENTRE, image_size=8, patch_size=4, **tiny)
    monkeypatch.setattr(answer, "CENTRE", centre)
    monkeypatch.setattr(answer, "CELLS", {"centre": {}})
    monkeypatch.setattr(
        answer, "ARMS", {arm: answer.ARMS[arm] for arm in ("softmax", "polynomial-0", "G3")}
    )
    assert answer.work("digits", tmp_path, 0.0, ["centre"]) == 0  # no time, no work
    done = answer.work("digits", tmp_path, 10.0, ["centre"])
    records = answer.read(tmp_path)
    assert done == len(records) >= 3 * (len(answer.RATES) + answer.SEEDS)
    assert all(("test_top1" in one) != one["tuning"] for one in records)
    assert answer.work("digits", tmp_path, 10.0, ["centre"]) == 0  # all is done
    monkeypatch.setattr(answer.data.Dataset, "fingerprint", "that of other images")
    with pytest.raises(ValueError, match="of the images that the units below .* are of, 'digits'"):
        answer.work("digits", tmp_path, 10.0, ["centre"])
    said = "\n".join(answer.report(tmp_path))
    assert "share of G3's gain" in said
    assert "<svg" in (tmp_path / "answer.html").read_text()
    (tmp_path / "centre" / "G3" / "rate-1-seed-9.json").write_text('{"cell": ')
    with pytest.raises(ValueError, match="rate-1-seed-9"):
        answer.read(tmp_path)


def test_records_are_json_that_configs_come_back_from(tmp_path):
    one = record("centre", "softmax + relative", 0, 0.5)
    again = json.loads(json.dumps(one))
    assert answer.Config.fromdict(again["config"]).base == "softmax"


def test_a_unit_that_diverges_is_scored_with_its_last_good_weights(tmp_path, monkeypatch):
    tiny = {"train_limit": 64, "embed_dim": 8, "depth": 1, "num_heads": 1, "epochs": 1}
    tiny |= {"batch_size": 16, "warmup_epochs": 0.0, "max_norm": 1e20}
    centre = dataclasses.replace(answer.CENTRE, image_size=8, patch_size=4, **tiny)
    monkeypatch.setattr(answer, "CENTRE", centre)
    monkeypatch.setattr(answer, "CELLS", {"centre": {}})
    monkeypatch.setattr(answer, "ARMS", {"softmax": answer.ARMS["softmax"]})
    monkeypatch.setattr(answer, "RATES", (1e-3, 1e25))
    assert answer.work("digits", tmp_path, 10.0, ["centre"], ["softmax"], 1) >= 3
    texts = {path.name: path.read_text() for path in tmp_path.rglob("rate-*.json")}
    assert not any("NaN" in text or "Infinity" in text for text in texts.values())
    bad = [one for one in answer.read(tmp_path) if one["diverged"] >= 0]
    assert [one["rate"] for one in bad] == [1e25] and 0 <= bad[0]["val_top1"] <= 1


def test_the_tables_keep_names_with_commas(tmp_path, monkeypatch):
    tiny = {"train_limit": 64, "embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
    monkeypatch.setattr(answer, "CENTRE", dataclasses.replace(answer.CENTRE, image_size=8, **tiny))
    cells = {"centre": {}, "2,000 images": {"train_limit": 128}}
    monkeypatch.setattr(answer, "CELLS", cells)
    for cell, arm, seed in itertools.product(cells, ("softmax", "G3"), range(3)):
        one = record(cell, arm, seed, 0.5 + 0.01 * seed * (arm == "G3"))
        path = answer.Unit(one["cell"], one["arm"], one["rate"], one["seed"]).path(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one))
    answer.report(tmp_path)
    for name, width in (("answer.csv", 8), ("runs.csv", 7)):
        with open(tmp_path / name, newline="") as file:
            rows = list(csv.reader(file))
        assert {len(row) for row in rows} == {width}
        assert "2,000 images" in {row[0] for row in rows}


def test_a_cell_that_changes_two_things_is_of_neither_factor_alone():
    found = answer.by_factor(list(answer.CELLS))
    cells = [cell for group in found.values() for cell in group]
    assert set(cells) == set(answer.CELLS)
    assert found["images and side of a patch"] == ["patch 4, 45,000 images"]
    assert cells.count("patch 4, 45,000 images") == 1
