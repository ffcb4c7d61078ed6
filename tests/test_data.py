"""Data sets: splits, sources built in `tmp_path`, the cache under damage and races, batches."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from kart import data

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))


def picture(number: int, size=(6, 5), mode="RGB") -> Image.Image:
    """A picture of noise; its first pixel, `number`, tells it from the others."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def save_folder(root: Path, count=30, classes=CLASSES, start=0, **options) -> Path:
    """`count` pictures, one sub-folder per class, the classes taking turns."""
    for i in range(count):
        path = root / classes[i % len(classes)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(start + i, **options).save(path)
    return root


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def save_table(root: Path, split="train", count=30, shards=1, start=0, extra=None) -> Path:
    """A parquet directory as on the public hub; picture i is of class i mod 3."""
    root.mkdir(exist_ok=True)
    columns = {
        "img": [encoded(picture(start + i)) for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    for name, (values, feature) in (extra or {}).items():
        columns[name], features[name] = values, feature
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for shard in range(shards):
        part = table.shard(shards, shard, contiguous=True)
        part.to_parquet(root / f"{split}-{shard:05}-of-{shards:05}.parquet")
    return root


def numbers(dataset: data.Dataset) -> list[int]:
    return dataset.images[:, 0, 0, 0].tolist()


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def same(first: data.Dataset, second: data.Dataset) -> bool:
    return (
        np.array_equal(first.images, second.images)
        and np.array_equal(first.labels, second.labels)
        and first[2:] == second[2:]
    )


# the digits


def test_digits_facts():
    sizes = {"train": 1077, "val": 360, "test": 360}
    parts = {split: data.load(split=split) for split in data.SPLITS}
    for split, dataset in parts.items():
        assert dataset.images.shape == (sizes[split], 1, 8, 8)
        assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int64
        assert dataset.images.min() == 0 and dataset.images.max() == 255
        assert dataset.classes == tuple("0123456789") and dataset.name == "digits"
        # stratified: every split has the classes in equal shares, to within an image or two
        assert np.ptp(np.bincount(dataset.labels) / sizes[split]) < 0.012
        assert dataset.mean == parts["train"].mean and dataset.std == parts["train"].std
    train = parts["train"].images / 255
    assert_close(parts["test"].mean, (train.mean(),))
    assert_close(parts["test"].std, (train.std(),))


def test_digits_splits_are_a_partition():
    from sklearn.datasets import load_digits

    source = load_digits()
    everything = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    )
    cut = [
        (image.tobytes(), int(label))
        for split in data.SPLITS
        for image, label in zip(*data.load(split=split)[:2], strict=True)
    ]
    assert sorted(cut) == everything and len(set(cut)) == 1797  # no two digits are alike


def test_digits_splits_never_change():
    digest = hashlib.sha256()
    for split in data.SPLITS:
        dataset = data.load("digits", split)
        digest.update(dataset.images.tobytes() + dataset.labels.tobytes())
    assert digest.hexdigest() == "bb3fb5a5778ace9d4b316701fa103bb050b5ebbc886f3374e544b55211f87552"


def test_digits_resized():
    assert data.load(image_size=16).images.shape == (1077, 1, 16, 16)
    assert same(data.load(image_size=8), data.load())


def test_train_limit_keeps_the_first_images_and_the_statistics():
    whole, few = data.load(), data.load(train_limit=50)
    assert np.array_equal(few.images, whole.images[:50])
    assert np.array_equal(few.labels, whole.labels[:50])
    assert few[2:] == whole[2:]
    assert len(set(few.labels.tolist())) == 10  # shuffled: the first images are a fair sample
    assert same(data.load(split="val", train_limit=50), data.load(split="val"))


@given(st.lists(st.integers(0, 4), min_size=8, max_size=200), st.booleans())
def test_partition_is_stratified_and_exact(labels, with_test):
    labels = np.array(labels)
    held = {"test": 0.2, "val": 0.2} if with_test else {"val": 0.1}
    parts = data._partition(labels, held)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for split, fraction in held.items():
        assert len(parts[split]) == int(np.ceil(fraction * len(labels)))
        for label in range(5):
            share = (labels == label).sum() * fraction
            assert abs((labels[parts[split]] == label).sum() - share) < 2


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 100))
def test_statistics_are_exact(channels, n, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, channels, 3, 4)).astype(np.uint8)
    mean, std = data._statistics(images)
    pixels = images.astype(np.float64) / 255
    assert_close(mean, tuple(pixels.mean((0, 2, 3)).tolist()))
    assert_close(std, tuple(pixels.std((0, 2, 3)).tolist()))


def test_statistics_of_a_constant_channel_stay_finite():
    mean, std = data._statistics(np.full((2, 1, 3, 3), 51, np.uint8))
    assert_close(mean, (0.2,))
    assert std == (1 / 255,)


# folders of images


def test_folder_is_cut_in_three(tmp_path):
    root = save_folder(tmp_path / "pictures")
    parts = {split: data.load(root, split) for split in data.SPLITS}
    assert [len(parts[split].labels) for split in data.SPLITS] == [18, 6, 6]
    assert sorted(sum((numbers(d) for d in parts.values()), [])) == list(range(30))
    for dataset in parts.values():
        assert dataset.classes == tuple(CLASSES) and dataset.name == "pictures"
        assert dataset.images.shape[1:] == (3, 5, 6)
        assert isinstance(dataset.images, np.memmap)
        for image, number, label in zip(
            dataset.images, numbers(dataset), dataset.labels, strict=True
        ):
            assert np.array_equal(image.transpose(1, 2, 0), np.array(picture(number)))
            assert label == number % 3
    pixels = parts["train"].images / 255
    assert_close(parts["test"].mean, tuple(pixels.mean((0, 2, 3)).tolist()))
    assert_close(parts["val"].std, tuple(pixels.std((0, 2, 3)).tolist()))


@pytest.mark.parametrize("names", [("train", "test"), ("training", "testing"), ("train", "val")])
def test_folder_with_its_own_test_split(tmp_path, names):
    root = tmp_path / "pictures"
    save_folder(root / names[0], 30)
    save_folder(root / names[1], 6, classes=CLASSES[:2], start=100)
    assert numbers(data.load(root, "test")) == [100, 102, 104, 101, 103, 105]  # as it stands
    train, val = data.load(root, "train"), data.load(root, "val")
    assert (len(train.labels), len(val.labels)) == (27, 3)
    assert sorted(val.labels.tolist()) == [0, 1, 2]
    assert sorted(numbers(train) + numbers(val)) == list(range(30))


def test_folder_with_three_splits(tmp_path):
    root = tmp_path / "pictures"
    for start, split in ((0, "train"), (50, "validation"), (100, "test")):
        save_folder(root / split, 6, start=start)
    for start, split in ((0, "train"), (50, "val"), (100, "test")):
        assert sorted(numbers(data.load(root, split))) == list(range(start, start + 6))


def test_folder_of_a_class_called_train(tmp_path):
    root = save_folder(tmp_path / "vehicles", 20, classes=["bus", "train"])
    assert data.load(root).classes == ("bus", "train")


def test_gray_stays_gray_and_mixed_becomes_rgb(tmp_path):
    root = save_folder(tmp_path / "gray", 10, mode="L")
    dataset = data.load(root)
    assert dataset.images.shape[1:] == (1, 5, 6) and len(dataset.mean) == 1
    number = numbers(dataset)[0]
    assert np.array_equal(dataset.images[0, 0], np.array(picture(number, mode="L")))
    picture(200).save(root / "ant" / "200.png")
    assert data.load(root).images.shape[1] == 3
    Image.new("P", (6, 5)).save(root / "ant" / "201.png")
    Image.new("RGBA", (6, 5)).save(root / "ant" / "202.png")
    assert len(data.load(root).labels) + 2 * len(data.load(root, "val").labels) == 13


def test_test_images_follow_the_training_channels(tmp_path):
    save_folder(tmp_path / "p" / "train", 10, mode="L")
    save_folder(tmp_path / "p" / "test", 3, start=100)
    assert data.load(tmp_path / "p", "test").images.shape == (3, 1, 5, 6)


def test_image_size_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (10, 0, 30, 10))
    wide.save(root / "ant" / "wide.png")
    parts = [data.load(root, split, image_size=5).images for split in data.SPLITS]
    images = np.concatenate(parts)
    assert images.shape == (11, 3, 5, 5)
    blue = [image for image in images if image[0].max() == 0]
    assert len(blue) == 1 and (blue[0][2] == 255).all()


# tables


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
    assert same(data.load(root, image_column="raw"), data.load(root))


def test_label_outside_the_classes(tmp_path):
    root = save_table(tmp_path / "set")
    bare = ([0, 1, -1] * 10, datasets.Value("int64"))
    root = save_table(tmp_path / "bare", extra={"bare": bare})
    with pytest.raises(ValueError, match="labels among the training classes .*got -1 for image 2"):
        data.load(root, label_column="bare")
    # a test label that no training image has
    save_table(root, extra={"bare": ([0, 1] * 15, datasets.Value("int64"))})
    save_table(root, "test", 3, extra={"bare": ([0, 1, 2], datasets.Value("int64"))})
    assert len(data.load(root, label_column="bare").classes) == 2
    with pytest.raises(ValueError, match=r"\('0', '1'\), got 2 for image 2 .*'test'"):
        data.load(root, "test", label_column="bare")
    save_folder(tmp_path / "p" / "train", 30)
    save_folder(tmp_path / "p" / "test", 4, classes=["ant", "dog"])
    with pytest.raises(ValueError, match="got 'dog' for .*dog"):
        data.load(tmp_path / "p", "test")


def test_training_never_reads_the_test_images(tmp_path):
    root = save_folder(tmp_path / "p" / "train", 30).parent
    save_folder(root / "test", 6)
    (root / "test" / "ant" / "000.png").write_bytes(b"not an image")
    assert len(data.load(root, "train").labels) + len(data.load(root, "val").labels) == 30
    with pytest.raises(ValueError, match="whole 8-bit images, got .*000.png"):
        data.load(root, "test")


# public names, with the network replaced


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The public set "someone/shapes" out of a folder: answers twice, then the network fails."""
    root = save_table(tmp_path / "mirror")
    save_table(root, "test", 6, start=100)
    open_builder, calls = datasets.load_dataset_builder, []

    def mirrored(path, cache_dir, **options):
        if path == "someone/shapes":
            calls.append((path, options))
        if len(calls) > 2:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nmore lines")
        return open_builder(str(root), cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset_builder", mirrored)
    return {"calls": calls, "root": root}


def test_public_name_is_read_once_and_then_needs_no_network(hub):
    options = {"config": "plain", "revision": "abc"}
    for _ in range(2):
        train = data.load("someone/shapes", **options)
        test = data.load("someone/shapes", "test", **options)
    assert train.name == test.name == "someone/shapes"
    assert same(train, data.load(hub["root"])._replace(name="someone/shapes"))
    assert hub["calls"] == [("someone/shapes", {"name": "plain", "revision": "abc"})] * 2
    with pytest.raises(ValueError, match="`load` could not open 'someone/shapes': Couldn't reach"):
        data.load("someone/shapes", revision="def")


# the cache


def test_cache_is_used_and_follows_the_source(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    first = data.load(root)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", None)
        assert same(data.load(root), first)
        assert same(data.load(str(root), "train"), first)
    assert same(data.load(root, cache=tmp_path / "other"), first)
    assert entries(tmp_path / "other") == entries(tmp_path / "cache")
    picture(77).save(root / "bee" / "001.png")
    changed = sum((numbers(data.load(root, split)) for split in data.SPLITS), [])
    assert 77 in changed and len(changed) == 10
    assert len(entries(tmp_path / "cache")) == 2


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


@pytest.mark.parametrize("role", ["fit", "test"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text('{"bytes": '),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "manifest.json").write_text("{}"),
        lambda entry: _truncate(next(entry.glob("*.images.npy"))),
        lambda entry: _truncate(next(entry.glob("*.labels.npy"))),
        lambda entry: next(entry.glob("*.images.npy")).unlink(),
        lambda entry: [path.unlink() for path in entry.iterdir()],
        lambda entry: (shutil.rmtree(entry), entry.write_text("a file")),
    ],
)
def test_damaged_cache_is_decoded_again(tmp_path, damage, role):
    root = save_folder(tmp_path / "p" / "train", 12).parent
    save_folder(root / "test", 6, start=100)
    before = [data.load(root, split) for split in data.SPLITS]
    before = [d._replace(images=np.array(d.images)) for d in before]
    [entry] = (tmp_path / "cache").glob(f"*-{role}-*")
    damage(entry)
    for split, dataset in zip(data.SPLITS, before, strict=True):
        assert same(data.load(root, split), dataset)
    assert len(entries(tmp_path / "cache")) == 2  # nothing left behind


def test_failure_leaves_nothing_in_the_cache(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    data.load(root)
    before = entries(tmp_path / "cache")
    _truncate(root / "ant" / "000.png")
    (root / "ant" / "000.png").write_bytes((root / "ant" / "000.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="whole 8-bit images, got .*000.png.* Replace or remove"):
        data.load(root)
    assert entries(tmp_path / "cache") == before


def test_what_killed_processes_left_is_swept_after_a_day(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    data.load(root)
    [name] = entries(tmp_path / "cache")
    for kind in ("old", "new"):
        (tmp_path / "cache" / f".{name}-{kind}").mkdir()
        (tmp_path / "cache" / f".{name}-{kind}" / "raw").write_bytes(b"half")
    for path in [tmp_path / "cache" / f".{name}-old", tmp_path / "cache" / f".{name}-old" / "raw"]:
        os.utime(path, (0, 0))
    (tmp_path / "cache" / name / "manifest.json").unlink()
    data.load(root)
    assert entries(tmp_path / "cache") == [f".{name}-new", name]


def test_a_process_that_comes_second_takes_the_first_ones_entry(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    fill, nested = data._fill, []

    def slow_fill(*args):
        fill(*args)
        if not nested:
            nested.append(True)
            nested.append(data.load(root))  # another process builds the same entry meanwhile
            nested.append([path.stat().st_ino for path in (tmp_path / "cache").glob("p*/*")])

    monkeypatch.setattr(data, "_fill", slow_fill)
    assert same(data.load(root), nested[1])
    assert [path.stat().st_ino for path in (tmp_path / "cache").glob("p*/*")] == nested[2]
    assert len(entries(tmp_path / "cache")) == 1


def test_processes_build_the_cache_at_once(tmp_path):
    root = save_folder(tmp_path / "pictures", 200)
    code = (
        "import sys, hashlib; from kart import data; d = data.load(sys.argv[1]);"
        "print(hashlib.sha256(d.images.tobytes() + d.labels.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[1])}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    dataset = data.load(root)
    digest = hashlib.sha256(dataset.images.tobytes() + dataset.labels.tobytes()).hexdigest()
    assert printed == [digest + "\n"] * 3
    assert len(entries(tmp_path / "cache")) == 1


def test_cache_that_cannot_be_written(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="writable `cache` directory, got .*KART_CACHE"):
        data.load(root, cache=tmp_path / "file" / "cache")


def test_disk_that_fills_up(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_write", full)
    with pytest.raises(ValueError, match="writable `cache` directory, got .*No space left"):
        data.load(root)
    assert entries(tmp_path / "cache") == []


def test_linked_folders_are_followed_and_hidden_ones_are_not(tmp_path):
    save_folder(tmp_path / "elsewhere", 10)
    (tmp_path / "pictures" / ".hidden").mkdir(parents=True)
    picture(0).save(tmp_path / "pictures" / ".hidden" / "0.png")
    for name in CLASSES:
        (tmp_path / "pictures" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert data.load(tmp_path / "pictures").classes == tuple(CLASSES)


# bad input


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "pictures", 10)
    for source, near in (
        ("digit", "digits"),
        ("cifar10", "uoft-cs/cifar10"),
        ("./pictres", "pictures"),
        (str(tmp_path / "picture"), "pictures"),
    ):
        with pytest.raises(ValueError, match=f"needs `source` .*got '.*Near matches: .*{near}"):
            data.load(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="parquet files or images, got 'empty' with none"):
        data.load("empty")
    with pytest.raises(ValueError, match="needs `split` .*'validation'"):
        data.load(split="validation")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"train_limit": 2000}, "`train_limit` <= 1077, .*'digits', got 2000. Leave it out"),
        ({"train_limit": 0}, "`train_limit` >= 1 or None, got 0"),
        ({"image_size": 0}, "`image_size` >= 1 or None, got 0"),
        ({"image_size": 8.0}, "`image_size` >= 1 or None, got 8.0"),
        ({"label_column": "y"}, "no columns, `config` or `revision` for 'digits'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        data.load(**options)


def test_bad_folders(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    with pytest.raises(ValueError, match="columns for tables only, got them with .*pictures"):
        data.load(root, label_column="y")
    with pytest.raises(ValueError, match="`config` and `revision` for public names only"):
        data.load(root, revision="main")
    picture(50, size=(9, 9)).save(root / "ant" / "050.png")
    with pytest.raises(ValueError, match=r"`image_size` where .*050.png is \(9, 9\).* say 5"):
        data.load(root)
    Image.new("I;16", (6, 5)).save(root / "ant" / "050.png")
    with pytest.raises(ValueError, match="8-bit images, got .*050.png: mode I.* is not 8 bits"):
        data.load(root)
    picture(50).save(root / "050.png")
    with pytest.raises(ValueError, match="one sub-folder per class, got the image .*050.png"):
        data.load(root)
    few = save_folder(tmp_path / "few", 2)
    with pytest.raises(ValueError, match="more than 2 training images .*got 2. Add images"):
        data.load(few)
    save_folder(tmp_path / "p" / "train", 30)
    save_folder(tmp_path / "p" / "test", 3, size=(7, 7))
    with pytest.raises(ValueError, match=r"`image_size` where splits differ .*\[7, 7\]"):
        data.load(tmp_path / "p", "test")


def test_bad_tables(tmp_path):
    root = save_table(tmp_path / "set", shards=3)
    (root / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="all 3 shards of .*train', got 2. Fetch the others"):
        data.load(root)
    root = save_table(tmp_path / "cut")
    _truncate(root / "train-00000-of-00001.parquet")
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
    with pytest.raises(ValueError, match="`load` .*(could not read|needs whole 8-bit images)"):
        data.load(root)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("module", ["sklearn.datasets", "datasets", "PIL"])
def test_missing_libraries_name_the_extra(tmp_path, monkeypatch, module):
    table = save_table(tmp_path / "set")
    folder = save_folder(tmp_path / "pictures", 10)
    source = {"sklearn.datasets": "digits", "datasets": table, "PIL": folder}[module]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r'`load` needs .*"kart-attention\[data\]"'):
        data.load(source)


# batches


def test_generator_depends_on_its_keys_alone():
    def draw(*keys):
        return torch.randn(4, generator=data.generator_for(*keys)).tolist()

    assert draw("augment", 3, 7) == draw("augment", 3, 7)
    keys = [(1,), ("1",), (1, 1), (11,), ("1", 1), ("11",), (-1,), (1, "1"), ("1,1",)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    for wrong in ((), (1.5,), (None,)):
        with pytest.raises(ValueError, match="int or str keys"):
            data.generator_for(*wrong)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.integers(0, 9))
def test_batches_cover_the_epoch(n, batch_size, seed, epoch):
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    if batch_size <= n:
        batches = data.batch_indices(n, batch_size, seed, epoch)
        assert batches.shape == (n // batch_size, batch_size) and batches.dtype == torch.int64
        assert len(set(batches.flatten().tolist())) == batches.numel()
        assert torch.equal(batches, data.batch_indices(n, batch_size, seed, epoch))
    full = data.batch_indices(n, batch_size, seed, epoch, drop_last=False)
    assert full.shape == (-(-n // batch_size), batch_size)
    assert sorted(full.flatten()[:n].tolist()) == list(range(n))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_differ_between_epochs_and_seeds():
    first = data.batch_indices(100, 10, seed=0, epoch=0)
    assert not torch.equal(first, data.batch_indices(100, 10, seed=0, epoch=1))
    assert not torch.equal(first, data.batch_indices(100, 10, seed=1, epoch=0))
    # never another order: runs are resumed and repeated by it
    assert first[0].tolist() == [72, 95, 53, 71, 74, 59, 34, 90, 51, 6]


@pytest.mark.parametrize("n, batch_size, drop_last", [(9, 10, True), (0, 1, False), (9, 0, False)])
def test_bad_batches(n, batch_size, drop_last):
    with pytest.raises(ValueError, match=f"n = {n}, got {batch_size}. Lower the batch size"):
        data.batch_indices(n, batch_size, 0, 0, drop_last)


def test_take(tmp_path):
    dataset = data.load(save_folder(tmp_path / "pictures"))
    images, labels = data.take(dataset, torch.tensor([[3, 1], [1, 0]]))
    assert images.shape == (2, 2, 3, 5, 6) and images.dtype == torch.uint8
    assert labels.shape == (2, 2) and labels.dtype == torch.int64
    assert images[0, 1].numpy().tolist() == dataset.images[1].tolist()
    assert labels[0, 0] == dataset.labels[3]
    images += 1  # a copy: the cache is read-only
    for wrong, words in (([18], r"0..17, got 18..18"), ([-1, 0], r"0..17, got -1..0")):
        with pytest.raises(ValueError, match=f"indices in {words}"):
            data.take(dataset, torch.tensor(wrong))
    with pytest.raises(ValueError, match="integer `indices`, got torch.float32"):
        data.take(dataset, torch.tensor([0.0]))


def test_normalise_by_hand():
    images = torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8)
    out = data.normalise(images, (0.5, 0.2), (0.5, 0.1))
    assert_close(out, torch.tensor([[[-1.0, 1.0]], [[0.0, 2.0]]]))
    assert_close(data.normalise(data.as_float(images), (0.5, 0.2), (0.5, 0.1)), out)
    dataset = data.load()
    pixels = data.normalise(torch.from_numpy(dataset.images), dataset.mean, dataset.std)
    assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(pixels.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    for images, words in (
        (torch.zeros(1, 2, 2), r"shape \(1, 2, 2\), 2 and 2"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "got torch.int64"),
    ):
        with pytest.raises(ValueError, match=words):
            data.normalise(images, (0.5, 0.2), (0.5, 0.1))
    with pytest.raises(ValueError, match="`as_float` needs uint8 images, got torch.float32"):
        data.as_float(torch.zeros(1))
