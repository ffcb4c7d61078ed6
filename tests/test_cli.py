"""The `kart` command, called in process: flags, tables, exit states, one-line errors."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import kart
from kart import cli, runs, tables, train
from kart.commands import config
from kart.train import Config
from tests.tiny import over

TINY = [
    *("--epochs", "1", "--batch-size", "64", "--train-limit", "128", "--embed-dim", "8"),
    *("--depth", "1", "--num-heads", "2", "--patch-size", "4"),
    *("--threads", "1", "--quiet"),
]


def run(capsys, *argv):
    code = cli.main([str(arg) for arg in argv])
    return code, *capsys.readouterr()


def test_every_field_of_a_config_is_a_flag_with_a_help_text():
    flags = {name for group in config.FLAGS.values() for name in group}
    elsewhere = {"operator", "seed"}  # --operator and --seeds take several values
    assert flags | elsewhere == {field.name for field in dataclasses.fields(Config)}
    text = cli.parser().format_help()
    assert "train" in text and "eval" in text


def test_defaults_of_the_flags_are_those_of_the_config():
    args = cli.parser().parse_args(["train"])
    assert config.config_of(args, operator="softmax") == Config()


def test_train_then_eval(capsys, tmp_path):
    out = tmp_path / "runs"
    argv = ["train", "--operator", "softmax", "G2B", "--seeds", 0, 1, "--group", 2, "--out", out]
    code, text, _ = run(capsys, *argv, *TINY)
    assert code == 0
    assert "operator" in text and "G2B" in text and "kart eval" in text
    for name in ("softmax", "G2B"):
        files = {path.name for path in (out / name / "group-0").iterdir()} - {".lock"}
        assert files == {"config.json", "metrics.jsonl", "last.safetensors", "best.safetensors"}
    again = run(capsys, *argv, *TINY)
    assert again[0] == 0 and again[1] == text  # finished runs are read, not trained again

    code, text, _ = run(capsys, "eval", out)
    assert code == 0 and "test top-1 %" in text and text.count("±") == 6
    report = json.loads((out / "G2B" / "group-0" / "eval-test-last.json").read_text())
    assert report["images"] == 360 and [one["seed"] for one in report["members"]] == [0, 1]


def test_every_table_has_softmax_first_and_the_rest_as_they_were_named(capsys, tmp_path):
    out, names = tmp_path / "runs", ["G1B", "softmax", "polynomial-0B"]
    code, trained, _ = run(capsys, "train", "--operator", *names, *TINY, "--out", out)
    assert code == 0
    code, scored, _ = run(capsys, "eval", out)
    assert code == 0
    for text in (trained, scored):
        shown = [line.split()[0] for line in text.splitlines() if line.startswith(tuple(names))]
        assert shown[:3] == ["softmax", "G1B", "polynomial-0B"]
    homes = [str(out / name) for name in ("polynomial-0B", "G1B", "softmax")]
    assert [one.name for one in runs.compare(*homes)] == ["softmax", "polynomial-0B", "G1B"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_the_terminal_cannot_show_ends_no_command(encoding, tmp_path, monkeypatch):
    for name in (b"c\xe9", b"d"):
        home = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "set"), name)))
        home.mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), i).save(home / f"{i}.png")
    shown = tmp_path / "shown.txt"
    with shown.open("w", encoding=encoding) as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["kart", "data", str(tmp_path / "set")])
        assert cli.main() == 0
        sys.stdout.flush()
    assert b"c\\udce9" in shown.read_bytes()


@pytest.mark.parametrize("argv", ["-u -m kart info --paper", "-m studies.paper --list"])
def test_a_reader_that_left_ends_no_command(argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *argv.split()]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ended.returncode == 0 and ended.stderr == b""


def test_an_operator_for_each_block(capsys, tmp_path):
    out = tmp_path / "runs"
    assert Config(operator="softmax|...|G2B", depth=2).operator == ("softmax", "G2B")
    argv = ["train", "--operator", "softmax|...|G2B", "softmax", "--out", out]
    code, text, _ = run(capsys, *argv, *over(TINY, "--depth", 3))
    assert code == 0 and "softmax|softmax|G2B" in text
    found = json.loads((out / "softmax-softmax-G2B" / "config.json").read_text())
    assert found["config"]["operator"] == ["softmax", "softmax", "G2B"]
    code, text, _ = run(capsys, "eval", out)
    assert code == 0 and "softmax|softmax|G2B" in text
    code, text, _ = run(capsys, "info", "--operator", "softmax|...|G3B", "--model", "swin_tiny")
    assert code == 0 and "swin_tiny, softmax|...|G3B" in text


def test_a_recipe_stands_below_what_is_given_and_both_are_recorded(capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["--recipe", "small", "--image-size", 8, "--warmup-epochs", 0.5, "--no-ema-warmup"]
    code, text, _ = run(capsys, "train", *flags, *TINY, "--out", out)
    assert code == 0 and "recipe small, but" in text and "epochs 1" in text
    found = json.loads((out / "config.json").read_text())
    assert found["config"]["recipe"] == "small" and found["config"]["augment"] == "small"
    assert found["config"]["ema"] == 0.9995 and found["config"]["ema_warmup"] is False
    assert found["overridden"]["epochs"] == 1 and "augment" not in found["overridden"]
    assert run(capsys, "train", *flags, *TINY, "--out", out)[0] == 0  # goes on as the same run
    code, _, error = run(capsys, "train", "--recipe", "smal", "--out", tmp_path / "other")
    assert code == 2 and "Near: small" in error and not (tmp_path / "other").exists()


def test_a_run_begins_with_another_and_keeps_what_is_frozen(capsys, tmp_path):
    donor, out = tmp_path / "donor", tmp_path / "tuned"
    assert run(capsys, "train", *TINY, "--out", donor)[0] == 0
    more = ["--from", donor, "--freeze", "blocks.0.attn,patch_embed", "--accumulate", 2]
    more += ["--recompute", "--operator", "G2B:base=softmax"]
    code, text, _ = run(capsys, "train", *TINY, *more, "--out", out)
    assert code == 0 and f"began with {donor}" in text and "drawn: blocks.0.operator" in text
    (before,), (after,) = runs.load_weights(donor), runs.load_weights(out)
    kept = [after["blocks"]["0"]["attn"]["qkv"]["weight"], after["patch_embed"]["proj"]["bias"]]
    was = [before["blocks"]["0"]["attn"]["qkv"]["weight"], before["patch_embed"]["proj"]["bias"]]
    assert all((a == b).all() for a, b in zip(kept, was, strict=True))
    assert (after["head"]["weight"] != before["head"]["weight"]).any()
    assert run(capsys, "eval", out)[0] == 0


def test_what_one_of_several_runs_lacks_is_told_before_the_first_is_trained(capsys, tmp_path):
    donor, out = tmp_path / "donor", tmp_path / "run"
    flags = ["train", *TINY, "--rank", 2]
    assert run(capsys, *flags, "--operator", "G2B", "--seeds", 0, 1, "--out", donor)[0] == 0
    for more, words in [
        (["G2B:scales=true", "G2B", "--freeze", "*.scale_basis"], "matches none of"),
        (["G2B", "--seeds", 0, 1, 2, "--group", 1, "--from", donor], "one of [0, 1]"),
        (["G2B", "G1B", "--attention-from", donor], "its parameters mean something else"),
        (["G2B", "softmax", "--from", donor], "unexpected blocks.0.operator"),
    ]:
        code, _, error = run(capsys, *flags, "--out", out, "--operator", *more)
        assert code == 2 and words in error and not out.exists()
    # what was begun goes on without its donor
    argv = [*flags, "--operator", "G2B", "--from", donor, "--out", out]
    assert run(capsys, *argv)[0] == 0
    shutil.rmtree(donor)
    assert run(capsys, *argv)[0] == 0


def test_analyse_writes_a_page_with_the_scores_that_there_are(capsys, tmp_path):
    out = tmp_path / "runs"
    argv = ["train", "--operator", "softmax", "G2B", "--rank", 3, "--seeds", 0, 1, "--out", out]
    assert run(capsys, *argv, *TINY, "--group", 1)[0] == 0
    code, text, _ = run(capsys, "analyse", out)
    assert code == 0 and "val top-1 %" in text and "G2B is" in text
    page = (out / "report.html").read_text()
    assert page.count("<svg") > 3 and "G2B, seed 1" in page
    assert run(capsys, "eval", out)[0] == 0
    path = tmp_path / "page.html"
    code, text, _ = run(capsys, "analyse", out / "G2B", "--out", path, "--title", "Two seeds")
    assert code == 0 and "test top-1 %" in text and "softmax" not in text
    assert "<h1>Two seeds</h1>" in path.read_text()


def test_analyse_shares_several_runs_among_processes(capsys, tmp_path):
    homes = [tmp_path / name for name in ("softmax", "G2B")]
    for home in homes:
        argv = ["train", "--operator", home.name, "--out", home, "--trajectory", 3]
        assert run(capsys, *argv, *TINY)[0] == 0
    argv = ["analyse", *homes, "--sections", "spectra,weights,landscape", "--examples", 16]
    code, text, _ = run(capsys, *argv, "--points", 11, "--processes", 2)
    assert code == 0 and "is not shown" not in text
    found = json.loads((homes[0] / "report.json").read_text())["sections"]
    operators = {one["operator"] for one in found["landscape"]["numbers"]}
    assert operators == {"softmax", "G2B"}
    assert all(list((home / "analysis").glob("landscape-*")) for home in homes)
    code, _, error = run(capsys, *argv, "--points", 12)
    assert code == 2 and "`--points` needs 11, 21" in error
    code, _, error = run(capsys, "analyse", *homes, "--sections", "")
    assert code == 2 and "needs names among scores, training" in error


def test_analyse_refuses_what_cannot_be_compared(capsys, tmp_path):
    out = tmp_path / "runs"
    assert run(capsys, "train", "--out", out / "a", *TINY)[0] == 0
    assert run(capsys, "train", "--weight-decay", 0.1, "--out", out / "b", *TINY)[0] == 0
    code, _, error = run(capsys, "analyse", out)
    assert code == 2 and "differ in operator and seed" in error and error.count("\n") == 1
    assert "which differ in weight_decay. Analyse" in error
    (out / "a" / "metrics.jsonl").write_text("")
    code, _, error = run(capsys, "analyse", out / "a")
    assert code == 2 and "after epoch 0 of 1" in error
    code, _, error = run(capsys, "analyse", tmp_path / "nothing")
    assert code == 2 and "config.json" in error


def test_a_seed_that_diverged_is_named_and_in_no_mean(capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TINY, "--seeds", 0, 1, 2, "--group", 3, "--out", out]
    assert run(capsys, *argv)[0] == 0
    log = out / "group-0" / "metrics.jsonl"
    record = json.loads(log.read_text())
    record["diverged"][1], record["val_loss"][1], record["val_top1"][1] = 5, math.nan, 1.0
    log.write_text(json.dumps(record) + "\n")
    mean = tables.spread([record["val_top1"][0], record["val_top1"][2]])
    line = "softmax, seed 1, diverged at step 5 and is left out of the means."
    code, text, _ = run(capsys, *argv)
    assert code == 0 and mean in text and line in text and "nan" not in text
    for command in (["analyse", out, "--sections", "scores,training"], ["eval", out]):
        code, text, _ = run(capsys, *command)
        assert code == 0 and line in text and text.splitlines()[2].endswith(" 2")
    assert "seed 1, diverged" in (out / "report.html").read_text()


def test_runs_that_are_no_seeds_of_one_another_have_means_of_their_own(capsys, tmp_path):
    for name, rate in (("a", "0.001"), ("b", "0.0002")):
        argv = ["train", *TINY, "--learning-rate", rate, "--out", tmp_path / name]
        assert run(capsys, *argv)[0] == 0
    argv = ["train", *TINY, "--seeds", 1, "--out", tmp_path / "c"]
    assert run(capsys, *argv)[0] == 0
    code, text, _ = run(capsys, "eval", tmp_path)
    rows = text.splitlines()[2:]
    assert code == 0 and len(rows) == 2
    assert rows[0].startswith("softmax, learning_rate 0.001") and rows[0].endswith(" 2")
    assert rows[1].startswith("softmax, learning_rate 0.0002") and rows[1].endswith(" 1")


def test_the_best_weights_have_the_scores_of_their_own_epoch(capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *over(TINY, "--epochs", 3), "--learning-rate", 1, "--warmup-epochs", 0]
    assert run(capsys, *argv, "--out", out)[0] == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    top1 = [json.loads(line)["val_top1"] for line in lines]
    assert max(top1) != top1[-1]
    for which, value in (("best", max(top1)), ("last", top1[-1])):
        argv = ["analyse", out, "--sections", "scores", "--checkpoint", which]
        code, text, _ = run(capsys, *argv)
        assert code == 0 and text.splitlines()[2].split()[1] == f"{100 * value:.2f}"
        assert run(capsys, "eval", out, "--checkpoint", which)[0] == 0
        assert run(capsys, *argv)[0] == 0
        told = "which validation chose" in (out / "report.html").read_text()
        assert told == (which == "best")


def test_seeds_one_by_one_go_into_directories_of_their_own(capsys, tmp_path):
    argv = ["train", "--seeds", 0, 1, "--group", 1, "--out", tmp_path / "run", *TINY]
    assert run(capsys, *argv)[0] == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["group-0", "group-1"]
    code, text, _ = run(capsys, "eval", tmp_path / "run", "--split", "val")
    assert code == 0 and text.splitlines()[-1].endswith("2")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--operator", "G3X"], "Near matches"),
        (["train", "--operator", "G3B", "G3B"], "different operators"),
        (["train", "--operator", "softmax|G3B"], "names 2 blocks, and the model has 4"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--rank", "0", "--operator", "G3B"], "`rank` >= 1"),
        (["train", "--rank", "3", "--operator", "softmax"], "'rank' has no effect on softmax"),
        (["train", "--base", "Softmax", "--operator", "G3B"], "Near matches: softmax"),
        (["train", "--batch-size", "5000"], "training images"),
        (["train", "--end-learning-rate", "1"], "at most the peak"),
        (["train", "--warmup-epochs", "50"], "<= epochs, 40"),
        (["train", "--accumulate", "7"], "to divide the batch"),
        (["train", "--out", ""], "needs a name"),
        (["bench", "--out", "no/where.json"], "a directory that exists"),
        *(
            (["analyse", "run", "--sections", names, flag, "64"], f"`{flag}` has no effect")
            for names, flag in (
                ("scores,attention", "--examples"),
                ("landscape", "--images"),
                ("curvature", "--points"),
                ("spectra", "--retrain"),
                ("attention", "--memory-mib"),
                ("scores,training", "--minutes"),
                ("cost", "--processes"),
            )
        ),
        (["analyse", "run", "--out", "no/where.html"], "a directory that exists"),
        (["train", "--seeds", "9" * 30], "an integer <= "),
        (["train", "--from", "nowhere"], "not there"),
        (["train", "--freeze", "bloks"], "matches none of"),
        (["train", "--recompute", "--step", "compiled"], "with `recompute`"),
        (["train", "--step", "graph"], "`step` not \"graph\" on device 'cpu'"),
        (["train", "--recompute", "--model", "swin_tiny"], "'recompute'"),
        (["train", "--depth", "3", "--model", "swin_nano"], "has one, got 'depth', 3. Leave it"),
        (["train", "--num-heads", "3", "--model", "swin_nano"], "has one, got 'num_heads', 3"),
        (["train", "--depth", "2", "--model", "convit_nano"], "`depth` > 3 for 'convit_nano'"),
        (["info", "--depth", "3", "--model", "swin_tiny"], "has one, got 'depth', 3. Leave it"),
        (["info", "--depth", "2", "--model", "convit_nano"], "`depth` > 3 for 'convit_nano'"),
        (["train", "--depth", "3", "--model", "convit_tiny"], "`depth` > 10 for 'convit_tiny'"),
        (["info", "--depth", "10", "--model", "convit_tiny"], "`depth` > 10 for 'convit_tiny'"),
        (["train", "--seeds", "1", "1"], "different seeds"),
        (["train", "--seeds", "0", "--seeds", "1"], "`--seeds` is there 2 times"),
        (["train", "--seeds=0", "--seeds=1"], "`--seeds` is there 2 times"),
        (["train", "--freeze", "blocks", "--freeze=head"], "`--freeze` is there 2 times"),
        (["analyse", "run", *("--sections", "cost") * 2], "`--sections` is there 2 times"),
        (["train", "--operator", "G3B", "--operator", "softmax"], "`--operator` is there 2 times"),
        (["train", "--epochs", "1", "--epochs=2"], "`--epochs` is there 2 times: give it once"),
        (["train", "--recompute", "--no-recompute"], "`--recompute` and `--no-recompute` are both"),
        (["train", "--operator", "G3B", "fourier-3B:rank=12"], "different operators, got ['G3B',"),
        (["train", "--operator", "G3", "softmax", "G3B"], "different operators, got ['G3', 'soft"),
        (["train", "--no-ema-warmup"], "no effect without `--ema`"),
        (["train", "--sharing", "universal"], "no effect without an operator that learns"),
        (["train", "--workers", "2"], "no effect on 'digits'"),
        (
            ["train", "--start-learning-rate", "0", "--warmup-epochs", "0"],
            "`--start-learning-rate` has no effect without a warm-up",
        ),
        (["train", "--warmup-epochs", "0.01"], "where 0.01 epochs"),
        (
            ["train", "--train-limit", "32", "--epochs", "1", "--start-learning-rate", "0"],
            "no effect in a run of 1 steps",
        ),
        (
            ["train", "--train-limit", "64", "--epochs", "1", "--end-learning-rate", "0"],
            "the last of them at the peak",
        ),
        (["train", "--eval-crop", "0.9"], "stay so over 0.9. Give 0.88 or less"),
        (["info", "--sharing", "universal"], "no effect without an operator that learns"),
        (["train", "--augment", "flipp"], "flip"),
        (["train", "--model", "vit_tin"], "vit_tiny"),
        (["eval", "nowhere"], "config.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path, argv, words):
    extra = ["--quiet", "--out", tmp_path / "run"] if argv[0] == "train" else []
    code, _, error = run(capsys, *argv, *extra)
    assert code == 2
    assert len(error.strip().splitlines()) == 1 and error.startswith("kart: error: ")
    assert words in error


def test_the_version_is_told_and_is_the_one_to_cite(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kart {kart.__version__}\n"
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"version = {{{kart.__version__}}}" in readme


def test_argparse_mistakes_are_status_2_as_well(capsys):
    for argv in (["train", "--epochs", "many"], ["dance"], [], ["train", "--epoch", "2"]):
        code, _, error = run(capsys, *argv)
        assert code == 2 and error.startswith("kart: error: ") and error.count("\n") == 1


def test_another_configuration_in_the_directory_is_refused(capsys, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert run(capsys, "train", *TINY, *out)[0] == 0
    code, _, error = run(capsys, "train", *over(TINY, "--epochs", 2), *out)
    assert code == 2 and "epochs: 1 there, 2 asked" in error


def test_an_operator_that_does_not_fit_the_model_stops_before_any_is_trained(capsys, tmp_path):
    out = tmp_path / "runs"
    named = ["--operator", "softmax", "performer:width=31"]
    code, _, error = run(capsys, "train", *TINY, *named, "--out", out)
    assert code == 2 and "made for heads of 31 numbers" in error and not out.exists()


def test_a_damaged_checkpoint_is_one_line(capsys, tmp_path):
    out = tmp_path / "run"
    assert run(capsys, "train", *TINY, "--out", out)[0] == 0
    path = out / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, error = run(capsys, "eval", out)
    assert code == 2 and "truncated" in error and len(error.strip().splitlines()) == 1


def test_divergence_is_status_1_and_says_where(capsys, tmp_path):
    flags = ["--learning-rate", "1e30", "--max-norm", "1e30", "--weight-decay", "1e20"]
    flags += ["--warmup-epochs", "0", *over(TINY, "--epochs", 3)]
    code, _, error = run(capsys, "train", *flags, "--out", tmp_path / "run")
    assert code == 1 and "training stopped at step" in error


def test_heads_and_blocks_of_the_same_operators_have_homes_of_their_own(tmp_path):
    specs = ["softmax", "softmax+G1B", ("softmax", "G1B")]
    configs = [Config(operator=spec, depth=2) for spec in specs]
    homes = runs.homes(configs, tmp_path)
    assert len(set(homes)) == 3 and homes == runs.homes(configs, tmp_path)
    assert homes[0] == tmp_path / "softmax"
    assert [home.name[:12] for home in homes[1:]] == ["softmax-G1B-"] * 2


def test_a_page_replaces_nothing_but_an_earlier_page(capsys, tmp_path):
    home = tmp_path / "run"
    assert run(capsys, "train", *TINY, "--out", home)[0] == 0
    argv = ["analyse", home, "--sections", "scores"]
    (tmp_path / "table.csv").write_text("of somebody\n")
    before = {path: path.read_bytes() for path in (home / "config.json", tmp_path / "table.csv")}
    for out, words in (
        (home / "config.html", "config.json' of something else"),
        (tmp_path / "table.html", "table.csv' of something else"),
        (tmp_path / "page.json", "ends in .html"),
        (tmp_path / "page", "ends in .html"),
    ):
        code, _, error = run(capsys, *argv, "--out", out)
        assert code == 2 and words in error and not out.exists()
    assert before == {path: path.read_bytes() for path in before}
    for _ in range(2):
        assert run(capsys, *argv, "--out", tmp_path / "page.html")[0] == 0
        for beside in ("page.json", "page.csv"):  # a page alone is replaced, as it is named
            (tmp_path / beside).unlink()


def test_tables_and_spreads():
    assert tables.spread([0.5]) == "50.00"
    assert tables.spread([0.5, 0.7]) == "60.00 ± 14.14"
    assert tables.spread([0.5, math.nan]) == "nan ± nan"
    text = tables.table([["a", "1"], ["long", "23"]], ["name", "n"])
    assert text.splitlines() == ["name   n", "----  --", "a      1", "long  23"]
    assert runs.slug("G3B:rank=24,base=softmax") == "G3B-rank-24-base-softmax"


def test_names_that_do_not_print_stay_in_their_row():
    text = tables.table([["a\nb\x1b[31m", "1"], ["\u00e9", "2"]], ["name", "n"])
    assert text.splitlines()[2:] == ["a\\nb\\x1b[31m  1", "\u00e9             2"]


def test_interrupting_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "loop", stop)
    code, _, error = run(capsys, "train", *TINY, "--out", tmp_path / "run")
    assert code == 130 and "same command" in error
