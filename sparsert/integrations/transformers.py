"""transformers: our checkpoints load through ``AutoModelForCausalLM.from_pretrained``, and save again.

    import sparsert
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("DIR", device_map="cuda")      # quant_method: sparsert
    model.generate(**inputs, cache_implementation="static")
    model.save_pretrained("COPY")                                               # the same bytes

A dense checkpoint whose weights have 2:4 zeros is packed while loading, and saved in our format:

    AutoModelForCausalLM.from_pretrained("DENSE", quantization_config=SparsertConfig())

The model is transformers' own, with ``SparseLinear`` in place of the packed linears, so pipelines, ``torch.compile``,
static caches and peft work on it. What it gives up beside ``sparsert.LLM``: projections are not joined, norms and
activations are not fused, and generation is transformers' own loop.

Which layers are packed is read from the names in the files, not guessed from the configuration: a packed tensor that
the model has no layer for is an error, where transformers would go on with random weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsert.checkpoint.quantization import FORMAT_VERSION, QUANT_METHOD
from sparsert.checkpoint.stored import BITMASK_24 as FORMAT
from sparsert.errors import CheckpointError, SparsityError, UnsupportedError
from sparsert.integrations.stored_layers import is_stored, pack_stored_, stored_layer, stored_names, stored_state
from sparsert.nn import SparseLinear, SparsifyReport, sparsify_

_NAMES_SHOWN = 4


class SparsertConfig(QuantizationConfigMixin):
    """``quantization_config`` of our checkpoints.

    Args:
        version: of the format on disk.
        format: how packed weights are stored.
        ignore: names of linears that are dense.
        backend: kernels of the packed layers, see :class:`sparsert.SparseLinear`; not stored.
        fields: everything else that the record holds, e.g. ``provenance``; kept as it is.

    Raises:
        UnsupportedError: a later version, or another format.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        format: str = FORMAT,
        ignore: Sequence[str] = (),
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        if version not in range(1, FORMAT_VERSION + 1) or format != FORMAT:
            raise UnsupportedError(
                f"quantization_config says format {format!r}, version {version!r}; this sparsert reads {FORMAT!r} up "
                f"to version {FORMAT_VERSION}: update it"
            )
        self.quant_method = QUANT_METHOD
        self.version, self.format, self.ignore, self.backend = version, format, list(ignore), backend
        fields.pop("quant_method", None)
        self.fields = {"sparsity_structure": "2:4", "targets": ["Linear"], **fields}

    def to_dict(self) -> dict[str, Any]:
        """The record as ``config.json`` holds it."""
        own = {name: getattr(self, name) for name in ("quant_method", "format", "version", "ignore")}
        return copy.deepcopy({**own, **self.fields})


class SparsertHfQuantizer(HfQuantizer):
    """Puts packed layers into a model that transformers loads, and takes them out again for saving.

    Attributes:
        report: what was packed and what not, if the checkpoint was dense; else None.
    """

    requires_calibration = False
    quantization_config: SparsertConfig
    report: SparsifyReport | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            UnsupportedError: a device map that names the disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedError("device_map names the disk; packed layers cannot be offloaded, give GPUs or the CPU")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise UnsupportedError(
                "a sparsert checkpoint is read from safetensors files; give from_pretrained its directory or hub id"
            )
        modules = dict(model.named_modules())
        unknown = []
        for stored in stored_names(_tensor_names(checkpoint_files)):
            name = _module_name(stored, modules, model.base_model_prefix)
            if name is not None:
                layer = stored_layer(modules[name], name)
                layer.backend = self.quantization_config.backend
                model.set_submodule(name, layer)
            elif not _belongs_to_a_head(stored, model):
                unknown.append(stored)
        if unknown:
            more = f" and {len(unknown) - _NAMES_SHOWN} more" if len(unknown) > _NAMES_SHOWN else ""
            raise UnsupportedError(
                f"{len(unknown)} packed weights are for no nn.Linear of a {type(model).__name__}: "
                f"{', '.join(unknown[:_NAMES_SHOWN])}{more}; load it with the class it was saved from"
            )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, layer in model.named_modules():
            if is_stored(layer):
                pack_stored_(layer, name)
        if not self.pre_quantized:
            self._pack_dense(model)
        return model

    def _pack_dense(self, model: nn.Module) -> None:
        self.report = sparsify_(model, backend=self.quantization_config.backend)
        if not self.report.packed:
            raise SparsityError(
                "no linear of the model is 2:4, so there is nothing to pack; prune it first, e.g. with "
                "`sparsert prune`, or load it without SparsertConfig"
            )
        self.quantization_config.ignore = list(self.report.dense)
        if self.report.dense:
            warnings.warn(f"some linears stay dense: {self.report}", stacklevel=2)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save_pretrained`` writes: the tensors of our format."""
        return stored_state(model), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, SparseLinear):
                model.set_submodule(name, layer.to_linear().to(dtype).train(layer.training))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train; the packed weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know ``quant_method: sparsert``. ``import sparsert`` does it; calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparsertConfig)
        register_quantizer(QUANT_METHOD)(SparsertHfQuantizer)


def _tensor_names(files: Sequence[str]) -> list[str]:
    from safetensors import SafetensorError, safe_open

    names: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); copy or download it again") from error
    return names


def _module_name(stored: str, modules: dict[str, nn.Module], prefix: str) -> str | None:
    """The model's name for a stored layer: a checkpoint of a model with a head, or of one without, fits the other."""
    for name in (stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"):
        if type(modules.get(name)) is nn.Linear:
            return name
    return None


def _belongs_to_a_head(stored: str, model: Any) -> bool:
    """Whether a stored layer lies outside the base model, and the base model alone is loaded."""
    prefix = model.base_model_prefix
    return bool(prefix) and not hasattr(model, prefix) and not stored.startswith(f"{prefix}.")
