"""What a summary says of the kernels of a decode step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsert import ops
from sparsert.engine.step_kernels import attention_kernel
from sparsert.ops import AttentionShape

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_a_cpu_has_no_attention_kernel_and_that_is_no_fallback() -> None:
    assert attention_kernel([AttentionShape(4, 2, 64, 64, 0.125)], CPU, torch.float32) == ("torch", [])
    assert attention_kernel([], CPU, torch.float32) == ("", [])


def test_a_gpu_says_once_what_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if shape.head_dim == 64 else f"heads of {shape.head_dim}"

    monkeypatch.setattr(ops, "explain_attention", explain)
    monkeypatch.setattr(ops, "explain_packed_attention", lambda shape, *_: shape.softcap and "a cap")
    narrow, wide = AttentionShape(4, 2, 64, 64, 0.125), AttentionShape(4, 2, 80, 80, 0.125)
    assert attention_kernel([narrow, narrow], GPU, torch.bfloat16) == ("fused", [])
    said = "decode attention runs on torch's operations: heads of 80"
    windowed = AttentionShape(4, 2, 80, 80, 0.125, sliding_window=100)
    assert attention_kernel([wide, dataclasses.replace(wide, sliding_window=512)], GPU, torch.bfloat16) == (
        "torch",
        [said],
    )
    assert attention_kernel([wide, windowed, wide], GPU, torch.bfloat16) == (
        "torch",
        [
            said,
            "prompts of more than 64 tokens are no CUDA graphs: a text longer than the sliding window of 100 tokens is "
            "attended for alone",
        ],
    )
    assert attention_kernel([narrow, wide], GPU, torch.bfloat16) == ("fused and torch", [said])
    capped = AttentionShape(4, 2, 64, 64, 0.125, softcap=5.0)
    assert attention_kernel([narrow, capped], GPU, torch.bfloat16) == (
        "fused",
        ["attention of prompts runs text by text, and short prompts are no CUDA graphs: a cap"],
    )


def test_float32_on_a_gpu_is_said() -> None:
    name, said = attention_kernel([AttentionShape(4, 2, 64, 64, 0.125)], GPU, torch.float32)
    assert name == "torch" and "computes in bfloat16 and float16, not in torch.float32" in said[0]
    assert said[1] == (
        "attention of prompts runs text by text, and short prompts are no CUDA graphs: flash attention computes in "
        "bfloat16 and float16, not in torch.float32"
    )
