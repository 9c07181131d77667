"""What became of a model's linear layers in one process of vLLM: one line of log for each cause, at the end of loading.

vLLM tells a plugin of each layer when it is made and again when its weights are there, but never that it was the last
one. So layers are counted as they are made and crossed off as they are finished. With pipeline or tensor parallelism
each process reports its own part.
"""

from __future__ import annotations

import dataclasses

from vllm.logger import init_logger

_NAMES_SHOWN = 4

# a name below vllm's, or vLLM's handler would not print it
_logger = init_logger("vllm.sparsert")


@dataclasses.dataclass
class LayerReport:
    """Counts layers and logs the result when none is outstanding.

    Attributes:
        outstanding: layers that were made and are not loaded yet.
        packed: names of those that run 2:4.
        dense: cause -> names of those that run dense.
        packed_bytes, dense_bytes: of the packed weights, and of the same weights dense.
    """

    outstanding: int = 0
    packed: list[str] = dataclasses.field(default_factory=list)
    dense: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    packed_bytes: int = 0
    dense_bytes: int = 0

    def expect(self) -> None:
        """A layer was made."""
        self.outstanding += 1

    def add_packed(self, name: str, packed_bytes: int, dense_bytes: int) -> None:
        """A layer is loaded and runs 2:4."""
        self.packed.append(name)
        self.packed_bytes += packed_bytes
        self.dense_bytes += dense_bytes
        self._cross_off()

    def add_dense(self, name: str, cause: str) -> None:
        """A layer is loaded and runs dense."""
        self.dense.setdefault(cause, []).append(name)
        self._cross_off()

    def _cross_off(self) -> None:
        self.outstanding -= 1
        if self.outstanding == 0:
            for line in self.lines():
                _logger.info(line)

    def lines(self) -> list[str]:
        """The report, a line a cause."""
        lines = [
            f"sparsert: {len(self.packed)} linear layers run 2:4 packed, {self.packed_bytes / 1e9:.3f} GB instead of "
            f"{self.dense_bytes / 1e9:.3f} GB"
        ]
        for cause, names in self.dense.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            shown = ", ".join(names[:_NAMES_SHOWN])
            lines.append(f"sparsert: {len(names)} linear layers run dense, because {cause}: {shown}{more}")
        return lines
