"""The main job in its quick setting: same digits on every run, a page, one-line errors."""

import dataclasses
import queue
import re

import pytest
import torch

from kart import population, tree
from studies import demo

QUICK = ["--quick", "--quiet", "--seeds", "0", "1", "--processes", "1"]


def table(text):
    """The printed text without the column of times, the last one of the table."""
    head, rest = text.split("\n\n", 1)
    rows = [re.sub(r"\s+\S+( ms)?$", "", line) for line in head.splitlines()]
    return rows, rest.split("\nreport:")[0]


def test_two_runs_print_the_same_but_for_times(capsys, tmp_path):
    shown = []
    for name in ("a.html", "b.html"):
        assert demo.main([*QUICK, "--out", str(tmp_path / name)]) == 0
        shown.append(capsys.readouterr().out)
    assert table(shown[0]) == table(shown[1])
    rows, notes = table(shown[0])
    assert [row.split()[0] for row in rows[2:]] == ["softmax", "G3B", "G3U"]
    assert "102,218" in rows[2] and "107,930" in rows[3] and "105,074" in rows[4]
    assert all("±" in row for row in rows[2:])
    assert "360 test images" in notes and "G3U is" in notes
    pages = [(tmp_path / name).read_text() for name in ("a.html", "b.html")]
    steps = re.compile(r"<td>[\d.]+</td></tr>")  # the last column of the first table
    assert len(pages[0]) > 50_000 and "http" not in pages[0]
    one, two = (steps.sub("", page.replace("b.html", "a.html")) for page in pages)
    assert one == two
    for row in rows[2:]:
        assert re.search(r"[\d.]+ ± [\d.]+", row)[0] in pages[0]


def test_a_worker_sends_a_message_a_step_and_then_the_result(monkeypatch):
    monkeypatch.setattr(demo.signal, "signal", lambda *args: None)
    config = dataclasses.replace(demo.RECIPE, operator="G3U", epochs=1, train_limit=64)
    messages = queue.Queue()
    demo._work(1, population.seeds(config, [0, 1]), messages)
    assert [messages.get() for _ in range(2)] == [(1, None)] * 2
    number, found = messages.get()
    assert number == 1 and found.name == "G3U" and len(found.test) == 2
    direct = demo.result_of(population.seeds(config, [0, 1]), lambda: None)
    for sent, own in zip(found.params, direct.params, strict=True):
        assert all(
            torch.equal(torch.from_numpy(a), b)
            for a, b in zip(tree.leaves(sent), tree.leaves(own), strict=True)
        )
    assert found.test == direct.test
    bad = population.seeds(dataclasses.replace(config, operator="G3X"), [0])
    with pytest.raises(ValueError):
        demo._work(0, bad, messages)
    assert messages.get()[1].startswith("G3X: ")


@pytest.mark.slow
def test_processes_change_nothing(capsys, tmp_path):
    shown = []
    for processes in ("1", "3"):
        argv = [*QUICK, "--processes", processes, "--out", str(tmp_path / "r.html")]
        assert demo.main(argv) == 0
        shown.append(table(capsys.readouterr().out))
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "no/such/folder/r.html"], "directory that exists"),
        (["--out", "."], "directory that exists"),
        (["--epochs", "0"], "`epochs`"),
        (["--quick", "--epochs", "3"], "`--epochs` has no effect with `--quick`"),
        (["--seeds", "1", "1"], "different seeds"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, words):
    assert demo.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: error: ") and words in error and error.count("\n") == 1
