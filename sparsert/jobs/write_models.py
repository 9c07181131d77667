"""Write models that a job has in memory as ordinary checkpoints.

A model with the tensors of the checkpoint it came from is written through
:func:`sparsert.checkpoint.write_checkpoint`: same names, shapes and dtypes, same form (packed 2:4 stays packed),
tokenizer and record carried along, the file under its name only when the last byte is on the disk. A model of other
shapes is written by transformers into the same kind of hidden directory. Either way a full disk leaves nothing under
the output's name, and the state of a training as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsert import __version__
from sparsert.checkpoint import Checkpoint, write_checkpoint
from sparsert.checkpoint.quantization import pruning_record
from sparsert.checkpoint.work import check_output, work_directory
from sparsert.checkpoint.writer import copy_small_files
from sparsert.errors import CheckpointError


def write_trained(
    model: nn.Module,
    source: Checkpoint,
    output: str | Path,
    *,
    recovery: Mapping[str, Any],
    zeros_kept: bool = True,
    progress: bool = False,
) -> int:
    """Write a model that was trained from a checkpoint.

    Args:
        model: with the parameters of the checkpoint, in any float dtype; they are stored in that of the checkpoint.
        source: the checkpoint.
        output: directory to create.
        recovery: what was done, for the record in ``config.json``.
        zeros_kept: the 2:4 pattern that the checkpoint's record may claim still holds.
        progress: show a bar.

    Returns:
        Bytes of tensors written.

    Raises:
        CheckpointError: a tensor of the checkpoint is not in the model, or the disk is full.
    """
    # not named_parameters: a tied head has a name in some checkpoints, and is in the dictionary under both
    trained = model.state_dict()

    def change(name: str, tensor: Tensor) -> Tensor:
        if name not in trained:
            raise CheckpointError(
                f"{source.directory}: tensor {name!r} has no place in the model that transformers makes of it; "
                f"it cannot be written back"
            )
        return trained[name].detach().to("cpu", tensor.dtype)

    def record() -> dict[str, Any]:
        earlier = dict(pruning_record(source.config) or {"version": __version__, "pattern": None})
        if not zeros_kept:
            earlier["pattern"] = None
        return {**earlier, "recovery": [*earlier.get("recovery", []), dict(recovery)]}

    return write_checkpoint(source, output, transform=change, record=record, progress=progress)


def write_new(model: Any, source: Checkpoint, output: str | Path, *, record: Mapping[str, Any]) -> int:
    """Write a model of other shapes than the checkpoint it was made from.

    Args:
        model: of transformers; stored in the dtype of the checkpoint's embedding, and changed to it.
        source: where tokenizer and licence are copied from.
        output: directory to create.
        record: for ``config.json``.

    Returns:
        Bytes of tensors written.

    Raises:
        CheckpointError: the disk is full, or the output cannot be written.
    """
    output = Path(output).expanduser()
    check_output(output)
    dtypes = {source.dtype(name) for name in source.names if "embed" in name and source.dtype(name).is_floating_point}
    model.to(next(iter(dtypes), torch.bfloat16))
    try:
        with work_directory(output) as directory:
            model.save_pretrained(directory)
            copy_small_files(source.directory, directory)
            file = directory / "config.json"
            config = json.loads(file.read_text()) | {"sparsert": dict(record)}
            file.write_text(json.dumps(config, indent=2) + "\n")
            return sum(entry.stat().st_size for entry in directory.glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); check permissions and free space"
        ) from error
    except Exception as error:
        # safetensors reports a full disk under a class of its own
        if "SafetensorError" not in type(error).__name__:
            raise
        raise CheckpointError(f"{output}: cannot be written ({error}); check free space") from error
