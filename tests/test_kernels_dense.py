"""Full rank by the compiled products of coefficients and values, on the tile unit and elsewhere."""

import pytest
import torch

from kart import bases, kernels
from kart.kernels import stream
from kart.kernels.cpp import dense

pytestmark = pytest.mark.skipif(kernels.engines()["cpp"] != "ready", reason="no C++ engine here")
BASIS = bases.fourier(2)
NOT_FINITE = (float("inf"), float("-inf"), float("nan"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(f, leaves, dtype=torch.float32):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = f(*leaves)
    return out, *torch.autograd.grad((out * draw(*out.shape, seed=7).to(dtype)).sum(), leaves)


# tokens, keys, features, columns: groups of 256 numbers of a token, whole, one and a rest
DENSE = [(64, 32, 2, 64), (197, 197, 6, 64), (80, 43, 6, 65), (65, 1, 257, 97), (97, 128, 4, 70)]
# and what is too small for the tile unit
DENSE += [(16, 8, 2, 16), (19, 17, 1, 64), (70, 20, 5, 17), (17, 17, 16, 33)]


@pytest.mark.parametrize("size", DENSE, ids=str)
@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_coefficients_by_values_and_back(size, own, threads, monkeypatch):
    tokens, keys, width, columns = size
    coefs = draw(own, 2, tokens, keys, width)
    v = draw(3, tokens, 2, columns, seed=1).transpose(1, 2)
    pulled = draw(3, 2, columns, keys, width, seed=2)
    assert dense.engine() is not None
    called = []
    call = dense.Engine._call
    monkeypatch.setattr(dense.Engine, "_call", lambda *x: called.append(x[1]) or call(*x))

    def products(*tensors, engine):
        coefs, v, pulled = tensors
        mixed = stream._raw_mixed(coefs, v, engine)
        return mixed, *stream._unmixed(coefs, v, pulled, engine)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = products(coefs, v, pulled, engine="auto")
    finally:
        torch.set_num_threads(before)
    assert len(called) == 2
    plainly = products(coefs, v, pulled, engine="torch")
    wanted = products(coefs.double(), v.double(), pulled.double(), engine="torch")
    for a, b, c in zip(found, wanted, plainly, strict=True):
        assert a.shape == b.shape
        error, usual = ((x.double() - b).norm() / b.norm() for x in (a, c))
        assert error < max(4 * usual, 1e-6), (error, usual)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("leaf", range(3))
def test_full_rank_of_numbers_that_do_not_split(value, leaf):
    """No other head and no other sample sees them."""
    leaves = [draw(2, 2, 70, 16), draw(2, 2, 70, 16, seed=1), draw(2, 2, 70, 64, seed=2)]
    leaves.append(draw(2, 70, 70, BASIS.size, seed=3) / 70)
    leaves[leaf].view(-1)[123] = value

    def product(q, k, v, coefs, engine="auto"):
        return kernels.contract_values(BASIS, coefs, q, k, v, engine=engine)

    found = gradients(product, leaves)
    wanted = gradients(lambda *x: product(*x, engine="torch"), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite()
        assert (a - b)[finite].abs().max() < 1e-4 * b[finite].abs().max()


def test_full_rank_by_the_unit_is_full_rank():
    leaves = [draw(3, 2, 70, 16), draw(3, 2, 70, 16, seed=1), draw(3, 2, 70, 64, seed=2)]
    leaves.append(draw(2, 70, 70, BASIS.size, seed=3) / 70)

    def product(q, k, v, coefs, engine="auto"):
        return kernels.contract_values(BASIS, coefs, q, k, v, engine=engine)

    found = gradients(product, leaves)
    wanted = gradients(lambda *x: product(*x, engine="plain"), leaves, torch.float64)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()
