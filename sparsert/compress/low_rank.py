"""LoRA on pruned transformers models, through peft, with updates that stay under 2:4 masks.

A plain LoRA update B A is dense. Trained dense and cut to the mask when it is merged, it loses what fell outside, and
the model that was trained is not the one that is saved. Here layers under a mask compute

    y = W x + s (M * (B A)) x

from the first step on, so what is trained is what is merged, to the bit of a rounding, and the zeros stay zeros. The
product B A is formed for that: as large as the weight and far cheaper than the layer over a batch of text. Dense layers
use peft's own.

Merging rounds once: W + s (M * (B A)) is summed in float32 and stored in the weight's dtype. What it gives up: DoRA and
other variants on masked layers. Packed layers (:class:`sparsert.SparseLinear`), which hold no dense weight, have an
adapter of their own in :mod:`sparsert.integrations.peft`.

Source: Hu et al., "LoRA" (arXiv 2106.09685); peft's experimental registry of custom layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.keep_zeros import masks_of
from sparsert.errors import InputError

_ADAPTER = "default"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter.

    Attributes:
        rank: inner width of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: of the update's input while training, 0 to 1.
        targets: last parts of the names of linear layers, such as ``q_proj``; empty: all of the blocks.

    Raises:
        InputError: a value out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise InputError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be in [0, 1)")


class MaskedLoraLinear(LoraLinear):
    """A LoRA adapter on a linear layer that may have a 2:4 mask; made by peft, see :func:`add_lora`."""

    #: bool ``[out_features, in_features]``, or None for a dense layer
    mask: Tensor | None = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update ``[out_features, in_features]`` of the weight, under the mask."""
        update: Tensor = super().get_delta_weight(adapter)
        return update if self.mask is None else update * self.mask

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """The layer with its update."""
        if self.mask is None or self.disable_adapters or self.merged or options.get("adapter_names") is not None:
            plain: Tensor = super().forward(x, *arguments, **options)
            return plain
        result: Tensor = self.base_layer(x, *arguments, **options)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = self.get_delta_weight(adapter)
                inputs = self.lora_dropout[adapter](x.to(weight.dtype))
                result = result + functional.linear(inputs, weight).to(result.dtype)
        return result


def add_lora(model: nn.Module, settings: LoraSettings, *, preserve_zeros: bool = True, seed: int = 0) -> PeftModel:
    """Add a LoRA adapter to the linear layers of a model's blocks, and freeze everything else.

    Args:
        model: of transformers; its layers are wrapped in place.
        settings: the adapter.
        preserve_zeros: keep updates of 2:4 weights under their masks.
        seed: of the adapter's first values.

    Returns:
        peft's model. Its trainable parameters are float32.

    Raises:
        InputError: a target names no layer.
        SparsityError: a weight is pruned but not 2:4.
    """
    linears = anatomy_of(model).block_linears()
    masks = masks_of(linears) if preserve_zeros else {}
    last_names = {name.rpartition(".")[2] for name in linears}
    for target in settings.targets:
        if target not in last_names:
            raise InputError(
                f"no linear layer of the blocks is called {target!r}; there are {', '.join(sorted(last_names))}"
            )
    chosen = [name for name in linears if not settings.targets or name.rpartition(".")[2] in settings.targets]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=chosen,
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=_ADAPTER, autocast_adapter_dtype=True)
    set_masks(adapted, masks)
    return adapted


def set_masks(adapted: PeftModel, masks: Mapping[str, Tensor]) -> None:
    """Give the layers of a peft model their masks, by the name of the layer in the model underneath."""
    base = adapted.get_base_model()
    for name, mask in masks.items():
        layer = base.get_submodule(name)
        if isinstance(layer, MaskedLoraLinear):
            layer.mask = mask.to(layer.weight.device)


def merge_lora(adapted: PeftModel) -> nn.Module:
    """Merge the adapter into the weights and take it out.

    Returns:
        The model underneath, with plain linear layers; masked weights are as sparse as before.

    Raises:
        InputError: the adapter holds values that are not finite.
    """
    base = adapted.get_base_model()
    layers = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, MaskedLoraLinear)]
    for name, layer in layers:
        for part in (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight):
            if not bool(part.isfinite().all()):
                raise InputError(f"{name}: the adapter has values that are not finite; train it again")
    with torch.no_grad():
        for _, layer in layers:
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight(_ADAPTER).float())
            layer.merged_adapters.append(_ADAPTER)
    plain: nn.Module = adapted.base_model.unload()
    return plain
