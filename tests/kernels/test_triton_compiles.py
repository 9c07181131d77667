"""The kernels compile to machine code for the GPUs we name, which needs no GPU: the interpreter checks no types."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own, because in this one the kernels may be bound to the interpreter.
PROGRAM = """
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsert.kernels import linear24, masked_weight, pack24, token_loss


def compile_kernel(kernel, pointers, constants, capability, **options):
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return compiled


# everything for the oldest GPU, for Hopper what the compiler makes other instructions of
for dtype, capability, batches in (
    ("bf16", 80, (1, 64, 65)), ("fp16", 80, (16,)), ("fp32", 80, (1,)), ("bf16", 90, (1, 65))
):
    for batch in batches:
        tl_dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
        torch_dtype = next(key for key, value in linear24._TRITON_DTYPES.items() if value == tl_dtype)
        tile = linear24.choose_tile(batch, torch_dtype)
        compiled = compile_kernel(
            linear24._linear24_kernel,
            {"x": "*" + dtype, "values": "*i64", "metadata": "*i32", "bias": "*" + dtype, "y": "*" + dtype},
            dict(
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, IS_SPLIT=False, DTYPE=tl_dtype,
                WIDE=dtype == "fp32", HAS_BIAS=True, EVEN_K=batch != 16, UPCAST=False,
            ),
            capability,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        assert compiled.metadata.shared <= 99 * 1024, compiled.metadata.shared
        assert dtype == "fp32" or "mma" in compiled.asm["ptx"]
capability = 80
for wide in (False, True):
    for has_mask in (False, True):
        compile_kernel(
            pack24._pack24_kernel,
            {"weight": "*i64", "mask": "*i32", "values": "*i64", "metadata": "*i32", "stats": "*i64"},
            dict(BLOCKS=pack24._BLOCKS_PER_PROGRAM, WIDE=wide, HAS_MASK=has_mask),
            capability,
        )
    compile_kernel(
        pack24._unpack24_kernel,
        {"values": "*i64", "metadata": "*i32", "dense": "*i64"},
        dict(BLOCKS=pack24._BLOCKS_PER_PROGRAM, WIDE=wide),
        capability,
    )
for weight, logits in (("*bf16", "*bf16"), ("*bf16", "*fp32"), ("*fp32", "*fp32")):
    for kernel in (masked_weight._masked_weight_kernel, masked_weight._masked_weight_backward_kernel):
        pointers = dict.fromkeys(("weight", "masked", "gradient"), weight)
        pointers |= dict.fromkeys(("logits", "logit_gradient"), logits) | {"controls": "*fp32", "seed": "*i64"}
        compile_kernel(kernel, pointers, dict(BLOCK=masked_weight._GROUPS_PER_PROGRAM), capability)
for dtype in ("*bf16", "*fp32"):
    numbers = ("label_weight", "teacher_weight", "inverse_temperature", "cap", "teacher_cap")
    pointers = dict.fromkeys(("logits", "teacher"), dtype) | {"labels": "*i64", "nll": "*fp32", "kl": "*fp32"}
    flags = dict.fromkeys(("LABELS", "TEACHER", "GRADIENT", "CAP", "TEACHER_CAP"), True)
    compile_kernel(
        token_loss._token_loss_kernel, pointers | dict.fromkeys(numbers, "fp32"),
        dict(BLOCK=token_loss._BLOCK, **flags), capability, num_warps=token_loss._NUM_WARPS,
    )
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "compile_kernels.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    finished = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.strip() == "compiled"
