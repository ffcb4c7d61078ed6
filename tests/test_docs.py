"""The guides are found and the docs build; the version is that of the installation."""

import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kart
from kart import guides


def test_every_guide_is_listed():
    names = [info.name for info in pkgutil.iter_modules(guides.__path__)]
    assert len(names) == 6
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
    rooms = ["kart", *(f"!kart.kernels.triton.device{x}" for x in ("", "_entries", "_units"))]
    looks = str(Path(__file__).parents[1] / "kart" / "guides")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-t", looks, *rooms]
    command += ["-o", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for page in ("bases", "operators", "guides/put_it_into_your_model"):
        text = (tmp_path / "kart" / f"{page}.html").read_text()
        assert "docstring" in text and "main.pdoc img" in text
    # the texts of the repository, their pictures inside and their links between their pages
    for page in ("guides", "guides/what_the_studies_found", "guides/what_it_costs"):
        file = tmp_path / "kart" / f"{page}.html"
        assert "data:image/png" in file.read_text()
        for link, anchor in re.findall(r'href="((?!http|\$)[^"#]*)#?([^"]*)"', file.read_text()):
            there = (file.parent / link).resolve() if link else file
            assert there.exists(), link
            assert not anchor or f'id="{anchor}"' in there.read_text(), (link, anchor)
