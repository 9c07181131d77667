from __future__ import annotations

import numpy as np
import pytest
import torch
from random_24 import apply_mask, random_mask, random_weight

from sparsert.errors import InputError, SparsityError
from sparsert.formats import (
    mask_from_maskllm_bits,
    mask_to_nibbles,
    maskllm_bits,
    nibbles_from_maskllm_bits,
    pack_nibbles,
    pack_reference,
)

SHAPES = [(1, 4), (3, 4), (17, 100), (33, 576), (5, 12)]  # some with half a byte left


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_numpy(shape: tuple[int, int]) -> None:
    mask = random_mask(*shape)
    bits = maskllm_bits(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy()))
    assert torch.equal(mask_from_maskllm_bits(bits, shape), mask)
    assert torch.equal(mask_from_maskllm_bits(np.packbits(mask.numpy()), shape), mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [True, False])
def test_nibbles_without_the_mask(shape: tuple[int, int], exact: bool) -> None:
    mask = random_mask(*shape, exact=exact)
    assert torch.equal(nibbles_from_maskllm_bits(np.packbits(mask.numpy()), shape), mask_to_nibbles(mask))


def test_every_byte() -> None:
    """All 256 bytes: legal ones give the nibbles of the mask, the others name their group."""
    for byte in range(256):
        bits = torch.tensor([byte], dtype=torch.uint8)
        mask = mask_from_maskllm_bits(bits, (1, 8))
        assert mask.int().tolist() == [[int(digit) for digit in f"{byte:08b}"]]
        kept = mask.view(2, 4).sum(-1)
        if int(kept.max()) <= 2:
            assert torch.equal(nibbles_from_maskllm_bits(bits, (1, 8)), mask_to_nibbles(mask))
        else:
            first = 0 if int(kept[0]) > 2 else 4
            with pytest.raises(SparsityError, match=rf"row 0, columns {first}-{first + 3}"):
                nibbles_from_maskllm_bits(bits, (1, 8))


def test_pack_from_bits_alone() -> None:
    weight, mask = random_weight(24, 68, torch.bfloat16, exact=True)
    packed = pack_nibbles(weight, nibbles_from_maskllm_bits(maskllm_bits(mask), weight.shape))
    expected = pack_reference(apply_mask(weight, mask))
    assert torch.equal(packed.values, expected.values) and torch.equal(packed.metadata, expected.metadata)


def test_read_only_arrays() -> None:
    bits = np.packbits(np.array([1, 0, 0, 1], dtype=bool))
    bits.flags.writeable = False
    assert mask_from_maskllm_bits(bits, (1, 4)).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("read", [mask_from_maskllm_bits, nibbles_from_maskllm_bits])
def test_wrong_lengths_and_dtypes(read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        read(torch.zeros(7, dtype=torch.uint8), (8, 8), "model.layers.0.mlp.up_proj.weight")
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight: got mask bits (7,) torch.uint8" in message
    assert "a weight (8, 8) needs a uint8 vector of 8 bytes" in message
    with pytest.raises(InputError, match=r"torch\.int64"):
        read(torch.zeros(8, dtype=torch.int64), (8, 8))
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        read(torch.zeros(2, 4, dtype=torch.uint8), (8, 8))


def test_three_kept_values() -> None:
    mask = random_mask(6, 20)
    mask[4, 8:11] = True
    with pytest.raises(SparsityError, match=r"gate: 1 of 30 groups keep more than 2 of 4 values, the first in row 4"):
        nibbles_from_maskllm_bits(maskllm_bits(mask), (6, 20), "gate")
