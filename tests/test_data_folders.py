"""Folders of images: which are splits and classes, what is left out, links, odd layouts drawn."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import CLASSES, numbers, picture, save_folder

from kart import data
from kart.data import files, splits

pytestmark = pytest.mark.usefixtures("own_cache")


def lay(root: Path, **folders: int) -> Path:
    """`count` pictures below each folder of two classes; `flat/` and `name.png` are as they say."""
    for name, count in folders.items():
        for i in range(count):
            for kind in ("ant", "bee"):
                path = root / name / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(i).save(path)
    return root


def total(found: data.Description) -> dict[str, int]:
    return {name: split.images for name, split in found.splits.items()}


def left_out(found: data.Description) -> dict[str, int]:
    return {item.what: item.count for item in found.unused}


# 10 images of each class in training, 3 in the first held-out split, 2 in the second
THREE = {"train": 20, "val": 6, "test": 4}
TWO = {"train": 18, "val": 2, "test": 6}
LAYOUTS = {
    "Title": ({"Train": 10, "Test": 3}, TWO, {}),
    "UPPER": ({"TRAIN": 10, "VAL": 3, "TEST": 2}, THREE, {}),
    "trainset": ({"trainset": 10, "testset": 3}, TWO, {}),
    "train_images": ({"train_images": 10, "test_images": 3}, TWO, {}),
    "years": ({"train2017": 10, "val2017": 3}, TWO, {}),
    "Intel": ({"seg_train/seg_train": 10, "seg_test/seg_test": 3}, TWO, {}),
    "common prefix": ({"cifar_train": 10, "cifar_test": 3}, TWO, {}),
    "glued": ({"mytraining": 10, "mytesting": 3}, TWO, {}),
    "data inside": ({"train/data": 10, "test/data": 3}, TWO, {}),
    "wrapper": ({"archive/train": 10, "archive/test": 3}, TWO, {}),
    "wrappers": ({"a/b/c/train": 10, "a/b/c/test": 3}, TWO, {}),
    "eval": ({"train": 10, "eval": 3}, TWO, {}),
    "Val": ({"train": 10, "Val": 3}, TWO, {}),
    "holdout": ({"train": 10, "holdout": 3}, TWO, {}),
    "held-out": ({"train": 10, "held-out": 3}, TWO, {}),
    "eval and test": ({"train": 10, "eval": 3, "test": 2}, THREE, {}),
    "dev and eval": ({"train": 10, "dev": 3, "eval": 2}, THREE, {}),
    "unlabelled": ({"train": 10, "test": 3, "unlabeled": 2}, TWO, {"unlabeled/": 4}),
    "more folders": ({"train": 10, "test": 3, "figures": 1}, TWO, {"figures/": 2}),
    "one split": ({"test": 10}, {"train": 12, "val": 4, "test": 4}, {}),
    "wrapped classes": ({"archive/pictures": 10}, {"train": 12, "val": 4, "test": 4}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    folders, expected, unused = LAYOUTS[layout]
    found = data.describe(lay(tmp_path / "set", **folders))
    assert found.classes == ("ant", "bee")
    assert total(found) == expected and left_out(found) == unused
    for split in data.SPLITS:
        dataset = data.load(tmp_path / "set", split)
        assert dict(zip(dataset.classes, dataset.counts, strict=True)) == found.counts[split]
        assert dataset.unused == found.unused


AMBIGUOUS = {
    "two of a split": ({"train": 5, "Train": 5}, "one 'train' split .*'Train', 'train'"),
    "two names": ({"train": 5, "val": 2, "valid": 2}, "one 'val' split .*'val', 'valid'"),
    "three held out": (
        {"train": 5, "val": 2, "eval": 2, "test": 2},
        "cannot tell the validation from the test split among .*'eval', 'test', 'val'",
    ),
    "no training": ({"val": 5, "test": 5}, "named 'train' in .*got .'test', 'val'"),
    "split or class": ({"train": 5, "bus": 5}, "are splits or classes beside .'bus'"),
    "splits in classes": ({"train/train": 5, "train/test": 5}, "splits above classes"),
    "two data sets": (
        {"x/train": 5, "x/test": 2, "y/train": 5, "y/test": 2},
        "splits above classes, got .'test', 'train'. inside of .*x",
    ),
    "nameless splits": ({"first": 5, "second": 5}, "each holds folders of the same names"),
}


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, layout):
    folders, words = AMBIGUOUS[layout]
    root = lay(tmp_path / "set", **folders)
    for read in (data.describe, data.load):
        with pytest.raises(ValueError, match=words) as error:
            read(root)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_stray_images_and_other_files_are_named(tmp_path):
    root = lay(tmp_path / "set", train=10, test=3)
    picture(0).save(root / "sample.png")
    (root / "train" / "list.txt").write_text("")
    (root / "test" / "list.txt").write_text("")
    (root / "LICENSE").write_text("")
    (root / ".DS_Store").write_text("")
    (root / "__MACOSX" / "train").mkdir(parents=True)
    picture(0).save(root / "__MACOSX" / "train" / "0.png")
    (root / "test" / "empty").mkdir()
    os.mkfifo(root / "pipe")
    (root / "nowhere.png").symlink_to(root / "gone.png")
    found = data.describe(root)
    assert total(found) == TWO
    assert left_out(found) == {
        "*.txt": 2,
        ".*": 1,
        "__MACOSX/": 1,
        "files without a suffix": 1,
        "nowhere.png": 1,
        "pipe": 1,
        "sample.png": 1,
        "test/empty/": 0,
    }
    text = data.summary(found)
    assert all(item.what in text and item.why in text for item in found.unused)


def test_test_images_without_labels_are_left_out(tmp_path):
    root = lay(tmp_path / "set", train=10)
    (root / "test").mkdir()
    for i in range(5):
        picture(i).save(root / "test" / f"{i}.png")
    found = data.describe(root)
    assert total(found) == {"train": 12, "val": 4, "test": 4} and left_out(found) == {"test/": 5}
    # tiny-imagenet: class folders in training alone, images one folder deeper
    tiny = tmp_path / "tiny"
    for kind in ("n01443537", "n01629819"):
        save_folder(tiny / "train" / kind, 5, classes=["images"])
    save_folder(tiny / "val", 3, classes=["images"])
    found = data.describe(tiny)
    assert found.classes == ("n01443537", "n01629819") and left_out(found) == {"val/": 3}


def test_folders_below_classes_are_named(tmp_path, caplog):
    root = tmp_path / "set"
    for kind, inner in (("ant", "red/old"), ("ant", "black"), ("bee", "wild")):
        save_folder(root / kind, 6, classes=[inner])
    found = data.describe(root)
    assert found.classes == ("ant", "bee")
    told = "names of folders below classes, 4 of them, as 'ant/black/'"
    assert left_out(found) == {told: 0} and total(found) == {"train": 10, "val": 4, "test": 4}
    data.load(root, cache=tmp_path / "cache")
    assert f"not used: {told}: their images are of the class above" in caplog.text


def test_images_right_in_the_splits_are_refused(tmp_path):
    save_folder(tmp_path / "set", 10, classes=["train", "test"])
    with pytest.raises(ValueError, match="one sub-folder per class below .'test', 'train'"):
        data.load(tmp_path / "set")
    # one folder called like a split among others is a class: vehicles
    save_folder(tmp_path / "vehicles", 12, classes=["bus", "train"])
    assert data.describe(tmp_path / "vehicles").classes == ("bus", "train")
    save_folder(tmp_path / "inside" / "train", 12, classes=["bus", "val"])
    save_folder(tmp_path / "inside" / "test", 4, classes=["bus", "val"])
    assert data.describe(tmp_path / "inside").classes == ("bus", "val")


def test_classes_do_not_vanish(tmp_path):
    root = lay(tmp_path / "set", **{".": 6})
    (root / "cat").mkdir()
    for i in range(6):
        picture(i).save(root / "cat" / f"{i}.jfif", "JPEG")
    found = data.describe(root)
    assert total(found) == {"train": 10, "val": 4, "test": 4}
    assert {kind: sum(c[kind] for c in found.counts.values()) for kind in CLASSES} == {
        "ant": 6,
        "bee": 6,
        "cat": 6,
    }
    (root / "dog").mkdir()
    (root / "dog" / "0.heic").write_bytes(b"")
    with pytest.raises(ValueError, match="Pillow reads in .*dog', got 1 pictures of .*heic"):
        data.load(root)
    picture(0).save(root / "dog" / "0.JPEG")
    assert left_out(data.describe(root)) == {"*.heic": 1}
    # class names that only the test images have, or in another case
    lay(tmp_path / "p", train=6)
    save_folder(tmp_path / "p" / "test", 4, classes=["Ant", "bee"])
    with pytest.raises(ValueError, match=r"\('ant', 'bee'\), got 'Ant' .*2 images of 'test'"):
        data.load(tmp_path / "p")
    with pytest.raises(ValueError, match="two or more class folders in .*got .'ant'"):
        data.load(save_folder(tmp_path / "one", 9, classes=["ant"]))


# links


def test_each_real_folder_is_read_once(tmp_path):
    root = lay(tmp_path / "set", train=10, test=3)
    (root / "train" / "ant" / "again").symlink_to(root)
    (root / "train" / "loop").symlink_to(root / "train")
    (root / "copy").symlink_to(root / "train")
    found = data.describe(root)
    assert total(found) == TWO
    assert left_out(found) == {"copy/": 1, "train/ant/again/": 1, "train/loop/": 1}
    # by a link to the directory itself the same
    (tmp_path / "other").symlink_to(root)
    assert data.load(tmp_path / "other").fingerprint == data.load(root).fingerprint


def test_links_that_make_the_split_ambiguous(tmp_path):
    root = lay(tmp_path / "set", train=10, test=3)
    shutil.rmtree(root / "test" / "ant")
    (root / "test" / "ant").symlink_to(root / "train" / "ant")
    with pytest.raises(ValueError, match="'train/ant' belong where they are or to the link"):
        data.load(root)
    (root / "test" / "ant").unlink()
    (root / "test" / "bee" / "leak.png").symlink_to(root / "train" / "bee" / "0.png")
    with pytest.raises(ValueError, match="every image in one class of one split"):
        data.load(root)
    (root / "test" / "bee" / "leak.png").unlink()
    (root / "test" / "bee" / "twice.png").symlink_to(root / "test" / "bee" / "0.png")
    found = data.describe(root)
    assert found.counts["test"] == {"ant": 0, "bee": 3}
    assert left_out(found) == {"test/bee/twice.png": 1}


def test_a_farm_of_links(tmp_path):
    root = tmp_path / "set"
    save_folder(root, 20, classes=["raw"])
    for i, path in enumerate(sorted((root / "raw").iterdir())):
        place = root / ("test" if i % 5 == 0 else "train") / CLASSES[i % 2] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(path, place.parent))
    found = data.describe(root)
    assert total(found) == {"train": 14, "val": 2, "test": 4} and left_out(found) == {"raw/": 20}


@pytest.mark.parametrize("kind", ["folder", "image", "table"])
def test_nothing_is_read_outside_the_directory(tmp_path, kind):
    root = lay(tmp_path / "set", train=10, test=3)
    secret = save_folder(tmp_path / "secret", 4)
    if kind == "folder":
        (root / "train" / "cat").symlink_to(secret / "cat")
    elif kind == "image":
        (root / "train" / "bee" / "secret.png").symlink_to(secret / "bee" / "001.png")
    else:
        (secret / "x.parquet").write_bytes(b"PAR1PAR1")
        (root / "x.parquet").symlink_to(secret / "x.parquet")
    with pytest.raises(ValueError, match="nothing outside the directory named, got the link .*set"):
        data.load(root)
    (root / ".hidden").mkdir()
    picture(0).save(root / ".hidden" / "0.png")


def test_hidden_folders_are_not_followed(tmp_path):
    root = save_folder(tmp_path / "pictures", 12)
    (root / ".hidden").mkdir()
    picture(0).save(root / ".hidden" / "0.png")
    found = data.describe(root)
    assert sum(total(found).values()) == 12 and left_out(found) == {".hidden/": 1}


def test_unreadable_and_deep_folders(tmp_path):
    root = save_folder(tmp_path / "pictures", 12)
    deep = root / "ant" / "/".join("x" * 80)
    deep.mkdir(parents=True)
    with pytest.raises(ValueError, match="folders within 64"):
        data.load(root)


# drawn layouts: every image is in one split, or named as unused, or the whole is refused

WORDS = ["train", "Train", "TRAINING", "trainset", "train_images", "val", "Valid", "dev", "test"]
WORDS += ["TESTING", "test_data", "eval", "holdout", "extra", "pred", "ant", "bee", "cat", "images"]
WORDS += ["seg_train", "seg_test", "data", "0", "1", ".git", "__MACOSX", "misc", "x"]
SUFFIXES = [".png", ".jpg", ".JPEG", ".jfif", ".bmp", ".txt", ".heic", ".gif", ""]


@st.composite
def trees(draw):
    """Relative paths of files: names that mean splits, classes or nothing, up to four deep."""
    classes = draw(st.lists(st.sampled_from(WORDS[-14:]), min_size=2, max_size=3, unique=True))
    tops = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True))
    wrapper = draw(st.sampled_from(["", "", "archive", "set/images"]))
    files = set()
    for top in tops:
        shape = draw(st.sampled_from(["classes", "classes", "classes", "flat", "nested", "same"]))
        for kind in classes:
            inner = {"classes": kind, "flat": "", "nested": f"{kind}/y", "same": f"{top}/{kind}"}
            for i in range(draw(st.integers(1, 4))):
                files.add(f"{wrapper}/{top}/{inner[shape]}/{kind}{i}.png")
    for _ in range(draw(st.integers(0, 3))):
        folder = "/".join(draw(st.lists(st.sampled_from([*tops, *classes, "more"]), max_size=3)))
        name = draw(st.sampled_from(["a", "sample", ".b"])) + draw(st.sampled_from(SUFFIXES))
        files.add(f"{draw(st.sampled_from([wrapper, '']))}/{folder}/{name}")
    return sorted({str(Path("/" + file)).lstrip("/") for file in files})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees(), st.integers(0, 2**31))
def test_every_image_is_in_one_split_or_named(tmp_path, files, seed):
    root = tmp_path / f"set{abs(hash((tuple(files), seed)))}"
    numbered = {}
    for i, file in enumerate(files):
        path = root / file
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered[file] = i
        picture(i).convert("RGB").save(path, "PNG")
    try:
        found = data.describe(root)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith("`load`")
        return
    read = sum(total(found).values())
    assert read + sum(item.count for item in found.unused) == len(numbered), (files, found)
    # each image in one split, with the class that one of its folders is called
    seen = []
    for split in data.SPLITS:
        dataset = data.load(root, split)
        for number, label in zip(numbers(dataset), dataset.labels, strict=True):
            file = files[number]
            seen.append(file)
            assert dataset.classes[label] in Path(file).parts, (file, dataset.classes)
            # what is held out by its own folder is in no other split
            told = [splits.role(part) for part in Path(file).parts[:-1]]
            if split == "train" and "train" in {splits.role(f) for f in found_tops(root, files)}:
                assert told[0] not in ("test", "val", "held"), (file, split)
    assert len(seen) == len(set(seen)) == read
    shutil.rmtree(root)


def found_tops(root: Path, files: list[str]) -> set[str]:
    return {Path(file).parts[0] for file in files}


def test_the_order_is_that_of_the_paths(tmp_path):
    root = lay(tmp_path / "set", train=4, test=3)
    assert np.array_equal(data.load(root, "test").labels, [0, 0, 0, 1, 1, 1])
    assert numbers(data.load(root, "test")) == [0, 1, 2] * 2


def test_a_whole_machine_is_no_data_set(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="whole machine"):
        data.describe("/")
    monkeypatch.setattr(files, "_OTHERS", 50)
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    for i in range(60):
        (tmp_path / "home" / (".cache" if i % 2 else "") / f"{i}.txt").touch()
    with pytest.raises(ValueError, match="51 other files and 0 of these"):
        data.describe(tmp_path / "home")


def test_a_name_in_two_encodings_is_one_class(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    save_folder(tmp_path / "set" / "train", classes=[composed, "bee"])
    save_folder(tmp_path / "set" / "test", 6, classes=[apart, "bee"], start=100)
    test = data.load(tmp_path / "set", "test")
    assert test.classes == ("bee", composed) and test.counts == (3, 3)
    assert data.describe(tmp_path / "set").counts["test"] == {"bee": 3, composed: 3}
