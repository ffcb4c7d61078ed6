"""What only a GPU can show: the Triton engine, half precision, no host synchronisation, and that
everything else is on CUDA what it is on the CPU.

A copy whose DEVICE is "cpu", without the skip, runs on the CPU: so a new test is tried.
"""

import contextlib
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import func
from torch.nn import functional
from torch.testing import assert_close

import kart.nn
from kart import bases, cli, data, gpu, kernels, models, operators, train, tree
from kart.kernels import chunked, core, entries, plain
from kart.kernels import triton as triton_engine
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import Product, family_of
from kart.kernels.triton import entries as triton_entries
from kart.operators.relative import entry_index
from tests import tiny

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    # torch's backward runs in threads of its own, and the first to multiply says this
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
# relative errors in the norm: 11 bits of tf32 products of float32 scores and of float16, 8 of
# bfloat16
LIMITS = {torch.float32: 4e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])


def assert_near(got, wanted, limit, floor=1e-12):
    """Every tensor of `got` is that of `wanted`, up to an error relative to its norm,
    or to `floor` where that is less.
    """
    errors = {}
    for (name, a), b in zip(tree.named(got).items(), tree.leaves(wanted), strict=True):
        assert a.shape == b.shape, name
        a, b = (x.detach().double().cpu() for x in (a, b))
        errors[name] = float((a - b).norm() / b.norm().clamp(min=floor))
    assert all(error < limit for error in errors.values()), errors


def assert_equal(first, second):
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), first, second)


def values_and_gradients(function, inputs, probe):
    """`function(**inputs)` and the gradients of all tensors of `inputs`."""
    leaves = tree.map(lambda x: x.detach().requires_grad_(), inputs)
    out = function(**leaves)
    flat = tree.leaves(leaves)
    total = (out * probe.to(out)).sum()
    if not total.requires_grad:
        return {"out": out}
    found = iter(torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True))
    return {"out": out.detach(), "gradients": tree.map(lambda _: next(found), leaves)}


def on_device(inputs, dtype=torch.float32):
    """`inputs` as a user has them there: parameters stay float32."""
    kept = {"params": torch.float32}
    return {name: tree.to(x, DEVICE, kept.get(name, dtype)) for name, x in inputs.items()}


def exact(inputs, dtype=torch.float32):
    """`inputs` in float64, q, k and v as `dtype` rounds them."""
    rounded = {name: x if name == "params" else x.to(dtype) for name, x in inputs.items()}
    return tree.to(rounded, torch.float64)


# --- the product of every basis -------------------------------------------------------------------

SIZES = [(1, 1), (2, 63), (65, 64), (197, 197), (130, 785)]


def product_case(basis, n, m, rank=12, heads=3, width=64, batch=2):
    """Drawn `{"q", "k", "params"}`, whose "params" are the units, and a probe."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    q, k = draw(batch, heads, n, width), draw(batch, heads, m, width)
    units = tree.map(lambda x: x + 0.1 * draw(x.shape), basis.init(generator, (heads, rank, m)))
    return {"q": q, "k": k, "params": units}, draw(batch, heads, n, rank)


def product(basis, engine="auto", mask=None):
    """The streamed product of units, as a function of q, k and them."""
    if basis.features is None:
        entry = plain.contract_units if engine == "plain" else kernels.contract_units
        return lambda q, k, params: entry(basis, params, q, k, mask)

    def of(q, k, params):
        coefs = basis.coefficients(params)
        return kernels.contract(basis, coefs, q, k, mask, engine=engine)

    return of


@pytest.mark.parametrize("engine", ["triton", "torch"])
@DTYPES
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("grid", [1, 3, 7])
def test_engines_agree_with_float64_on_the_cpu(engine, dtype, n, m, grid):
    basis = bases.fourier(grid)
    inputs, probe = product_case(basis, n, m)
    wanted = values_and_gradients(product(basis, "plain"), exact(inputs, dtype), probe)
    got = values_and_gradients(product(basis, engine), on_device(inputs, dtype), probe.to(DEVICE))
    assert_near(got, wanted, LIMITS[dtype])


BASES = [
    *(bases.fourier(3), bases.fourier(2, base="gelu", scales=True)),
    *(bases.polynomial(0), bases.polynomial(3), bases.chebyshev(4), bases.gaussian_rbf(6)),
    *(bases.bspline(5, degree) for degree in range(1, 6)),
    *(bases.rational(), bases.mexican_hat(base="silu"), bases.morlet(), bases.dog()),
    *(bases.meyer(), bases.shannon()),
]
EVERY_BASIS = pytest.mark.parametrize(
    "basis", BASES, ids=lambda basis: f"{basis.family}-{basis.options.get('degree', '')}"
)


@EVERY_BASIS
@pytest.mark.parametrize("dtype", [*LIMITS, torch.float64], ids=str)
def test_a_basis_is_that_of_the_cpu(basis, dtype):
    inputs, probe = product_case(basis, 33, 65, width=16)
    inputs, probe = exact(inputs, dtype), probe.to(dtype)
    mask = torch.rand(33, 65, generator=torch.Generator().manual_seed(1)) > 0.4
    wanted = values_and_gradients(product(basis, "plain", mask), inputs, probe)
    moved = on_device(inputs, dtype)
    if dtype == torch.float64:
        moved = tree.to(inputs, DEVICE)
    # in float64 both are torch; units that are not linear have no engine to choose
    for engine in ["auto"] if basis.features is None else ["auto", "torch"]:
        got = values_and_gradients(product(basis, engine, mask.to(DEVICE)), moved, probe.to(DEVICE))
        assert_near(got, wanted, LIMITS.get(dtype, 1e-9))


@EVERY_BASIS
def test_auto_takes_triton_for_every_basis_and_torch_for_wide_heads_and_float64(basis):
    family = family_of(basis)
    rows = torch.zeros(1, 1, 4, 128, device=DEVICE)
    leaves = basis.init(torch.Generator(), (1, 2, 4))
    coefs = family.pieces.leaves(leaves) if basis.features is None else basis.coefficients(leaves)
    coefs = coefs.reshape(1, 1, 2, 4, -1).to(DEVICE)
    wide = torch.zeros(1, 1, 4, 129, device=DEVICE)
    for x, engine in ((rows, triton_engine), (wide, chunked), (rows.double(), chunked)):
        assert core.choose("auto", Product(family, x, x, coefs, None, 1.0))[0] is engine


# shapes at which a launch, a tile or a fallback changes
EDGES = {
    "one query": {"n": 1, "m": 40},
    "one key": {"n": 40, "m": 1},
    "rank 1": {"n": 20, "m": 20, "rank": 1},
    "one head": {"n": 20, "m": 20, "heads": 1},
    "width 1": {"n": 20, "m": 20, "width": 1},
    "width 128": {"n": 20, "m": 20, "width": 128},
    "width 129": {"n": 20, "m": 20, "width": 129},
    "no sample": {"n": 20, "m": 20, "batch": 0},
    "many tokens": {"n": 2049, "m": 2049, "heads": 1, "batch": 1, "width": 16, "rank": 2},
    "many keys": {"n": 1, "m": 70_000, "heads": 1, "batch": 1, "width": 16, "rank": 1},
    "many queries": {"n": 70_000, "m": 1, "heads": 1, "batch": 1, "width": 16, "rank": 1},
    "many samples": {"n": 2, "m": 3, "heads": 2, "batch": 40_000, "width": 16, "rank": 2},
    "many heads": {"n": 2, "m": 3, "heads": 40_000, "batch": 2, "width": 16, "rank": 2},
}


@pytest.mark.parametrize("basis", [bases.fourier(2), bases.dog()], ids=lambda basis: basis.family)
@pytest.mark.parametrize("sizes", EDGES.values(), ids=EDGES)
def test_a_product_of_extreme_sizes(basis, sizes):
    inputs, probe = product_case(basis, **sizes)
    wanted = values_and_gradients(product(basis, "plain"), exact(inputs), probe)
    got = values_and_gradients(product(basis), on_device(inputs), probe.to(DEVICE))
    assert_near(got, wanted, LIMITS[torch.float32])


def strided(case):
    """The case with q of one sample for all, k with a step between its numbers, a turned mask."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2))
    q = draw(1, 3, 20, 16).expand(4, -1, -1, -1)
    k = draw(4, 20, 3, 32)[..., ::2].transpose(1, 2)
    mask = (draw(4, 1, 20, 20) > -0.5).mT
    return {**case, "q": q, "k": k}, mask


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("basis", [bases.fourier(2), bases.dog()], ids=lambda basis: basis.family)
def test_a_product_of_strided_tensors(basis, engine):
    case, probe = product_case(basis, 20, 20, width=16, batch=4)
    inputs, mask = strided(case)
    # `to` keeps the strides of what does not overlap alone
    moved = on_device(case) | {
        "q": inputs["q"][:1].to(DEVICE).expand(4, -1, -1, -1),
        "k": functional.pad(inputs["k"].to(DEVICE), (0, 3, 1, 0))[..., 1:, :-3],
    }
    turned = mask.mT.contiguous().to(DEVICE).mT
    probe = probe.sum(-1, keepdim=True).expand_as(probe)
    wanted = values_and_gradients(product(basis, "plain", mask), exact(inputs), probe)
    leaves = [moved["q"].requires_grad_(), moved["k"].requires_grad_()]
    y = product(basis, engine, turned)(*leaves, moved["params"])
    found = torch.autograd.grad(y, leaves, probe.to(DEVICE))
    names = ("q", "k")
    got = {"out": y, "gradients": dict(zip(names, found, strict=True))}
    wanted["gradients"] = {name: wanted["gradients"][name] for name in names}
    assert_near(got, wanted, LIMITS[torch.float32])


# --- attention with functions of the score, or tables by offset, for weights ----------------------

FORMS = [form for form in plain.FORMS if form != "simplex"]


def entry_case(basis, n, m, heads=3, width=64, values=48, batch=2):
    """Drawn `{"q", "k", "v", "params"}`, and a probe."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    sizes = {"q": (n, width), "k": (m, width), "v": (m, values)}
    inputs = {x: draw(batch, rows, heads, e).transpose(1, 2) for x, (rows, e) in sizes.items()}
    params = {"table": draw(heads, n + m - 1)} if basis is None else basis.init(generator, (heads,))
    params = tree.map(lambda x: x + 0.1 * draw(x.shape), params)
    return {**inputs, "params": params}, draw(batch, heads, n, values)


def entries_near(basis, form, dtype, mask=None, engine="triton", **sizes):
    inputs, probe = entry_case(basis, **sizes)

    def attend(engine, mask):
        return lambda q, k, v, params: kernels.entry_attention(
            basis, params, q, k, v, mask, form=form, engine=engine
        )

    wanted = values_and_gradients(attend("plain", mask), exact(inputs, dtype), probe.to(dtype))
    mask = None if mask is None else mask.to(DEVICE)
    got = values_and_gradients(attend(engine, mask), on_device(inputs, dtype), probe.to(DEVICE))
    # softmax of one key takes no gradient, up to rounding
    assert_near(got, wanted, LIMITS[dtype], 0.1)


@DTYPES
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_functions_are_those_of_the_cpu(form, n, m, dtype):
    entries_near(bases.fourier(3), form, dtype, n=n, m=m)


@DTYPES
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("form", ["inside", "beside"])
def test_weights_of_a_table_are_those_of_the_cpu(form, n, m, dtype):
    entries_near(None, form, dtype, n=n, m=m)


@EVERY_BASIS
@pytest.mark.parametrize("form", ["l1", "inside", "beside"])
@pytest.mark.parametrize("shape", [(2, 3, 33, 65), (2, 1, 1, 65), (1, 1, 33, 1)], ids=str)
def test_weights_of_a_basis_under_a_mask_are_those_of_the_cpu(basis, form, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    entries_near(basis, form, torch.float32, mask, n=33, m=65, width=16)


ENTRY_EDGES = {name: sizes for name, sizes in EDGES.items() if "rank" not in sizes}
ENTRY_EDGES |= {"width 65": {"n": 20, "m": 20, "width": 65}}


@pytest.mark.parametrize("basis", [bases.fourier(2), None], ids=["fourier", "table"])
@pytest.mark.parametrize("sizes", ENTRY_EDGES.values(), ids=ENTRY_EDGES)
def test_weights_of_extreme_sizes(basis, sizes):
    entries_near(basis, "beside", torch.float32, engine="auto", **sizes)


@pytest.mark.parametrize("basis", [*BASES, None], ids=lambda x: "table" if x is None else x.family)
def test_auto_takes_the_kernels_of_weights_where_they_do_not_refuse(basis):
    family = None if basis is None else family_of(basis)
    q = torch.zeros(1, 1, 4, 16, device=DEVICE)
    theta = torch.zeros(1, 1, 7 if family is None else family.width, device=DEVICE)
    x = Weighted(family, "inside", q, q, q, theta, None, None, 1.0)
    assert entries._engine_for("auto", x) is triton_entries
    for other in (x._replace(form="simplex"), x._replace(q=q.double())):
        assert entries._engine_for("auto", other) is None


# --- every operator -------------------------------------------------------------------------------

SPECS = [
    *("softmax", "sigmoid", "relu", "sparsemax", "entmax", "tempered", "gated"),
    *("synthesizer:width=16", "synthesizer:width=16,base=softmax,normalise=none"),
    *("linformer", "performer:width=16", "cosformer"),
    *("static", "static:rank=4", "static:base=softmax", "static:inside=true"),
    *("static:normalise=softmax", "static:signed=false"),
    *("relative", "relative:base=softmax", "relative:inside=true", "relative:normalise=softmax"),
    *("softconv", "2*softmax+G3", "softmax+dog+G3:order=elementwise"),
    *("G3", "G3:scales=true", "G3:unit_base=silu", "G3:unit_base=gelu", "G1:init=paper,mix=linear"),
    *("G3:base=softmax,mix=scaled", "G2:project=simplex", "G2:project=simplex,base=softmax"),
    *("polynomial-0", "polynomial-3", "bspline-G8", "bspline-G4:degree=1,base=silu"),
    *("chebyshev-4", "gaussian_rbf-G8", "rational-5/4", "mexican_hat:base=softmax,mix=scaled"),
    *("morlet", "dog:scales=true,unit_base=gelu", "meyer", "shannon:reading=index"),
    *("G2:order=full_rank", "morlet:order=full_rank", "G2:order=full_rank,project=simplex"),
    *("G2:order=project_first", "dog:order=project_first", "G2:order=project_first,base=softmax"),
    *("G2:order=two_stage", "rational:order=two_stage,base=softmax"),
    *("G2:order=by_offset", "G2:order=by_offset,base=softmax", "G2:order=beside_relative"),
    *("G3:order=elementwise", "G3:order=elementwise,base=softmax", "dog:order=elementwise"),
    *("G3:order=elementwise,inside=true", "G3:order=elementwise,normalise=l1"),
    *("G3:order=elementwise,normalise=softmax", "G3:order=elementwise,normalise=count"),
    *("G3:order=by_distance", "G3:order=by_distance,inside=true", "dog:order=by_distance"),
    *("G3:order=generated", "bspline:order=generated", "G3:order=generated,base=softmax"),
]
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS)
TRAITS = {spec: operators.parse(spec).operator.traits for spec in SPECS}
# a sort and a cumsum: torch has no deterministic cumsum of floats on CUDA
SORTED = ("sparsemax", "entmax", "simplex")


@contextlib.contextmanager
def determinism(on):
    """As users have it where it is off; the suite has it on."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def where_it_is(spec):
    return determinism(not any(word in spec for word in SORTED))


class Case:
    """An operator, drawn inputs of it, and a probe; 17 tokens are a class token and 4 x 4."""

    def __init__(self, spec, tokens=17, heads=3, width=16, batch=2):
        self.op = operators.parse(spec).operator
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator)
        params = self.op.init(generator, heads, tokens)
        self.inputs = {name: draw(batch, heads, tokens, width) for name in "qkv"}
        # off the start, at which some gradients are zero
        self.inputs["params"] = tree.map(lambda x: x + 0.2 * draw(x.shape), params)
        self.probe = draw(batch, heads, tokens, width)
        self.mask = torch.rand(tokens, tokens, generator=generator) > 0.4
        self.mask[:, 0] = True

    def attend(self, params, q, k, v, mask=None):
        return self.op.attend(params, q, k, v, mask)

    def on_device(self, dtype=torch.float32):
        return on_device(self.inputs, dtype)

    def results(self, inputs, mask=None):
        at = inputs["q"].device
        attend = functools.partial(self.attend, mask=None if mask is None else mask.to(at))
        return values_and_gradients(attend, inputs, self.probe.to(at))


@EVERY_SPEC
@DTYPES
@MASKED
def test_an_operator_is_that_of_the_cpu(spec, dtype, masked):
    case = Case(spec)
    mask = case.mask if masked else None
    case.probe = case.probe.to(dtype).double()
    wanted = case.results(exact(case.inputs, dtype), mask)
    with where_it_is(spec):
        assert_near(case.results(case.on_device(dtype), mask), wanted, LIMITS[dtype])


@pytest.mark.parametrize("spec", [s for s in SPECS if TRAITS[s].get("of_scores", True)])
@MASKED
def test_weights_are_those_of_the_cpu(spec, masked):
    case = Case(spec)
    scores = case.inputs["q"] @ case.inputs["k"].mT / 4
    mask = case.mask if masked else None
    wanted = case.op.weights(tree.to(case.inputs["params"], torch.float64), scores.double(), mask)
    mask = None if mask is None else mask.to(DEVICE)
    with where_it_is(spec):
        got = case.op.weights(case.on_device()["params"], scores.to(DEVICE), mask)
    assert_near({"weights": got}, {"weights": wanted}, LIMITS[torch.float32])


@pytest.mark.parametrize("spec", [s for s in SPECS if not TRAITS[s].get("by_length")])
@DTYPES
def test_steps_with_a_cache_are_those_of_the_cpu(spec, dtype):
    case = Case(spec)
    tokens = None if TRAITS[spec].get("length_free") else 17

    def steps(inputs):
        cache, outs = None, []
        for part in (slice(0, 9), slice(9, 10), slice(10, 17)):
            own = (inputs[name][..., part, :] for name in "qkv")
            out, cache = operators.step(case.op, inputs["params"], *own, cache, tokens)
            outs.append(out)
        return {"out": torch.cat(outs, -2)}

    wanted = steps(exact(case.inputs, dtype))
    with where_it_is(spec):
        assert_near(steps(case.on_device(dtype)), wanted, LIMITS[dtype])


@EVERY_SPEC
def test_two_passes_are_equal_bit_for_bit(spec):
    """With torch's deterministic forms, which a sum over the rows of an index needs."""
    case = Case(spec, tokens=65)
    with where_it_is(spec):
        first, second = (case.results(case.on_device(), case.mask) for _ in range(2))
    if any(word in spec for word in SORTED):  # torch promises no more
        assert_near(first, second, 1e-5)
    else:
        assert_equal(first, second)


@pytest.mark.parametrize(
    "spec",
    ["G3", "bspline-G8", "dog", "G3:order=elementwise", "polynomial-0", "relative"]
    + ["G2:order=by_offset", "G3:order=by_distance,inside=true", "sigmoid"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["triton", "torch"])
def test_two_passes_are_equal_whatever_torch_is_set_to(spec, dtype):
    case = Case(spec, tokens=197)
    with determinism(False):
        inputs = tree.to(case.on_device(), dtype)
        first, second = (case.results(inputs) for _ in range(2))
    assert_equal(first, second)


def waits_for_nothing(call):
    """`call()`, in which nothing may wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_SPEC
@MASKED
def test_an_operator_does_not_wait_for_the_device(spec, masked):
    case = Case(spec)
    inputs, case.probe = case.on_device(), case.probe.to(DEVICE)
    mask = case.mask.to(DEVICE) if masked else None
    with determinism(False):
        case.results(inputs, mask)  # builds the kernels
        waits_for_nothing(lambda: case.results(inputs, mask))


@pytest.mark.parametrize("spec", [s for s in SPECS if operators.parse(s).operator.resize])
def test_parameters_for_other_tokens_are_those_of_the_cpu(spec):
    case = Case(spec)
    if "base=silu" in spec or ("unit_base" in spec and "scales" not in spec):
        pytest.skip("units with a base of weight 1 cannot be weighted anew")
    params = case.inputs["params"]
    wanted = operators.resize(case.op, tree.to(params, torch.float64), 17, 26)
    got = operators.resize(case.op, case.on_device()["params"], 17, 26)
    assert_near(got, wanted, 1e-5)


# --- transforms -----------------------------------------------------------------------------------

SOME = ["softmax", "G3", "G3:base=softmax,mix=scaled", "bspline-G8", "dog", "softconv"]
SOME += ["G3:order=elementwise", "G2:order=by_offset", "2*softmax+G3", "relu"]
SOME += ["dog:order=elementwise,inside=true", "G3:order=by_distance,base=softmax"]
SOME_SPECS = pytest.mark.parametrize("spec", SOME)


def objective(case, probe):
    return lambda params, q, k, v: (case.attend(params, q, k, v) * probe.to(q)).sum()


def population_of(case, params, q, k, v):
    members = tree.map(lambda x: torch.stack([x, 0.5 * x, x + 0.1]), (params, q))
    many = func.vmap(func.grad_and_value(objective(case, case.probe)), (0, 0, None, None))
    return many(*members, k, v)


def per_example(case, params, q, k, v):
    each = func.grad(objective(case, case.probe[:1]), (0, 1, 2, 3))
    return func.vmap(each, (None, 0, 0, 0))(params, *(x[:, None] for x in (q, k, v)))


def forward_mode(case, *at):
    return func.jvp(case.attend, at, tree.map(torch.cos, at))


def forward_over_reverse(case, *at):
    gradient = func.grad(objective(case, case.probe), (0, 1, 2, 3))
    return func.jvp(gradient, at, tree.map(torch.cos, at))


def reverse_over_reverse(case, *at):
    gradient = func.grad(objective(case, case.probe), (0, 1, 2, 3))
    pull = func.vjp(gradient, *at)[1]
    return pull(tuple(tree.map(torch.cos, at)))


TRANSFORMS = [population_of, per_example, forward_mode, forward_over_reverse, reverse_over_reverse]


@SOME_SPECS
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_a_transform_is_that_of_the_cpu(transform, spec):
    case = Case(spec)
    wanted, got = (
        transform(case, inputs["params"], *(inputs[name] for name in "qkv"))
        for inputs in (exact(case.inputs), case.on_device())
    )
    assert_near(got, wanted, LIMITS[torch.float32])


def compiling(test):
    """A test of torch.compile, which warns of its own code, and that tf32 would be faster."""
    for kind in ("UserWarning", "DeprecationWarning", "FutureWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{kind}:torch.*")(test)
    return test


@compiling
@pytest.mark.parametrize("spec", ["softmax", "G3", "dog", "softconv", "G3:order=elementwise"])
def test_a_compiled_operator_is_one_graph_and_that_of_the_cpu(spec):
    torch._dynamo.reset()
    case = Case(spec)
    wanted = case.results(exact(case.inputs))
    case.attend = torch.compile(case.attend, fullgraph=True)
    assert_near(case.results(case.on_device()), wanted, LIMITS[torch.float32])


@pytest.mark.parametrize("spec", ["softmax", "G3B", "dog-B", "softconv"])
def test_autocast_is_the_module_of_the_cpu(spec):
    generator = torch.Generator().manual_seed(0)
    module = kart.nn.Attention(48, 3, 17, operator=spec, generator=generator)
    x = torch.randn(2, 17, 48, generator=generator)
    probe = torch.randn(2, 17, 48, generator=generator)

    def run(params, x):
        return func.functional_call(module.to(x.device, x.dtype), params, (x,))

    inputs = {"params": dict(module.named_parameters()), "x": x}
    wanted = values_and_gradients(run, exact(inputs), probe)
    module.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = values_and_gradients(run, on_device(inputs), probe.to(DEVICE))
    assert_near(got, wanted, LIMITS[torch.bfloat16])


@SOME_SPECS
def test_a_captured_cuda_graph_of_an_operator_follows_its_inputs(spec):
    case = Case(spec)
    inputs = case.on_device()
    probe, case.probe = case.probe, case.probe.to(DEVICE)
    with determinism(False):
        replay, got = gpu.record(lambda: case.results(inputs))
    case.inputs["q"] = case.inputs["q"].flip(0)
    inputs["q"].copy_(case.inputs["q"])
    replay()
    case.probe = probe
    assert_near(got, case.results(exact(case.inputs)), LIMITS[torch.float32])


@pytest.mark.parametrize("spec", ["softconv", "G2:order=by_offset"])
def test_a_captured_cuda_graph_owns_the_places_in_a_table(spec):
    case = Case(spec)
    inputs = case.on_device()
    replay, got = gpu.record(lambda: case.attend(**inputs))
    entry_index.kept.cache_clear()
    torch.cuda.empty_cache()
    elsewhere = [torch.zeros(17, 17, dtype=torch.long, device=DEVICE) for _ in range(64)]
    replay()
    assert_near(got, case.attend(**exact(case.inputs)), LIMITS[torch.float32])
    assert not any(x.any() for x in elsewhere)


# --- models and their training --------------------------------------------------------------------

UNITS = ["mexican_hat", "rational-5/4"]
VIT = {"image_size": 32, "patch_size": 4, "depth": 2}
SMALL = {"image_size": 16, "patch_size": 4, "in_channels": 2, "embed_dim": 12, "depth": 2}
FAMILIES = {
    "vit_nano": SMALL | {"num_classes": 5, "num_heads": 2},
    "swin_nano": tiny.SWIN,
    "convit_nano": tiny.CONVIT,
    "vitdet_tiny": SMALL
    | {"num_heads": 2, "window_size": 3, "global_blocks": (1,), "pyramid_dim": 8},
}


@pytest.mark.parametrize("spec", ["softmax", "G3B", "dog-B", "softconv"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_that_of_the_cpu(name, spec):
    if spec == "softconv":
        spec += ":prefix=0" if name in ("swin_nano", "vitdet_tiny") else ""
    model = models.create(name, operator=spec, **FAMILIES[name])
    params, images = tiny.drawn(model)

    def flat(params, images):
        return torch.cat([x.flatten() for x in tree.leaves(model.apply(params, images))])

    inputs = {"params": params, "images": images}
    probe = torch.ones(()).double()
    wanted = values_and_gradients(flat, inputs, probe)
    got = values_and_gradients(flat, on_device(inputs), probe)
    # gradients that are zero, as softmax takes no shift of its scores, are so up to rounding
    floor = 1e-3 * float(tree.norm(wanted["gradients"]))
    assert_near(got, wanted, LIMITS[torch.float32], floor)


class Training:
    """A program of one model on a device, its first state, and a batch."""

    def __init__(self, device, spec, name="vit_tiny", sizes=VIT, **fields):
        settings = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0.0, **fields}
        config = train.Config(operator=spec, model=name, device=device, **settings)
        recomputed = {"recompute": True} if config.recompute else {}
        self.config = config
        self.model = models.create(name, operator=spec, **sizes, **recomputed)
        self.functions = train.program(config, self.model, 10)
        self.state = self.functions.init(torch.Generator().manual_seed(0))
        c = self.model.config
        images = torch.randn(
            4, c.in_channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(1)
        )
        targets = functional.one_hot(torch.arange(4), c.num_classes).float()
        hyper = (torch.tensor(x, device=device) for x in (1e-3, 0.05))
        self.batch = (train.Hyper(*hyper), images.to(device), targets.to(device))

    def step(self, step):
        self.state, metrics = step(self.state, *self.batch)
        return metrics

    def run(self, step, steps=1):
        """What `steps` of them leave, and what the last measured."""
        for _ in range(steps):
            metrics = self.step(step)
        weights = tree.ravel(train.weights_for_evaluation(self.state))
        return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "weights": weights}


@pytest.mark.parametrize("spec", ["softmax", "G3B", "G3U", "bspline-G5B", *UNITS])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_on_the_gpu_is_that_of_the_cpu(spec, precision):
    wanted, got = (Training(device, spec, precision=precision) for device in ("cpu", DEVICE))
    limit = {"float32": 5e-3, "bfloat16": 5e-2}[precision]
    assert_near(got.run(got.functions.step), wanted.run(wanted.functions.step), limit)


WAYS = {
    "plain": {},
    "vmap": {"batching": "vmap"},
    "parts": {"accumulate": 2},
    "recomputed": {"recompute": True},
    "averaged": {"ema": 0.5, "label_smoothing": 0.1},
    "clipped": {"max_norm": 0.01},
    "frozen": {"freeze": ("patch_embed",)},
}


@pytest.mark.parametrize("step", ["step", "advance"])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("vit_nano", way) for way in WAYS),
        *(
            (name, way)
            for name in ("swin_nano", "convit_nano")
            for way in WAYS
            if way != "recomputed"
        ),
    ],
)
def test_every_way_to_train_is_that_of_the_cpu(name, way, step):
    each = [Training(x, "G3B", name, FAMILIES[name], **WAYS[way]) for x in ("cpu", DEVICE)]
    wanted, got = (one.run(getattr(one.functions, step), 2) for one in each)
    assert_near(got, wanted, 5e-3)


@pytest.mark.parametrize("spec", ["G3B", "softmax", "softconv", "elementwise", *UNITS])
@pytest.mark.parametrize("name", ["step", "advance"])
def test_a_step_does_not_wait_for_the_device(name, spec):
    spec = "G3B:order=elementwise" if spec == "elementwise" else spec
    training = Training(DEVICE, spec)
    step = getattr(training.functions, name)
    with determinism(False):
        training.step(step)  # builds the kernels
        waits_for_nothing(lambda: training.step(step))
    assert int(training.state.step) == 2


@pytest.mark.parametrize("name", ["none", "flip_crop", "small", "paper"])
def test_a_batch_does_not_wait_for_the_device(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 12, 12), generator=generator, dtype=torch.uint8)
    dataset = data.Dataset(
        images.numpy(), np.arange(40) % 2, ("a", "b"), "drawn", (0.5,) * 3, (0.3,) * 3
    )
    configs = [train.Config(batch_size=16, augment=name, device=x) for x in (DEVICE, "cpu")]
    sources = [train.batches(config, dataset) for config in configs]
    sources[0].at(0, 0)
    with determinism(False):
        images, targets = waits_for_nothing(lambda: sources[0].at(0, 1))
    wanted, labels = sources[1].at(0, 1)
    assert_close(images.cpu(), wanted, rtol=0, atol=1e-4)
    assert_close(targets.cpu(), labels)


@compiling
@pytest.mark.parametrize("spec", ["softmax", "G3B"])
def test_a_compiled_step_is_the_eager_one(spec):
    torch._dynamo.reset()
    eager, compiled = (Training(DEVICE, spec, step=how) for how in ("eager", "compiled"))
    step = train.whole(compiled.config, compiled.functions.step)
    assert_near(compiled.run(step, 2), eager.run(eager.functions.step, 2), 5e-3)


@pytest.mark.parametrize("spec", ["softmax", "G3B", "softconv", *UNITS])
@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("way", ["plain", "vmap", "parts", "recomputed", "averaged"])
def test_a_step_as_a_graph_is_the_eager_one(spec, donated, way):
    eager, other = (Training(DEVICE, spec, step=how, **WAYS[way]) for how in ("eager", "graph"))
    whole = train.donated if donated else train.whole
    step = whole(other.config, other.functions if donated else other.functions.step)
    wanted = eager.functions.advance if donated else eager.functions.step
    assert_near(other.run(step, 3), eager.run(wanted, 3), 1e-5)


# --- memory ---------------------------------------------------------------------------------------


G3 = bases.fourier(3)
STREAMED = [
    *(operators.low_rank(G3, base=base, engine=engine)
      for engine in ("triton", "torch") for base in (None, "softmax")),
    *(make(G3, inside=True) for make in (operators.elementwise, operators.by_distance)),
]  # fmt: skip


@pytest.mark.parametrize("op", STREAMED, ids=lambda op: op.name)
def test_attending_holds_no_matrix_of_tokens_by_tokens(op):
    def peak(tokens):
        generator = torch.Generator().manual_seed(0)
        params = tree.to(op.init(generator, 3, tokens), DEVICE)
        qkv = torch.randn(3, 1, 3, tokens, 64, generator=generator).to(DEVICE, torch.bfloat16)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        inputs = {"params": params, **dict(zip("qkv", qkv, strict=True))}
        values_and_gradients(op.attend, inputs, torch.ones((), device=DEVICE))
        return torch.cuda.max_memory_allocated() - before

    # a deterministic backward of softmax holds dozens of gradients of the queries
    with determinism(False):
        peak(64)  # the work space of cuBLAS
        assert peak(4096) < 3 * 4096**2 * 4 / 4


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures of noise, of two classes that differ in how bright they are."""
    monkeypatch.setenv("KART_CACHE", str(tmp_path / "cache"))
    drawn = np.random.default_rng(0)
    for i in range(160):
        file = tmp_path / "pictures" / ("dark", "light")[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = drawn.integers(0, 128, (12, 12, 3)) + 64 * (i % 2)
        Image.fromarray(noise.astype(np.uint8)).save(file)
    return tmp_path / "pictures"


def kart_train(pictures, out, *more, device=DEVICE):
    sizes = "--epochs 3 --batch-size 16 --embed-dim 8 --depth 1 --num-heads 2 --patch-size 4"
    given = ["--data", str(pictures), "--out", str(out), "--device", device, "--quiet"]
    return cli.main(["train", *given, *sizes.split(), "--threads", "1", *more])


def weights_in(out):
    return {path.name: path.read_bytes() for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "more",
    [
        ["--operator", "softmax"],
        ["--operator", "G3B", "--augment", "paper"],
        ["--operator", "G3U", "--precision", "bfloat16", "--ema", "0.9"],
        ["--operator", "G3B", "--step", "graph"],
        ["--operator", "G1B", "--seeds", "0", "1", "--group", "2", "--step", "graph"],
        ["--operator", "dog-B", "--seeds", "0", "1", "--group", "2"],
        ["--operator", "softconv", "--accumulate", "2"],
    ],
    ids=lambda more: more[1],
)
def test_a_run_again_and_one_that_was_stopped_end_in_the_same_bits(
    more, pictures, tmp_path, monkeypatch
):
    assert kart_train(pictures, tmp_path / "one", *more) == 0
    assert kart_train(pictures, tmp_path / "two", *more) == 0
    evaluate, calls = train.evaluate, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stopping)
        assert kart_train(pictures, tmp_path / "stopped", *more) == 130
    assert kart_train(pictures, tmp_path / "stopped", *more) == 0
    wanted = weights_in(tmp_path / "one")
    assert weights_in(tmp_path / "two") == weights_in(tmp_path / "stopped") == wanted
    (log,) = (tmp_path / "one").rglob("metrics.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = np.mean([np.atleast_1d(record["train_loss"]) for record in records], axis=1)
    assert losses[-1] < losses[0]


def test_a_run_is_scored_and_reported_on_like_one_of_the_cpu(pictures, tmp_path):
    out = tmp_path / "run"
    assert kart_train(pictures, out, "--operator", "G3B", "--trajectory", "5") == 0
    scores = []
    for device in (DEVICE, "cpu"):
        assert cli.main(["eval", str(out), "--device", device]) == 0
        (found,) = out.rglob("eval-test-last.json")
        scores.append(json.loads(found.read_text())["members"][0])
    assert scores[0]["top1"] == scores[1]["top1"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=5e-3)
    page = tmp_path / "page.html"
    few = "--images 1 --examples 16 --sections training,functions,attention,spectra,weights"
    assert cli.main(["analyse", str(out), "--out", str(page), *few.split()]) == 0
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert page.stat().st_size > 10_000 and numbers["sections"]
