"""vLLM's linear layers with a packed 2:4 weight: their parameters, how files come into them, what they compute.

vLLM makes the parameters of all layers, loads the files into them shard by shard, and then tells each layer that its
weights are there. A packed layer goes through these steps as follows; q/k/v and gate/up are one layer here, the rows
of its parts one below the other.

    made      compressed [outputs, inputs / 2], bitmask [outputs, inputs / 8], shape     this rank's share of the file
    loaded    outputs are shared among ranks by rows; inputs by columns, in whole groups of four
    finished  weight_packed, weight_metadata: the layout of sparsert.formats.packed; the others are gone

So a weight is packed once on each rank, and beside the finished layers the device holds one layer twice at most.
``weight_packed`` is a name by which vLLM's adapters find out where a quantized layer lies.

vLLM does not check that quantized weights were complete. Here values start as NaN and bits as none, so what no file
filled is found when a layer is finished, together with values that a damaged file brought in.

The product is one operator, ``sparsert::linear24``, which torch.compile does not look into and CUDA graphs capture.

Source: vLLM 0.24, ``model_executor/layers/linear.py`` and ``parameter.py`` (weight loader v2).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from sparsert import ops
from sparsert.checkpoint.stored import checked_shape
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.formats import Packed24
from sparsert.formats.bitmask import bitmask_columns, dense_from_bitmask
from sparsert.integrations.stored_layers import STORED
from sparsert.integrations.vllm_report import LayerReport

__all__ = ["LinearBase", "make_method"]

#: Names and sizes of packed parts of a layer: name in the checkpoint -> (outputs, inputs).
Stored = dict[str, tuple[int, int]]

#: A linear layer of vLLM; what it carries beside a module's own attributes torch's types do not know.
Layer = Any


def make_method(parts: list[str], stored: Stored, *, pack_dense: bool, report: LayerReport) -> LinearMethodBase:
    """The method of a linear layer.

    Args:
        parts: names in the checkpoint of the linears that are joined in it, in their order.
        stored: those of them that are packed.
        pack_dense: pack a dense layer if its zeros are 2:4.
        report: is told what becomes of it.
    """
    report.expect()
    if not stored:
        return PackingLinearMethod(report) if pack_dense else DenseLinearMethod(report)
    if len(stored) == len(parts):
        return PackedLinearMethod(parts, stored, report)
    return UnpackingLinearMethod(parts, stored, report)


class BitmaskParameter(ModelWeightParameter):
    """Bits of kept columns, eight to a byte, of which a rank may begin in the middle of one.

    Args:
        in_features: inputs of this rank.
        kwargs: of ``ModelWeightParameter``.
    """

    def __init__(self, *, in_features: int, **kwargs: Any) -> None:
        self.in_features = in_features
        super().__init__(**kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Take this rank's inputs out of the file's bits."""
        self.data.copy_(bitmask_columns(loaded_weight, self.tp_rank * self.in_features, self.in_features))


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """A layer all of whose parts are packed in the checkpoint."""

    def __init__(self, parts: list[str], stored: Stored, report: LayerReport) -> None:
        self._parts, self._stored, self._report = parts, stored, report

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that the files are loaded into."""
        _create_stored(
            layer, self._parts, self._stored, sum(output_partition_sizes), input_size_per_partition, input_size,
            params_dtype, extra_weight_attrs["weight_loader"],
        )  # fmt: skip

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Pack, and let go of what was loaded."""
        _refuse_offloading(layer, layer.compressed)
        compressed, bitmask = layer.compressed.data, layer.bitmask.data
        if not bool(bitmask.any()):
            raise CheckpointError(
                f"{layer.prefix}: no bits of it were loaded; the checkpoint lacks them, or vLLM was told to make up "
                "weights (--load-format dummy), which packed layers cannot run on"
            )
        _check_values(layer, compressed)
        packed = ops.pack_bitmask(compressed, bitmask, layer.bitmask.in_features, name=layer.prefix)
        _drop(layer, *STORED)
        _hold_packed(layer, packed, self._report)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + bias``, x ``[..., inputs]`` of this rank."""
        return _multiply(layer, x, bias)


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """A layer that the checkpoint holds dense, and that stays so."""

    cause = "the checkpoint holds them dense"

    def __init__(self, report: LayerReport) -> None:
        super().__init__()
        self._report = report

    def create_weights(self, layer: Layer, *arguments: Any, **extra_weight_attrs: Any) -> None:
        """Make the weight, as no number."""
        super().create_weights(layer, *arguments, **extra_weight_attrs)
        layer.weight.data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Check that it is complete."""
        _check_values(layer, layer.weight.data)
        super().process_weights_after_loading(layer)
        self._report.add_dense(layer.prefix, self.cause)


@register_weight_loader_v2_supported_method
class UnpackingLinearMethod(DenseLinearMethod):
    """A joined layer of which some parts are packed and others dense: it is loaded as it is and runs dense."""

    cause = "the checkpoint holds only some of their joined parts packed"

    def __init__(self, parts: list[str], stored: Stored, report: LayerReport) -> None:
        super().__init__(report)
        self._parts, self._stored = parts, stored
        self._outputs: list[int] = []

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the dense weight, and beside it what packed parts are loaded into."""
        self._outputs = list(output_partition_sizes)
        _create_stored(
            layer, self._parts, self._stored, sum(output_partition_sizes), input_size_per_partition, input_size,
            params_dtype, extra_weight_attrs["weight_loader"],
        )  # fmt: skip
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Unpack the packed parts into the dense weight."""
        ends = list(itertools.accumulate(self._outputs))
        for part, begin, end in zip(self._parts, [0, *ends], ends, strict=False):
            if part in self._stored:
                rows = slice(begin, end)
                compressed, bitmask = layer.compressed.data[rows], layer.bitmask.data[rows]
                shape = (end - begin, layer.bitmask.in_features)
                layer.weight.data[rows] = dense_from_bitmask(compressed, bitmask, shape, part)
        _drop(layer, *STORED)
        super().process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class PackingLinearMethod(DenseLinearMethod):
    """A dense layer that is packed once it is loaded, if its zeros are 2:4."""

    cause = "some of their groups of four inputs keep three or four values"

    def __init__(self, report: LayerReport) -> None:
        super().__init__(report)
        self._packed = False

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Pack what can be packed."""
        weight = layer.weight.data
        _check_values(layer, weight)
        if weight.shape[1] % 4:
            self.cause = "their inputs, or those of a rank, are no multiple of 4"
            super().process_weights_after_loading(layer)
            return
        packed, _ = ops.pack_if_24(weight, name=layer.prefix)
        if packed is None:
            super().process_weights_after_loading(layer)
            return
        _refuse_offloading(layer, layer.weight)
        del weight
        _drop(layer, "weight")
        _hold_packed(layer, packed, self._report)
        self._packed = True

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y = x W^T + bias``, x ``[..., inputs]`` of this rank."""
        if self._packed:
            return _multiply(layer, x, bias)
        y: Tensor = super().apply(layer, x, bias)
        return y


def _create_stored(
    layer: Layer,
    parts: list[str],
    stored: Stored,
    outputs: int,
    inputs: int,
    all_inputs: int,
    dtype: torch.dtype,
    weight_loader: Any,
) -> None:
    """Parameters named as in our format: ``outputs`` and ``inputs`` of this rank, ``all_inputs`` of the whole layer."""
    if inputs % 4:
        raise UnsupportedError(
            f"{layer.prefix}: {all_inputs} inputs shared among {all_inputs // inputs} GPUs are {inputs} each, no "
            "multiple of 4, so groups would be cut apart; choose another tensor_parallel_size"
        )
    shards = _outputs_of_shards(layer, len(parts))
    expected = {}
    for part, (shard, rows) in zip(parts, shards.items(), strict=True):
        if part in stored:
            if stored[part] != (rows, all_inputs):
                raise CheckpointError(
                    f"{part}: is stored for a weight {list(stored[part])}, the model's is {[rows, all_inputs]}; the "
                    "checkpoint is of another model"
                )
            expected[shard] = (part, stored[part])
    common = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
    compressed = torch.full((outputs, inputs // 2), float("nan"), dtype=dtype)
    bitmask = torch.zeros((outputs, -(-inputs // 8)), dtype=torch.uint8)
    layer.register_parameter("compressed", ModelWeightParameter(data=compressed, **common))
    layer.register_parameter("bitmask", BitmaskParameter(data=bitmask, in_features=inputs, **common))
    shape = nn.Parameter(torch.zeros((2, 1), dtype=torch.int64), requires_grad=False)
    shape.expected = expected  # type: ignore[attr-defined]
    shape.weight_loader = _load_shape  # type: ignore[attr-defined]
    layer.register_parameter("shape", shape)


def _outputs_of_shards(layer: Layer, num_parts: int) -> dict[Any, int]:
    """Rows in the files of each part of a layer, all ranks together, by the name that vLLM loads it under."""
    rows: dict[Any, int] = {None: layer.output_size}
    if isinstance(layer, QKVParallelLinear):
        # not output_sizes: with more ranks than key/value heads these count copies of heads
        queries, keys = layer.total_num_heads * layer.head_size, layer.total_num_kv_heads * layer.head_size
        rows = {"q": queries, "k": keys, "v": layer.total_num_kv_heads * layer.v_head_size}
    elif isinstance(layer, MergedColumnParallelLinear):
        rows = dict(enumerate(layer.output_sizes))
    if num_parts == 1:
        return {None: sum(rows.values())}
    if num_parts != len(rows):
        raise UnsupportedError(
            f"{layer.prefix}: vLLM joins {num_parts} linears in a {type(layer).__name__} of {len(rows)} parts, which "
            "sparsert cannot load packed; write the checkpoint dense: sparsert convert DIR OUT --to dense"
        )
    return rows


def _load_shape(param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
    """Weight loader of ``shape``: held against the sizes of the other parts, and of no further use."""
    name, sizes = param.expected[loaded_shard_id]
    checked_shape(sizes, loaded_weight, name)
    param.data.copy_(loaded_weight.reshape(2, 1))


def _check_values(layer: Layer, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{layer.prefix}: holds values that are NaN or infinite; the checkpoint is damaged or lacks tensors of it, "
            "fetch it again"
        )


def _refuse_offloading(layer: Layer, parameter: Any) -> None:
    if getattr(parameter, "_vllm_is_uva_offloaded", False):
        raise UnsupportedError(
            f"{layer.prefix}: packed layers cannot be offloaded to the host; leave out --cpu-offload-gb, or name other "
            "parameters in --cpu-offload-params"
        )


def _drop(layer: Layer, *names: str) -> None:
    for name in names:
        delattr(layer, name)


def _hold_packed(layer: Layer, packed: Packed24, report: LayerReport) -> None:
    layer.weight_packed = nn.Parameter(packed.values, requires_grad=False)
    layer.weight_metadata = nn.Parameter(packed.metadata, requires_grad=False)
    layer.packed_outputs, layer.packed_inputs = packed.out_features, packed.in_features
    dense_bytes = packed.out_features * packed.in_features * packed.dtype.itemsize
    report.add_packed(layer.prefix, packed.values.nbytes + packed.metadata.nbytes, dense_bytes)


def _multiply(layer: Layer, x: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.sparsert.linear24(
        x, layer.weight_packed, layer.weight_metadata, bias, layer.packed_outputs, layer.packed_inputs
    )
    return y
