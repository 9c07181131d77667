"""Single measurements that survive being killed: one number a line, kept until the job that asked for them is done.

Beside the output ``NAME`` stands, while it is made, a directory ``NAME.measured``:

    run.json       what is being measured: options, model, text
    values.jsonl   {"key": "perplexity without 7", "value": 23.4}, appended as each number is known

With ``--resume`` numbers that stand there are not measured again, and only if ``run.json`` says that it is the same
job. The directory is removed when the job has succeeded, or has ended before there was a number. Trainings have
:mod:`sparsert.jobs.training_run` instead.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sparsert.errors import CheckpointError, InputError

#: Keys of the options that change no measured number.
_FREE_OPTIONS = ("resume", "device", "output", "batch_size", "png", "save", "save_us", "plan_only")


class Measurements:
    """The numbers of one job; use it as a context.

    Attributes:
        directory: ``NAME.measured`` beside the output.

    Args:
        output: what will be made.
        identity: everything that decides the numbers, as plain JSON types.
        resume: take numbers that are there already; with none there, begin.

    Raises:
        InputError: there is an unfinished job and ``resume`` is False, it is another job, or a process is at work on
        it. CheckpointError: the directory cannot be written.
    """

    def __init__(self, output: str | Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        target = Path(output).expanduser()
        self.directory = target.with_name(f"{target.name}.measured")
        self._identity = _without_free(json.loads(json.dumps(identity, default=str)))
        self._resume = resume
        self._values: dict[str, float] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Measurements:
        run_file, values_file = self.directory / "run.json", self.directory / "values.jsonl"
        try:
            self.directory.mkdir(exist_ok=True)
            self._file = values_file.open("a+")
            self._lock()
            if run_file.is_file() and values_file.stat().st_size:
                self._check(run_file)
                self._values = _read(values_file)
            run_file.write_text(json.dumps(self._identity, indent=2) + "\n")
            # whatever the end of a killed run left of its last line goes
            self._file.truncate(0)
            for key, value in self._values.items():
                self._append(key, value)
        except OSError as error:
            raise self._disk_error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None or not self._values:
            shutil.rmtree(self.directory, ignore_errors=True)

    def remember(self, key: str, compute: Callable[[], float]) -> float:
        """The number of a key: the one that is known, or one that is computed and kept."""
        if key not in self._values:
            value = compute()
            try:
                self._append(key, value)
            except OSError as error:
                raise self._disk_error(error) from error
            self._values[key] = value
        return self._values[key]

    def _append(self, key: str, value: float) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.directory}: another process is at work on it; wait for it, or stop it") from None

    def _check(self, run_file: Path) -> None:
        if not self._resume:
            raise InputError(
                f"{self.directory}: holds a job that has not ended; go on with --resume, or remove the directory to "
                f"start anew"
            )
        try:
            earlier = json.loads(run_file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{run_file}: is damaged ({error}); remove the directory and start anew") from error
        if earlier != self._identity:
            differing = [key for key in {**earlier, **self._identity} if earlier.get(key) != self._identity.get(key)]
            raise InputError(
                f"{self.directory}: holds another job, which differs in {', '.join(differing)}; give it the "
                f"same options, or remove the directory and start without --resume"
            )

    def _disk_error(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: cannot be written ({error.strerror or error}); what was measured before stands: make "
            f"room and go on with --resume"
        )


def _without_free(identity: dict[str, Any]) -> dict[str, Any]:
    """Options moved to the top, those that change nothing left out."""
    flat = {**identity.pop("options", {}), **identity}
    return {key: value for key, value in flat.items() if key not in _FREE_OPTIONS}


def _read(file: Path) -> dict[str, float]:
    values = {}
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
            values[entry["key"]] = float(entry["value"])
        except (ValueError, KeyError, TypeError):
            break  # half a line, the last that a killed run wrote
    return values
