"""What a single file is: masks, an order of blocks, weights without their directory.

`sparsert inspect` is what people reach for when a file does not load, and half of these files are not model
directories at all. Each answer ends with what to do with the file.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from sparsert.checkpoint.masks import read_maskllm
from sparsert.checkpoint.raw_masks import RawMaskFile, is_pickle
from sparsert.checkpoint.reader import block_of
from sparsert.checkpoint.safetensors_file import read_header
from sparsert.errors import CheckpointError
from sparsert.schedule.blocks import read_order_file


def describe_file(path: Path) -> dict[str, Any]:
    """Describe one file.

    Args:
        path: an existing file.

    Returns:
        ``kind`` (``masks``, ``block order``, ``safetensors`` or ``gguf``), ``summary`` for people, and numbers by kind.

    Raises:
        CheckpointError: damaged, or nothing that is known here.
        InputError: a ``.csv`` that is no order of blocks.
    """
    if path.suffix == ".csv":
        order = list(read_order_file(path))
        return {
            "kind": "block order",
            "summary": f"order in which to remove {len(order)} blocks, first {order[0]}; use it with "
            f"--remove-blocks {path}:COUNT",
            "blocks": order,
        }
    with path.open("rb") as stream:
        beginning = stream.read(4)
    if beginning == b"GGUF":
        return {
            "kind": "gguf",
            "summary": f"a GGUF model, dense; `sparsert convert {path} OUT --to dense` writes a Hugging Face directory",
        }
    if path.suffix == ".safetensors":
        header = read_header(path)
        return {
            "kind": "safetensors",
            "summary": f"{len(header)} tensors without config.json; give the model directory that holds this file",
            "tensors": len(header),
        }
    if path.suffix == ".npz" or is_pickle(path):
        masks = read_maskllm(path)
        blocks = collections.Counter(block_of(name) for name in masks.names)
        form = "raw masks" if isinstance(masks, RawMaskFile) else "masks in bits"
        return {
            "kind": "masks",
            "summary": f"{form} for {len(masks)} weights in {len(blocks)} blocks, the first {masks.names[0]}; use it "
            "with --masks and the model that it was made for",
            "masks": len(masks),
            "blocks": len(blocks),
        }
    raise CheckpointError(
        f"{path}: is no mask file (.npz, .pt), block order (.csv), safetensors or GGUF file; give a model directory, a "
        "hub id, or one of these"
    )
