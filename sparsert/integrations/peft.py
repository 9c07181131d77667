"""peft: LoRA on frozen 2:4 linears, and a merge that keeps them 2:4.

    from peft import LoraConfig, get_peft_model
    from sparsert.integrations.peft import merge_masked, support_sparse_linears

    config = support_sparse_linears(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), model)
    peft_model = get_peft_model(model, config)
    ...                                               # train as usual
    model, report = merge_masked(peft_model)          # 2:4 again; the report says what the mask cut off

The gradient runs through the packed weight: it is unpacked for one product in the backward pass and let go of, so
training keeps no dense copy. A LoRA update B A is dense, so merging it must drop what falls outside the mask:
W + mask * (B A). That part may be large, and only what it does to the model's quality decides whether to merge at all;
peft's own ``merge`` promises an exact result, so here it is refused.

What it gives up: variants of LoRA that read or change the base weight (DoRA, PiSSA, OLoRA, ...).

Source: peft's experimental registry of custom LoRA layers (``LoraConfig._register_custom_module``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from sparsert import ops
from sparsert.errors import InputError, UnsupportedError
from sparsert.formats import packed_mask
from sparsert.nn import SparseLinear

#: Initial values that leave the base weight as it is.
_PLAIN_INITIAL_VALUES = (True, False, "gaussian", "orthogonal", "eva")


class SparseLoraLinear(LoraLinear):
    """A LoRA adapter on a :class:`sparsert.SparseLinear`. Made by peft, see :func:`support_sparse_linears`."""

    def update_layer(self, adapter_name: str, *arguments: Any, config: LoraConfig, **options: Any) -> None:
        """Add an adapter.

        Raises:
            UnsupportedError: the configuration asks for a variant that reads or changes the base weight.
        """
        if config.init_lora_weights not in _PLAIN_INITIAL_VALUES:
            raise UnsupportedError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, which is packed and frozen; "
                f"choose one of {', '.join(map(repr, _PLAIN_INITIAL_VALUES))}"
            )
        variant = self.resolve_lora_variant(config=config)
        if variant is not None:
            raise UnsupportedError(f"{type(variant).__name__} is not supported on 2:4 layers; use plain LoRA")
        super().update_layer(adapter_name, *arguments, config=config, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # asked by peft, which knows its own list of layers and warns of others
        assert isinstance(module, SparseLinear)
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see :func:`merge_masked`."""
        raise UnsupportedError(
            "a LoRA update is dense, so merging it into a 2:4 weight drops what falls outside the mask; call "
            "sparsert.integrations.peft.merge_masked(model), which does it and reports what was lost"
        )

    def unmerge(self) -> None:
        """Refused: nothing was ever merged that could be taken out."""
        raise UnsupportedError("updates are not merged into 2:4 layers, so there is nothing to take out")


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_masked` cut off.

    Attributes:
        lost: layer -> norm of the update outside the mask / norm of the update, 0 to 1; 0 if the update is zero.
        total: the same over all layers together.
        dense: layers merged without loss because they are dense.
    """

    lost: Mapping[str, float]
    total: float
    dense: tuple[str, ...]

    def __str__(self) -> str:
        worst = sorted(self.lost.items(), key=lambda entry: -entry[1])[:5]
        lines = [
            f"{len(self.lost)} 2:4 layers merged, {self.total:.1%} of the update's norm lost outside the masks; "
            f"{len(self.dense)} dense layers merged whole"
        ]
        return "\n".join(lines + [f"  {share:.1%} {name}" for name, share in worst])


def support_sparse_linears(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Let a LoRA configuration apply to 2:4 layers; needed for each one that is made or read.

    Args:
        config: changed in place.
        model: needed for ``target_modules="all-linear"`` only, which peft would take to mean ``nn.Linear``.

    Returns:
        The same configuration.

    Raises:
        InputError: ``all-linear`` without a model.
    """
    config._register_custom_module({SparseLinear: SparseLoraLinear})
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if model is None:
            raise InputError('target_modules="all-linear" needs the model: support_sparse_linears(config, model)')
        output_embeddings: Any = getattr(model, "get_output_embeddings", None)
        head = output_embeddings() if output_embeddings is not None else None
        config.target_modules = {
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, SparseLinear)) and module is not head
        }
    return config


def merge_masked(model: PeftModel, adapter_names: list[str] | None = None) -> tuple[nn.Module, MergeReport]:
    """Merge LoRA adapters into their layers, 2:4 layers under their masks, and take the adapters out.

    A mask is what the packed weight stores: two positions of every group, also where fewer values are not zero, so such
    a spare position may take a value.

    Args:
        model: with LoRA adapters; changed, use what is returned instead.
        adapter_names: which to merge, default those that are active.

    Returns:
        (the model without adapters, what was lost).

    Raises:
        InputError: no peft model, or an adapter whose update is not finite; then nothing is changed.
        UnsupportedError: an adapter has a bias and a 2:4 layer none.
    """
    if not isinstance(model, PeftModel):
        raise InputError(f"merge_masked takes the model that get_peft_model returned, not a {type(model).__name__}")
    base = model.get_base_model()
    adapted = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)]
    sparse = [(name, layer) for name, layer in adapted if isinstance(layer, SparseLoraLinear)]
    for name, layer in sparse:
        _check_mergeable(name, layer, adapter_names)
    lost: dict[str, float] = {}
    outside = whole = 0.0
    with torch.no_grad():
        for name, layer in sparse:
            layer_outside, layer_whole = _merge_(layer, adapter_names)
            lost[name] = layer_outside / layer_whole if layer_whole else 0.0
            outside, whole = math.hypot(outside, layer_outside), math.hypot(whole, layer_whole)
        dense: list[tuple[str, Any]] = [entry for entry in adapted if not isinstance(entry[1], SparseLoraLinear)]
        for _, dense_layer in dense:
            dense_layer.merge(safe_merge=True, adapter_names=adapter_names)
    plain: nn.Module = model.base_model.unload()
    return plain, MergeReport(lost, outside / whole if whole else 0.0, tuple(name for name, _ in dense))


def _adapters(layer: SparseLoraLinear, adapter_names: list[str] | None) -> list[str]:
    return [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.lora_A]


def _check_mergeable(name: str, layer: SparseLoraLinear, adapter_names: list[str] | None) -> None:
    for adapter in _adapters(layer, adapter_names):
        if not all(bool(weight.isfinite().all()) for weight in _parameters(layer, adapter)):
            raise InputError(f"{name}: adapter {adapter!r} has values that are not finite; train it again")
        if layer.lora_bias[adapter] and layer.get_base_layer().bias is None:
            raise UnsupportedError(f"{name}: adapter {adapter!r} has a bias and the layer none; it cannot be merged")


def _merge_(layer: SparseLoraLinear, adapter_names: list[str] | None) -> tuple[float, float]:
    """Merge into one 2:4 layer; return the norms of the update outside the mask and of all of it."""
    base: SparseLinear = layer.get_base_layer()
    packed = base.packed()
    mask = packed_mask(packed)
    update = torch.zeros((base.out_features, base.in_features), dtype=torch.float32, device=packed.device)
    for adapter in _adapters(layer, adapter_names):
        update += layer.get_delta_weight(adapter).float()
        if layer.lora_bias[adapter]:
            assert base.bias is not None  # checked before anything was changed
            base.bias.data += layer.lora_B[adapter].bias * layer.scaling[adapter]
    merged: Tensor = (ops.unpack(packed).float() + update).to(packed.dtype)
    repacked = ops.pack(merged, mask)
    base.values, base.metadata = repacked.values, repacked.metadata
    return float(update[~mask].norm()), float(update.norm())


def _parameters(layer: SparseLoraLinear, adapter: str) -> list[Tensor]:
    return [*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()]
