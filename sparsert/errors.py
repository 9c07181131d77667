"""Errors a user can mend.

Every message says what was given, what is needed, and what to do next. The command line prints
the message alone and exits with 2; anything that is not a :class:`SparsertError` is a bug (exit 1).
"""

from __future__ import annotations


class SparsertError(Exception):
    """Base of all errors that come from what was given rather than from a bug."""


class SparsityError(SparsertError, ValueError):
    """A weight or mask is not 2:4: some group of four inputs keeps three or four values."""


class CheckpointError(SparsertError):
    """A model directory or file is missing, damaged, or does not fit the model."""


class UnsupportedError(SparsertError):
    """The request is well formed, but nothing here can run it; the message lists what can."""


class InputError(SparsertError, ValueError):
    """An argument has the wrong type, shape, dtype, device or range."""


class TrainingError(SparsertError):
    """Training cannot go on, because the loss is no number any more."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, for use inside a sentence: its first line without the full stop, or else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
