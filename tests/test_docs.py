"""The guides are found and the docs build; the version is that of the installation."""

import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kart
from kart import guides


def test_every_guide_is_listed():
    names = [info.name for info in pkgutil.iter_modules(guides.__path__)]
    assert len(names) == 4
    for name in names:
        assert f"`kart.guides.{name}`" in (guides.__doc__ or "")


def test_version(monkeypatch):
    assert kart.__version__ == importlib.metadata.version("kart-attention")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert kart.__version__ == "0+unknown"


@pytest.mark.slow
def test_docs_build(tmp_path):
    rooms = ["kart", "!kart.kernels.triton.device", "!kart.kernels.triton.device_units"]
    looks = str(Path(__file__).parents[1] / "kart" / "guides")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-t", looks, *rooms]
    command += ["-o", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for page in ("bases", "operators", "guides/put_it_into_your_model"):
        text = (tmp_path / "kart" / f"{page}.html").read_text()
        assert "docstring" in text and "main.pdoc img" in text
    # the README, its pictures inside
    assert "data:image/png" in (tmp_path / "kart" / "guides.html").read_text()
