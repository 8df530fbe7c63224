"""Every Triton kernel compiled ahead of time for sm_80 and sm_90: nothing spills, memory moves by 16 bytes."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# Each module has a function of the same name, which hides it as an attribute of the package.
masked, sums, swiglu = (
    importlib.import_module(f"pnlac_fast.ops.triton.{name}") for name in ("masked", "sums", "swiglu")
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
ACTIVATIONS = ("base", "tuned", "gate", "up", "mid", "grad", "by_gate", "by_up")
POINTERS = {"rows": "*i64", "base_rows": "*i64", "offsets": "*i64", "pieces": "*fp64", "sums": "*fp64"}
POINTERS |= {"counts": "*fp32", "met": "*i32", "table": "*i64"}
# Integers that a real shape makes multiples of 16; Triton takes that from the values of a launch.
MULTIPLES = ("base_stride", "tuned_stride", "gate_stride", "up_stride", "grad_stride", "neurons", "width", "chunk")
REAL = ("decay", "rate", "beta1_rest", "beta2", "beta2_rest", "correction", "eps", "lr", "momentum", "dampening_rest")


def kernels() -> Iterator[tuple[Any, torch.dtype, dict[str, Any], dict[str, Any]]]:
    """Kernel, dtype of the activations or parameters, constants and options, as they are launched."""
    for dtype in NAMES:
        acc = tl.float32 if dtype == torch.bfloat16 else tl.float64
        rows, neurons = sums.TILES[dtype]
        tile = {"SUM": acc, "SPAN": sums.SHORT_SUM * rows, "BLOCK_M": rows, "BLOCK_N": neurons}
        options = {"num_warps": sums.WARPS, "maxnreg": sums.REGISTERS, "enable_fp_fusion": True}
        yield sums.sums_kernel, dtype, {"PAIR": True, **tile}, options
        rows, neurons, registers = swiglu.TILES[dtype]
        tile = {"SUM": acc, "SPAN": swiglu.SPAN, "BLOCK_M": rows, "BLOCK_N": neurons}
        options = {"num_warps": swiglu.WARPS, "enable_fp_fusion": False}
        # GELU has all of what SiLU has, and more.
        how = {"GELU": True, "REAL": tl.float64 if dtype == torch.float64 else tl.float32}
        yield swiglu.forward_kernel, dtype, {**how, "BLOCK": swiglu.BLOCK}, options
        yield swiglu.backward_kernel, dtype, {**how, "BLOCK": swiglu.BLOCK}, options
        yield swiglu.contrast_kernel, dtype, {**how, **tile}, {**options, "maxnreg": registers}
    plain = {"num_warps": 4, "enable_fp_fusion": False}
    yield sums.merge_kernel, torch.float64, {"BLOCK": sums.MERGE_BLOCK}, plain
    yield swiglu.merge_kernel, torch.float64, {"BLOCK": swiglu.MERGE_BLOCK}, plain
    for param, moment in ((torch.float32, tl.float32), (torch.bfloat16, tl.float32), (torch.bfloat16, tl.bfloat16)):
        kind = {"PARAM": masked.TYPES[param], "FIRST_MOMENT": moment, "ALIGNED": True, "BLOCK": masked.BLOCK}
        yield masked.adamw_kernel, param, {**kind, "SECOND": moment}, plain
        yield masked.sgd_kernel, param, {**kind, "MOMENTUM": True, "FIRST": False, "NESTEROV": True}, plain


def name_of(case: Any) -> str:
    if isinstance(case, tuple):
        kernel, dtype, constants, _ = case
        kind = "-".join(str(constants[key]) for key in ("PAIR", "GELU", "FIRST_MOMENT") if key in constants)
        return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}-{NAMES[dtype]}-{kind}"
    return str(case)


def argument(name: str, dtype: torch.dtype, kernel: Any, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    # The row list of the contrast sums is a pointer, the number of rows of swiglu_contrast is not.
    if name == "rows" and kernel is swiglu.contrast_kernel:
        return "i32"
    if name in ACTIVATIONS:
        return f"*{NAMES[dtype]}"
    return POINTERS.get(name) or ("fp32" if name in REAL or name == "weight_decay" else "i32")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", [*kernels()], ids=name_of)
def test_compiles_without_spills_and_moves_sixteen_bytes(
    case: tuple[Any, ...], architecture: int, tmp_path: Path
) -> None:
    kernel, dtype, constants, options = case
    signature = {name: argument(name, dtype, kernel, constants) for name in kernel.arg_names}
    aligned = [i for i, (n, kind) in enumerate(signature.items()) if kind.startswith("*") or n in MULTIPLES]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(what: str) -> str:
        return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    assert "STACK:0" in usage, usage
    assert "LOCAL:0" in usage, usage
    code = dump("-sass")
    assert "LDG.E.128" in code or kernel is sums.merge_kernel or kernel is swiglu.merge_kernel
    if kernel in (swiglu.forward_kernel, swiglu.backward_kernel, masked.adamw_kernel, masked.sgd_kernel):
        assert "STG.E.128" in code
        narrow = [line for line in code.splitlines() if "STG" in line and "STG.E.128" not in line]
        assert not narrow, narrow
