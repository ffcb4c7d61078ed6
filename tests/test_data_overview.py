"""`describe`, its text and contact sheet; short names; the masked digits; arguments."""

import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import CLASSES, picture, save_folder, save_table
from PIL import Image

from kart import cli, data
from kart.data import names, splits

CIFAR10 = Path(__file__).parents[2] / "shared" / "datasets" / "cifar10"

pytestmark = pytest.mark.usefixtures("own_cache")

# describe


def test_describe_tells_what_load_gives(tmp_path):
    root = save_folder(tmp_path / "set" / "train", 30).parent
    save_folder(root / "test", 6, size=(9, 7), start=100, classes=["ant", "bee"])
    found = data.describe(root)
    assert found.name == "set" and found.classes == tuple(CLASSES) and found.channels == 3
    for split in data.SPLITS:
        dataset = data.load(root, split, image_size=5)
        told = found.splits[split]
        assert list(told.counts.values()) == list(dataset.counts)
        assert told.images == len(dataset.labels) == sum(told.formats.values())
    assert found.counts["test"] == {"ant": 3, "bee": 3, "cat": 0}
    assert found.splits["test"].sizes == {(9, 7): 6}
    assert found.splits["train"].sizes == {(6, 5): 27}
    assert found.splits["train"].modes == {"RGB": 27}
    assert found.splits["val"].formats == {"PNG": 3}
    assert found.splits["val"].origin == "3 images cut from 'train'"
    assert not (tmp_path / "cache" / "describe").exists()
    text = data.summary(found)
    lines = text.splitlines()
    assert lines[0] == "set: 3 classes"
    assert lines[1].split() == ["class", "train", "val", "test"]
    assert lines[4].split() == ["cat", "9", "1", "0"]
    assert lines[5].split() == [
        "all",
        "27",
        "3",
        "6",
    ]
    assert "test: from 'test': 6 of 9 x 7, 6 of RGB, 6 of PNG" in text


def test_describe_of_a_table_and_of_the_digits(tmp_path):
    table = save_table(tmp_path / "set", count=30)
    save_table(table, "test", 6)
    found = data.describe(table)
    assert {name: split.images for name, split in found.splits.items()} == {
        "train": 27,
        "val": 3,
        "test": 6,
    }
    digits = data.describe("digits")
    assert [split.images for split in digits.splits.values()] == [1077, 360, 360]
    assert digits.channels == 1 and digits.unused == digits.converted == ()
    assert data.describe() == digits
    for wrong in ("digit", 3, "", "a\0b", None):
        with pytest.raises(ValueError, match="`load` needs `source`"):
            data.describe(wrong)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs CIFAR-10 beside the repository")
def test_cifar_10_is_described_by_its_labels(tmp_path):
    from kart.data import finding

    found = finding.find(CIFAR10, finding.Options())
    source = found.open(tmp_path)
    assert source.classes is not None and source.classes[:2] == ("airplane", "automobile")
    assert source.sizes == {"train": 50000, "test": 10000}
    assert source.unused == () and source.renumbered == {}


def test_contact_sheet(tmp_path):
    root = save_folder(tmp_path / "set", 30)
    picture(99, size=(120, 30)).save(root / "cat" / "wide.png")
    (root / "cat" / "zzz.png").write_bytes(b"not decoded, since not shown")
    sheet = data.contact_sheet(root, per_class=3, side=30)
    assert sheet.mode == "RGB" and sheet.size == (160 + 3 * 32 + 2, 3 * 32 + 2)
    pixels = np.asarray(sheet)
    # the second row is of bees, each enlarged sharply: blocks of one colour
    train = data.describe(root).counts["train"]["bee"]
    assert train == 6
    corner = pixels[34, 160].tolist()
    bees = [np.asarray(picture(n))[0, 0].tolist() for n in range(1, 30, 3)]
    assert corner in bees and (pixels[34:38, 160:164] == corner).all()
    few = data.contact_sheet(root, classes=2, side=30)
    assert few.height == 3 * 32 + 2  # two rows and one that says "1 more"
    for source in ("digits", "masked_digits"):
        assert data.contact_sheet(source).size == (160 + 8 * 66 + 2, 10 * 66 + 2)
    table = save_table(tmp_path / "table")
    assert data.contact_sheet(table).size == (160 + 8 * 66 + 2, 3 * 66 + 2)
    for wrong in ({"side": 0}, {"per_class": 1.5}, {"classes": True}):
        with pytest.raises(ValueError, match="`contact_sheet` needs"):
            data.contact_sheet(root, **wrong)


# what a data set says of itself


def test_a_sheet_does_not_become_a_part_of_the_data(tmp_path, capsys):
    root = save_folder(tmp_path / "set", 12)
    first = root / "ant" / "000.png"
    before = first.read_bytes()
    for place in (root / "sheet.png", first):
        assert cli.main(["data", str(root), "--sheet", str(place)]) == 2
        assert "a file outside of the data" in capsys.readouterr().err
    assert not (root / "sheet.png").exists() and first.read_bytes() == before
    assert cli.main(["data", str(root), "--sheet", str(tmp_path / "sheet.png")]) == 0


def test_fingerprint_depends_on_all_that_is_learned_from(tmp_path):
    dataset = data.load(save_folder(tmp_path / "set", 30))
    assert dataset.fingerprint == data.load(tmp_path / "set").fingerprint
    copy = dataset._replace(images=np.array(dataset.images), name="another")
    assert copy.fingerprint == dataset.fingerprint
    pixel = copy.images.copy()
    pixel[3, 1, 2, 2] ^= 1
    labels = copy.labels.copy()
    labels[[0, 1]] = labels[[1, 0]]
    others = [
        copy._replace(images=pixel),
        copy._replace(labels=labels),
        copy._replace(classes=("ant", "cat", "bee")),
        copy._replace(images=copy.images.reshape(18, 3, 6, 5)),
        data.load(tmp_path / "set", train_limit=17),
        data.load(tmp_path / "set", "val"),
    ]
    assert len({other.fingerprint for other in [copy, *others]}) == 7
    assert dataset.channels == 3 and sum(dataset.counts) == 18
    assert data.load().fingerprint == data.load().fingerprint


def test_what_is_left_out_is_logged_with_the_training_split(tmp_path, caplog):
    root = save_folder(tmp_path / "set" / "train", 12).parent
    save_folder(root / "test", 3)
    (root / "list.csv").write_text("")
    for split, lines in (("train", 1), ("val", 0), ("test", 0)):
        caplog.clear()
        data.load(root, split)
        told = [record for record in caplog.records if record.name == "kart.data"]
        assert len(told) == lines
    caplog.clear()
    data.load(root)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == "set: not used: *.csv (1): neither an image nor a parquet file"


def test_classes_that_a_split_lacks_are_logged_with_it(tmp_path, caplog):
    root = save_folder(tmp_path / "set" / "train", 12).parent
    save_folder(root / "test", 6)
    shutil.rmtree(root / "test" / "bee")
    for split in data.SPLITS:
        caplog.clear()
        dataset = data.load(root, split)
        absent = [name for name, n in zip(dataset.classes, dataset.counts, strict=True) if not n]
        told = [record.message for record in caplog.records]
        every = len(dataset.classes)
        line = f"set: {split!r} has no image of {len(absent)} of {every} classes: "
        assert told == [line + ", ".join(absent)] * (split == "test")
        assert split != "test" or absent == ["bee"]


@pytest.mark.parametrize(("count", "limit", "absent"), [(3, None, 1), (30, 2, 1), (30, 24, 0)])
def test_a_class_without_training_images_is_named_however_few_there_are(
    tmp_path, caplog, count, limit, absent
):
    root = save_folder(tmp_path / "set" / "train", count).parent
    save_folder(root / "test", 6)
    dataset = data.load(root, "train", train_limit=limit)
    assert dataset.counts.count(0) == absent
    told = [record.message for record in caplog.records]
    missing = [name for name, n in zip(dataset.classes, dataset.counts, strict=True) if not n]
    line = "set: 'train' has no image of 1 of 3 classes: "
    assert told == [line + name for name in missing]


def test_an_unreadable_image_has_no_size_and_is_not_converted(tmp_path):
    root = save_folder(tmp_path / "set", 12)
    (root / "ant" / "000.png").write_bytes(b"")
    found = data.describe(root)
    assert {size for split in found.splits.values() for size in split.sizes} == {(6, 5)}
    assert sum(split.modes.get("unreadable", 0) for split in found.splits.values()) == 1
    assert found.converted == () and "sizes differ" not in data.summary(found)


@pytest.mark.parametrize("form", ["folder", "table"])
def test_copies_across_splits_are_counted(form, tmp_path):
    save = save_folder if form == "folder" else save_table
    names = {"train": ("train", 30, 0), "test": ("test", 6, 27)}
    for name, count, start in names.values():
        if form == "folder":
            save_folder(tmp_path / "set" / name, count, start=start)
        else:
            save_table(tmp_path / "set", name, count, start=start)
    found = data.describe(tmp_path / "set")
    # the last three of the training images are the first three of the test images
    assert sum(one.count for one in found.copies) == 3
    assert {one.split for one in found.copies} == {"test"}
    assert not any(one.elsewhere for one in found.copies)
    assert "of 'test' are in 'train' as well, byte for byte" in data.summary(found)
    assert data.describe(save(tmp_path / "other")).copies == ()


def test_copies_in_other_classes_are_named_and_files_alike_at_their_ends_are_none(tmp_path):
    root = save_folder(tmp_path / "set" / "train", 12).parent
    save_folder(root / "test", 6, start=100)
    shutil.copy(root / "train" / "ant" / "000.png", root / "test" / "bee" / "copy.png")
    for i in range(2):  # of one size, white at both ends
        image = Image.new("L", (64, 64), 255)
        image.putpixel((32, 32), i)
        image.save(root / "train" / "cat" / f"{i}.bmp")
    [copies] = data.describe(root).copies
    assert copies[0] == "test" and copies.count == copies.elsewhere == 1
    assert "byte for byte, 1 of them in another class" in data.summary(data.describe(root))


def test_sizes_that_differ_are_told_with_what_to_do(tmp_path):
    root = save_folder(tmp_path / "set", 12)
    assert "sizes differ" not in data.summary(data.describe(root))
    picture(0).resize((9, 5)).save(root / "ant" / "wide.png")
    text = data.summary(data.describe(root))
    assert "sizes differ: to train, cut them with `--decode-size`, say 5" in text


def test_one_tiny_image_does_not_choose_the_size(tmp_path):
    root = save_folder(tmp_path / "set", 12, size=(20, 16))
    picture(0, (1, 1)).save(root / "ant" / "tiny.png")
    text = data.summary(data.describe(root))
    assert "cut them with `--decode-size`, say 16" in text


# names


def test_short_names():
    assert set(data.SHORT) == {
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "flowers102",
        "mnist",
        "fashion_mnist",
        "tiny_imagenet",
        "imagenet",
    }
    assert all(public.path.count("/") == 1 for public in data.SHORT.values())


@pytest.mark.parametrize("name", sorted(names.SHORT))
def test_a_short_name_is_opened_with_its_columns_and_configuration(tmp_path, monkeypatch, name):
    public = data.SHORT[name]
    extra = {"coarse_label": ([0] * 30, datasets.ClassLabel(names=["x"]))}
    root = save_table(tmp_path / "mirror", extra=extra)
    [path] = root.iterdir()
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "scratch"))
    table = table.rename_columns({"img": public.image, "label": public.label})
    table.to_parquet(path)
    held = {"tiny_imagenet": ["valid"], "svhn": ["test", "extra"]}
    held["imagenet"] = ["validation", "test"]
    files = dict.fromkeys(["train", *held.get(name, ["test"])], str(path))
    open_builder, calls = datasets.load_dataset_builder, []

    def mirrored(path, cache_dir, **options):
        calls.append((path, options))
        return open_builder("parquet", data_files=files, cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset_builder", mirrored)
    monkeypatch.chdir(tmp_path)
    dataset = data.load(name)
    assert calls == [(public.path, {"name": public.config, "revision": None})]
    assert dataset.name == public.path and dataset.classes == tuple(CLASSES)
    assert len(dataset.labels) == 27
    unused = {item.what for item in dataset.unused}
    assert "column 'coarse_label'" in unused
    assert ("split 'extra'" in unused) == (name == "svhn")
    assert ("split 'test'" in unused) == (name == "imagenet")
    # from the cache, without the network
    assert data.load(name).unused == dataset.unused and len(calls) == 1


def test_a_directory_of_a_short_name_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "mnist", 12)
    with pytest.raises(ValueError, match="Pass './mnist' or 'ylecun/mnist'"):
        data.load("mnist")
    assert data.load("./mnist").name == "mnist"
    (tmp_path / "archive.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="got the file 'archive.zip'. Unpack it"):
        data.load("archive.zip")


@pytest.mark.parametrize(
    "name, role",
    [("Train", "train"), ("train_val", "train"), ("VALIDATION", "val"), ("hold-out", "held")]
    + [("imgs_test", "test"), ("unlabelled", "other"), ("contest", None), ("latest", None)]
    + [("strain", None), ("evaluate me", None), ("", None), ("data", None)],
)
def test_roles_of_names(name, role):
    assert splits.role(name) == role


# the masked digits


def test_masked_digits():
    parts = {split: data.load("masked_digits", split) for split in data.SPLITS}
    plain = {split: data.load("digits", split) for split in data.SPLITS}
    for split, dataset in parts.items():
        n = len(dataset.labels)
        assert dataset.images.shape == (n, 3, 32, 32) and dataset.images.dtype == np.uint8
        assert dataset.masks is not None
        assert dataset.masks.shape == (n, 32, 32) and dataset.masks.dtype == bool
        # the same digits in the same splits
        assert np.array_equal(dataset.labels, plain[split].labels)
        assert plain[split].masks is None
        area = dataset.masks.mean((1, 2))
        assert area.min() > 0.01 and area.max() < 0.4
    train = parts["train"]
    # in the mask it is the ink: far from the ground around it, and nearly of one colour
    inside = np.array([i[:, m].mean() for i, m in zip(train.images, train.masks, strict=True)])
    grounds = np.array([i[:, ~m].mean() for i, m in zip(train.images, train.masks, strict=True)])
    assert np.median(np.abs(inside - grounds)) > 60
    # at many places: none is inside of more than a quarter of the masks
    assert train.masks.mean(0).max() < 0.25 and (train.masks.mean(0) > 0).mean() > 0.8
    # the ground is textured: neighbouring pixels differ
    assert np.median(np.abs(np.diff(train.images.astype(int), axis=-1)).mean((1, 2, 3))) > 3


def test_masked_digits_never_change_and_have_any_size():
    first = data.load("masked_digits", "val")
    assert first.fingerprint == data.load("masked_digits", "val").fingerprint
    small = data.load("masked_digits", image_size=16, train_limit=10)
    assert small.images.shape == (10, 3, 16, 16)
    assert small.masks is not None and small.masks.shape == (10, 16, 16)
    with pytest.raises(ValueError, match="`image_size` <= 512 for 'masked_digits', got 513"):
        data.load("masked_digits", image_size=513)
    with pytest.raises(ValueError, match="no columns, `config` or `revision` for 'masked_digits'"):
        data.load("masked_digits", config="x")


# arguments


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image_size": True}, "`image_size` >= 1 or None, got True"),
        ({"image_size": 10**30}, "`image_size` <= 512"),
        ({"train_limit": True}, "`train_limit` >= 1 or None, got True"),
        ({"train_limit": 10**30}, "`train_limit` <= 1077"),
        ({"train_limit": "5"}, "`train_limit` >= 1 or None, got '5'"),
        ({"split": 3}, "`split` in"),
        ({"split": ["train"]}, "`split` in"),
        ({"source": 3}, "`source` to be a name or a path, got 3"),
        ({"cache": 3}, "`cache` to be a path"),
        ({"config": 3}, "`config` to be a name or None, got 3"),
        ({"image_column": ["x"]}, "`image_column` to be a name or None"),
        ({"train_limit": 2000}, "`train_limit` <= 1077, .*'digits', got 2000. Leave it out"),
        ({"train_limit": 0}, "`train_limit` >= 1 or None, got 0"),
        ({"image_size": 0}, "`image_size` >= 1 or None, got 0"),
        ({"image_size": 8.0}, "`image_size` >= 1 or None, got 8.0"),
        ({"label_column": "y"}, "no columns, `config` or `revision` for 'digits'"),
    ],
)
def test_arguments_of_wrong_types_or_ranges(options, words):
    with pytest.raises(ValueError, match=words):
        data.load(**options)


@pytest.mark.parametrize("n, size", [(True, 1), (10, True), (10**30, 5), (10.0, 5), ("10", 5)])
def test_batches_of_what_is_no_number(n, size):
    with pytest.raises(ValueError, match="`batch_indices` needs integers below 2"):
        data.batch_indices(n, size, 0, 0)


def test_functions_of_tensors_refuse_arrays():
    with pytest.raises(ValueError, match="`take` needs integer `indices` as a tensor, got list"):
        data.take(data.load(), [0])
    with pytest.raises(ValueError, match="`normalise` needs images as a tensor, got ndarray"):
        data.normalise(data.load().images, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="`as_float` needs uint8 images"):
        data.as_float([1])
    with pytest.raises(ValueError, match="int or str keys"):
        data.generator_for(True)
    assert picture(0).size == (6, 5)
