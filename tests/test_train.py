"""Steps, loops, populations and run directories on tiny real data."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kart import optim, population, runs, train, tree
from kart.train import Config
from tests.tiny import TWO_BLOCKS as TINY


@pytest.fixture(scope="module")
def splits():
    whole = train.load_data(TINY)
    val = whole.val._replace(images=whole.val.images[:20], labels=whole.val.labels[:20])
    return train.Splits(whole.train, val)


def change(**fields):
    # a fixed operator and one of full rank have no rank to choose
    if str(fields.get("operator")) in ("softmax", "G2B:order=full_rank"):
        fields.setdefault("rank", None)
    return dataclasses.replace(TINY, **fields)


def finish(config, splits):
    return list(train.loop(train.solo(config, splits)))


def same(a, b):
    tree.map(lambda x, y: assert_close(x, y, rtol=0, atol=0, equal_nan=True), a, b)


def without_time(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U", "G2B:project=simplex", "dog-B"])
def test_the_vmapped_per_example_loss_equals_the_batched_one(operator, splits):
    config = change(operator=operator)
    model = train.build(config, splits.train)
    params = tree.to(model.init(torch.Generator().manual_seed(0)), torch.float64)
    images, targets = train.batches(config, splits.train).at(0, 0)
    results = [
        torch.func.grad_and_value(train.batch_loss(model, batching))(
            params, images.double(), targets.double()
        )
        for batching in ("native", "vmap")
    ]
    (one, first), (other, second) = results
    assert_close(first, second)
    tree.map(assert_close, one, other)


@pytest.mark.parametrize("batching", ["native", "vmap"])
@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U", "G2B:order=full_rank", "dog-B"])
def test_autograd_and_torch_func_give_the_same_gradients(operator, batching, splits):
    config = change(operator=operator)
    model = train.build(config, splits.train)
    loss = train.batch_loss(model, batching)
    params = tree.to(model.init(torch.Generator().manual_seed(0)), torch.float64)
    images, targets = train.batches(config, splits.train).at(0, 0)
    batch = (images.double(), targets.double())
    wanted = torch.func.grad_and_value(loss)(params, *batch)
    differentiate = train.value_and_gradients(loss)
    tree.map(assert_close, differentiate(params, *batch), wanted)
    assert not any(leaf.requires_grad for leaf in tree.leaves(params))
    # what was asked for derivatives keeps them
    leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
    grads, _ = differentiate(leaves, *batch)
    assert all(leaf.requires_grad for leaf in tree.leaves(grads))


@pytest.mark.parametrize("fields", [{}, {"ema": 0.9}, {"operator": "G2U", "max_norm": 0.1}])
def test_advancing_in_place_is_the_pure_step_bit_for_bit(fields, splits):
    run = train.solo(change(**fields), splits)
    pure = given = run.init()
    written = tree.map(torch.clone, pure)
    before = tree.leaves(written.params)
    for step in range(3):
        batch = run.batch(step)
        pure, metrics = run.step(pure, run.hyper, *batch)
        written, in_place = run.advance(written, run.hyper, *batch)
        same((pure, metrics), (written, in_place))
    assert all(a is b for a, b in zip(before, tree.leaves(written.params), strict=True))
    same(given, run.init())  # the pure step has left its state alone
    # a step that is not finite changes nothing in either
    images, targets = run.batch(3)
    kept = tree.map(torch.clone, written.params)
    pure, _ = run.step(pure, run.hyper, images * math.nan, targets)
    written, _ = run.advance(written, run.hyper, images * math.nan, targets)
    same(pure, written)
    same(kept, written.params)
    assert int(written.bad_step) == 3


def test_a_donated_state_trains_to_the_same_end(splits):
    run = train.solo(TINY, splits)
    plain, donated = (list(train.loop(run, donate=donate)) for donate in (False, True))
    same(plain[-1][0], donated[-1][0])
    assert without_time(r for _, r in plain) == without_time(r for _, r in donated)


@pytest.mark.parametrize(
    ("members", "fields"), [(1, {}), (2, {}), (1, {"operator": "softmax", "freeze": ("blocks",)})]
)
def test_a_compiled_step_is_the_eager_one(members, fields, splits, monkeypatch):
    # one graph or an error; Inductor itself takes minutes, and is tested with the kernels
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiler(f, backend="aot_eager", **k))
    results = []
    for how in ("eager", "compiled"):
        one = change(step=how, depth=1, **fields)
        configs = population.seeds(one, range(members))
        run = population.run(configs, splits)
        results.append(run.step(run.init(), run.hyper, *run.batch(0)))
    tree.map(lambda a, b: assert_close(a, b, rtol=1e-5, atol=1e-7), *results)


def test_a_step_is_torchs_own_adamw_step(splits):
    config = change(max_norm=1e9, warmup_epochs=0.0, label_smoothing=0.1)
    run = train.solo(config, splits)
    state = run.init()
    images, targets = run.batch(0)
    following, metrics = run.step(state, run.hyper, images, targets)

    model = train.build(config, splits.train)
    leaves = tree.map(lambda x: x.clone().requires_grad_(), state.params)
    smooth = targets * 0.9 + 0.1 / 10
    loss = -(smooth * model.apply(leaves, images).log_softmax(-1)).sum(-1).mean()
    decayed = optim.decay_mask()
    named = tree.named(leaves)
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for n, x in named.items() if decayed(n, x)], "weight_decay": 0.05},
            {"params": [x for n, x in named.items() if not decayed(n, x)], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    loss.backward()
    optimizer.step()
    assert_close(metrics.loss, loss.detach())
    tree.map(lambda a, b: assert_close(a, b.detach()), following.params, leaves)


def test_the_loss_falls_and_records_say_so(splits):
    records = [record for _, record in finish(change(epochs=40, learning_rate=1e-2), splits)]
    assert [record["epoch"] for record in records] == list(range(1, 41))
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    last = records[-1]
    assert 0 <= last["val_top1"] <= last["val_top5"] <= 1 and math.isfinite(last["val_loss"])
    json.dumps(records)


def test_two_runs_are_equal_bit_for_bit_and_leave_the_global_seed_alone(splits):
    before = torch.random.get_rng_state()
    first, second = finish(TINY, splits), finish(TINY, splits)
    assert torch.equal(before, torch.random.get_rng_state())
    same(first[-1][0], second[-1][0])
    assert without_time(r for _, r in first) == without_time(r for _, r in second)


def test_stopping_and_going_on_changes_nothing(splits):
    run = train.solo(TINY, splits)
    whole = list(train.loop(run))
    for at in range(len(whole) - 1):
        rest = list(train.loop(run, whole[at][0]))
        same(rest[-1][0], whole[-1][0])


def test_learning_rate_zero_changes_no_parameter(splits):
    config = change(learning_rate=0.0, end_learning_rate=0.0, warmup_epochs=0.0)
    run = train.solo(config, splits)
    state = run.init()
    following, _ = run.step(state, run.hyper, *run.batch(0))
    same(state.params, following.params)


def test_averaged_weights_are_what_is_evaluated(splits):
    state, _ = finish(change(ema=0.99), splits)[-1]
    average = train.weights_for_evaluation(state)
    assert not torch.equal(average["head"]["weight"], state.params["head"]["weight"])
    plain, _ = finish(TINY, splits)[-1]
    assert train.weights_for_evaluation(plain) is plain.params


def test_evaluation_by_hand(splits):
    images = np.zeros((3, 1, 8, 8), np.uint8)
    dataset = splits.val._replace(images=images, labels=np.array([0, 1, 2]))
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    scores = train.evaluate(lambda p, x: logits.expand(len(x), 10), {}, dataset, TINY, batch_size=2)
    assert float(scores["top1"]) == pytest.approx(1 / 3)
    assert float(scores["top5"]) == 1.0
    wanted = -logits.double().log_softmax(-1)[:3].mean()
    assert float(scores["loss"]) == pytest.approx(float(wanted), rel=1e-6)


def test_divergence_names_step_and_parameter_and_keeps_the_last_good_state(splits):
    run = train.solo(TINY, splits)
    state = run.init()
    for step in range(2):
        state, _ = run.step(state, run.hyper, *run.batch(step))
    broken = tree.map(torch.clone, state)
    broken.params["blocks"]["1"]["operator"]["mix"][0, 0, 0] = math.inf
    stopped, _ = run.step(broken, run.hyper, *run.batch(2))
    assert int(stopped.bad_step) == 2
    same(stopped.params, broken.params)
    later, _ = run.step(stopped, run.hyper, *run.batch(3))
    assert int(later.bad_step) == 2
    error = run.diagnose(later, 0)
    assert error.step == 2 and error.parameter == "blocks.1.operator.mix"
    assert "step 2" in str(error) and "blocks.1.operator.mix" in str(error)


def test_a_diverging_run_stops_and_its_state_is_on_disk(splits, tmp_path):
    config = change(learning_rate=1e30, warmup_epochs=0.0, max_norm=1e30, weight_decay=1e10)
    with pytest.raises(train.Diverged, match="training stopped at step"):
        list(runs.execute(tmp_path / "run", [config], splits))
    assert (tmp_path / "run" / "diverged.safetensors").exists()


# populations


def members(*seeds, **fields):
    return population.seeds(change(**fields), seeds)


@pytest.mark.parametrize("operator", ["softmax", "G2B", "G2U", "dog-B"])
def test_each_member_equals_its_solo_run(operator, splits):
    configs = members(0, 1, 2, operator=operator)
    configs[1] = dataclasses.replace(configs[1], learning_rate=3e-3, weight_decay=0.2)
    run = population.stacked(configs, splits)
    state, metrics = run.step(run.init(), run.hyper, *run.batch(0))
    for i, config in enumerate(configs):
        alone = train.solo(config, splits)
        own, value = alone.step(alone.init(), alone.hyper, *alone.batch(0))
        assert_close(metrics.loss[i], value.loss, rtol=1e-5, atol=1e-6)
        moments = population.member(state, i).optimizer
        tree.map(lambda a, b: assert_close(a, b, rtol=2e-4, atol=1e-7), moments, own.optimizer)


def test_population_records_are_the_solo_records(splits):
    by_group = {}
    for group in (1, 2, 3):
        last = {}
        for records in population.fit(members(0, 1, 2, epochs=2), splits, group=group):
            for record in records:
                last[record["member"]] = record
        by_group[group] = last
    for group in (2, 3):
        for i in range(3):
            got, wanted = by_group[group][i], by_group[1][i]
            assert got["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
            assert got["learning_rate"] == wanted["learning_rate"]
            assert got["params"].keys() == wanted["params"].keys()


def test_a_member_that_diverges_leaves_the_others_alone(splits):
    configs = members(0, 1)
    bad = dataclasses.replace(configs[0], learning_rate=1e35, weight_decay=1e35)
    both = list(train.loop(population.stacked([bad, configs[1]], splits)))
    alone = list(train.loop(population.stacked([configs[1], configs[1]], splits)))
    record = both[-1][1]
    assert record["diverged"][0] >= 0 and record["diverged"][1] == -1
    assert record["train_loss"][1] == alone[-1][1]["train_loss"][1]


@pytest.mark.parametrize("group", [1, 2])
def test_a_group_that_diverges_leaves_the_others_alone(group, splits):
    configs = [*members(0, 1, epochs=1, learning_rate=1e35, weight_decay=1e35), *members(2)]
    configs[2] = dataclasses.replace(configs[2], epochs=1)
    done = []
    with pytest.raises(train.Diverged):
        done.extend(one for part in population.fit(configs, splits, group) for one in part)
    assert [one["member"] for one in done if "params" in one] == [2]


def test_the_group_size_is_measured(splits):
    size, seconds = population.fastest_group(members(0, 1, 2), splits, repeats=1)
    assert size in seconds and seconds[size] == min(seconds.values())
    assert set(seconds) <= {1, 2, 3}


def test_populations_of_different_shapes_are_refused(splits):
    with pytest.raises(ValueError, match="different operator"):
        population.stacked([TINY, change(operator="softmax")], splits)
    with pytest.raises(ValueError, match="different seeds"):
        population.seeds(TINY, [1, 1])
    for size in (0, "2"):
        with pytest.raises(ValueError, match="an integer `size` >= 1, got"):
            population.groups([TINY], size)
    with pytest.raises(ValueError, match="one config or more, got none"):
        population.groups([], 2)


# run directories


def test_a_run_directory_holds_config_metrics_and_checkpoints(splits, tmp_path):
    records = list(runs.execute(tmp_path / "run", members(0, 1), splits))
    found = runs.read_config(tmp_path / "run")
    assert Config.fromdict(found["config"]) == TINY and len(found["members"]) == 2
    assert found["versions"]["torch"] == torch.__version__
    assert runs.read_metrics(tmp_path / "run") == records
    assert runs.members(tmp_path / "run") == members(0, 1)
    weights = runs.load_weights(tmp_path / "run")
    assert len(weights) == 2
    again = list(runs.execute(tmp_path / "run", members(0, 1), splits))
    assert again == records


def test_resuming_after_every_epoch_gives_the_uninterrupted_run(splits, tmp_path):
    config = change(ema=0.9)
    whole = list(runs.execute(tmp_path / "whole", [config], splits))
    for at in (1, 2):
        part = runs.execute(tmp_path / f"part{at}", [config], splits)
        for _ in range(at):
            next(part)
        part.close()
        # what a kill while writing leaves behind
        with open(tmp_path / f"part{at}" / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 99, "st')
        rest = list(runs.execute(tmp_path / f"part{at}", [config], splits))
        assert without_time(rest) == without_time(whole)
        for name in ("last.safetensors", "best.safetensors"):
            wanted = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / f"part{at}" / name).read_bytes() == wanted


def test_each_member_keeps_the_weights_of_its_own_best_epoch(splits, tmp_path):
    configs = [dataclasses.replace(one, epochs=6, learning_rate=0.05) for one in members(0, 1, 2)]
    epochs = list(train.loop(population.run(configs, splits)))
    top1 = torch.tensor([record["val_top1"] for _, record in epochs])
    at = top1.argmax(0).tolist()
    assert len(set(at)) > 1
    list(runs.execute(tmp_path / "whole", configs, splits))
    part = runs.execute(tmp_path / "part", configs, splits)
    for _ in range(max(at)):
        next(part)
    part.close()
    list(runs.execute(tmp_path / "part", configs, splits))
    for name in ("whole", "part"):
        for i, params in enumerate(runs.load_weights(tmp_path / name, "best")):
            same(params, population.member(epochs[at[i]][0].params, i))


PROGRAM = """
import sys
from kart import runs, train, data
from tests.test_train import TINY, change
config = change(epochs=40)
whole = train.load_data(config)
val = whole.val._replace(images=whole.val.images[:20], labels=whole.val.labels[:20])
for record in runs.execute(sys.argv[1], [config], train.Splits(whole.train, val)):
    print(record["epoch"], flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_and_resume_is_bit_exact(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(name):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / name)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    with start("whole") as process:
        process.communicate()
    assert process.returncode == 0
    for _ in range(3):
        with start("killed") as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.15)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    with start("killed") as process:
        process.communicate()
    assert process.returncode == 0
    for name in ("last.safetensors", "best.safetensors"):
        wanted = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == wanted


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_trajectory_runs_from_the_first_weights_to_the_last(seeds, splits, tmp_path):
    configs = [dataclasses.replace(one, trajectory=4) for one in members(*seeds)]
    list(runs.execute(tmp_path / "run", configs, splits))
    path = runs.load_trajectory(tmp_path / "run")
    run = population.run(configs, splits)
    total = configs[0].epochs * run.steps_per_epoch
    assert [step for step, _ in path] == runs.snapshot_steps(4, total)
    start = run.init().params
    starts = [start] if len(seeds) == 1 else tree.unstack(start)
    for i, (first, last) in enumerate(
        zip(starts, runs.load_weights(tmp_path / "run"), strict=True)
    ):
        same(path[0][1][i], first)
        same(path[-1][1][i], last)


def test_a_resumed_run_has_the_trajectory_of_the_uninterrupted_one(splits, tmp_path):
    config = change(epochs=2, trajectory=5, ema=0.9)
    list(runs.execute(tmp_path / "whole", [config], splits))
    part = runs.execute(tmp_path / "part", [config], splits)
    next(part)
    part.close()
    list(runs.execute(tmp_path / "part", [config], splits))
    pairs = zip(*(runs.load_trajectory(tmp_path / name) for name in ("whole", "part")), strict=True)
    for (step, (whole,)), (again, (rest,)) in pairs:
        assert step == again
        same(whole, rest)


def test_a_trajectory_that_nobody_keeps_is_refused(splits):
    configs = [dataclasses.replace(one, trajectory=4) for one in members(0, 1)]
    for records in (train.fit(configs[0], splits), population.fit(configs, splits, group=2)):
        with pytest.raises(ValueError, match="needs `on_step` to keep the 4 snapshots"):
            next(records)


def test_a_run_without_or_with_part_of_a_trajectory_says_what_to_do(splits, tmp_path):
    list(runs.execute(tmp_path / "none", [change(epochs=1)], splits))
    with pytest.raises(ValueError, match="--trajectory"):
        runs.load_trajectory(tmp_path / "none")
    part = runs.execute(tmp_path / "part", [change(epochs=2, trajectory=3)], splits)
    next(part)
    part.close()
    with pytest.raises(ValueError, match="finished trajectory, got 2 of 3"):
        runs.load_trajectory(tmp_path / "part")
    with pytest.raises(ValueError, match="at most one snapshot a step"):
        list(runs.execute(tmp_path / "many", [change(epochs=1, trajectory=10**6)], splits))


def test_a_directory_of_another_run_is_refused(splits, tmp_path):
    list(runs.execute(tmp_path / "run", [change(epochs=1)], splits))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="epochs: 1 there, 2 asked"):
        list(runs.execute(tmp_path / "run", [change(epochs=2)], splits))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        list(runs.execute(tmp_path / "other", [TINY], splits))
    with pytest.raises(ValueError, match="without config.json"):
        runs.read_config(tmp_path / "other")
    (tmp_path / "run" / "config.json").write_text('{"config": ')
    with pytest.raises(ValueError, match="damaged"):
        runs.read_config(tmp_path / "run")


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    with (
        runs.locked(tmp_path),
        pytest.raises(ValueError, match="no other process"),
        runs.locked(tmp_path),
    ):
        pass


# configs and bad input


def test_configs_survive_json_and_their_hash_names_them():
    config = change(operator=("softmax", "G2B"))
    again = Config.fromdict(json.loads(json.dumps(config.asdict())))
    assert again == config and again.hash == config.hash and TINY.hash != config.hash
    with pytest.raises(ValueError, match="fields among"):
        Config.fromdict({"epoch": 3})
    paper = change(learning_rate=None, end_learning_rate=1e-6)
    assert paper.peak_learning_rate == 5e-4 * 8 / 512
    frozen = change(freeze=("blocks.*", "cls_token"))
    assert Config.fromdict(json.loads(json.dumps(frozen.asdict()))) == frozen


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"weight_decay": math.inf},
        {"max_norm": 0.0},
        {"label_smoothing": 1.0},
        {"ema": 1.0},
        {"batching": "sideways"},
        {"precision": "float8"},
        {"device": "tpu"},
        {"threads": 0},
        {"seed": -1},
        {"accumulate": 0},
        {"accumulate": 3},
        {"freeze": ("",)},
        {"end_learning_rate": 2e-3},
        {"start_learning_rate": 2e-3},
        {"warmup_epochs": 3.5},
        {"eval_crop": 0.01},
    ],
)
def test_bad_hyperparameters_name_themselves(field):
    with pytest.raises(ValueError, match=f"`{next(iter(field))}`"):
        change(**field)


def test_a_batch_larger_than_the_data_is_refused(splits):
    with pytest.raises(ValueError, match="24 training images, got 25"):
        train.solo(change(batch_size=25), splits)


@pytest.mark.parametrize(
    ("change_of_val", "words"),
    [
        (lambda val: {"classes": val.classes[::-1]}, "the same `classes`, got .*'0', '1', .*'9',"),
        (lambda val: {"classes": (*val.classes, "ten")}, "the same `classes`"),
        (lambda val: {"mean": (0.1,)}, "the same `mean`"),
        (lambda val: {"std": (0.1,)}, "the same `std`"),
        (
            lambda val: {"images": val.images.repeat(3, 1), "mean": (0.5,) * 3, "std": (0.5,) * 3},
            "the same `channels`, got 1 and 3",
        ),
        (lambda val: {"images": val.images[:0], "labels": val.labels[:0]}, "one validation image"),
    ],
)
def test_splits_that_do_not_agree_are_refused_before_training(change_of_val, words, splits):
    other = splits._replace(val=splits.val._replace(**change_of_val(splits.val)))
    for configs in ([TINY], members(0, 1)):
        with pytest.raises(ValueError, match=f"`Splits` needs .*{words}"):
            population.run(configs, other)


def test_a_model_of_other_classes_is_not_scored(splits):
    def apply(params, images):
        return images.mean((2, 3)).expand(-1, 12)

    with pytest.raises(ValueError, match="logits of the 10 classes of 'digits', got 12"):
        train.evaluate(apply, {}, splits.val, TINY)
    with pytest.raises(ValueError, match="`batch_size` >= 1, got 0"):
        train.evaluate(apply, {}, splits.val, TINY, batch_size=0)


def test_batches_are_a_pure_function_of_seed_and_step(splits):
    source = train.batches(change(augment="crop"), splits.train)
    first = source.at(0, 4)
    source.at(0, 0)
    source.at(5, 9)
    again = source.at(0, 4)
    same(first, again)
    other = source.at(1, 4)[0]
    assert not torch.equal(first[0], other)
    labels = [train.batches(TINY, splits.train).at(0, step)[1].argmax(-1) for step in range(3)]
    seen = torch.cat(labels).bincount(minlength=10)
    wanted = torch.from_numpy(np.bincount(splits.train.labels, minlength=10))
    assert torch.equal(seen, wanted)  # one epoch sees every image once


@pytest.mark.parametrize("size", [*range(1, 70), 96, 127, 128, 144, 224, 256, 384])
def test_the_default_patch_divides_and_leaves_a_grid(size):
    patch = train.default_patch_size(size)
    grid, rest = divmod(size, patch)
    assert rest == 0
    assert patch <= 16 if size >= 128 else grid >= min(size, 8 if size >= 32 else 4)
    larger = [side for side in range(patch + 1, size + 1) if size % side == 0]
    for side in larger:  # none of them would do
        assert side > 16 if size >= 128 else size // side < (8 if size >= 32 else 4)


def test_the_default_patch_of_common_sizes():
    sizes = {8: 2, 28: 7, 32: 4, 64: 8, 96: 12, 128: 16, 224: 16, 384: 16}
    assert {size: train.default_patch_size(size) for size in sizes} == sizes


def test_a_side_that_no_patch_divides_is_refused_where_pixels_would_be_patches(splits):
    def side(size, patch_size=None):
        config = change(operator="softmax", image_size=size, patch_size=patch_size)
        return train.build(config, splits.train).config.patch_size

    for size in (97, 227, 254):
        words = f"`patch_size` for images of {size} pixels .* say {size // 16 * 16} "
        with pytest.raises(ValueError, match=words):
            side(size)
    assert side(227, 227) == 227 and side(37) == 1


# parts of a batch, frozen parameters


@pytest.mark.parametrize("max_norm", [1e9, 0.05])
@pytest.mark.parametrize("batching", ["native", "vmap"])
def test_accumulating_is_the_large_batch(batching, max_norm, splits):
    config = change(batching=batching, max_norm=max_norm, label_smoothing=0.1)
    model, (images, targets) = (
        train.build(config, splits.train),
        train.solo(config, splits).batch(0),
    )
    ends = []
    for parts in (1, 2, 4, 8):
        program = train.program(dataclasses.replace(config, accumulate=parts), model, 3)
        state = program.init(torch.Generator().manual_seed(0))
        state = tree.map(lambda x: x.double() if x.is_floating_point() else x, state)
        hyper = train.Hyper(torch.tensor(1e-3), torch.tensor(0.05))
        grads, value = train.accumulated(
            parts, train.value_and_gradients(train.batch_loss(model, batching))
        )(state.params, images.double(), targets.double())
        ends.append((grads, value))
        state, metrics = program.step(state, hyper, images, targets)
        assert (metrics.grad_norm > max_norm) == (max_norm < 1)
        ends[-1] += (state.params, metrics)
    for other in ends[1:]:
        tree.map(lambda a, b: assert_close(a, b, rtol=1e-9, atol=1e-12), ends[0][:2], other[:2])
        # inside a step images are float32
        tree.map(lambda a, b: assert_close(a, b, rtol=1e-4, atol=1e-6), ends[0][2:], other[2:])


def test_accumulating_works_under_a_population(splits):
    configs = population.seeds(change(accumulate=4), [0, 1])
    run = population.stacked(configs, splits)
    state, metrics = run.step(run.init(), run.hyper, *run.batch(0))
    for i, config in enumerate(configs):
        alone = train.solo(dataclasses.replace(config, accumulate=1), splits)
        own, value = alone.step(alone.init(), alone.hyper, *alone.batch(0))
        assert_close(metrics.loss[i], value.loss, rtol=1e-5, atol=1e-6)
        assert_close(metrics.grad_norm[i], value.grad_norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batching", ["native", "vmap"])
def test_frozen_parameters_stay_and_the_others_train_as_without(batching, splits):
    config = change(freeze=("blocks.0", "*.qkv.*", "pos_embed"), batching=batching, ema=0.9)
    run = train.solo(config, splits)
    start = run.init()
    held = train.frozen(config, start.params)
    assert {"pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"} <= held
    assert not {"head.weight", "blocks.1.mlp.fc1.weight", "blocks.1.operator.mix"} & held
    donated = list(train.loop(run, tree.map(torch.clone, start), donate=True))
    plain = list(train.loop(run, start))
    same(plain[-1][0], donated[-1][0])
    before, after = tree.named(start.params), tree.named(plain[-1][0].params)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in held), name
    # the first gradients of the others are those of the whole
    grads, _ = train.program(config, train.build(config, splits.train), 3).gradients(
        start, *run.batch(0)
    )
    whole = change(batching=batching)
    wanted, _ = train.program(whole, train.build(whole, splits.train), 3).gradients(
        start, *run.batch(0)
    )
    wanted = tree.map_named(lambda n, g: torch.zeros_like(g) if n in held else g, wanted)
    tree.map(assert_close, grads, wanted)


def test_patterns_that_freeze_nothing_or_all_are_refused(splits):
    with pytest.raises(ValueError, match="'bloks', which matches none of"):
        train.solo(change(freeze=("bloks",)), splits).init()
    with pytest.raises(ValueError, match="matches all of them"):
        train.solo(change(freeze=("*",)), splits).init()


def test_a_backbone_without_classes_is_refused_by_its_name(splits):
    with pytest.raises(ValueError, match="needs a model that classifies, got 'vitdet_tiny'.*swin"):
        train.build(Config(model="vitdet_tiny"), splits.train)
