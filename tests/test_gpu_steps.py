"""Steps as CUDA graphs, with a CPU in the place of the GPU; on a GPU see tests/test_gpu.py."""

import dataclasses

import pytest
import torch
from torch.func import vmap
from torch.testing import assert_close

from kart import cli, gpu, models, population, runs, train, tree


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Replays by calling again and writing over the first result, as a graph does."""

    def record(call, device):
        assert device.type == "cpu"
        result = tree.map(torch.clone, call())
        recorded.append(call)
        return lambda: gpu._copy(result, call()), result

    recorded = []
    monkeypatch.setattr(gpu, "record", record)
    return recorded


@pytest.fixture
def graphs(monkeypatch):
    """Runs on the CPU take graphs, which are emulated."""

    def recorded(config, step, *, donate=False):
        return gpu.replayed(step, donate=donate)

    monkeypatch.setattr(train, "whole", recorded)


def setting():
    config = train.Config(operator="G3B", epochs=2, batch_size=4, ema=0.9)
    model = models.create("vit_nano", operator="G3B", depth=1, image_size=16, patch_size=8)
    functions = train.program(config, model, 10)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(4, 3, 16, 16, generator=generator),
            torch.nn.functional.one_hot(torch.arange(4) + i, 1000).float(),
        )
        for i in range(3)
    ]
    hyper = train.Hyper(torch.tensor(1e-3), torch.tensor(0.05))
    return functions, functions.init(generator), hyper, batches


def same(found, wanted):
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), found, wanted)


@pytest.mark.parametrize("name", ["step", "advance"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_replayed_step_is_the_step(name, donate, emulated):
    functions, state, hyper, batches = setting()
    step = gpu.replayed(getattr(functions, name), donate=donate)
    eager, start = state, tree.map(torch.clone, state)
    states = [state]
    for batch in batches:
        eager, metrics = functions.step(eager, hyper, *batch)
        found, own = step(states[-1], hyper, *batch)
        assert_close(own, metrics)
        tree.map(lambda a, b: assert_close(a, b), found, eager)
        states.append(found)
    assert len(emulated) == 1
    same(state, start)
    pointers = [{x.data_ptr() for x in tree.leaves(one)} for one in states]
    if donate:
        assert pointers[1] == pointers[2] == pointers[3]
    else:
        assert not pointers[1] & pointers[2]


def test_a_state_from_elsewhere_goes_in_and_other_shapes_are_recorded_again(emulated):
    functions, state, hyper, batches = setting()
    step = gpu.replayed(functions.advance, donate=True)
    wanted = functions.step(state, hyper, *batches[1])[0]
    step(state, hyper, *batches[0])
    found, _ = step(state, hyper, *batches[1])
    tree.map(lambda a, b: assert_close(a, b), found, wanted)
    # an epoch ends: one leaf of the state is another
    fresh = found._replace(loss_sum=torch.zeros(()))
    wanted = functions.step(tree.map(torch.clone, fresh), hyper, *batches[2])[0]
    tree.map(lambda a, b: assert_close(a, b), step(fresh, hyper, *batches[2])[0], wanted)
    smaller = [x[:2] for x in batches[2]]
    wanted = functions.step(state, hyper, *smaller)[0]
    tree.map(lambda a, b: assert_close(a, b), step(state, hyper, *smaller)[0], wanted)
    assert len(emulated) == 2


def test_a_population_is_replayed():
    functions, state, hyper, batches = setting()
    states, hypers = (tree.stack([x, x]) for x in (state, hyper))
    pairs = [torch.stack(x) for x in zip(*batches[:2], strict=True)]
    wanted, metrics = vmap(functions.step)(states, hypers, *pairs)
    found, own = gpu.replayed(vmap(functions.step))(states, hypers, *pairs)
    tree.map(lambda a, b: assert_close(a, b), (found, own), (wanted, metrics))


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_what_is_donated_stays_in_the_graph(seeds, graphs):
    config = train.Config(step="graph", depth=1, train_limit=32)
    run = population.run(population.seeds(config, seeds), train.load_data(config))
    state = run.init()
    states = [state := run.advance(state, run.hyper, *run.batch(i))[0] for i in range(2)]
    tree.map(lambda a, b: a is b or pytest.fail("a copy"), *states)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_graph_needs_a_gpu(seeds):
    config = train.Config(step="graph", train_limit=32)
    splits = train.load_data(config)
    with pytest.raises(ValueError, match="`step` not \"graph\" on device 'cpu', got 'graph'"):
        population.run(population.seeds(config, seeds), splits)
    assert dataclasses.replace(config, recompute=True).step == "graph"


def test_a_run_by_graphs_is_scored_and_looked_at_elsewhere(tmp_path, graphs, capsys):
    config = train.Config(operator="G2B", step="graph", depth=1, epochs=1, train_limit=64)
    splits = train.load_data(config)
    for spec in ("softmax", "G2B"):
        one = dataclasses.replace(config, operator=spec)
        for record in runs.execute(tmp_path / spec, [one], splits):
            assert record["diverged"] == -1
    assert cli.main(["eval", str(tmp_path), "--device", "cpu"]) == 0
    assert cli.main(["analyse", str(tmp_path), "--sections", "cost"]) == 0
    assert "G2B" in capsys.readouterr().out


def test_batches_are_those_of_the_steps_in_turn():
    made = []
    batches = gpu.ahead(lambda step: made.append(step) or step, range(3, 6), "cpu")
    assert next(batches) == 3 and made == [3]
    assert list(batches) == [4, 5]
