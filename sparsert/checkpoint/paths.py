"""Which files of a model directory may be read: those inside it.

A directory that was fetched or unpacked may hold links, and a link may lead anywhere: what it leads to would be read as
weights or, worse, copied into the next checkpoint and published with it. So every file has to lie inside the directory
when all links are followed. One arrangement is allowed beside that, since it is how the hub's cache is built:
``snapshots/<revision>/model.safetensors`` linked to ``blobs/<hash>`` of the same repository.
"""

from __future__ import annotations

from pathlib import Path

from sparsert.errors import CheckpointError


def check_inside(directory: Path, file: Path) -> None:
    """Check that a file of a model directory lies inside it.

    Raises:
        CheckpointError: it is a link to elsewhere, or a chain of links without end.
    """
    try:
        real, base = file.resolve(), directory.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{file}: is a link that leads nowhere; fetch the checkpoint again") from None
    if real.is_relative_to(base):
        return
    in_cache = base.parent.name == "snapshots" and real.parent == base.parent.parent / "blobs"
    if not in_cache:
        raise CheckpointError(
            f"{file}: is a link to {real}, outside of the model directory; nothing was read: put the file itself there"
        )
