"""Checked reads of the keys of a ``config.json``: a wrong or missing one is named, with what is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsert.errors import CheckpointError, UnsupportedError


class ConfigValues:
    """Content of a ``config.json``, or of what holds for one block of it.

    Attributes:
        values: the keys; ``None`` counts as missing where a value is needed.
        where: for messages, e.g. ``config.json, block 3``.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands there; ``default`` only if the key is missing."""
        return self.values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            CheckpointError: it is none, or missing without a default.
        """
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            given = "is missing" if value is None else f"is {value!r}"
            raise CheckpointError(f"{self.where}: {key} {given}; a positive number is needed")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None if the key is missing or null.

        Raises:
            CheckpointError: anything else.
        """
        return None if self.values.get(key) is None else self.number(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            CheckpointError: it is none, or missing without a default.
        """
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(f"{self.where}: {key} is {value}; a whole number is needed")
        return int(value)

    def optional_size(self, key: str) -> int | None:
        """A positive whole number, or None if the key is missing or null.

        Raises:
            CheckpointError: anything else.
        """
        return None if self.values.get(key) is None else self.size(key)

    def flag(self, key: str) -> bool:
        """True or false; missing is false.

        Raises:
            CheckpointError: anything else.
        """
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; true or false is needed")
        return bool(value)

    def check_supported(self, what: str, value: object, supported: Iterable[object]) -> None:
        """Refuse a value that the forward does not compute.

        Raises:
            UnsupportedError: with the list of what it does.
        """
        supported = list(supported)
        if value not in supported:
            listed = ", ".join(map(str, supported))
            raise UnsupportedError(f"{self.where}: {what} {value} cannot be run; supported: {listed}")


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids under ``key``: absent, one number or a list of them.

    Raises:
        CheckpointError: anything else.
    """
    value = config.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values):
        raise CheckpointError(f"{key} is {value!r}; it must be a token id or a list of token ids")
    return tuple(values)
