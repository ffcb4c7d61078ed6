"""The cache of compiled engines: private, whole, and a right answer where it cannot be used."""

import os
import stat
import subprocess
import sys
import time

import pytest

from kart import kernels

pytestmark = pytest.mark.skipif(
    kernels.engines()["cpp"] != "ready", reason="the C++ engine does not run here"
)

PROGRAM = """
import sys, torch
from kart import bases, kernels
from kart.kernels import plain
basis = bases.polynomial(1)
torch.manual_seed(0)
c, q, k = torch.randn(2, 3, 4, 2), torch.randn(2, 5, 3), torch.randn(2, 4, 3)
y = kernels.contract(basis, c, q, k, engine=sys.argv[1] if len(sys.argv) > 1 else "auto")
torch.testing.assert_close(y, plain.contract(basis, c, q, k))
"""


def start(home, *arguments, umask=0o022, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        umask=umask,
        env={**os.environ, "KART_CACHE": str(home), **environment},
    )


def run(home, *arguments, **options):
    process = start(home, *arguments, **options)
    _, error = process.communicate()
    assert process.returncode == 0, error[-2000:]
    return error


def test_a_damaged_library_is_built_again_with_one_line(tmp_path):
    assert run(tmp_path, "cpp", umask=0) == ""
    (built,) = (tmp_path / "engines").iterdir()
    assert stat.S_IMODE(built.stat().st_mode) == 0o600
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    whole, made = built.read_bytes(), built.stat().st_mtime_ns
    assert run(tmp_path, "cpp") == "" and built.stat().st_mtime_ns == made
    middle = len(whole) // 2
    damages = [b"", whole[:1000], whole[:middle] + bytes(512) + whole[middle + 512 :]]
    # flipping one bit is enough to be seen, without a run of each
    from kart.kernels.cpp import build

    for damaged in [*damages, whole[:-1], whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]]:
        built.write_bytes(damaged)
        assert not build._intact(built)
    built.write_bytes(damages[-1])
    error = run(tmp_path, "cpp")
    assert error.count("\n") == 1 and "the file is damaged" in error
    assert build._intact(built)


def test_two_processes_at_once_and_what_a_killed_one_left(tmp_path):
    left = tmp_path / "engines" / "build-left"
    left.mkdir(parents=True)
    left.parent.chmod(0o700)
    (left / "half.so").write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(left, (hours_ago, hours_ago))
    young = left.parent / "build-young"
    young.mkdir()
    both = [start(tmp_path, "cpp") for _ in range(2)]
    for process in both:
        _, error = process.communicate()
        assert process.returncode == 0 and error == "", error
    assert not left.exists() and young.exists()
    assert len(list(left.parent.glob("*.so"))) == 1


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_directory_open_to_others_is_not_trusted(tmp_path, mode):
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines").chmod(mode)
    error = run(tmp_path, "cpp")
    assert error.count("\n") == 1 and "is not kept between processes" in error
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_directory_below_one_that_others_may_write_is_not_trusted(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    error = run(home, "cpp")
    assert "writable by others" in error
    home.chmod(0o1777)  # sticky, as /tmp
    assert run(home, "cpp") == ""


def test_a_home_that_cannot_be_written_still_gives_a_right_answer(tmp_path):
    file = tmp_path / "file"
    file.write_text("no directory")
    # nor may there be a home: a user of a container may have none
    for home in (file / "home", "~nobody-of-this-name/kart"):
        error = run(home, "cpp")
        assert error.count("\n") == 1 and "is not kept between processes" in error
    # nor can anything else be: torch runs
    error = run(file / "home", TMPDIR=str(file), CXX="no-such-compiler")
    assert "torch runs instead" in error


def test_a_link_in_place_of_the_directory_is_followed_and_its_target_asked(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere").chmod(0o777)
    (tmp_path / "engines").symlink_to(tmp_path / "elsewhere")
    error = run(tmp_path, "cpp")
    assert "is not kept between processes" in error
    assert list((tmp_path / "elsewhere").iterdir()) == []
