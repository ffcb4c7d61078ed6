"""The C++ engine built for other processors and by other compilers than this machine's own.

Each build is held against the plain expressions when it is loaded, values and every gradient, and
says so where it is not right: silence is the test.
"""

import os
import shutil
import subprocess
import sys

import pytest

from kart import kernels
from kart.kernels.family import family_named

pytestmark = pytest.mark.skipif(
    kernels.engines()["cpp"] != "ready", reason="the C++ engine does not run here"
)

# one of each source: features, features beside softmax, units in registers, weights of scores, by
# place
SPECS = ("G2", "G2:base=softmax", "dog", "softconv", "G2:order=by_offset")
PROGRAM = """
import sys, torch
from kart import kernels, operators
assert kernels.engines()["cpp"] == "ready", kernels.engines()
for spec in sys.argv[1:]:
    op = operators.parse(spec).operator
    q, k, v = torch.randn(3, 2, 2, 9, 4).requires_grad_()
    op.attend(op.init(torch.Generator().manual_seed(0), 2, 9), q, k, v).sum().backward()
"""
AVX2 = "g++ -mno-avx512f -mno-avx512dq"


@pytest.mark.parametrize("compiler", [AVX2, pytest.param("clang++", marks=pytest.mark.slow)])
def test_other_instructions_and_compilers_give_right_kernels(tmp_path, compiler):
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"no {compiler.split()[0]}")
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SPECS],
        env={**os.environ, "CXX": compiler, "KART_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert len([*(tmp_path / "engines").glob("*.so")]) >= len(SPECS)


def test_every_kind_of_kernel_compiles_for_arm():
    from kart.kernels import cpp
    from kart.kernels.cpp import build, weights

    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    fourier = family_named('kart.bases:fourier?{"base": "silu", "grid": 2}')
    dog = family_named('kart.bases:dog?{"base": "zero"}')
    texts = [cpp.source(family, softmax) for family in (fourier, dog) for softmax in (False, True)]
    alone = family_named('kart.bases:fourier?{"base": "zero", "grid": 2}')
    texts += [weights.source(fourier, "softmax", False), weights.source(alone, "beside", True)]
    texts += ['#include "mix.cpp"', '#include "dense.cpp"']
    flags = [flag for flag in build.FLAGS if flag != build.NATIVE and flag != "-shared"]
    for text in texts:
        subprocess.run(
            [compiler, *flags, f"-I{build.ROOT}", "-fsyntax-only", "-x", "c++", "-"],
            input=text,
            text=True,
            check=True,
        )
