"""Activations of a block are gone before those of the next one are made: memory of a prompt is that of one block."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from sparsert.bench.architectures import hf_config
from sparsert.models import DecoderConfig
from sparsert.models.random import random_model


def test_one_block_at_a_time() -> None:
    config = DecoderConfig.from_hf(hf_config("tiny"))
    model = random_model(config, device="cpu", dtype=torch.float32, sparse=True)
    products: list[weakref.ref[torch.Tensor]] = []
    alive_at: list[int] = []

    def before(module: nn.Module, arguments: Any) -> None:
        alive_at.append(sum(product() is not None for product in products))

    def after(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        products.append(weakref.ref(output))

    mlps = [block.mlp for block in model.blocks if block.mlp is not None]
    assert len(mlps) >= 3
    for mlp in mlps:
        mlp.register_forward_pre_hook(before)
        mlp.register_forward_hook(after)
    embedded: list[weakref.ref[torch.Tensor]] = []
    model.embed_tokens.register_forward_hook(lambda module, given, output: embedded.append(weakref.ref(output)))
    model.blocks[1].register_forward_pre_hook(lambda module, given: alive_at.append(int(embedded[0]() is not None)))
    with torch.inference_mode():
        model(torch.arange(40).unsqueeze(0))
    assert alive_at == [0] * (len(mlps) + 1)
