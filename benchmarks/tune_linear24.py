"""Measure every tile of the CUDA kernel and write csrc/linear24_table.inc.

    python benchmarks/tune_linear24.py --output sweep.json --write csrc/linear24_table.inc

Run it on the GPU that the table is for, after a tile was added or a kernel changed; about two minutes on an
H100. The chooser (csrc/select.cpp) takes, for a shape that is not in the table, the nearest one that is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sparsert import ops
from sparsert.bench.contenders import random_24
from sparsert.bench.records import machine_facts
from sparsert.bench.timing import copies_for, time_calls
from sparsert.formats import Packed24
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

BATCHES = (1, 4, 8, 16, 24, 32, 48, 64)  # kTableBatches in csrc/select.cpp
SHAPES = (
    # Llama-2-7B and Llama-3.1-8B
    (1024, 4096), (4096, 4096), (6144, 4096), (11008, 4096), (12288, 4096), (14336, 4096), (22016, 4096),
    (28672, 4096), (4096, 11008), (4096, 14336),
    # SmolLM2-135M
    (192, 576), (576, 576), (960, 576), (1536, 576), (3072, 576), (576, 1536),
    # Llama-3.2-1B, Llama-3.2-3B, width-pruned 4B
    (512, 2048), (2048, 2048), (3072, 2048), (8192, 2048), (16384, 2048), (2048, 8192),
    (3072, 3072), (5120, 3072), (8192, 3072), (9216, 3072), (16384, 3072), (3072, 8192), (3072, 9216),
    # Llama-2-13B
    (5120, 5120), (15360, 5120), (27648, 5120), (5120, 13824),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="all times, as JSON")
    parser.add_argument("--write", type=Path, help="the table, as C++")
    arguments = parser.parse_args()

    extension = native.module()
    names = extension.linear24_configs()
    record: dict = {"machine": machine_facts("cuda"), "configs": names, "layers": []}
    table: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rows, columns in SHAPES:
        packed = ops.pack(random_24(rows, columns, torch.bfloat16, "cuda"))
        copies = min(64, copies_for(packed.nbytes))
        rotated = [Packed24(packed.values.clone(), packed.metadata.clone(), rows, columns) for _ in range(copies)]
        for batch in BATCHES:
            x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
            y = torch.empty(batch, rows, device="cuda", dtype=torch.bfloat16)
            times = []
            for config in range(len(names)):
                for splits in range(1, 9):
                    if splits > 1 and splits * rows > 1024 * 132:
                        continue  # far more blocks than multiprocessors already

                    def run_all(config: int = config, splits: int = splits, x=x, y=y, rotated=rotated) -> None:
                        for p in rotated:
                            extension.linear24_cuda_with(
                                p.values.data_ptr(), p.metadata.data_ptr(), x.data_ptr(), 0, y.data_ptr(), x.shape[0],
                                p.out_features, p.in_features, p.in_features, dtype_code(x.dtype),
                                native.stream(x.device), config, splits,
                            )  # fmt: skip

                    try:
                        run_all()
                    except RuntimeError:
                        break  # this tile is not built for this batch
                    times.append((time_calls(run_all, copies, repeats=3)["median"], config, splits))
            times.sort()
            table.setdefault((rows, columns), []).append(times[0][1:])
            record["layers"].append({"shape": (rows, columns), "batch": batch, "best": times[:8]})
            print(f"{rows}x{columns} batch {batch}: {times[0][0]:.2f} us, {names[times[0][1]]}, split {times[0][2]}")
    arguments.output.write_text(json.dumps(record) + "\n")
    if arguments.write:
        lines = [
            "// Measured best tile and split for each layer shape, one pair for each batch of kTableBatches",
            "// Written by benchmarks/tune_linear24.py; measured on one "
            f"{record['machine']['gpu']}, bf16, weights rotated past L2.",
            "// {N, K, {{config, splits}, ...}}",
        ]
        for (rows, columns), choices in sorted(table.items()):
            pairs = ", ".join(f"{{{config}, {splits}}}" for config, splits in choices)
            lines.append(f"    {{{rows}, {columns}, {{{pairs}}}}},")
        arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
