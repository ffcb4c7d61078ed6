"""Property suites."""

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
    cli_main,
    kernel_suite,
    model_suite,
    operator_suite,
    projection_suite,
    step_suite,
)
from kart.testing.core import Result
from kart.testing.step import Training

__all__ = [
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
