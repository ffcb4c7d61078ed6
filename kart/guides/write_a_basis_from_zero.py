"""Write a basis from zero.

# Features are enough

A unit of KArAt is a learnable function of one score. If it is linear in its parameters, it is known
by its features: an elementwise function that maps `(...)` to `(..., K)`. Hats on equal intervals:

>>> import torch
>>> from kart import bases, operators
>>> def hats(grid=5, low=-2.0, high=2.0):
...     step = (high - low) / (grid - 1)
...
...     def expand(x):
...         places = torch.arange(grid, dtype=x.dtype, device=x.device)
...         t = (x[..., None] - low) / step - places
...         # at a knot all hats have the slope of their right side: abs and relu would have none
...         hat = torch.where(t < 0, 1 + t, 1 - t)
...         return torch.where((t < -1) | (t >= 1), 0, hat)
...
...     knots = [low + j * step for j in range(-1, grid + 1)]
...     traits = {"partition_of_unity": (low, high), "nonnegative": True, "smooth": 0}
...     return bases.linear(expand, grid, family="hats", traits={**traits, "points": knots})

>>> basis = hats()
>>> basis.expand(torch.tensor([-2.0, -1.5, 0.0])).tolist()
[[1.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]

`bases.linear` adds the coefficients, how they are drawn, the base activation and the scales of the
paper. `traits` say what is true of the family; they are claims, and are checked.

# It attends

An operator takes any basis, and streams it: what `attend` needs is `expand`.

>>> operator = operators.low_rank(basis, rank=4)
>>> params = operator.init(torch.Generator().manual_seed(0), 2, 9)
>>> q, k, v = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(1))
>>> operator.attend(params, q, k, v).shape
torch.Size([2, 9, 8])

In torch alone that takes a multiple of softmax's time. `bases.linear` takes the same features in
C++ and in Triton as well, `cpp=bases.Cpp(text)` and `triton=bases.Triton(text)`: kart/bases/rbf.py
has both. A piece is held against `expand` before its first use; one that is wrong is refused, with
a line in the log, and torch runs.

# Is it right?

The suites that kart's own families pass ask yours the same: derivatives, dtypes, `vmap`, half
precision, and what the traits claim. In pytest:

    from kart.testing import basis_suite

    @basis_suite(hats(grid=7), expected_failures={})
    def test_hats(): ...

or from the command line, with progress, on a file of yours: `kart test basis my_file.py:hats`. One
property from Python:

>>> from kart.testing import check_basis
>>> [result] = check_basis(hats(), only=["partition_of_unity"], max_examples=10)
>>> result.name, result.passed
('partition_of_unity', True)

A claim that does not hold is found, shrunk and explained. Half of each hat, still claimed to sum to
one:

>>> halves = bases.linear(
...     lambda x: hats().expand(x) / 2, 5, family="halves",
...     traits={"partition_of_unity": (-2.0, 2.0)},
... )
>>> [result] = check_basis(halves, only=["partition_of_unity"], max_examples=10)
>>> result.passed
False

# Not linear in its parameters

Such a family (`bases.rational`, the wavelets) writes `init` and `apply` itself, as a `bases.Basis`
whose `expand` returns None; it runs in bounded memory, but slower than one with features. Its trait
`amplitude` names the parameter that is a factor of the function: a start at zero sets it to zero,
`operators.resize` weighs it anew, and `functions.prune` drops units by it.

>>> def steps():
...     def init(generator, shape):  # of any shape, () among them
...         keys = shape[-1] if shape else 1
...         heights, slopes = bases.normal(generator, (2, *shape))
...         return {"height": heights / keys**0.5, "slope": 1 + slopes}
...
...     def apply(params, x):
...         wide = x.float() if x.itemsize < 4 else x
...         return (params["height"] * (params["slope"] * wide).tanh()).to(x.dtype)
...
...     traits = {"amplitude": "height"}
...     return bases.Basis("steps", 2, init, apply, lambda x: None, None, None, {}, traits)
>>> operator = operators.low_rank(steps(), rank=4)
>>> params = operator.init(torch.Generator().manual_seed(0), 2, 9)
>>> operator.attend(params, q, k, v).shape
torch.Size([2, 9, 8])
"""
