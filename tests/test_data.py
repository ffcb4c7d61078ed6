"""Data sets: splits, folders built in `tmp_path`, public names, options, batches."""

import hashlib
import sys

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import CLASSES, numbers, picture, same, save_folder, save_table
from PIL import Image
from torch.testing import assert_close

from kart import data, train
from kart.data import splits
from kart.data.dataset import mean_and_std

pytestmark = pytest.mark.usefixtures("own_cache")

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
    parts = splits.partition(labels, held)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for split, fraction in held.items():
        assert len(parts[split]) == int(np.ceil(fraction * len(labels)))
        for label in range(5):
            share = (labels == label).sum() * fraction
            assert abs((labels[parts[split]] == label).sum() - share) < 2


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 100))
def test_statistics_are_exact(channels, n, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, channels, 3, 4)).astype(np.uint8)
    mean, std = mean_and_std(images)
    pixels = images.astype(np.float64) / 255
    assert_close(mean, tuple(pixels.mean((0, 2, 3)).tolist()))
    assert_close(std, tuple(pixels.std((0, 2, 3)).tolist()))


def test_statistics_of_a_constant_channel_stay_finite():
    mean, std = mean_and_std(np.full((2, 1, 3, 3), 51, np.uint8))
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


def test_training_never_reads_the_test_images(tmp_path):
    root = save_folder(tmp_path / "p" / "train", 30).parent
    save_folder(root / "test", 6)
    (root / "test" / "ant" / "000.png").write_bytes(b"not an image")
    assert len(data.load(root, "train").labels) + len(data.load(root, "val").labels) == 30
    with pytest.raises(ValueError, match="whole 8- or 16-bit images, got .*000.png"):
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


@pytest.mark.parametrize("missing", [-1, None])
def test_a_public_held_out_split_without_labels_is_left_out(hub, missing):
    """As of ImageNet's copies, whose test labels are -1: the validation split is the test split."""
    table = datasets.Dataset.from_parquet(str(hub["root"] / "test-00000-of-00001.parquet"))
    table.to_parquet(hub["root"] / "validation-00000-of-00001.parquet")
    hidden = table.remove_columns("label").add_column("label", [missing] * 6)
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=list(CLASSES)))
    hidden.to_parquet(hub["root"] / "test-00000-of-00001.parquet")
    found = data.describe("someone/shapes")
    why = {item.what: item.why for item in found.unused}
    assert why["split 'test'"] == "no labels: the first is missing"
    assert found.splits["test"].origin == "'validation'"
    assert {name: split.images for name, split in found.splits.items()} == {
        "train": 27,
        "val": 3,
        "test": 6,
    }


def test_an_image_without_a_label_is_named(hub):
    table = datasets.Dataset.from_parquet(str(hub["root"] / "test-00000-of-00001.parquet"))
    some = table.remove_columns("label").add_column("label", [0, 1, -1, 0, 1, 2])
    some = some.cast_column("label", datasets.ClassLabel(names=list(CLASSES)))
    some.to_parquet(hub["root"] / "test-00000-of-00001.parquet")
    data.load("someone/shapes")
    with pytest.raises(ValueError, match="label for every image, got -1 for image 2 of .*'test'"):
        data.load("someone/shapes", "test")


# bad input


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(tmp_path / "pictures", 10)
    for source, near in (
        ("digit", "digits"),
        ("cifar-10", "cifar10"),
        ("fashion-mnist", "fashion_mnist"),
        ("uoft-cs", "uoft-cs/cifar10"),
        ("./pictres", "pictures"),
        (str(tmp_path / "picture"), "pictures"),
    ):
        with pytest.raises(ValueError, match=f"needs `source` .*got '.*Near matches: .*{near}"):
            data.load(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"images, got 'empty' with none: only \*.txt"):
        data.load("empty")
    with pytest.raises(ValueError, match="needs `split` .*'validation'"):
        data.load(split="validation")
    assert not (tmp_path / "cache").exists()


def test_bad_folders(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    with pytest.raises(ValueError, match="columns for tables only, got them with .*pictures"):
        data.load(root, label_column="y")
    with pytest.raises(ValueError, match="`config` and `revision` for public names only"):
        data.load(root, revision="main")
    picture(50, size=(9, 9)).save(root / "ant" / "050.png")
    words = r"`image_size` where .*050.png is \(9, 9\).* say 5 .*--decode-size"
    with pytest.raises(ValueError, match=words):
        data.load(root)
    Image.new("F", (6, 5)).save(root / "ant" / "050.tif")
    (root / "ant" / "050.png").unlink()
    with pytest.raises(ValueError, match="16-bit images, got .*050.tif: mode F is neither"):
        data.load(root)
    (root / "ant" / "050.tif").unlink()
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


@pytest.mark.parametrize("module", ["sklearn", "pyarrow", "PIL"])
def test_missing_libraries_name_the_extra(tmp_path, monkeypatch, module):
    table = save_table(tmp_path / "set")
    folder = save_folder(tmp_path / "pictures", 10)
    source = {"sklearn": "digits", "pyarrow": table, "PIL": folder}[module]
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
    with torch.device("meta"):  # it is where the images are, whatever the default device
        assert_close(data.normalise(images, (0.5, 0.2), (0.5, 0.1)), out)
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
    for mean, std in (((0.5, 0.2), (0.5, 0.0)), ((0.5, float("nan")), (0.5, 0.1))):
        with pytest.raises(ValueError, match="finite means and deviations > 0, got"):
            data.normalise(torch.zeros(2, 2, 2), mean, std)
    with pytest.raises(ValueError, match="`as_float` needs uint8 images, got torch.float32"):
        data.as_float(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((6, 3, 4, 4), np.float32)}, "`images` .* uint8 .* got float32 of"),
        ({"images": np.zeros((6, 4, 4), np.uint8)}, "`images` to be .* got uint8 of .*6, 4, 4"),
        ({"images": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}, "`images` .* got torch.uint8"),
        ({"labels": np.zeros(5, np.int64)}, "`labels` to be one of each of 6 images, got 5"),
        ({"labels": np.arange(6)}, "`labels` to be numbers of its 2 classes, 0 to 1, got 0 to 5"),
        ({"labels": np.arange(6) % 2 - 1}, "`labels` .* got -1 to 0"),
        ({"labels": np.array(["a", "b"] * 3)}, "`labels` .* int64 .n,., got <U1"),
        ({"labels": [0, 1] * 3}, "`labels` .* got list"),
        ({"classes": ("a",)}, "`classes` to be two names or more"),
        ({"classes": (0, 1)}, "`classes` to be two names or more, no one twice, got .0, 1"),
        ({"classes": ("a", "a")}, "`classes` to be .* no one twice, got .'a', 'a'"),
        ({"name": None}, "`name` to be a string, got None"),
        ({"mean": (120.0,) * 3}, "`mean` to be 3 numbers in 0 to 1, .* got .120.0"),
        ({"mean": (0.5,)}, "`mean` to be 3 numbers"),
        ({"mean": 0.5}, "`mean` to be 3 numbers .* got 0.5"),
        ({"mean": None}, "`mean` to be 3 numbers .* got None"),
        ({"std": (0.0,) * 3}, "`std` to be 3 numbers"),
        ({"std": (float("nan"),) * 3}, "`std` to be 3 numbers"),
    ],
)
def test_a_data_set_of_arrays_of_ones_own_is_checked(change, words):
    pixels, labels = np.zeros((6, 3, 4, 4), np.uint8), np.arange(6) % 2
    own = data.Dataset(pixels, labels, ("a", "b"), "own", (0.5,) * 3, (0.25,) * 3)
    config = train.Config(embed_dim=4, depth=1, num_heads=1, batch_size=4)
    train.build(config, own)
    wrong = own._replace(**change)
    with pytest.raises(ValueError, match=f"`Dataset` needs {words}"):
        train.build(config, wrong)
    # validation images are not those that the model is built for
    with pytest.raises(ValueError, match=f"`Dataset` needs {words}"):
        train.evaluate(lambda params, images: images.mean((2, 3)), {}, wrong, config)


@pytest.mark.parametrize(
    ("labels", "count", "wanted"),
    [
        ([0, 1, 0, 1, 2, 0], 3, [0, 1, 2]),
        ([0, 0, 1, 1, 2, 2], 3, [1, 3, 5]),
        ([2, 2, 0, 0, 1, 1], 3, [1, 3, 5]),
        ([0, 0, 1, 1, 2, 2], 6, [0, 1, 2, 3, 4, 5]),
        ([0, 0, 1, 1, 2, 2], 99, [0, 1, 2, 3, 4, 5]),
        ([0, 0, 1, 1], 0, []),
        ([], 3, []),
    ],
)
def test_some_images_are_of_all_classes_where_they_lie_class_by_class(labels, count, wanted):
    labels = np.array(labels, np.int64)
    own = data.load("digits", "val")._replace(labels=labels)
    assert own.spread(count).tolist() == wanted


def test_no_image_has_no_score():
    none = data.load("digits", "val")
    none = none._replace(images=none.images[:0], labels=none.labels[:0])
    with pytest.raises(ValueError, match="`evaluate` needs one image or more, got none"):
        train.evaluate(lambda params, images: images, {}, none, train.Config())
