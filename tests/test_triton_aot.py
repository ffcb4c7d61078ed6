"""Builds for sm_90, without a GPU, of what the Triton engine would launch there: registers, spills,
tensor cores, hardware sines.

`PYTHONPATH=. python tests/test_triton_aot.py` prints the table.
"""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sass
import torch

from kart import bases
from kart.kernels import triton as engine
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import Product, family_of
from kart.kernels.triton import entries

triton = pytest.importorskip("triton")

KERNELS = ("forward", "query_gradient", "key_gradient")


def room(product: Product):
    """Where the kernels of a product are."""
    from kart.kernels.triton import device, device_units

    return device_units if product.family.basis.features is None else device


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, launches: list[dict[str, Any]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: self.launches.append(arguments)


class Build(NamedTuple):
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes
    loop: list[str]  # the instructions of the innermost loop with a product
    ranks: list[str]  # of units: those of the loop over ranks in it
    every: list[str]
    unwritten: list[str]  # instructions that read what nothing has written


def launches(kernel, product, **options) -> list[dict[str, Any]]:
    """The arguments of each launch of a kernel in a forward and a backward of these inputs."""
    from kart.kernels.triton import device_coefs

    recorded: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(room(product), name, Recorder(recorded if name == kernel else []))
        for name in ("pack", "unpack"):
            patch.setattr(device_coefs, name, Recorder(recorded if name == kernel else []))
        if kernel in ("forward", "pack"):
            engine.forward(product, **options)
        if kernel != "forward":
            dy = product.q.new_empty(*product.q.shape[:3], product.coefs.shape[2])
            engine.backward(product, dy, **options)
    return recorded


def build(function: Any, arguments: dict[str, Any], capability: int = 90) -> Build:
    """One launch, built for sm_90, or another, as `function[grid](...)` would build it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = dict(arguments)
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {x: arguments.pop(x) for x in names if x in arguments}
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types |= {torch.uint8: "*u8"}
    constants, attributes = {}, {}

    def typed(value: Any, path: tuple[int, ...], special: bool, constexpr: bool) -> Any:
        # 1 and None are built in, and that 16 divides a number or an address is known
        if isinstance(value, tuple) and not constexpr:
            return tuple(typed(x, (*path, i), special, False) for i, x in enumerate(value))
        one = type(value) is int and value == 1 and special
        if constexpr or value is None or one:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        tensor = torch.is_tensor(value)
        if tensor or (value % 16 == 0 and special):
            attributes[path] = [["tt.divisibility", 16]]
        return types[value.dtype] if tensor else "i32"

    signature = {
        p.name: typed(arguments.pop(p.name), (i,), not p.do_not_specialize, p.is_constexpr)
        for i, p in enumerate(function.params)
    }
    assert not arguments
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        command = [str(tool), "-res-usage", "-sass", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {x: int(n) for x, n in re.findall(r"(REG|STACK):(\d+)", text)}
    code = dict(sass.parse(text))
    loops = []
    for address, instruction in code.items():
        target = re.search(r"BRA.* 0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            loops.append([x for a, x in code.items() if int(target[1], 16) <= a <= address])
    loop = min((x for x in loops if count(x, "HGMMA")), key=len, default=[])
    # every unit has a reciprocal, an exponential or a sine
    ranks = min((x for x in loops if count(x, "MUFU")), key=len, default=[])
    usage = usage["REG"], usage["STACK"], built.metadata.shared
    return Build(*usage, loop, ranks, list(code.values()), sass.unwritten(text))


def count(instructions: list[str], *names: str) -> int:
    return sum(any(name in x for name in names) for x in instructions)


def inputs(
    basis, dtype=torch.bfloat16, rank=12, width=64, tokens=197, mask=None, batch=8, keys=None
):
    """Of the engine, strided like the q and k of one projection to qkv."""
    qkv = torch.empty(batch, max(tokens, keys or 0), 3, 3, width, dtype=dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    q, k = q[:, :, :tokens], k[:, :, : keys or tokens]
    family = family_of(basis)
    coefs = torch.empty(1, 3, rank, k.shape[2], family.width)
    if mask is not None:
        mask = torch.empty(mask, dtype=torch.bool)
    return Product(family, q, k, coefs, mask, 0.125)


def describe(kernel, basis, precision="tf32", **options) -> list[tuple[str, Build]]:
    """What was built of each launch of a kernel, and its description."""
    rows: list[tuple[str, Build]] = []
    product = inputs(basis, **options)
    for launch in launches(kernel, product, precision=precision):
        tile = f"{launch['BLOCK_N']}x{launch['BLOCK_M']} w{launch['num_warps']}"
        if basis.features is None:
            what = f"{kernel}, {basis.family} of {basis.size}, {tile}, ADD {launch.get('ADD')}"
            # one build serves all launches but the first, which does not add
            if what in [name for name, _ in rows]:
                continue
        else:
            part = f"{launch['FIRST']}:{launch['LAST']}"
            what = f"{kernel}, {basis.family} {part} of {basis.size}, {tile}"
        rows.append((what, build(getattr(room(product), kernel), launch | {"FAST": True})))
    return rows


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loop_keeps_to_registers_tensor_cores_and_hardware_sines(kernel, dtype, grid):
    ((what, built),) = describe(kernel, bases.fourier(grid), dtype=dtype)
    print(f"{what} {dtype}: {built.registers} registers, {built.stack} bytes of stack")
    assert count(built.loop, "LDL", "STL") == 0
    # a few addresses of the outer loop may wait on the stack
    assert built.stack <= 32
    assert built.shared <= 227 * 1024 and not built.unwritten
    assert count(built.loop, "HGMMA") and not count(built.every, "HMMA.")
    # two sines an element and a rounding of angles without FRND
    tile = what.split()[-2].split("x")
    assert count(built.loop, "MUFU") == 2 * int(tile[0]) * int(tile[1]) // 128
    assert not count(built.every, "FRND")


@pytest.mark.parametrize("basis", [bases.fourier(1), bases.dog()], ids=lambda basis: basis.family)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (40, 1), (1, 40)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_read_that_is_not_written_whatever_the_sizes(kernel, tokens, keys, basis):
    for _, built in describe(kernel, basis, tokens=tokens, keys=keys, batch=1):
        assert not built.unwritten


@pytest.mark.parametrize(
    ("batch", "tokens", "rank", "width"),
    [(128, 197, 12, 64), (1, 1, 1, 64), (1, 785, 48, 64), (8, 197, 12, 128)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_passes_between_tokens_and_ranks_keeps_to_registers(batch, tokens, rank, width, dtype):
    from kart.kernels.triton import device_values, values

    v = torch.empty(batch, tokens, 3, width, dtype=dtype).transpose(1, 2)
    y, mix = torch.empty(batch, 3, tokens, rank, dtype=dtype), torch.empty(1, 3, tokens, rank)
    for kernel in ("gather", "spread", "pull"):
        recorded: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("gather", "spread", "pull"):
                patch.setattr(device_values, name, Recorder(recorded if name == kernel else []))
            _, hidden = values.forward(v, y, mix)
            values.backward(v, v, y, mix, hidden)
        for arguments in recorded:
            built = build(getattr(device_values, kernel), arguments)
            assert built.stack <= 32 and not count(built.loop, "LDL", "STL")
            assert built.shared <= 227 * 1024 and not built.unwritten


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "basis",
    [bases.fourier(3), bases.fourier(12), bases.chebyshev(8), bases.bspline(8), bases.rational()],
    ids=lambda basis: f"{basis.family} of {basis.size}",
)
def test_coefficients_pass_without_a_stack(basis, dtype):
    from kart.kernels.triton import device_coefs

    product = inputs(basis, dtype)
    # C for the forward, D for the backward; units have the same for both
    for kernel, number in (("pack", 2), ("unpack", 1)):
        found = launches(kernel, product)
        assert len(found) == number
        for arguments in found:
            built = build(getattr(device_coefs, kernel), arguments)
            assert not built.stack and not built.unwritten and built.registers <= 128


ENTRIES = ("forward", "query_gradient", "key_gradient", "table_gradient")


def weighted(
    basis, form, dtype=torch.bfloat16, width=64, tokens=197, keys=None, mask=None, batch=8
) -> Weighted:
    """Of the kernels of entries, strided like the q, k and v of projections."""
    q, k, v = (
        torch.empty(batch, rows, 3, width, dtype=dtype).transpose(1, 2)
        for rows in (tokens, keys or tokens, keys or tokens)
    )
    family = None if basis is None else family_of(basis)
    theta = torch.empty(1, 3, tokens + k.shape[2] - 1 if family is None else family.width)
    mask = None if mask is None else torch.empty(mask, dtype=torch.bool)
    return Weighted(family, form, q, k, v, theta, mask, torch.empty(1, 1, tokens, 1), 0.125)


def built_entries(x: Weighted, precision="tf32", capability=90) -> dict[str, Build]:
    """What is built of each kernel in a forward and a backward."""
    from kart.kernels.triton import device_entries

    recorded: dict[str, list[dict[str, Any]]] = {name: [] for name in ENTRIES}
    with pytest.MonkeyPatch.context() as patch:
        for name in ENTRIES:
            patch.setattr(device_entries, name, Recorder(recorded[name]))
        results = entries.forward(x, precision)
        entries.backward(x, torch.empty_like(results[0]), *results, precision=precision)
    return {
        name: build(getattr(device_entries, name), launch | {"FAST": True}, capability)
        for name, launches in recorded.items()
        for launch in launches
    }


def check_entries(x: Weighted, precision: str, share: float) -> None:
    for name, built in built_entries(x, precision).items():
        spills = count(built.loop, "LDL", "STL")
        print(f"{name}: {built.registers} registers, {built.stack} bytes of stack, {spills}")
        assert built.loop and spills <= share * len(built.loop), name
        assert built.shared <= 227 * 1024 and not built.unwritten
        assert count(built.loop, "HGMMA") and not count(built.every, "HMMA.")


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "tf32x3")],
    ids=str,
)


@pytest.mark.parametrize(
    "form",
    ["inside", "beside", *(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "l1"))],
)
@PRECISIONS
def test_entries_keep_to_registers_and_tensor_cores(form, dtype, precision):
    check_entries(weighted(bases.fourier(3), form, dtype), precision, 0)


@pytest.mark.parametrize("form", ["inside", "beside"])
@PRECISIONS
def test_tables_keep_to_registers_and_tensor_cores(form, dtype, precision):
    check_entries(weighted(None, form, dtype), precision, 0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"basis": bases.fourier(16), "form": "softmax"},
        {"basis": bases.bspline(8), "form": "inside"},
        {"basis": bases.gaussian_rbf(16), "form": "plain"},
        {"basis": bases.gaussian_rbf(24), "form": "softmax"},
        {"basis": bases.chebyshev(5, base="gelu"), "form": "l1", "mask": (1, 1, 197, 197)},
        {"basis": bases.rational(), "form": "inside", "mask": (8, 1, 1, 197)},
        {"basis": bases.mexican_hat(), "form": "beside"},
    ],
    ids=lambda options: f"{options['basis'].family} of {options['basis'].size}-{options['form']}",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_variants_of_entries_hardly_spill(options, dtype):
    if dtype == torch.float32 and options["basis"].size > 16:
        pytest.skip("a sum for each feature and operands of float32 do not fit the registers")
    check_entries(weighted(**options, dtype=dtype), "tf32", 0.02)


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize("basis", [bases.fourier(3), None], ids=["fourier", "table"])
def test_entries_fit_into_the_shared_memory_of_a_gpu_for_games(basis, dtype, precision):
    x = weighted(basis, "inside", dtype, 128)
    assert all(built.shared <= 99 * 1024 for built in built_entries(x, precision, 89).values())


@pytest.mark.parametrize("basis", [bases.fourier(1), None], ids=["fourier", "table"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (40, 1), (1, 40)])
def test_entries_read_nothing_that_is_not_written(tokens, keys, basis):
    x = weighted(basis, "inside", tokens=tokens, keys=keys, batch=1)
    assert not any(built.unwritten for built in built_entries(x).values())


class Driver:
    """As much of a GPU's as a launch asks for before it builds."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Launched:
    """Stands for a kernel, which is built as a launch would build it, and not run."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: self.function.warmup(grid=grid, **arguments)


@pytest.mark.parametrize(
    "basis",
    [bases.fourier(3), bases.gaussian_rbf(5), bases.rational()],
    ids=lambda basis: basis.family,
)
def test_a_launch_builds_what_is_built_here(basis, monkeypatch):
    from kart.kernels.triton import (
        device,
        device_coefs,
        device_entries,
        device_units,
        device_values,
        values,
    )

    # `build` does without the part of Triton that reads the arguments of a launch
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    rooms = {device: KERNELS, device_units: KERNELS, device_coefs: ("pack", "unpack")}
    rooms |= {device_entries: ENTRIES}
    for at, names in {**rooms, device_values: ("gather", "spread", "pull")}.items():
        for name in names:
            monkeypatch.setattr(at, name, Launched(getattr(at, name)))
    product = inputs(basis)
    y = engine.forward(product)
    engine.backward(product, torch.empty_like(y))
    mix = torch.empty(1, 3, product.k.shape[2], y.shape[3])
    _, hidden = values.forward(product.k, y, mix, product.q)
    values.backward(product.q, product.k, y, mix, hidden)
    for x in (weighted(basis, "beside"), weighted(None, "inside", mask=(8, 1, 1, 197))):
        results = entries.forward(x)
        entries.backward(x, torch.empty_like(results[0]), *results)


BUILT_WRONG = """
        /*0000*/                   UMOV UR10, 0x400 ;
        /*0010*/              @!P0 BRA 0x30 ;
        /*0020*/                   ULDC.64 UR14, c[0x0][0x228] ;
        /*0030*/                   LDG.E.128 R12, desc[UR14][R12.64] ;
        /*0040*/                   STS.128 [R67+UR10], R12 ;
        /*0050*/                   UIADD3 UR6, UP0, UR12, 0x20, URZ ;
        /*0060*/                   UMOV UR7, 0xc0000010 ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR4].tnspB, R24 ;
        /*0080*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   EXIT ;
"""


def test_what_nothing_wrote_is_seen():
    names = [x.split()[0] for x in sass.unwritten(BUILT_WRONG)]
    # UR14 on one of two ways, UR12 on none; of a product of registers the first pair is not read
    assert names == ["LDG.E.128", "UIADD3", "HGMMA.64x16x16.F32.BF16"]


def named(variant) -> str:
    return ", ".join(map(str, [variant["basis"].family, *list(variant.values())[1:]]))


BASIC = [
    {"basis": bases.fourier(grid), "dtype": dtype}
    for dtype in (torch.bfloat16, torch.float32)
    for grid in (1, 3)
]
VARIANTS = [
    {"basis": bases.fourier(10)},
    {"basis": bases.fourier(3), "dtype": torch.float16},
    {"basis": bases.fourier(3), "dtype": torch.float32, "precision": "tf32x3"},
    {"basis": bases.fourier(3), "rank": 64},
    {"basis": bases.fourier(3), "rank": 17, "width": 32},
    {"basis": bases.fourier(3), "width": 128},
    {"basis": bases.fourier(3), "mask": (8, 1, 1, 197)},
    {"basis": bases.fourier(3), "mask": (1, 1, 197, 197)},
    {"basis": bases.chebyshev(4)},
    {"basis": bases.gaussian_rbf(8)},
    {"basis": bases.bspline(8)},
    {"basis": bases.polynomial(3, base="silu")},
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=named)
@pytest.mark.parametrize("kernel", KERNELS)
def test_variants_hardly_spill(kernel, variant):
    for what, built in describe(kernel, **variant):
        spills = count(built.loop, "LDL", "STL")
        print(
            f"{what}: {built.registers} registers, {built.stack} bytes of stack, {spills} in loop"
        )
        assert spills <= 0.02 * len(built.loop)
        assert built.shared <= 227 * 1024 and not built.unwritten
        assert count(built.loop, "HGMMA")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize(
    "variant",
    [
        {"basis": bases.fourier(3)},
        {"basis": bases.fourier(10)},
        {"basis": bases.fourier(3), "width": 128, "rank": 48},
        {"basis": bases.bspline(8), "width": 128, "rank": 48},
    ],
    ids=lambda variant: f"{variant['basis'].family} of {variant['basis'].size}",
)
def test_tiles_fit_into_the_shared_memory_of_a_gpu_for_games(variant, dtype, precision):
    if dtype == torch.bfloat16 and precision == "tf32x3":
        pytest.skip("of float32 alone")
    product = inputs(**variant, dtype=dtype)
    for kernel in KERNELS:
        for launch in launches(kernel, product, precision=precision)[:2]:
            built = build(getattr(room(product), kernel), launch | {"FAST": True}, 89)
            assert built.shared <= 99 * 1024


UNITS = [
    {"basis": basis, "dtype": dtype}
    for basis in (bases.mexican_hat(), bases.rational())
    for dtype in (torch.bfloat16, torch.float32)
]
UNIT_VARIANTS = [
    {"basis": bases.morlet()},
    {"basis": bases.dog(), "dtype": torch.float16},
    {"basis": bases.dog(), "rank": 1},
    {"basis": bases.meyer(base="gelu")},
    {"basis": bases.shannon(base="silu")},
    {"basis": bases.mexican_hat(), "dtype": torch.float32, "precision": "tf32x3"},
    {"basis": bases.rational(), "dtype": torch.float32, "precision": "tf32x3"},
    {"basis": bases.mexican_hat(), "width": 128, "rank": 64},
    {"basis": bases.rational(), "width": 128},
    {"basis": bases.mexican_hat(), "mask": (8, 1, 1, 197)},
    {"basis": bases.rational(base="gelu"), "mask": (1, 1, 197, 197)},
    {"basis": bases.rational(12, 12)},
]


@pytest.mark.parametrize("variant", UNITS, ids=named)
@pytest.mark.parametrize("kernel", KERNELS)
def test_units_keep_to_registers_and_take_their_scores_from_tensor_cores(kernel, variant):
    # more ranks than a program of some kernel holds: two builds, one of which adds
    for what, built in describe(kernel, **variant):
        print(f"{what}: {built.registers} registers, {built.stack} bytes of stack")
        assert 0 < len(built.ranks) < len(built.loop)
        # scores, parameters and sums stay where they are through the loop over ranks
        assert count(built.ranks, "LDL", "STL", "LDS", "STS", "BAR.") == 0
        assert count(built.loop, "LDL", "STL") == 0
        assert built.stack <= 32
        assert built.shared <= 227 * 1024 and not built.unwritten
        assert count(built.loop, "HGMMA") and not count(built.every, "HMMA.")


@pytest.mark.slow
@pytest.mark.parametrize("variant", UNIT_VARIANTS, ids=named)
@pytest.mark.parametrize("kernel", KERNELS)
def test_variants_of_units_hardly_spill(kernel, variant):
    for what, built in describe(kernel, **variant):
        inner, outer = (count(x, "LDL", "STL") for x in (built.ranks, built.loop))
        print(f"{what}: {built.registers} registers, {built.stack} bytes of stack, {inner} {outer}")
        assert inner <= 0.02 * len(built.ranks)
        assert outer <= 0.02 * len(built.loop)
        assert built.shared <= 227 * 1024 and not built.unwritten
        assert count(built.loop, "HGMMA")


def main() -> None:
    for kernel, variant in itertools.product(KERNELS, [*BASIC, *VARIANTS, *UNITS, *UNIT_VARIANTS]):
        for what, built in describe(kernel, **variant):
            spills = count(built.loop, "LDL", "STL")
            options = {k: v for k, v in variant.items() if k != "basis"}
            print(
                f"{what} {options}: {built.registers} registers, {built.stack} bytes of stack, "
                f"loop of {len(built.loop)} with {spills} spills, {built.shared // 1024} KiB shared"
            )


if __name__ == "__main__":
    main()
