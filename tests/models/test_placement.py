"""Device and dtype names."""

from __future__ import annotations

import pytest
import torch

from sparsert.errors import InputError, UnsupportedError
from sparsert.models import resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="'gpu' is no device name; give cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(UnsupportedError, match="meta cannot be used; supported: cpu, cuda"):
        resolve_device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message without a GPU")
def test_no_gpu_says_use_cpu() -> None:
    with pytest.raises(UnsupportedError, match=r"no CUDA GPU.*--device cpu"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_a_gpu_that_is_not_there() -> None:
    assert resolve_device("cuda").index is not None
    with pytest.raises(UnsupportedError, match=r"cuda:99: there are \d+ GPUs, numbered from 0"):
        resolve_device("cuda:99")


def test_dtypes() -> None:
    cuda = torch.device("cuda", 0)
    assert resolve_dtype(None, CPU, torch.bfloat16) == torch.float32
    assert resolve_dtype(None, cuda, torch.float32) == torch.bfloat16
    assert resolve_dtype(None, cuda, torch.float16) == torch.float16
    assert resolve_dtype("float16", CPU, torch.float32) == torch.float16
    assert resolve_dtype(torch.bfloat16, CPU, torch.float32) == torch.bfloat16
    with pytest.raises(UnsupportedError, match="dtype int8 cannot be run; supported: bfloat16, float16, float32"):
        resolve_dtype("int8", CPU, torch.float32)
