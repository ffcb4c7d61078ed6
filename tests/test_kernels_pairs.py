"""Attention of a function of the score for every place: each engine against the plain form."""

import pytest
import torch
from torch.testing import assert_close

from kart import bases, kernels
from kart.kernels import pairs, plain, stream
from kart.kernels.cpp import weights as compiled
from kart.kernels.family import family_of

HEADS, WIDTH, VALUES, PLACES = 3, 4, 5, 11
FAMILIES = {
    "fourier": bases.fourier(2),
    "polynomial-0": bases.polynomial(0),
    "chebyshev": bases.chebyshev(3),
    "rbf": bases.gaussian_rbf(4),
    "bspline": bases.bspline(3),
    "silu": bases.fourier(1, base="silu"),
    "none": None,
    "own": bases.linear(lambda x: torch.stack([x.sin(), (2 * x).cos()], -1), 2),
}
# weights that no score has a part in
NEITHER = ("none", "plain")


def source(seed):
    return torch.Generator().manual_seed(seed)


def drawn(basis, queries, keys, dtype=torch.float64, batch=2):
    """q, k, v and entries, and where they stand."""
    draw = source(1)
    q = torch.randn(batch, queries, HEADS, WIDTH, generator=draw).transpose(1, 2)
    k = torch.randn(batch, HEADS, WIDTH, keys, generator=draw).mT
    v = torch.randn(HEADS, keys, VALUES, generator=draw)
    width = 0 if basis is None else basis.features(torch.zeros(1)).shape[-1]
    entries = torch.randn(HEADS, 1 + width, PLACES, generator=draw)
    index = torch.randint(PLACES, (queries, keys), generator=draw)
    return [x.to(dtype) for x in (q, k, v, entries)], index


def masks(queries, keys):
    each = torch.rand(2, HEADS, queries, keys, generator=source(2)) > 0.4
    each[:, :, 0] = False
    return {"none": None, "each": each, "keys": each[0, 0, -1]}


def by_hand(basis, index, form, mask, q, k, v, entries):
    scores = q @ k.mT / WIDTH**0.5
    y, coefs = entries[:, 0][:, index], entries[:, 1:].movedim(1, -1)[:, index]
    if basis is not None:
        y = y + (basis.features(scores) * coefs).sum(-1)
    if form == "inside":
        return plain.softmax_rows(scores + y, mask) @ v
    y = y if mask is None else torch.where(mask, y, 0)
    return (y + plain.softmax_rows(scores, mask) if form == "beside" else y) @ v


def with_gradients(call, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    probe = torch.randn(out.shape, generator=source(3)).to(out.dtype)
    return [out, *torch.autograd.grad((out * probe).sum(), leaves, materialize_grads=True)]


def check(basis, queries, keys, form, mask, dtype, tolerance):
    inputs, index = drawn(basis, queries, keys, dtype)
    found = with_gradients(
        lambda q, k, v, entries: kernels.pair_attention(basis, entries, index, q, k, v, mask, form),
        inputs,
    )
    wanted = with_gradients(
        lambda *x: by_hand(basis, index, form, mask, *x), [x.double() for x in inputs]
    )
    for name, x, y in zip(["out", *"qkv", "entries"], found, wanted, strict=True):
        assert x.dtype == dtype
        assert_close(
            x.double(), y, rtol=tolerance, atol=tolerance * (1 + y.abs().max()).item(),
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, form) for family in FAMILIES for form in pairs.FORMS if (family, form) != NEITHER],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)],
)
def test_every_engine_has_the_values_and_gradients(family, form, dtype, tolerance):
    for queries, keys in ((37, 37), (5, 61), (1, 9), (33, 2)):
        for mask in masks(queries, keys).values():
            check(FAMILIES[family], queries, keys, form, mask, dtype, tolerance)


@pytest.mark.parametrize("form", pairs.FORMS)
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("none", "own", "silu")]
)
def test_the_compiled_engine_takes_every_family_of_kart(family, form):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    assert compiled.engine_of(family_of(FAMILIES[family]), form, True)[1] == ""


def test_a_wrong_piece_is_refused_and_torch_runs_instead(caplog):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    pieces = family_of(bases.polynomial(2)).pieces
    wrong = pieces.cpp._replace(text=pieces.cpp.text.replace("f[0] =", "f[0] = 1.01f *"))
    assert wrong.text != pieces.cpp.text
    basis = bases.linear(
        lambda x: torch.stack([x**0, x, x * x], -1), 3, family="wrong-powers", cpp=wrong
    )
    check(basis, 5, 9, "plain", None, torch.float32, 1e-5)
    assert "torch runs instead" in caplog.text
    assert "self-check failed" in compiled.engine_of(family_of(basis), "plain", True)[1]


@pytest.mark.parametrize("form", pairs.FORMS)
def test_transforms(form):
    basis = FAMILIES["fourier"]
    inputs, index = drawn(basis, 6, 6, torch.float32)
    inputs[2] = inputs[2].expand(2, -1, -1, -1).clone()

    def call(q, k, v, entries):
        return kernels.pair_attention(basis, entries, index, q, k, v, None, form)

    def wanted(*x):
        return by_hand(basis, index, form, None, *x)

    tangents = [torch.randn(x.shape, generator=source(5)) for x in inputs]
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert_close(
        torch.func.jvp(call, tuple(inputs), tuple(tangents)),
        torch.func.jvp(wanted, tuple(inputs), tuple(tangents)), **close,
    )  # fmt: skip
    both = torch.stack([inputs[3], inputs[3] + 1])

    def slopes(fn):
        one = torch.func.grad(lambda *x: fn(*x).square().sum(), (0, 1, 2, 3))
        return torch.func.vmap(one, (None, None, None, 0))(*inputs[:3], both)

    assert_close(slopes(call), slopes(wanted), rtol=1e-3, atol=1e-3)

    def curved(fn):
        one = torch.func.grad(lambda *x: fn(*x).square().sum(), (0, 3))
        return torch.func.vjp(lambda *x: one(*x)[0], *inputs)[1](tangents[0])

    assert_close(curved(call), curved(wanted), rtol=1e-3, atol=1e-3)


def test_gradients_of_what_no_query_looks_up_are_zero_and_of_no_samples_are_none():
    basis = FAMILIES["fourier"]
    inputs, index = drawn(basis, 6, 6, torch.float32)
    index = index.clamp(max=PLACES - 2)

    def call(q, k, v, entries):
        return kernels.pair_attention(basis, entries, index, q, k, v)

    *_, slopes = with_gradients(call, inputs)
    assert slopes[..., :-1].abs().min() > 0 and not slopes[..., -1].any()
    q, k, v, entries = inputs
    out, *_, slopes = with_gradients(call, [q[:0], k[:0], v, entries])
    assert out.shape == (0, HEADS, 6, VALUES) and not slopes.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_a_block_of_queries_at_a_time(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 2**10)
    monkeypatch.setattr(pairs, "LAID", 1)
    for mask in masks(71, 9).values():
        check(FAMILIES["chebyshev"], 71, 9, "beside", mask, dtype, tolerance)


def test_a_table_alone_is_refused():
    (q, k, v, entries), index = drawn(None, 6, 6, torch.float32)
    with pytest.raises(ValueError, match=r"`form` in \['inside', 'beside'\], got 'plain'"):
        kernels.pair_attention(None, entries, index, q, k, v)
    # every query and key has a place of its own
    own = torch.randn(HEADS, 1, 36, generator=source(6))
    wanted = torch.softmax(q @ k.mT / WIDTH**0.5 + own.view(HEADS, 6, 6), -1) @ v
    own_index = torch.arange(36).view(6, 6)
    assert_close(kernels.pair_attention(None, own, own_index, q, k, v, form="inside"), wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": lambda x: x[..., :-1, :]}, r"`v` \(..., H, 6, e\) .* got \(3, 5, 5\)"),
        ({"index": lambda x: x[:-1]}, r"`index` \(6, 6\) .* and \(5, 6\)"),
        ({"entries": lambda x: x[:, :-1]}, r"`entries` \(H, 5, places\) .* got \(3, 4, 11\)"),
        ({"entries": lambda x: x[0]}, r"`entries` \(H, 5, places\) .* got \(5, 11\)"),
        ({"entries": lambda x: torch.cat([x, x])}, r"leading axes that .* `entries` \(6,\)"),
        ({"index": torch.Tensor.float}, "`index` of int64 or int32, got torch.float32"),
        ({"index": lambda x: x - 12}, "`index` below the 11 places of `entries`, got -"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    basis = FAMILIES["fourier"]
    (q, k, v, entries), index = drawn(basis, 6, 6, torch.float32)
    given = {"q": q, "k": k, "v": v, "entries": entries, "index": index}
    with pytest.raises(ValueError, match=words):
        kernels.pair_attention(basis, **given | {n: fn(given[n]) for n, fn in change.items()})


def test_an_index_can_be_mapped():
    (q, k, v, entries), index = drawn(None, 6, 6, torch.float32)

    def call(index):
        return kernels.pair_attention(None, entries, index, q, k, v, form="inside")

    several = torch.stack([index, index.flip(0)])
    assert_close(torch.func.vmap(call)(several), torch.stack([call(x) for x in several]))


def test_learned_numbers_of_the_features_are_refused_where_gradients_would_be_lost():
    inputs, index = drawn(bases.fourier(1), 6, 6, torch.float32)
    rates = torch.tensor([1.0, 2.0], requires_grad=True)
    basis = bases.linear(lambda x: (x[..., None] * rates).sin(), 2)
    q, k, v, entries = inputs
    with pytest.raises(ValueError, match="needs features of constants, got 'linear' with a"):
        kernels.pair_attention(basis, entries, index, q, k, v)


def test_an_index_that_is_mapped_below_a_gradient_is_each_samples_own():
    basis = FAMILIES["fourier"]
    inputs, index = drawn(basis, 6, 6, torch.float32)
    several = torch.stack([index, index.flip(0)])

    def slopes(index):
        def loss(index, *inputs):
            q, k, v, entries = inputs
            return kernels.pair_attention(basis, entries, index, q, k, v).square().sum()

        return torch.func.grad(loss, (1, 2, 3, 4))(index, *inputs)

    wanted = [torch.stack(x) for x in zip(*map(slopes, several), strict=True)]
    assert_close(torch.func.vmap(slopes)(several), tuple(wanted), rtol=1e-4, atol=1e-4)


def test_places_without_entries_are_refused():
    basis = FAMILIES["fourier"]
    (q, k, v, entries), index = drawn(basis, 6, 6, torch.float32)
    if not kernels.engines()["cpp"].replace("ready", ""):
        with pytest.raises(ValueError, match="`index` below the 11 places of `entries`, got 11"):
            kernels.pair_attention(basis, entries, index.fill_(PLACES), q, k, v)


@pytest.mark.parametrize(("family", "form"), [("fourier", "plain"), ("none", "inside")])
def test_one_graph_is_compiled(family, form):
    basis = FAMILIES[family]
    (q, k, v, entries), index = drawn(basis, 6, 6, torch.float32)

    def call(q, k, v, entries):
        return kernels.pair_attention(basis, entries, index, q, k, v, None, form)

    graph = torch.compile(call, backend="eager", fullgraph=True)
    assert_close(graph(q, k, v, entries), call(q, k, v, entries), rtol=1e-4, atol=1e-4)
