"""Prompts to token ids: the checkpoint's own tokenizer, its chat template, its end tokens.

The tokenizer is that of transformers, loaded from the model directory only when text has to be read or
written: prompts given as token ids run without one. Code that a checkpoint brings along is never run.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsert.checkpoint import Checkpoint
from sparsert.checkpoint.json_file import read_json
from sparsert.errors import CheckpointError, InputError, UnsupportedError, first_line
from sparsert.models.config_values import token_ids

#: A text, its token ids, or a conversation: messages with "role" and "content".
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

#: Any of these files makes a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds tokenizer files."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory}: holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the files of the original model "
            f"there, or give prompts as token ids"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    # transformers raises whatever its many tokenizers do on damaged files; none of it is a bug here
    except Exception as error:
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded ({first_line(error)}); copy the tokenizer files of the "
            f"original model there again"
        ) from error


class LazyTokenizer:
    """The tokenizer of a model directory, loaded when first asked for; views of one model share it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Any = None

    @property
    def exists(self) -> bool:
        """Whether the directory holds one."""
        return self._tokenizer is not None or has_tokenizer(self._directory)

    def get(self) -> Any:
        """The tokenizer; raises what :func:`load_tokenizer` raises."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._directory)
        return self._tokenizer


def encode_prompt(tokenizer: Any, prompt: Prompt, index: int, *, chat: bool) -> list[int]:
    """Token ids of a prompt that is not token ids already.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        prompt: a text, or with ``chat`` also a conversation.
        index: place of the prompt in the call, for the error message.
        chat: put the text, as the user's message, or the conversation through the chat template.

    Raises:
        InputError: the prompt has no tokens, or a conversation comes without ``chat``.
        UnsupportedError: ``chat``, and the tokenizer has no template.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedError("this checkpoint has no chat template; leave --chat (chat=True) out")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)  # the template has written them
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        raise InputError(f"prompt {index} is a conversation; pass chat=True to put it through the chat template")
    if not ids:
        raise InputError(f"prompt {index} is empty; give at least one character")
    return list(ids)


def is_token_ids(prompt: Prompt) -> bool:
    """Whether a prompt is a sequence of token ids."""
    return not isinstance(prompt, str) and all(isinstance(entry, numbers.Integral) for entry in prompt)


def read_eos_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """Tokens that end a text: of ``generation_config.json`` if it names any, else of ``config.json``.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint.directory / "generation_config.json"
    named = token_ids(read_json(path), "eos_token_id") if path.is_file() else ()
    return frozenset(named or token_ids(checkpoint.config, "eos_token_id"))
