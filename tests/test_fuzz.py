"""Drawn command lines: each has an effect and status 0, or one line and status 2."""

import random
import shutil

import pytest

from kart import cli

TRAIN = {
    "--epochs": "1",
    "--batch-size": "8",
    "--embed-dim": "4",
    "--depth": "1",
    "--num-heads": "1",
    "--patch-size": "4",
    "--train-limit": "24",
    "--threads": "1",
}
STUDY = ["study", "run", "grid_rank_sharing", "--tiny", "--val-limit", "16", "--quiet"]
NONSENSE = [
    *("-1", "0", "1e400", "nan", "-inf", "", "foo", "\uff13", "9" * 30, "1_0", "None", "[]", "a=b"),
    *("..", "{}", "--", "0x10", "1e999", "Softmax", "18446744073709551615", "\u0000", "*", "'"),
]
SPECS = ["softmax", "G1B", "G2U:rank=2", "2*softmax", "G1B:rank=1,rank=2", "G3X", "dog-B", "relu"]
VALUES = {
    "--operator": SPECS,
    "--seeds": ["0", "1", str(2**64 - 1), "-1"],
    "--group": ["auto", "1", "0", "99", "foo"],
    "--rank": ["1", "2", "-1", "9" * 30],
    "--project": ["simplex", "foo"],
    "--base": ["softmax", "Softmax", "gelu"],
    "--sharing": ["blockwise", "universal", "both"],
    "--augment": ["none", "crop", "flipp"],
    "--model": ["vit_nano", "vit_tin"],
    "--image-size": ["8", "12", "7"],
    "--mlp-ratio": ["1", "0", "-2"],
    "--learning-rate": ["paper", "1e-3", "1e-9"],
    "--end-learning-rate": ["0", "1"],
    "--warmup-epochs": ["0", "1e308"],
    "--label-smoothing": ["0.1", "1"],
    "--ema": ["0.9", "1"],
    "--trajectory": ["0", "3", "1", "99"],
    "--precision": ["float32", "float16"],
    "--device": ["cpu", "cuda", "mps", "xpu", "cpu:7", "gpu"],
    "--batching": ["vmap", "none"],
    "--epochs": ["1", "999999999"],
    "--epoch": ["1"],
}
STUDY_VALUES = {
    "--set": ["epochs=1", "operator=foo", "epochs=x", "depht=1", "depth", "image_size=0"],
    "--fix": ["grid=3", "grd=3", "rank=99999", "rank=1", "sharing=both"],
    "--trials": ["2", "1"],
    "--seeds": ["1", "0"],
    "--sampler": ["random", "rnadom"],
    "--pruner": ["none", "asha", "x"],
    "--objectives": ["accuracy", "accuracy,accuracy", "speed"],
    "--levels": ["-1", "3"],
    "--max-params": ["-1", "1e9"],
    "--timeout": ["nan", "60"],
    "--heartbeat": ["20", "0"],
    "--storage": ["nonsense", "sqlite:///x.db", "postgresql://u:hunter2@/a:b:c"],
}


def drawn_train(draw):
    flags = dict(TRAIN)
    for name in draw.sample(sorted(VALUES), draw.choice([1, 1, 2])):
        flags[name] = draw.choice(VALUES[name] + draw.sample(NONSENSE, 1))
    return ["train", *(part for item in flags.items() for part in item), "--quiet", "--out", "out"]


def drawn_study(draw):
    name = draw.choice(sorted(STUDY_VALUES))
    value = draw.choice(STUDY_VALUES[name] + draw.sample(NONSENSE, 1))
    return [*STUDY, "--out", "out", name, value]


def drawn_other(draw):
    word = draw.choice(NONSENSE)
    return draw.choice(
        [
            ["info", draw.choice(["--num-classes", "--rank", "--depth", "--operator"]), word],
            ["info", "--operator", draw.choice(SPECS), "--json"],
            ["eval", draw.choice(["run", "missing", word])],
            ["eval", "run", draw.choice(["--split", "--checkpoint", "--device"]), word],
            ["analyse", "run", draw.choice(["--images", "--checkpoint"]), word],
            ["predict", "run", word],
            ["predict", "run", "missing.png", "--seed", word],
            ["export", "run", "--out", draw.choice(["m.safetensors", "m.bin", word or "x"])],
            ["export", "run", "--out", "m.safetensors", "--seed", word],
            ["study", draw.choice(["report", "status"]), "--out", draw.choice(["run", "none"])],
            ["study", draw.choice(["work", "run", "init", word]), word, "--out", "out"],
            ["bench", draw.choice(["--op-batch", "--repeats", "--device"]), word],
            [draw.choice(["trian", "train", word]), draw.choice(["--sed", "--opertor"]), "0"],
            [word],
        ]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "run"
    flags = [part for item in TRAIN.items() for part in item]
    assert cli.main(["train", *flags, "--quiet", "--out", str(out)]) == 0
    return out


def check(argv, capsys):
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # --help
        code = stop.code
    out, error = capsys.readouterr()
    assert code in (0, 2), argv
    assert "Traceback" not in error and "unforeseen" not in error, (argv, error)
    assert "hunter2" not in error + out, argv
    if code == 2:
        assert error.startswith("kart: error: ") and error.count("\n") == 1, (argv, error)
    return code


@pytest.mark.parametrize(
    ("kind", "seed", "count"),
    [
        *((drawn_train, seed, 10) for seed in range(3)),
        (drawn_study, 0, 6),
        (drawn_other, 0, 30),
        *(pytest.param(drawn_train, s, 20, marks=pytest.mark.slow) for s in range(10, 18)),
        *(pytest.param(drawn_study, s, 10, marks=pytest.mark.slow) for s in range(10, 14)),
        *(pytest.param(drawn_other, s, 30, marks=pytest.mark.slow) for s in range(10, 15)),
    ],
)
def test_drawn_command_lines(kind, seed, count, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    draw = random.Random(f"{kind.__name__} {seed}")
    for _ in range(count):
        argv = kind(draw)
        code = check(argv, capsys)
        made = tmp_path / "out"
        if argv[0] == "train":
            assert made.exists() == (code == 0), argv  # nothing half-made
        if argv[:2] == ["study", "run"] and code == 0:
            assert (made / "report.html").exists(), argv
        shutil.rmtree(made, ignore_errors=True)
