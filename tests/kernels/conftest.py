"""Triton kernels run natively where there is a GPU and in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is imported, so it must be set before
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "triton.language" in sys.modules and os.environ["TRITON_INTERPRET"] == "1":
        from triton.language import zeros
        from triton.runtime import JITFunction

        if isinstance(zeros, JITFunction):
            raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set; set it when you start pytest")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
