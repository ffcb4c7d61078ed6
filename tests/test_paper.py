"""The rows of the paper: every one is a run that can be made, and none is shown as it is not."""

import re

import pytest

from kart import cli, data, models, runs, train
from kart.commands import config as flags
from studies import paper


def config_of(row, scale):
    args = cli.parser().parse_args(paper.flags(row, scale))
    (found,) = flags.configs_of(args)
    return found


def test_rows_have_names_of_their_own():
    every = [*paper.TABLE_1, *paper.ABLATIONS, *paper.TRANSFER, *paper.ATTENTION]
    assert len(paper.ROWS) == len(every)
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in paper.ROWS)
    for row in every:
        assert {row.donor, row.teacher} - {None} <= set(paper.ROWS)


@pytest.mark.parametrize("name", paper.ROWS)
def test_the_command_of_a_row_is_the_papers_recipe(name):
    row = paper.ROWS[name]
    config = config_of(row, "paper")
    assert (config.recipe, config.augment, config.ema) == ("paper", "paper", 0.99992)
    patches = 4 if row.model.startswith("swin") else 16
    assert (config.image_size, config.patch_size, config.epochs) == (224, patches, 100)
    assert train.build(config, data.load("digits", "val")).config.patch_size == patches
    assert config.batch_size == (128 if row.data == "imagenet" else 32)
    assert config.learning_rate is None and config.warmup_epochs == 5
    small = config_of(row, "cpu")
    assert (small.image_size, small.patch_size, small.recipe) == (32, 8, "paper")
    # the models of the paper can be made; those of 32 px at once
    if name in paper.rows("cpu"):
        fields = {"image_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
        if row.model.startswith("convit"):
            fields["gated_blocks"] = 1
        models.create(row.model, config.operator, **fields)


def test_a_student_attends_as_the_papers_teacher():
    config = config_of(paper.ROWS["tiny-given-cifar10"], "cpu")
    assert config.operator == "G3B" and config.attention_from == "runs/paper/cpu/tiny-g3b-cifar10"


def test_published_numbers_stand_where_the_paper_has_them():
    rows = paper.ROWS
    assert rows["tiny-g3b-cifar10"].top1 == 76.69 and rows["tiny-softmax-cifar10"].top1 == 72.76
    assert rows["base-g11b-cifar10"].top1 == 50.47
    assert rows["tiny-softmax-svhn"].donor == "tiny-softmax-imagenet"
    text = paper.table("paper", paper.OUT / "nowhere")
    assert text.count("\n") == len(rows) + 1
    assert all(line.endswith(" -") for line in text.splitlines()[2:])


TINY = [
    *("--data", "digits", "--train-limit", "32", "--embed-dim", "8", "--depth", "1"),
    *("--num-heads", "1", "--image-size", "16", "--patch-size", "8", "--threads", "1"),
    *("--augment", "none", "--warmup-epochs", "1", "--quiet"),
]


def test_a_row_trains_in_slices_and_stands_in_its_own_table(tmp_path, capsys, monkeypatch):
    row = paper.ROWS["tiny-g3b-cifar10"]
    # in this process, stopped after an epoch
    slices = iter([2, 99])

    def command(argv, minutes):
        left, plain = next(slices) if argv[0] == "train" else 99, train.loop

        def loop(*args, **options):
            for i, found in enumerate(plain(*args, **options)):
                yield found
                if i + 1 == left:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train, "loop", loop)
            return cli.main(argv)

    monkeypatch.setattr(paper, "train", command)
    arguments = ["tiny-g3b-cifar10", "--scale", "cpu", "--out", str(tmp_path), *TINY]
    assert paper.main([*arguments, "--epochs", "4"]) == 0
    assert paper.ours(row, "cpu", tmp_path) == "(2 of 4 epochs)"
    assert paper.main([*arguments, "--epochs", "4"]) == 0
    assert len(runs.read_metrics(paper.home(row, "cpu", tmp_path))) == 4
    capsys.readouterr()
    assert paper.main(["--table", "--scale", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "another setting than the paper's" in text and "published" not in text
    assert "n = 1" in text and "tiny-g3b-cifar10" in text
    assert paper.ours(row, "paper", tmp_path) == "-"
    # a seed that diverged was scored with its last good weights
    monkeypatch.setattr(runs, "diverged", lambda directory: {0: 5})
    assert paper.ours(row, "cpu", tmp_path) == "n = 0, 1 diverged"


def test_rows_that_cannot_be_named_or_trained_say_so(capsys):
    for argv, words in (
        (["tiny-g3b-cifar11"], "no row of scale paper is called"),
        ([], "name a row"),
        (["tiny-g3b-cifar10", "--minutes", "0"], "> 0"),
        (["--table", "--device=cuda"], "--device=cuda has no effect without a row"),
    ):
        with pytest.raises(SystemExit) as caught:
            paper.main(argv)
        assert caught.value.code == 2 and words in capsys.readouterr().err
