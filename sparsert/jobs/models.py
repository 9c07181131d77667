"""Models and tokenizers for jobs: from a directory or hub id to a transformers model of dense weights.

Methods of ``compress`` change or read ordinary modules, so what is packed 2:4 on disk is refused with the command that
unpacks it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from sparsert.checkpoint import Checkpoint, open_checkpoint, resolve_checkpoint
from sparsert.checkpoint.stored import DENSE
from sparsert.errors import CheckpointError, first_line

#: How much of each file a fingerprint reads: 4 MB.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def open_dense(model: str) -> Checkpoint:
    """Open a checkpoint whose weights are all stored dense, zeros or not.

    Args:
        model: directory or hub id.

    Raises:
        CheckpointError: missing, damaged, or packed.
    """
    checkpoint = open_checkpoint(resolve_checkpoint(model))
    packed = next((name for name in checkpoint.names if checkpoint.storage(name) != DENSE), None)
    if packed is not None:
        raise CheckpointError(
            f"{checkpoint.directory}: {packed!r} is stored as {checkpoint.storage(packed)}; this needs dense weights, "
            f"make them with `sparsert convert {model} DENSE --to dense`"
        )
    return checkpoint


def load_model(
    checkpoint: Checkpoint, *, dtype: str | None = None, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """The transformers model of a checkpoint, without gradients, in evaluation mode.

    Args:
        checkpoint: of :func:`open_dense`.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None: float32 on a CPU, else as stored.
        device: where its weights go.

    Raises:
        CheckpointError: transformers cannot make a model of it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if dtype is None and torch.device(device).type == "cpu":
        dtype = "float32"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it does not ask whether standard error is a terminal
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype="auto" if dtype is None else getattr(torch, dtype), local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{checkpoint.directory}: transformers cannot load it ({first_line(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model.config.use_cache = False
    loaded: torch.nn.Module = model.eval().requires_grad_(False).to(device)
    return loaded


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: has no tokenizer that transformers can load ({first_line(error)}); copy the "
            "model's tokenizer files there, or give token ids as --text FILE.npy"
        ) from error


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """Says which weights these are: configuration, names and shapes, and samples of the files' bytes.

    All bytes would take as long as loading the model; two checkpoints of one shape differ nearly everywhere.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.names):
        digest.update(f"{name} {checkpoint.shape(name)} {checkpoint.dtype(name)}".encode())
    for file in sorted(checkpoint.files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
