"""A training that survives being killed: its state on disk, and the loop around ``compress.training``.

Beside the output ``NAME`` stands, while it is made, a directory ``NAME.training``:

    run.json     what is being run: options, model, text
    state.pt     the newest state (parameters, moments, step), written under another name and then renamed, so that
                 there is always a whole one
    log.jsonl    one line an update: step, loss, learning_rate, gradient_norm, seconds; evaluations beside them

With ``--resume`` the run goes on from the state, and only if ``run.json`` says that it is the same run: same options,
same text, same weights. The log is cut back to the state's step first. The directory stays after success, without the
state, for the log is part of the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsert.compress.training import StepRecord, Trainer
from sparsert.errors import CheckpointError, InputError, UnsupportedError, first_line
from sparsert.jobs.progress import Progress

#: What may differ between a run and the one that resumes it: none of these changes the result. Places are among
#: them because what lies there, the model and the text, is told apart by fingerprints.
_FREE_OPTIONS = (
    "save_every",
    "resume",
    "device",
    "evaluate_every",
    "evaluate_text",
    "model",
    "teacher",
    "text",
    "masks",
    "output",
    "masks_output",
    "to",
)


_LOCK = ".lock"


class TrainingRun:
    """The files of one training; use it as a context, which keeps other processes out of the directory.

    Attributes:
        directory: ``NAME.training`` beside the output.

    Args:
        output: what will be made.
        identity: everything that decides the result, as plain JSON types: options, fingerprints of text and model.
        resume: go on with what is there; with nothing there, begin.
        is_first: False in all but the first of several processes; those read and never write.

    Raises:
        InputError: there is an unfinished run and ``resume`` is False, it is another run, or a process is at work on
        it. CheckpointError: the directory cannot be made, or its state is damaged.
    """

    def __init__(self, output: str | Path, identity: Mapping[str, Any], *, resume: bool, is_first: bool = True) -> None:
        target = Path(output).expanduser()
        self.directory = target.with_name(f"{target.name}.training")
        self._identity = json.loads(json.dumps(identity))
        self._resume = resume
        self._is_first = is_first
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TrainingRun:
        with contextlib.ExitStack() as stack:
            if self._is_first:
                with _disk(self.directory):
                    self.directory.mkdir(exist_ok=True)
                    stack.enter_context(_lock(self.directory))
                    self._claim()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def state_file(self) -> Path:
        """The newest state."""
        return self.directory / "state.pt"

    @property
    def log_file(self) -> Path:
        """One JSON object an update."""
        return self.directory / "log.jsonl"

    def train(
        self,
        trainer: Trainer,
        *,
        description: str,
        save_every: int,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int = 0,
        step_values: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Train to the last step, from the saved state if there is one.

        Args:
            trainer: at step 0; its state is replaced by the saved one.
            description: for the progress bar.
            save_every: updates from state to state; 0 saves none.
            evaluate: measures by the way, logged under the names that it returns.
            evaluate_every: updates from one to the next; 0: only after the last.
            step_values: further numbers of the last update for the log.

        Raises:
            TrainingError: the loss is no number; the last saved state stays as it was.
            UnsupportedError: the GPU's memory does not suffice.
            CheckpointError: the disk is full, or the state is damaged.
        """
        if self._resume and self.state_file.is_file():
            trainer.load_state_dict(self._load_state())
        if self._is_first:
            self._cut_log(trainer.step)
        options = trainer.options
        with (
            _disk(self.directory),
            Progress(options.steps, description, "step", start=trainer.step, shown=self._is_first) as progress,
            self.log_file.open("a") if self._is_first else contextlib.nullcontext() as log,
        ):

            def after_step(record: StepRecord) -> None:
                values = dict(step_values()) if step_values is not None else {}
                last = record.step == options.steps
                if evaluate is not None and (last or (evaluate_every and record.step % evaluate_every == 0)):
                    values |= evaluate()
                if log is not None:
                    log.write(json.dumps({**dataclasses.asdict(record), **values}) + "\n")
                if save_every and (record.step % save_every == 0 or last):
                    if log is not None:
                        log.flush()
                    self._save_state(trainer)
                progress.advance({"loss": record.loss, **values})

            try:
                trainer.train(callback=after_step)
            except torch.OutOfMemoryError as error:
                raise UnsupportedError(
                    f"step {trainer.step + 1}: out of GPU memory ({first_line(error)}); use a smaller --micro-batch "
                    f"(now {options.micro_batch or options.batch_size}) or a shorter --window"
                ) from error
        trainer.processes.wait()

    def finish(self) -> None:
        """The output has been written: the state is no longer needed, the log stays."""
        if self._is_first:
            self.state_file.unlink(missing_ok=True)

    def _claim(self) -> None:
        """Write what is being run, or check that it is what was."""
        run_file = self.directory / "run.json"
        if self._resume and run_file.is_file():
            differing = _differences(_read_json(run_file), self._identity)
            if differing:
                raise InputError(
                    f"{self.directory}: holds another run, which differs in {', '.join(differing)}; give it the same "
                    "options, or remove the directory and start without --resume"
                )
            return
        if self.state_file.is_file():
            raise InputError(
                f"{self.directory}: holds a run that has not ended; go on with --resume, or remove the directory to "
                "start anew"
            )
        for entry in self.directory.iterdir():  # of a run that has ended, or was killed before its first state
            if entry.is_file() and entry.name != _LOCK:
                entry.unlink()
        _write_whole(run_file, lambda file: file.write_text(json.dumps(self._identity, indent=2) + "\n"))

    def _load_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise CheckpointError(
                f"{self.state_file}: cannot be read ({first_line(error)}); remove the directory and start anew"
            ) from error
        except Exception as error:  # pickle's own errors, which are many
            raise CheckpointError(
                f"{self.state_file}: is damaged ({first_line(error)}); remove the directory, start anew"
            ) from error
        return state

    def _save_state(self, trainer: Trainer) -> None:
        if self._is_first:
            state = trainer.state_dict()
            _write_whole(self.state_file, lambda file: _save(state, file))

    def _cut_log(self, step: int) -> None:
        """Drop what was logged behind the state."""
        if not self.log_file.is_file():
            return
        kept = []
        for line in self.log_file.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):  # the last line may be half a one
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with _disk(self.directory):
            _write_whole(self.log_file, lambda file: file.write_text("".join(f"{line}\n" for line in kept)))


def read_log(directory: str | Path) -> list[dict[str, Any]]:
    """The updates of a run, from its ``log.jsonl``."""
    return [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]


def _differences(earlier: Any, now: Any, prefix: str = "") -> list[str]:
    """Keys whose values differ, but for those that do not change the result."""
    if not (isinstance(earlier, dict) and isinstance(now, dict)):
        return [] if earlier == now else [prefix.rstrip(".")]
    names = [name for name in (*now, *(name for name in earlier if name not in now)) if name not in _FREE_OPTIONS]
    return [found for name in names for found in _differences(earlier.get(name), now.get(name), f"{prefix}{name}.")]


def _write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name, wait for the disk, rename."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _save(state: dict[str, Any], file: Path) -> None:
    """``torch.save``, whose own writer tells a full disk by RuntimeErrors that differ with how far it came."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise OSError(f"the state could not be written whole: {first_line(error)}") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({first_line(error)}); remove the directory and start anew"
        ) from error


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with (directory / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another process is at work on it; wait for it, or stop it") from None
        yield


@contextlib.contextmanager
def _disk(directory: Path) -> Iterator[None]:
    """Errors of the disk as sentences."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(directory.parent).free if directory.parent.is_dir() else 0
        raise CheckpointError(
            f"{directory}: cannot be written ({first_line(error)}; {free / 1e9:.2f} GB free); the last saved state is "
            "whole: make room and go on with --resume"
        ) from error
