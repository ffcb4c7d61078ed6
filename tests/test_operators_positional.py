"""Operators that mix by position: against their written form, through the suites, resized."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kart import kernels, models, operators, tree
from kart.kernels import stream
from kart.operators.relative import entry_index
from kart.testing import operator_suite

HEADS, D = 2, 3
FEW = max(8, settings().max_examples // 4)
FORMS = ["", "base=softmax", "signed=false", "signed=false,base=softmax", "normalise=softmax"]
FORMS += ["normalise=softmax,base=softmax", "inside=true"]
KINDS = ["static", "static:rank=2", "relative:prefix=0,rows=1", "relative:prefix=0,rows=2"]


def spec_of(kind, *options):
    options = [*kind.partition(":")[2].split(","), *options]
    options = ",".join(filter(None, options))
    return kind.partition(":")[0] + (":" if options else "") + options


def drawn(spec, tokens, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    op = operators.parse(spec).operator
    params = op.init(generator, HEADS, tokens)
    noise = tree.map(lambda x: x + 0.5 * torch.randn(x.shape, generator=generator), params)
    qkv = (torch.randn(2, HEADS, tokens, D, generator=generator).to(dtype) for _ in range(3))
    return op, tree.to(noise, dtype), *qkv


class Cyclic:
    """An operator of N tokens for any number of queries: query n stands at token n mod N.

    The suites draw queries and keys of different numbers, which these operators refuse.
    """

    def __init__(self, op):
        self.op, self.name, self.options, self.init = op, op.name, {}, op.init

    def blocks(self, call, x, mask, keys):
        n = x.shape[-2]
        short = -n % keys
        padded = functional.pad(x, (0, 0, 0, short)).split(keys, -2)
        masks = [mask] * len(padded)
        if mask is not None and mask.dim() > 1 and mask.shape[-2] == n and n > 1:
            masks = functional.pad(mask, (0, 0, 0, short)).split(keys, -2)
        return torch.cat([call(*pair) for pair in zip(padded, masks, strict=True)], -2)[..., :n, :]

    def weights(self, params, scores, mask=None):
        def call(s, m):
            return self.op.weights(params, s, m)

        return self.blocks(call, scores, mask, scores.shape[-1])

    def attend(self, params, q, k, v, mask=None):
        def call(q, m):
            return self.op.attend(params, q, k, v, m)

        return self.blocks(call, q, mask, k.shape[-2])


PLACED = "a query knows its place"
SUITE = {"queries_permute": PLACED, "queries_stand_alone": PLACED}
BOTH = "the parameters count queries, which are the same tokens, as well as keys"
SUITE |= {"keys_permute_with_parameters": BOTH, "masking_is_deleting": BOTH}


def of(spec, **fields):
    op = operators.parse(spec).operator
    known = ("simplex", "shift_invariant", "softmax_base", "softmax_start")
    traits = {name: op.traits[name] for name in known if name in op.traits}
    return operator_suite(
        Cyclic(op), expected_failures=SUITE, max_examples=FEW, traits=traits, name=spec, **fields
    )


@of("static")
def test_static(): ...


@of("static:rank=2,inside=true,start=scaled")
def test_static_factors_inside_softmax(): ...


@of("static:normalise=softmax")
def test_static_softmax(): ...


@of("relative:prefix=0,rows=1,base=softmax,start=scaled")
def test_relative_over_softmax(): ...


def matrix(spec, params, tokens):
    """T by its definition, entry by entry."""
    t = torch.zeros(HEADS, tokens, tokens, dtype=torch.float64)
    if "matrix" in params:
        return params["matrix"]
    if "queries" in params:
        return torch.einsum("hnr,hmr->hnm", params["queries"], params["keys"])
    rows, columns = ((n + 1) // 2 for n in params["offsets"].shape[1:])
    prefix = tokens - rows * columns
    for n in range(tokens):
        for m in range(tokens):
            i, j = n - prefix, m - prefix
            if i >= 0 and j >= 0:
                dy, dx = j // columns - i // columns, j % columns - i % columns
                t[:, n, m] = params["offsets"][:, rows - 1 + dy, columns - 1 + dx]
            elif i < 0 and j < 0:
                t[:, n, m] = params["prefix"][:, n, m]
            else:
                name, at = ("to_prefix", (i, m)) if i >= 0 else ("from_prefix", (n, j))
                t[:, n, m] = params[name][:, at[0], at[1]]
    return t


def softmax(scores, mask):
    e = torch.where(mask, (scores - scores.amax(-1, keepdim=True)).exp(), 0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


def formula(spec, params, scores, mask):
    """The weights in float64, from the words of the docstring."""
    options = operators.parse(spec).operator.options
    t = matrix(spec, params, scores.shape[-1]).expand(scores.shape)
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    mask = mask.expand(scores.shape)
    if options["inside"]:
        return softmax(scores + t, mask)
    if options["normalise"]:
        y = softmax(t, mask)
    else:
        y = t if options["signed"] else (1 + t.exp()).log() / t.shape[-1]
    y = torch.where(mask, y, 0)
    return y + softmax(scores, mask) if options["base"] else y


MASKS = [None, (), (6,), (1, 6), (6, 6), (6, 1), (HEADS, 6, 6), (2, 1, 1, 6), (2, HEADS, 6, 6)]


@pytest.mark.parametrize("kind", KINDS)
@given(form=st.sampled_from(FORMS), shape=st.sampled_from(MASKS), seed=st.integers(0, 2**31))
@settings(max_examples=FEW)
def test_weights_and_attend_are_the_formula_with_its_gradients(kind, form, shape, seed):
    spec = spec_of(kind, form)
    op, params, q, k, v = drawn(spec, 6, seed)
    mask = None
    if shape is not None:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    assert_close(
        op.weights(params, q @ k.mT / D**0.5, mask),
        formula(spec, params, q @ k.mT / D**0.5, mask),
    )

    def loss(call):
        def total(params, q, k, v):
            out = call(params, q, k, v)
            return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

        return grad(total, (0, 1, 2, 3))(params, q, k, v)

    def plain(params, q, k, v):
        return formula(spec, params, q @ k.mT / D**0.5, mask) @ v

    def streamed(params, q, k, v):
        return op.attend(params, q, k, v, mask)

    assert_close(streamed(params, q, k, v), plain(params, q, k, v))
    assert_close(loss(streamed), loss(plain))


def test_a_table_is_a_convolution_of_the_picture_of_values():
    op, params, q, k, v = drawn("relative:prefix=0,rows=3", 12)
    image = v.mT.reshape(2 * HEADS * D, 3, 4)
    kernel = params["offsets"].repeat_interleave(D, 0).repeat(2, 1, 1)
    out = functional.conv2d(image[None], kernel[:, None], padding=(2, 3), groups=len(image))
    wanted = out[0].reshape(2, HEADS, D, 12).mT
    assert_close(op.attend(params, q, k, v), wanted)


@pytest.mark.parametrize("order", ["relative", "by_offset"])
def test_what_a_transform_asks_first_serves_all_others(order):
    """The kept places of entries are no tensor of the transform in which they are first made."""
    spec = "softconv" if order == "relative" else "G2:order=by_offset"
    op, params, q, k, v = drawn(spec, 5)

    def loss(params):
        return op.attend(params, q, k, v).square().sum()

    entry_index.kept.cache_clear()
    _, curved = torch.func.jvp(grad(loss), (params,), (params,))
    expected = torch.func.jvp(grad(loss), (params,), (params,))[1]
    assert_close(tree.ravel(curved), tree.ravel(expected))
    assert loss(params).isfinite()


def test_a_graph_that_is_recorded_keeps_no_places_of_entries(monkeypatch):
    """They are its own: what it makes has no values before it is replayed, and goes with it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(entry_index, "make", lambda *_: object())
    entry_index.kept.cache_clear()
    cuda = torch.device("cuda")
    assert entry_index(1, 4, 4, cuda) is not entry_index(1, 4, 4, cuda)
    assert not entry_index.kept.cache_info().currsize


def test_by_hand_a_table_of_one_row():
    op = operators.relative(prefix=1, rows=1)
    params = {
        "offsets": torch.tensor([[[-1.0, 2.0, 5.0]]]),  # of the patch before, itself, after
        "to_prefix": torch.tensor([[[7.0], [8.0]]]),
        "from_prefix": torch.tensor([[[3.0, 4.0]]]),
        "prefix": torch.tensor([[[9.0]]]),
    }
    wanted = torch.tensor([[[9.0, 3.0, 4.0], [7.0, 2.0, 5.0], [8.0, -1.0, 2.0]]])
    assert_close(op.weights(params, torch.randn(1, 3, 3)), wanted)


@pytest.mark.parametrize("kind", ["static", "static:rank=3", "relative"])
@pytest.mark.parametrize("form", ["base=softmax", "inside=true"])
def test_beside_or_inside_softmax_it_starts_as_softmax(kind, form):
    op = operators.parse(spec_of(kind, form)).operator
    params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
    q, k, v = (torch.randn(2, HEADS, 17, 4) for _ in range(3))
    wanted = operators.softmax().attend({}, q, k, v)
    assert_close(op.attend(params, q, k, v), wanted, rtol=0, atol=1e-6)
    # and leaves it: something has a gradient
    slopes = grad(lambda p: op.attend(p, q, k, v).square().sum())(params)
    assert max(float(x.abs().max()) for x in tree.leaves(slopes)) > 1e-3


@pytest.mark.parametrize("kind", ["static", "static:rank=3", "relative"])
def test_alone_a_head_puts_out_something_of_the_size_of_its_values(kind):
    op = operators.parse(kind).operator
    params = op.init(torch.Generator().manual_seed(0), 8, 65)
    q, k, v = torch.randn(3, 16, 8, 65, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    assert 0.7 < float(op.attend(params, q, k, v).std()) < 1.4


@pytest.mark.parametrize(
    "spec", ["relative", "softconv", "gated", "G1:order=by_offset", "G1:order=beside_relative"]
)
def test_one_spec_fits_windows_and_pictures_with_a_class_token(spec):
    for tokens, prefix in ((17, 1), (16, 0), (2, 1), (1, 0)):
        op = operators.parse(spec).operator
        explicit = {"order": spec.partition("order=")[2]} if "order" in spec else {}
        named = ",".join([f"{a}={b}" for a, b in {**explicit, "prefix": prefix}.items()])
        other = operators.parse(f"{spec.partition(':')[0]}:{named}").operator
        a, b = (one.init(torch.Generator().manual_seed(0), 2, tokens) for one in (op, other))
        assert tree.named(a).keys() == tree.named(b).keys()
        q, k, v = (torch.randn(1, 2, tokens, 4) for _ in range(3))
        assert torch.equal(op.attend(a, q, k, v), other.attend(b, q, k, v))


@pytest.mark.parametrize("model", ["swin_nano", "convit_nano", "vit_nano"])
def test_what_is_recommended_runs_in_every_model(model):
    built = models.create(model, operator="softconv", image_size=32, num_classes=3)
    params = built.init(torch.Generator().manual_seed(0))
    assert built.apply(params, torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_parameters_are_counted_as_the_issue_has_them():
    # vit_nano at patch 4: 4 blocks of 2 heads over a class token and 8 x 8 patches
    counts = {"static": 33800, "static:rank=12": 12480, "relative": 2832, "relative:prefix=1": 2832}
    for spec, wanted in counts.items():
        op = operators.parse(spec).operator
        assert 4 * tree.size(op.init(torch.Generator(), 2, 65)) == wanted
    windows = operators.relative(prefix=0)
    assert tree.size(windows.init(torch.Generator(), 1, 49)) == 13 * 13


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize("form", ["", "inside=true", "normalise=softmax"])
def test_no_sample_has_weights_of_its_own_beyond_a_block_of_queries(form, monkeypatch):
    op, params, q, k, v = drawn(spec_of("static", form), 24)
    q, k, v = (x.repeat(4, 1, 1, 1) for x in (q, k, v))
    mask = torch.rand(8, 1, 24, 24) > 0.3
    wanted = op.attend(params, q, k, v, mask)
    monkeypatch.setattr(stream, "CHUNK", 2 * 8 * HEADS * 24)
    leaves = tree.map(lambda x: x.clone().requires_grad_(), (params, q, k, v))
    with Largest() as largest:
        out = op.attend(*leaves, mask)
        out.square().sum().backward()
    assert_close(out, wanted)
    # T of the parameters, the inputs: not 8 x H x N x N
    assert largest.numbers <= max(q.numel(), HEADS * 24 * 24, stream.CHUNK)


# --- another lattice ------------------------------------------------------------------------------

SIZED = ["static", "static:rank=2", "relative", "relative:inside=true", "static:base=softmax"]


@pytest.mark.parametrize("spec", SIZED)
def test_the_same_lattice_is_the_identity(spec):
    op, params, *_ = drawn(spec, 17)
    same = operators.resize(op, params, 17, 17)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), same, params)


@pytest.mark.parametrize("spec", SIZED)
@pytest.mark.parametrize("sizes", [(17, 65), (65, 17)])
def test_resized_parameters_are_those_of_init_for_the_new_tokens(spec, sizes):
    op, params, *_ = drawn(spec, sizes[0])
    moved = operators.resize(op, params, *sizes)
    _, like, q, k, v = drawn(spec, sizes[1])
    assert tree.map(lambda x: x.shape, moved) == tree.map(lambda x: x.shape, like)
    assert op.attend(moved, q, k, v).isfinite().all()


def offsets(rows, columns):
    """Every offset in sides of the picture, (2 rows - 1, 2 columns - 1) each."""
    dy = torch.arange(1 - rows, rows, dtype=torch.float64) / rows
    dx = torch.arange(1 - columns, columns, dtype=torch.float64) / columns
    return torch.meshgrid(dy, dx, indexing="ij")


@pytest.mark.parametrize("sizes", [((8, 8), (12, 16)), ((16, 16), (8, 8)), ((8, 12), (12, 8))])
@pytest.mark.parametrize("inside", [False, True])
def test_a_smooth_function_of_the_offset_is_sampled_anew(sizes, inside):
    def smooth(rows, columns):
        dy, dx = offsets(rows, columns)
        return (torch.sin(2 * dx) + torch.cos(3 * dy) + dx * dy)[None]

    op = operators.relative(prefix=0, rows=sizes[0][0], inside=inside)
    moved = operators.resize(op, {"offsets": smooth(*sizes[0])}, *sizes)["offsets"]
    ratio = 1.0 if inside else math.prod(sizes[0]) / math.prod(sizes[1])
    wanted = smooth(*sizes[1]) * ratio
    assert float((moved - wanted).norm() / wanted.norm()) < 0.03
    # the middle of the table stays the middle
    middle = sizes[1][0] - 1, sizes[1][1] - 1
    assert_close(moved[0][middle], wanted[0][middle], rtol=0.02, atol=0)


def test_refining_a_table_keeps_its_quadratics_inside():
    dy, dx = offsets(8, 8)
    op = operators.relative(prefix=0, inside=True)
    table = {"offsets": (2 * dy**2 - dx * dy + dx)[None]}
    moved = operators.resize(op, table, (0, 8, 8), (0, 16, 16))["offsets"][0]
    dy, dx = offsets(16, 16)
    inside = (dy.abs() < 0.7) & (dx.abs() < 0.7)
    assert_close(moved[inside], (2 * dy**2 - dx * dy + dx)[inside], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["static", "relative"])
def test_a_head_puts_out_what_it_did_on_the_same_picture(kind):
    def picture(side):
        place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        y, x = torch.cartesian_prod(place, place).unbind(-1)
        tokens = torch.stack([torch.cos(2 * x + y), torch.sin(4 * y), x * y], -1)
        return torch.cat([torch.ones(1, 3, dtype=torch.float64), tokens]).expand(HEADS, -1, -1)

    op, params, *_ = drawn(kind, 65)
    if kind == "relative":
        dy, dx = offsets(8, 8)
        params["offsets"] = ((-4 * (dy - 0.2) ** 2 - 4 * dx**2).exp() - 0.3).expand(HEADS, -1, -1)
        wave = torch.linspace(0, 1, 64, dtype=torch.float64).reshape(8, 8).mT.reshape(64)
        params["to_prefix"] = wave[None, :, None].expand(HEADS, -1, -1)
        params["from_prefix"] = wave[None, None].expand(HEADS, -1, -1)
    else:
        wave = picture(8)[0] @ torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
        params["matrix"] = (wave[:, None] * wave.cos()).expand(HEADS, -1, -1)
    small, large = picture(8), picture(16)
    before = op.attend(params, small, small, small)
    after = op.attend(operators.resize(op, params, 65, 257), large, large, large)
    assert_close(after[:, 0], before[:, 0], rtol=0.05, atol=0.05)
    coarse = after[:, 1:].reshape(HEADS, 8, 2, 8, 2, 3).mean((2, 4)).reshape(HEADS, 64, 3)
    assert float((coarse - before[:, 1:]).norm() / before[:, 1:].norm()) < 0.05


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("static:rank=0", "`rank` >= 1"),
        ("static:base=relu", "`base`"),
        ("static:normalise=sum", "`normalise`"),
        ("static:inside=true,base=softmax", "`inside` alone"),
        ("relative:inside=true,normalise=softmax", "`inside` alone"),
        ("relative:signed=false,normalise=softmax", "`signed` or `normalise`"),
        ("relative:prefix=-1", "`prefix` >= 0"),
        ("relative:rows=0", "`rows` >= 1"),
        ("relative:start=warm", "`start`"),
        ("relative:rank=3", "'rank' has no effect"),
    ],
)
def test_a_senseless_order_is_one_line(spec, words):
    with pytest.raises(ValueError, match=words) as caught:
        operators.parse(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ("relative", 18),
        ("relative:prefix=1", 1),
        ("relative:prefix=1", 16),
        ("relative:prefix=0", 17),
        ("relative:rows=3", 17),
        ("relative:rows=4", 16),
    ],
)
def test_tokens_that_are_no_lattice_are_named(spec, tokens):
    with pytest.raises(ValueError, match=f"got {tokens}. Set `prefix` and `rows`"):
        operators.parse(spec).operator.init(torch.Generator(), 1, tokens)


@pytest.mark.parametrize("spec", ["static", "static:rank=2", "relative"])
def test_cross_attention_and_other_lengths_are_refused(spec):
    op, params, q, k, v = drawn(spec, 17)
    with pytest.raises(ValueError, match="queries to be the tokens of the keys, got 5 queries"):
        op.attend(params, q[..., :5, :], k, v)
    with pytest.raises(ValueError, match="initialised for rows of 17 keys, got 5"):
        op.attend(params, q, k[..., :5, :], v[..., :5, :])
    with pytest.raises(ValueError, match="queries to be the tokens of the keys, got 5 queries"):
        op.weights(params, torch.randn(HEADS, 5, 17))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (65, 17, r"as the \(1, 4, 4\) of `params`"),
        ((2, 3, 5), 17, r"as the \(1, 4, 4\) of `params`"),
        (17, (2, 4, 4), "the 1 prefix tokens"),
    ],
)
def test_a_table_of_another_lattice_is_named(old, new, words):
    op, params, *_ = drawn("relative", 17)
    with pytest.raises(ValueError, match=words):
        operators.resize(op, params, old, new)


def test_they_pickle_share_and_stand_among_other_heads():
    op = pickle.loads(pickle.dumps(operators.parse("relative:base=softmax").operator))
    assert op.options["base"] == "softmax"
    assert operators.parse("relative-U:base=softmax").sharing == "universal"
    mixed = operators.parse("softmax+relative").operator
    params = mixed.init(torch.Generator().manual_seed(0), 2, 17)
    assert mixed.attend(params, *torch.randn(3, 2, 17, 4).unbind(0)).shape == (2, 17, 4)
    assert operators.resize(mixed, params, 17, 65)["1"]["offsets"].shape == (1, 15, 15)


def test_by_queries_is_the_function_under_vmap_and_forward_mode(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 14)
    t, v = torch.randn(7, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def fn(t, v, mask):
        return t.sin() @ v

    def streamed(t, v):
        return kernels.by_queries(fn, [t], [v])

    assert_close(streamed(t, v), fn(t, v, None))
    both = torch.stack([v, v + 1])
    assert_close(torch.func.vmap(streamed, (None, 0))(t, both), fn(t, both, None))
    got = torch.func.jvp(streamed, (t, v), (t, v))
    assert_close(got, torch.func.jvp(lambda t, v: fn(t, v, None), (t, v), (t, v)))


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 32), ("cuda", 2)])
def test_blocks_of_queries_are_larger_on_a_gpu(device, blocks):
    sizes = []

    def fn(q, k, mask):
        sizes.append(len(q))
        return q + 1

    with FakeTensorMode():
        rows, keys = (torch.empty(n, 1, device=device) for n in (2**13, 2**12))
        kernels.by_queries(fn, [rows], [keys])
    assert sizes == [2**13 // blocks] * blocks


# --- functions of score and offset ----------------------------------------------------------------


@of("G2:order=by_offset,prefix=0,rows=1")
def test_by_offset(): ...


@of("G2:order=beside_relative,prefix=0,rows=1,rank=2")
def test_beside_relative(): ...


@pytest.mark.parametrize("family", ["G2", "dog", "rational-2/2", "bspline-G4"])
@pytest.mark.parametrize("base", ["", "base=softmax"])
@pytest.mark.parametrize("shape", [None, (6,), (2, 1, 1, 6), (2, HEADS, 6, 6)])
def test_by_offset_is_a_unit_for_every_offset(family, base, shape):
    spec = f"{family}:order=by_offset,rows=1," + base
    op, params, q, k, v = drawn(spec.rstrip(","), 6)
    basis = op.basis
    assert basis is not None
    mask = None
    if shape is not None:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4

    def plain(params, q, k, v):
        scores = q @ k.mT / D**0.5
        weights = torch.stack(
            [torch.stack([entry(params, scores, n, m) for m in range(6)], -1) for n in range(6)], -2
        )
        kept = torch.ones((), dtype=torch.bool) if mask is None else mask
        kept = kept.expand(scores.shape)
        weights = torch.where(kept, weights, 0)
        return (weights + softmax(scores, kept) if base else weights) @ v

    def entry(params, scores, n, m):
        # token 0 has no place, the others stand in a row
        part, at = {
            (False, False): ("prefix", (0, 0)),
            (False, True): ("from_prefix", (0, m - 1)),
            (True, False): ("to_prefix", (n - 1, 0)),
            (True, True): ("offsets", (0, 4 + m - n)),
        }[n > 0, m > 0]
        unit = {leaf: x[:, at[0], at[1]] for leaf, x in params["units"][part].items()}
        t = params["table"][part][:, at[0], at[1]]
        return t + basis.apply(unit, scores[..., n, m])

    def streamed(params, q, k, v):
        return op.attend(params, q, k, v, mask)

    def slopes(call):
        def total(*args):
            out = call(*args)
            return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

        return grad(total, (0, 1, 2, 3))(params, q, k, v)

    wanted = plain(params, q, k, v)
    assert_close(streamed(params, q, k, v), wanted)
    assert_close(op.weights(params, q @ k.mT / D**0.5, mask) @ v, wanted)
    assert_close(slopes(streamed), slopes(plain))


def test_by_offset_of_a_constant_is_a_table():
    op, params, q, k, v = drawn("polynomial-0:order=by_offset", 17)
    table = {
        name: x + params["units"][name]["coefs"][..., 0] for name, x in params["table"].items()
    }
    wanted = operators.relative().attend(table, q, k, v)
    assert_close(op.attend(params, q, k, v), wanted)


def test_by_offset_holds_one_block_of_queries_at_a_time(monkeypatch):
    op, params, q, k, v = drawn("G2:order=by_offset,rows=1,base=softmax", 41)
    q, k, v = (x.repeat(4, 1, 1, 1) for x in (q, k, v))
    wanted = op.attend(params, q, k, v)
    monkeypatch.setattr(stream, "CHUNK", 8 * HEADS * 41 * 13)
    leaves = tree.map(lambda x: x.clone().requires_grad_(), (params, q, k, v))
    with Largest() as largest:
        out = op.attend(*leaves)
        out.square().sum().backward()
    assert_close(out, wanted)
    assert largest.numbers <= stream.CHUNK < 8 * HEADS * 41 * 41


@pytest.mark.parametrize(
    "spec",
    [
        "softconv",
        "G3:order=by_offset,base=softmax",
        "G3:order=beside_relative",
        "dog:order=beside_relative",
    ],
)
def test_ours_start_as_softmax_leave_it_and_move_to_another_lattice(spec):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
    q, k, v = (torch.randn(2, HEADS, n, 4) for n in (17, 17, 17))
    wanted = operators.softmax().attend({}, q, k, v)
    assert_close(op.attend(params, q, k, v), wanted, rtol=0, atol=1e-6)
    assert op.traits["softmax_start"]
    slopes = tree.named(grad(lambda p: op.attend(p, q, k, v).square().sum())(params))
    moving = {name for name, x in slopes.items() if float(x.abs().max()) > 1e-4}
    learned = {"softconv": [], "G3:order=by_offset,base=softmax": ["units.offsets.coefs"]}
    table = {"softconv": "offsets", "G3:order=by_offset,base=softmax": "table.offsets"}
    assert moving >= {table.get(spec, "0.offsets"), *learned.get(spec, ["1.mix"])}
    noise = tree.map(lambda x: x + 0.1 * torch.randn(x.shape), params)
    moved = operators.resize(op, noise, 17, 65)
    like = op.init(torch.Generator(), HEADS, 65)
    assert tree.map(lambda x: x.shape, moved) == tree.map(lambda x: x.shape, like)
    same = operators.resize(op, noise, 17, 17)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), same, noise)


def test_softconv_is_softmax_beside_a_table():
    op, params, q, k, v = drawn("softconv", 17)
    wanted = operators.softmax().attend({}, q, k, v)
    wanted = wanted + operators.relative().attend(params, q, k, v)
    assert_close(op.attend(params, q, k, v), wanted)


def test_a_sum_is_the_sum():
    parts = [operators.softmax(), operators.static(), operators.parse("G2").operator]
    op = operators.added(parts)
    params = op.init(torch.Generator().manual_seed(0), HEADS, 17)
    q, k, v = (torch.randn(2, HEADS, 17, D) for _ in range(3))
    wanted = sum(one.attend(params[str(i)], q, k, v) for i, one in enumerate(parts))
    assert_close(op.attend(params, q, k, v), wanted)
    weights = op.weights(params, q @ k.mT / D**0.5)
    assert_close(weights @ v, wanted)
    few = operators.added(parts[:2])
    copy = pickle.loads(pickle.dumps(few))
    assert_close(copy.attend(params, q, k, v), few.attend(params, q, k, v), rtol=0, atol=0)
    moved = operators.resize(op, params, 17, 65)
    assert moved["1"]["matrix"].shape == (HEADS, 65, 65)
    with pytest.raises(ValueError, match="`added` needs one Operator or more"):
        operators.added([])


def test_by_offset_refuses_units_with_a_base_of_their_own():
    with pytest.raises(ValueError, match="without a base activation, got base='silu'"):
        operators.parse("G2:order=by_offset,unit_base=silu")
