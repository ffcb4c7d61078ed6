"""Attention of one function of the score a head: every engine against the materialised form."""

import pytest
import torch
from torch.testing import assert_close

from kart import bases, kernels, tree
from kart.kernels import entries, plain, stream
from kart.kernels.cpp import weights as compiled
from kart.kernels.family import family_of

HEADS, WIDTH, VALUES = 3, 4, 5
FAMILIES = {
    "fourier": bases.fourier(2),
    "polynomial": bases.polynomial(2),
    "bspline": bases.bspline(3),
    "silu": bases.fourier(1, base="silu"),
    "rational": bases.rational(2, 1),
    "dog": bases.dog(),
    "table": None,
}
# of a table weights without softmax of the scores are no matter of scores
PAIRS = [
    (family, form)
    for family in FAMILIES
    for form in plain.FORMS
    if family != "table" or form in ("inside", "beside")
]


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(family, queries, keys, batch=2, dtype=torch.float64):
    """q, k, v and units, so that none is zero."""
    draw = source(1)
    shapes = (batch, HEADS, queries, WIDTH), (batch, HEADS, keys, WIDTH), (HEADS, keys, VALUES)
    q, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
    if family is None:
        units = {"table": torch.randn(HEADS, queries + keys - 1, generator=draw)}
    else:
        units = family.init(draw, (HEADS,))
        units = {name: x + 0.3 * torch.randn(x.shape, generator=draw) for name, x in units.items()}
    return [x.to(dtype) for x in (q, k, v)], {name: x.to(dtype) for name, x in units.items()}


def masks(queries, keys):
    each = torch.rand(2, HEADS, queries, keys, generator=source(2)) > 0.4
    each[:, :, 0] = False
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return {"none": None, "each": each, "causal": causal, "keys": each[0, 0, 1]}


def with_gradients(family, inputs, units, mask, **options):
    leaves = [x.clone().requires_grad_() for x in (*inputs, *units.values())]
    q, k, v, *rest = leaves
    out = kernels.entry_attention(
        family, dict(zip(units, rest, strict=True)), q, k, v, mask, **options
    )
    probe = torch.randn(out.shape, generator=source(3)).to(out.dtype)
    gradients = torch.autograd.grad((out * probe).sum(), leaves, materialize_grads=True)
    return {"out": out, **dict(zip([*"qkv", *units], gradients, strict=True))}


def check(family, queries, keys, mask, tolerance=1e-11, dtype=torch.float64, **options):
    inputs, units = drawn(family, queries, keys, dtype=dtype)
    factor = torch.rand(2, 1, queries, 1, generator=source(4)).to(dtype)
    options |= {"factor": factor}
    found = with_gradients(family, inputs, units, mask, **options)
    wide = [x.double() for x in inputs], {name: x.double() for name, x in units.items()}
    options |= {"engine": "plain", "factor": factor.double()}
    wanted = with_gradients(family, *wide, mask, **options)
    for name, x in wanted.items():
        assert_close(
            found[name].double(), x, rtol=tolerance, atol=tolerance * (1 + x.abs().max()).item(),
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize(("family", "form"), PAIRS)
@pytest.mark.parametrize("chunk", [2**10, stream.CHUNK])
def test_torch_has_the_values_and_gradients_of_the_materialised_form(
    family, form, chunk, monkeypatch
):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    for queries, keys in ((5, 9), (9, 3)):
        for mask in masks(queries, keys).values():
            check(FAMILIES[family], queries, keys, mask, form=form, engine="torch")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("fourier", form) for form in ("plain", "l1", "inside", "simplex")),
        ("table", "beside"),
    ],
)
def test_the_compiled_engine_has_them_in_single_precision(family, form):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    for queries, keys in ((37, 37), (5, 61)):
        for mask in masks(queries, keys).values():
            options = {"form": form, "engine": "cpp", "dtype": torch.float32}
            check(FAMILIES[family], queries, keys, mask, 3e-5, **options)


@pytest.mark.parametrize(
    ("basis", "form"),
    [
        (bases.fourier(1), "l1"),
        (bases.polynomial(3), "softmax"),
        (bases.polynomial(6), "softmax"),
    ],
)
def test_the_check_of_the_compiled_engine_knows_what_amplifies_roundings(basis, form):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    assert compiled.engine_of(family_of(basis), form, False)[1] == ""


@pytest.mark.parametrize("engine", ["plain", "torch", "cpp"])
def test_the_simplex_by_hand(engine):
    if engine == "cpp" and kernels.engines()["cpp"] != "ready":
        pytest.skip(kernels.engines()["cpp"])
    # scores of a query are its number times those of the keys, and the output is the weights
    keys = torch.tensor([1.0, 0.5, -2.0, 1.0])
    q = torch.tensor([1.0, 0.0, 1e8, -1.0, torch.nan, 1.0])[:, None]
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 3], mask[5] = False, False
    units = {"coefs": torch.tensor([[0.0, 1.0]])}
    out = kernels.entry_attention(
        bases.polynomial(1), units, q[None], keys[None, :, None], torch.eye(4)[None], mask,
        form="simplex", scale=1.0, engine=engine,
    )  # fmt: skip
    third, none = 1 / 3, torch.nan
    wanted = [[0.75, 0.25, 0.0], [third] * 3, [1.0, 0, 0], [0, 0, 1.0], [none] * 3, [0.0] * 3]
    assert_close(out[0, :, :3], torch.tensor(wanted), equal_nan=True)
    assert_close(out[0, [0, 1, 2, 3, 5], 3], torch.zeros(5))


@pytest.mark.parametrize("engine", ["plain", "torch", "cpp"])
def test_the_simplex_of_scores_too_large_for_their_numbers(engine):
    if engine == "cpp" and kernels.engines()["cpp"] != "ready":
        pytest.skip(kernels.engines()["cpp"])
    # times 1e30 the scores are inf, inf, 0 and -inf; halves are lost beside 2^25 / 1e10
    keys = torch.tensor([1e10, 1e10, 0.0, -1e10])[:, None]
    q = torch.tensor([1e30, -1e30, 1e30, -1e30, -1e30, 2**25 / 1e10])[:, None].requires_grad_()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[2, :3], mask[3, 2:], mask[4, 3] = False, False, False
    values = torch.eye(4)[None].requires_grad_()
    out = kernels.entry_attention(
        bases.polynomial(1), {"coefs": torch.tensor([[0.0, 1.0]])}, q[None], keys[None], values,
        mask, form="simplex", scale=1.0, engine=engine,
    )  # fmt: skip
    half, alone = [0.5, 0.5, 0, 0], [0, 0, 0, 1.0]
    wanted = torch.tensor([half, alone, alone, half, [0, 0, 1.0, 0], half])
    assert_close(out[0], wanted)
    pull = torch.arange(24.0).view(6, 4)
    slopes, found = torch.autograd.grad((out[0] * pull).sum(), (q, values))
    assert_close(found[0], wanted.mT @ pull)
    assert_close(slopes, torch.zeros(6, 1))


@pytest.mark.parametrize("engine", ["plain", "torch", "cpp"])
@pytest.mark.parametrize("form", ["inside", "beside"])
def test_softmax_of_infinities_alone_is_no_number(form, engine):
    if engine == "cpp" and kernels.engines()["cpp"] != "ready":
        pytest.skip(kernels.engines()["cpp"])
    q = torch.tensor([1e30, -1e30])[:, None]
    keys = torch.full((3, 1), 1e10)
    out = kernels.entry_attention(
        None, {"table": torch.zeros(1, 4)}, q[None], keys[None], torch.ones(1, 3, 1),
        form=form, scale=-1.0, engine=engine,
    )  # fmt: skip
    assert out.isnan().all()


def overflowing(masked):
    """Queries, keys of scores -inf but for the last query, and a mask; the third has no key."""
    q = torch.tensor([-1e30, -1e30, -1e30, 1e-10])[:, None].requires_grad_()
    mask = torch.ones(4, 5, dtype=torch.bool)
    if masked == "pairs":
        mask[:, 1] = False
    mask[2] = masked == "whole"
    return q, torch.full((5, 1), 1e10), None if masked == "whole" else mask


@pytest.mark.parametrize("engine", ["plain", "torch", "cpp"])
@pytest.mark.parametrize("form", ["softmax", "inside", "beside"])
@pytest.mark.parametrize("masked", ["whole", "rows", "pairs"])
def test_what_is_hidden_makes_no_number_of_infinities(masked, form, engine):
    if engine == "cpp" and kernels.engines()["cpp"] != "ready":
        pytest.skip(kernels.engines()["cpp"])
    q, keys, mask = overflowing(masked)
    basis, units = None, {"table": torch.zeros(1, 8)}
    if form == "softmax":
        basis, units = bases.polynomial(1), {"coefs": torch.tensor([[0.0, 1.0]])}
    out = kernels.entry_attention(
        basis, units, q[None], keys[None], torch.ones(1, 5, 1), mask,
        form=form, scale=1.0, engine=engine,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(out.sum(), q)
    row = torch.nan if mask is None else 0.0
    wanted = torch.tensor([torch.nan, torch.nan, row, 1.0])[:, None]
    assert_close(out[0], wanted, equal_nan=True)
    assert slope[:2].isnan().all() and (mask is None or slope[2] == 0)


@pytest.mark.parametrize(
    ("family", "form"), [x for x in PAIRS if x[0] in ("fourier", "rational", "table")]
)
def test_transforms_go_through_it(family, form):
    basis = FAMILIES[family]
    inputs, units = drawn(basis, 4, 5)
    mask, factor = masks(4, 5)["each"], torch.rand(4, 1, generator=source(4)).double()

    def call(engine):
        return lambda units, q, k, v: kernels.entry_attention(
            basis, units, q, k, v, mask, form=form, factor=factor, engine=engine
        )

    streamed, wanted = call("torch"), call("plain")
    primals = (units, *inputs)
    along = ({name: x.cos() for name, x in units.items()}, *(x.sin() for x in inputs))
    for one, other in zip(
        torch.func.jvp(streamed, primals, along), torch.func.jvp(wanted, primals, along),
        strict=True,
    ):  # fmt: skip
        assert_close(one, other)

    def second(fn):
        """A gradient of gradients, of all that is learned."""

        def inner(*primals):
            def loss(*primals):
                return fn(*primals).square().sum()

            found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*primals)
            return sum(x.square().sum() for x in (*found[0].values(), *found[1:]))

        return torch.func.grad(inner, argnums=(0, 1, 2, 3))(*primals)

    for one, other in zip(second(streamed), second(wanted), strict=True):
        assert_close(one, other)
    # members that have functions of their own
    members = {name: torch.stack([x, 2 * x]) for name, x in units.items()}

    def each(fn):
        def gradient(units):
            return torch.func.grad(lambda units: fn(units, *inputs).square().sum())(units)

        return torch.func.vmap(gradient)(members)

    assert_close(each(streamed), each(wanted))
    shared = [torch.func.vmap(lambda q, fn=fn: fn(units, q, *inputs[1:]))(
        torch.stack([inputs[0], -inputs[0]])
    ) for fn in (streamed, wanted)]  # fmt: skip
    assert_close(*shared)


# lengths of a row of q and k and of v: whole vectors, and a rest
@pytest.mark.parametrize("widths", [(32, 16), (7, 5)])
@pytest.mark.parametrize(
    ("family", "form"),
    [*(pair for pair in PAIRS if pair[0] in ("fourier", "table")), ("rational", "inside")],
)
def test_few_queries_meet_their_keys_in_lanes(family, form, widths):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    basis, draw, keys = FAMILIES[family], source(6), 41
    for queries in (1, 2, 4, 5):
        q, k, v = (
            torch.randn(2, HEADS, rows, width, generator=draw)
            for rows, width in ((queries, widths[0]), (keys, widths[0]), (keys, widths[1]))
        )
        units = drawn(basis, queries, keys, dtype=torch.float32)[1]
        factor = torch.rand(2, 1, queries, 1, generator=draw)
        each = torch.rand(2, HEADS, queries, keys, generator=draw) > 0.4
        each[0, 0, 0] = False
        # as made by `reshape` and `transpose` of projections, and with their axes turned
        laid = [
            (k, v),
            [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
            [x.mT.contiguous().mT for x in (k, v)],
        ]
        for mask in (None, each, each[1, 0, :1]):
            with torch.no_grad():
                wanted = kernels.entry_attention(
                    basis, {name: x.double() for name, x in units.items()},
                    q.double(), k.double(), v.double(), mask,
                    form=form, factor=factor.double(), engine="plain",
                )  # fmt: skip
                for one, two in laid:
                    found = kernels.entry_attention(
                        basis, units, q, one, two, mask, form=form, factor=factor, engine="cpp"
                    )
                    bound = 3e-5 * (1 + wanted.abs().max().item())
                    assert_close(found.double(), wanted, rtol=3e-5, atol=bound)


def test_few_queries_take_the_compiled_engine_and_its_gradients_are_the_expressions(monkeypatch):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    for queries, keys in ((1, 64), (3, 64), (4, 64)):
        check(FAMILIES["fourier"], queries, keys, None, 3e-5, torch.float32, form="plain")
    basis = FAMILIES["fourier"]
    inputs, units = drawn(basis, 1, 64, dtype=torch.float32)
    recorded = kernels.entry_attention(basis, units, *[x.requires_grad_() for x in inputs])
    expression, calls = plain.entry_attention, []
    monkeypatch.setattr(
        plain, "entry_attention", lambda *x, **more: calls.append(x) or expression(*x, **more)
    )
    with torch.no_grad():
        # to the bit, whether it is recorded or not
        assert_close(kernels.entry_attention(basis, units, *inputs), recorded, rtol=0, atol=0)
    assert not calls
    # the kernels would fill a block of queries
    recorded.sum().backward()
    assert len(calls) == 1


def test_one_query_is_the_first_of_many():
    basis = FAMILIES["fourier"]
    (q, k, v), units = drawn(basis, 6, 6)
    for form in plain.FORMS:
        whole = kernels.entry_attention(basis, units, q, k, v, form=form, engine="torch")
        alone = kernels.entry_attention(basis, units, q[..., :1, :], k, v, form=form)
        assert_close(alone, whole[..., :1, :])


def test_bad_input_is_named():
    basis = FAMILIES["fourier"]
    (q, k, v), units = drawn(basis, 4, 5)
    with pytest.raises(ValueError, match=r"`entry_attention` needs `form` in .*got 'l2'"):
        kernels.entry_attention(basis, units, q, k, v, form="l2")
    with pytest.raises(ValueError, match=r"`entry_attention` needs `engine` in"):
        kernels.entry_attention(basis, units, q, k, v, engine="cuda")
    with pytest.raises(ValueError, match=r"`entry_attention` needs `v` \(\.\.\., H, 5, e\)"):
        kernels.entry_attention(basis, units, q, k, v[..., :4, :])
    with pytest.raises(ValueError, match=r"needs a `table` \(H, 8\) .* got \(3, 7\)"):
        table = {"table": torch.zeros(3, 7).double()}
        kernels.entry_attention(None, table, q, k, v, form="inside")
    with pytest.raises(ValueError, match=r"needs `form` inside or beside for a table, got 'l1'"):
        kernels.entry_attention(None, {}, q, k, v, form="l1")
    with pytest.raises(ValueError, match=r"cannot run engine='cpp' here: .* float32 alone"):
        kernels.entry_attention(basis, units, q, k, v, engine="cpp")
    with pytest.raises(ValueError, match=r"cannot run engine='triton' here: .* CUDA"):
        kernels.entry_attention(basis, units, q, k, v, engine="triton")
    assert entries.ENGINES[0] == "auto"


@pytest.mark.parametrize("rows", [1, 16, 37, 70])
def test_a_table_of_every_query_and_key_meets_softmax_in_one_pass(rows):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    (q, k, v), _ = drawn(None, rows, 41, dtype=torch.float32)
    table = torch.randn(HEADS, rows, 41, generator=source(5))
    probe = torch.randn(2, HEADS, rows, VALUES, generator=source(3))

    def with_gradients(attention, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v.expand(2, *v.shape), table)]
        out = attention(*leaves[:3], None, None, leaves[3])
        return [out, *torch.autograd.grad((out * probe.to(dtype)).sum(), leaves)]

    found = with_gradients(kernels.softmax_attention, torch.float32)
    for x, wanted in zip(
        found, with_gradients(plain.softmax_attention, torch.float64), strict=True
    ):
        bound = 3e-5 * (1 + wanted.abs().max().item())
        assert_close(x.double(), wanted, rtol=3e-5, atol=bound)


def limited(function, calls=200):
    """`function`, which fails when it is called more often."""
    left = iter(range(calls))

    def call(*arguments):
        assert next(left, None) is not None, "it is drawn again and again"
        return function(*arguments)

    return call


NARROW = {
    "meyer": bases.meyer(),
    "gaussian_rbf": bases.gaussian_rbf(3, (-0.5, 0.5)),
    "dog": bases.dog(),
}


@pytest.mark.parametrize("family", NARROW)
def test_entries_that_vanish_far_out_do_not_keep_the_first_use_waiting(family, monkeypatch):
    basis = NARROW[family]
    known = family_of(basis)
    monkeypatch.setattr(compiled, "_cases", limited(compiled._cases))
    inputs, units = drawn(basis, 7, 9)
    wanted = with_gradients(basis, inputs, units, None, form="l1", engine="plain")
    inputs, units = tree.to((inputs, units), torch.float32)
    why = compiled.engine_of(known, "l1", False)[1]
    assert "again and again" not in why
    found = with_gradients(basis, inputs, units, None, form="l1", engine="auto" if why else "cpp")
    for name, exact in wanted.items():
        assert_close(found[name].double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["auto", "torch", "plain"])
@pytest.mark.parametrize("family", [bases.fourier(2), bases.rational(2, 2), bases.dog()])
def test_units_of_more_axes_and_other_factors_are_refused(family, engine):
    q, units = torch.randn(2, 2, 5, 4, generator=source()), family.init(source(), (2,))
    if engine != "plain" or family.coefficients is not None:
        with pytest.raises(ValueError, match=r"`units` of one function a head, \(H,\), got leaves"):
            wrong = family.init(source(), (2, 3, 5))
            kernels.entry_attention(family, wrong, q, q, q, engine=engine)
    for factor, words in ((2.0, "got float"), (torch.ones(5, 5), r"got \(5, 5\)")):
        with pytest.raises(ValueError, match=f"`factor` as a tensor .*, {words}"):
            kernels.entry_attention(family, units, q, q, q, factor=factor, engine=engine)
    factor = torch.full((5, 1), 2.0)
    found, other = (
        kernels.entry_attention(family, units, q, q, q, factor=x, engine=engine)
        for x in (factor, factor.double())
    )
    assert torch.equal(found, other)


def test_a_graph_of_any_sizes_takes_a_factor_made_inside():
    basis, q = bases.fourier(2), torch.randn(2, 2, 5, 4, generator=source())
    units = basis.init(source(), (2,))

    def attend(q):
        return kernels.entry_attention(basis, units, q, q, q, factor=torch.full((5, 1), 2.0))

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_close(compiled(q), attend(q))
    torch.compiler.reset()


def test_a_table_is_asked_for():
    q = torch.randn(2, 2, 5, 4, generator=source())
    for units in ({}, None):
        with pytest.raises(ValueError, match="`units` as a dict, of a table one with 'table', got"):
            kernels.entry_attention(None, units, q, q, q, form="inside")
    with pytest.raises(ValueError, match=r"`table` \(H, 9\) .* got \(2, 3, 9\)"):
        kernels.entry_attention(None, {"table": torch.ones(2, 3, 9)}, q, q, q, form="inside")


def test_nonlinear_units_of_more_axes_are_refused():
    q, family = torch.randn(2, 2, 5, 4, generator=source()), bases.dog()
    with pytest.raises(
        ValueError, match=r"`units` of shape \(H, r, M\), got leaves \[\(2, 3, 5, 7"
    ):
        kernels.contract_units(family, family.init(source(), (2, 3, 5, 7)), q, q)
