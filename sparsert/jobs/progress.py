"""Progress on standard error: a bar with rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any


class Progress:
    """A bar that counts up to a total; use it as a context.

    Args:
        total: of what is counted.
        description: stands in front of the bar.
        unit: what is counted.
        start: what was done before, by a run that this one resumes; the rate does not count it.
        shown: False for all but the first of several processes.

    Example:
        >>> with Progress(3, "measuring", "window", shown=False) as progress:
        ...     progress.advance({"loss": 2.5})
    """

    def __init__(self, total: int, description: str, unit: str, *, start: int = 0, shown: bool = True) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=total,
            desc=description,
            unit=unit,
            initial=start,
            disable=None if shown else True,  # None: silent unless on a terminal
            dynamic_ncols=True,
        )

    def advance(self, values: Mapping[str, float] | None = None, *, count: int = 1) -> None:
        """Count, and show values beside the bar.

        Args:
            values: numbers to show, by name.
            count: how many are done.
        """
        if values and not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
