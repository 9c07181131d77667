"""One linear layer to measure, as plain data, and the rows that will hold what was found.

Apart from ``layers.py``, which measures it, since this has to be sent to another process and read there before
anything heavy is imported: no torch here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerTask:
    """What to measure of one shape; plain data, so that it can be sent to another process.

    Attributes:
        out_features, in_features: shape of the weight.
        batches: rows of x, one measurement each.
        contenders: names of :data:`sparsert.bench.contenders.CONTENDERS`, ``dense`` among them.
        device, dtype: as torch names them, e.g. ``cuda:0`` and ``bfloat16``.
        seed: of weight and inputs.
        repeats: runs of each contender that the median is taken of.
        excluded: contenders that must not run, with the reason.
    """

    out_features: int
    in_features: int
    batches: tuple[int, ...]
    contenders: tuple[str, ...]
    device: str
    dtype: str
    seed: int = 0
    repeats: int = 15
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)


class BrokenDeviceError(RuntimeError):
    """A contender left the GPU's context or a capture broken; only a new process can go on."""


def empty_rows(task: LayerTask, batch: int, reason: str | None) -> list[Row]:
    """The rows of a batch before anything of it was measured, or with the reason why nothing was."""
    return [
        {
            "out_features": task.out_features,
            "in_features": task.in_features,
            "batch": batch,
            "dtype": task.dtype,
            "contender": contender,
            "kernel": None,
            "time_us": None,
            "gb_per_s": None,
            "tflop_per_s": None,
            "speedup": None,
            "error": None,
            "dense_error": None,
            "correct": None,
            "reason": reason,
        }
        for contender in task.contenders
    ]
