"""What loading did with each linear layer, for summaries and benchmark records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LinearRecord:
    """How one linear layer of a block was loaded.

    Attributes:
        kind: ``"2:4"`` (packed) or ``"dense"``.
        reason: where the mask came from, or why the layer stays dense.
        stored_bytes: bytes of the weight on the device, without bias.
        dense_bytes: bytes that it would take dense in the same dtype.
    """

    kind: str
    reason: str
    stored_bytes: int
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """How the linear layers of the blocks that run were loaded.

    Attributes:
        linears: by weight name in the checkpoint's numbering.
        warnings: one sentence for each thing that is not as a user may expect.
    """

    linears: Mapping[str, LinearRecord]
    warnings: tuple[str, ...]

    def count(self, kind: str) -> int:
        """Linear layers of a kind, ``"2:4"`` or ``"dense"``."""
        return sum(record.kind == kind for record in self.linears.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all these weights on the device."""
        return sum(record.stored_bytes for record in self.linears.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that they would take dense."""
        return sum(record.dense_bytes for record in self.linears.values())

    @property
    def share(self) -> float:
        """``stored_bytes / dense_bytes``; 0.5625 when all are packed 16-bit 2:4."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def __str__(self) -> str:
        return (
            f"{self.count('2:4')} linear layers packed 2:4, {self.count('dense')} dense: "
            f"{self.stored_bytes / 1e6:.1f} MB, {self.share:.4f} of dense ({self.dense_bytes / 1e6:.1f} MB)"
        )


def dense_warning(linears: Mapping[str, LinearRecord]) -> str | None:
    """The one sentence that says which layers run dense, or None if all are packed."""
    dense = {name: record for name, record in linears.items() if record.kind == "dense"}
    if not dense:
        return None
    name, record = next(iter(dense.items()))
    if len(dense) == len(linears):
        which = "no linear layer is 2:4, so the whole model runs dense"
    else:
        which = f"{len(dense)} of {len(linears)} linear layers are not 2:4 and run dense"
    return f"{which} (first {name}: {record.reason}); prune it with `sparsert prune` or give masks"
