from __future__ import annotations

import pytest
import torch
from random_24 import apply_mask, random_weight, raw_bits
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsert.errors import InputError, SparsityError, UnsupportedError
from sparsert.formats import from_cutlass, pack_reference, to_cutlass, unpack_reference

SHAPES = [(32, 64), (64, 128), (96, 576), (128, 320), (32, 96), (64, 32)]  # the last two end inside one of our units


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_to_torch(shape: tuple[int, int], exact: bool, dtype: torch.dtype) -> None:
    weight = apply_mask(*random_weight(*shape, dtype, exact=exact))
    expected_packed, expected_meta = sparse_semi_structured_from_dense_cutlass(weight)
    packed, meta = to_cutlass(pack_reference(weight))
    assert meta.dtype == torch.int16 and meta.shape == expected_meta.shape
    assert torch.equal(meta, expected_meta)
    assert torch.equal(raw_bits(packed), raw_bits(expected_packed))
    assert packed.is_contiguous() and meta.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_ours_and_we_read_torchs(shape: tuple[int, int]) -> None:
    weight = apply_mask(*random_weight(*shape, torch.float16))
    ours = pack_reference(weight)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*to_cutlass(ours)), weight)
    back = from_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(raw_bits(back.values), raw_bits(ours.values))
    assert torch.equal(back.metadata, ours.metadata)
    assert torch.equal(unpack_reference(back), weight)


def test_nan_payloads_survive() -> None:
    """Every bit pattern of a kept value comes back, though torch's own copies may rewrite NaN."""
    mask = torch.tensor([True, False, False, True]).repeat(64, 32)
    _, meta = to_cutlass(pack_reference(torch.ones(64, 128, dtype=torch.bfloat16), mask))
    bits = torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16)
    packed, _ = to_cutlass(from_cutlass(bits.view(torch.bfloat16), meta))
    assert torch.equal(raw_bits(packed), bits)


def test_float32_is_another_sparsity_in_torch() -> None:
    packed = pack_reference(torch.zeros(32, 64))
    with pytest.raises(UnsupportedError, match=r"layer\.weight: .*float32 as 1:2.* convert the weight to bfloat16"):
        to_cutlass(packed, "layer.weight")
    with pytest.raises(UnsupportedError, match="1:2"):
        from_cutlass(torch.zeros(32, 32), torch.zeros(32, 4, dtype=torch.int16))


@pytest.mark.parametrize("shape", [(16, 64), (32, 68), (33, 64)])
def test_dimensions_must_be_whole_tiles(shape: tuple[int, int]) -> None:
    packed = pack_reference(torch.zeros(shape, dtype=torch.float16))
    with pytest.raises(InputError, match=rf"got \[{shape[0]}, {shape[1]}\]; .* divisible by 32"):
        to_cutlass(packed)


def test_parts_that_do_not_fit_each_other() -> None:
    packed, meta = to_cutlass(pack_reference(torch.zeros(32, 64, dtype=torch.float16)))
    with pytest.raises(InputError, match=r"got meta \(32, 2\), need \(32, 4\) for packed \(32, 32\)"):
        from_cutlass(packed, meta[:, :2])
    with pytest.raises(InputError, match=r"meta torch.int32"):
        from_cutlass(packed, meta.int())


def test_damaged_metadata_is_refused() -> None:
    packed, meta = to_cutlass(pack_reference(torch.zeros(32, 64, dtype=torch.float16)))
    meta[5, 1] = 0
    with pytest.raises(SparsityError, match=r"q_proj: 4 groups hold no legal 2:4 nibble"):
        from_cutlass(packed, meta, "q_proj")
