"""The few classes of vLLM that the plugin uses, enough to load and run single layers where vLLM is not installed.

They behave as vLLM 0.24's do when weights are made, shared among ranks and loaded, and leave out everything else. Where
vLLM is installed the tests use its own classes: what holds of one has to hold of the other.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

INSTALLED = importlib.util.find_spec("vllm") is not None

_OURS = ("vllm", "vllm_layers", "vllm_report")
_WITH_RANKS = ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter")


def import_plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``sparsert.integrations.vllm`` on vLLM or its stand-in; forgotten again when the test module is done."""
    import sparsert.integrations

    for name in _OURS:
        # set and deleted, so that what is imported now is gone when the patch is undone
        monkeypatch.setitem(sys.modules, f"sparsert.integrations.{name}", None)
        del sys.modules[f"sparsert.integrations.{name}"]
        monkeypatch.setattr(sparsert.integrations, name, None, raising=False)
        delattr(sparsert.integrations, name)
    if not INSTALLED:
        for name, module in _modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    import sparsert.integrations.vllm as plugin

    return plugin


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Layers made inside belong to one of several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _WITH_RANKS:
            patch.setattr(sys.modules[name], "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(sys.modules[name], "get_tensor_model_parallel_world_size", lambda: size)
        yield


def _modules() -> dict[str, ModuleType]:
    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(content)
        return made

    ranks = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
    methods: dict[str, type] = {}

    def register_quantization_config(name: str) -> Callable[[type], type]:
        def register(cls: type) -> type:
            methods[name] = cls
            return cls

        return register

    layers = "vllm.model_executor.layers"
    made = [
        module("vllm", __version__="0.24.0", __path__=[]),
        module("vllm.logger", init_logger=_init_logger),
        module("vllm.transformers_utils", __path__=[]),
        module("vllm.transformers_utils.config", get_safetensors_params_metadata=_metadata),
        module("vllm.model_executor", __path__=[]),
        module("vllm.model_executor.parameter", ModelWeightParameter=ModelWeightParameter, **ranks),
        module(layers, __path__=[]),
        module(
            f"{layers}.linear",
            **{cls.__name__: cls for cls in (LinearBase, LinearMethodBase, UnquantizedLinearMethod, *LAYERS)},
            register_weight_loader_v2_supported_method=_register,
            **ranks,
        ),
        module(
            f"{layers}.quantization",
            __path__=[],
            register_quantization_config=register_quantization_config,
            get_quantization_config=methods.__getitem__,
        ),
        module(
            f"{layers}.quantization.base_config",
            QuantizationConfig=QuantizationConfig,
            QuantizeMethodBase=QuantizeMethodBase,
        ),
    ]
    return {module.__name__: module for module in made}


def _init_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(name)
    logger.warning_once = logger.warning  # type: ignore[attr-defined]
    return logger


def _metadata(model: str, *, revision: str | None = None) -> dict[str, Any]:
    found = {}
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118, it is no dict
                part = content.get_slice(name)
                found[name] = {"dtype": part.get_dtype(), "shape": part.get_shape()}
    return found


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class QuantizeMethodBase:
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=extra["weight_loader"])
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class ModelWeightParameter(nn.Parameter):
    def __new__(cls, data: Tensor, **_: Any) -> Any:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, *, data: Tensor, input_dim: int, output_dim: int, weight_loader: Any) -> None:
        assert (input_dim, output_dim) == (1, 0)
        self.output_dim, self.weight_loader = output_dim, weight_loader
        self.tp_rank = sys.modules["vllm.model_executor.parameter"].get_tensor_model_parallel_rank()

    def _take(self, room: Tensor, loaded: Tensor, dim: int, rank: int) -> None:
        size = room.shape[dim]
        loaded = loaded.narrow(dim, rank * size, size)
        assert room.shape == loaded.shape
        room.copy_(loaded)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._take(self.data, loaded_weight, 0, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._take(self.data, loaded_weight, 1, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight: Tensor, *, shard_offset: int, shard_size: int, **_: Any) -> None:
        self._take(self.data.narrow(0, shard_offset, shard_size), loaded_weight, 0, self.tp_rank)

    def load_qkv_weight(
        self, loaded_weight: Tensor, *, num_heads: int, shard_id: str, shard_offset: int, shard_size: int, **_: Any
    ) -> None:
        rank = self.tp_rank if shard_id == "q" else self.tp_rank // num_heads
        self._take(self.data.narrow(0, shard_offset, shard_size), loaded_weight, 0, rank)


_WITH_LOADER_V2 = ["UnquantizedLinearMethod"]


def _register(cls: type) -> type:
    _WITH_LOADER_V2.append(cls.__name__)
    return cls


class LinearBase(nn.Module):
    def _build(
        self, inputs: int, outputs: list[int], bias: bool, params_dtype: torch.dtype, quant_config: Any, prefix: str
    ) -> None:
        """``inputs`` and ``outputs`` of this rank."""
        self.prefix, self.output_partition_sizes = prefix, outputs
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert type(self.quant_method).__name__ in _WITH_LOADER_V2
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=inputs, output_partition_sizes=outputs, input_size=self.input_size,
            output_size=self.output_size, params_dtype=params_dtype, weight_loader=self.weight_loader_v2,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(sum(outputs), dtype=params_dtype)) if bias else None

    def _ranks(self) -> tuple[int, int]:
        module = sys.modules["vllm.model_executor.layers.linear"]
        return module.get_tensor_model_parallel_rank(), module.get_tensor_model_parallel_world_size()


class ColumnParallelLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, params_dtype: Any, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.tp_rank, self.tp_size = self._ranks()
        whole = getattr(self, "output_sizes", [output_size])
        self._build(input_size, [size // self.tp_size for size in whole], bias, params_dtype, quant_config, prefix)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        param.load_column_parallel_weight(loaded_weight=loaded_weight)


class RowParallelLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, params_dtype: Any, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.tp_rank, self.tp_size = self._ranks()
        self._build(input_size // self.tp_size, [output_size], bias, params_dtype, quant_config, prefix)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        param.load_row_parallel_weight(loaded_weight=loaded_weight)


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, **options: Any) -> None:
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, **options)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor, loaded_shard_id: int | None = None) -> None:
        if loaded_shard_id is None:
            for index, part in enumerate(loaded_weight.split(self.output_sizes, param.output_dim)):
                self.weight_loader_v2(param, part, index)
            return
        offset = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size
        size = self.output_sizes[loaded_shard_id] // self.tp_size
        param.load_merged_column_weight(loaded_weight=loaded_weight, shard_offset=offset, shard_size=size)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = True,
        **options: Any,
    ) -> None:
        size = self._ranks()[1]
        heads, kv_heads = total_num_heads // size, max(1, total_num_kv_heads // size)
        self.head_size = self.v_head_size = head_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, total_num_kv_heads
        self.replicas = max(1, size // total_num_kv_heads)
        self.rows = {"q": heads * head_size, "k": kv_heads * head_size, "v": kv_heads * head_size}
        self.output_sizes = [rows * size for rows in self.rows.values()]
        super().__init__(hidden_size, sum(self.output_sizes), bias, **options)

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor, loaded_shard_id: str | None = None) -> None:
        if loaded_shard_id is None:
            heads = (self.total_num_heads, self.total_num_kv_heads, self.total_num_kv_heads)
            parts = loaded_weight.split([count * self.head_size for count in heads], param.output_dim)
            for shard, part in zip("qkv", parts, strict=True):
                self.weight_loader_v2(param, part, shard)
            return
        offset = sum(self.rows[shard] for shard in "qkv"[: "qkv".index(loaded_shard_id)])
        param.load_qkv_weight(
            loaded_weight=loaded_weight, num_heads=self.replicas, shard_id=loaded_shard_id, shard_offset=offset,
            shard_size=self.rows[loaded_shard_id],
        )  # fmt: skip


LAYERS = (ColumnParallelLinear, RowParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
