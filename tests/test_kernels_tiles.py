"""The C++ kernels on the tile unit (AMX), where there is one: as exact as on the vector unit, at
every edge of its tiles; numbers that it cannot take; and nothing of it seen by others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kart import bases, kernels
from kart.kernels import plain

CPUINFO = Path("/proc/cpuinfo")
TILES = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text()
pytestmark = [
    pytest.mark.skipif(kernels.engines()["cpp"] != "ready", reason="no C++ engine here"),
    pytest.mark.skipif(not TILES, reason="this processor has no tile unit"),
]
BASIS = bases.fourier(2)
# queries, keys, width, rank, width of the values: remainders of 16, 32, and spans of 128 and 256,
# and what is too small for tiles, in all or in one of the two widths
SIZES = [
    (128, 128, 64, 12, 64),
    (129, 145, 65, 3, 79),
    (144, 143, 96, 12, 33),
    (145, 160, 33, 1, 64),
    (259, 161, 100, 12, 64),
    (161, 259, 64, 13, 128),
    (513, 128, 72, 5, 64),
    (127, 300, 64, 12, 64),
    (1, 1, 16, 1, 16),
    (31, 33, 33, 12, 64),
]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n, m, width, rank, values, batch=2, heads=2):
    q, k = draw(batch, heads, n, width), draw(batch, heads, m, width, seed=1)
    v = draw(batch, heads, m, values, seed=2)
    return q, k, v, draw(heads, rank, m, BASIS.size, seed=3) / m**0.5


def gradients(f, leaves, dtype=torch.float32):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    results = f(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((x * draw(*x.shape, seed=7).to(dtype)).sum() for x in results)
    return (*results, *torch.autograd.grad(total, leaves))


def product(q, k, v, coefs):
    return kernels.contract_softmax(BASIS, coefs, q, k, v, scale=0.3, engine="cpp")


def plain_product(q, k, v, coefs):
    y = plain.contract(BASIS, coefs, q, k, None, 0.3)
    return y, plain.softmax_attention(q, k, v, None, 0.3)


def entries(q, k, v, coefs, engine="cpp"):
    units = {"coefs": coefs}
    return kernels.entry_attention(BASIS, units, q, k, v, form="beside", scale=0.3, engine=engine)


def plain_entries(*leaves):
    return entries(*leaves, engine="plain")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["product", "entries"])
def test_every_edge_has_the_error_of_float32(kind, size):
    leaves = list(inputs(*size))
    if kind == "entries":
        leaves[3] = draw(2, BASIS.size, seed=3)
    fast, exact = (product, plain_product) if kind == "product" else (entries, plain_entries)
    found, wanted = gradients(fast, leaves), gradients(exact, leaves, torch.float64)
    plainly = gradients(exact, leaves)
    for a, b, c in zip(found, wanted, plainly, strict=True):
        error, usual = ((x.double() - b).norm() / b.norm().clamp(min=1e-6) for x in (a, c))
        # sines of the plain expression are better by a rounding or two, its products are not
        assert error < max(4 * usual, 1e-6), (error, usual)


def test_a_product_is_better_than_the_sum_of_its_roundings():
    # scores alone: units that are the identity
    q, k = draw(1, 1, 128, 512), draw(1, 1, 128, 512, seed=1)
    coefs = torch.eye(128)[None, :, :, None]
    found = kernels.contract(bases.polynomial(1), F.pad(coefs, (1, 0)), q, k, engine="cpp", scale=1)
    exact = q.double() @ k.double().mT
    size = q.double().norm(dim=-1)[..., None] * k.double().norm(dim=-1)[..., None, :]
    assert ((found.double() - exact).abs() / size).max() < 2.0**-22


NOT_FINITE = (float("inf"), float("-inf"), float("nan"))


@pytest.mark.parametrize(
    ("value", "leaf"),
    # scores near the largest number have no sine in float32
    [*((x, leaf) for x in NOT_FINITE for leaf in range(4)), (3.4e38, 2), (-3.39e38, 3)],
)
def test_numbers_that_do_not_split_take_the_other_way(value, leaf):
    leaves = [x.clone() for x in inputs(140, 137, 70, 12, 66)]
    leaves[leaf].view(-1)[123] = value
    found, wanted = gradients(product, leaves), gradients(plain_product, leaves)
    # gradients near the largest number overflow here or there
    some = len(found) if value in NOT_FINITE else 2
    for a, b in zip(found[:some], wanted[:some], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = b.isfinite()
        assert (a - b)[finite].abs().max() < 1e-4 * b[finite].abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-15, 1e15])
def test_small_and_large_numbers_keep_their_digits(scale):
    q, k, v, coefs = inputs(140, 137, 70, 12, 66)
    leaves = [q * scale, k / scale, v, coefs]
    found, wanted = gradients(product, leaves), gradients(plain_product, leaves, torch.float64)
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_small_gradients_keep_their_digits():
    q, k, v, coefs = inputs(140, 137, 70, 12, 66)
    small = [lambda *x, f=f: sum(y.sum() * 1e-32 for y in f(*x)) for f in (product, plain_product)]
    found = gradients(small[0], [q, k, v, coefs])[1:]
    wanted = gradients(small[1], [q, k, v, coefs], torch.float64)[1:]
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_whose_pieces_are_fewer(dtype):
    leaves = [x.to(dtype) for x in inputs(140, 137, 64, 12, 64)]
    found = gradients(product, leaves, dtype)
    # what float32 makes of the same numbers, rounded
    wanted = gradients(product, [x.float() for x in leaves])
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=2e-2, atol=2e-2)
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert (a.float() - b).norm() < 2e-2 * b.norm()


def test_onednn_finds_its_tiles_as_they_were():
    x, weight = draw(64, 96).bfloat16(), draw(80, 96, seed=1).bfloat16()
    before = F.linear(x, weight)
    q, k, v, coefs = inputs(140, 137, 70, 12, 66)
    for _ in range(3):
        product(q, k, v, coefs)
        assert torch.equal(F.linear(x, weight), before)


def test_without_tiles_the_same_values(tmp_path):
    program = """
import sys, torch
sys.path.insert(0, "tests")
import test_kernels_tiles as tiles
results = tiles.gradients(tiles.product, tiles.inputs(140, 137, 70, 12, 66))
torch.save([x.detach() for x in results], sys.argv[1])
"""
    path = tmp_path / "results.pt"
    environment = {"KART_CACHE": str(tmp_path), "CXX": "g++ -mno-amx-tile -mno-amx-bf16"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    assert "torch runs instead" not in result.stderr
    for a, b in zip(
        gradients(product, inputs(140, 137, 70, 12, 66)), torch.load(path), strict=True
    ):
        assert not torch.equal(a, b) or not b.numel()  # another order of sums: another unit it was
        assert (a - b).norm() < 2e-6 * b.norm()
