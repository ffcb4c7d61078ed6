"""Modules: thin over the pure functions, and good citizens of torch."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.testing import assert_close

from kart import bases, models, nn, operators, tree

SPECS = ["softmax", "G3B:rank=3", "rational-3/2B:rank=2", "2*softmax+2*G2B:rank=2"]
HEADS, TOKENS, DIM = 4, 7, 16


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def attention(spec="G3B:rank=3", **options):
    return nn.Attention(DIM, HEADS, TOKENS, spec, generator=source(), **options)


def tokens(*shape, seed=1):
    return torch.randn(*shape, DIM, generator=source(seed))


def qkv(queries=TOKENS, keys=TOKENS, heads=HEADS, groups=HEADS):
    draw = source(2)
    q = torch.randn(2, heads, queries, 3, generator=draw)
    k, v = (torch.randn(2, groups, keys, 3, generator=draw) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("spec", SPECS)
def test_an_operator_module_is_its_pure_function(spec):
    module = nn.operator(spec, HEADS, TOKENS, generator=source())
    op = operators.parse(spec).operator
    params = op.init(source(), HEADS, TOKENS)
    assert {name: p.shape for name, p in module.named_parameters()} == {
        name: leaf.shape for name, leaf in tree.named(params).items()
    }
    q, k, v = qkv()
    mask = torch.rand(2, 1, TOKENS, TOKENS, generator=source(3)) > 0.3
    assert_close(module(q, k, v, mask), op.attend(params, q, k, v, mask), rtol=0, atol=0)
    scores = q @ k.mT * 3**-0.5
    assert_close(module.weights(q, k, mask), op.weights(params, scores, mask), rtol=0, atol=0)


def test_attention_is_written_out_by_hand():
    module, x = attention("softmax"), tokens(2, TOKENS)
    qkv = x @ module.qkv.weight.T + module.qkv.bias
    q, k, v = (t.view(2, TOKENS, HEADS, 4).transpose(1, 2) for t in qkv.chunk(3, -1))
    out = (q @ k.mT / 2).softmax(-1) @ v
    expected = out.transpose(1, 2).reshape(2, TOKENS, DIM) @ module.proj.weight.T
    assert_close(module(x), expected + module.proj.bias)


@pytest.mark.parametrize("spec", SPECS)
def test_causal_attention_does_not_see_what_comes_later(spec):
    module, x = attention(spec), tokens(2, TOKENS)
    y = module(x, is_causal=True)
    changed = x.clone()
    changed[:, 4:] += 1
    assert_close(module(changed, is_causal=True)[:, :4], y[:, :4])
    # every later token feels it, whatever becomes of one number
    assert (module(changed, is_causal=True) - y)[:, 4:].norm(dim=-1).min() > 1e-4
    lower = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert_close(module(x, mask=lower), y)
    # a mask of keys beside it
    keys = torch.tensor([True] * 5 + [False] * 2)
    both = module(x, mask=keys[None, None, None], is_causal=True)
    assert_close(both, module(x, mask=lower & keys))


def test_context_is_attended_to():
    module, x, context = attention(), tokens(2, 3), tokens(2, TOKENS, seed=5)
    q = torch.nn.functional.linear(x, module.qkv.weight[:DIM], module.qkv.bias[:DIM])
    kv = torch.nn.functional.linear(context, module.qkv.weight[DIM:], module.qkv.bias[DIM:])
    k, v = kv.chunk(2, -1)
    out = module.operator(*(nn.split_heads(t, HEADS) for t in (q, k, v)))
    assert_close(module(x, context=context), module.proj(nn.merge_heads(out)))
    assert_close(module(context, context=context), module(context))


class Adapted(torch.nn.Module):
    """A projection with something beside it, and the weight of the first for its own."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, torch.nn.Linear(DIM, first.out_features)
        self.weight, self.bias = first.weight, first.bias

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_a_projection_in_place_of_ours_projects_the_context_too():
    layer, x = attention(), tokens(2, TOKENS)
    layer.qkv = Adapted(layer.qkv)
    assert_close(layer(x, context=x.clone()), layer(x))
    assert_close(layer(x[:, :3], context=x), layer(x)[:, :3])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_are_repeated_keys(groups):
    module = nn.operator("G3B:rank=3", HEADS, TOKENS)
    q, k, v = qkv(groups=groups)
    repeated = [torch.stack([t[:, h * groups // HEADS] for h in range(HEADS)], 1) for t in (k, v)]
    assert_close(module(q, k, v), module(q, *repeated))
    layer = attention(kv_heads=groups)
    assert layer.qkv.out_features == DIM + 2 * groups * 4
    assert layer(tokens(2, TOKENS)).shape == (2, TOKENS, DIM)


# weights by the place of the query, alone and among heads of a fixed number of keys
BY_PLACE = ["softconv:prefix=0,rows=1", "static:inside=true", "G2:order=by_offset,prefix=0,rows=1"]
BY_PLACE += ["2*G2:order=by_distance+2*G2:rank=2", "softmax+2*softconv:prefix=0,rows=1+G2:rank=2"]


@pytest.mark.parametrize("spec", [*SPECS, *BY_PLACE])
@pytest.mark.parametrize("groups", [2, 4])
def test_tokens_in_parts_equal_one_causal_pass(spec, groups):
    module = nn.Attention(DIM, HEADS, TOKENS, spec, kv_heads=groups, generator=source()).double()
    x = tokens(2, TOKENS).double()
    noise = source(3)
    with torch.no_grad():  # tables that start at zero say nothing
        for leaf in module.parameters():
            leaf.add_(0.3 * torch.randn(leaf.shape, generator=noise))
    whole, cache, parts = module(x, is_causal=True), None, []
    for part in x.split([3, 1, 1, 2], 1):
        y, cache = module.step(part, cache)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    assert cache.keys.shape == (2, HEADS, TOKENS, 4)


def test_state_dict_round_trip():
    one = attention()
    other = nn.Attention(DIM, HEADS, TOKENS, "G3B:rank=3", generator=source(9))
    x = tokens(2, TOKENS)
    assert (one(x) - other(x)).abs().max() > 1e-4
    names = {"operator.units.coefs", "operator.mix", "qkv.weight", "proj.bias"}
    assert names <= set(one.state_dict())
    other.load_state_dict(one.state_dict())
    assert_close(other(x), one(x), rtol=0, atol=0)


def test_a_state_dict_of_other_functions_is_refused():
    one, buffer = attention("G3B:rank=3"), io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    stored = torch.load(buffer)
    assert list(stored) == list(dict(stored)) == list(dict(one.named_parameters()))
    other = attention("polynomial-5B:rank=3")
    words = "`operator` needs parameters of 'polynomial-5B:rank=3', got those of 'G3B:rank=3', whi"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=words):
            other.load_state_dict(stored, strict=strict)
    other.load_state_dict(dict(stored))  # which says nothing but tensors
    # what parameters are drawn from, and what comes behind the functions, may differ
    attention("G3B:rank=3,init=paper,base=softmax,project=simplex").load_state_dict(stored)
    # as may what another version says
    stored._metadata["operator"]["meaning"] |= {"one_more": 3}
    one.load_state_dict(stored)
    lattices = [nn.operator(spec, HEADS, 17) for spec in ("gated", "gated:prefix=1,rows=4")]
    lattices[0].load_state_dict(lattices[1].state_dict())
    with pytest.raises(RuntimeError, match="needs parameters of 'gated', got those of 'gated:row"):
        lattices[0].load_state_dict(nn.operator("gated:rows=2", HEADS, 17).state_dict())
    moved = nn.operator("relative", HEADS, 17).resize(17, (1, 2, 7))
    moved.load_state_dict(moved.state_dict())
    nn.operator("gated:locality=2.0", HEADS, 17).load_state_dict(lattices[0].state_dict())


def test_a_state_dict_without_parameters_of_the_operator_is_taken():
    donor, ours = attention("softmax"), attention("G3B:rank=3")
    missing, unexpected = ours.load_state_dict(donor.state_dict(), strict=False)
    assert missing == ["operator.mix", "operator.units.coefs"]
    assert not unexpected
    assert torch.equal(ours.qkv.weight, donor.qkv.weight)
    attention("sigmoid").load_state_dict(donor.state_dict())
    unexpected = donor.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
    assert unexpected == missing


def test_a_state_dict_of_numbers_of_numpy_is_read_as_tensors_alone():
    basis, buffer = bases.morlet(omega=np.float64(4.0)), io.BytesIO()
    one = nn.operator(operators.low_rank(basis, rank=3), HEADS, 17)
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    one.load_state_dict(torch.load(buffer, weights_only=True))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


needs_recipes = pytest.mark.skipif("recipe" not in bases.Basis._fields, reason="no basis pickles")


@pytest.mark.parametrize(
    ("spec", "copied"),
    [
        ("softmax", copy.deepcopy),
        ("softmax", pickled),
        ("rational-3/2B:rank=2", copy.deepcopy),
        pytest.param("rational-3/2B:rank=2", pickled, marks=needs_recipes),
        pytest.param("G3B:rank=3", pickled, marks=needs_recipes),
    ],
)
def test_copies_stand_alone(spec, copied):
    module, x = attention(spec), tokens(2, TOKENS)
    twin = copied(module)
    assert_close(twin(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert (twin(x) - module(x)).abs().max() > 1e-4


def test_functional_call_is_the_pure_function():
    module, x = attention(), tokens(2, TOKENS)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params):
        return torch.func.functional_call(module, params, (x,)).square().sum()

    module(x).square().sum().backward()
    gradients = torch.func.grad(loss)(params)
    for name, p in module.named_parameters():
        assert_close(gradients[name], p.grad)
        assert p.grad.abs().max() > 0, name
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    assert torch.func.functional_call(module, zeros, (x,)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_another_dtype(dtype):
    module = attention().to(dtype)
    assert all(p.dtype == dtype for p in module.parameters())
    y = module(tokens(2, TOKENS).to(dtype))
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 3e-2, torch.float64: 1e-5}[dtype]
    assert_close(y.float(), attention()(tokens(2, TOKENS)), rtol=tolerance, atol=tolerance)


def test_autocast():
    module, x = attention(), tokens(2, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), module(x), rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("spec", ["softmax", "G3B:rank=3"])
def test_compiled_equals_eager(spec):
    module, x = attention(spec), tokens(2, TOKENS)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x, is_causal=True)
    assert_close(y, module(x, is_causal=True))
    y.sum().backward()
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    module(x, is_causal=True).sum().backward()
    for got, p in zip(found, module.parameters(), strict=True):
        assert_close(got, p.grad)
    torch.compiler.reset()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="the Dynamo of torch 2.11 takes the numbers of a basis for symbols if all are dynamic",
)
def test_one_graph_has_masks_of_any_number_of_samples():
    module = attention()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x, mask = tokens(batch, TOKENS), torch.rand(batch, 1, 1, TOKENS, generator=source()) > 0.3
        assert_close(compiled(x, mask=mask), module(x, mask=mask))
    torch.compiler.reset()


@pytest.mark.parametrize("spec", [*SPECS, "softconv:prefix=0,rows=1", "G2:order=elementwise"])
def test_a_recorded_graph_equals_eager(spec):
    module, x = attention(spec), tokens(2, TOKENS)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(make_fx(lambda x: module(x))(x)(2 * x), module(2 * x))


def test_modules_draw_from_their_generator_alone():
    before = torch.random.get_rng_state()
    one, two = (nn.Attention(DIM, HEADS, TOKENS) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    draw = source()
    one, two = (nn.Attention(DIM, HEADS, TOKENS, generator=draw) for _ in range(2))
    assert not torch.equal(one.qkv.weight, two.qkv.weight)
    assert not torch.equal(one.operator.mix, two.operator.mix)


def test_layers_share_one_operator():
    shared = nn.operator("G3B:rank=3", HEADS, TOKENS)
    model = torch.nn.Sequential(*(nn.Attention(DIM, HEADS, TOKENS, shared) for _ in range(3)))
    names = [name for name, _ in model.named_parameters() if "operator" in name]
    assert names == ["0.operator.mix", "0.operator.units.coefs"]
    model(tokens(2, TOKENS)).sum().backward()
    assert shared.mix.grad is not None
    with pytest.raises(ValueError, match=r"`operator` needs a module of 2 heads and 7 tokens"):
        nn.Attention(DIM, 2, TOKENS, shared)


def test_resize_moves_the_parameters():
    module = nn.operator("G3B:rank=3", HEADS, 17)
    expected = operators.resize(module.op, module.tree(), 17, 26)
    assert module.resize(17, 26) is module and module.tokens == 26
    assert_close(module.tree(), expected)
    q, k, v = qkv(keys=26)
    assert module(q, k, v).shape == q.shape
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    module.units.requires_grad_(False)
    module.resize(26, 17)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"mix"}


@pytest.mark.parametrize("spec", ["softmax", "G3B:order=elementwise", "G3B:rank=3"])
@pytest.mark.parametrize(
    ("old", "new"),
    [(26, 37), ((1, 3, 3), (0, 5, 5)), ((0, 4, 4), (0, 5, 5)), ((2, 2), (0, 5, 5)), ((5, 5), 37)],
)
def test_resize_is_from_the_keys_that_a_module_has_whatever_its_parameters_say(spec, old, new):
    module = nn.operator(spec, HEADS, 17)
    with pytest.raises(ValueError, match="`resize` needs `(old|new)_tokens`"):
        module.resize(old, new)
    assert module.tokens == 17
    assert module.resize((4, 4), (1, 5, 5)).tokens == 26


@pytest.mark.parametrize(
    "change",
    [
        lambda m: prune.l1_unstructured(m, "mix", amount=0.5),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.units, "coefs"),
    ],
)
def test_resize_refuses_what_is_computed_and_leaves_it_whole(change):
    module = nn.operator("G3B:rank=3", HEADS, TOKENS)
    change(module)
    before = module(*qkv())
    with pytest.raises(ValueError, match="parameters of the module's own, got '(mix|units.coefs)'"):
        module.resize((1, 2, 3), (1, 2, 4))
    assert torch.equal(module(*qkv()), before)


def test_bad_input_is_named():
    x = tokens(2, TOKENS)
    with pytest.raises(ValueError, match=r"`Attention` needs `heads` to divide 16, got 3"):
        nn.Attention(DIM, 3, TOKENS)
    with pytest.raises(ValueError, match=r"`Attention` needs `kv_heads` to divide 4, got 3"):
        attention(kv_heads=3)
    with pytest.raises(ValueError, match=r"shared by all blocks. Make one `kart.nn.operator"):
        nn.Attention(DIM, HEADS, TOKENS, "G3U")
    with pytest.raises(ValueError, match=r"needs `tokens`, the number of keys, for low_rank"):
        nn.Attention(DIM, HEADS, operator=operators.low_rank(bases.fourier(3)))
    with pytest.raises(ValueError, match=r"initialised for rows of 7 keys, got 5.*resize"):
        attention()(x[:, :5])
    with pytest.raises(
        ValueError, match=r"`Attention` needs `context` \(B, N, 16\), got \(2, 7, 8"
    ):
        attention()(x, context=x[..., :8])
    with pytest.raises(ValueError, match=r"`causal_mask` needs no more queries than keys"):
        attention()(tokens(2, 8), context=x, is_causal=True)
    with pytest.raises(ValueError, match=r"`operator` needs `q` \(..., 4, N, d\)"):
        nn.operator("softmax", HEADS)(*qkv(heads=2, groups=2))
    with pytest.raises(ValueError, match=r"`repeat_heads` needs `x` .* divisible by G"):
        nn.operator("softmax", HEADS)(*qkv(groups=3))
    for heads, groups in ((0, 2), (-2, 2), (2.0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"`repeat_heads` needs `x` .* divisible by G"):
            nn.repeat_heads(torch.ones(2, groups, 3, 4), heads)
    with pytest.raises(ValueError, match=r"`causal_mask` needs no more queries than keys"):
        nn.causal_mask(-1, 3)
    with pytest.raises(ValueError, match=r"needs `q` \(..., H, N, d\), `k` \(..., H, M, d\)"):
        nn.operator("softmax", HEADS).weights(
            torch.ones(2, HEADS, 3, 4), torch.ones(2, HEADS, 3, 8)
        )
    with pytest.raises(ValueError, match=r"`step` needs at most the 7 tokens"):
        attention().step(tokens(2, 8))


def test_a_module_half_moved_is_named():
    module, x = attention(), tokens(2, TOKENS)
    module.operator.to("meta")
    with pytest.raises(ValueError, match=r"`operator.mix` on meta and an input on cpu. Move the"):
        module(x)
    with pytest.raises(ValueError, match=r"got `mix` on meta"):
        module.operator(*qkv())


def test_a_leaf_that_a_module_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"`Tree` needs names .* got 'half'"):
        nn.Tree({"units": {"half": torch.zeros(2)}})


# --- several processes ----------------------------------------------------------------------------


def steps(module, wrapped, rank, world):
    """The parameters after three steps on this rank's part of every batch."""
    descent = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for x in tokens(3, 4, TOKENS):
        descent.zero_grad()
        wrapped(x.chunk(world)[rank], is_causal=True).sub(1).square().mean().backward()
        descent.step()
    found = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in state(module)}
    return {name: p.detach().clone() for name, p in found.items()}


def state(module):
    return list(module.named_parameters())


@pytest.mark.filterwarnings("ignore:.*nested")  # torch: a prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_to_be_padded(layout):
    rows = [torch.ones(3, DIM), torch.ones(TOKENS, DIM)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    module = attention()
    calls = {
        "Attention": lambda: module(x),
        "operator": lambda: module.operator(x, x, x),
        "softmax.attend": lambda: operators.softmax().attend({}, x, x, x),
        "softmax.weights": lambda: operators.softmax().weights({}, x),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"`{name}` needs .* a nested one. Pad it with"):
            call()


def train_wrapped(rank, world, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    # a file and no port, which another test may take first
    meeting = f"file://{path.with_suffix('.store')}"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=world)
    one, other = attention(), attention()
    found = {"ddp": steps(one, torch.nn.parallel.DistributedDataParallel(one), rank, world)}
    wrapped = fully_shard(other, mesh=init_device_mesh("cpu", (world,)))
    assert any(type(p).__name__ == "DTensor" for p in wrapped.parameters())
    found["fsdp"] = steps(other, wrapped, rank, world)
    if rank == 0:
        torch.save(found, path)
    # gloo aborts a process whose partner has gone while it still talks to it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_of_ddp_and_fsdp_equal_one(tmp_path):
    path = tmp_path / "found.pt"
    torch.multiprocessing.spawn(train_wrapped, (2, path), nprocs=2)
    module = attention()
    expected = steps(module, module, 0, 1)
    start = dict(state(attention()))
    moved = {name: (expected[name] - start[name]).abs().max() for name in expected}
    assert min(moved.values()) > 1e-5, moved
    for kind, found in torch.load(path).items():
        assert found.keys() == expected.keys(), kind
        for name, p in expected.items():
            assert_close(found[name], p, rtol=1e-4, atol=1e-6)


def test_parametrised_and_pruned_operators_are_what_torch_makes_of_them():
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))

    def made():
        return nn.Attention(32, 4, 9, "G2B:rank=3", generator=torch.Generator().manual_seed(1))

    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    plain, twice = made(), made()
    torch.nn.utils.parametrize.register_parametrization(twice.operator, "mix", Twice())
    with torch.no_grad():
        plain.operator.mix.mul_(2)
    assert_close(twice(x), plain(x))
    twice(x).sum().backward()
    assert twice.operator.parametrizations.mix.original.grad is not None

    normed, before = made(), made()
    torch.nn.utils.parametrizations.weight_norm(normed.operator.units, "coefs")
    assert_close(normed(x), before(x))

    pruned, zeroed = made(), made()
    prune.l1_unstructured(pruned.operator, "mix", amount=0.5)
    with torch.no_grad():
        zeroed.operator.mix.mul_(pruned.operator.mix_mask)
    assert_close(pruned(x), zeroed(x))
    assert set(pruned.operator.tree()) == {"units", "mix"}


@pytest.mark.parametrize("place", ["qkv", "operator", "operator.units"])
@pytest.mark.parametrize("use", ["self", "context", "step", "weights"])
def test_what_is_pruned_is_trained_and_loaded_whatever_is_called(place, use):
    x, context = torch.randn(2, 2, 9, 32, generator=torch.Generator().manual_seed(0))
    uses = {
        "self": lambda module: module(x),
        "context": lambda module: module(x, context=context),
        "step": lambda module: module.step(x)[0],
        "weights": lambda module: module.operator.weights(*module.project(x)[:2]),
    }
    name = {"qkv": "weight", "operator": "mix", "operator.units": "coefs"}[place]
    module, plain = (nn.Attention(32, 4, 9, "G2B:rank=3") for _ in range(2))
    part = module.get_submodule(place)
    prune.random_unstructured(part, name, amount=0.5)
    for _ in range(2):
        uses[use](module).sum().backward()  # a stale graph is gone the second time
        with torch.no_grad():
            getattr(part, f"{name}_orig").mul_(2)
            kept = getattr(part, f"{name}_orig") * getattr(part, f"{name}_mask")
            getattr(plain.get_submodule(place), name).copy_(kept)
        assert_close(uses[use](module), uses[use](plain))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("place", ["operator", "operator.units"])
@pytest.mark.parametrize("use", ["self", "weights"])
def test_a_norm_of_weights_is_of_the_parameters_as_they_are(place, use):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    uses = {
        "self": lambda module: module(x),
        "weights": lambda module: module.operator.weights(*module.project(x)[:2]),
    }
    name = {"operator": "mix", "operator.units": "coefs"}[place]
    module, plain = (nn.Attention(32, 4, 9, "G2B:rank=3") for _ in range(2))
    part = module.get_submodule(place)
    torch.nn.utils.weight_norm(part, name)
    for _ in range(2):
        uses[use](module).sum().backward()  # a stale graph is gone the second time
        with torch.no_grad():
            getattr(part, f"{name}_g").mul_(2)
            getattr(plain.get_submodule(place), name).mul_(2)
        assert_close(uses[use](module), uses[use](plain))


def test_what_is_drawn_can_be_held_and_trained():
    def drawing(drawn):
        return operators.softmax()._replace(name="mine", init=lambda *_: drawn)

    for drawn, words in (
        ({"units": {"index": torch.arange(3)}}, r"got torch.int64 at 'units.index'. What is not l"),
        (
            {"units": [torch.zeros(3)]},
            "nested dicts of floating-point tensors, got list at 'units'",
        ),
        (torch.zeros(3), "nested dicts of floating-point tensors, got torch.float32. What"),
        ({"units": {0: torch.zeros(3)}}, "names without dots as keys, got 0 in 'units'. Rename it"),
        ({"a.b": torch.zeros(3)}, "names without dots as keys, got 'a.b'. Rename it"),
    ):
        model = models.create("vit_nano", drawing(drawn), image_size=8, patch_size=4)
        with pytest.raises(ValueError, match=f"`mine.init` needs .*{words}"):
            nn.operator(drawing(drawn), 2, 9)
        with pytest.raises(ValueError, match=f"`mine.init` needs .*{words}"):
            model.init(source())


def test_what_does_not_fit_is_named():
    def made(*arguments, **more):
        return lambda: nn.Attention(*arguments, **more)

    layer, x = nn.Attention(32, 4, 9), torch.randn(2, 9, 32)
    cache = tuple(layer.step(x[:, :1])[1])
    wide = operators.Cache(cache[0].double(), cache[1])
    late = operators.Cache(cache[0], cache[1].double())
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    for call, words in (
        (made(32.0, 4, 9), "integer `dim` >= 1, got 32.0"),
        (made(0, 4, 9), "integer `dim` >= 1, got 0"),
        (made(32, 4, 9, dtype=torch.int64), "floating-point `dtype`, got torch.int64"),
        (lambda: layer(x.double()), "`x` in the dtype of its parameters, torch.float32, got"),
        (lambda: layer(x, context=x.double()), "`context` in the dtype of its parameters"),
        (lambda: layer.step(x[:, :1], cache), "`cache` as it returned it, got tuple"),
        (lambda: layer.step(x[:1, :1], operators.Cache(*cache)), "samples and heads of the new t"),
        (lambda: layer.step(x[:, :1], wide), "`cache` like the new .* got keys torch.float64"),
        (lambda: layer.step(x[:, :1], late), "`cache` like the new .* got values torch.flo"),
        (lambda: layer(x, x @ x.mT, True), r"boolean `mask` .*, got torch.float32 \(2, 9"),
        (lambda: layer(x, mask[:, 0, 0], True), r"boolean `mask` .*, got torch.bool \(3, 9\)"),
        (lambda: layer(x, [True] * 9, True), "boolean `mask` .*, got <class 'list'>"),
        (lambda: layer(x, mask, True), r"broadcast with those of the other tensors, \(2, 4\), got"),
        (lambda: layer(x, mask), r"broadcast with those of the other tensors, \(2, 4\), got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_module_is_kept_where_and_in_what_torch_keeps_its_own():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = nn.Attention(8, heads=2, tokens=5, operator="G2B")
        module = nn.Attention(8, heads=2, tokens=5, operator="G2B")
        assert module(torch.randn(2, 5, 8)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(x.device.type, x.dtype) for x in made.parameters()} == {("meta", torch.float64)}
    made.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(made(x), module(x))
    # the numbers are those of any dtype
    single = nn.Attention(8, heads=2, tokens=5, operator="G2B")
    for one, other in zip(single.parameters(), module.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())


@pytest.mark.parametrize(
    "kind",
    ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"],
)
def test_hooks_of_the_projection_run_under_cross_attention(kind):
    module = nn.Attention(8, heads=2, tokens=5, operator="G3B", generator=source())
    calls = []
    getattr(module.qkv, f"register_{kind}")(lambda *args: calls.append(kind))
    x, context = (torch.randn(1, n, 8, requires_grad=True) for n in (3, 5))
    module(x, context=context).sum().backward()
    assert calls


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook"])
@pytest.mark.parametrize("place", ["", "operator"])
def test_hooks_that_a_step_would_leave_out_are_refused(kind, place):
    module, x = nn.Attention(8, heads=2, tokens=5, operator="G3B"), torch.randn(1, 5, 8)
    hook = getattr(module.get_submodule(place), f"register_{kind}")(lambda *args: None)
    with pytest.raises(ValueError, match=r"`step` needs a module without hooks .*<lambda>"):
        module.step(x)
    hook.remove()
    assert_close(module.step(x)[0], module(x, is_causal=True))


def test_an_operator_is_of_floating_point():
    with pytest.raises(ValueError, match="floating-point `dtype`, got torch.int32"):
        nn.operator("G2B", 2, 5, dtype=torch.int32)
