"""Spectra of matrices with planted singular values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import operators, pages
from kart.analysis import spectra


def planted(values, rows=7, columns=5, seed=0):
    """A float64 matrix with these singular values."""
    drawn = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=drawn).double())[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=drawn).double())[0]
    middle = torch.zeros(rows, columns).double()
    middle.diagonal()[: len(values)] = torch.tensor(values).double()
    return left @ middle @ right


def test_values_and_ranks_of_planted_matrices():
    stack = torch.stack([planted([4.0, 2.0, 2.0]), planted([1.0] * 5), torch.zeros(7, 5).double()])
    stack = stack[:, None]  # (3, 1, 7, 5)
    values = spectra.singular_values(stack)
    assert values.shape == (3, 1, 5) and values.dtype == torch.float64
    assert_close(values[0, 0], torch.tensor([4.0, 2.0, 2.0, 0.0, 0.0]).double())
    # shares 1/2, 1/4, 1/4: entropy 1.5 log 2
    expected = torch.tensor([2**1.5, 5.0, 0.0]).double()
    assert_close(spectra.effective_rank(stack)[:, 0], expected)
    assert spectra.numerical_rank(stack)[:, 0].tolist() == [3, 5, 0]
    assert spectra.numerical_rank(stack, 0.6)[:, 0].tolist() == [1, 5, 0]


@pytest.mark.parametrize("spec", ["G3B:rank=3", "mexican_hat-B:rank=3"])
def test_weights_are_cut_at_the_rank_of_the_operator(spec):
    operator = operators.parse(spec).operator
    drawn = torch.Generator().manual_seed(0)
    params = operator.init(drawn, 2, 9)
    scores = torch.randn(4, 2, 9, 9, generator=drawn)
    assert (spectra.numerical_rank(scores) == 9).all()
    weights = operator.weights(params, scores)
    assert (spectra.numerical_rank(weights) == 3).all()
    assert (spectra.effective_rank(weights) < 3 + 1e-3).all()


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_ranks_have_no_unit_and_no_basis(seed, factor):
    drawn = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 6, generator=drawn).double()
    rank = spectra.effective_rank(matrix)
    assert 1 <= rank <= 5
    turn = torch.linalg.qr(torch.randn(5, 5, generator=drawn).double())[0]
    assert_close(spectra.effective_rank(factor * turn @ matrix), rank)
    assert_close(spectra.effective_rank(matrix.mT), rank)
    assert_close(spectra.effective_rank(matrix[torch.randperm(5, generator=drawn)]), rank)
    assert spectra.numerical_rank(factor * matrix) == spectra.numerical_rank(matrix) == 5


def test_half_precision_has_its_own_tolerance():
    matrix = planted([1.0, 0.5, 1e-3])
    assert spectra.numerical_rank(matrix) == 3
    assert spectra.numerical_rank(matrix.bfloat16()) == 2


@pytest.mark.parametrize("size", [1e-320, 1e-310, 1e308])
def test_effective_rank_at_the_ends_of_the_numbers(size):
    assert float(spectra.effective_rank(size * torch.eye(3).double())) == pytest.approx(3)


def test_profile_and_picture():
    values = torch.stack([torch.tensor([100.0, 1.0, 0.0]), torch.tensor([10.0, 1e-2, 1e-30])])
    low, mean, high = spectra.log_profile(values, floor=1e-6)
    assert_close(low, torch.tensor([1.0, -2.0, -4.0]).double())
    assert_close(mean, torch.tensor([1.5, -1.0, -4.0]).double())
    assert_close(high, torch.tensor([2.0, 0.0, -4.0]).double())
    shuffled = values.reshape(1, 2, 3).flip(1)
    assert_close(spectra.log_profile(shuffled, 1e-6).mean, mean)
    panels = {"scores": {"softmax": values}, "weights": {"softmax": values, "G3B": 2 * values}}
    fig = spectra.plot(panels, rank=2)
    assert [ax.get_title() for ax in fig.axes] == ["scores", "weights"]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()
    assert "r = 2" in pages.svg(fig, "x")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectra.singular_values(torch.ones(3)), r"\(\.\.\., N, M\).*got .*\(3,\)"),
        (lambda: spectra.singular_values(torch.ones(3, 3).long()), "int64"),
        (lambda: spectra.effective_rank(torch.full((2, 2), torch.nan)), "4 entries nan"),
        (lambda: spectra.numerical_rank(torch.ones(2, 2), 1.0), "`tolerance` < 1"),
        (lambda: spectra.numerical_rank(torch.eye(197).bfloat16()), r"`tolerance` .*bfloat16.*197"),
        (lambda: spectra.numerical_rank(torch.eye(1024).half()), r"`tolerance` .*float16.*1024"),
        (lambda: spectra.log_profile(torch.zeros(2, 2)), "not all of them 0"),
        (lambda: spectra.log_profile(torch.full((2, 2), torch.nan)), "finite singular values"),
        (lambda: spectra.plot({}), "got none"),
    ],
)
def test_what_spectra_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
