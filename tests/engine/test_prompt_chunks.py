"""Prompts packed and cut into chunks, as plain numbers."""

from __future__ import annotations

import random

import pytest
import torch

from sparsert.engine.prompt_chunks import cut_prompts

CPU = torch.device("cpu")


def test_one_chunk_holds_all_texts() -> None:
    (chunk,) = cut_prompts([[5, 6, 7], [8], [9, 10]], 6, CPU)
    assert chunk.tokens.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert chunk.rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert chunk.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert chunk.ends.tolist() == [[2, 3, 5]]
    assert (chunk.first_row, chunk.past) == (0, 0)
    assert chunk.texts.query_lengths == chunk.texts.key_lengths == (3, 1, 2)
    assert chunk.texts.query_starts.tolist() == chunk.texts.key_starts.tolist() == [0, 3, 4, 6]
    assert chunk.texts.query_starts.dtype == torch.int32 and chunk.texts.key_starts.is_contiguous()


def test_a_text_goes_on_in_the_next_chunks() -> None:
    first, second, third = cut_prompts([[1], [2] * 8, [3, 4]], 4, CPU)
    assert first.texts.query_lengths == first.texts.key_lengths == (1, 3) and first.ends.tolist() == [[0]]
    assert (second.first_row, second.past) == (1, 3) and second.ends.shape == (1, 0)
    assert second.positions.tolist() == [3, 4, 5, 6]
    assert second.texts.query_lengths == (4,) and second.texts.key_lengths == (7,)
    assert (third.first_row, third.past) == (1, 7) and third.ends.tolist() == [[0, 2]]
    assert third.texts.query_lengths == (1, 2) and third.texts.key_lengths == (8, 2)
    assert third.texts.query_starts.tolist() == [0, 1, 3] and third.texts.key_starts.tolist() == [0, 8, 10]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_read_once_and_in_order(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(1, 40))] for _ in range(draw.randint(1, 16))]
    size = draw.randint(1, 60)
    chunks = cut_prompts(prompts, size, CPU)
    total = sum(map(len, prompts))
    assert [chunk.tokens.shape[1] for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert sum(chunk.tokens.shape[1] for chunk in chunks) == total, "no pads"
    read: list[list[int]] = [[] for _ in prompts]
    ended: list[int] = []
    for chunk in chunks:
        tokens, rows = chunk.tokens[0].tolist(), chunk.rows.tolist()
        assert chunk.past == len(read[chunk.first_row]), "earlier tokens of the first text"
        for token, row, position in zip(tokens, rows, chunk.positions.tolist(), strict=True):
            assert position == len(read[row])
            read[row].append(token)
        inside = sorted(set(rows))
        assert chunk.first_row == inside[0]
        assert chunk.texts.query_lengths == tuple(rows.count(row) for row in inside)
        assert chunk.texts.key_lengths == tuple(len(read[row]) for row in inside)
        ended += [rows[place] for place in chunk.ends[0].tolist()]
        for place in chunk.ends[0].tolist():
            assert chunk.positions[place] == len(prompts[rows[place]]) - 1
    assert read == prompts and ended == list(range(len(prompts)))
