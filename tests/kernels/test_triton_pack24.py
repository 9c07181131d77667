from __future__ import annotations

import pytest
import torch
from random_24 import apply_mask, random_weight, raw_bits
from torch import Tensor

from sparsert.formats import Packed24, pack_reference, unpack_reference
from sparsert.formats.nibbles import NIBBLE_OF_MASK

pytest.importorskip("triton")

from sparsert.kernels.fragments24 import NIBBLES_OF_MASKS
from sparsert.kernels.pack24 import NO_GROUP, SUPPORTED_DTYPES, pack24, unpack24

SHAPES = [(1, 4), (16, 64), (17, 100), (33, 576), (40, 1028), (48, 256)]
if torch.cuda.is_available():
    SHAPES += [(4096, 4096), (1000, 4100), (512, 14336)]


def assert_same(values: Tensor, metadata: Tensor, expected: Packed24) -> None:
    assert torch.equal(raw_bits(values), raw_bits(expected.values))
    assert torch.equal(metadata, expected.metadata)


def test_table_is_that_of_formats() -> None:
    table = int(getattr(NIBBLES_OF_MASKS, "value", NIBBLES_OF_MASKS))
    assert tuple(table >> 4 * mask & 0xF for mask in range(16)) == NIBBLE_OF_MASK


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight, mask = random_weight(*shape, dtype, device=device)
    expected = pack_reference(weight, mask)
    for arguments in ((weight, mask), (weight, mask.to(torch.uint8) * 255), (apply_mask(weight, mask),)):
        values, metadata, stats = pack24(*arguments)
        assert_same(values, metadata, expected)
        assert stats.tolist() == [0, NO_GROUP]
    assert torch.equal(raw_bits(unpack24(values, metadata, *shape)), raw_bits(unpack_reference(expected)))


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_exact_masks(dtype: torch.dtype, device: str) -> None:
    weight, mask = random_weight(50, 332, dtype, exact=True, device=device)
    values, metadata, _ = pack24(weight, mask)
    assert_same(values, metadata, pack_reference(weight, mask))


def test_every_mask_of_a_group(device: str) -> None:
    """All sixteen masks in one row; the five illegal ones are counted and the first is named."""
    mask = torch.tensor([[byte >> position & 1 for byte in range(16) for position in range(4)]], device=device) != 0
    weight = torch.arange(1, 65, device=device).half().view(1, 64)
    stats = pack24(weight, mask)[2]
    assert stats.tolist() == [5, 0b0111]
    legal = mask.view(16, 4).sum(-1) <= 2
    mask = (mask.view(16, 4) & legal.unsqueeze(-1)).view(1, 64)
    values, metadata, stats = pack24(weight, mask)
    assert_same(values, metadata, pack_reference(weight, mask))
    assert stats.tolist() == [0, NO_GROUP]


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_count_and_first_place_of_bad_groups(dtype: torch.dtype, device: str) -> None:
    weight = apply_mask(*random_weight(40, 772, dtype, device=device))
    for row, group in ((39, 0), (25, 192), (25, 7), (9, 191)):  # of many row tiles and programs
        weight[row, 4 * group : 4 * group + 3] = 1.0
    count, first = pack24(weight)[2].tolist()
    assert count == 4
    assert divmod(first, 193) == (9, 191)
    weight[:] = 1.0
    assert pack24(weight)[2].tolist() == [40 * 193, 0]


def test_bits_are_moved_not_converted(device: str) -> None:
    """Every 16-bit pattern survives: NaN payloads, infinities, denormals; only -0.0 counts as zero."""
    weight = torch.zeros(256, 512, dtype=torch.int16, device=device)
    weight[:, 1::4] = torch.arange(-(2**15), 2**15, device=device)[: 256 * 128].view(256, 128).to(torch.int16)
    weight[:, 2::4] = torch.arange(2**15, device=device).flip(0).view(256, 128).to(torch.int16)
    values, metadata, _ = pack24(weight.view(torch.bfloat16))
    dense = raw_bits(unpack24(values, metadata, 256, 512))
    assert torch.equal(dense, torch.where(weight == -(2**15), torch.zeros_like(weight), weight))


def test_negative_zero(device: str) -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]], dtype=torch.float16, device=device)
    by_value, by_mask = pack24(weight), pack24(weight, torch.tensor([[True, True, False, False]], device=device))
    assert raw_bits(by_value[0]).flatten()[:2].tolist() == [0x3C00, 0x4000]
    assert raw_bits(by_mask[0]).flatten()[:2].tolist() == [-0x8000, 0x3C00]


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_strided_and_unaligned_weights_and_masks(dtype: torch.dtype, device: str) -> None:
    weight, mask = random_weight(20, 100, dtype, device=device)
    expected = pack_reference(weight, mask)
    aligned = torch.full((20, 160), float("nan"), dtype=dtype, device=device)
    unaligned = torch.full((20, 151), float("nan"), dtype=dtype, device=device)
    aligned[:, 8:108], unaligned[:, 3:103] = weight, weight
    wide_mask = torch.ones(20, 131, dtype=torch.bool, device=device)
    wide_mask[:, 5:105] = mask
    for view in (aligned[:, 8:108], unaligned[:, 3:103], weight.t().contiguous().t()):
        for mask_view in (mask, wide_mask[:, 5:105], mask.t().contiguous().t()):
            values, metadata, _ = pack24(view, mask_view)
            assert_same(values, metadata, expected)


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
def test_unpack_writes_all_of_out_and_nothing_else(dtype: torch.dtype, device: str) -> None:
    weight = apply_mask(*random_weight(19, 92, dtype, device=device))
    packed = pack_reference(weight)
    poisoned = torch.full((21, 92), float("nan"), dtype=dtype, device=device)
    assert unpack24(packed.values, packed.metadata, 19, 92, out=poisoned[1:20]).data_ptr() == poisoned[1].data_ptr()
    assert torch.equal(poisoned[1:20], weight)
    assert bool(poisoned[0].isnan().all()) and bool(poisoned[20].isnan().all())


def test_arguments_that_do_not_fit(device: str) -> None:
    weight = torch.zeros(4, 8, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"got weight \(4, 6\)"):
        pack24(weight[:, :6])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        pack24(weight.double())
    with pytest.raises(ValueError, match=r"got mask \(4, 4\) torch\.bool, need \(4, 8\)"):
        pack24(weight, torch.zeros(4, 4, dtype=torch.bool, device=device))
    values, metadata, _ = pack24(weight)
    with pytest.raises(ValueError, match=r"got out \(8, 4\)"):
        unpack24(values, metadata, 4, 8, out=weight.view(8, 4))


@pytest.mark.gpu
def test_unpack_in_a_cuda_graph() -> None:
    weight = apply_mask(*random_weight(256, 1028, torch.bfloat16, device="cuda"))
    packed = pack_reference(weight)
    unpack24(packed.values, packed.metadata, 256, 1028)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = unpack24(packed.values, packed.metadata, 256, 1028)
    dense.fill_(float("nan"))
    graph.replay()
    assert torch.equal(dense, weight)


@pytest.mark.gpu
def test_packing_does_not_wait_for_the_gpu() -> None:
    weight, mask = random_weight(64, 256, torch.bfloat16, device="cuda")
    pack24(weight, mask)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack24(weight, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
