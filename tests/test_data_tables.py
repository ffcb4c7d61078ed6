"""Tables: parquet files as on the public hub, their splits, columns and class names."""

import os

import datasets
import numpy as np
import pytest
from pictures import CLASSES, encoded, entries, numbers, picture, same, save_folder, save_table
from pyarrow import parquet

from kart import cli, data, runs

pytestmark = pytest.mark.usefixtures("own_cache")


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
    with pytest.raises(ValueError, match="integer or ClassLabel labels .* 'text'.* or save"):
        data.load(root, label_column="text")


def test_options_behind_a_question_mark_are_those_of_load(tmp_path, capsys):
    coarse = ([i % 2 for i in range(30)], datasets.ClassLabel(names=["small", "large"]))
    other = ([encoded(picture(200))] * 30, datasets.Image())
    root = str(save_table(tmp_path / "set", extra={"coarse_label": coarse, "other": other}))
    address = f"{root}?label_column=coarse_label&image_column=other"
    found, wanted = data.load(address), data.load(root, label_column="coarse_label")
    assert found.classes == ("small", "large") and numbers(found) == [200] * 18
    assert found.labels.tolist() == wanted.labels.tolist()
    assert data.describe(address).classes == ("small", "large")
    for text in ("label=y", "label_column", "label_column=", "label_column=a&label_column=b", ""):
        with pytest.raises(ValueError, match="each of image_column, .* once at most, got"):
            data.load(f"{root}?{text}")
    with pytest.raises(ValueError, match="each option once, got `label_column`"):
        data.load(address, label_column="label")
    with pytest.raises(ValueError, match="no columns, `config` or `revision` for 'digits'"):
        data.load("digits?label_column=y")
    # a directory may have the name
    (tmp_path / "what?").mkdir()
    with pytest.raises(ValueError, match="parquet files or images, got '.*what\\?' with none"):
        data.load(tmp_path / "what?")
    # from the command line to the scores
    flags = ["--epochs", "1", "--batch-size", "4", "--embed-dim", "4", "--depth", "1", "--quiet"]
    flags += ["--num-heads", "1", "--threads", "1", "--decode-size", "4"]
    flags += ["--out", str(tmp_path / "run")]
    code = cli.main(["train", "--data", address, *flags])
    assert code == 0, capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    assert runs.read(tmp_path / "run").data["classes"] == ["small", "large"]
    assert cli.main(["train", "--data", f"{root}?label_column=img", *flags]) == 2
    assert "integer or ClassLabel labels" in capsys.readouterr().err


def test_missing_label_column(tmp_path):
    table = datasets.Dataset.from_dict(
        {"img": [encoded(picture(0))], "y": [0]},
        features=datasets.Features({"img": datasets.Image(), "y": datasets.Value("int64")}),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(
        ValueError, match="needs `label_column`, found 0 columns .*'y'.*label_column=COLUMN"
    ):
        data.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["label", "fine_label", "labels"])
def test_integers_are_labels_where_a_column_is_called_so(tmp_path, name):
    values = {"img": [encoded(picture(i)) for i in range(30)], "size": [7] * 30}
    values[name] = [i % 3 for i in range(30)]
    plain = datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "size": plain, name: plain})
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict(values, features=features)
    table.to_parquet(tmp_path / "set" / "train.parquet")
    dataset = data.load(tmp_path / "set")
    assert dataset.classes == tuple("012")
    assert [n % 3 for n in numbers(dataset)] == dataset.labels.tolist()
    assert any("'size'" in one.what for one in dataset.unused)


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


# splits and names

PAIRS = [("Train", "Test"), ("TRAIN", "TEST"), ("trainset", "testset"), ("train", "eval")]
PAIRS += [("train", "Val"), ("train", "holdout"), ("mnist_train", "mnist_test")]
PAIRS += [("data/train", "data/test"), ("train/0000", "test/0000"), ("a/Train/x", "a/Test/x")]


def write(path, count=30, start=0, names=CLASSES, labels=None, note=True, **more):
    """One parquet file of pictures; labels by name, so that their numbers follow `names`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [CLASSES[i % 3] for i in range(count)] if labels is None else labels
    columns = {
        "img": [encoded(picture(start + i)) for i in range(count)],
        "label": [names.index(name) if isinstance(name, str) else name for name in labels],
        **more,
    }
    kind = datasets.ClassLabel(names=names) if note else datasets.Value("int64")
    features = {"img": datasets.Image(), "label": kind}
    features |= {name: datasets.Value("int64") for name in more}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(path)


def sizes(root):
    return {name: split.images for name, split in data.describe(root).splits.items()}


@pytest.mark.parametrize("train, test", PAIRS)
def test_the_same_names_of_splits_as_for_folders(tmp_path, train, test):
    write(tmp_path / "set" / f"{train}.parquet")
    write(tmp_path / "set" / f"{test}.parquet", 6, start=100)
    assert sizes(tmp_path / "set") == {"train": 27, "val": 3, "test": 6}
    assert numbers(data.load(tmp_path / "set", "test")) == list(range(100, 106))


def test_shards_counted_in_any_way(tmp_path):
    for i in range(3):
        write(tmp_path / "set" / f"train_{i}.parquet", 10, start=10 * i)
    write(tmp_path / "set" / "test-00000-of-00001-0a1b2c3d.parquet", 6, start=100)
    assert sizes(tmp_path / "set") == {"train": 27, "val": 3, "test": 6}


def test_files_that_are_no_split_are_named(tmp_path):
    root = tmp_path / "set"
    write(root / "train.parquet")
    write(root / "test.parquet", 6)
    write(root / "extra.parquet", 9)
    write(root / "notes.parquet", 5, more=[1] * 5)
    picture(0).save(root / "teaser.png")
    (root / "README.md").write_text("hello")
    found = data.describe(root)
    assert {item.what: item.count for item in found.unused} == {
        "*.md": 1,
        "*.png": 1,
        "notes.parquet": 5,
        "split 'extra'": 9,
    }
    write(root / "train.parquet", more=[1] * 30)
    write(root / "test.parquet", 6, more=[1] * 6)
    assert ("column 'more'", 36) in [item[:2] for item in data.describe(root).unused]


@pytest.mark.parametrize(
    "files, words",
    [
        (["a/train", "a/test", "b/train", "b/test"], "2 configurations in .*'a', 'b'.. Name the"),
        (["train", "Train"], "one 'train' split .*'Train', 'train'"),
        (["data", "test"], "split named 'train' in .*beside .*data.parquet"),
        (["train/test-0"], r"cannot tell the split of .* names \['train', 'test'\]"),
        (["val", "test"], "split named 'train'"),
    ],
)
def test_files_that_can_be_read_in_two_ways(tmp_path, files, words):
    for name in files:
        write(tmp_path / "set" / f"{name}.parquet")
    with pytest.raises(ValueError, match=words):
        data.load(tmp_path / "set")


def test_labels_agree_by_name(tmp_path):
    root = tmp_path / "set"
    other = ["cat", "ant", "bee"]
    write(root / "train-00000-of-00002.parquet", 15)
    write(root / "train-00001-of-00002.parquet", 15, start=15, names=other)
    write(root / "test.parquet", 6, start=100, names=other)
    for split in data.SPLITS:
        dataset = data.load(root, split)
        assert dataset.classes == tuple(CLASSES)
        for number, label in zip(numbers(dataset), dataset.labels, strict=True):
            assert label == (number - 100 * (number >= 100)) % 3
    changed = ("labels renumbered to agree by name", 6)
    assert data.load(root, "test").converted == (data.Converted(*changed),)
    assert data.describe(root).converted[0].what == changed[0]


@pytest.mark.parametrize(
    "names, split, words",
    [
        (["ant", "bee", "dog", "cat"], "test", r"with \['dog'\] beside those of the training"),
        (["ant", "bee", "cat", "dog"], "train-1", r"with \['dog'\] beside"),
    ],
)
def test_other_names_are_refused(tmp_path, names, split, words):
    write(tmp_path / "set" / "train-0.parquet")
    write(tmp_path / "set" / f"{split}.parquet", names=names)
    with pytest.raises(ValueError, match=f"same class names everywhere, got .*{split}.* {words}"):
        data.load(tmp_path / "set")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "set" / "train.parquet"
    write(path)
    table = parquet.read_table(path)
    notes = {key: text.replace(b'"bee"', b'"ant"') for key, text in table.schema.metadata.items()}
    parquet.write_table(table.replace_schema_metadata(notes), path)
    for read in (data.describe, data.load):
        with pytest.raises(ValueError, match="got .*train.parquet' with a name twice. Rename"):
            read(tmp_path / "set")


def test_names_beside_bare_numbers_are_refused(tmp_path):
    write(tmp_path / "set" / "train.parquet")
    write(tmp_path / "set" / "test.parquet", note=False)
    with pytest.raises(ValueError, match="same columns everywhere, got int64 in 'label'"):
        data.load(tmp_path / "set")


def test_a_held_out_split_without_labels_is_left_out(tmp_path):
    write(tmp_path / "set" / "train.parquet")
    write(tmp_path / "set" / "validation.parquet", 6, start=100)
    write(tmp_path / "set" / "test.parquet", 9, labels=[-1] * 9)
    found = data.describe(tmp_path / "set")
    assert [tuple(item) for item in found.unused] == [("split 'test'", 9, "no labels: all are -1")]
    assert sizes(tmp_path / "set") == {"train": 27, "val": 3, "test": 6}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_split_without_rows_is_refused_before_training(tmp_path, split):
    write(tmp_path / "set" / "train.parquet")
    write(tmp_path / "set" / f"{split}.parquet", 0, labels=[])
    with pytest.raises(ValueError, match=f"images in every split, got none in {split!r}"):
        data.load(tmp_path / "set")


def test_a_table_of_one_class_is_refused_as_a_folder_of_one_is(tmp_path):
    write(tmp_path / "set" / "train.parquet", labels=[0] * 30, note=False)
    with pytest.raises(ValueError, match="two or more classes in .*, got .*'0'.* in the column"):
        data.load(tmp_path / "set", label_column="label")


@pytest.mark.parametrize("label", [10**12, 2**63 - 1, 30, -1])
def test_bare_labels_that_are_none(tmp_path, label):
    write(tmp_path / "set" / "train.parquet", labels=[0, 1, label] + [0] * 27, note=False)
    with pytest.raises(ValueError, match=f"as many as images.*got {label} for image 2"):
        data.load(tmp_path / "set", label_column="label")


# nothing but the files below the directory


def test_a_readme_does_not_choose_what_is_read(tmp_path):
    write(tmp_path / "secret" / "train.parquet", start=200)
    root = tmp_path / "set"
    write(root / "train.parquet")
    write(root / "test.parquet", 6, start=100)
    before = data.load(root, "test")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: ../secret/*.parquet\n"
        f"  - split: test\n    path: {tmp_path}/secret/train.parquet\n---\n"
    )
    (root / "dataset_infos.json").write_text("{")
    for split in data.SPLITS:
        assert max(numbers(data.load(root, split))) < 200
    assert data.load(root, "test").fingerprint == before.fingerprint


def test_paths_inside_of_a_table_are_not_followed(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 6
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    table = pyarrow.table({"img": rows, "label": [0, 1] * 3})
    parquet.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="images inside of the parquet file, got image 0 of"):
        data.load(tmp_path / "set", label_column="label")


@pytest.mark.parametrize("name", ["a[1]", "a*b", "train", "test", "a b", "ü", "{x,y}", "?"])
def test_the_name_of_the_directory_means_nothing(tmp_path, name):
    write(tmp_path / name / "train.parquet")
    write(tmp_path / name / "test.parquet", 6)
    assert sizes(tmp_path / name) == {"train": 27, "val": 3, "test": 6}


def test_files_without_the_notes_of_the_datasets_library(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    rows = [encoded(picture(i)) for i in range(20)]
    table = pyarrow.table({"image": rows, "label": [i % 2 for i in range(20)]})
    parquet.write_table(table, tmp_path / "set" / "train.parquet")
    dataset = data.load(tmp_path / "set", label_column="label")
    assert dataset.classes == ("0", "1") and len(dataset.labels) == 12


def test_a_table_beside_folders_of_images(tmp_path):
    write(tmp_path / "set" / "train.parquet")
    save_folder(tmp_path / "set" / "pictures", 9)
    with pytest.raises(ValueError, match="1 parquet files and folders .* both a data set"):
        data.load(tmp_path / "set")
    # one without images is no data set
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "set" / "train.parquet")
    found = data.describe(tmp_path / "set")
    assert found.classes == tuple(CLASSES)
    assert found.unused == (data.Unused("train.parquet", 1, "a parquet file without images"),)
