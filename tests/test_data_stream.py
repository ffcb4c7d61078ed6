"""Images that stay in their files: pixels, order and boxes with any workers, kills, oddities;
folders, parquet files and public names.
"""

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets as library
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import datasets
from torch.testing import assert_close

from kart import augment, cli, data, train
from kart.analysis import section
from kart.data import images, reading
from studies import loader

SYNSETS = ("n01440764", "n01443537", "n02102040")
SIDE = 24


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [Image.fromarray(one) for one in datasets.load_sample_images().images]


pytestmark = pytest.mark.usefixtures("own_cache")


def parts(photographs: list[Image.Image], count: int, seed: int = 0) -> list[Image.Image]:
    """Parts of the photographs, of different sizes and shapes, each scaled down a little."""
    draws = np.random.default_rng(seed)
    found = []
    for i in range(count):
        width, height = (int(side) for side in draws.integers(90, 200, 2))
        whole = photographs[i % 2]
        left = int(draws.integers(0, whole.width - width))
        top = int(draws.integers(0, whole.height - height))
        found.append(whole.crop((left, top, left + width, top + height)))
    return found


def imagenet(root: Path, photographs: list[Image.Image]) -> Path:
    """ImageNet's layout, train/synset/*.JPEG and val/synset/*.JPEG, with its oddities."""
    for split, count, seed in (("train", 36, 0), ("val", 9, 1)):
        for i, image in enumerate(parts(photographs, count, seed)):
            synset = SYNSETS[i % 3]
            path = root / split / synset / f"{synset}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            options = {"quality": 95}
            if split == "train" and i == 3:
                image = image.convert("L")
            elif split == "train" and i == 4:
                image = image.convert("CMYK")
            elif split == "train" and i == 5:
                exif = Image.Exif()
                exif[0x0112] = 6
                options["exif"] = exif
            elif split == "train" and i == 6:  # as one of ImageNet's: a PNG called JPEG
                image.save(path, "PNG")
                continue
            image.save(path, "JPEG", **options)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs) -> Path:
    return imagenet(tmp_path_factory.mktemp("imagenet"), photographs)


def loaded(folder: Path | str, split: str = "train", **options) -> data.Dataset:
    options = {"image_size": SIDE, "stream": True, "workers": 0, **options}
    return data.load(folder, split, **options)


def table_of(root: Path, folder: Path) -> Path:
    """The files of `folder` in parquet files, two a split."""
    root.mkdir(parents=True)
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=[*SYNSETS])}
    )
    for split in ("train", "val"):
        paths = sorted((folder / split).rglob("*.JPEG"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "label": [SYNSETS.index(path.parent.name) for path in paths],
        }
        whole = library.Dataset.from_dict(rows, features=features)
        for i in range(2):
            whole.shard(2, i, contiguous=True).to_parquet(root / f"{split}-{i:05}-of-00002.parquet")
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory, folder) -> Path:
    return table_of(tmp_path_factory.mktemp("table") / "set", folder)


@pytest.fixture
def public(table, monkeypatch) -> str:
    """A public name that the library finds in the files of `table`."""
    begin = library.load_dataset_builder

    def mirrored(path, cache_dir, **options):
        builder = begin(str(table), cache_dir=cache_dir)
        # as the notes of a set on the hub have them
        sizes = [{"name": "train", "num_examples": 36}, {"name": "validation", "num_examples": 9}]
        builder.info.splits = library.splits.SplitDict.from_split_dict(sizes)
        return builder

    monkeypatch.setattr(library, "load_dataset_builder", mirrored)
    return "someone/photographs"


@pytest.fixture(params=["table", "public"])
def rows(request) -> Path | str:
    """A source that has no image files."""
    return request.getfixturevalue(request.param)


# whole images


def facts(dataset: data.Dataset) -> tuple:
    """What a data set says of itself beside its images."""
    names = ("classes", "name", "mean", "std", "unused", "converted", "counts", "channels")
    return (*(getattr(dataset, name) for name in names), dataset.labels.tolist())


@pytest.mark.parametrize("split", data.SPLITS)
def test_rows_of_tables_stream_as_the_cache_has_them(rows, split):
    cached, streamed = loaded(rows, split, stream=False), loaded(rows, split)
    assert isinstance(streamed.images, data.Pictures) and isinstance(cached.images, np.ndarray)
    assert np.array_equal(streamed.images, cached.images)
    assert facts(streamed) == facts(cached)


def test_rows_are_copied_once_and_test_images_by_themselves(rows, tmp_path, caplog, monkeypatch):
    def entries(word):
        return sorted(path for path in (tmp_path / "cache").iterdir() if word in path.name)

    first = loaded(rows)
    assert len(entries("-train-files-")) == 1 and not entries("-test-files-")
    (entry,) = entries("-train-files-")
    stamps = {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    assert loaded(rows, "val").fingerprint == loaded(rows, "val", workers=2).fingerprint
    loaded(rows, "test")
    assert len(entries("-test-files-")) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    assert "damaged" not in caplog.text
    with monkeypatch.context() as patch:  # nor is the network asked for what is there
        patch.delattr(library, "load_dataset_builder")
        for split in data.SPLITS:
            assert facts(loaded(rows, split)) == facts(loaded(rows, split, workers=2))
    # what was lost is copied again
    Path(first.images.path(3)).unlink()
    again = loaded(rows)
    assert "is damaged" in caplog.text and np.array_equal(again.images, first.images)
    assert again.fingerprint == first.fingerprint and not list((tmp_path / "cache").glob(".*"))


def test_a_table_elsewhere_has_the_same_fingerprint(table, folder, tmp_path):
    other = table_of(tmp_path / "elsewhere" / "set", folder)
    assert loaded(other).fingerprint == loaded(table).fingerprint
    assert loaded(other, image_size=SIDE + 1).fingerprint != loaded(table).fingerprint


def test_rows_stream_by_their_size(rows, monkeypatch, caplog):
    monkeypatch.setattr("kart.data.stream.STREAM_LIMIT", 45 * 3 * SIDE * SIDE - 1)
    for _ in range(2):  # a public set's size is known from the second time on
        assert isinstance(loaded(rows, stream=None).images, data.Pictures)
        assert "its images stay in their files" in caplog.text
        caplog.clear()
    monkeypatch.setattr("kart.data.stream.STREAM_LIMIT", 45 * 3 * SIDE * SIDE)
    assert isinstance(loaded(rows, stream=None).images, np.ndarray)


def test_a_truncated_row_is_named_before_training(tmp_path, photographs):
    folder = imagenet(tmp_path / "set", photographs)
    victim = sorted((folder / "train").rglob("*.JPEG"))[7]
    victim.write_bytes(victim.read_bytes()[:2000])
    root = table_of(tmp_path / "table", folder)
    with pytest.raises(ValueError, match=r"image 7 of .*split 'train': .*truncated") as error:
        loaded(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", data.SPLITS)
def test_whole_images_splits_and_order_are_those_of_the_cache(folder, split):
    cached, streamed = loaded(folder, split, stream=False), loaded(folder, split)
    assert isinstance(streamed.images, data.Pictures) and isinstance(cached.images, np.ndarray)
    assert streamed.images.shape == cached.images.shape
    assert np.array_equal(streamed.images, cached.images)
    assert np.array_equal(streamed.labels, cached.labels)
    # 31 training images are within the sample: the statistics are the exact ones
    for name in ("classes", "name", "mean", "std", "unused", "converted", "counts", "channels"):
        assert getattr(streamed, name) == getattr(cached, name), name


def test_pictures_index_like_an_array(folder):
    pictures = loaded(folder).images
    whole = np.asarray(pictures)
    threads = loaded(folder, workers=3).images
    for index in (3, -1, [2, 0, 2], np.array([[1, 5], [0, 7]]), np.arange(len(whole)) % 3 == 0):
        assert np.array_equal(pictures[index], whole[index])
        assert np.array_equal(threads[index], whole[index])
    assert isinstance(pictures[2:9:3], data.Pictures)
    assert np.array_equal(pictures[2:9:3], whole[2:9:3])
    assert (pictures.size, pictures.nbytes, len(pictures)) == (whole.size, whole.nbytes, len(whole))
    assert pictures.dtype == whole.dtype and pictures.ndim == whole.ndim
    with pytest.raises(IndexError):
        pictures[len(whole)]
    few = loaded(folder, train_limit=5)
    assert np.array_equal(few.images, whole[:5]) and len(few.labels) == 5


def test_fingerprints_tell_other_files(folder, tmp_path, photographs):
    first = loaded(folder)
    assert first.fingerprint == loaded(folder, workers=2).fingerprint
    copy = imagenet(tmp_path / "copy", photographs)
    assert loaded(copy).fingerprint == first.fingerprint
    assert loaded(folder, image_size=SIDE + 1).fingerprint != first.fingerprint
    assert loaded(folder, "val").fingerprint != first.fingerprint
    victim = Path(loaded(copy).images.path(3))
    Image.new("RGB", (100, 100)).save(victim, "JPEG")
    assert loaded(copy).fingerprint != first.fingerprint


def test_workers_are_the_cores_but_one_where_the_system_tells_no_affinity(folder, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert loaded(folder, workers=None).images.workers == 3


def test_the_way_is_chosen_by_size_and_said(folder, monkeypatch, caplog):
    assert isinstance(loaded(folder, stream=None).images, np.ndarray)
    assert "stay in their files" not in caplog.text
    monkeypatch.setattr("kart.data.stream.STREAM_LIMIT", 45 * 3 * SIDE * SIDE - 1)
    assert isinstance(loaded(folder, stream=None).images, data.Pictures)
    assert "imagenet0 would take" in caplog.text and "stay in their files" in caplog.text
    monkeypatch.setattr("kart.data.stream.STREAM_LIMIT", 45 * 3 * SIDE * SIDE)
    assert isinstance(loaded(folder, stream=None).images, np.ndarray)


def test_what_cannot_stream_is_refused(folder):
    with pytest.raises(ValueError, match="`load` streams directories and public data sets alone"):
        data.load("digits", stream=True)
    with pytest.raises(ValueError, match="`load` needs `stream` to be True, False or None, got 1"):
        loaded(folder, stream=1)
    with pytest.raises(ValueError, match=r"`load` needs `workers` in 0..256 or None, got -1"):
        loaded(folder, workers=-1)
    with pytest.raises(ValueError, match="`load` needs `image_size` where images differ in size"):
        loaded(folder, image_size=None)
    with pytest.raises(ValueError, match="`reader` needs images that stream"):
        data.reader(data.load("digits"), 8, data.Cut(augment.random_box, 8))


# oddities


def test_oddities_are_read_as_shown_and_counted(folder):
    told = {
        item.what: item.count
        for item in (*loaded(folder).converted, *loaded(folder, "val").converted)
    }
    assert told == {
        "CMYK to RGB": 1,
        "grey repeated in three channels": 1,
        "turned as EXIF says": 1,
    }


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_image_is_named_before_training(tmp_path, photographs, share):
    folder = imagenet(tmp_path / "set", photographs)
    victim = next((folder / "train" / SYNSETS[1]).iterdir())
    content = victim.read_bytes()
    victim.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"got {victim}: .*truncated.* Replace or remove it."):
        loaded(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_in_one_line(tmp_path, photographs, workers):
    folder = imagenet(tmp_path / "set", photographs)
    split = loaded(folder, workers=workers)
    victim = Path(split.images.path(3))
    victim.write_bytes(victim.read_bytes()[:2000])
    read = data.reader(split, 8, data.Cut(augment.random_box, 8))
    with pytest.raises(ValueError) as caught:
        for step in range(2 * read.steps_per_epoch):
            read.at(0, step)
    assert str(victim) in str(caught.value) and "\n" not in str(caught.value)


# boxes


@settings(max_examples=25)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**32))
def test_boxes_are_those_of_random_resized_crop(height, width, seed):
    top, left, rows, columns = augment.random_box(data.generator_for(seed), height, width)
    assert 0 <= top <= top + rows <= height and 0 <= left <= left + columns <= width
    assert rows >= 1 and columns >= 1
    # an image that says where each pixel is, read at the centres of 1 x 1: the centre of the box
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    image = torch.stack([y, x])[None].double() / 64
    centre = augment.random_resized_crop(data.generator_for(seed), image, size=1)[0, :, 0, 0] * 64
    expected = torch.tensor([top + rows / 2, left + columns / 2]).double()
    assert_close(centre, expected, atol=1e-3, rtol=0)


def test_boxes_cover_the_stated_shares_of_the_area():
    boxes = [augment.random_box(data.generator_for("area", i), 375, 500) for i in range(2000)]
    shares = np.array([rows * columns / (375 * 500) for _, _, rows, columns in boxes])
    ratios = np.array([columns / rows for _, _, rows, columns in boxes])
    assert 0.075 < shares.min() < 0.1 and 0.97 < shares.max() <= 1
    assert 0.66 < ratios.min() < 0.69 and 1.45 < ratios.max() < 1.52
    # uniform in [0.08, 1] but for the large boxes that do not fit: small ones are untouched
    small = shares[shares < 0.5]
    assert abs(small.mean() - 0.29) < 0.02
    assert abs(np.mean(shares < 0.2) / np.mean((shares > 0.2) & (shares < 0.32)) - 1) < 0.2


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def test_cuts_are_pillows(photographs):
    content = jpeg(photographs[0])
    box = (31, 50, 200, 301)  # top, left, height, width
    found = images.cut(io.BytesIO(content), "here", lambda h, w: box, 64 * 2)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    place = (50, 31, 50 + 301, 31 + 200)
    expected = whole.resize((128, 128), Image.Resampling.BILINEAR, box=place)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_jpeg_is_scaled_while_it_is_decoded_where_that_helps(photographs, monkeypatch, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = jpeg(photographs[1], exif=exif)
    decoded = []
    pixels = images._pixels
    monkeypatch.setattr(
        images, "_pixels", lambda opened, told: decoded.append(opened.size) or pixels(opened, told)
    )
    for size, scale in ((12, 4), (24, 4), (50, 2), (110, 1)):
        box = (20, 16, 360, 392)
        found = images.cut(io.BytesIO(content), "here", lambda h, w, box=box: box, size)
        whole, _ = images.decode(io.BytesIO(content), "here")
        decoded.pop()
        if turn > 1:
            scale = 1
        expected = whole.resize((size, size), Image.Resampling.BILINEAR, box=(16, 20, 408, 380))
        # at least three times the pixels that are needed
        assert decoded.pop() == tuple(-(-side // scale) for side in photographs[1].size)
        apart = np.abs(np.asarray(found).astype(float) - np.asarray(expected))
        assert apart.mean() < 1.0 and np.quantile(apart, 0.99) < 8


# order


def batches(folder: Path, workers: int, steps, augmentation: str = "paper", seed: int = 3) -> list:
    config = train.Config(
        data=str(folder),
        decode_size=SIDE,
        stream=True,
        augment=augmentation,
        batch_size=8,
        image_size=16,
        seed=seed,
    )
    source = train.batches(config, train.load_data(config, workers=workers).train)
    return [source.at(seed, step) for step in steps]


# torch's advice, where there are fewer cores
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("form", "augmentation"), [("folder", "paper"), ("folder", "flip_crop"), ("table", "paper")]
)
def test_batches_do_not_depend_on_the_workers(request, form, augmentation):
    folder = request.getfixturevalue(form)
    steps = range(11)  # 32 images: more than three epochs
    expected = batches(folder, 0, steps, augmentation)
    assert len({images.sum().item() for images, _ in expected}) == len(expected)
    for workers in (1, 3):
        for found, there in zip(
            batches(folder, workers, steps, augmentation), expected, strict=True
        ):
            assert all(map(torch.equal, found, there))


def test_batches_that_are_not_cut_are_those_of_the_cache(folder):
    config = train.Config(data=str(folder), decode_size=SIDE, augment="flip_crop", batch_size=8)
    cached = train.batches(config, train.load_data(config, stream=False).train)
    streamed = train.batches(config, train.load_data(config, stream=True, workers=0).train)
    assert cached.steps_per_epoch == streamed.steps_per_epoch
    for step in range(6):
        assert all(map(torch.equal, cached.at(1, step), streamed.at(1, step)))


@settings(max_examples=4)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=4))
def test_steps_out_of_turn_give_the_same(folder, starts):
    split = loaded(folder, workers=1)
    plain = data.reader(loaded(folder), 8, data.Cut(augment.random_box, 8))
    read = data.reader(split, 8, data.Cut(augment.random_box, 8))
    for seed, start in enumerate(starts):
        for step in range(start, start + 3):
            assert all(map(torch.equal, read.at(seed % 2, step), plain.at(seed % 2, step)))


def test_a_reader_in_a_worker_of_somebodys_own_loader_reads_alone(folder, monkeypatch):
    plain, read = data.reader(loaded(folder), 8), data.reader(loaded(folder, workers=1), 8)
    # what torch's loader does to its workers, which then may have none
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    for step in range(3):
        assert all(map(torch.equal, read.at(0, step), plain.at(0, step)))


def test_seeds_that_train_together_share_the_workers(folder, monkeypatch):
    begun = []

    def spy(drawn, workers, seed, step):
        begun.append((seed, workers))
        return (drawn[seed, at] for at in itertools.count(step))

    monkeypatch.setattr(reading, "_ahead", spy)
    read = data.reader(loaded(folder, workers=7), 8)
    plain = data.reader(loaded(folder), 8)
    for step in range(3):
        for seed in (0, 1, 2):
            for mine, alone in zip(read.at(seed, step), plain.at(seed, step), strict=True):
                assert torch.equal(mine, alone)
    assert begun == [(0, 2), (1, 2), (2, 2)]
    alone = data.reader(loaded(folder, workers=7), 8)
    for step in range(3):
        alone.at(5, step)
    assert begun[3:] == [(5, 7)]


def test_the_command_line_chooses_the_workers(folder, monkeypatch, capsys):
    given = {}

    def look(config, **options):
        given.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(train, "load_data", look)
    assert cli.main(["train", "--data", str(folder), "--workers", "3"]) == 2
    assert given == {"workers": 3} and "seen" in capsys.readouterr().err
    assert cli.main(["train", "--data", str(folder), "--workers", "-1"]) == 2
    error = capsys.readouterr().err
    assert "--workers" in error and "needs an integer >= 0" in error and error.count("\n") == 1


PROGRAM = """
import sys, torch
from kart import augment, data

if __name__ == "__main__":
    folder, workers, start, stop = sys.argv[1], *map(int, sys.argv[2:])
    split = data.load(folder, image_size=24, stream=True, workers=workers)
    read = data.reader(split, 8, data.Cut(augment.random_box, 12))
    for step in range(start, stop):
        images, labels = read.at(5, step)
        digest = int((images.long() * torch.arange(images.numel()).reshape(images.shape)).sum())
        print(step, digest, labels.tolist(), flush=True)
"""


@pytest.mark.parametrize("last", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_a_killed_reader_goes_on_with_the_same_batches(folder, tmp_path, last):
    """Killed with SIGKILL at a step, then resumed with another number of workers."""
    script = tmp_path / "read.py"
    script.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def begin(workers: int, start: int, stop: int) -> subprocess.Popen:
        command = [sys.executable, str(script), str(folder), str(workers), str(start), str(stop)]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    whole = begin(0, 0, 12).communicate()[0].splitlines()
    assert len(whole) == 12
    first = begin(2, 0, 10**6)
    assert first.stdout is not None
    lines = [first.stdout.readline().strip() for _ in range(last)]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    rest = begin(1, last, 12).communicate()[0].splitlines()
    assert lines + rest == whole
    # the workers go with the process that has begun them
    for _ in range(100):
        try:
            os.killpg(first.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        os.killpg(first.pid, signal.SIGKILL)
        pytest.fail("workers outlive a killed reader")


def test_a_folder_in_imagenets_layout_trains_and_evaluates(folder):
    config = train.Config(
        data=str(folder),
        decode_size=SIDE,
        stream=True,
        augment="paper",
        batch_size=8,
        epochs=2,
        warmup_epochs=1.0,
        image_size=16,
        embed_dim=16,
        depth=1,
        num_heads=1,
        operator="G1B",
        eval_crop=0.9,
    )
    records = list(train.fit(config, train.load_data(config, workers=0)))
    again = list(train.fit(config, train.load_data(config, workers=1)))
    assert [one["train_loss"] for one in records] == [one["train_loss"] for one in again]
    assert 0 <= records[-1]["val_top1"] <= 1 and records[-1]["diverged"] == -1


def test_a_run_on_images_that_stream_is_taken_apart(folder, tmp_path):
    tiny = ["--image-size", "16", "--embed-dim", "8", "--depth", "1", "--num-heads", "1"]
    tiny += ["--batch-size", "8", "--epochs", "1", "--threads", "1", "--quiet"]
    data_flags = ["--data", str(folder), "--decode-size", str(SIDE), "--stream", "yes"]
    out = str(tmp_path / "run")
    assert cli.main(["train", *data_flags, *tiny, "--workers", "0", "--out", out]) == 0
    assert cli.main(["analyse", out, "--sections", "attention", "--images", "1"]) == 0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    config = train.Config(data=str(folder), decode_size=SIDE)
    one, other = (train.load_data(config, stream=stream) for stream in (True, False))
    assert section.fingerprint(one) == section.fingerprint(other)


def test_the_measurement_of_the_loader(capsys):
    loader.main(["--images", "40", "--size", "16", "--model", "vit_nano"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("streamed", "cached", "vit_nano", "cores to stream"))
