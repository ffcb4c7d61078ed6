"""Property suites for bases, operators, projections, kernels, training steps and models: your own
are held to the mathematics that kart's are held to.

A basis of one's own, such as the `hats` that `kart/guides/write_a_basis_from_zero.py` writes, is
checked in three lines, each property a test of pytest:

    @basis_suite(hats(grid=7), expected_failures={})
    def test_hats(): ...

or without pytest by `check_basis(hats())`, a list of `Result`, or on the command line by
`kart test basis my_module:hats` (`cli_main`, for every kind).

Where to look: `basis/` and `operator/` hold a file for each family of properties, `projection.py`,
`kernel.py`, `step.py` and `model.py` all of theirs; each ends with its `PROPERTIES` and `suite`, of
which `api.py` makes the check and the decorator. `draw.py` says what is drawn, `compare.py` how
far apart two right answers may be, `laws.py` what several kinds are asked alike, `formulas.py` what
a step is held to, `core.py` how a property is run and how a failure reads.

* Some properties are asked of everyone (elementwise, derivatives, dtypes, vmap, float32 against
  float64, half precision, NaN behind masks). The others follow from what the object declares in
  `traits`; a trait that is not declared is probed, and listed as skipped with what the probe found;
  one that nothing reads is an error.
  "points" are where something happens (knots, poles, ends): examples are drawn on and beside them.
* Transforms are taken to hold unless traits say False: "vmap", "forward_mode", "second_derivative",
  and "compiles" for a basis. A right `torch.autograd.Function` without `jvp` declares
  {"forward_mode": False}, and all but the properties that need it are asked.
* A failure names object, trait and property with its formula, the smallest example that Hypothesis
  finds, the numbers there, and what it means for training.
* `expected_failures={"property": "reason"}` is strict: a property that holds after all fails, and
  one that is not asked of the object is an error.
* `HYPOTHESIS_PROFILE=nightly` (`make test-nightly`) draws thousands of examples at random; the
  default profile draws the same few every time.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`kart.testing` needs hypothesis, which is not installed. Install it with "
        "`pip install 'kart-attention[testing]'`."
    ) from error

from kart.testing.api import (
    basis_suite,
    check_basis,
    check_kernel,
    check_model,
    check_operator,
    check_projection,
    check_step,
    kernel_suite,
    model_suite,
    operator_suite,
    projection_suite,
    step_suite,
)
from kart.testing.command import cli_main
from kart.testing.core import Result
from kart.testing.formulas import AdamW
from kart.testing.kernel import Kernel
from kart.testing.step import Training

__all__ = [
    "AdamW",
    "Kernel",
    "Result",
    "Training",
    "basis_suite",
    "check_basis",
    "check_kernel",
    "check_model",
    "check_operator",
    "check_projection",
    "check_step",
    "cli_main",
    "kernel_suite",
    "model_suite",
    "operator_suite",
    "projection_suite",
    "step_suite",
]
