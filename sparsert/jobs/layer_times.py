"""The measured table of layer times, from a file."""

from __future__ import annotations

import json
from pathlib import Path

from sparsert.compress.latency_table import LatencyTable
from sparsert.errors import InputError, first_line


def read_layer_times(path: str, batch: int) -> LatencyTable:
    """Times of a record that ``sparsert bench kernels --output FILE`` wrote.

    Raises:
        InputError: the file cannot be read, is no such record, or has no times for this batch.
    """
    file = Path(path).expanduser()
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--layer-times {file}: cannot be read ({first_line(error)}); write one with `sparsert bench kernels "
            f"--output FILE`"
        ) from error
    try:
        return LatencyTable(record, batch)
    except InputError as error:
        raise InputError(f"--layer-times {file}: {error}") from error
