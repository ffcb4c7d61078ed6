"""Spaces, trials of K seeds, storage, and the loop that can be killed."""

import dataclasses
import html
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pictures import save_folder

from kart import bases, cli, data, operators, pages, population, search, train, tree
from kart.search import plots, question, report, space, storage, trials, work
from kart.search.trials import objective, train_members
from kart.train import Config

optuna.logging.set_verbosity(optuna.logging.WARNING)

TINY = Config(
    patch_size=4,
    embed_dim=8,
    depth=1,
    num_heads=1,
    epochs=3,
    batch_size=8,
    train_limit=24,
    operator="G1B:rank=2",
    threads=1,
)


@pytest.fixture(scope="module")
def splits():
    whole = train.load_data(TINY)
    val = whole.val._replace(images=whole.val.images[:20], labels=whole.val.labels[:20])
    return train.Splits(whole.train, val)


def change(**fields):
    return dataclasses.replace(TINY, **fields)


def karat(trial, config=TINY):
    spec = space.suggest_operator(trial, grid=(1, 3), rank=(2, 4))
    return dataclasses.replace(config, operator=spec, **space.suggest_rates(trial))


def learning_rate_only(trial):
    return change(learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True))


# spaces


@pytest.mark.parametrize("family", sorted(bases.FAMILIES))
def test_suggested_operators_are_specs_that_parse(family):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        spec = space.suggest_operator(study.ask(), families=[family])
        parsed = operators.parse(spec)
        assert parsed.operator.basis.family == family
        assert 4 <= parsed.operator.options["rank"] <= 32
        assert parsed.sharing in ("blockwise", "universal")


def test_key_forgets_seed_and_place_and_shape_forgets_what_fixes_no_shape():
    assert space.key(change(seed=3, threads=2, device="cuda")) == space.key(TINY)
    assert space.key(change(learning_rate=0.5)) != space.key(TINY)
    assert space.shape(change(learning_rate=0.5, weight_decay=0.2, seed=1)) == space.shape(TINY)
    assert space.shape(change(rank=3)) != space.shape(TINY)


def test_fixed_parameters_are_not_suggested():
    study = optuna.create_study()
    trial = study.ask()
    made = space.fixed(karat, {"grid": 2, "learning_rate": 0.003})(trial)
    assert made.operator.startswith("G2") and made.learning_rate == 0.003
    assert set(trial.params) == {"rank", "sharing", "weight_decay"}


def test_a_fingerprint_sees_distributions_branches_and_what_is_made_of_them():
    before = space.fingerprint(karat)
    assert before == space.fingerprint(karat)
    assert sorted(before["distributions"]) == [
        *("grid", "learning_rate", "rank", "sharing", "weight_decay")
    ]

    def wider(trial):
        return dataclasses.replace(karat(trial), operator=space.suggest_operator(trial))

    def other_use(trial):
        return dataclasses.replace(karat(trial), epochs=9)

    def branched(trial):
        if trial.suggest_categorical("kind", ["softmax", "G"]) == "G":
            return karat(trial)
        return change(operator="softmax")

    assert space.fingerprint(wider) != before
    assert space.fingerprint(other_use)["distributions"] == before["distributions"]
    assert space.fingerprint(other_use) != before
    assert "grid" in space.fingerprint(branched)["distributions"]


def test_points_of_finite_spaces_and_of_grids():
    def finite(trial):
        kind = trial.suggest_categorical("kind", ["a", "b"])
        return change(seed=trial.suggest_int("n", 1, 5, step=2) if kind == "a" else 0)

    assert space.enumerate_space(finite) == [
        *({"kind": "a", "n": n} for n in (1, 3, 5)),
        {"kind": "b"},
    ]
    with pytest.raises(ValueError, match="--fix learning_rate=VALUE"):
        space.enumerate_space(learning_rate_only)
    points = space.enumerate_space(learning_rate_only, levels=3)
    values = [point["learning_rate"] for point in points]
    assert values == pytest.approx([1e-3, 10**-2.5, 1e-2]) and max(values) <= 1e-2


@pytest.mark.parametrize("levels", [None, 2, 3])
def test_steps_end_where_the_interval_does(levels):
    def stepped(trial):
        # 0.1 + 6 * 0.1 is above 0.7
        return change(weight_decay=trial.suggest_float("decay", 0.1, 0.7, step=0.1))

    values = [point["decay"] for point in space.enumerate_space(stepped, levels)]
    assert values[0] == 0.1 and values[-1] == 0.7 and len(values) == (levels or 7)


def test_choices_that_a_database_does_not_give_back_are_refused():
    def blocks(trial):
        return change(operator=trial.suggest_categorical("blocks", [("G1B",), ("softmax",)]))

    with pytest.raises(ValueError, match=r"choices of None, bool, .* got \('G1B',\) for 'blocks'"):
        space.fingerprint(blocks)


def test_a_space_may_use_all_of_a_trial_and_prune_points():
    def picky(trial):
        size = trial.suggest_int(name="size", low=1, high=3)
        rate = trial.suggest_categorical(name="rate", choices=[1e-3, 2e-3])
        trial.set_user_attr("note", trial.number)
        if size == 1 or (size, rate) == (3, 2e-3):
            raise optuna.TrialPruned("too small")
        return change(embed_dim=8 * size, learning_rate=rate)

    assert space.first(picky).embed_dim == 16
    points = [tuple(point.values()) for point in space.enumerate_space(picky)]
    assert points == [(2, 1e-3), (2, 2e-3), (3, 1e-3)]
    assert sorted(space.fingerprint(picky)["distributions"]) == ["rate", "size"]
    assert space.first(space.fixed(picky, {"size": 3})).embed_dim == 24
    with pytest.raises(ValueError, match="raises TrialPruned at every point"):
        space.first(space.fixed(picky, {"size": 1}))


def test_a_fixed_value_is_one_that_steps_reach():
    for distribution, good, bad in (
        (optuna.distributions.IntDistribution(1, 9, step=2), 3, 4),
        (optuna.distributions.FloatDistribution(0.1, 0.7, step=0.2), 0.3, 0.4),
    ):
        assert space.contains(distribution, good) and not space.contains(distribution, bad)
    for choices, good, bad in (([True, None], True, 1), ([1, "a"], 1, True), ([1.0, 2.0], 1, 0)):
        choice = CategoricalDistribution(choices)
        assert space.contains(choice, good) and not space.contains(choice, bad)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": (9, 1)}, "`grid`"),  # which used to draw G1 alone
        ({"rank": (0, 4)}, "`rank`"),
        ({"grid": (1.0, 3.0)}, "`grid`"),
        ({"grid": (0, 0)}, "`grid` with one that fourier can have"),
        ({"grid": (1, 1), "families": ["fourier", "gaussian_rbf"]}, "`grid` with one"),
        ({"degree": 3}, "`degree`"),
        ({"families": "fourier"}, "`families`"),
        ({"families": ["fuorier"]}, "`families` among"),
        ({"sharing": ("both",)}, "`sharing`"),
        ({"sharing": ()}, "`sharing`"),
    ],
)
def test_what_no_operator_can_be_drawn_from_is_named(options, words):
    with pytest.raises(ValueError, match=f"`suggest_operator` needs {words}"):
        space.suggest_operator(optuna.create_study().ask(), **options)


# members


def test_members_are_the_population_and_dropping_one_leaves_the_others_alone(splits):
    configs = population.seeds(TINY, [0, 1, 2])
    whole = train_members(configs, splits, group=3)
    state, record = list(train.loop(population.stacked(configs, splits)))[-1]
    assert [member.record["val_loss"] for member in whole] == record["val_loss"]
    for i, member in enumerate(whole):
        tree.map(torch.testing.assert_close, member.params, population.member(state.params, i))

    fewer = train_members(configs, splits, 3, lambda epoch, records: [1] if epoch == 1 else [])
    assert [member.epochs for member in fewer] == [3, 1, 3] and fewer[1].params is None
    for i in (0, 2):
        assert fewer[i].record["val_loss"] == pytest.approx(whole[i].record["val_loss"], rel=1e-4)


@pytest.mark.parametrize("group", [1, 2])
def test_groups_of_members_give_the_same_results(group, splits):
    configs = population.seeds(TINY, [0, 1, 2])
    whole = train_members(configs, splits, group=3)
    parts = train_members(configs, splits, group=group)
    for one, other in zip(parts, whole, strict=True):
        assert one.record["train_loss"] == pytest.approx(other.record["train_loss"], rel=1e-3)


@pytest.mark.parametrize("group", [1, 3])
def test_a_member_that_diverges_is_dropped(group, splits):
    configs = population.seeds(TINY, [0, 1, 2])
    configs[1] = dataclasses.replace(configs[1], learning_rate=1e35, weight_decay=1e35)
    members = train_members(configs, splits, group)
    assert members[1].diverged >= 0 and members[1].params is None
    fine = train_members([configs[0], configs[2]], splits, group)
    for one, other in zip((members[0], members[2]), fine, strict=True):
        assert one.diverged == -1
        assert one.record["train_loss"] == pytest.approx(other.record["train_loss"], rel=1e-3)


# objective


def test_an_objective_drops_into_any_study(splits):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    study.optimize(objective(karat, splits, seeds=2), n_trials=2)
    trial = study.trials[0]
    scores = list(trial.user_attrs["scores"].values())
    assert trial.value == pytest.approx(np.mean(scores)) and trial.user_attrs["n"] == 2
    assert trial.user_attrs["standard_error"] == pytest.approx(
        np.std(scores, ddof=1) / 2**0.5, abs=1e-12
    )
    assert sorted(trial.intermediate_values) == [1, 2]
    assert Config.fromdict(trial.user_attrs["config"]).operator.startswith("G")
    assert trial.user_attrs["cost"]["parameters"] > 0
    assert trial.user_attrs["spent"]["epochs"] == 6


def test_a_repeat_trains_further_seeds_and_pools_them(splits):
    study = optuna.create_study(direction="maximize")
    for _ in range(2):
        study.enqueue_trial({"learning_rate": 5e-3})
    study.optimize(objective(learning_rate_only, splits, seeds=2), n_trials=2)
    first, second = study.trials
    assert list(first.user_attrs["scores"]) == ["0", "1"]
    assert list(second.user_attrs["scores"]) == ["2", "3"]
    pooled = [*first.user_attrs["scores"].values(), *second.user_attrs["scores"].values()]
    assert second.value == pytest.approx(np.mean(pooled)) and second.user_attrs["n"] == 4
    best = work.candidates(study)
    assert len(best) == 1 and len(best[0].scores) == 4


def test_other_images_by_the_same_name_are_refused(splits):
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"learning_rate": 1e-3})
    study.optimize(objective(learning_rate_only, splits, seeds=1), n_trials=1)
    for name in ("train", "val"):
        others = splits._replace(**{name: getattr(splits, name).part(slice(8, None))})
        study.enqueue_trial({"learning_rate": 1e-3})  # which used to pool its seeds
        with pytest.raises(ValueError, match="had as 'digits', got others than those of trial 0"):
            study.optimize(objective(learning_rate_only, others, seeds=1), n_trials=1)
    named = objective(lambda trial: change(train_limit=16, learning_rate=1e-3), splits, seeds=1)
    study.optimize(named, n_trials=1)
    study.optimize(objective(learning_rate_only, splits, seeds=1), n_trials=1)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 3


def test_a_repeat_does_not_train_a_seed_that_diverged_again(splits, monkeypatch):
    def without_the_last(configs, *args):
        *fine, last = train_members(configs, *args)
        return [*fine, last._replace(diverged=2)]

    study = optuna.create_study(direction="maximize")
    for _ in range(2):
        study.enqueue_trial({"learning_rate": 5e-3})
    call = objective(learning_rate_only, splits, seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "train_members", without_the_last)
        study.optimize(call, n_trials=1)
    study.optimize(call, n_trials=1)
    assert [list(one.user_attrs["scores"]) for one in study.trials] == [["0"], ["2", "3"]]
    assert study.trials[0].user_attrs["spent"]["diverged"] == {"1": 2}


def test_trials_that_train_a_configuration_at_once_have_seeds_of_their_own(splits, monkeypatch):
    both, train_both = (threading.Barrier(2, timeout=60) for _ in range(2))
    get_trials, looked = optuna.Study.get_trials, set()

    def slow(study, *args, **options):
        found = get_trials(study, *args, **options)
        if threading.get_ident() not in looked:
            looked.add(threading.get_ident())
            both.wait()  # neither has chosen when the other looks
        return found

    def spy(*args):
        train_both.wait()  # both trials run by now
        return train_members(*args)

    monkeypatch.setattr(trials, "train_members", spy)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(2):
        study.enqueue_trial({"learning_rate": 5e-3})
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "get_trials", slow)
        study.optimize(objective(learning_rate_only, splits, seeds=2), n_trials=2, n_jobs=2)
    seeds = [{int(seed) for seed in trial.user_attrs["scores"]} for trial in study.trials]
    assert len(looked) == 2 and not seeds[0] & seeds[1]
    assert len(work.candidates(study)[0].scores) == 4


def test_a_repeat_is_not_stopped_early_for_its_seeds_count(splits):
    class Always(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number > 0

    study = optuna.create_study(direction="maximize", pruner=Always())
    for rate in (5e-3, 5e-3, 6e-3):
        study.enqueue_trial({"learning_rate": rate})
    study.optimize(objective(learning_rate_only, splits, seeds=1), n_trials=3)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert study.trials[1].user_attrs["n"] == 2


def test_a_point_that_cannot_be_trained_is_named_or_pruned_by_its_space(splits):
    def heads(trial):
        count = trial.suggest_int("heads", 3, 3)
        if trial.number:
            raise optuna.TrialPruned("no heads of memory")
        return change(num_heads=count)

    study = optuna.create_study(direction="maximize", study_name="s")
    function = objective(heads, splits)
    words = r"trial 0 of 's' with {'heads': 3}: `vit` needs `embed_dim` divisible .*TrialPruned"
    with pytest.raises(ValueError, match=words):
        study.optimize(function, n_trials=1)
    study.optimize(function, n_trials=1)
    assert study.trials[1].user_attrs["reason"] == "pruned by its space: no heads of memory"
    assert report.tally(study)["pruned by the space"] == 1


@pytest.mark.parametrize("fields", [{"batch_size": 25}, {"freeze": ("nothing",)}])
def test_a_point_of_which_training_says_what_is_wrong_is_named(fields, splits):
    def space(trial):
        return change(learning_rate=trial.suggest_float("rate", 1e-3, 1e-3), **fields)

    study = optuna.create_study(direction="maximize", study_name="s")
    words = rf"trial 0 of 's' with {{'rate': 0.001}}: .*`{next(iter(fields))}`.*TrialPruned"
    with pytest.raises(ValueError, match=words):
        study.optimize(objective(space, splits), n_trials=1)


def test_a_limit_of_memory_is_no_lack_of_memory(splits):
    study = optuna.create_study(direction="maximize")
    study.optimize(objective(karat, splits, limits={"memory": 1e-9}), n_trials=1)
    found = report.tally(study)
    assert (found["over a limit"], found["out of memory"]) == (1, 0)


def test_trials_that_were_added_by_hand_are_told_apart(splits):
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=0.99))
    study.optimize(objective(learning_rate_only, splits, seeds=1), n_trials=1)
    (best,) = work.candidates(study)
    assert best.trial.number == 1 and work.winners(study) == [best]
    found = report.tally(study)
    assert (found["complete"], found["added by hand"]) == (1, 1)
    settings = SimpleNamespace(objectives=["accuracy"])
    axes = plots.history_figure({"one": study}, settings).axes[0]
    assert axes.get_ylim()[1] < 99


def test_what_exceeds_a_limit_is_never_trained(splits, monkeypatch):
    monkeypatch.setattr(trials, "train_members", None)
    study = optuna.create_study(direction="maximize")
    function = objective(karat, splits, limits={"parameters": 10, "memory": 1e9})
    study.optimize(function, n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert "over the limit: parameters" in trial.user_attrs["reason"]
    assert trial.constraints["parameters"] > 0 > trial.constraints["memory"]


@pytest.mark.parametrize(
    "fields", [{"accumulate": 4}, {"recompute": True}, {"precision": "bfloat16"}]
)
def test_what_takes_less_memory_is_counted_as_less(fields, splits):
    whole, less = (trials.costs(change(depth=4, **own), splits) for own in ({}, fields))
    kept, few = (one["memory"] - 16 * one["parameters"] / 2**20 for one in (whole, less))
    assert few < 0.6 * kept
    assert whole["flops"] == less["flops"] and whole["parameters"] == less["parameters"]
    more = trials.costs(change(depth=4, ema=0.9), splits)["memory"] - whole["memory"]
    assert more == pytest.approx(4 * whole["parameters"] / 2**20)


def test_divergence_and_a_lack_of_memory_prune_with_the_reason(splits, monkeypatch):
    def explode(trial):
        return change(learning_rate=1e35, weight_decay=1e35)

    study = optuna.create_study(direction="maximize")
    study.optimize(objective(explode, splits, seeds=2), n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert "2 of 2 seeds diverged, at step" in study.trials[0].user_attrs["reason"]

    def no_memory(*args):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(trials, "train_members", no_memory)
    study.optimize(objective(karat, splits), n_trials=1)
    assert study.trials[1].user_attrs["reason"] == "out of memory"

    def broken(*args):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(trials, "train_members", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        study.optimize(objective(karat, splits), n_trials=1)


def test_several_objectives(splits):
    names = ("accuracy", "parameters", "step_time")
    directions = [trials.OBJECTIVES[name] for name in names]
    study = optuna.create_study(directions=directions)
    study.optimize(objective(karat, splits, seeds=2, objectives=names), n_trials=2)
    for trial in study.trials:
        assert trial.values[1] == trial.user_attrs["cost"]["parameters"] and trial.values[2] > 0
    assert work.winners(study)


def test_a_study_of_other_directions_trains_nothing(splits, monkeypatch):
    monkeypatch.setattr(trials, "train_members", None)
    for study, names in (
        (optuna.create_study(), ("accuracy",)),  # would take the worst for the best
        (optuna.create_study(directions=["maximize", "minimize"]), ("accuracy",)),
        (optuna.create_study(direction="maximize"), ("accuracy", "flops")),
    ):
        with pytest.raises(ValueError, match=r"`objective` needs a study of directions .*, got"):
            study.optimize(objective(karat, splits, objectives=names), n_trials=1)


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0},
        {"seeds": 2.0},
        {"group": 0},  # which used to be all seeds
        {"objectives": ["speed"]},
        {"objectives": ["parameters"]},  # by whose direction accuracies were pruned
        {"objectives": ["accuracy", "accuracy"]},
        {"objectives": "accuracy"},
        {"limits": {"step_time": 1.0}},
        {"limits": {"memory": "1e6"}},
    ],
)
def test_bad_options_of_an_objective_name_themselves(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        objective(karat, **options)


def test_what_is_no_config_and_no_trial_of_a_study_is_named(splits):
    study = optuna.create_study(direction="maximize")
    with pytest.raises(ValueError, match="`space` that returns a kart.train.Config, got dict"):
        study.optimize(objective(lambda trial: {"operator": "G3B"}, splits), n_trials=1)
    with pytest.raises(ValueError, match="trial of a study, .*, got a FixedTrial"):
        objective(karat, splits)(optuna.trial.FixedTrial({"grid": 1}))


def test_a_pool_trains_trials_of_one_shape_together(splits, monkeypatch):
    calls = []

    def spy(configs, *args):
        calls.append(len(configs))
        return train_members(configs, *args)

    monkeypatch.setattr(trials, "train_members", spy)
    study = optuna.create_study(direction="maximize")
    load = lambda config: splits  # noqa: E731
    todo = trials.evaluation(learning_rate_only, load, seeds=2, group=4)
    tasks = [todo.prepare(study.ask()) for _ in range(2)]
    outcomes = todo.run(tasks)
    assert calls == [4]
    for task, outcome in zip(tasks, outcomes, strict=True):
        alone = train_members(task.members, splits, 2)
        wanted = np.mean([member.record["val_top1"] for member in alone])
        assert outcome.values[0] == pytest.approx(wanted, abs=0.06)  # a rounding may move an image


# pruner and sampler


def test_halving_keeps_the_best_third_of_those_that_came():
    study = optuna.create_study(direction="maximize", pruner=storage.Halving(1, 3))
    kept = []
    for value in (0.5, 0.4, 0.6, 0.7, 0.1, 0.65):
        trial = study.ask()
        trial.report(value, 1)
        kept.append(not trial.should_prune())
    # by hand: of 1, 2 and 3 the best one goes on, of 4 and 5 still one, of 6 two
    assert kept == [True, False, True, True, False, True]
    trial.report(0.0, 2)
    assert not trial.should_prune()  # 2 is no rung; 1, 3, 9 are
    trial.report(0.0, 3)
    assert not trial.should_prune()  # nobody else has come so far


def fake(trial):
    return trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("n", 0, 5)


def suggestions(breaks, sampler="tpe"):
    """Parameters of 14 trials, with a new process (sampler) at each number in `breaks`."""
    make = storage.SAMPLERS[sampler]
    memory = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=memory, study_name="s")
    while True:
        done = [t for t in study.trials if t.state == TrialState.COMPLETE]
        if len(done) == 14:
            return [t.params for t in done]
        if len(study.trials) == 0 or len(done) in breaks:
            study = optuna.load_study(
                study_name="s",
                storage=memory,
                sampler=storage.PerTrial(lambda seed: make(seed, False), 0, "arm"),
            )
        if len(done) in breaks:
            breaks = breaks - {len(done)}
            dead = study.ask()  # dies, and is retried
            fake(dead)
            study.tell(dead, state=TrialState.FAIL)
            storage.retry()(study, study.trials[-1])
        trial = study.ask()
        study.tell(trial, fake(trial))


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "nsga2"])
def test_resuming_and_retrying_does_not_change_what_is_suggested(sampler):
    whole = suggestions(set(), sampler)
    assert suggestions({3, 11, 12}, sampler) == whole
    assert len({tuple(params.values()) for params in whole}) > 10


# studies on disk

QUESTION = """
'''Which rate?

More words.
'''
import dataclasses
from kart import search
from kart.train import Config

CONFIG = Config(patch_size=4, embed_dim=8, depth=1, num_heads=1, epochs=3, batch_size=8,
                train_limit=24, operator="G1B:rank=2")

def arm(operator):
    def space(trial, config):
        rate = trial.suggest_float("learning_rate", 1e-3, {high}, log=True)
        size = trial.suggest_categorical("rank", [2, 3])
        return dataclasses.replace(config, operator=operator, learning_rate=rate, mlp_ratio=size)
    return space

STUDY = search.Study(config=CONFIG, arms={{"softmax": arm("softmax"), "G1": arm("G1B")}},
                     trials=6, seeds=2, confirm=2)
"""


def kart_study(argv):
    return cli.main(["study", *argv])


@pytest.fixture
def asked(tmp_path):
    """Path of a study file, and the flags of a run of it."""
    path = tmp_path / "rates.py"
    path.write_text(textwrap.dedent(QUESTION.format(high=1e-2)))
    flags = ["--val-limit", "20", "--threads", "1", "--quiet", "--group", "2"]
    return path, ["run", str(path), "--out", str(tmp_path / "out"), *flags]


def opened(directory):
    settings = storage.read_settings(directory)
    assert settings is not None
    return storage.studies(storage.open_database(storage.directory_url(directory)), settings)


def listed(directory):
    """What must not depend on how a study was interrupted."""
    return {
        arm: [
            (t.params, t.state, t.values, t.intermediate_values)
            for t in study.trials
            if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
        ]
        for arm, study in opened(directory).items()
    }


def contents(directory):
    # SQLite's own files come and go with its readers
    aside = (".lock", "study.db-shm", "study.db-wal")
    files = sorted(path for path in directory.iterdir() if path.name not in aside)
    wal = directory / "study.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0
    return {path.name: path.read_bytes() for path in files}


def test_a_study_runs_and_is_not_done_twice(asked, tmp_path, capsys):
    path, argv = asked
    assert kart_study(argv) == 0
    out = capsys.readouterr().out
    assert "softmax: learning_rate" in out and "test" in out and "report.html" in out
    arms = opened(tmp_path / "out")
    for study in arms.values():
        assert len(study.trials) == 3
        (one,) = work.confirmed(study).values()
        assert sorted(one.test) == [10_000, 10_001] and len(one.val) == 2
        assert work.winners(study)[0].key == one.key
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Which rate?" in page and "<svg" in page and "http-equiv" not in page
    assert 'src="http' not in page and "@import" not in page
    rows = (tmp_path / "out" / "trials.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 and rows[0].startswith("arm,trial,retry_of,state")
    before = listed(tmp_path / "out")
    assert kart_study(argv) == 0
    assert listed(tmp_path / "out") == before
    assert kart_study(["status", "--out", str(tmp_path / "out")]) == 0
    assert "rates/G1:" in capsys.readouterr().out
    # more trials of the same study
    assert kart_study([*argv, "--trials", "8", "--confirm", "0"]) == 0
    after = listed(tmp_path / "out")
    assert all(after[arm][:3] == before[arm] and len(after[arm]) == 4 for arm in after)


def interrupt_at(monkeypatch, call):
    calls = []

    def train_until(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return train_members(*args)

    monkeypatch.setattr(trials, "train_members", train_until)


def test_ctrl_c_leaves_a_study_that_goes_on_to_the_same_trials(asked, tmp_path, monkeypatch):
    path, argv = asked
    assert kart_study([*argv, "--confirm", "0"]) == 0
    whole = listed(tmp_path / "out")
    argv[argv.index("--out") + 1] = str(tmp_path / "stopped")
    for call in (2, 3):
        interrupt_at(monkeypatch, call)
        assert kart_study([*argv, "--confirm", "0"]) == 130
    monkeypatch.setattr(trials, "train_members", train_members)
    assert kart_study([*argv, "--confirm", "0"]) == 0
    assert listed(tmp_path / "stopped") == whole
    arms = opened(tmp_path / "stopped").values()
    assert sum(storage.original(t) != t.number for study in arms for t in study.trials) == 2


def test_trials_of_a_dead_process_are_retried_at_once(asked, tmp_path):
    path, argv = asked
    assert kart_study([*argv, "--confirm", "0", "--trials", "4"]) == 0
    study = opened(tmp_path / "out")["G1"]
    storage.ask(study)  # and then the process is gone
    assert kart_study([*argv, "--confirm", "0"]) == 0
    found = opened(tmp_path / "out")["G1"].trials
    assert [t.state == TrialState.FAIL for t in found] == [False, False, True, False]
    assert storage.original(found[3]) == 2


@pytest.mark.slow
def test_sigkill_at_any_moment_and_resume_gives_the_same_trials(asked, tmp_path):
    path, argv = asked
    argv += ["--confirm", "0", "--trials", "12"]
    assert kart_study(argv) == 0
    whole = listed(tmp_path / "out")
    argv[argv.index("--out") + 1] = str(tmp_path / "killed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for fraction in (0.2, 0.5):
        with subprocess.Popen([sys.executable, "-m", "kart", "study", *argv], env=env) as process:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                time.sleep(0.05)
                done = (tmp_path / "killed" / "study.json").exists() and sum(
                    len(one) for one in listed(tmp_path / "killed").values()
                )
                if done and done >= fraction * 12:
                    break
            process.send_signal(signal.SIGKILL)
    assert kart_study(argv) == 0
    assert listed(tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "2"], "config.epochs: 3 there, 2 now"),
        (["--seeds", "3"], "seeds: 2 there, 3 now"),
        (["--max-params", "1e6"], "limits"),
        (["--objectives", "accuracy,parameters"], "objectives"),
        (["--fix", "rank=2"], "fix"),
        (["--sampler", "random"], "sampler"),
    ],
)
def test_a_changed_study_is_refused_and_nothing_is_touched(asked, tmp_path, capsys, flags, named):
    path, argv = asked
    init = ["init", *argv[1:4], *argv[4:6], "--quiet", "--group", "2"]
    assert kart_study(init) == 0
    before = contents(tmp_path / "out")
    assert kart_study([*argv, *flags]) == 2
    error = capsys.readouterr().err
    assert named in error and "Nothing was changed" in error
    assert contents(tmp_path / "out") == before


def test_another_study_in_its_place_is_refused_by_name_alone(asked, tmp_path, capsys):
    path, argv = asked
    init = ["init", *argv[1:4], *argv[4:6], "--quiet", "--group", "2"]
    assert kart_study(init) == 0
    before = contents(tmp_path / "out")
    other = path.with_name("another.py")
    other.write_text(path.read_text() + "\n")
    assert kart_study([argv[0], str(other), *argv[2:]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"needs to be {path.stem!r}, which is in" in error and "got 'another'." in error
    assert contents(tmp_path / "out") == before


def test_other_versions_and_spaces_are_refused_and_nothing_is_touched(
    asked, tmp_path, capsys, monkeypatch
):
    path, argv = asked
    init = ["init", *argv[1:4], *argv[4:6], "--quiet", "--group", "2"]
    assert kart_study(init) == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr(storage, "versions", lambda: {"kart": "9", "torch": "1", "optuna": "1"})
    for argument in (argv, ["work", str(path), "--out", str(tmp_path / "out")]):
        assert kart_study(argument) == 2
        assert "versions.kart" in capsys.readouterr().err
    monkeypatch.undo()
    path.write_text(textwrap.dedent(QUESTION.format(high=2e-2)))
    for argument in (argv, ["work", str(path), "--out", str(tmp_path / "out")]):
        assert kart_study(argument) == 2
        assert "spaces.softmax.distributions.learning_rate" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_third_worker_on_sqlite_is_sent_to_postgresql(tmp_path):
    calls = []
    with (
        storage.worker_slot(tmp_path, lambda: calls.append(1)),
        storage.worker_slot(tmp_path, lambda: calls.append(2)),
        pytest.raises(ValueError, match="PostgreSQL"),
        storage.worker_slot(tmp_path, lambda: calls.append(3)),
    ):
        pass
    assert calls == [1]  # only who is alone recovers
    with storage.worker_slot(tmp_path, lambda: calls.append(4)):
        assert calls == [1, 4]


def test_grid_and_brute_try_all_points_once(asked, tmp_path):
    path, argv = asked
    flags = ["--sampler", "grid", "--levels", "2", "--trials", "99", "--confirm", "0"]
    assert kart_study([*argv, *flags, "--pool", "4"]) == 0
    for study in opened(tmp_path / "out").values():
        points = {tuple(sorted(trial.params.items())) for trial in study.trials}
        assert len(points) == len(study.trials) == 4
    argv[argv.index("--out") + 1] = str(tmp_path / "brute")
    assert kart_study([*argv, "--sampler", "brute"]) == 2
    flags = ["--sampler", "brute", "--fix", "learning_rate=0.01", "--confirm", "0"]
    assert kart_study([*argv, *flags]) == 0
    for study in opened(tmp_path / "brute").values():
        assert sorted(trial.params["rank"] for trial in study.trials) == [2, 3]


def test_a_point_that_failed_goes_back_to_its_queue(asked, tmp_path, monkeypatch, capsys):
    path, argv = asked
    argv += ["--sampler", "grid", "--levels", "2", "--trials", "99", "--confirm", "0"]
    argv += ["--set", "epochs=1"]
    whole, seen = trials.train_members, []

    def fails(configs, *args):
        seen.append(configs)
        if len(seen) in (2, 3):
            raise RuntimeError("the device is gone")
        return whole(configs, *args)

    monkeypatch.setattr(trials, "train_members", fails)
    monkeypatch.chdir(tmp_path)
    assert [kart_study(argv) for _ in range(3)] == [2, 2, 0]
    assert "G1: all of its 4 points, fewer than 49 trials" in capsys.readouterr().out
    for study in opened(tmp_path / "out").values():
        done = study.get_trials(states=(TrialState.COMPLETE,))
        assert len({tuple(sorted(trial.params.items())) for trial in done}) == len(done) == 4


def test_what_fails_again_and_again_is_not_tried_for_ever(asked, tmp_path, monkeypatch, capsys):
    path, argv = asked

    def fails(*args):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(trials, "train_members", fails)
    monkeypatch.chdir(tmp_path)
    argv += ["--sampler", "brute", "--fix", "learning_rate=0.01", "--fix", "rank=2"]
    argv += ["--trials", "2", "--confirm", "0", "--set", "epochs=1"]
    codes = [kart_study(argv) for _ in range(2 * (1 + storage.MAX_RETRIES) + 1)]
    assert codes == [2] * (len(codes) - 1) + [0]


def test_more_trials_are_more_points_of_a_grid(asked, tmp_path, capsys):
    path, argv = asked
    argv += ["--sampler", "grid", "--levels", "2", "--confirm", "0", "--set", "epochs=1"]
    assert kart_study([*argv, "--trials", "4"]) == 0
    assert "G1: 2 of its 4 points, drawn" in capsys.readouterr().out
    page, before = tmp_path / "out" / "report.html", listed(tmp_path / "out")
    assert "2 arms, 2 trials each" in page.read_text()
    assert kart_study([*argv, "--trials", "20"]) == 0
    assert "2 arms, 4 trials each" in page.read_text()  # of the 10 that it may have
    for arm, study in opened(tmp_path / "out").items():
        points = {tuple(sorted(trial.params.items())) for trial in study.trials}
        assert len(points) == len(study.trials) == 4
        assert listed(tmp_path / "out")[arm][:2] == before[arm]


def test_a_mistake_in_an_arm_is_named_with_its_line(asked, tmp_path, capsys):
    path, argv = asked
    path.write_text(path.read_text().replace("operator=operator", 'operator={}["none"]'))
    assert kart_study(argv) == 2
    error = capsys.readouterr().err
    line = next(i for i, t in enumerate(path.read_text().splitlines(), 1) if "none" in t)
    assert f"got 'softmax', which failed: {path}, line {line}: KeyError: 'none'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": "4"}, "trials is '4'"),
        ({"trials": 1}, "trials is 1"),
        ({"objectives": "accuracy"}, "objectives is 'accuracy'"),
        ({"objectives": ["speed"]}, r"objectives is \['speed'\]"),
        ({"seeds": None}, "seeds is None"),
        ({"spaces": {}}, "spaces are {}"),
        ({"limits": {"memory": "1"}}, "limits is"),
        ({"sampler": "zzz"}, "sampler is 'zzz'"),
        ({"heartbeat": 0}, "heartbeat is 0"),
        ({"dataset": {}}, "dataset is {}"),
        ({"more": 1}, "more"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"null", "mapping"),
    ],
)
def test_settings_that_were_edited_are_named(change, words, tmp_path):
    whole = {
        **{name: "" for name in ("study", "named", "question", "source")},
        **dict.fromkeys(("versions", "config", "limits", "fix"), {}),
        **{"spaces": {"a": {}, "b": {}}, "dataset": {"train": 1, "val": 1}, "val_limit": None},
        **{"objectives": ["accuracy"], "sampler": "tpe", "pruner": "none", "trials": 2},
        **dict.fromkeys(("seeds", "sampler_seed", "levels", "group", "confirm", "heartbeat"), 1),
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(whole))
    assert storage.read_settings(tmp_path) == storage.Settings(**whole)
    text = change if isinstance(change, bytes) else json.dumps({**whole, **change}).encode()
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"a whole study.json .*{words}"):
        storage.read_settings(tmp_path)


def test_flags_that_every_arm_overrides_are_refused(asked, tmp_path, capsys):
    path, argv = asked
    path.write_text(path.read_text().replace("operator=operator", "operator=operator, epochs=2"))
    assert kart_study([*argv, "--epochs", "5"]) == 2
    assert "fields that the arms leave alone, got 'epochs'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fixed_parameter_that_is_not_asked_for_is_refused(asked, tmp_path, capsys):
    path, argv = asked
    last = 'trial.suggest_categorical("rank", [2, 3])'
    behind = f'2 if trial.suggest_categorical("kind", ["a", "b"]) == "a" else {last}'
    path.write_text(path.read_text().replace(last, behind))
    init = ["init", *argv[1:4], "--group", "1", "--fix", "rank=3", "--fix"]
    assert kart_study([*init, "kind=a"]) == 2
    assert "got 'rank', which no arm asks for with kind=a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert kart_study([*init, "kind=b"]) == 0


def test_winners_are_confirmed_with_seeds_that_no_arm_has_used(asked, tmp_path):
    path, argv = asked
    # one arm that sets a seed of its own, among those that winners are confirmed with as a rule
    own = 'operator=operator, seed=10_000 if operator == "softmax" else 0'
    path.write_text(path.read_text().replace("operator=operator", own))
    assert kart_study([*argv[:-1], "1", "--set", "epochs=1"]) == 0  # of --group
    arms = opened(tmp_path / "out")
    trained = [one for study in arms.values() for one in work.candidates(study)]
    used = {seed for one in trained for seed in one.scores}
    assert 10_001 in used
    fresh = [set(one.val) for study in arms.values() for one in work.confirmed(study).values()]
    assert len(fresh) == 2 and fresh[0] == fresh[1] and not fresh[0] & used


def test_other_data_are_refused_by_a_worker_and_for_the_winners(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))
    path, out = tmp_path / "rates.py", ["--out", str(tmp_path / "out")]
    text = textwrap.dedent(QUESTION.format(high=1e-2)).replace("train_limit=24, ", "")
    path.write_text(text)
    flags = ["--threads", "1", "--quiet"]
    for name, start in (("own", 0), ("same", 0), ("other", 100)):
        save_folder(tmp_path / name, 40, size=(8, 8), start=start)
    own, same, other = (["--data", str(tmp_path / name)] for name in ("own", "same", "other"))
    tiny = ["--set", "epochs=1", "--trials", "2", "--seeds", "1", "--group", "1", "--confirm", "0"]
    assert kart_study(["init", str(path), *out, *flags, *tiny, *own]) == 0
    for refused, argv in (
        (True, ["work", str(path), *out, *flags, *other]),
        (False, ["work", str(path), *out, *flags, *same]),
        (True, ["report", *out, *flags, "--confirm", "1", *other]),
        (False, ["report", *out, *flags, "--confirm", "1", *same]),
    ):
        capsys.readouterr()
        assert kart_study(argv) == 2 * refused
        error = capsys.readouterr().err
        assert ("dataset.images.train" in error) == refused
    assert all(map(work.confirmed, opened(tmp_path / "out").values()))


def test_the_command_for_workers_can_be_pasted(asked, tmp_path, capsys):
    path, argv = asked
    out = str(tmp_path / "my runs $1")
    assert kart_study(["init", str(path), "--out", out, *argv[4:]]) == 0
    told = capsys.readouterr().out.partition("start workers with: ")[2]
    assert shlex.split(told) == ["kart", "study", "work", str(path), "--out", out]


def test_a_search_that_is_not_finished_says_so(asked, tmp_path, capsys):
    path, argv = asked
    assert kart_study([*argv, "--timeout", "0"]) == 0
    told = "the search is not finished; the same command goes on"
    assert told in capsys.readouterr().out
    flags = ["--threads", "1", "--quiet", "--timeout"]
    for seconds, wanted in (("0", told), ("9999", "finished; write the report with:")):
        argv = ["work", str(path), "--out", str(tmp_path / "out"), *flags, seconds]
        assert kart_study(argv) == 0
        assert capsys.readouterr().out.startswith(wanted)


def test_an_answer_that_fails_is_named_and_what_was_confirmed_is_kept(asked, tmp_path, capsys):
    path, argv = asked
    path.write_text(path.read_text().replace("confirm=2", "confirm=1, answer=lambda found: 1 / 0"))
    assert kart_study([*argv, "--trials", "2", "--set", "epochs=1"]) == 2
    error = capsys.readouterr().err
    assert "`answer` of 'rates' failed: " in error and "ZeroDivisionError" in error
    (command,) = re.findall(r"`kart study (report [^`]*)`", error)
    assert kart_study(shlex.split(command)) == 0
    assert "fresh seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"config": {"epochs": 1}}, "a kart.train.Config as `config`"),
        ({"arms": {}}, "`arms` as a dict"),
        ({"arms": [karat]}, "`arms` as a dict"),
        ({"arms": {"one": lambda trial: TINY}}, r"`arms` of functions .* as 'one'"),
        ({"seeds": 2.5}, "`seeds` of type int, got 2.5"),
        ({"sampler": None}, "`sampler` of type str"),
        ({"answer": "softmax"}, "`answer` as a function"),
        ({"tiny": None}, "`tiny` as a dict of fields .* got None"),
        ({"tiny": {"epoch": 1}}, "`tiny` as a dict of fields .* got 'epoch'. Near matches: epochs"),
        ({"tiny": {"arms": {}}}, "`tiny` as a dict of fields .* got 'arms'"),
    ],
)
def test_a_study_of_other_kinds_is_refused(fields, words):
    with pytest.raises(ValueError, match=f"`Study` needs {words}"):
        search.Study(**{"config": TINY, "arms": {"one": karat}, **fields})


def test_a_file_may_hold_dataclasses_and_is_read_anew(tmp_path):
    path = tmp_path / "own.py"
    text = """
from __future__ import annotations
import dataclasses
from kart import search
from kart.train import Config

@dataclasses.dataclass
class Setting:
    epochs: int = 1

STUDY = search.Study(Config(epochs=Setting().epochs), {"one": lambda trial, config: config})
"""
    for epochs in (1, 2):
        path.write_text(text.replace("= 1", f"= {epochs}"))
        assert question.load(str(path)).study.config.epochs == epochs


def test_the_commands_on_the_page_run_when_pasted(asked, tmp_path):
    path, argv = asked
    argv[argv.index("--out") + 1] = str(tmp_path / "a b")
    assert kart_study([*argv, "--confirm", "0", "--trials", "2"]) == 0
    text = html.unescape((tmp_path / "a b" / "report.html").read_text())
    lines = re.findall(r"kart study ((?:work|report) [^<#\n]*--out [^<#\n]*)", text)
    assert [line.split()[0] for line in lines] == ["report", "work", "report"]
    for line in lines:
        threads = (
            [] if line.split()[0] == "report" and "--confirm" not in line else ["--threads", "1"]
        )
        assert kart_study([*shlex.split(line), *threads, "--quiet"]) == 0
    (url,) = re.findall(r"optuna-dashboard ([^<#\n]*)", text)
    assert Path(shlex.split(url)[0].removeprefix("sqlite:///")).exists()
    rows = report.result_rows(opened(tmp_path / "a b"), storage.read_settings(tmp_path / "a b"))
    for row in rows:
        for one in (row.search, row.val, row.test):
            assert one is not None and 0 <= one.low <= one.mean <= one.high <= 1
    assert rows[0].difference is None and rows[1].difference is not None
    assert rows[0].test is not None and rows[0].test.n == 5


@pytest.mark.parametrize(
    ("searched", "value", "shown"),
    [
        (FloatDistribution(1e-4, 1e-2, log=True), 8e-3, "x 0.008 (upper end)"),
        (FloatDistribution(1e-4, 1e-2, log=True), 7.9e-3, "x 0.0079"),
        (FloatDistribution(0.0, 1.0), 0.05, "x 0.05 (lower end)"),
        (FloatDistribution(0.0, 1.0, step=0.01), 0.01, "x 0.01"),
        (FloatDistribution(0.5, 0.5), 0.5, "x 0.5"),
        (IntDistribution(1, 64, log=True), 64, "x 64 (upper end)"),
        (IntDistribution(1, 64), 63, "x 63"),
        (CategoricalDistribution([2e-3, 5e-4, 1e-3]), 2e-3, "x 0.002 (upper end)"),
        (CategoricalDistribution([2e-3, 5e-4, 1e-3]), 1e-3, "x 0.001"),
        (CategoricalDistribution([1e-3]), 1e-3, "x 0.001"),
        (CategoricalDistribution(["a", 1]), 1, "x 1"),
        (CategoricalDistribution([True, False]), True, "x True"),
    ],
)
def test_what_lies_at_an_end_of_what_was_searched_says_so(searched, value, shown):
    trial = optuna.trial.create_trial(params={"x": value}, distributions={"x": searched}, value=0.5)
    assert report.describe(trial) == shown


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_importances_are_of_good_values(direction):
    # among the good ones only `fine` matters; `coarse` separates the bad from the worse
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(0))
    sign = 1 if direction == "maximize" else -1

    def value(trial):
        fine, coarse = trial.suggest_float("fine", 0, 1), trial.suggest_float("coarse", 0, 1)
        return sign * (1 + fine if fine > 0.9 else -coarse)

    study.optimize(value, n_trials=200)
    found = plots.importances(study)
    assert found["fine"] > 0.9 and sum(found.values()) == pytest.approx(1)
    few = optuna.create_study(direction=direction)
    few.add_trials(study.trials[:7])
    assert plots.importances(few) == {}
    for trial in study.trials[7:9]:  # of which none are counted
        trial.values = [math.inf]
        few.add_trial(trial)
    assert plots.importances(few) == {}


def test_several_objectives_have_a_front_in_the_report(asked, tmp_path):
    path, argv = asked
    flags = ["--objectives", "accuracy,parameters", "--sampler", "nsga2", "--confirm", "0"]
    assert kart_study([*argv, *flags]) == 0
    assert "Accuracy against cost" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "grid_rank_sharng", "--out", "x"], "grid_rank_sharing"),
        (["run", "nowhere.py", "--out", "x"], "needs a file"),
        (["run", "grid_rank_sharing"], "`--out DIR`"),
        (["run", "grid_rank_sharing", "--out", "x", "--set", "epoch=3"], "epochs"),
        (["run", "grid_rank_sharing", "--out", "x", "--set", "recipe=paper"], "got 'recipe'"),
        (["run", "grid_rank_sharing", "--out", "x", "--trials", "0"], "at least 2"),
        (["run", "grid_rank_sharing", "--out", "x", "--storage", "sqlite:///a.db"], "`--out DIR`"),
        (
            ["run", "grid_rank_sharing", "--out", "x", "--pruner", "asha"]
            + ["--objectives", "accuracy,flops"],
            "`--pruner` needs one objective",
        ),
        *(
            (["run", "grid_rank_sharing", "--tiny", "--out", "x", *flags.split()], words)
            for flags, words in (
                ("--set recipe=small", "got 'recipe'"),
                ("--set trajectory=5", "got 'trajectory'"),
                ("--set start=runs", "got 'start'"),
                ("--set threads=2", "give `--threads`"),
                ("--set device=cuda", "give `--device`"),
                ("--epochs 2 --set epochs=1", "got 'epochs' beside `--epochs`"),
                # the lowest of those that the arms search
                ("--set learning_rate=0.0005", "got 'learning_rate'"),
                ("--set ema_warmup=false", "`--set ema_warmup` has no effect without"),
                ("--set eval_crop=0.99", "`--set eval_crop` has no effect on images of 8 pixels"),
                ("--set warmup_epochs=0.01", "`--set warmup_epochs` has no effect in a run of 2"),
                ("--seeds 2 --group 3", "`--group` needs at most the 2 seeds of a trial, got 3"),
                ("--pruner asha", "no effect on runs of one epoch"),
                ("--set pruner=asha", "no effect on runs of one epoch"),
                (
                    "--epochs 2 --set pruner=asha --objectives accuracy,flops",
                    "`--pruner` needs one objective",
                ),
                ("--storage-timeout 3", "`--storage-timeout` needs `--storage`"),
            )
        ),
        (
            ["run", "placement", "--tiny", "--out", "x", "--sampler", "grid", "--levels", "2"],
            "`--levels` has no effect on a study that searches no interval",
        ),
        *(
            (
                [*argv.split(), "--out", "x", "--storage", "postgresql://user@host/kart"],
                "needs `--out` or `--storage`",
            )
            for argv in ("init grid_rank_sharing", "work grid_rank_sharing", "status")
        ),
        *(
            (["report", "--out", "x", *flags.split()], "needs `--confirm`")
            for flags in ("--data digits", "--device cpu", "--threads 1", "--code colorsys")
        ),
        (["work", "grid_rank_sharing", "--out", "nowhere"], "without study.json"),
        (["work", "grid_rank_sharing", "--storage", "not a url"], "postgresql://"),
    ],
)
def test_mistakes_are_explained(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kart_study(argv) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_of_something_else_is_refused(asked, tmp_path, capsys):
    path, argv = asked
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert kart_study(argv) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_importing_kart_does_not_import_optuna_and_its_absence_is_explained():
    code = textwrap.dedent(
        """
        import sys
        import kart, kart.cli, kart.train, kart.population, kart.models
        assert "optuna" not in sys.modules
        sys.modules["optuna"] = None
        try:
            import kart.search
        except ImportError as error:
            assert "kart-attention[studies]" in str(error)
        else:
            raise SystemExit("kart.search imported without optuna")
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"study": "another"}, "every arm of 'another', got one without"),
        ({"spaces": {"nobody": {}}}, "without 'nobody'"),
        ({"unknown": 1}, "settings of this version"),
    ],
)
def test_a_database_whose_settings_do_not_fit_it_is_refused(change, words, tmp_path):
    home = work.home(str(tmp_path), None)
    database = storage.open_database(home.url, 60, create=True)
    one = optuna.create_study(study_name="rate/softmax", storage=database)
    plain = {name: None for name in storage.Settings.__dataclass_fields__}
    plain |= {"study": "rate", "spaces": {"softmax": {}}, "sampler": "random", "pruner": "none"}
    one.set_user_attr("settings", {**plain, **change})
    with pytest.raises(ValueError, match=words):
        for settings in storage.read_database(database).values():
            storage.studies(database, settings)
    database.engine.dispose()


# what is searched on, and what is said where nothing was found


def test_a_limit_of_validation_images_leaves_out_no_class(tmp_path, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))
    root = save_folder(tmp_path / "set" / "train", 30).parent
    save_folder(root / "val", 30, start=100)
    save_folder(root / "test", 6, start=200)
    config = change(data=str(root))
    whole = train.load_data(config).val
    read = train.load_data
    for streams in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(train, "load_data", lambda one, s=streams: read(one, stream=s))
            val = trials.loader(9)(config).val
        assert val.counts == (3, 3, 3)
        pixels = {image.tobytes() for image in np.asarray(whole.images)}
        assert {image.tobytes() for image in np.asarray(val.images)} < pixels
    # where classes are mixed the first are as good as any
    mixed = train.load_data(TINY).val
    first = trials.loader(20)(TINY).val
    assert np.array_equal(first.images, mixed.images[:20])
    with pytest.raises(ValueError, match="`val_limit` needs at most the 30 validation images"):
        trials.loader(31)(config)


def test_an_arm_without_a_value_says_why(asked, capsys):
    path, flags = asked
    assert kart_study([*flags, "--trials", "2", "--max-params", "10"]) == 0
    text = capsys.readouterr().out
    assert ": no value yet, of its trials 1 pruned; the last over the limit: parameters " in text


def test_a_study_streams_its_images_where_its_config_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))
    config = change(data=str(save_folder(tmp_path / "set", 60)))
    load = trials.loader()
    assert isinstance(load(config).train.images, np.ndarray)
    streamed = load(dataclasses.replace(config, stream=True)).train.images
    assert isinstance(streamed, data.Pictures)


# what is shown, and what is done again


def completed(values, **attrs):
    study = optuna.create_study(direction="maximize")
    for value, params in values:
        kinds = {
            name: optuna.distributions.CategoricalDistribution([one])
            if not isinstance(one, float)
            else optuna.distributions.FloatDistribution(0.0, 9.0)
            for name, one in params.items()
        }
        study.add_trial(
            optuna.trial.create_trial(
                value=value,
                params=params,
                distributions=kinds,
                user_attrs={"scores": {}, **attrs},
            )
        )
    return study


def test_names_of_the_users_own_are_no_formulas_and_choices_of_any_kind(tmp_path):
    odd = "cost $x_{$ <b>"
    study = completed([(0.1, {odd: 0.5}), (0.2, {odd: 1.0}), (0.3, {odd: 2.0})])
    settings = SimpleNamespace(objectives=["accuracy"])
    interval = report.Interval(0.5, 0.4, 0.6, 3)
    choices = completed([(0.1, {odd: None}), (0.2, {odd: "$y_{$"}), (0.3, {odd: True})])
    for figure in (
        plots.history_figure({odd: study}, settings),
        plots.slice_figure(study, settings),
        plots.slice_figure(choices, settings),
        plots.importance_figure({odd: 1.0}, "black"),
        plots.confirmation_figure([(odd, (interval, interval, None))]),
    ):
        shown = html.unescape(pages.figure(figure, "odd", "alt"))
        assert "cost $x_{$" in shown


def test_ticks_of_a_logarithmic_parameter_are_its_values():
    kind = optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    study = optuna.create_study(direction="maximize")
    for rate in (1.64e-3, 1e-2, 2.46e-2):  # which used to be at 0.002 and 0.02
        made = {"params": {"rate": rate}, "distributions": {"rate": kind}}
        study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"scores": {}}, **made))
    figure = plots.slice_figure(study, SimpleNamespace(objectives=["accuracy"]))
    (axes,) = figure.axes
    for place, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(text.get_text()) == pytest.approx(place, rel=0.05)


def test_a_winner_whose_fresh_seeds_all_diverged_says_so(tmp_path):
    about = {"key": "k", "config": TINY.asdict(), "scores": {"0": 0.5}, "n": 1}
    study = completed([(0.5, {})], cost={"parameters": 1.0}, **about)
    entry = work.Confirmed("k", about["config"], [0.5], {}, {}, [10_000, 10_001], 1.0, 9)
    study.set_user_attr("confirmed", [entry._asdict()])
    settings = SimpleNamespace(objectives=["accuracy"], dataset={"val": 9}, confirm=2)
    (line,) = report.lines({"one": study}, settings)
    assert line.endswith("%; 2 of the fresh seeds diverged")
    view = report.View({"one": study}, settings, "--out x", tmp_path)
    assert "2 diverged" in "".join(report._outcome(view).blocks)


def test_a_command_for_workers_holds_the_whole_name():
    settings = SimpleNamespace(named="a--b.py")
    view = report.View({}, settings, "a--b --storage postgresql://host/kart", Path("x"))
    assert report._command("work", view) == (
        "kart study work a--b.py --storage postgresql://host/kart"
    )
    view = view._replace(where="--out 'a?b'")
    assert "sqlite:///a%3Fb/study.db" in report.rerun(view)


def test_a_winner_of_which_a_seed_diverged_is_not_confirmed_again(monkeypatch):
    about = {"key": "k", "config": TINY.asdict(), "scores": {"0": 0.5}}
    study = completed([(0.5, {})], **about)
    entry = work.Confirmed("k", about["config"], [0.5], {10_000: 0.5}, {10_000: 0.4}, [10_001], 1.0)
    study.set_user_attr("confirmed", [entry._asdict()])
    settings = SimpleNamespace(val_limit=None, group=1)

    def trains(*args):
        raise AssertionError("what has been confirmed is trained again")

    monkeypatch.setattr(work, "train_members", trains)
    work.confirm({"one": study}, settings, 2, {}, quiet=True)
    with pytest.raises(AssertionError, match="trained again"):
        work.confirm({"one": study}, settings, 3, {}, quiet=True)
