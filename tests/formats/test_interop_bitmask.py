from __future__ import annotations

import numpy as np
import pytest
import torch
from random_24 import apply_mask, random_weight, raw_bits
from torch import Tensor

from sparsert.errors import InputError, SparsityError
from sparsert.formats import (
    bitmask_columns,
    bitmask_from_dense,
    dense_from_bitmask,
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
    with pytest.raises(InputError, match=r"w: got compressed \(6, 10\) and bitmask \(6, 3\) .*, need \(6, 12\) and"):
        from_bitmask(compressed, bitmask, (6, 24), "w")
    with pytest.raises(InputError, match="width 21 is no multiple of 4"):
        from_bitmask(compressed, bitmask, (6, 21))
    with pytest.raises(InputError, match=r"got shape \[6\]"):
        from_bitmask(compressed, bitmask, (6,))
    with pytest.raises(InputError, match=r"torch\.float8_e4m3fn"):
        from_bitmask(compressed.to(torch.float8_e4m3fn), bitmask, (6, 20))
    with pytest.raises(InputError, match=r"bitmask \(6, 3\) torch\.int16"):
        from_bitmask(compressed, bitmask.short(), (6, 20))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weights_without_packing_them(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsert.formats.bitmask._SLICE_VALUES", 1000)  # several slices, the last one short
    wide = apply_mask(*random_weight(*shape, torch.float32))
    weight = wide.to(dtype)
    tensors = bitmask_from_dense(weight)
    again = dense_from_bitmask(**tensors)
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    if dtype in DTYPES:
        packed = to_bitmask(pack_reference(weight))
        assert all(torch.equal(tensors[key], packed[key]) for key in packed)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_weight_of_a_foreign_file(shape: tuple[int, int]) -> None:
    weight = apply_mask(*random_weight(*shape, torch.bfloat16))
    assert torch.equal(raw_bits(dense_from_bitmask(**written_by_compressed_tensors(weight))), raw_bits(weight))


def test_what_happens_to_nan_and_negative_zero() -> None:
    payload = torch.tensor([0x7FC1, -0x0003, 0x7F81], dtype=torch.int16).view(torch.bfloat16)  # three different NaNs
    weight = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight.view(torch.int16)[0, :3] = torch.tensor([0, 0, 0], dtype=torch.int16)
    weight.view(torch.int16)[0, 1] = payload.view(torch.int16)[0]
    weight.view(torch.int16)[0, 3] = payload.view(torch.int16)[1]
    weight.view(torch.int16)[1, 4] = payload.view(torch.int16)[2]
    expected = weight.clone()
    weight[1, 0] = weight[1, 7] = -0.0
    for back in (dense_from_bitmask(**bitmask_from_dense(weight)), unpack_reference(pack_reference(weight))):
        assert torch.equal(raw_bits(back), raw_bits(expected)), "payloads survive, -0.0 is a zero"


def test_dense_weights_that_are_not_2_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsert.formats.bitmask._SLICE_VALUES", 40)
    weight = torch.zeros(9, 20)
    weight[5, 8:11] = weight[7, 0:4] = 1.0
    with pytest.raises(
        SparsityError, match=r"w: 2 of 45 groups keep more than 2 of 4 values, the first in row 5, colu"
    ):
        bitmask_from_dense(weight, "w")
    with pytest.raises(InputError, match="width 18 is no multiple of 4"):
        bitmask_from_dense(torch.zeros(3, 18))
    with pytest.raises(InputError, match="of another format"):
        dense_from_bitmask(torch.zeros(3, 8), torch.zeros(3, 3, dtype=torch.uint8), (3, 16))


@pytest.mark.parametrize("columns", [8, 36, 72, 140])
@pytest.mark.parametrize("count", [4, 8, 12, 36])
def test_columns_of_a_bitmask_are_the_bitmask_of_the_columns(columns: int, count: int) -> None:
    weight = apply_mask(*random_weight(5, columns, torch.bfloat16, exact=True))
    whole = bitmask_from_dense(weight)["bitmask"]
    for begin in range(0, columns - count + 1, 4):
        before = whole.clone()
        part = bitmask_columns(whole, begin, count)
        assert torch.equal(part, bitmask_from_dense(weight[:, begin : begin + count].contiguous())["bitmask"])
        part.fill_(0) if begin % 8 else None
        assert torch.equal(whole, before), "a copy shares nothing with the whole"


@pytest.mark.parametrize(("begin", "count"), [(2, 4), (0, 6), (-4, 4), (4, 0), (8, 12), (20, 4)])
def test_columns_that_are_no_groups_or_not_there(begin: int, count: int) -> None:
    with pytest.raises(InputError, match=rf"columns {begin} to {begin + count} of a bitmask of 16 were asked for"):
        bitmask_columns(torch.zeros((3, 2), dtype=torch.uint8), begin, count)
