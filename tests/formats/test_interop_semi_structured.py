from __future__ import annotations

import warnings

import pytest
import torch
from random_24 import apply_mask, random_weight, raw_bits
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsert.errors import InputError, UnsupportedError
from sparsert.formats import from_semi_structured, pack_reference, to_semi_structured, unpack_reference


def cutlass_tensor(weight: Tensor) -> SparseSemiStructuredTensorCUTLASS:
    """What torch makes of a weight, without its check for a GPU."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the prototype
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)


@pytest.mark.parametrize("shape", [(32, 64), (96, 576)])
def test_reads_torchs_cutlass_tensors(shape: tuple[int, int]) -> None:
    weight = apply_mask(*random_weight(*shape, torch.bfloat16))
    packed, expected = from_semi_structured(cutlass_tensor(weight)), pack_reference(weight)
    assert torch.equal(raw_bits(packed.values), raw_bits(expected.values))
    assert torch.equal(packed.metadata, expected.metadata)


def test_refuses_dense_and_transposed_tensors() -> None:
    weight = apply_mask(*random_weight(32, 64, torch.float16))
    with pytest.raises(InputError, match=r"up_proj: got Tensor, need a torch\.sparse"):
        from_semi_structured(weight, "up_proj")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is transposed"):
        from_semi_structured(cutlass_tensor(weight).t())


def test_unknown_backend_and_no_gpu() -> None:
    packed = pack_reference(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(UnsupportedError, match=r"backend 'marlin' is unknown; .* 'cutlass' and 'cusparselt'"):
        to_semi_structured(packed, "marlin")
    for backend in ("cutlass", "cusparselt"):
        with pytest.raises(UnsupportedError, match=r"down: torch\.sparse runs .* on CUDA only and this one is on cpu"):
            to_semi_structured(packed, backend, "down")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 128), (96, 576)])
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_both_backends_on_a_gpu(backend: str, shape: tuple[int, int]) -> None:
    weight = apply_mask(*random_weight(*shape, torch.float16, device="cuda"))
    packed = pack_reference(weight)
    major = torch.cuda.get_device_capability()[0]
    if backend == "cutlass" and major != 8:
        with pytest.raises(UnsupportedError, match=rf"capability 8\.x only and this GPU has {major}\."):
            to_semi_structured(packed, backend)
        return
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        with pytest.raises(UnsupportedError, match="without cuSPARSELt"):
            to_semi_structured(packed, backend)
        return
    tensor = to_semi_structured(packed, backend)
    x = torch.randn(16, shape[1], dtype=torch.float16, device="cuda")
    expected = x.double() @ weight.double().t()
    assert float((torch.nn.functional.linear(x, tensor).double() - expected).abs().max()) < 0.05
    back = from_semi_structured(tensor)
    assert torch.equal(unpack_reference(back), weight)
    assert torch.equal(back.metadata, packed.metadata)


@pytest.mark.gpu
def test_shapes_that_torch_cannot_take() -> None:
    packed = pack_reference(torch.zeros(17, 100, dtype=torch.float16, device="cuda"))
    with pytest.raises(UnsupportedError, match=r"outputs divisible by 16 and inputs by 16, got \[17, 100\]"):
        to_semi_structured(packed, "cusparselt")
