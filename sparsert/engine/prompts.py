"""From the prompts of a call to texts that can grow: token ids, checked, each with its limit and stop conditions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sparsert.engine.growing_text import GrowingText
from sparsert.engine.params import SamplingParams
from sparsert.engine.tokenizer import LazyTokenizer, Prompt, encode_prompt, is_token_ids
from sparsert.errors import InputError
from sparsert.models import DecoderConfig


def prepare_texts(
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    config: DecoderConfig,
    tokenizer: LazyTokenizer,
    eos_token_ids: frozenset[int],
    max_length: int,
    chat: bool,
) -> list[GrowingText]:
    """Tokenise and check the prompts of one call; warns of those that leave less room than was asked for.

    Args:
        prompts: texts, lists of token ids, or with ``chat`` conversations.
        params: limits and stop conditions.
        config: of the model, for its vocabulary.
        tokenizer: loaded only if a text has to be read or written.
        eos_token_ids: the model's own end tokens.
        max_length: most tokens of a text, prompt and output together.
        chat: put each text or conversation through the chat template.

    Returns:
        A text without tokens for each prompt, in order.

    Raises:
        InputError: a prompt is empty, has token ids outside the vocabulary, or is too long for ``max_length``.
        CheckpointError: text is given and the checkpoint has no tokenizer.
        UnsupportedError: ``chat`` without a chat template.
    """
    if not all(isinstance(prompt, Sequence) for prompt in prompts):
        raise InputError("each prompt is a text or a list of token ids; write one list of ids as [[1, 2, 3]]")
    needs_text = bool(params.stop) or not all(is_token_ids(prompt) for prompt in prompts)
    loaded = tokenizer.get() if needs_text or tokenizer.exists else None
    stop_tokens = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        stop_tokens |= eos_token_ids
    texts, shortened = [], []
    for index, prompt in enumerate(prompts):
        if is_token_ids(prompt):
            ids = _check_token_ids(index, prompt, config.vocab_size)
        else:
            ids = encode_prompt(loaded, prompt, index, chat=chat)
        room = max_length - len(ids)
        if room < 1:
            most = config.max_position_embeddings
            longer = f", or raise max_length (this model: up to {most})" if most > max_length else ""
            raise InputError(
                f"prompt {index} has {len(ids)} tokens, but prompt and output together must fit into max_length "
                f"{max_length}; shorten it to {max_length - 1} or fewer{longer}"
            )
        if room < params.max_new_tokens:
            shortened.append(index)
        limit = min(params.max_new_tokens, room)
        texts.append(GrowingText(index, ids, limit, stop_tokens, tuple(params.stop), loaded))
    if shortened:
        first = texts[shortened[0]]
        warnings.warn(
            f"{len(shortened)} prompts leave less room than max_new_tokens {params.max_new_tokens}: prompt "
            f"{first.index} has {len(first.prompt)} tokens, so at most {first.limit} can follow within max_length "
            f"{max_length}",
            stacklevel=3,  # whoever called LLM.generate
        )
    return texts


def _check_token_ids(index: int, prompt: Prompt, vocab_size: int) -> list[int]:
    ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise InputError(f"prompt {index} is empty; give at least one token")
    bad = [token for token in ids if not 0 <= token < vocab_size]
    if bad:
        raise InputError(f"prompt {index}: token id {bad[0]} is outside the vocabulary, 0-{vocab_size - 1}")
    return ids
