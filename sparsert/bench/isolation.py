"""Layers measured in a process of their own, so that a peer that crashes takes nobody with it.

An illegal access or a crash inside a library ends the process it happens in, or leaves its GPU context
unusable. So on a GPU all layers are measured in one child, which says whose turn it is before each contender
runs. When the child dies or stops answering, the contender it named last is left out of what remains of
that layer (and of everything after a second time), a new child goes on from the first batch that is missing,
and the rows say what happened. What it gives up: the few seconds that a process takes to start; on a CPU
nothing of this is needed and layers are measured in place.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from sparsert.bench.layer_task import BrokenDeviceError, LayerTask, Row, empty_rows
from sparsert.errors import UnsupportedError

#: A step of one contender takes seconds; the search through cuSPARSELt's algorithms up to half a minute.
_SILENCE_SECONDS = 300.0

#: A process that has said nothing yet may still be importing torch from a slow disk.
_START_SECONDS = 120.0

#: A contender that ended this many processes is not tried again.
_MOST_CRASHES = 2

#: Whose turn it is before the child has said anything.
_START = "start"

Measure = Callable[[LayerTask, Callable[[str], None]], Iterator[list[Row]]]


def measure_layers(
    tasks: Sequence[LayerTask],
    *,
    isolated: bool,
    measure: Measure | None = None,
    silence_s: float = _SILENCE_SECONDS,
) -> Iterator[tuple[int, list[Row]]]:
    """Measure layers one after the other.

    Args:
        tasks: what to measure.
        isolated: in a child process, which may die; else in this one.
        measure: what measures one layer, by default :func:`sparsert.bench.layers.measure_layer`; a function of a
            module, since a child imports it.
        silence_s: seconds without a word after which a child counts as hanging.

    Yields:
        (index of the task, rows of one batch), in order; every batch of every task comes exactly once.

    Raises:
        UnsupportedError: no child process can be started.
    """
    measure = measure or _default_measure()
    if not isolated:
        for index, task in enumerate(tasks):
            for rows in measure(task, lambda contender: None):
                yield index, rows
        return
    crashes: collections.Counter[str] = collections.Counter()
    banned: dict[str, str] = {}
    remaining = list(enumerate(tasks))
    while remaining:
        child = _Child([_without(task, banned) for _, task in remaining], measure, silence_s)
        with contextlib.closing(child):
            for rows in child.rows():
                yield remaining[0][0], rows
                _drop_batch(remaining)
        if not remaining:
            return
        # the child ended before its work did
        index, task = remaining[0]
        turn, reason = child.turn, f"{child.turn} ended the process that measured it: {child.last_words}"
        crashes[turn] += 1
        if turn == _START and crashes[turn] >= _MOST_CRASHES:
            raise UnsupportedError(f"the process that measures does not start ({child.last_words}); try --device cpu")
        if turn in task.contenders and turn != "dense":
            remaining[0] = (index, _without(task, {turn: reason}))
            if crashes[turn] >= _MOST_CRASHES:
                banned[turn] = reason
        elif turn != _START:  # the baseline, or nobody in particular: this batch cannot be measured
            yield index, empty_rows(task, task.batches[0], reason)
            _drop_batch(remaining)


def _default_measure() -> Measure:
    # here and not at the top: a child that measures something else needs no torch to start
    from sparsert.bench.layers import measure_layer

    return measure_layer


def _without(task: LayerTask, excluded: dict[str, str]) -> LayerTask:
    return dataclasses.replace(task, excluded={**excluded, **task.excluded})


def _drop_batch(remaining: list[tuple[int, LayerTask]]) -> None:
    """Take the first batch off the first task."""
    index, task = remaining[0]
    if len(task.batches) == 1:
        del remaining[0]
    else:
        remaining[0] = (index, dataclasses.replace(task, batches=task.batches[1:]))


class _Child:
    """One measuring process.

    Attributes:
        turn: the contender it named last.
        last_words: why it ended before its work did.
    """

    def __init__(self, tasks: list[LayerTask], measure: Measure, silence_s: float) -> None:
        self.turn = _START
        self.last_words = ""
        self._silence_s = silence_s
        # spawned, not forked: CUDA does not survive a fork
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(theirs, tasks, measure), daemon=True)
        self._process.start()
        theirs.close()

    def rows(self) -> Iterator[list[Row]]:
        """Rows of one batch after the other, until the work is done or the child is."""
        while True:
            try:
                patience = max(self._silence_s, _START_SECONDS) if self.turn == _START else self._silence_s
                if not self._connection.poll(patience):
                    self.last_words = f"no word for {patience:.0f} s, ended"
                    return
                what, content = self._connection.recv()
            except (EOFError, OSError):
                self._process.join()
                code = self._process.exitcode or 0
                self.last_words = self.last_words or (
                    f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                )
                return
            if what == "turn":
                self.turn = content
            elif what == "rows":
                yield content
            elif what == "broken":
                self.last_words = content
            else:
                return

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.is_alive() and self.last_words:
            self._process.kill()
        else:
            self._process.terminate()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, tasks: list[LayerTask], measure: Measure) -> None:
    """What a child does."""
    # Ctrl-C reaches the whole group; the parent decides, and a traceback from here would only be noise
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for task in tasks:
            for rows in measure(task, lambda contender: connection.send(("turn", contender))):
                connection.send(("rows", rows))
        connection.send(("done", None))
    except BrokenDeviceError as error:
        connection.send(("broken", str(error)))
    except Exception as error:
        connection.send(("broken", f"{type(error).__name__}: {error}"))
    connection.close()
    os._exit(0)  # a broken context would complain about every object that it still holds
