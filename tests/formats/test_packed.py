from __future__ import annotations

import pytest
import torch
from random_24 import apply_mask, random_mask, random_weight, raw_bits

from sparsert.errors import InputError, SparsityError
from sparsert.formats import (
    Packed24,
    concatenate_outputs,
    mask_to_nibbles,
    nibbles_to_mask,
    pack_nibbles,
    pack_reference,
    packed_kept_values,
    packed_mask,
    packed_nbytes,
    packed_nibbles,
    packed_shapes,
    unpack_reference,
)

SHAPES = [(1, 4), (17, 100), (33, 576), (40, 1028), (16, 256), (32, 64)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_golden_bytes_of_two_groups() -> None:
    """Two groups of one row, worked out by hand from the module's docstring."""
    packed = pack_reference(torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]], dtype=torch.bfloat16))
    values = bytearray(2 * 32 * 8 * 2)  # one row tile, two blocks, 32 lanes of 8 values of 2 bytes
    values[0:4] = b"\x80\x3f\x00\x40"  # lane 0 (g 0, q 0): 1.0, 2.0
    values[16:20] = b"\x40\x40\x80\x40"  # lane 1 (g 0, q 1): 3.0, 4.0
    assert bytes(packed.values.view(torch.uint8).flatten().tolist()) == bytes(values)
    # lane 0: row 0 keeps 0,3 -> C and 1,2 -> 9, then two padded groups; row 8 and all other lanes are padding
    metadata = b"\x9c\xee\xee\xee" + b"\xee\xee\xee\xee" * 31
    assert bytes(packed.metadata.view(torch.uint8).flatten().tolist()) == metadata


def test_golden_places_in_a_left_over_unit() -> None:
    weight = torch.zeros(32, 320, dtype=torch.float16)
    weight[25, 301], weight[25, 303] = 5.0, 6.0
    packed = pack_reference(weight)
    # row 25 = tile 1, row 9 of it (g 1, second row); inputs 300-303 = block 9, group 3 of it: lane 4 + 3, values 2, 3
    expected_values = torch.zeros(2, 10, 32, 8, dtype=torch.float16)
    expected_values[1, 9, 7, 2], expected_values[1, 9, 7, 3] = 5.0, 6.0
    assert torch.equal(packed.values, expected_values)
    # unit 4 of 5 is left over after one chunk: 4 x 32 words, then lane 4 + 2 (inputs 32-47 of the unit), field 7
    words = packed.metadata[1].tolist()
    assert words[128 + 6] & 0xFFFFFFFF == 0xDEEEEEEE
    assert all(word & 0xFFFFFFFF == 0xEEEEEEEE for index, word in enumerate(words) if index != 128 + 6)


def test_golden_place_in_a_chunk() -> None:
    weight = torch.zeros(16, 256, dtype=torch.float32)
    weight[3, 200], weight[3, 201] = 7.0, 8.0
    packed = pack_reference(weight)
    # inputs 200-203 = block 6, group 2: lane 4 * 3 + 2; in unit 3: lane 4 * 3 + 0, field 2, stored [lane][unit]
    assert packed.values[0, 6, 14].tolist() == [7.0, 8.0, 0, 0, 0, 0, 0, 0]
    assert int(packed.metadata[0, 12 * 4 + 3]) & 0xFFFFFFFF == 0xEEEEE4EE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = random_weight(*shape, dtype)
    packed = pack_reference(weight, mask)
    expected = apply_mask(weight, mask)
    assert torch.equal(raw_bits(unpack_reference(packed)), raw_bits(expected))
    assert (packed.out_features, packed.in_features, packed.dtype) == (*shape, dtype)
    assert torch.equal(packed_nibbles(packed), mask_to_nibbles(mask))
    assert torch.equal(packed_mask(packed), nibbles_to_mask(mask_to_nibbles(mask)))
    # the same weight, known by its zeros alone
    again = pack_reference(expected)
    assert torch.equal(raw_bits(again.values), raw_bits(packed.values))
    assert torch.equal(again.metadata, packed.metadata)


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_values_are_in_column_order(shape: tuple[int, int]) -> None:
    weight, mask = random_weight(*shape, torch.float16, exact=True)
    kept = packed_kept_values(pack_reference(weight, mask))
    assert torch.equal(kept, weight[mask].view(shape[0], -1))


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_is_zero_values_and_nibble_e(shape: tuple[int, int]) -> None:
    weight, mask = random_weight(*shape, torch.bfloat16, exact=True)
    packed = pack_reference(weight, mask)
    values_shape, metadata_shape = packed_shapes(*shape)
    # the same bytes, declared to have no padding
    whole = Packed24(packed.values, packed.metadata, values_shape[0] * 16, metadata_shape[1] * 2)
    nibbles, dense = packed_nibbles(whole), unpack_reference(whole)
    nibbles[: shape[0], : shape[1] // 4] = 0xE
    dense[: shape[0], : shape[1]] = 0
    assert bool((nibbles == 0xE).all())
    assert not bool(raw_bits(dense).any())


def test_negative_zero_is_dropped_without_a_mask_and_kept_with_one() -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]], dtype=torch.bfloat16)
    by_value = pack_reference(weight)
    assert raw_bits(packed_kept_values(by_value)).tolist() == [[0x3F80, 0x4000]]
    assert not bool(raw_bits(unpack_reference(by_value))[0, [0, 2]].any())
    by_mask = pack_reference(weight, torch.tensor([[1, 1, 0, 0]]))
    assert raw_bits(packed_kept_values(by_mask)).tolist() == [[-0x8000, 0x3F80]]


def test_spare_slots_hold_positive_zero() -> None:
    weight = torch.full((2, 8), -3.0, dtype=torch.float16)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 1] = True
    kept = packed_kept_values(pack_reference(weight, mask))
    assert raw_bits(kept).count_nonzero() == 1
    assert kept[0, 0] == -3.0  # position 1 pads with position 2, so it is the first of its pair


def test_pack_nibbles_keeps_what_they_name() -> None:
    weight, mask = random_weight(20, 68, torch.float32, exact=True)
    packed = pack_nibbles(weight, mask_to_nibbles(mask))
    assert torch.equal(unpack_reference(packed), apply_mask(weight, mask))


def test_strided_weight() -> None:
    weight, mask = random_weight(40, 72, torch.float16)
    packed = pack_reference(weight.t().contiguous().t(), mask.t().contiguous().t())
    assert torch.equal(packed.values, pack_reference(weight, mask).values)


def test_three_kept_names_tensor_count_and_first_place() -> None:
    weight = apply_mask(*random_weight(20, 32, torch.float16))
    weight[7, 12:16] = 1.0
    weight[19, 28:31] = 1.0
    weight[19, 31] = 0.0
    with pytest.raises(SparsityError) as caught:
        pack_reference(weight, name="model.layers.0.self_attn.q_proj.weight")
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.weight: 2 of 160 groups keep more than 2 of 4 values" in message
    assert "row 7, columns 12-15" in message


def test_bad_arguments() -> None:
    weight = torch.zeros(4, 8, dtype=torch.float16)
    with pytest.raises(InputError, match=r"w: got torch.float64; .* convert the weight first"):
        pack_reference(weight.double(), name="w")
    with pytest.raises(InputError, match=r"w: the mask is \(4, 4\) on cpu, the weight \(4, 8\)"):
        pack_reference(weight, torch.ones(4, 4), name="w")
    with pytest.raises(InputError, match="no multiple of 4"):
        pack_reference(torch.zeros(4, 10), name="w")
    packed = pack_reference(weight)
    with pytest.raises(InputError, match=r"packed weight \[20, 8\]: got values \(1, 2, 32, 8\)"):
        Packed24(packed.values, packed.metadata, 20, 8)
    with pytest.raises(InputError, match=r"got values torch.float64"):
        Packed24(packed.values.double(), packed.metadata, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(dtype: torch.dtype) -> None:
    weight, mask = random_weight(64, 512, dtype)
    packed = pack_reference(weight, mask)
    assert packed.nbytes == packed_nbytes(64, 512, dtype) == 64 * 512 * (dtype.itemsize / 2 + 1 / 8)
    if dtype.itemsize == 2:
        assert packed.nbytes / weight.nbytes == 9 / 16


def test_concatenated_outputs_are_one_weight() -> None:
    parts = [apply_mask(*random_weight(rows, 100, torch.bfloat16)) for rows in (32, 16, 17)]
    joined = concatenate_outputs([pack_reference(part) for part in parts])
    assert (joined.out_features, joined.in_features) == (65, 100)
    assert torch.equal(unpack_reference(joined), torch.cat(parts))


def test_concatenation_refuses_inner_padding_and_other_widths() -> None:
    odd, even = (pack_reference(torch.zeros(rows, 64, dtype=torch.float16)) for rows in (17, 16))
    with pytest.raises(InputError, match="divisible by 16"):
        concatenate_outputs([odd, even])
    with pytest.raises(InputError, match="same in_features"):
        concatenate_outputs([even, pack_reference(torch.zeros(16, 128, dtype=torch.float16))])


def test_masks_survive_a_round_trip_through_the_packed_form() -> None:
    for _ in range(20):
        rows, columns = (int(torch.randint(1, 70, ())), 4 * int(torch.randint(1, 150, ())))
        mask = random_mask(rows, columns, exact=True)
        packed = pack_reference(torch.ones(rows, columns), mask)
        assert torch.equal(packed_mask(packed), mask), (rows, columns)
