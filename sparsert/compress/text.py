"""Text as windows of token ids: what calibration, mask learning, distillation and finetuning read.

All documents are tokenised once, joined with a separator token, and cut into windows of equal length that do not
overlap, so there is no padding and every forward has one shape. What it gives up: a window may hold the end of one
document and the start of another, as in pretraining, and the tokens behind the last whole window are left out.

The order is a function of a seed and a step and of nothing else: windows are dealt from one shuffled deck after the
other (each window once per deck), and step N takes places N * size ... N * size + size - 1 of the deal. A run that is
killed and resumed at step N therefore reads what it would have read, without having saved where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsert.errors import InputError

#: What can stand between documents.
SEPARATORS = ("eos", "bos", "none")

#: Documents that a tokenizer is given at once; its threads work on different ones.
_DOCUMENTS_AT_ONCE = 256


def tokenize_texts(texts: Iterable[str], tokenizer: Any, *, separator: str = "eos") -> Tensor:
    """Token ids of documents, one behind the other.

    Args:
        texts: documents; empty ones are passed over.
        tokenizer: a tokenizer of transformers.
        separator: ``eos`` puts the tokenizer's end token behind every document but the last, ``bos`` its first token in
            front of every document, ``none`` nothing.

    Returns:
        int32 ``[tokens]`` on the CPU.

    Raises:
        InputError: unknown separator, a tokenizer without that token, or no text at all.
    """
    if separator not in SEPARATORS:
        raise InputError(f"separator is {separator!r}; choose one of {', '.join(SEPARATORS)}")
    token = None if separator == "none" else getattr(tokenizer, f"{separator}_token_id")
    if separator != "none" and token is None:
        raise InputError(f"separator is {separator!r}, but this tokenizer has no such token; choose 'none'")
    pieces: list[Tensor] = []
    for documents in _chunks((text for text in texts if text.strip()), _DOCUMENTS_AT_ONCE):
        # a tokenizer warns of texts longer than the model's, which is what the windows are for
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
            if separator == "bos" or (separator == "eos" and pieces):
                pieces.append(torch.tensor([token], dtype=torch.int32))
            pieces.append(torch.tensor(ids, dtype=torch.int32))
    if not pieces:
        raise InputError("the text is empty; give a file with some text in it")
    return torch.cat(pieces)


class TextWindows:
    """Windows of equal length over one array of token ids.

    Attributes:
        tokens: int32 ``[tokens]`` on the CPU, the whole text.
        window: tokens of a window, BOS included.
        bos: token id that stands in front of every window, or None.

    Args:
        tokens: one-dimensional integers.
        window: at least 2.
        bos: token id to put in front of every window; Gemma is useless without one.

    Raises:
        InputError: tokens are no vector of integers, or there are fewer than one window needs.

    Example:
        >>> windows = TextWindows(torch.arange(10), 4)
        >>> len(windows), windows[1].tolist()
        (2, [4, 5, 6, 7])
        >>> windows.batch(0, 2, seed=0).shape
        torch.Size([2, 4])
    """

    def __init__(self, tokens: Tensor, window: int, *, bos: int | None = None) -> None:
        if tokens.dim() != 1 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError(f"got tokens {tuple(tokens.shape)} {tokens.dtype}; need a vector of integers")
        if window < 2:
            raise InputError(f"window is {window}; it must be at least 2, for the first token is not predicted")
        self.tokens = tokens.to("cpu", torch.int32)
        self.window = window
        self.bos = bos
        self._stride = window - (bos is not None)
        self._count = self.tokens.numel() // self._stride
        if self._count == 0:
            raise InputError(
                f"the text has {tokens.numel()} tokens and one window takes {self._stride}; give more text, or a "
                "shorter window"
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"TextWindows({self._count} windows of {self.window} tokens, bos={self.bos})"

    def __getitem__(self, index: int) -> Tensor:
        """One window, int64 ``[window]``."""
        if not -self._count <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        return self._gather([index % self._count])[0]

    def batch(self, step: int, size: int, *, seed: int) -> Tensor:
        """The windows of one training step.

        Args:
            step: counted from 0.
            size: windows.
            seed: of the order.

        Returns:
            int64 ``[size, window]`` on the CPU.
        """
        return self._gather([self._dealt(place, seed) for place in range(step * size, (step + 1) * size)])

    def sample(self, count: int, *, seed: int) -> Tensor:
        """Different windows for calibration.

        Returns:
            int64 ``[count, window]`` on the CPU.

        Raises:
            InputError: the text has fewer.
        """
        if not 1 <= count <= self._count:
            raise InputError(
                f"{count} windows of {self.window} tokens are wanted and the text has {self._count}; give more text, "
                "or ask for fewer or shorter ones"
            )
        return self.batch(0, count, seed=seed)

    def fingerprint(self) -> str:
        """Says which text in which windows this is; what was resumed on another would not be the same run."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(f"{self.window} {self.bos}".encode())
        return digest.hexdigest()[:16]

    def _dealt(self, place: int, seed: int) -> int:
        deck, position = divmod(place, self._count)
        return int(self._deck(seed, deck)[position])

    def _deck(self, seed: int, deck: int) -> Tensor:
        """One shuffled order of all windows; the last one is kept, for a step takes many places of the same."""
        kept = getattr(self, "_kept_deck", None)
        if kept is None or kept[0] != (seed, deck):
            generator = torch.Generator().manual_seed(_mixed(seed, deck))
            kept = ((seed, deck), torch.randperm(self._count, generator=generator))
            self._kept_deck = kept
        order: Tensor = kept[1]
        return order

    def _gather(self, indices: Sequence[int]) -> Tensor:
        rows = torch.stack([self.tokens[index * self._stride : (index + 1) * self._stride] for index in indices]).long()
        if self.bos is None:
            return rows
        return torch.cat([torch.full((len(rows), 1), self.bos), rows], dim=1)


def _mixed(seed: int, deck: int) -> int:
    """A seed for each deck; neighbours must not share theirs, as seed + deck would."""
    return int.from_bytes(hashlib.sha256(f"{seed} {deck}".encode()).digest()[:7], "little")


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
