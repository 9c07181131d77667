"""``sparsert convert``, and where the masks of ``sparsert prune`` come from.

Apart from ``cli.py`` for its length alone; the rules at its top hold here too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparsert.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsert.checkpoint import Checkpoint


def mask_method(
    arguments: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[str, Callable[[str, Tensor], Tensor] | None, frozenset[str]]:
    """Name of the method that makes masks, what makes them, and the weights for which there is none."""
    from sparsert.checkpoint import check_not_pruned, read_maskllm

    if arguments.masks is None:
        from sparsert.compress import magnitude_mask

        method = arguments.method or "magnitude"
        if method == "none":
            return method, None, frozenset()
        check_not_pruned(checkpoint)
        return method, lambda name, weight: magnitude_mask(weight, name=name), frozenset()
    if arguments.method is not None:
        raise InputError("--masks and --method both say how to prune; give one of them")
    check_not_pruned(checkpoint)
    masks = read_maskllm(arguments.masks)
    linears = checkpoint.block_linears()
    masks.check({name: checkpoint.shape(name) for name in linears})
    without = frozenset(name for name in linears if name not in masks)
    return "mask file", lambda name, weight: masks.mask(name, tuple(weight.shape)), without


def convert(arguments: argparse.Namespace) -> None:
    """``sparsert convert``: the same weights in another form."""
    from sparsert.checkpoint import convert_checkpoint, open_checkpoint, resolve_checkpoint
    from sparsert.checkpoint.work import check_output

    output = Path(arguments.output).expanduser()
    check_output(output)
    path = resolve_checkpoint(arguments.input)
    if path.is_file() and path.suffix == ".gguf":
        _convert_gguf(path, output, arguments)
        return
    source = open_checkpoint(path)
    summary = convert_checkpoint(source, arguments.output, target=arguments.to, progress=True)
    if arguments.json:
        print(json.dumps(summary.to_dict()))
        return
    print(
        f"{summary.output}: {summary.target}, {summary.packed_linears} linear weights packed, "
        f"{len(summary.dense_linears)} dense, {summary.source_bytes / 1e6:.1f} MB -> "
        f"{summary.total_bytes / 1e6:.1f} MB, read back and compared"
    )
    if summary.dense_linears and summary.packed_linears:
        print(
            f"sparsert: note: not 2:4 and stored dense: {len(summary.dense_linears)}, the first "
            f"{summary.dense_linears[0]}",
            file=sys.stderr,
        )


def _convert_gguf(path: Path, output: Path, arguments: argparse.Namespace) -> None:
    """A GGUF file to a dense Hugging Face directory."""
    from sparsert.checkpoint.gguf_file import convert_gguf
    from sparsert.checkpoint.work import work_directory

    if arguments.to not in ("dense", "safetensors"):
        raise InputError(
            f"{path}: a GGUF model is dense; convert it --to dense, then prune it with `sparsert prune --to`"
        )
    with work_directory(output) as directory:
        convert_gguf(path, directory, progress=True)
    print(json.dumps({"output": str(output), "target": "dense"}) if arguments.json else f"{output}: dense, from {path}")
