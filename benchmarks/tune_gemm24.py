"""Measure every config of the CUDA kernel for prompts and write csrc/gemm24_table.inc.

    python benchmarks/tune_gemm24.py --output sweep.json --write csrc/gemm24_table.inc
    python benchmarks/tune_gemm24.py --read sweep.json --write csrc/gemm24_table.inc

Run it on the GPU that the table is for, after a config was added or the kernel changed; about a minute on an
H100. The chooser (csrc/select.cpp) takes, for a shape that is not in the table, the nearest one that is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsert import ops
from sparsert.bench.contenders import random_24
from sparsert.bench.records import machine_facts
from sparsert.bench.timing import copies_for, time_calls
from sparsert.formats import Packed24
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

BATCHES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # kGemmBatches in csrc/select.cpp
SHAPES = (
    # Llama-2-7B and Llama-3.1-8B
    (1024, 4096), (4096, 4096), (6144, 4096), (11008, 4096), (12288, 4096), (14336, 4096), (22016, 4096),
    (28672, 4096), (4096, 11008), (4096, 14336),
    # SmolLM2-135M
    (3072, 576), (576, 1536),
)  # fmt: skip

#: Multiprocessors of an H100, by which configs are left out that cannot be the best.
BLOCKS = 132
MOST_TOKEN_TILES = 8
MOST_SMALL_BLOCKS = 2 * BLOCKS
SHARING_BATCH, NEARLY = 2048, 1.02

Choice = tuple[int, int, bool]


def candidates(configs: list[tuple[str, int, int, bool]], rows: int, batch: int) -> Iterator[Choice]:
    """(config, cluster, even) that may be the best for a layer."""
    for config, (_, outputs, tokens, split) in enumerate(configs):
        blocks = -(-rows // outputs) * -(-batch // tokens)
        # small tiles are for where they are needed to fill the GPU
        too_wide, too_many = tokens >= max(2 * batch, 65), batch >= 2048 and tokens < 192 and blocks > MOST_SMALL_BLOCKS
        if too_wide or too_many:
            continue
        for cluster in range(1, 9) if split else (1, 2):
            # one round of blocks; of many tokens, inputs are divided only where half of the GPU would be idle
            if split and blocks * cluster > BLOCKS + 8 and (cluster > 1 or batch > 768):
                continue
            yield config, cluster, False
            if not split and outputs == 128 and -(-batch // tokens) <= MOST_TOKEN_TILES:
                yield config, cluster, True


def measure() -> dict[str, Any]:
    """Times in microseconds of every candidate, by layer and batch."""
    extension = native.module()
    configs = extension.gemm24_configs()
    record: dict[str, Any] = {"machine": machine_facts("cuda"), "configs": [name for name, *_ in configs], "layers": []}
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    for rows, columns in SHAPES:
        packed = ops.pack(random_24(rows, columns, torch.bfloat16, "cuda"))
        rotated = [
            Packed24(packed.values.clone(), packed.metadata.clone(), rows, columns)
            for _ in range(min(8, copies_for(packed.nbytes)))
        ]
        for batch in BATCHES:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            y = torch.empty(batch, rows, device="cuda", dtype=torch.bfloat16)
            weights = rotated if batch <= 512 else rotated[:3]
            times = []
            for choice in candidates(configs, rows, batch):

                def run_all(choice: Choice = choice, x=x, y=y, weights=weights) -> None:
                    for p in weights:
                        extension.gemm24_cuda(
                            p.values.data_ptr(), p.metadata.data_ptr(), x.data_ptr(), 0, y.data_ptr(), x.shape[0],
                            p.out_features, p.in_features, p.in_features, -1, False, workspace.data_ptr(),
                            dtype_code(x.dtype), native.stream(x.device), choice,
                        )  # fmt: skip

                times.append((time_calls(run_all, len(weights), repeats=3)["median"], choice))
            times.sort()
            record["layers"].append({"shape": (rows, columns), "batch": batch, "best": times[:8]})
            print(f"{rows}x{columns} batch {batch}: {times[0][0]:.2f} us, {times[0][1]}")
    return record


def decide(best: list[tuple[float, Choice]], batch: int) -> Choice:
    """The fastest; of many tokens, the fastest with shared activations if it is nearly as fast.

    Where a sweep saw a tie at 2,048 tokens, `bench kernels` had sharing 10 % ahead on the same machine.
    """
    fastest, choice = best[0]
    if batch < SHARING_BATCH:
        return choice
    return next((other for time, other in best if other[1] > 1 and time <= NEARLY * fastest), choice)


def table(record: dict[str, Any]) -> list[str]:
    """The record as rows of C++."""
    best: dict[tuple[int, int], dict[int, Choice]] = {}
    for layer in record["layers"]:
        best.setdefault(tuple(layer["shape"]), {})[layer["batch"]] = decide(layer["best"], layer["batch"])
    lines = [
        "// Measured best config, cluster and whether its work is dealt out evenly, for each batch of kGemmBatches",
        "// Written by benchmarks/tune_gemm24.py; measured on one "
        f"{record['machine']['gpu']}, bf16, weights rotated past L2.",
        "// {N, K, {{config, cluster, even}, ...}}",
    ]
    for (rows, columns), choices in sorted(best.items()):
        triples = ", ".join(
            f"{{{config}, {cluster}, {str(bool(even)).lower()}}}"
            for config, cluster, even in (choices[batch] for batch in BATCHES)
        )
        lines.append(f"    {{{rows}, {columns}, {{{triples}}}}},")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="all times, as JSON")
    parser.add_argument("--read", type=Path, help="times of an earlier run, instead of measuring")
    parser.add_argument("--write", type=Path, help="the table, as C++")
    arguments = parser.parse_args()
    record = json.loads(arguments.read.read_text()) if arguments.read else measure()
    if arguments.output:
        arguments.output.write_text(json.dumps(record) + "\n")
    if arguments.write:
        arguments.write.write_text("\n".join(table(record)) + "\n")


if __name__ == "__main__":
    main()
