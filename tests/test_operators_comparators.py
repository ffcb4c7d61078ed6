"""Comparators against their equations in float64, and through the suites."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad
from torch.nn import functional
from torch.testing import assert_close

from kart import operators, tree
from kart.operators.comparators import entmax_rows
from kart.testing import check_operator, operator_suite

HEADS, N, D = 2, 7, 3
FEW = max(8, settings().max_examples // 4)


def drawn(spec, seed=0, n=N, m=N):
    generator = torch.Generator().manual_seed(seed)
    op = operators.parse(spec).operator
    params = op.init(generator, HEADS, m)
    params = tree.map(lambda x: x + 0.3 * torch.randn(x.shape, generator=generator), params)
    q, k, v = (torch.randn(2, HEADS, x, D, generator=generator).double() for x in (n, m, m))
    return op, tree.to(params, torch.float64), q, k, v


def softmax(x, mask):
    e = torch.where(mask, (x - x.amax(-1, keepdim=True)).exp(), 0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


def normalised(y, mask):
    y = torch.where(mask, y, 0)
    return y / y.sum(-1, keepdim=True).clamp(min=1e-300)


def bisected(x, mask):
    """1.5-entmax by bisection of the sum of the weights, which falls in tau."""
    x = torch.where(mask, x / 2, -math.inf)
    high = x.amax(-1, keepdim=True).clamp(min=-1e9)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        above = (x - middle).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(mask, (x - low).clamp(min=0).square(), 0)


# --- the equations --------------------------------------------------------------------------------


def tempered(params, q, k, mask):
    return softmax(params["sharpness"].exp()[:, None, None] * (q @ k.mT) / D**0.5, mask)


def gated(params, q, k, mask):
    # a class token, then 2 rows of 3 patches
    def entry(n, m):
        if not n or not m:
            return torch.zeros(HEADS, dtype=torch.float64)
        y, x = (m - 1) // 3 - (n - 1) // 3, (m - 1) % 3 - (n - 1) % 3
        return params["position"] @ torch.tensor([x, y, x * x + y * y], dtype=torch.float64)

    p = torch.stack([torch.stack([entry(n, m) for m in range(N)], -1) for n in range(N)], -2)
    gate = (1 / (1 + (-params["gate"]).exp()))[:, None, None]
    content, place = softmax(q @ k.mT / D**0.5, mask), softmax(p.expand(mask.shape), mask)
    return (1 - gate) * content + gate * place


def synthesizer(params, q, k, mask):
    hidden = (q @ params["first"] + params["bias"][:, None]).clamp(min=0)
    return softmax(hidden @ params["second"] + params["shift"][:, None], mask)


def signed_synthesizer(params, q, k, mask):
    hidden = (q @ params["first"] + params["bias"][:, None]).clamp(min=0)
    y = hidden @ params["second"] + params["shift"][:, None]
    return torch.where(mask, y, 0) + softmax(q @ k.mT / D**0.5, mask)


def linformer(params, q, k, mask):
    # a masked pair is missing from the sums of this query
    scores = torch.where(mask, q @ k.mT / D**0.5, 0)
    hidden = scores @ params["keys"].mT
    everything = torch.ones(hidden.shape, dtype=torch.bool)
    return torch.where(mask, softmax(hidden, everything) @ params["values"], 0)


def performer(params, q, k, mask):
    w = params["directions"].detach()
    w = w / w.norm(dim=-1, keepdim=True) * D**0.5
    a, b = (
        (x / D**0.25 @ w.mT - (x / D**0.25).square().sum(-1, keepdim=True) / 2).exp()
        for x in (q, k)
    )
    return normalised(a @ b.mT, mask)


def cosformer(params, q, k, mask):
    i, j = (torch.arange(x.shape[-2], dtype=torch.float64) for x in (q, k))
    turn = (math.pi / 2 * (i[:, None] - j) / max(len(i), len(j))).cos()
    return normalised((q.clamp(min=0) @ k.clamp(min=0).mT) * turn, mask)


FORMULAS = {
    "entmax": lambda params, q, k, mask: bisected(q @ k.mT / D**0.5, mask),
    "tempered": tempered,
    "gated:rows=2": gated,
    f"synthesizer:width={D}": synthesizer,
    f"synthesizer:width={D},normalise=none,base=softmax": signed_synthesizer,
    "linformer:rank=4": linformer,
    f"performer:width={D},features=5": performer,
    "cosformer": cosformer,
}
MASKS = [None, (), (N,), (1, N), (N, N), (N, 1), (HEADS, N, N), (2, 1, 1, N), (2, HEADS, N, N)]


@pytest.mark.parametrize("spec", FORMULAS)
@given(shape=st.sampled_from(MASKS), seed=st.integers(0, 2**31))
@settings(max_examples=FEW)
def test_attend_and_its_gradients_are_those_of_the_equation(spec, shape, seed):
    op, params, q, k, v = drawn(spec, seed)
    mask = torch.ones((), dtype=torch.bool)
    if shape is not None:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    full = mask.expand(2, HEADS, N, N)

    def plain(params, q, k, v):
        return FORMULAS[spec](params, q, k, full) @ v

    def streamed(params, q, k, v):
        return op.attend(params, q, k, v, None if shape is None else mask)

    def slopes(call):
        def total(params, q, k, v):
            out = call(params, q, k, v)
            return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

        return grad(total, (0, 1, 2, 3))(params, q, k, v)

    wanted = plain(params, q, k, v)
    # bisection has the values, not the derivatives
    if spec != "entmax":
        # cosFormer's floor under its sum is 1e-6 of it here
        rtol, atol = (1e-4, 1e-5) if spec == "cosformer" else (1e-7, 1e-9)
        assert_close(slopes(streamed), slopes(plain), rtol=rtol, atol=atol)
        assert_close(streamed(params, q, k, v), wanted, rtol=rtol, atol=atol)
    else:
        assert_close(streamed(params, q, k, v), wanted, rtol=1e-7, atol=1e-9)
    if op.traits.get("of_scores", True):
        scores = q @ k.mT / D**0.5
        looked = op.weights(params, scores, None if shape is None else mask) @ v
        assert_close(looked, wanted, rtol=1e-7, atol=1e-9)
    else:
        eye = torch.eye(N, dtype=torch.float64).expand(2, HEADS, N, N)
        looked = op.attend(params, q, k, eye, None if shape is None else mask)
        assert_close(looked @ v, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="Pass the identity"):
            op.weights(params, q @ k.mT)


def test_linformer_projects_keys_and_values():
    op, params, q, k, v = drawn("linformer:rank=4", n=3)
    keys, values = params["keys"] @ k, params["values"] @ v
    assert_close(op.attend(params, q, k, v), (q @ keys.mT / D**0.5).softmax(-1) @ values)


def test_performer_estimates_softmax():
    op = operators.performer(width=16, features=4096)
    q, k, v = (0.7 * torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(1))).unbind(0)
    wanted = operators.softmax().attend({}, q, k, v)
    errors = []
    for features in (64, 4096):
        op = operators.performer(width=16, features=features)
        params = op.init(torch.Generator().manual_seed(0), 2, 9)
        w = params["directions"]
        assert_close(w[:, :16] @ w[:, :16].mT, torch.eye(16).expand(2, 16, 16))
        errors.append(float((op.attend(params, q, k, v) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.1 and errors[1] < errors[0] / 2


def test_performer_is_the_same_under_decay_and_has_no_gradient():
    op, params, q, k, v = drawn(f"performer:width={D},features=5")
    smaller = tree.map(lambda x: 0.1 * x, params)
    assert_close(op.attend(smaller, q, k, v), op.attend(params, q, k, v))
    slope = grad(lambda p: op.attend(p, q, k, v).sum())(params)
    assert float(slope["directions"].abs().max()) == 0


# --- 1.5-entmax -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0, 1.9, 2.0, 5.0])
def test_entmax_of_two_by_hand(gap):
    # z = (gap / 2, 0): u^2 + (u + gap / 2)^2 = 1 while u > 0
    half = gap / 2
    u = max((math.sqrt(max(2 - half**2, 0)) - half) / 2, 0)
    low = u * u if half < 1 else 0.0
    got = entmax_rows(torch.tensor([gap, 0.0], dtype=torch.float64), None)
    assert_close(got, torch.tensor([1 - low, low], dtype=torch.float64), rtol=0, atol=1e-12)


@given(row=st.lists(st.floats(-30, 30), min_size=1, max_size=9), shift=st.sampled_from([0.0, 1e4]))
def test_entmax_is_the_bisected_one(row, shift):
    x = torch.tensor(row, dtype=torch.float64)
    wanted = bisected(x, torch.ones_like(x, dtype=torch.bool))
    assert_close(entmax_rows(x, None), wanted, rtol=1e-6, atol=1e-8)
    got = entmax_rows((x + shift).float(), None)
    assert_close(got.sum(), torch.tensor(1.0), rtol=0, atol=1e-5)
    x = (x + shift).float().double()
    wanted = bisected(x, torch.ones_like(x, dtype=torch.bool)).float()
    assert_close(got, wanted, rtol=1e-3, atol=2e-5)


def test_a_row_with_nan_is_nan_in_entmax():
    op, scores = operators.entmax(), torch.randn(2, 1, 3, 4, generator=torch.Generator())
    wanted = op.weights({}, scores)
    scores[1, 0, 2, 1] = math.nan
    got = op.weights({}, scores)
    assert got[1, 0, 2].isnan().all()
    got[1, 0, 2] = wanted[1, 0, 2]
    assert_close(got, wanted)


def test_entmax_has_the_published_jacobian():
    # diag(s) - s s^T / sum(s) with s = sqrt(p) (Peters et al. 2019, proposition 2, alpha = 1.5)
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    for row in x:
        s = entmax_rows(row, None).sqrt()
        wanted = torch.diag(s) - s[:, None] * s / s.sum()
        got = torch.func.jacrev(lambda r: entmax_rows(r, None))(row)
        assert_close(got, wanted, rtol=1e-9, atol=1e-11)
        assert_close(torch.func.jacfwd(lambda r: entmax_rows(r, None))(row), wanted)


def test_entmax_is_that_of_the_package():
    entmax = pytest.importorskip("entmax", reason="a check for where it is installed")
    x = torch.randn(50, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    assert_close(entmax_rows(x, None), entmax.entmax15(x, dim=-1))


# --- the suites -----------------------------------------------------------------------------------


def of(spec, **expected):
    op = operators.parse(spec).operator
    return operator_suite(op, expected_failures=expected, max_examples=FEW, name=spec)


@of("entmax")
def test_entmax(): ...


@of("tempered")
def test_tempered(): ...


@of("linformer:rank=2")
def test_linformer(): ...


# a suite draws weights of scores, heads of other widths and parameters that are trained
WITHOUT_WEIGHTS = [
    "init_follows_its_generator",
    "deterministic",
    "gradient_is_right",
    "forward_meets_reverse",
    "vmap_is_a_loop",
    "per_example_gradients",
    "float32_follows_float64",
    "queries_stand_alone",
    "queries_permute",
    "keys_permute_with_parameters",
    "linear_in_values",
    "examples_stand_alone",
    "heads_stand_alone",
    "masking_is_deleting",
    "masks_broadcast",
]


class Wide:
    """An operator of width 3 for narrower heads; `drawn` are parameters that nobody trains."""

    def __init__(self, op, drawn):
        self.op, self.drawn, self.name, self.weights = op, drawn, op.name, op.weights

    def init(self, generator, heads, tokens):
        return {} if self.drawn else self.op.init(generator, heads, tokens)

    def attend(self, params, q, k, v, mask=None):
        q, k = (functional.pad(x, (0, 3 - x.shape[-1])) for x in (q, k))
        return self.op.attend(self.drawn or params, q, k, v, mask)


PLACED = "queries and keys have a place"
PLACES = ("queries_stand_alone", "queries_permute", "keys_permute_with_parameters")


@pytest.mark.parametrize(
    ("spec", "fixed", "expected"),
    [
        ("synthesizer:width=3", False, {}),
        ("synthesizer:width=3,normalise=none", False, {}),
        ("performer:width=3,features=5", True, {}),
        ("cosformer", False, dict.fromkeys([*PLACES, "masking_is_deleting"], PLACED)),
    ],
)
def test_what_is_no_function_of_scores(spec, fixed, expected):
    op = operators.parse(spec).operator
    # one head of directions for all
    params = op.init(torch.Generator().manual_seed(0), 1, 1) if fixed else {}
    subject = op if spec == "cosformer" else Wide(op, params)
    # relu makes many a draw zero, which breaks nothing
    examples = FEW * 4 if spec == "cosformer" else FEW
    results = check_operator(
        subject, expected_failures=expected, max_examples=examples, only=WITHOUT_WEIGHTS, name=spec
    )
    failed = [result for result in results if result.passed is False]
    assert not failed, failed
    assert sum(result.passed is True for result in results) == len(WITHOUT_WEIGHTS) - len(expected)


# --- sizes, lattices and bad input ----------------------------------------------------------------


@pytest.mark.parametrize("spec", ["linformer:rank=4", "synthesizer:width=3", "gated", "tempered"])
def test_they_move_to_another_lattice(spec):
    op, params, *_ = drawn(spec, m=17)
    same = operators.resize(op, params, 17, 17)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), same, params)
    moved = operators.resize(op, params, 17, 65)
    like, *_ = drawn(spec, m=65)[1:]
    assert tree.map(lambda x: x.shape, moved) == tree.map(lambda x: x.shape, like)


def test_gated_attention_looks_at_the_same_place_of_a_finer_picture():
    op, params, *_ = drawn("gated:prefix=0", m=16)
    fine = operators.resize(op, params, (0, 4, 4), (0, 8, 8))
    # from the first patch to the one two rows below and one to the right, in patches of the coarse
    place = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    finer = torch.tensor([2.0, 4.0, 20.0], dtype=torch.float64)
    assert_close(params["position"] @ place, fine["position"] @ finer)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("synthesizer:width=0", "`width` >= 1"),
        ("synthesizer:base=relu", "`base`"),
        ("performer:features=0", "`features` >= 1"),
        ("linformer:rank=0", "`rank` >= 1"),
        ("gated:prefix=-1", "`prefix` >= 0"),
        ("gated:locality=-1", "finite `locality` >= 0"),
        ("entmax:alpha=2", "takes no options"),
    ],
)
def test_a_senseless_order_is_one_line(spec, words):
    with pytest.raises(ValueError, match=words) as caught:
        operators.parse(spec)
    assert "\n" not in str(caught.value)


def test_heads_of_another_width_and_other_lengths_are_named():
    for spec in ("synthesizer", "performer"):
        op = operators.parse(spec).operator
        params = op.init(torch.Generator().manual_seed(0), HEADS, N)
        q = torch.randn(HEADS, N, 32)
        with pytest.raises(ValueError, match="heads of 64 numbers, got 32. Say width=32"):
            op.attend(params, q, q, q)
    op, params, q, k, v = drawn("linformer:rank=4")
    with pytest.raises(ValueError, match="initialised for rows of 7 keys, got 5"):
        op.attend(params, q, k[..., :5, :], v[..., :5, :])
    op, params, q, k, v = drawn("gated:rows=2")
    with pytest.raises(ValueError, match="got 5 queries and 7 keys"):
        op.attend(params, q[..., :5, :], k, v)


@pytest.mark.parametrize("join", [operators.hybrid, operators.added])
def test_heads_and_sums_are_of_scores_and_of_one_lattice_where_their_parts_are(join):
    def traits(*specs):
        made = join([operators.parse(spec).operator for spec in specs]).traits
        return made["of_scores"], made["self_attention"], made["length_free"]

    assert traits("softmax", "sigmoid") == (True, False, True)
    assert traits("softmax", "softconv") == (True, True, False)
    assert traits("performer", "softmax") == (False, False, True)


# --- edges, of these and of the operators by position ---------------------------------------------

EDGES = [*FORMULAS, "static", "static:rank=2,base=softmax", "static:normalise=softmax"]
EDGES += [
    "relative:rows=2,inside=true",
    "softconv:rows=2",
    "G2:order=by_offset,rows=2,base=softmax",
]
EDGES += ["G2:order=beside_relative,rows=2"]


@pytest.mark.parametrize("spec", EDGES)
@pytest.mark.parametrize("shape", [(N,), (2, 1, 1, N), (2, HEADS, N, N)])
def test_what_masked_keys_hold_changes_no_value_and_no_gradient(spec, shape):
    op, params, q, k, v = drawn(spec, 5)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = mask & (torch.arange(N) != 3)  # one key that nobody attends to
    seen = mask.expand(2, HEADS, N, N).any(-2)[..., None]

    def loss(params, q, k, v):
        out = op.attend(params, q, k, v, mask)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

    wanted = grad(loss, (0, 1, 2, 3))(params, q, k, v)
    k, v = (torch.where(seen, x, math.nan) for x in (k, v))
    got = grad(loss, (0, 1, 2, 3))(params, q, k, v)
    assert_close(got, wanted)
    assert not bool(torch.where(seen, 0, got[2]).any()) and bool(
        op.attend(params, q, k, v, mask).isfinite().all()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", EDGES)
def test_half_inputs_are_computed_in_float32_and_rounded_once(spec, dtype):
    op, params, *qkv = drawn(spec, 2)
    params = tree.to(params, torch.float32)
    q, k, v = (x.to(dtype) for x in qkv)
    for mask in (None, torch.rand(2, 1, N, N) > 0.3):
        wanted = op.attend(params, q.float(), k.float(), v.float(), mask)
        got = op.attend(params, q, k, v, mask)
        assert got.dtype == dtype
        error = (got.float() - wanted).norm() / wanted.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), float(error)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(op.attend(params, q.float(), k.float(), v.float(), mask), wanted)


@pytest.mark.parametrize("normalise", ["softmax", None])
def test_a_synthesizer_has_the_leading_axes_of_keys_that_it_does_not_read(normalise):
    op = operators.synthesizer(width=D, normalise=normalise)
    params = op.init(torch.Generator().manual_seed(0), 2, 5)
    q, k, v = (torch.randn(n, 2, m, D) for n, m in ((1, 3), (4, 5), (1, 5)))
    out = op.attend(params, q, k, v)
    assert out.shape == (4, 2, 3, D) and torch.equal(out[:1], op.attend(params, q, k[:1], v))
