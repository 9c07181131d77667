"""Microseconds of linear layers, looked up in a table that was measured: what `sparsert bench kernels` records.

A record holds medians of (outputs, inputs, batch) for dense layers and for ours, on one GPU. A shape that was
measured is taken as it is. Decode at small batch reads weights, so time follows bytes: any other shape is
interpolated between the measured shapes with fewer and with more bytes, in the logarithm of both. Outside the
measured sizes nothing can be interpolated: below the smallest stands its time, since what remains there is the
launch; above the largest its time for a byte. Such times are marked ``estimated`` and so is a size that lies further
than a factor of two from every measured one: whoever prints a sum of times prints how many of its parts are no
measurement.

What it gives up: attention over the cache, norms and gaps between kernels, which pruning changes less; the sum of
layers is a little less than a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sparsert.compress.width import Widths
from sparsert.errors import InputError
from sparsert.formats import packed_nbytes

#: Contenders of a record, by whether the weight is packed 2:4.
_CONTENDERS = {False: "dense", True: "ours"}

#: Sizes further than this factor from every measured one are estimated, not interpolated.
NEAR = 2.0

MEASURED, INTERPOLATED, ESTIMATED = "measured", "interpolated", "estimated"


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Time of one layer.

    Attributes:
        us: microseconds, median.
        source: ``measured``, ``interpolated`` or ``estimated``.
    """

    us: float
    source: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer as it runs.

    Attributes:
        name: for messages.
        out_features, in_features: shape of its weight.
        sparse: packed 2:4.
    """

    name: str
    out_features: int
    in_features: int
    sparse: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weight on the device, 16 bits a value."""
        if self.sparse:
            return packed_nbytes(self.out_features, self.in_features, torch.bfloat16)
        return 2 * self.out_features * self.in_features


@dataclasses.dataclass(frozen=True)
class ModelTime:
    """Sum over the layers of a model.

    Attributes:
        us: microseconds.
        estimated: names of layers whose time is an estimate, each once.
    """

    us: float
    estimated: tuple[str, ...]


class LatencyTable:
    """Measured times of layers at one batch size.

    Attributes:
        batch: rows of input.
        machine: name of the GPU, for messages.

    Args:
        record: content of a JSON file that ``sparsert bench kernels --output`` wrote.
        batch: one of the batch sizes that were measured.

    Raises:
        InputError: no such record, or nothing correct was measured for this batch.
    """

    def __init__(self, record: Mapping[str, Any], batch: int = 1) -> None:
        self.batch = batch
        try:
            if record["kind"] != "kernels":
                raise InputError(
                    f"the record is of `bench {record['kind']}`; times of layers are in one of `sparsert bench kernels`"
                )
            self.machine = str(record["machine"]["gpu"])
            batches: set[int] = set()
            times: dict[tuple[bool, int, int], float] = {}
            for row in record["results"]:
                for sparse, contender in _CONTENDERS.items():
                    if row["contender"] == contender and row["correct"] and row["time_us"] is not None:
                        batches.add(row["batch"])
                        if row["batch"] == batch:
                            times[sparse, row["out_features"], row["in_features"]] = float(row["time_us"]["median"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the table of layer times is damaged ({error!r}); write one with `sparsert bench kernels "
                f"--output FILE`"
            ) from error
        if not times:
            known = ", ".join(map(str, sorted(batches))) or "none"
            raise InputError(
                f"the table has no times at batch {batch}; it has {known}. Measure it with `sparsert bench kernels "
                f"--batch {batch} --output FILE`"
            )
        self._times = times
        # several shapes of the same bytes stand as one, their geometric mean
        self._by_bytes = {sparse: _curve(times, sparse) for sparse in _CONTENDERS}

    def layer(self, layer: Layer) -> LayerTime:
        """Time of one layer.

        Raises:
            InputError: the table has no layers of this kind (dense or packed) at all.
        """
        exact = self._times.get((layer.sparse, layer.out_features, layer.in_features))
        if exact is not None:
            return LayerTime(exact, MEASURED)
        curve = self._by_bytes[layer.sparse]
        if not curve:
            kind = "packed 2:4" if layer.sparse else "dense"
            raise InputError(
                f"the table has no {kind} layers at batch {self.batch}, so {layer.name} cannot be timed; measure both "
                f"with `sparsert bench kernels`"
            )
        size = layer.nbytes
        below = [entry for entry in curve if entry[0] <= size]
        above = [entry for entry in curve if entry[0] >= size]
        if not below:
            return LayerTime(curve[0][1], ESTIMATED)
        if not above:
            return LayerTime(curve[-1][1] * size / curve[-1][0], ESTIMATED)
        (low, low_us), (high, high_us) = below[-1], above[0]
        if low == high:
            return LayerTime(low_us, INTERPOLATED)
        share = math.log(size / low) / math.log(high / low)
        near = min(size / low, high / size) <= NEAR
        return LayerTime(low_us * (high_us / low_us) ** share, INTERPOLATED if near else ESTIMATED)

    def total(self, layers: Iterable[Layer]) -> ModelTime:
        """Time of several layers, one after the other."""
        us, estimated = 0.0, []
        for layer in layers:
            time = self.layer(layer)
            us += time.us
            if time.source == ESTIMATED:
                estimated.append(layer.name)
        return ModelTime(us, tuple(dict.fromkeys(estimated)))


def block_layers(widths: Widths, *, gated: bool = True, sparse: bool = False) -> list[Layer]:
    """The linear layers of a block as the engine joins them: those that read the same input are one.

    Example:
        >>> [(layer.name, layer.out_features) for layer in block_layers(Widths(576, 1536, 9, 3, 64))]
        [('qkv', 960), ('o', 576), ('gate_up', 3072), ('down', 576)]
    """
    queries, keys = widths.heads * widths.head_dim, widths.kv_heads * widths.head_dim
    up = Layer("gate_up", 2 * widths.intermediate, widths.hidden, sparse)
    return [
        Layer("qkv", queries + 2 * keys, widths.hidden, sparse),
        Layer("o", widths.hidden, queries, sparse),
        up if gated else Layer("up", widths.intermediate, widths.hidden, sparse),
        Layer("down", widths.hidden, widths.intermediate, sparse),
    ]


def _curve(times: Mapping[tuple[bool, int, int], float], sparse: bool) -> list[tuple[int, float]]:
    gathered: dict[int, list[float]] = {}
    for (kind, rows, columns), us in times.items():
        if kind == sparse:
            gathered.setdefault(Layer("", rows, columns, sparse).nbytes, []).append(math.log(us))
    return [(size, math.exp(sum(logs) / len(logs))) for size, logs in sorted(gathered.items())]
