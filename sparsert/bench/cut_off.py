"""A run that is ended by Ctrl-C or SIGTERM keeps what it has measured.

    with signals_raise():            around the command: SIGTERM raises as Ctrl-C does
        with keeping(record):        around the part that measures
            ...
    CutOff                           comes out, with the record so far and a note in it

The record is then written as any other. What it gives up: the contender that was running when the signal came
leaves no row.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class CutOff(KeyboardInterrupt):
    """A signal ended a measurement.

    Attributes:
        record: what was measured until then.
        signal_number: which signal it was.
    """

    def __init__(self, record: dict[str, Any], signal_number: int) -> None:
        super().__init__(f"cut off by {signal.Signals(signal_number).name}")
        self.record = record
        self.signal_number = signal_number


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM raise what :func:`keeping` catches; Ctrl-C does so anyway. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def keeping(record: dict[str, Any]) -> Iterator[None]:
    """Turn a signal into a :class:`CutOff` with the record, which gets a note.

    Args:
        record: of :func:`sparsert.bench.records.new_record`, whose ``results`` grow inside.

    Raises:
        CutOff: a signal came.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        rows = len(record["results"])
        record["notes"].append(f"this run was cut off by {number.name} after {rows} rows; the others were not reached")
        raise CutOff(record, number) from interrupt
