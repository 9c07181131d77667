"""Write a checkpoint of random weights for a named architecture: something to load, of any size, without a download.

    python benchmarks/random_checkpoint.py llama-2-7b DIR --form sparsert     2:4, packed
    python benchmarks/random_checkpoint.py llama-2-7b DIR --form dense        2:4, zeros and all
    python benchmarks/random_checkpoint.py llama-2-7b DIR --form masks        not pruned, masks beside it: DIR/masks.npz

Weights are drawn a tensor at a time, on the GPU if there is one, in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsert.bench.architectures import ARCHITECTURES, hf_config
from sparsert.checkpoint.masks import write_maskllm
from sparsert.checkpoint.quantization import sparsert_config
from sparsert.checkpoint.shards import SHARD_BYTES, Entry, plan_shards, write_json, write_shards
from sparsert.checkpoint.stored import BITMASK_24, DENSE
from sparsert.formats.bitmask import bitmask_from_dense
from sparsert.models import DecoderConfig
from sparsert.models.names import TensorNames
from sparsert.models.random import prune_at_random_

FORMS = ("sparsert", "dense", "masks")


def write_random_checkpoint(directory: Path, architecture: str, form: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one.

    Args:
        directory: to make; must not exist.
        architecture: one of ``sparsert.bench.architectures.ARCHITECTURES``.
        form: one of :data:`FORMS`.
        shard_bytes: largest file.
    """
    config = hf_config(architecture)
    decoder = DecoderConfig.from_hf(config)
    names = TensorNames(decoder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linears = set(names.linear_tensors())
    shapes = names.expected() | {names.embedding: (decoder.vocab_size, decoder.hidden_size)}
    if not decoder.tie_word_embeddings:
        shapes[names.head] = shapes[names.embedding]

    def draw(name: str) -> Tensor:
        weight = torch.randn(shapes[name], device=device, dtype=torch.float32).mul_(0.02).bfloat16()
        if name in linears and form != "masks":
            weight.masked_fill_(weight == 0, 0.01)
            prune_at_random_(weight)
        return weight

    def read(entry: Entry) -> Mapping[str, Tensor]:
        if entry.storage == DENSE:
            return {entry.name: draw(entry.name)}
        parts = bitmask_from_dense(draw(entry.name), entry.name)
        return dict(zip(entry.layout, (parts["compressed"], parts["bitmask"], parts["shape"]), strict=True))

    def masks() -> Iterator[tuple[str, Tensor]]:
        for name in names.linear_tensors():
            yield name, prune_at_random_(torch.ones(shapes[name], device=device)).bool()

    directory.mkdir(parents=True)
    packs = linears if form == "sparsert" else set()
    entries = [
        Entry(name, name, shape, torch.bfloat16, BITMASK_24 if name in packs else DENSE)
        for name, shape in shapes.items()
    ]
    write_shards(directory, plan_shards(entries, shard_bytes), read, progress=True)
    if form == "sparsert":
        config["quantization_config"] = sparsert_config([], {})
    if form == "masks":
        write_maskllm(directory / "masks.npz", masks())
    write_json(directory / "config.json", {**config, "torch_dtype": "bfloat16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--form", choices=FORMS, default="sparsert")
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.directory, arguments.architecture, arguments.form)


if __name__ == "__main__":
    main()
