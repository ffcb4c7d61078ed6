"""What kart relies on, or works around, in torch.func; an upgrade that changes it is seen here.

A failing test is not by itself a defect of kart: where it pins a limitation, the workaround for it
may now go. Measured with torch 2.13.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn import functional
from torch.testing import assert_close
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

X = torch.tensor(0.3)
XS = torch.linspace(0.0, 1.0, 3)
ONE = torch.tensor(1.0)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Generated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class WithJvp(Generated):
    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


def foreign_sin(x):
    """What a compiled kernel is to torch: it reads memory, and writes memory of its own."""
    x.data_ptr()
    return x.detach().clone().apply_(lambda v: torch.tensor(v).sin().item())


class Kernel(WithJvp):
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return foreign_sin(x)

    @staticmethod
    def vmap(info, in_dims, x):
        return Kernel.apply(x), in_dims[0]


class KernelInBackward(Kernel):
    @staticmethod
    def backward(ctx, gradient):
        return foreign_sin(gradient)

    @staticmethod
    def vmap(info, in_dims, x):
        return KernelInBackward.apply(x), in_dims[0]


@torch.library.custom_op("kart_contract::sin", mutates_args=())
def library_sin(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


library_sin.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("function", [Generated, WithJvp, Kernel])
def test_a_function_with_setup_context_and_a_vmap_rule_works_in_reverse(function):
    leaf = X.clone().requires_grad_()
    function.apply(leaf).backward()
    assert_close(leaf.grad, X.cos())
    assert_close(grad(function.apply)(X), X.cos())
    assert_close(grad(grad(function.apply))(X), -X.sin())
    assert_close(vmap(function.apply)(XS), XS.sin())
    assert_close(vmap(grad(function.apply))(XS), XS.cos())
    assert_close(vmap(vmap(grad(function.apply)))(XS[:, None]), XS[:, None].cos())
    assert_close(grad(lambda xs: vmap(function.apply)(xs).sum())(XS), XS.cos())


@pytest.mark.parametrize("function", [WithJvp, Kernel])
def test_a_function_with_a_jvp_works_forward_and_forward_over_reverse(function):
    assert_close(jvp(function.apply, (X,), (ONE,)), (X.sin(), X.cos()))
    assert_close(jvp(grad(function.apply), (X,), (ONE,)), (X.cos(), -X.sin()))
    products = vmap(lambda x: jvp(grad(function.apply), (x,), (ONE,))[1])(XS)
    assert_close(products, -XS.sin())


def test_a_function_without_a_jvp_refuses_forward_mode():
    with pytest.raises(NotImplementedError, match="must implement the jvp"):
        jvp(Generated.apply, (X,), (ONE,))


def test_nested_forward_mode_through_a_function_is_silently_zero():
    # pytorch issue 197867: whoever nests jvp must use the plain expression
    _, second = jvp(lambda x: jvp(WithJvp.apply, (x,), (ONE,))[1], (X,), (ONE,))
    assert second == 0
    _, plain = jvp(lambda x: jvp(torch.sin, (x,), (ONE,))[1], (X,), (ONE,))
    assert_close(plain, -X.sin())


def test_a_function_whose_forward_takes_ctx_works_in_eager_mode_only():
    leaf = X.clone().requires_grad_()
    OldStyle.apply(leaf).backward()
    assert_close(leaf.grad, X.cos())
    for transformed, x in ((grad(OldStyle.apply), X), (vmap(OldStyle.apply), XS)):
        with pytest.raises(RuntimeError, match="setup_context"):
            transformed(x)


def test_a_kernel_called_in_backward_itself_fails_under_func_grad_of_vmap():
    # its launch needs a Function of its own
    with pytest.raises(RuntimeError, match="[Cc]annot access data pointer"):
        vmap(grad(KernelInBackward.apply))(XS)


def test_library_operators_have_no_func_grad_and_a_silent_zero_tangent():
    leaf = X.clone().requires_grad_()
    library_sin(leaf).backward()
    assert_close(leaf.grad, X.cos())
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(library_sin)(X)
    assert jvp(library_sin, (X,), (ONE,))[1] == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_works_in_eager_mode_only(reentrant):
    def recomputed(x):
        return checkpoint(torch.sin, x, use_reentrant=reentrant)

    leaf = X.clone().requires_grad_()
    recomputed(leaf).backward()
    assert_close(leaf.grad, X.cos())
    with pytest.raises(RuntimeError, match="saved tensor hooks|setup_context"):
        grad(recomputed)(X)


def test_saved_tensor_hooks_fail_under_func_grad():
    def hooked(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return x.sin()

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(hooked)(X)


def test_fused_attention_has_a_gradient_but_no_second_derivative():
    q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))

    def loss(q):
        return functional.scaled_dot_product_attention(q, q, q).sum()

    assert grad(loss)(q).shape == q.shape
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(grad(loss), (q,), (q,))
    with pytest.raises(RuntimeError, match="derivative for .* is not implemented"):
        grad(lambda q: grad(loss)(q).sum())(q)


def test_trees_may_hold_empty_dicts_but_no_none_and_no_numbers():
    def loss(params):
        return params["a"].sin()

    assert_close(grad(loss)({"a": X, "b": {}}), {"a": X.cos(), "b": {}})
    assert _pytree.tree_leaves({"a": None}) == [None]
    for leaf in (None, 1):
        with pytest.raises(ValueError, match="must be Tensor"):
            grad(loss)({"a": X, "b": leaf})
    with pytest.raises(RuntimeError, match="floating point"):
        grad(loss)({"a": X, "b": torch.tensor(1)})
    with pytest.raises(ValueError, match="in_dim=0 for an input"):
        vmap(loss)({"a": XS, "b": None})


def test_dicts_keep_the_order_of_their_keys():
    assert list(grad(lambda p: p["b"] * p["a"])({"b": X, "a": X})) == ["b", "a"]
    assert _pytree.tree_leaves({"b": 1, "a": 2}) == [1, 2]


@pytest.mark.parametrize(
    "reads",
    [lambda x: x.item(), lambda x: x if x > 0 else -x, lambda x: x.data_ptr()],
    ids=["item", "if", "data_ptr"],
)
def test_values_cannot_be_read_under_vmap(reads):
    with pytest.raises(RuntimeError, match=r"vmap|data pointer"):
        vmap(reads)(XS)


def test_shapes_can_be_read_under_vmap():
    seen = []
    vmap(lambda x: seen.append((x.shape, x.ndim)) or x)(torch.zeros(3, 2))
    assert seen == [((2,), 1)]


def test_a_fresh_tensor_takes_no_batched_value_in_place_but_one_made_like_it_does():
    with pytest.raises(RuntimeError, match="inplace"):
        vmap(lambda x: torch.zeros(()).copy_(x))(XS)
    assert_close(vmap(lambda x: torch.zeros_like(x).copy_(x))(XS), XS)


def test_results_that_do_not_depend_on_the_batch_are_expanded():
    # init of a state under vmap gives every member its own counter
    assert_close(vmap(lambda x: torch.zeros((), dtype=torch.int64))(XS), torch.zeros(3).long())


def test_random_numbers_under_vmap_need_a_choice():
    draw = torch.Generator()

    def noisy(x):
        return x + torch.randn((), generator=draw)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(noisy)(XS)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: functional.dropout(x, 0.5))(XS)
    noise = vmap(noisy, randomness="different")(XS) - XS
    assert noise.unique().numel() == 3
    assert_close(vmap(noisy, randomness="same")(XS).diff(), XS.diff())


def test_a_scalar_leaf_is_promoted_by_a_wider_scalar_and_a_vector_is_not():
    # hence the casts in optim, where rates are float64
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert vmap(lambda x, r: x * r)(torch.ones(2, 3), rates).dtype == torch.float32
    assert vmap(lambda x, r: x * r)(torch.ones(2), rates).dtype == torch.float64


def test_detach_stops_gradients_and_tangents():
    assert_close(grad(lambda x: x.detach() * x)(X), X)
    assert_close(jvp(lambda x: x.detach() * x, (X,), (ONE,)), (X * X, X))
    # of x * (x detached), the derivative of the derivative is that of a constant
    assert_close(jvp(grad(lambda x: x.detach() * x), (X,), (ONE,))[1], torch.tensor(0.0))


def test_deterministic_algorithms_poison_empty_tensors():
    # conftest turns them on for every test
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(XS).isnan().all()


def test_a_generator_gives_the_same_numbers_again_and_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    first, second = (torch.randn(5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)
