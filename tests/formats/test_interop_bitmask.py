from __future__ import annotations

import numpy as np
import pytest
import torch
from random_24 import apply_mask, random_weight, raw_bits
from torch import Tensor

from sparsert.errors import InputError, SparsityError
from sparsert.formats import (
    from_bitmask,
    mask_to_nibbles,
    nibbles_to_mask,
    pack_reference,
    to_bitmask,
    unpack_reference,
)

SHAPES = [(1, 4), (1, 8), (17, 100), (33, 576), (40, 1028)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def written_by_compressed_tensors(weight: Tensor) -> dict[str, Tensor]:
    """The format from its definition: top two of every group by magnitude, numpy's little-endian packbits."""
    rows, columns = weight.shape
    largest = weight.float().abs().view(rows, -1, 4).topk(2, dim=-1).indices
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, largest, True).view(rows, columns)
    bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    return {
        "compressed": weight[mask].view(rows, columns // 2),
        "bitmask": torch.from_numpy(bits),
        "shape": torch.tensor([[rows], [columns]]),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_writer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = random_weight(*shape, dtype)
    tensors = to_bitmask(pack_reference(weight, mask))
    stored = nibbles_to_mask(mask_to_nibbles(mask))  # two positions in every group
    assert list(tensors) == ["compressed", "bitmask", "shape"]
    assert tensors["compressed"].shape == (shape[0], shape[1] // 2)
    assert torch.equal(raw_bits(tensors["compressed"].flatten()), raw_bits(apply_mask(weight, mask)[stored]))
    expected_bits = np.packbits(stored.numpy(), axis=-1, bitorder="little")
    assert tensors["bitmask"].dtype == torch.uint8
    assert np.array_equal(tensors["bitmask"].numpy(), expected_bits)
    assert tensors["shape"].dtype == torch.int64 and tensors["shape"].tolist() == [[shape[0]], [shape[1]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reader_takes_foreign_files_and_gives_them_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = apply_mask(*random_weight(*shape, dtype))  # groups with zeros: the foreign writer picks any two positions
    tensors = written_by_compressed_tensors(weight)
    packed = from_bitmask(**tensors)
    assert torch.equal(raw_bits(unpack_reference(packed)), raw_bits(weight))
    again = to_bitmask(packed)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_the_packed_form(shape: tuple[int, int]) -> None:
    packed = pack_reference(*random_weight(*shape, torch.float16))
    back = from_bitmask(**to_bitmask(packed))
    assert torch.equal(raw_bits(back.values), raw_bits(packed.values))
    assert torch.equal(back.metadata, packed.metadata)


def test_one_byte_by_hand() -> None:
    packed = pack_reference(torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]]))
    assert to_bitmask(packed)["bitmask"].tolist() == [[0b0110_1001]]
    assert to_bitmask(packed)["compressed"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_shape_may_be_a_tuple_or_flat() -> None:
    tensors = to_bitmask(pack_reference(torch.zeros(4, 8)))
    for shape in ((4, 8), torch.tensor([4, 8]), torch.Size([4, 8])):
        assert from_bitmask(tensors["compressed"], tensors["bitmask"], shape).in_features == 8


@pytest.mark.parametrize(("byte", "bits"), [(0b0011_0111, 3), (0b0011_0000, 0), (0b0011_1111, 4), (0b0011_1000, 1)])
def test_a_group_without_exactly_two_bits_is_refused(byte: int, bits: int) -> None:
    tensors = to_bitmask(pack_reference(torch.zeros(6, 20)))
    tensors["bitmask"][4, 1] = byte
    with pytest.raises(SparsityError) as caught:
        from_bitmask(**tensors, name="layers.2.mlp.down_proj")
    message = str(caught.value)
    assert message.startswith("layers.2.mlp.down_proj: 1 groups of the bitmask do not have exactly 2 of 4 bits")
    assert f"row 4, columns 8-11 ({bits} bits)" in message


def test_bits_past_the_last_column_are_refused() -> None:
    tensors = to_bitmask(pack_reference(torch.zeros(6, 20)))
    tensors["bitmask"][3, 2] |= 0x30
    with pytest.raises(SparsityError, match=r"row 3 of the bitmask has bits past its 20 columns"):
        from_bitmask(**tensors)


def test_tensors_that_do_not_fit() -> None:
    tensors = to_bitmask(pack_reference(torch.zeros(6, 20)))
    compressed, bitmask = tensors["compressed"], tensors["bitmask"]
    with pytest.raises(InputError, match=r"w: got compressed \(6, 10\) and bitmask \(6, 3\), need \(6, 12\) and"):
        from_bitmask(compressed, bitmask, (6, 24), "w")
    with pytest.raises(InputError, match="width 21 is no multiple of 4"):
        from_bitmask(compressed, bitmask, (6, 21))
    with pytest.raises(InputError, match=r"got shape \[6\]"):
        from_bitmask(compressed, bitmask, (6,))
    with pytest.raises(InputError, match=r"torch\.float8_e4m3fn"):
        from_bitmask(compressed.to(torch.float8_e4m3fn), bitmask, (6, 20))
    with pytest.raises(InputError, match=r"bitmask torch\.int16"):
        from_bitmask(compressed, bitmask.short(), (6, 20))
