"""The cache of decoded images: under damage, races, kills, full disks and other users."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pictures import entries, numbers, picture, same, save_folder, save_table

from kart import data
from kart.data import cache as entries_module
from kart.data import images, loading

pytestmark = pytest.mark.usefixtures("own_cache")


def test_cache_is_used_and_follows_the_source(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    first = data.load(root)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)
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
    with pytest.raises(ValueError, match="16-bit images, got .*000.png.* Replace or remove"):
        data.load(root)
    assert entries(tmp_path / "cache") == before


def test_what_killed_processes_left_is_removed_by_the_next_start(tmp_path):
    root = save_folder(tmp_path / "pictures", 10)
    data.load(root)
    [name] = entries(tmp_path / "cache")
    # killed in the middle of decoding, by a signal that no one can catch
    code = (
        "import os, signal, sys; from kart import data; from kart.data import cache;"
        "cache.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "data.load(sys.argv[1], cache=sys.argv[2], image_size=4)"
    )
    command = [sys.executable, "-c", code, str(root), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert len(entries(tmp_path / "cache")) == 2
    # one that is being decoded now stays, and so does what is not kart's
    (tmp_path / "cache" / ".mine").mkdir()
    with cache_of(tmp_path / "cache") as busy:
        data.load(root)
        assert entries(tmp_path / "cache") == sorted([".mine", busy, name])
    data.load(root)
    assert entries(tmp_path / "cache") == [".mine", name]


@contextlib.contextmanager
def cache_of(base):
    """A workshop that a living process holds."""
    work = base / ".pictures-fit-0123456789abcdef0123-living"
    work.mkdir()
    place = os.open(work, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_EX)
    yield work.name
    os.close(place)


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _rewrite(entry: Path, change) -> None:
    """Changes the manifest and signs it again: another schema, not a damage."""
    note = json.loads((entry / "manifest.json").read_text())
    change(note["content"])
    note["sha256"] = hashlib.sha256(
        json.dumps(note["content"], sort_keys=True).encode()
    ).hexdigest()
    (entry / "manifest.json").write_text(json.dumps(note))


DAMAGES = {
    "one bit of an image": lambda entry: _flip(entry / "train.images.npy"),
    "one bit of a header": lambda entry: _flip(entry / "train.images.npy", 20),
    "one bit of a label": lambda entry: _flip(entry / "train.labels.npy"),
    "images of zeros": lambda entry: (entry / "train.images.npy").write_bytes(
        bytes((entry / "train.images.npy").stat().st_size)
    ),
    "one bit of the manifest": lambda entry: (entry / "manifest.json").write_text(
        (entry / "manifest.json").read_text().replace('"bee"', '"bef"')
    ),
    "no classes": lambda entry: _rewrite(entry, lambda note: note.pop("classes")),
    "classes of numbers": lambda entry: _rewrite(entry, lambda note: note.update(classes=[1, 2])),
    "text as mean": lambda entry: _rewrite(entry, lambda note: note.update(mean="abc")),
    "two channels": lambda entry: _rewrite(entry, lambda note: note.update(shape=[2, 5, 6])),
    "a list": lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
    "fewer classes": lambda entry: _rewrite(entry, lambda note: note.update(classes=["ant"])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_change_in_the_cache_is_found_and_said_in_one_line(tmp_path, damage):
    root = save_folder(tmp_path / "pictures", 12)
    before = data.load(root)
    before = before._replace(images=np.array(before.images))
    [entry] = (tmp_path / "cache").glob("*-fit-*")
    DAMAGES[damage](entry)
    code = "import sys; from kart import data; print(data.load(sys.argv[1]).fingerprint)"
    command = [sys.executable, "-c", code, str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [before.fingerprint], run.stderr
    said = [line for line in run.stderr.splitlines() if "decoding train" not in line]
    assert len(said) == 1 and "is damaged; decoding again" in said[0]
    assert same(data.load(root), before)


def test_drawn_damage_changes_nothing(tmp_path):
    root = save_folder(tmp_path / "p" / "train", 12).parent
    save_folder(root / "test", 6, start=100)
    before = {split: data.load(root, split).fingerprint for split in data.SPLITS}
    draw = np.random.default_rng(0)
    for _ in range(25):
        files = sorted((tmp_path / "cache").glob("p-*/*"))
        path = files[draw.integers(len(files))]
        content = bytearray(path.read_bytes())
        start = int(draw.integers(len(content)))
        stop = start + int(draw.integers(1, 200))
        damage = draw.choice(["zero", "noise", "cut", "more", "twice"])
        if damage == "zero":
            content[start:stop] = bytes(len(content[start:stop]))
        elif damage == "noise":
            content[start:stop] = draw.bytes(len(content[start:stop]))
        elif damage == "cut":
            del content[start:]
        elif damage == "more":
            content += b"more"
        else:
            content[start:start] = content[start:stop]
        path.write_bytes(content)
        assert {split: data.load(root, split).fingerprint for split in data.SPLITS} == before
    assert len(entries(tmp_path / "cache")) == 2


def test_cache_is_private(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    before = os.umask(0)
    try:
        data.load(root)
    finally:
        os.umask(before)
    [entry] = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="no one else can write to, got .*open.* mode 777.*chmod"):
        data.load(root, cache=tmp_path / "open")
    # of another user
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match=r"(no one else can write to|no cache that user)"):
        data.load(root)


def test_a_long_name_of_long_letters_fits_a_file_name(tmp_path):
    root = save_folder(tmp_path / ("类" * 85), 12)  # 255 bytes, all that there may be
    assert len(data.load(root, cache=tmp_path / "cache").labels) > 0
    (entry,) = entries(tmp_path / "cache")
    assert entry.startswith("类" * 26 + "-fit-")


def test_the_key_has_the_path_and_every_file(tmp_path):
    first = save_folder(tmp_path / "a" / "set", 12)
    shutil.copytree(first, tmp_path / "b" / "set")
    for path in first.rglob("*.png"):
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        os.utime(tmp_path / "b" / "set" / path.relative_to(first), ns=times)
    data.load(first), data.load(tmp_path / "b" / "set")
    assert len(entries(tmp_path / "cache")) == 2
    # other pixels of the same size, with the old time
    path = first / "ant" / "000.png"
    was, content = path.stat(), bytearray(path.read_bytes())
    picture(0, mode="RGB").save(path, compress_level=1)
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    data.load(first)
    assert len(entries(tmp_path / "cache")) == 3
    # what is not read is no part of it
    (first / "notes.txt").write_text("hello")
    assert data.load(first).unused == (
        data.Unused("*.txt", 1, "neither an image nor a parquet file"),
    )
    assert len(entries(tmp_path / "cache")) == 3


def test_too_little_room_is_said_before_decoding(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 0 MiB in .*cache.* 0 MiB are free. Make room"):
        data.load(root)
    assert entries(tmp_path / "cache") == []


def test_a_process_that_comes_second_takes_the_first_ones_entry(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 10)
    fill, nested = loading.fill, []

    def slow_fill(*args):
        fill(*args)
        if not nested:
            nested.append(True)
            nested.append(data.load(root))  # another process builds the same entry meanwhile
            nested.append([path.stat().st_ino for path in (tmp_path / "cache").glob("p*/*")])

    monkeypatch.setattr(loading, "fill", slow_fill)
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
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
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
    with pytest.raises(ValueError, match="got '~nobody.* home directory. Make .*KART_CACHE"):
        data.load(root, cache="~nobody-of-this-name/kart")


@pytest.mark.parametrize("what", ["arrays", "the notes of a stream"])
def test_disk_that_fills_up(tmp_path, monkeypatch, what):
    root, streams = save_folder(tmp_path / "pictures", 10), what != "arrays"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(os, "replace") if streams else (entries_module, "write_array"), full)
    with pytest.raises(ValueError, match="ran out of room in .*cache.*: No space left.*KART_CACHE"):
        data.load(root, stream=streams or None, workers=0)
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_can_only_be_read_serves_what_it_holds(tmp_path, monkeypatch):
    root = save_folder(tmp_path / "pictures", 12)
    table = save_table(tmp_path / "table", count=12)
    for stream in (False, True):
        for source in (root, table):
            for split in data.SPLITS:
                data.load(source, split, stream=stream, workers=0)

    def read_only(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    for stream in (False, True):
        for source in (root, table):
            assert len(data.load(source, "val", stream=stream, workers=0).labels) == 3
            with pytest.raises(ValueError, match="writable `cache` directory, got .*Read-only"):
                data.load(source, "val", stream=stream, workers=0, image_size=4)
    other = save_table(tmp_path / "more", count=12, start=50)
    with pytest.raises(ValueError, match="writable `cache` directory, got .*Read-only"):
        data.load(other, stream=True, workers=0)
