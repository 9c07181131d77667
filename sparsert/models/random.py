"""A decoder with random weights, made on its device: for measuring sizes that nobody wants to download.

Speed and memory depend on shapes, not on values, with one exception: zeros draw less power than numbers and
so run at higher clocks, which is why the weights here are random and never zeros. Each linear layer is drawn
on the device, pruned to a random 2:4 mask slice by slice, packed, and let go of before the next one comes,
so that a model needs little more than its own packed size while it is made. Scales are those of a model at
initialisation, so activations stay near one through any number of blocks. What it gives up: the model
says nothing, and a seed gives different weights on different kinds of device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.models.config import DecoderConfig, LinearShape
from sparsert.models.decoder import DecoderBlock, DecoderModel
from sparsert.models.linears import dense_linear
from sparsert.models.loader import join_groups_, place_linear, place_norm
from sparsert.models.report import LinearRecord, LoadReport
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

#: Masks are drawn for about this many elements at a time, so that they never need a layer's memory again.
_MASK_ELEMENTS = 1 << 23

#: The six ways to keep two of four.
_PATTERNS = ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1))

#: Layers that write to the residual stream; their sum over all blocks is what has to stay near one.
_RESIDUAL_WRITERS = ("o_proj", "down_proj")


def random_model(
    config: DecoderConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    plan: LayerPlan | None = None,
    sparse: bool = True,
    seed: int = 0,
    backend: str = "auto",
) -> DecoderModel:
    """Make a model with random weights.

    Args:
        config: the architecture.
        device: where it is made and stays.
        dtype: bfloat16, float16 or float32.
        plan: blocks that run, default all; the others are not made.
        sparse: pack every linear layer of a block 2:4; one whose input width is no multiple of 4 stays dense.
        seed: of the weights and masks.
        backend: kernels of the packed layers, see ``sparsert.ops.linear24``.

    Returns:
        The model, in evaluation mode, without gradients; at most one dense linear layer was held beside it.

    Raises:
        InputError: a plan for another number of blocks, or an unknown backend.
        torch.OutOfMemoryError: the device has no room for it.
    """
    device = torch.device(device)
    plan = plan or LayerPlan.full(config.num_blocks)
    model = DecoderModel(config, plan)
    generator = torch.Generator(device).manual_seed(seed)
    linears: dict[str, LinearRecord] = {}

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        # a CPU draws 16-bit normals coarsely: one in some hundred is an exact zero, which 2:4 would count as pruned
        drawn = dtype if device.type == "cuda" else torch.float32
        return torch.randn(shape, generator=generator, device=device, dtype=drawn).mul_(std).to(dtype)

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor, requires_grad=False)

    def norm(size: int) -> tuple[nn.Parameter, nn.Parameter | None]:
        kind = torch.float32 if config.norm.stored_minus_one else dtype  # as the loader forms them
        weight = parameter(normal((size,), 0.1).add_(1).to(kind))
        return weight, parameter(normal((size,), 0.1).to(kind)) if config.norm.centered else None

    def linear(name: str, shape: LinearShape) -> nn.Module:
        prunes = sparse and shape.in_features % 4 == 0
        scale = 1 / math.sqrt(2 * len(plan.kept)) if name.endswith(_RESIDUAL_WRITERS) else 1.0
        # half of the values have to carry what all would
        std = scale * math.sqrt((2 if prunes else 1) / shape.in_features)
        weight = normal((shape.out_features, shape.in_features), std)
        bias = normal((shape.out_features,), 0.1) if shape.bias else None
        if not prunes:
            linears[f"{name}.weight"] = LinearRecord("dense", "random weights", weight.nbytes, weight.nbytes)
            return dense_linear(weight, bias)
        prune_at_random_(weight, generator)
        packed = ops.pack(weight, name=f"{name}.weight")
        linears[f"{name}.weight"] = LinearRecord("2:4", "random mask", packed.nbytes, weight.nbytes)
        return SparseLinear.from_packed(packed, bias, backend=backend)

    with torch.no_grad():
        width = config.hidden_size
        model.embed_tokens.weight = parameter(normal((config.vocab_size, width), 1 / math.sqrt(width)))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        else:
            model.lm_head.weight = parameter(normal((config.vocab_size, width), 1 / math.sqrt(width)))
        model.norm.weight, model.norm.bias = norm(width)
        for place, original in enumerate(plan.kept):
            block = model.blocks[place]
            assert isinstance(block, DecoderBlock)
            for name, size in config.block_norms(original, plan).items():
                place_norm(block, name, *norm(size))
            for name, shape in config.block_linears(original, plan).items():
                place_linear(block, name, linear(f"model.layers.{original}.{name}", shape))
            join_groups_(block)
    model.report = LoadReport(linears, ())
    return model.eval().requires_grad_(False)


def prune_at_random_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Zero two of every four inputs, which two at random and all six ways equally likely.

    Args:
        weight: contiguous ``[out_features, in_features]``, ``in_features`` divisible by 4; changed in place.
        generator: on the weight's device.

    Returns:
        The weight.

    Example:
        >>> int(prune_at_random_(torch.ones(2, 8)).count_nonzero())
        8
    """
    patterns = torch.tensor(_PATTERNS, device=weight.device, dtype=torch.bool)
    for part in weight.split(max(1, _MASK_ELEMENTS // weight.shape[1])):
        chosen = torch.randint(len(_PATTERNS), (part.numel() // 4,), generator=generator, device=weight.device)
        part.masked_fill_(~patterns[chosen].view(part.shape), 0)
    return weight
