"""Operators whose parameters fit any number of keys: one set of parameters, many lengths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kart import bases, kernels, nn, operators, tree
from kart.kernels import stream
from kart.testing import operator_suite

FEW = max(8, settings().max_examples // 4)
DISTANCE, GENERATED = "order=by_distance,reach=9", "order=generated,rank=2,features=3,reach=5"
SCORES = [
    "G2:order=elementwise",
    "G2:order=elementwise,normalise=count",
    "G2:order=elementwise,normalise=l1",
    "G2:order=elementwise,normalise=softmax",
    "G2:order=elementwise,inside=true,start=scaled",
    "G2:order=elementwise,normalise=count,base=softmax,start=scaled",
    "rational-3/2:order=elementwise,normalise=count",
    "mexican_hat:order=elementwise,base=softmax,start=scaled",
]
OFFSETS = [
    f"bspline-4:{DISTANCE}",
    f"G2:{DISTANCE},normalise=count,base=softmax,start=scaled",
    f"G2:{DISTANCE},normalise=softmax",
    f"G2:{DISTANCE},inside=true,start=scaled",
    f"mexican_hat:{DISTANCE},normalise=l1",
]
PLACES = [
    f"G2:{GENERATED}",
    f"G2:{GENERATED},normalise=count",
    f"G2:{GENERATED},normalise=count,base=softmax,mix=scaled",
    f"chebyshev-2:{GENERATED},scales=true",
]
ALL = [*SCORES, *OFFSETS, *PLACES]
# what a key's place has a part in, parameters cannot be permuted for
PLACED = "weights are by place, and no parameter belongs to a key"


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def operator(spec):
    return operators.parse(spec).operator


def parameters(spec, heads=3, seed=0):
    """Parameters in float64, moved so that none is zero."""
    drawn = operator(spec).init(source(seed), heads, 6)
    noise = source(seed + 1)
    return tree.map(lambda x: (x + 0.3 * torch.randn(x.shape, generator=noise)).double(), drawn)


def inputs(queries, keys, heads=3, seed=2):
    draw = source(seed)
    q, k, v = (torch.randn(2, heads, n, 4, generator=draw) for n in (queries, keys, keys))
    return q.double(), k.double(), v.double()


def masks(queries, keys):
    """Masks of every kind, by name."""
    draw = source(3)
    some = torch.rand(2, 3, queries, keys, generator=draw) > 0.4
    some[:, :, 0] = False
    padding = torch.arange(keys) < torch.tensor([keys, max(1, keys - 2)])[:, None]
    found = {"none": None, "each": some, "padding": padding[:, None, None], "keys": padding[1]}
    if queries <= keys:
        found["causal"] = nn.causal_mask(queries, keys)
    return found


def expected(spec, scores, place, mask):
    """The weights as the docstrings say, for the specs of `SCORES` and `OFFSETS`."""
    op, params = operator(spec), parameters(spec)
    o = op.options
    lifted = {name: leaf[:, None, None] for name, leaf in params["units"].items()}
    x = scores
    if o["kind"] == "by_distance":
        x = (place * (1 + place.abs()).log() / place.abs().clamp(min=1)).expand_as(scores)
        x = x * math.pi / math.log(1 + o["reach"])
    y = op.basis.apply(lifted, x)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    empty = ~mask.any(-1, keepdim=True)

    def softmax(z):
        return z.masked_fill(~mask, -torch.inf).masked_fill(empty, 0).softmax(-1) * mask

    if o["inside"]:
        return softmax(scores + y)
    y = y * mask
    if o["normalise"] == "count":
        y = y / mask.sum(-1, keepdim=True).clamp(min=1)
    elif o["normalise"] == "l1":
        y = y / y.abs().sum(-1, keepdim=True).masked_fill(empty, 1)
    elif o["normalise"] == "softmax":
        y = softmax(y)
    return y + softmax(scores) if o["base"] else y


@pytest.mark.parametrize("spec", [*SCORES, *OFFSETS])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 8), (7, 2), (1, 1)])
def test_weights_are_the_formula(spec, queries, keys):
    q, k, _ = inputs(queries, keys)
    scores = q @ k.mT / 2
    place = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).double()
    for name, mask in masks(queries, keys).items():
        got = operator(spec).weights(parameters(spec), scores, mask)
        assert_close(got, expected(spec, scores, place, mask), msg=lambda m, n=name: f"{n}: {m}")


def test_elementwise_by_hand():
    op = operators.elementwise(bases.polynomial(1), normalise="count")
    params = {"units": {"coefs": torch.tensor([[0.5, 2.0]])}}
    scores = torch.tensor([[[1.0, -1.0, 3.0]]])
    assert_close(op.weights(params, scores), torch.tensor([[[2.5, -1.5, 6.5]]]) / 3)
    mask = torch.tensor([True, True, False])
    assert_close(op.weights(params, scores, mask), torch.tensor([[[2.5, -1.5, 0.0]]]) / 2)
    op = operators.elementwise(bases.polynomial(1), normalise="l1")
    assert_close(op.weights(params, scores), torch.tensor([[[2.5, -1.5, 6.5]]]) / 10.5)


def test_by_distance_by_hand():
    op = operators.by_distance(bases.polynomial(1), reach=7)
    params = {"units": {"coefs": torch.tensor([[0.0, 1.0]])}}
    unit = math.pi / math.log(8)  # reach 7: log 8 is half a turn
    u = [0.0, unit * math.log(2), unit * math.log(3)]
    rows = [[u[0], -u[1], -u[2]], [u[1], u[0], -u[1]], [u[2], u[1], u[0]]]
    assert_close(op.weights(params, torch.zeros(1, 3, 3))[0], torch.tensor(rows))
    # a token more, as the last of them
    assert_close(op.weights(params, torch.zeros(1, 1, 3))[0], torch.tensor(rows[2:]))


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("chunk", [1, 64, stream.CHUNK])
def test_attend_has_the_values_and_gradients_of_weights(spec, chunk, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    op, params = operator(spec), parameters(spec)
    for queries, keys in ((5, 5), (4, 7)):
        q, k, v = inputs(queries, keys)
        toward = torch.randn(2, 3, queries, 4, generator=source(7), dtype=torch.float64)
        for mask in masks(queries, keys).values():

            def streamed(params, q, k, v, mask=mask):
                return op.attend(params, q, k, v, mask)

            def plain(params, q, k, v, mask=mask):
                return op.weights(params, q @ k.mT / 2, mask) @ v

            got, pull = torch.func.vjp(streamed, params, q, k, v)
            wanted, pull_plain = torch.func.vjp(plain, params, q, k, v)
            assert_close(got, wanted)
            for one, other in zip(
                tree.leaves(pull(toward)), tree.leaves(pull_plain(toward)), strict=True
            ):
                assert_close(one, other)


@pytest.mark.parametrize("spec", ALL)
@given(keys=st.integers(1, 9), more=st.integers(1, 5), queries=st.integers(1, 6))
@settings(max_examples=FEW)
def test_masked_keys_after_the_last_change_nothing(spec, keys, more, queries):
    op, params = operator(spec), parameters(spec)
    q, k, v = inputs(queries, keys)
    _, k_more, v_more = inputs(queries, more, seed=5)
    # queries are the last tokens: with keys put after them, those of the rows before the last
    rows = op.attend(params, *inputs(keys, keys, seed=4)[:1], k, v)
    q = inputs(keys, keys, seed=4)[0]
    longer = [torch.cat([x, y], -2) for x, y in ((k, k_more), (v, v_more * torch.nan))]
    padded = torch.cat([q, k_more], -2)
    mask = torch.arange(keys + more) < keys
    assert_close(op.attend(params, padded, *longer, mask)[..., :keys, :], rows)


@pytest.mark.parametrize("spec", ALL)
def test_a_query_without_keys_gets_zeros(spec):
    q, k, v = inputs(4, 5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    out = operator(spec).attend(parameters(spec), q, k, v, mask)
    assert out[..., 1, :].abs().max() == 0 and out[..., 0, :].abs().min() > 0


@pytest.mark.parametrize(
    "spec",
    [
        "G3:order=elementwise,inside=true",
        "bspline-8:order=elementwise,normalise=count,base=softmax",
        "G3:order=by_distance,inside=true",
        "G3:order=by_distance,base=softmax",
        "G3:order=generated,base=softmax",
    ],
)
def test_operators_start_as_exactly_softmax(spec):
    op = operator(spec)
    params = op.init(source(), 3, 6)
    assert op.traits["softmax_start"]
    for queries, keys in ((6, 6), (3, 40)):
        q, k, v = (x.float() for x in inputs(queries, keys))
        softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert_close(op.attend(params, q, k, v), softmax)

    # and may leave it: some parameter has a gradient
    def loss(params):
        return op.attend(params, q, k, v).square().sum()

    assert tree.norm(torch.func.grad(loss)(params)) > 1e-4


@pytest.mark.parametrize("spec", ALL)
@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=FEW)
def test_tokens_in_parts_equal_one_causal_pass(spec, parts):
    op, params, count = operator(spec), parameters(spec), sum(parts)
    q, k, v = inputs(count, count)
    whole = op.attend(params, q, k, v, nn.causal_mask(count, count))
    cache, found = None, []
    for part in zip(*(x.split(parts, -2) for x in (q, k, v)), strict=True):
        out, cache = operators.step(op, params, *part, cache)
        found.append(out)
    assert_close(torch.cat(found, -2), whole)
    assert cache.keys.shape[-2] == count


@pytest.mark.parametrize("spec", [*SCORES, *OFFSETS])
@given(parts=st.lists(st.integers(1, 4), min_size=2, max_size=3), causal=st.booleans())
@settings(max_examples=FEW)
def test_packed_sequences_do_not_meet(spec, parts, causal):
    op, params, count = operator(spec), parameters(spec), sum(parts)
    q, k, v = inputs(count, count)
    mask = torch.block_diag(*(torch.ones(n, n) for n in parts)).bool()
    mask = mask.tril() if causal else mask
    alone = [
        op.attend(params, *part, nn.causal_mask(n, n) if causal else None)
        for n, *part in zip(parts, *(x.split(parts, -2) for x in (q, k, v)), strict=True)
    ]
    assert_close(op.attend(params, q, k, v, mask), torch.cat(alone, -2))


@pytest.mark.parametrize("spec", OFFSETS)
def test_offsets_alone_matter(spec):
    op, params = operator(spec), parameters(spec)
    a = op.weights(params, torch.zeros(3, 9, 9).double(), nn.causal_mask(9, 9))
    b = op.weights(params, torch.zeros(3, 4, 4).double(), nn.causal_mask(4, 4))
    assert_close(a[:, :4, :4], b)
    if "normalise=None" in spec or spec == OFFSETS[0]:
        assert_close(a[:, 5:, 5:], b)


def test_generated_is_any_low_rank_on_the_lattice_of_training():
    basis, heads, keys = bases.fourier(2), 3, 6
    low = operators.low_rank(basis, rank=2)
    params = tree.to(low.init(source(), heads, keys), torch.float64)
    q, k, v = inputs(4, keys)
    wanted = low.attend(params, q, k, v)
    features = torch.arange(keys).double()
    features = (math.pi * (features[:, None] + 0.5) / keys * features).cos()
    # the cosines are a basis: solve for the coefficients that give these parameters
    scale = torch.tensor([1.0] + [math.sqrt(2)] * (keys - 1)).double() / math.sqrt(keys)
    inverse = torch.linalg.inv(features * scale)
    made = {
        "units": {"coefs": torch.einsum("jm,hrmk->hrjk", inverse, params["units"]["coefs"])},
        "mix": torch.einsum("jm,hmr->hjr", inverse, params["mix"]),
    }
    for normalise in (None, "count"):
        op = operators.generated(basis, 2, features=keys, reach=keys, normalise=normalise)
        assert_close(op.attend(made, q, k, v), wanted)
    assert {n: x.shape for n, x in tree.named(op.init(source(), heads, keys)).items()} == {
        n: x.shape for n, x in tree.named(made).items()
    }


def test_generated_units_of_patches_are_those_of_their_place():
    basis = bases.fourier(2)
    op = operators.generated(basis, 2, features=1 + 9, reach=None, prefix=1)
    params = tree.to(op.init(source(), 3, 10), torch.float64)
    low = operators.low_rank(basis, rank=2)
    # nine waves on nine patches span every low rank; the class token has features of its own
    one = torch.tensor(
        [[math.cos(math.pi * (x + 0.5) * j / 3) for j in range(3)] for x in range(3)]
    )
    one = one.double() * torch.tensor([1, 2**0.5, 2**0.5]).double() / 3**0.5
    features = torch.block_diag(torch.ones(1, 1).double(), torch.kron(one, one))
    assert torch.linalg.matrix_rank(features) == 10
    made = {
        "units": {"coefs": torch.einsum("mj,hrjk->hrmk", features, params["units"]["coefs"])},
        "mix": torch.einsum("mj,hjr->hmr", features, params["mix"]),
    }
    q, k, v = inputs(10, 10)
    assert_close(op.attend(params, q, k, v), low.attend(made, q, k, v))
    q, k, v = inputs(17, 17)
    assert op.attend(params, q, k, v).shape == (2, 3, 17, 4)
    with pytest.raises(ValueError, match=r"needs 1 prefix tokens and a square of patches, got 12"):
        op.attend(params, *inputs(12, 12))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything returned."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree.leaves(out):
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.numel())
        return out


@pytest.mark.parametrize("spec", [SCORES[1], SCORES[4], OFFSETS[1], OFFSETS[3], PLACES[2]])
def test_attend_holds_no_matrix_of_queries_and_keys(spec, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 2**14)
    op = operator(spec)
    params = tree.map(lambda x: x.requires_grad_(), op.init(source(), 1, 512))
    q, k, v = (torch.randn(1, 512, 2, generator=source(9)).requires_grad_() for _ in range(3))
    # a compiled engine is held against small matrices when it is first used
    op.attend(params, *(x.detach()[:, :4] for x in (q, k, v))).sum().backward()
    with Largest() as largest:
        op.attend(params, q, k, v).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    assert largest.found < 512 * 512 / 4


@pytest.mark.parametrize("masked", [False, True])
def test_a_nonlinear_family_that_tells_the_engines_nothing_is_one_of_ones_own(masked):
    known = bases.rational(3, 2)
    generator = torch.Generator().manual_seed(0)
    params = operators.elementwise(known).init(generator, 2, 7)
    qkv = torch.randn(3, 4, 2, 7, 5, generator=generator)
    mask = torch.rand(4, 1, 7, 7, generator=generator) > 0.4 if masked else None
    found = []
    for basis in (known, known._replace(pieces=None)):
        leaves = [x.clone().requires_grad_() for x in (*qkv, *params["units"].values())]
        own = {"units": dict(zip(params["units"], leaves[3:], strict=True))}
        out = operators.elementwise(basis).attend(own, *leaves[:3], mask)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", OFFSETS)
def test_what_one_query_keeps_in_single_precision_is_not_used_in_double(spec):
    op, params = operator(spec), parameters(spec)
    q, k, v = inputs(1, 6)
    op.attend(tree.map(torch.Tensor.float, params), q.float(), k.float(), v.float())
    place = torch.arange(5, -1, -1, dtype=torch.float64)[None]
    wanted = expected(spec, q @ k.mT / 2, place, None) @ v
    assert_close(op.attend(params, q, k, v), wanted, rtol=1e-12, atol=1e-13)


def test_bad_input_is_named():
    fourier = bases.fourier(2)
    with pytest.raises(ValueError, match=r"`elementwise` needs `normalise` None or in .*'l1'"):
        operators.elementwise(fourier, normalise="l2")
    with pytest.raises(ValueError, match=r"`elementwise` needs `inside` alone"):
        operators.elementwise(fourier, base="softmax", inside=True)
    with pytest.raises(ValueError, match=r'needs `start` "scaled" with normalise=.l1.'):
        operators.elementwise(fourier, normalise="l1", start="zero")
    with pytest.raises(ValueError, match=r"`elementwise` needs units that can start at zero"):
        operators.elementwise(bases.fourier(2, base="silu"), inside=True)
    with pytest.raises(ValueError, match=r"`by_distance` needs an integer `reach` >= 1, got 0"):
        operators.by_distance(fourier, reach=0)
    with pytest.raises(ValueError, match=r"`generated` needs `features` as 1 prefix .* Pass 5 or"):
        operators.generated(fourier, features=7, reach=None, prefix=1)
    with pytest.raises(ValueError, match=r"`generated` needs `prefix` 0 in a sequence"):
        operators.generated(fourier, prefix=1)
    with pytest.raises(ValueError, match=r"`generated` needs units linear in their coefficients"):
        operators.generated(bases.mexican_hat())
    q, k, v = inputs(2, 3)
    one, many = (operators.generated(fourier, features=n) for n in (1, 4))
    for op, other in ((one, many), (many, one)):
        with pytest.raises(ValueError, match=r"`generated` needs parameters of . features, got"):
            op.attend(other.init(source(), 3, 3), q, k, v)
    cosformer = operators.cosformer()
    for op in (cosformer, operators.added([cosformer]), operators.hybrid([cosformer] * 3)):
        with pytest.raises(ValueError, match=r"`step` needs weights that later tokens leave as"):
            operators.step(op, op.init(source(), 3, 5), k, k, v)
    with pytest.raises(ValueError, match=r"`step` needs queries and keys of the same tokens"):
        operators.step(operators.softmax(), {}, q, k, v)
    assert kernels.by_queries.__doc__


def suite(spec, *broken):
    op = operator(spec)
    expected = dict.fromkeys(broken, PLACED)
    return operator_suite(op, expected_failures=expected, max_examples=FEW)


# to delete or to permute tokens is to move them
MOVED = ("keys_permute_with_parameters", "masking_is_deleting")
QUERIES = ("queries_permute", "queries_stand_alone")


@suite(SCORES[1])
def test_elementwise_over_the_count(): ...


@suite(SCORES[2])
def test_elementwise_over_the_sum(): ...


@suite("G2:order=elementwise,inside=true")
def test_elementwise_inside_softmax(): ...


@suite(SCORES[6])
def test_elementwise_rational(): ...


@suite("G2:order=by_distance,reach=9,normalise=count,base=softmax", *MOVED, *QUERIES)
def test_by_distance_beside_softmax(): ...


@suite(OFFSETS[3], *MOVED, *QUERIES)
def test_by_distance_inside_softmax(): ...


@suite(PLACES[0], *MOVED)
def test_generated(): ...


@suite(PLACES[2], *MOVED)
def test_generated_beside_softmax(): ...
