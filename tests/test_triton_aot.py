"""Builds for sm_90 without a GPU of what the Triton engine would launch there: no spills, tensor
cores, hardware sines.

`python -m tests.test_triton_aot` prints the table of registers.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kart.kernels import triton as engine

triton = pytest.importorskip("triton")

KERNELS = ("forward", "query_gradient", "key_gradient")


class Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self, name: str, launches: list[tuple[str, dict[str, Any]]]) -> None:
        self.name = name
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **arguments: self.launches.append((self.name, arguments))


def launches(q, k, coefs, mask, family, choose=engine.tiles) -> list[tuple[str, dict[str, Any]]]:
    """`(kernel, arguments)` of each launch of a forward and a backward of CPU tensors."""
    from kart.kernels.triton import device

    recorded: list[tuple[str, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        # past the check that CPU tensors are for the interpreter
        patch.setattr(triton.knobs.runtime, "interpret", True)
        for name in KERNELS:
            patch.setattr(device, name, Recorder(name, recorded))
        dy = engine.forward(q, k, coefs, mask, 0.125, family, choose=choose)
        engine.backward(dy, q, k, coefs, mask, 0.125, family, choose=choose)
    return recorded


def compiled(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Registers, stack bytes (spills) and machine instructions of one launch built for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kart.kernels.triton import device

    arguments = arguments | {"FAST": True}
    kernel = getattr(device, name)
    options = {x: arguments.pop(x) for x in ("num_warps", "num_stages", "enable_fp_fusion")}
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types |= {torch.uint8: "*u8"}
    signature, constants, attributes = {}, {}, {}
    # what `kernel[grid](...)` makes of its arguments: 1 and None are built in, 16 divides
    for i, (argument, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[argument]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[argument], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = types[value.dtype] if torch.is_tensor(value) else "i32"
            if torch.is_tensor(value) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    build = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(build.asm["cubin"])
        command = [str(tool), "-res-usage", "-sass", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)"
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),
        "shared": build.metadata.shared,
        "instructions": re.findall(line, text, re.MULTILINE),
    }


def inputs(dtype, basis, batch=128, rank=12, tokens=197, width=64, shared=True, masked=None):
    """Of the engine, strided like q and k out of one qkv projection; memory is never touched."""
    heads = 3
    qkv = torch.empty(1, dtype=dtype).expand(batch, tokens, 3, heads, width)
    qkv = torch.empty_strided(
        qkv.shape,
        (tokens * 3 * heads * width, 3 * heads * width, heads * width, width, 1),
        dtype=dtype,
    )
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    count = basis.size + (basis.options["base"] != "zero")
    coefs = torch.empty(1 if shared else batch, heads, rank, tokens, count)
    return q, k, coefs, masked, engine.family(basis)
