"""The streamed product under torch.compile: whole graphs, right values, our own rules in use."""

import pytest
import torch
from torch import func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from kart import bases, kernels, operators
from kart.kernels import plain
from kart.kernels.cpp import weights
from kart.kernels.family import once
from kart.operators.relative import entry_index

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
BASES = {"fourier": bases.fourier(2), "bspline": bases.bspline(3)}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A backend that keeps the names of the nodes of every graph that it compiles."""

    def __init__(self):
        self.nodes = []

        def compiler(graph, _):
            self.nodes += [str(node.target) for node in graph.graph.nodes]
            return graph.forward

        self.backend = aot_autograd(fw_compiler=compiler)

    def count(self, name):
        return sum(f"kart.{name}" in node for node in self.nodes)


def example(basis, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(2, 2, 5, 3), draw(2, 2, 4, 3), draw(2, 3, 4, basis.size)


def loss(f):
    return lambda *args: (f(*args) ** 2).sum()


def gradient(f):
    return func.grad(loss(f), argnums=(0, 1, 2))


def hvp_reverse(f):
    def directional(*a):
        return sum((x * y).sum() for x, y in zip(gradient(f)(*a), a, strict=True))

    return func.grad(directional, argnums=(0, 1, 2))


# function of f, and the library nodes (forward, backward) that its graph has to have
CASES = {
    "value": (lambda f: f, (1, 0)),
    "grad": (gradient, (1, 1)),
    "vmap": (lambda f: func.vmap(f, (0, 0, None)), (1, 0)),
    "population": (
        lambda f: lambda q, k, c: func.vmap(f, (None, None, 0))(q, k, torch.stack([c, 2 * c])),
        (1, 0),
    ),
    "vmap_grad": (lambda f: func.vmap(gradient(f), (0, 0, None)), (1, 1)),
    "grad_vmap": (lambda f: gradient(func.vmap(f, (0, 0, None))), (1, 1)),
    "jvp": (lambda f: lambda *a: func.jvp(f, a, a), (1, 0)),
    "vmap_jvp": (
        lambda f: (
            lambda q, k, c: func.vmap(lambda q, k: func.jvp(f, (q, k, c), (k[:, :1], k, c)))(
                q[:, :, :1], k
            )
        ),
        (1, 0),
    ),
    "hvp_forward_over_reverse": (lambda f: lambda *a: func.jvp(gradient(f), a, a), (1, 1)),
    "hvp_reverse_over_reverse": (hvp_reverse, (1, 1)),
    "hvp_reverse_over_forward": (
        lambda f: func.grad(lambda *a: func.jvp(loss(f), a, a)[1], argnums=(0, 1, 2)),
        (1, 1),
    ),
}


def compare(case, basis, engine, dtype, backend, mask):
    args = example(basis, dtype)

    def streamed(q, k, c):
        return kernels.contract(basis, c, q, k, mask, engine=engine)

    compiled = torch.compile(CASES[case][0](streamed), fullgraph=True, backend=backend)
    expected = CASES[case][0](lambda q, k, c: plain.contract(basis, c, q, k, mask))
    actual, expected = compiled(*args), expected(*(x.double() for x in args))
    limit = 1e-10 if dtype == torch.float64 else 2e-5
    for a, e in zip(*(torch.utils._pytree.tree_leaves(x) for x in (actual, expected)), strict=True):
        assert_close(a.double(), e, rtol=limit, atol=limit * e.abs().max().item())


@pytest.mark.parametrize(
    "case,name",
    [
        pytest.param(case, name, marks=[] if fast else [pytest.mark.slow])
        for case in CASES
        for name in BASES
        for fast in [name == "fourier" or case in ("grad", "hvp_forward_over_reverse")]
    ],
)
def test_a_whole_graph_uses_our_rules_and_has_the_plain_value(case, name):
    counted = Counted()
    mask = torch.tensor([True, False, True, True])
    compare(case, BASES[name], "torch", torch.float64, counted.backend, mask)
    forward, backward = CASES[case][1]
    assert counted.count("contract_forward") == forward
    assert counted.count("contract_backward") >= backward
    # nothing of the engines was traced into the graph, but the tangents are ordinary operations
    if "jvp" not in case and "hvp" not in case:
        assert not any(x.startswith(("aten.cos", "aten.sin")) for x in counted.nodes)


def test_the_backward_of_torch_uses_our_rules():
    counted = Counted()
    basis = BASES["fourier"]
    leaves = [x.requires_grad_() for x in example(basis)]

    def compiled_loss(q, k, c):
        return loss(lambda *a: kernels.contract(basis, a[2], a[0], a[1]))(q, k, c)

    compiled = torch.compile(compiled_loss, fullgraph=True, backend=counted.backend)
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    expected = gradient(lambda q, k, c: plain.contract(basis, c, q, k))(
        *(x.detach() for x in leaves)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    assert (counted.count("contract_forward"), counted.count("contract_backward")) == (1, 1)


@pytest.mark.parametrize("spec", ["G2B", "mexican_hat-B", "softmax", "G2B:base=softmax"])
def test_a_training_step_of_an_operator_is_one_graph(spec):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), 2, 4)
    q, k, v = (x.float() for x in example(BASES["fourier"])[:2] + example(BASES["fourier"])[1:2])

    def step(params, q, k, v):
        gradients, value = func.grad_and_value(
            lambda p: (op.attend(p, q, k, v, torch.tensor([[True, False, True, True]])) ** 2).sum()
        )(params)
        return value, torch.utils._pytree.tree_map(lambda p, g: p - 0.1 * g, params, gradients)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(params, q, k, v)
    assert_close(compiled(params, q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine,dtype", [("torch", torch.float64), ("cpp", torch.float32)])
@pytest.mark.parametrize("case", CASES)
def test_inductor_has_the_plain_value(case, engine, dtype):
    if kernels.engines()[engine] != "ready":
        pytest.skip(kernels.engines()[engine])
    compare(case, BASES["fourier"], engine, dtype, "inductor", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_step_knows_where_gradients_of_views_lie(dtype):
    """By the default backend, which takes the strides that the recorded operation declares."""
    basis = BASES["fourier"]
    _, _, coefs = example(basis, dtype)
    generator = torch.Generator().manual_seed(1)
    qk = torch.randn(2, 4, 12, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64).to(dtype)

    def whole(x, weight):
        q, k = (y.unflatten(-1, (2, 3)).transpose(1, 2) for y in (x @ weight).chunk(2, -1))
        return (kernels.contract(basis, coefs, q, k) ** 2).sum()

    leaves = [qk @ weight, weight.mT.contiguous()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(whole(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(whole, fullgraph=True)(*leaves), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "spec", ["sparsemax", "sigmoid", "relu", "G2B:project=simplex", "G2B:order=project_first"]
)
def test_operators_that_take_scores_as_a_basis_are_one_graph(spec, masked):
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, 2, 4)
    q, k, v = (torch.randn(2, 2, 4, 3, generator=generator) for _ in range(3))
    mask = torch.rand(4, 4, generator=generator) < 0.7 if masked else None
    attend = torch.compile(
        lambda q, k, v: op.attend(params, q, k, v, mask), backend="aot_eager", fullgraph=True
    )
    assert_close(attend(q, k, v), op.attend(params, q, k, v, mask))


SPECS = ["G3", "G3:base=softmax", "G3:order=elementwise", "G3:order=full_rank", "softmax"]
SPECS += ["softconv", "relative:inside=true", "G3:order=by_offset"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_a_trace_without_gradients_sees_other_inputs(spec):
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, 2, 5)
    first, other = ([torch.randn(2, 2, 5, 4, generator=generator) for _ in "qkv"] for _ in "ab")

    def attend(*qkv):
        return op.attend(params, *qkv)

    with torch.no_grad():
        attend(*first)  # a library is built and checked outside of the trace
        # what is written from outside of torch has no graph that a check could compare
        traced = torch.jit.trace(attend, first, check_trace=False)
        assert_close(traced(*other), attend(*other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_made_for_good_inside_of_a_trace_is_no_part_of_it(monkeypatch):
    op = operators.parse("softconv").operator
    params = op.init(torch.Generator().manual_seed(0), 2, 5)
    first, other = torch.randn(2, 3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    reason = weights.engine_of(None, "beside", True)[1]
    monkeypatch.setattr(weights, "engine_of", once(weights.engine_of.__wrapped__))
    entry_index.kept.cache_clear()
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda *qkv: op.attend(params, *qkv), tuple(first), check_trace=False
        )
        assert_close(traced(*other), op.attend(params, *other))
    # the engine was not put off by what it could not ask there
    assert weights.engine_of(None, "beside", True)[1] == reason
