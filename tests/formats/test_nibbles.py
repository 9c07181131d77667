from __future__ import annotations

import itertools

import pytest
import torch
from random_24 import random_mask

from sparsert.errors import InputError, SparsityError
from sparsert.formats import mask_to_nibbles, nibbles_to_mask
from sparsert.formats.nibbles import MASK_OF_NIBBLE, NIBBLE_OF_MASK

# the table of the PTX page, by hand: kept positions -> i0 | i1 << 2
SIX_PATTERNS = {
    (0, 1): 0b0100, (0, 2): 0b1000, (0, 3): 0b1100,
    (1, 2): 0b1001, (1, 3): 0b1101, (2, 3): 0b1110,
}  # fmt: skip
# torch.sparse's choice for groups with fewer than two kept values
PADDED_PATTERNS = {(): 0b1110, (0,): 0b1000, (1,): 0b1001, (2,): 0b1110, (3,): 0b1110}


def mask_of(positions: tuple[int, ...]) -> list[bool]:
    return [position in positions for position in range(4)]


@pytest.mark.parametrize(("positions", "nibble"), [*SIX_PATTERNS.items(), *PADDED_PATTERNS.items()])
def test_every_pattern_has_its_nibble(positions: tuple[int, ...], nibble: int) -> None:
    nibbles = mask_to_nibbles(torch.tensor([mask_of(positions)]))
    assert nibbles.dtype == torch.uint8
    assert nibbles.tolist() == [[nibble]]
    # the nibble names the kept positions, and two of them
    named = nibbles_to_mask(nibbles)[0].tolist()
    assert sum(named) == 2
    assert all(named[position] for position in positions)


def test_tables_are_inverse() -> None:
    for positions, nibble in SIX_PATTERNS.items():
        bits = sum(1 << position for position in positions)
        assert (NIBBLE_OF_MASK[bits], MASK_OF_NIBBLE[nibble]) == (nibble, bits)
    assert sum(nibble == 0 for nibble in NIBBLE_OF_MASK) == 5  # the masks with three or four bits
    assert sum(bits != 0 for bits in MASK_OF_NIBBLE) == 6


@pytest.mark.parametrize("shape", [(1, 4), (17, 100), (33, 576), (40, 1028)])
def test_round_trip_of_exact_masks(shape: tuple[int, int]) -> None:
    mask = random_mask(*shape, exact=True)
    nibbles = mask_to_nibbles(mask)
    assert nibbles.shape == (shape[0], shape[1] // 4)
    assert torch.equal(nibbles_to_mask(nibbles), mask)


@pytest.mark.parametrize("shape", [(1, 4), (17, 100), (33, 576)])
def test_padding_only_adds_positions(shape: tuple[int, int]) -> None:
    mask = random_mask(*shape)
    padded = nibbles_to_mask(mask_to_nibbles(mask))
    assert bool((padded | ~mask).all())
    assert bool((padded.view(-1, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_any_mask_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 3, 0, 1]]).to(dtype)
    assert mask_to_nibbles(mask).tolist() == [[0b1101]]


def test_strided_mask() -> None:
    mask = random_mask(24, 16, exact=True)
    assert torch.equal(mask_to_nibbles(mask.t().contiguous().t()), mask_to_nibbles(mask))


@pytest.mark.parametrize("kept", [*itertools.combinations(range(4), 3), (0, 1, 2, 3)])
def test_three_or_more_is_an_error_with_its_place(kept: tuple[int, ...]) -> None:
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[3, 4:8] = torch.tensor(mask_of(kept))
    mask[4, 0:4] = True
    with pytest.raises(SparsityError) as caught:
        mask_to_nibbles(mask, "layers.3.mlp.up_proj.weight")
    message = str(caught.value)
    assert message.startswith("layers.3.mlp.up_proj.weight: 2 of 15 groups keep more than 2 of 4 values")
    assert "row 3, columns 4-7" in message
    assert "sparsert inspect" in message and "sparsert prune" in message


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 6), "input width 6 is no multiple of 4"), ((8,), "(8,)"), ((0, 4), "(0, 4)"), ((2, 4, 4), "(2, 4, 4)")],
)
def test_shapes_that_cannot_be_24(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError) as caught:
        mask_to_nibbles(torch.zeros(shape), "some.weight")
    assert "some.weight" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("illegal", [0, 1, 5, 6, 7, 10, 11, 15, 0x14, 0xE4])
def test_illegal_nibbles_are_refused_with_their_place(illegal: int) -> None:
    nibbles = torch.full((3, 5), 0xE, dtype=torch.uint8)
    nibbles[1, 4] = illegal
    with pytest.raises(SparsityError, match=rf"up_proj: 1 groups hold no legal .* row 1, group 4 \(value {illegal}\)"):
        nibbles_to_mask(nibbles, "up_proj")
