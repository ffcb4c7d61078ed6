"""The kernels of `kart.kernels.triton.entries` in Triton's interpreter, on the CPU, against the
materialised form in float64; see tests/test_triton.py.
"""

import functools
import itertools
import sys
from typing import Any

import interpreter
import pytest
import test_kernels_entries as entries_of_other_engines
import torch
from torch.testing import assert_close

from kart import bases, kernels, operators
from kart.kernels import plain
from kart.kernels.arguments import room_like
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import family_of
from kart.kernels.triton import entries, launch

FORMS = [form for form in plain.FORMS if form != "simplex"]
# relative errors in the norm
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}


def case(basis, n, m, width=7, values=5, batch=2, heads=2, mask=None, dtype=torch.float32):
    """Drawn q, k, v and units, none of them zero, a mask of the given shape, and factors."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    q, k, v = (
        draw(batch, rows, heads, columns).transpose(1, 2).to(dtype)
        for rows, columns in ((n, width), (m, width), (m, values))
    )
    if basis is None:
        units = {"table": draw(heads, n + m - 1)}
    else:
        units = basis.init(generator, (heads,))
        units = {name: x + 0.3 * draw(x.shape) for name, x in units.items()}
    mask = None if mask is None else draw(*mask) > -0.5
    return [q, k, v], units, mask, draw(batch, 1, n, 1)


def results(basis, inputs, units, mask, factor, form, engine):
    """The output, and the gradients of q, k, v and units, of a probe."""
    leaves = [x.clone().requires_grad_() for x in (*inputs, *units.values())]
    q, k, v, *rest = leaves
    own = dict(zip(units, rest, strict=True))
    options = {"form": form, "factor": factor, "engine": engine}
    out = kernels.entry_attention(basis, own, q, k, v, mask, **options)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad((out * probe.to(out)).sum(), leaves, materialize_grads=True)
    return dict(zip(("out", *"qkv", *units), (out.detach(), *found), strict=True))


def near(found, wanted, limit):
    for name, x in wanted.items():
        assert found[name].shape == x.shape
        # softmax of one key takes no gradient, up to rounding
        error = (found[name].double() - x).norm() / x.norm().clamp(min=1)
        assert error < limit, f"{name} {tuple(x.shape)}: {error:.1e}"


def compare(basis, form, n, m, limit=None, **options):
    inputs, units, mask, factor = case(basis, n, m, **options)
    found = results(basis, inputs, units, mask, factor, form, "triton")
    exact = [x.double() for x in inputs], {name: x.double() for name, x in units.items()}
    wanted = results(basis, *exact, mask, factor.double(), form, "plain")
    near(found, wanted, limit or LIMITS[inputs[0].dtype])
    assert [found[x].dtype for x in "qkv"] == [x.dtype for x in inputs]


def few_tiles(kernel: str, *_: Any) -> launch.Tiles:
    """Many blocks of few tokens."""
    return launch.Tiles(32 if kernel == "table_gradient" else 16, 16, 4, 2, 2)


# --- cases, run in the interpreter ----------------------------------------------------------------

SIZES = [(5, 7), (33, 40), (1, 1), (33, 1), (1, 40)]


def masks(n, m):
    return [None, (2, 1, 1, m), (1, 1, n, m), (2, 2, n, m), (1, 2, n, 1), (1, 1, 1, 1)]


def forms():
    for form, (n, m) in itertools.product(FORMS, SIZES[:3]):
        compare(bases.fourier(2), form, n, m)
    for form in FORMS:
        for mask in masks(9, 20)[1:]:
            compare(bases.polynomial(2), form, 9, 20, heads=2, mask=mask)


def sizes():
    for form, (n, m) in itertools.product(("inside", "beside"), SIZES[3:]):
        compare(bases.chebyshev(2), form, n, m, batch=1)
    for form, width, values in zip(FORMS, (3, 64, 16, 33, 8), (64, 3, 17, 16, 1), strict=True):
        compare(bases.fourier(1), form, 18, 20, width=width, values=values, batch=1)


def families():
    every = [bases.bspline(3), bases.gaussian_rbf(4), bases.fourier(1, base="silu", scales=True)]
    every += [bases.rational(2, 1), bases.dog(), bases.meyer(base="gelu", scales=True)]
    for basis, form in zip(every, itertools.cycle(FORMS)):
        compare(basis, form, 5, 20, mask=(1, 1, 5, 20))
    for basis, form in zip(every, itertools.cycle(("inside", "l1", "plain"))):
        compare(basis, form, 5, 20, batch=1)


def tables():
    for form, (n, m) in itertools.product(("inside", "beside"), SIZES):
        compare(None, form, n, m, heads=1)
    for form, mask in itertools.product(("inside", "beside"), masks(9, 20)[1:4]):
        compare(None, form, 9, 20, mask=mask)


def half_precision():
    for form in FORMS:
        compare(bases.fourier(2), form, 18, 20, width=16, dtype=torch.float16)
    compare(None, "inside", 18, 20, dtype=torch.float16)
    # values of their own dtype
    (q, k, v), units, _, factor = case(bases.fourier(2), 9, 7)
    inputs = [q.half(), k.half(), v]
    found = results(bases.fourier(2), inputs, units, None, factor, "beside", "triton")
    assert found["out"].dtype == torch.float32
    wide = [x.double() for x in inputs], {name: x.double() for name, x in units.items()}
    wanted = results(bases.fourier(2), *wide, None, factor.double(), "beside", "plain")
    near(found, wanted, LIMITS[torch.float16])


def raw(basis, form, n, m, own, factor=True, mask=None, choose=few_tiles, **options):
    """The raw operation and its arguments, with functions of each sample where they are its own."""
    (q, k, v), units, mask, factors = case(basis, n, m, mask=mask, **options)
    theta = units["table" if basis is None else "coefs"][None]
    theta = torch.cat([theta, theta.flip(-1), theta.cos()])[: q.shape[0]] if own else theta
    family = None if basis is None else family_of(basis)
    x = Weighted(family, form, q, k, v, theta, mask, factors if factor else None, 0.3)
    assert entries.refuses(x) == ""
    out, *rest = entries.forward(x, choose=choose)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return x, dout, [out, *rest], entries.backward(x, dout, out, *rest, choose=choose)


def blocks_and_slices():
    """Of every tensor many blocks, in the layouts and sums of the engine."""
    for basis, form, own in [
        *((bases.fourier(2), form, form in ("plain", "inside")) for form in FORMS),
        *((None, form, form == "beside") for form in ("inside", "beside")),
        (None, "inside", False),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "PROGRAMS", 2)  # several samples in a slice
            mask = (3, 1, 33, 20) if basis is None else None
            x, dout, (out, *_), found = raw(basis, form, 33, 20, own, batch=3, mask=mask)
        names = ("q", "k", "v", "theta")
        leaves = [getattr(x, name).double().requires_grad_() for name in names]
        more = (x.mask, x.factor.double(), form, x.scale)
        wanted = plain.entry_attention(basis, {"theta": leaves[3]}, *leaves[:3], *more)
        near({"out": out}, {"out": wanted.detach()}, 1e-5)
        slopes = torch.autograd.grad(wanted, leaves, dout.double())
        near(dict(zip(names, found, strict=True)), dict(zip(names, slopes, strict=True)), 1e-5)
        laid = [room_like(x.v, 33), *map(room_like, (x.q, x.k, x.v))]
        assert [y.stride() for y in (out, *found[:3])] == [y.stride() for y in laid]


def repeats():
    for basis in (bases.fourier(2), None):
        first, second = (raw(basis, "beside", 20, 33, False)[2:] for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def strides():
    (q, k, v), units, _, factor = case(bases.fourier(2), 20, 9, heads=3)
    v = v[..., ::2]
    inputs = [q[:, :1].expand(-1, 3, -1, -1), k.mT.contiguous().mT, v]
    turned = (torch.rand(2, 3, 9, 20, generator=torch.Generator().manual_seed(2)) > 0.3).mT
    for form in ("l1", "beside"):
        found, wanted = (
            results(bases.fourier(2), [x.to(dtype) for x in inputs],
                    {name: x.to(dtype) for name, x in units.items()}, turned, None, form, engine)
            for dtype, engine in ((torch.float32, "triton"), (torch.float64, "plain"))
        )  # fmt: skip
        near(found, wanted, 1e-5)


def transforms():
    """Gradients of members that have functions of their own, and of gradients."""
    for basis, form in ((bases.fourier(1), "inside"), (bases.dog(), "l1"), (None, "beside")):
        inputs, units, mask, factor = case(basis, 5, 6, heads=1, mask=(1, 1, 5, 6))

        def both(engine, dtype, basis=basis, form=form, given=(inputs, units, mask, factor)):
            inputs, units, mask, factor = given
            q, k, v = (x.to(dtype) for x in inputs)
            units = {name: x.to(dtype) for name, x in units.items()}
            options = {"form": form, "factor": factor.to(dtype), "engine": engine}

            def loss(units, q):
                out = kernels.entry_attention(basis, units, q, k, v, mask, **options)
                return out.square().sum()

            members = {name: torch.stack([x, 0.5 * x]) for name, x in units.items()}
            slope = torch.func.grad(loss, (0, 1))
            each = torch.func.vmap(slope, (0, None))(members, q)

            def second(q):
                return sum(
                    x.square().sum() for x in (*slope(units, q)[0].values(), slope(units, q)[1])
                )

            return {**each[0], "q": each[1], "second": torch.func.grad(second)(q)}

        near(both("triton", torch.float32), both("plain", torch.float64), 1e-4)


def infinities():
    other = entries_of_other_engines
    for form in ("inside", "beside"):
        other.test_softmax_of_infinities_alone_is_no_number(form, "triton")
    for form, masked in itertools.product(
        ("softmax", "inside", "beside"), ("whole", "rows", "pairs")
    ):
        other.test_what_is_hidden_makes_no_number_of_infinities(masked, form, "triton")
    # what nobody attends to
    for form in FORMS:
        (q, k, v), units, _, _ = case(bases.fourier(2), 5, 6)
        k[:, :, 0], k[:, :, 1] = torch.inf, torch.nan
        mask = torch.ones(6, dtype=torch.bool)
        mask[:2] = False
        found = results(bases.fourier(2), [q, k, v], units, mask, None, form, "triton")
        # dq meets the key itself
        assert all(x.isfinite().all() for name, x in found.items() if name != "q")


def fixed_operators():
    """sigmoid and relu, whose piece is held against their features."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=generator)
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.4
    entry_attention = kernels.entry_attention
    for op in (operators.sigmoid(), operators.relu()):
        with pytest.MonkeyPatch.context() as patch:
            taken = functools.partial(entry_attention, engine="triton")
            patch.setattr(kernels, "entry_attention", taken)
            found = op.attend({}, q, k, v, mask)
        scores = (q @ k.mT / 2).double()
        assert_close(found, (op.weights({}, scores, mask) @ v.double()).float())


def what_is_refused():
    x, *_ = raw(bases.fourier(2), "plain", 5, 6, False)
    wide = torch.zeros(2, 2, 5, 129)
    for other, words in [
        ({"form": "simplex"}, "has no simplex, which takes whole rows"),
        ({"matrix": True}, "has no entries of every query and key"),
        ({"q": x.q.double()}, "has no torch.float64"),
        ({"q": wide, "k": wide}, "of width 128 at most, not 129"),
        ({"family": family_of(bases.fourier(17))}, "functions of 32 features at most, not 34"),
        ({"family": family_of(bases.bspline(6, degree=6))}, "no 'bspline' basis of this kind"),
    ]:
        assert words in entries.refuses(x._replace(**other)), other


GROUPS = {
    "forms": [forms],
    "sizes": [sizes, families],
    "tables": [tables],
    "blocks": [blocks_and_slices, repeats],
    "inputs": [half_precision, strides, infinities, fixed_operators, what_is_refused],
    "transforms": [transforms],
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_kernels_are_the_plain_expression_in_the_interpreter(group):
    interpreter.run(__file__, group)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for check in GROUPS[sys.argv[1]]:
        check()
