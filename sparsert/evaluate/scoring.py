"""How likely a loaded model finds the tokens of given sequences.

One forward over a batch of sequences, padded behind their ends: attention is causal, so what stands behind a token does
not change its likelihood, and no mask is needed. Logits come in the model's dtype, as generation sees them; the
normaliser is summed in float32, some hundred positions at a time, since a whole window of a 128k vocabulary in float32
would take twice the memory of its logits. What it gives up: the logits of the window themselves are held at once,
which at 4096 tokens and that vocabulary is 1 GB in a 16-bit dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsert.engine import LLM
from sparsert.errors import InputError

#: Positions whose logits are normalised at a time.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of one sequence behind its first, on the host.

    Attributes:
        log_likelihoods: float32 ``[tokens - 1]``, natural logarithm.
        greedy: bool ``[tokens - 1]``: whether the model finds none likelier.
    """

    log_likelihoods: Tensor
    greedy: Tensor


def score_sequences(llm: LLM, sequences: Sequence[Sequence[int]], *, batch_size: int = 1) -> Iterator[TokenScores]:
    """Score sequences of tokens, under the plan of ``llm``.

    Args:
        llm: the loaded model.
        sequences: token ids, at least two each; lengths may differ, but a batch costs as much as its longest. The last
            token is not read, so a sequence may have one more than the model was made for.
        batch_size: sequences in one forward.

    Yields:
        Scores of each sequence, in order.

    Raises:
        InputError: a sequence is too short or too long, or has tokens outside the vocabulary; batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    for index, sequence in enumerate(sequences):
        _check(llm, index, sequence)
    for begin in range(0, len(sequences), batch_size):
        yield from _score_batch(llm, sequences[begin : begin + batch_size])


def _check(llm: LLM, index: int, sequence: Sequence[int]) -> None:
    config = llm.model.config
    most = config.max_position_embeddings
    if not 2 <= len(sequence) <= most + 1:
        raise InputError(f"sequence {index} has {len(sequence)} tokens; this model scores 2-{most + 1}")
    if not 0 <= min(sequence) <= max(sequence) < config.vocab_size:
        raise InputError(f"sequence {index} has token ids outside the vocabulary, 0-{config.vocab_size - 1}")


def _score_batch(llm: LLM, sequences: Sequence[Sequence[int]]) -> Iterator[TokenScores]:
    device = llm.model.device
    lengths = [len(sequence) for sequence in sequences]
    padded = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : lengths[row]] = torch.tensor(sequence)
    tokens, following = padded[:, :-1].to(device), padded[:, 1:].to(device)
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    scores, greedy = [], []
    # not inference mode: the tables of positions that this may make are used by others later
    with torch.no_grad(), here:
        logits = llm.model(tokens, plan=llm.plan)
        for begin in range(0, tokens.shape[1], _CHUNK):
            chunk, targets = logits[:, begin : begin + _CHUNK].float(), following[:, begin : begin + _CHUNK]
            chosen = chunk.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            scores.append(chosen - chunk.logsumexp(-1))
            greedy.append(chunk.argmax(-1) == targets)
        all_scores, all_greedy = torch.cat(scores, dim=1).cpu(), torch.cat(greedy, dim=1).cpu()
    for row, length in enumerate(lengths):
        yield TokenScores(all_scores[row, : length - 1].clone(), all_greedy[row, : length - 1].clone())
