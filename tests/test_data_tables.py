"""Tables: parquet files as on the public hub, their splits, columns and class names."""

import os

import datasets
import numpy as np
import pytest
from pictures import CLASSES, encoded, entries, numbers, picture, same, save_folder, save_table

from kart import data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("shards", [1, 3])
def test_table_with_a_test_split(tmp_path, shards):
    root = save_table(tmp_path / "set", shards=shards)
    save_table(root, "test", 6, start=100)
    test = data.load(root, "test")
    assert numbers(test) == list(range(100, 106)) and test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    train, val = data.load(root), data.load(root, "val")
    assert sorted(numbers(train) + numbers(val)) == list(range(30)) and len(val.labels) == 3
    assert train.classes == tuple(CLASSES) and train.name == "set"
    for image, number in zip(train.images, numbers(train), strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.array(picture(number)))


def test_columns_by_type_and_by_name(tmp_path):
    coarse = ([i % 2 for i in range(30)], datasets.ClassLabel(names=["small", "large"]))
    bare = ([i % 5 for i in range(30)], datasets.Value("int64"))
    other = ([encoded(picture(200))] * 30, datasets.Image())
    text = (["x"] * 30, datasets.Value("string"))
    fine = ([i % 10 for i in range(30)], datasets.ClassLabel(num_classes=10))
    columns = {"coarse_label": coarse, "bare": bare, "other": other, "text": text}
    root = save_table(tmp_path / "set", extra={**columns, "fine_label": fine})
    with pytest.raises(ValueError, match=r"`image_column`.* Name one .*'other'") as error:
        data.load(root, image_column="picture")
    assert "'picture'" in str(error.value)
    assert numbers(data.load(root)) != [200] * 18  # `img` before `other`
    assert len(data.load(root).classes) == 10  # `fine_label` before the others
    dataset = data.load(root, label_column="coarse_label", image_column="other")
    assert dataset.classes == ("small", "large") and numbers(dataset) == [200] * 18
    dataset = data.load(root, label_column="bare")
    assert dataset.classes == tuple("01234")
    assert [n % 5 for n in numbers(dataset)] == dataset.labels.tolist()
    with pytest.raises(ValueError, match="integer or ClassLabel labels .* 'text'"):
        data.load(root, label_column="text")


def test_missing_label_column(tmp_path):
    table = datasets.Dataset.from_dict(
        {"img": [encoded(picture(0))], "y": [0]},
        features=datasets.Features({"img": datasets.Image(), "y": datasets.Value("int64")}),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="needs `label_column`, found 0 columns .*'y'"):
        data.load(tmp_path / "set")


def test_raw_bytes_as_images(tmp_path):
    raw = ([encoded(picture(i))["bytes"] for i in range(30)], datasets.Value("binary"))
    root = save_table(tmp_path / "set", extra={"raw": raw})
    raw, whole = data.load(root, image_column="raw"), data.load(root)
    assert same(raw._replace(unused=()), whole._replace(unused=()))


def test_label_outside_the_classes(tmp_path):
    root = save_table(tmp_path / "set")
    bare = ([0, 1, -1] * 10, datasets.Value("int64"))
    root = save_table(tmp_path / "bare", extra={"bare": bare})
    with pytest.raises(ValueError, match="labels among the training classes .*got -1 for image 2"):
        data.load(root, label_column="bare")
    # a test label that no training image has
    save_table(root, extra={"bare": ([0, 1] * 15, datasets.Value("int64"))})
    save_table(root, "test", 3, extra={"bare": ([0, 1, 2], datasets.Value("int64"))})
    with pytest.raises(ValueError, match=r"\('0', '1'\), got 2 for image 2 .*'test'"):
        data.load(root, "test", label_column="bare")
    save_folder(tmp_path / "p" / "train", 30)
    save_folder(tmp_path / "p" / "test", 4, classes=["ant", "dog"])
    with pytest.raises(ValueError, match="got 'dog' for .*dog"):
        data.load(tmp_path / "p", "test")


def test_bad_tables(tmp_path):
    root = save_table(tmp_path / "set", shards=3)
    (root / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="all 3 shards of .*train', got 2. Fetch the others"):
        data.load(root)
    root = save_table(tmp_path / "cut")
    os.truncate(root / "train-00000-of-00001.parquet", 900)
    with pytest.raises(ValueError, match="whole parquet files, got .*train-00000.* truncated"):
        data.load(root)
    (root / "train-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="whole parquet files, got .*train-00000.* truncated"):
        data.load(root)
    # whole at both ends, broken in the middle
    save_table(root)
    path = root / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(2000) + content[2200:])
    with pytest.raises(ValueError, match="`load` .*(could not read|needs whole)"):
        data.load(root)
    assert entries(tmp_path / "cache") == []
