"""The README's Python runs as it stands; commands and links printed anywhere lead somewhere."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kart import cli

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "studies").glob("*.md"))]
README, *_ = WRITTEN = [file.read_text() for file in TEXTS]


def test_the_functional_example_runs_as_it_stands(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) == 15
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code[1]]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "functions.png").stat().st_size > 1000


def test_every_command_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(WRITTEN)):
        assert target in targets, target
    for module in re.findall(r"python -m (studies\.[a-z_]+)", "\n".join(WRITTEN)):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def _commands(pattern: str) -> Iterator[tuple[str, list[str]]]:
    """Lines of the texts and of every docstring that are a command, comments cut off."""
    files = [*TEXTS, *(ROOT / "kart").rglob("*.py"), *(ROOT / "studies").glob("*.py")]
    for file in files:
        # in a docstring the backslash that continues a line is written twice, if it is not raw
        text = re.sub(r"\\+\n\s*", "", file.read_text())
        for line in re.findall(rf"^(?:    )?(?:torchrun .*-m )?({pattern}.*)$", text, re.M):
            yield file.name, shlex.split(line, comments=True)


KART = list(_commands("kart (?:data|train|eval|analyse|predict|export|study|test|bench|info) "))
STUDIES = list(_commands(r"python -m studies\.\w+"))


def test_commands_are_found():
    assert len(KART) > 35 and len(STUDIES) > 15
    assert {"README.md", "bench.py", "resolution.py"} <= {name for name, _ in KART}


@pytest.mark.parametrize(("file", "words"), KART)
def test_printed_commands_are_accepted(file, words):
    args, rest = cli.parser().parse_known_args(words[1:])
    assert not rest and callable(args.call)


@pytest.mark.parametrize(("file", "words"), STUDIES)
def test_printed_studies_are_accepted(file, words):
    main = importlib.import_module(words[2]).main
    flags = [word for word in words[3:] if word.startswith("--")]
    if not flags:
        return
    shown = io.StringIO()
    verbs = [word for word in words[3:4] if not word.startswith("-")]
    # a verb has its own flags; what is no verb (a row, a run) is ignored beside --help
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main([*verbs, "--help"])
    assert end.value.code == 0
    # flags that it hands on
    passed_on = re.search(r"further flags go to `kart ([a-z ]+)`", shown.getvalue())
    if passed_on:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            cli.main([*passed_on[1].split(), "--help"])
    for flag in flags:
        assert re.search(rf"{flag}\b", shown.getvalue()), f"{file}: {flag}"


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:kart|studies|tests)/[\w/.]+)`", "\n".join(WRITTEN)):
        assert (ROOT / name).exists(), name


def _anchor(title: str) -> str:
    """What a heading can be linked by."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_links_lead_to_files_and_headings_that_exist():
    found = 0
    for file, text in zip(TEXTS, WRITTEN, strict=True):
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            there = (file.parent / link).resolve() if link else file
            assert there.exists(), f"{file.name}: {link}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
                assert anchor in map(_anchor, titles), f"{file.name}: {link}#{anchor}"
            found += 1
    assert found > 30
