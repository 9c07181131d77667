"""What jobs that read a text once have in common: a model, and some windows of the text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparsert.errors import InputError
from sparsert.jobs.options import REQUIRED, option, to_record
from sparsert.jobs.training_options import DeviceOptions, TextOptions

if TYPE_CHECKING:
    from torch import Tensor

    from sparsert.checkpoint import Checkpoint
    from sparsert.compress.anatomy import Anatomy
    from sparsert.compress.text import TextWindows


@dataclasses.dataclass(frozen=True)
class CalibrationOptions(TextOptions, DeviceOptions):
    """A model and a calibration text."""

    model: str = option(REQUIRED, "model directory or hub id, dense", metavar="DIR|ID")
    windows: int = option(64, "windows of the text that are read")
    batch_size: int = option(4, "windows in one pass")
    resume: bool = option(False, "go on with a job of the same options that was killed")


@dataclasses.dataclass(frozen=True)
class CalibrationJob:
    """What :func:`open_job` makes of the options.

    Attributes:
        checkpoint: the opened model directory.
        anatomy: of the loaded model.
        text: all of the text; None without.
        windows: int64 ``[windows, window]`` of it on the CPU; None without text.
        held_out: as many other windows of the text; None if it has fewer.
        identity: everything that decides the result.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    text: TextWindows | None
    windows: Tensor | None
    held_out: Tensor | None
    identity: dict[str, Any]


def open_job(options: CalibrationOptions) -> CalibrationJob:
    """Open a model and read its text.

    Raises:
        SparsertError: what cannot be read, is too short, or does not fit.
    """
    from sparsert.compress.anatomy import anatomy_of
    from sparsert.jobs.models import checkpoint_fingerprint, load_model, load_tokenizer, open_dense
    from sparsert.jobs.text_files import load_windows
    from sparsert.models import resolve_device

    checkpoint = open_dense(options.model)
    check_window(options.window, checkpoint)
    text = windows = held_out = None
    identity = {"options": to_record(options), "model_fingerprint": checkpoint_fingerprint(checkpoint)}
    if options.text:
        needs_tokenizer = options.bos or any(not path.endswith(".npy") for path in options.text)
        tokenizer = load_tokenizer(checkpoint) if needs_tokenizer else None
        text = load_windows(options, tokenizer, vocabulary=checkpoint.config.get("vocab_size"))
        identity["text_fingerprint"] = text.fingerprint()
        windows = text.sample(options.windows, seed=options.seed)
        if len(text) >= 2 * options.windows:
            held_out = text.batch(1, options.windows, seed=options.seed)
    model = load_model(checkpoint, dtype=options.dtype, device=resolve_device(options.device))
    return CalibrationJob(checkpoint, anatomy_of(model), text, windows, held_out, identity)


def check_window(window: int, checkpoint: Checkpoint) -> None:
    """Refuse windows that are longer than a model reads.

    Raises:
        InputError: they are.
    """
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and window > longest:
        raise InputError(f"--window {window}: the model reads {longest} tokens at most; give a shorter window")
