"""Cut a transformers model to narrower widths: the rows and columns of the units that stay, in a new plain model.

    embedding, head            columns of the channels
    norms                      entries of the channels
    q, k, v                    rows of the heads, columns of the channels; biases as rows
    o                          rows of the channels, columns of the query heads
    gate, up                   rows of the neurons, columns of the channels
    down                       rows of the channels, columns of the neurons
    qkv, gate_up (Phi-3)       the rows of each part behind one another

Head norms and rotary tables know heads by their width, which stays. The new configuration says ``head_dim`` outright,
for ``hidden_size / num_attention_heads`` is not it any more, and other loaders would believe it.

A family that scales its embedding by the square root of the width (Gemma) would scale it less in a narrower model;
the embedding is stored that much larger, and where the head shares it, the final norm that much smaller, so that what
the trimmed model computes is the cut and nothing else. Means and variances inside the norms are of the channels that
stay; that part of the change is what recovery is for.

2:4 weights are refused: cutting columns breaks their groups of four. Trim first, mask then.

Source: Muralidharan et al. (arXiv 2407.14679), section 2.3.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy, anatomy_of
from sparsert.compress.keep_zeros import is_24
from sparsert.compress.width import Selection, Widths, widths_of
from sparsert.errors import InputError, UnsupportedError, first_line


def trimmed_config(config: Any, target: Widths) -> Any:
    """The configuration of a model with other widths.

    Args:
        config: of transformers.
        target: the widths.

    Returns:
        A new one, of the same class.

    Raises:
        UnsupportedError: transformers accepts no such model of this family.
    """
    content = copy.deepcopy(config.to_dict())
    content |= {
        "hidden_size": target.hidden,
        "intermediate_size": target.intermediate,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
    }
    try:
        made = type(config).from_dict(content)
    except Exception as error:  # its validation errors are of classes of huggingface_hub, and change with releases
        raise UnsupportedError(
            f"transformers has no {config.model_type} model of {target}: {first_line(error.__cause__ or error)}; "
            f"choose sizes that fit, as a rule a hidden size that is a multiple of the query heads"
        ) from error
    return made


def check_unmasked(anatomy: Anatomy) -> None:
    """Refuse a model whose weights are 2:4.

    Raises:
        InputError: naming the first such weight.
    """
    masked = [name for name, linear in anatomy.block_linears().items() if is_24(linear.weight.detach())]
    if masked:
        raise InputError(
            f"{len(masked)} weights are 2:4 already, the first {masked[0]}; cutting columns would break their "
            f"groups of four. Prune width first, and make masks for the result"
        )


def trim_model(anatomy: Anatomy, target: Widths, selection: Selection) -> nn.Module:
    """A model that keeps only some heads, neurons and channels.

    Args:
        anatomy: of the model, which is left as it is.
        target: widths to trim to.
        selection: the units that stay, see :func:`sparsert.compress.width.select_units`.

    Returns:
        A new model of the same class, dtype and device, without gradients, in evaluation mode.

    Raises:
        UnsupportedError: the blocks differ in width, or transformers has no such model.
        InputError: the weights are 2:4 already.
    """
    whole = widths_of(anatomy)
    check_unmasked(anatomy)
    config = trimmed_config(anatomy.config, target)
    source = dict(anatomy.model.named_parameters())
    weight = anatomy.embedding.weight
    made = _empty_model(type(anatomy.model), config, weight.dtype, anatomy.config._attn_implementation)
    cut = _Cut(whole, target, selection, anatomy.body_name)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            tensor = cut.apply(name, source[name].detach())
            if tensor.shape != parameter.shape:
                raise UnsupportedError(
                    f"{type(anatomy.model).__name__}: {name} would be {list(tensor.shape)}, a model of {target} has "
                    f"{list(parameter.shape)}; this family cannot be trimmed"
                )
            parameter.copy_(tensor)
        _restore_embedding_scale(anatomy, anatomy_of(made), whole, target)
    if getattr(anatomy.model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(anatomy.model.generation_config)
    trimmed: nn.Module = made.eval().requires_grad_(False).to(weight.device)
    return trimmed


def _empty_model(model_class: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model of a configuration; its values are overwritten, so none are drawn.

    ``attention`` is the implementation: transformers 5.17 would choose one that leaves out Gemma 2's soft caps.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    return model


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What of each parameter stays, by its name."""

    whole: Widths
    target: Widths
    selection: Selection
    body_name: str

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        rows, columns = self._kept(name)
        if rows is not None:
            tensor = tensor.index_select(0, rows.to(tensor.device))
        if columns is not None and tensor.ndim > 1:
            tensor = tensor.index_select(1, columns.to(tensor.device))
        return tensor

    def _kept(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns that stay; None: all."""
        channels = self.selection.channels
        inside = name.removeprefix(f"{self.body_name}.layers.")
        if inside == name:
            # outside the blocks: matrices over the vocabulary, and the final norm
            return (channels, None) if name.startswith(f"{self.body_name}.norm.") else (None, channels)
        number, _, rest = inside.partition(".")
        block, layer = int(number), rest.split(".")[-2]
        neurons = self.selection.neurons[block]
        queries = self._head_rows(self.selection.heads[block])
        keys = self._head_rows(self.selection.kv_heads[block])
        all_queries, all_keys = self.whole.heads * self.whole.head_dim, self.whole.kv_heads * self.whole.head_dim
        if layer in ("q_norm", "k_norm"):
            return None, None
        if layer.endswith("layernorm"):
            return channels, None
        kept: dict[str, tuple[Tensor, Tensor]] = {
            "q_proj": (queries, channels),
            "k_proj": (keys, channels),
            "v_proj": (keys, channels),
            "qkv_proj": (torch.cat([queries, all_queries + keys, all_queries + all_keys + keys]), channels),
            "o_proj": (channels, queries),
            "gate_proj": (neurons, channels),
            "up_proj": (neurons, channels),
            "gate_up_proj": (torch.cat([neurons, self.whole.intermediate + neurons]), channels),
            "down_proj": (channels, neurons),
        }
        if layer not in kept:
            raise UnsupportedError(f"{name}: what of it belongs to a head, neuron or channel is not known here")
        return kept[layer]

    def _head_rows(self, heads: Tensor) -> Tensor:
        width = self.whole.head_dim
        return (heads[:, None] * width + torch.arange(width)).flatten()


def _restore_embedding_scale(anatomy: Anatomy, trimmed: Anatomy, whole: Widths, target: Widths) -> None:
    """Make up for an embedding that is scaled by the square root of the width."""
    if not hasattr(anatomy.embedding, "scalar_embed_scale"):
        return
    factor = (whole.hidden / target.hidden) ** 0.5
    trimmed.embedding.weight.mul_(factor)
    if trimmed.tied:
        # the head reads the larger matrix: logits stay if the norm in front of it shrinks; it stores weight - 1
        norm: Any = trimmed.final_norm
        norm.weight.copy_((norm.weight.float() + 1.0) / factor - 1.0)
