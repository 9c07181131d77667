"""Windows of text: what is in them, their order, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sparsert.compress.text import TextWindows, tokenize_texts
from sparsert.errors import InputError


class LetterTokenizer:
    """A letter is a token: a = 3, b = 4, ..."""

    eos_token_id, bos_token_id = 2, None

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - ord("a") + 3 for letter in text] for text in texts]}


def test_documents_are_joined_by_the_separator() -> None:
    tokens = tokenize_texts(["abc", "  ", "de", "f"], LetterTokenizer())
    assert tokens.tolist() == [3, 4, 5, 2, 6, 7, 2, 8]
    assert tokens.dtype == torch.int32
    assert tokenize_texts(["abc", "de"], LetterTokenizer(), separator="none").tolist() == [3, 4, 5, 6, 7]
    many = tokenize_texts(["ab"] * 600, LetterTokenizer())  # more than go to the tokenizer at once
    assert many.numel() == 600 * 3 - 1


def test_every_window_once_a_deck_in_an_order_that_depends_on_seed_and_step_alone() -> None:
    windows = TextWindows(torch.arange(1000), 7)
    assert len(windows) == 142
    firsts = [int(row[0]) for step in range(71) for row in windows.batch(step, 4, seed=3)]  # two decks
    assert Counter(firsts) == {start: 2 for start in range(0, 994, 7)}
    assert firsts[:142] != sorted(firsts[:142])
    assert firsts[:142] != firsts[142:]
    again = TextWindows(torch.arange(1000), 7)
    assert torch.equal(again.batch(50, 4, seed=3), windows.batch(50, 4, seed=3))
    assert not torch.equal(again.batch(50, 4, seed=4), windows.batch(50, 4, seed=3))
    # two halves of a step are the step of half the size: gradient accumulation sees the same text
    halves = torch.cat([windows.batch(100, 2, seed=3), windows.batch(101, 2, seed=3)])
    assert torch.equal(halves, windows.batch(50, 4, seed=3))


def test_neighbouring_seeds_share_no_deck() -> None:
    windows = TextWindows(torch.arange(1000), 7)
    assert not torch.equal(windows.batch(71, 4, seed=3), windows.batch(35, 8, seed=4)[:4])


def test_bos_stands_in_front_and_the_text_goes_on_behind_it() -> None:
    windows = TextWindows(torch.arange(10, 30), 5, bos=1)
    assert len(windows) == 5
    assert windows[1].tolist() == [1, 14, 15, 16, 17]
    assert windows[-1].tolist() == [1, 26, 27, 28, 29]
    with pytest.raises(IndexError):
        windows[5]


def test_samples_are_different_windows() -> None:
    windows = TextWindows(torch.arange(400), 8)
    sample = windows.sample(50, seed=1)
    assert sample.shape == (50, 8) and sample.dtype == torch.int64
    assert len(set(sample[:, 0].tolist())) == 50
    with pytest.raises(InputError, match="51 windows of 8 tokens are wanted and the text has 50"):
        windows.sample(51, seed=1)


def test_the_fingerprint_tells_texts_and_windows_apart() -> None:
    prints = [
        TextWindows(torch.arange(100), 8).fingerprint(),
        TextWindows(torch.arange(1, 101), 8).fingerprint(),
        TextWindows(torch.arange(100), 9).fingerprint(),
        TextWindows(torch.arange(100), 8, bos=0).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert prints[0] == TextWindows(torch.arange(100).short(), 8).fingerprint()


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="the text is empty"):
        tokenize_texts(["", " \n"], LetterTokenizer())
    with pytest.raises(InputError, match="separator is 'bos', but this tokenizer has no such token"):
        tokenize_texts(["ab"], LetterTokenizer(), separator="bos")
    with pytest.raises(InputError, match="choose one of eos, bos, none"):
        tokenize_texts(["ab"], LetterTokenizer(), separator="newline")
    with pytest.raises(InputError, match="the text has 7 tokens and one window takes 8"):
        TextWindows(torch.arange(7), 8)
    with pytest.raises(InputError, match="window is 1"):
        TextWindows(torch.arange(7), 1)
    with pytest.raises(InputError, match="need a vector of integers"):
        TextWindows(torch.rand(7), 2)
