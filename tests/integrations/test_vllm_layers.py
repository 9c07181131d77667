"""vLLM's layers with packed weights: joined, or shared among ranks, they are what slicing the dense weight gives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm_stand_in
from random_24 import random_24
from torch import Tensor

from sparsert.errors import CheckpointError, SparsertError, SparsityError, UnsupportedError
from sparsert.formats import bitmask_from_dense

PARTS = {
    "column": ["block.up_proj"],
    "row": ["block.down_proj"],
    "merged": ["block.gate_proj", "block.up_proj"],
    "qkv": ["block.q_proj", "block.k_proj", "block.v_proj"],
}
PREFIX = {"column": "block.up_proj", "row": "block.down_proj", "merged": "block.gate_up_proj", "qkv": "block.qkv_proj"}
SHARDS: dict[str, tuple[Any, ...]] = {"column": (), "row": (), "merged": (0, 1), "qkv": ("q", "k", "v")}
HEAD, HEADS, KV_HEADS = 12, 8, 2


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield vllm_stand_in.import_plugin(patch)


class Files:
    """Random parts of one layer and the tensors that stand for them in a checkpoint."""

    def __init__(self, kind: str, *, packed: bool | tuple[bool, ...] = True, inputs: int = 144, fused: bool = False):
        sizes = {
            "column": [40],
            "row": [20],
            "merged": [24, 24],
            "qkv": [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD],
        }
        self.kind, self.inputs = kind, inputs
        self.weights = [random_24(size, inputs, dtype=torch.bfloat16) for size in sizes[kind]]
        self.names = [PREFIX[kind]] if fused else PARTS[kind]
        self.shards: tuple[Any, ...] = (None,) if fused else SHARDS[kind] or (None,)
        stored = [torch.cat(self.weights)] if fused else self.weights
        self.is_packed = (packed,) * len(stored) if isinstance(packed, bool) else packed
        self.tensors = [
            bitmask_from_dense(weight) if wanted else {"weight": weight}
            for weight, wanted in zip(stored, self.is_packed, strict=True)
        ]
        self.sizes = {
            name: tuple(weight.shape)
            for name, weight, wanted in zip(self.names, stored, self.is_packed, strict=True)
            if wanted
        }

    def of_rank(self, rank: int, size: int) -> Tensor:
        """The dense weight of one rank."""
        if self.kind == "row":
            return self.weights[0].chunk(size, dim=1)[rank]
        parts = []
        for index, weight in enumerate(self.weights):
            copies = max(1, size // KV_HEADS) if self.kind == "qkv" and index else 1
            parts.append(weight.chunk(size // copies)[rank // copies])
        return torch.cat(parts)


def make_config(plugin: Any, files: Files, *, pack_dense: bool = False) -> Any:
    config = plugin.SparsertConfig(packed=not pack_dense)
    config.stored = dict(files.sizes)
    if len(files.names) > 1:
        own = PREFIX[files.kind].rpartition(".")[2]
        config.packed_modules_mapping = {own: [name.rpartition(".")[2] for name in files.names]}
    return config


def make_layer(config: Any, files: Files, rank: int = 0, size: int = 1, *, bias: bool = False) -> Any:
    from vllm.model_executor.layers import linear

    options: dict[str, Any] = {
        "bias": bias, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": PREFIX[files.kind],
    }  # fmt: skip
    outputs = [len(weight) for weight in files.weights]
    with vllm_stand_in.as_rank(rank, size):
        if files.kind == "column":
            return linear.ColumnParallelLinear(files.inputs, outputs[0], **options)
        if files.kind == "row":
            return linear.RowParallelLinear(files.inputs, outputs[0], **options)
        if files.kind == "merged":
            return linear.MergedColumnParallelLinear(files.inputs, outputs, **options)
        return linear.QKVParallelLinear(files.inputs, HEAD, HEADS, KV_HEADS, **options)


def load(layer: Any, files: Files, *, without: tuple[str, ...] = ()) -> None:
    """As vLLM's model classes do: every tensor of the files to the loader of its parameter."""
    for shard, tensors in zip(files.shards, files.tensors, strict=True):
        for name, tensor in tensors.items():
            if name not in without:
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def finish(layer: Any) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def loaded(plugin: Any, files: Files, rank: int = 0, size: int = 1, **options: Any) -> Any:
    layer = make_layer(make_config(plugin, files, **options), files, rank, size)
    load(layer, files)
    finish(layer)
    return layer


def dense_of(layer: Any) -> Tensor:
    """The weight that a packed layer holds."""
    assert not hasattr(layer, "weight")
    weight: Tensor = torch.ops.sparsert.unpack24(
        layer.weight_packed, layer.weight_metadata, layer.packed_outputs, layer.packed_inputs
    )
    return weight


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "inputs", "fused"),
    [
        ("column", 144, False),
        ("column", 36, False),
        ("row", 144, False),  # 36 inputs a rank among four: a rank begins in the middle of a byte
        ("row", 48, False),
        ("row", 80, False),
        ("merged", 100, False),
        ("merged", 100, True),
        ("qkv", 132, False),  # among four ranks, each pair of them holds the same key and value head
        ("qkv", 132, True),
    ],
)
def test_ranks_hold_slices_of_the_dense_weight(plugin: Any, kind: str, inputs: int, fused: bool, size: int) -> None:
    files = Files(kind, inputs=inputs, fused=fused)
    for rank in range(size):
        layer = loaded(plugin, files, rank, size)
        assert torch.equal(dense_of(layer), files.of_rank(rank, size)), rank
        assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "weight_metadata"}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_products(plugin: Any, kind: str, rows: int) -> None:
    """Two ranks together compute what one dense layer does, within twice its rounding."""
    files = Files(kind, inputs=136)
    x = torch.randn(rows, 136).bfloat16()
    ours = []
    for rank in range(2):
        layer = loaded(plugin, files, rank, 2)
        part = x.chunk(2, dim=1)[rank] if kind == "row" else x
        bias = torch.randn(layer.packed_outputs).bfloat16()
        y = layer.quant_method.apply(layer, part, bias)
        exact = part.double() @ files.of_rank(rank, 2).double().T + bias.double()
        error = (torch.nn.functional.linear(part, files.of_rank(rank, 2), bias).double() - exact).abs().max()
        assert y.shape == exact.shape and y.dtype == x.dtype
        assert (y.double() - exact).abs().max() <= 2 * error
        ours.append(layer.quant_method.apply(layer, part[None, :, :], None)[0].double())
    together = sum(ours) if kind == "row" else None
    if together is not None:
        exact = x.double() @ files.weights[0].double().T
        assert (together - exact).abs().max() <= 0.02 * exact.abs().max()


def test_the_product_compiles_whole(plugin: Any) -> None:
    """Without a graph break, and for any number of rows, as vLLM compiles it."""
    layer = loaded(plugin, Files("merged", inputs=128))

    def double(x: Tensor) -> Tensor:
        return 2 * layer.quant_method.apply(layer, x, None)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (2, 5, 17):
            x = torch.randn(rows, 128).bfloat16()
            assert torch.equal(compiled(x), double(x))


def test_nothing_is_kept_twice(plugin: Any) -> None:
    files = Files("qkv", inputs=256)
    layer = make_layer(make_config(plugin, files), files)
    raw = [weakref.ref(getattr(layer, name)) for name in ("compressed", "bitmask", "shape")]
    load(layer, files)
    finish(layer)
    gc.collect()
    assert [reference() for reference in raw] == [None] * 3
    dense = layer.packed_outputs * layer.packed_inputs * 2
    assert sum(parameter.nbytes for parameter in layer.parameters()) == dense * 9 // 16
    report = layer.quant_method._report
    assert (report.outstanding, report.packed_bytes, report.dense_bytes) == (0, dense * 9 // 16, dense)


def test_the_names_adapters_look_for(plugin: Any) -> None:
    """vLLM puts an adapter where ``weight_packed`` is, and asks the method for the product."""
    layer = loaded(plugin, Files("column"))
    assert layer.weight_packed.device == layer.weight_metadata.device and not layer.weight_packed.requires_grad
    utils = pytest.importorskip("vllm.lora.layers.utils") if vllm_stand_in.INSTALLED else None
    if utils is not None:
        assert utils._get_lora_device(layer) == layer.weight_packed.device


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("packed", [(True, True, False), (False, True, False)])
def test_partly_packed_parts_run_dense(plugin: Any, packed: tuple[bool, ...], size: int) -> None:
    files = Files("qkv", packed=packed)
    for rank in range(size):
        layer = loaded(plugin, files, rank, size)
        assert torch.equal(layer.weight.data, files.of_rank(rank, size))
        assert {name for name, _ in layer.named_parameters()} == {"weight"}
        x = torch.randn(3, files.inputs).bfloat16()
        expected = torch.nn.functional.linear(x, files.of_rank(rank, size))
        assert torch.equal(layer.quant_method.apply(layer, x, None), expected)
        assert "only some of their joined parts packed: block.qkv_proj" in layer.quant_method._report.lines()[1]


@pytest.mark.parametrize("kind", PARTS)
def test_layers_stored_dense_stay_dense(plugin: Any, kind: str) -> None:
    """In a packed checkpoint, even if their zeros would be 2:4: the checkpoint says so."""
    files = Files(kind, packed=False)
    layer = loaded(plugin, files, 1, 2)
    assert torch.equal(layer.weight.data, files.of_rank(1, 2))
    assert layer.quant_method._report.lines() == [
        "sparsert: 0 linear layers run 2:4 packed, 0.000 GB instead of 0.000 GB",
        f"sparsert: 1 linear layers run dense, because the checkpoint holds them dense: {PREFIX[kind]}",
    ]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("size", [1, 2])
def test_dense_weights_are_packed_if_they_are_2_of_4(plugin: Any, kind: str, size: int) -> None:
    files = Files(kind, packed=False)
    for rank in range(size):
        layer = loaded(plugin, files, rank, size, pack_dense=True)
        assert torch.equal(dense_of(layer), files.of_rank(rank, size))
        assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "weight_metadata"}
        x = torch.randn(2, layer.packed_inputs).bfloat16()
        exact = x.double() @ files.of_rank(rank, size).double().T
        assert (layer.quant_method.apply(layer, x, None).double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("kind", "inputs", "size", "cause"),
    [
        ("merged", 144, 1, "some of their groups of four inputs keep three or four values"),
        ("row", 104, 4, "their inputs, or those of a rank, are no multiple of 4"),
    ],
)
def test_dense_weights_that_cannot_be_packed(plugin: Any, kind: str, inputs: int, size: int, cause: str) -> None:
    files = Files(kind, packed=False, inputs=inputs)
    if size == 1:
        files.weights[1][3, 8:11] = 1.0
    layer = loaded(plugin, files, 0, size, pack_dense=True)
    assert torch.equal(layer.weight.data, files.of_rank(0, size))
    x = torch.randn(2, inputs // size).bfloat16()
    expected = torch.nn.functional.linear(x, files.of_rank(0, size))
    assert torch.equal(layer.quant_method.apply(layer, x, None), expected)
    assert f"because {cause}: {PREFIX[kind]}" in layer.quant_method._report.lines()[1]


def test_groups_cut_apart_are_refused(plugin: Any) -> None:
    files = Files("row", inputs=104)
    with pytest.raises(
        UnsupportedError, match=r"block\.down_proj: 104 inputs shared among 4 GPUs are 26 each, no mult"
    ):
        make_layer(make_config(plugin, files), files, 0, 4)
    assert make_layer(make_config(plugin, files), files, 1, 2).bitmask.shape == (20, 7)


@pytest.mark.parametrize(
    ("kind", "without", "error", "message"),
    [
        ("qkv", ("compressed",), CheckpointError, r"block\.qkv_proj: holds values that are NaN .* lacks tensors of it"),
        ("row", ("bitmask",), CheckpointError, r"block\.down_proj: no bits of it were loaded.*--load-format dummy"),
        ("merged", ("weight",), CheckpointError, r"block\.gate_up_proj: holds values that are NaN"),
    ],
)
def test_tensors_that_never_came(
    plugin: Any, kind: str, without: tuple[str, ...], error: type[SparsertError], message: str
) -> None:
    """vLLM does not look whether quantized weights are complete."""
    files = Files(kind, packed="weight" not in without)
    layer = make_layer(make_config(plugin, files), files)
    load(layer, files, without=without)
    with pytest.raises(error, match=message):
        finish(layer)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("compressed", CheckpointError, "lacks tensors of it"),
        ("bitmask", SparsityError, r"first in row 120, columns 0-3"),
    ],
)
def test_one_part_of_three_is_missing(plugin: Any, name: str, error: type[SparsertError], message: str) -> None:
    files = Files("qkv")
    layer = make_layer(make_config(plugin, files), files)
    del files.tensors[2][name]
    load(layer, files)
    with pytest.raises(error, match=message):
        finish(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_damaged_values_are_refused(plugin: Any, value: float) -> None:
    files = Files("column")
    files.tensors[0]["compressed"][7, 5] = value
    layer = make_layer(make_config(plugin, files), files)
    load(layer, files)
    with pytest.raises(CheckpointError, match=r"block\.up_proj: holds values that are NaN or infinite"):
        finish(layer)


def test_damaged_bits_are_refused(plugin: Any) -> None:
    files = Files("row")
    files.tensors[0]["bitmask"][3, 2] ^= 0x10
    layer = make_layer(make_config(plugin, files), files)
    load(layer, files)
    with pytest.raises(SparsityError, match=r"block\.down_proj: 1 groups of the bitmask .* row 3, columns 20-23"):
        finish(layer)


def test_a_shape_that_says_something_else_is_refused(plugin: Any) -> None:
    files = Files("qkv")
    files.tensors[1]["shape"][0] += 1
    layer = make_layer(make_config(plugin, files), files)
    with pytest.raises(SparsertError, match=r"block\.k_proj: the part 'shape' says \[25, 144\], .* \[24, 144\]"):
        load(layer, files)


@pytest.mark.parametrize(("kind", "name"), [("merged", "block.up_proj"), ("qkv", "block.v_proj")])
def test_a_checkpoint_of_another_model_is_refused(plugin: Any, kind: str, name: str) -> None:
    """vLLM's own loaders would take the first rows of a weight that is too long."""
    files = Files(kind)
    rows, columns = files.sizes[name]
    files.sizes[name] = (rows + 8, columns)
    with pytest.raises(CheckpointError, match=rf"{name}: is stored for a weight \[{rows + 8}, 144\], the model's is"):
        make_layer(make_config(plugin, files), files)


def test_unknown_joined_layers_are_refused(plugin: Any) -> None:
    files = Files("merged")
    config = make_config(plugin, files)
    config.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj", "other_proj"]
    config.stored["block.other_proj"] = (8, 144)
    with pytest.raises(UnsupportedError, match="vLLM joins 3 linears in a MergedColumnParallelLinear of 2 parts"):
        make_layer(config, files)


def test_offloaded_layers_are_refused(plugin: Any) -> None:
    files = Files("column")
    layer = make_layer(make_config(plugin, files), files)
    load(layer, files)
    layer.compressed._vllm_is_uva_offloaded = True
    with pytest.raises(UnsupportedError, match=r"block\.up_proj: packed layers cannot be offloaded.*--cpu-offload-gb"):
        finish(layer)
