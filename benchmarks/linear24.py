"""The 2:4 linear against cuBLAS, layer by layer of real models: the table in README.

    python benchmarks/linear24.py --output record.json                  # Llama-2-7B and Llama-3.1-8B
    python benchmarks/linear24.py --models smollm2-135m --batches 1,8 --backends native,triton

The table in README was made by this script; `sparsert bench kernels` measures the same and more, and takes
its place once it has been run on a GPU. Every row is checked against float64 before it is timed (error at most
twice cuBLAS's), and both sides run in the same process, over rotated weights, from one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from timing import copies_for, graph_time_us, machine, read_bandwidth

from sparsert import ops
from sparsert.formats import Packed24

#: outputs x inputs of every linear of a block, separate and as the engine fuses them
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "llama-2-7b": {
        "q, k, v, o": (4096, 4096),
        "gate, up": (11008, 4096),
        "down": (4096, 11008),
        "qkv fused": (12288, 4096),
        "gate_up fused": (22016, 4096),
    },
    "llama-3.1-8b": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
        "qkv fused": (6144, 4096),
        "gate_up fused": (28672, 4096),
    },
    "smollm2-135m": {
        "q, o": (576, 576),
        "k, v": (192, 576),
        "gate, up": (1536, 576),
        "down": (576, 1536),
        "qkv fused": (960, 576),
        "gate_up fused": (3072, 576),
    },
}


def random_24(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A random weight that keeps two of every four inputs."""
    order = torch.rand(rows, columns // 4, 4, device="cuda").argsort(-1)
    return torch.randn(rows, columns, device="cuda").to(dtype) * (order < 2).view(rows, columns)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def measure(rows: int, columns: int, batches: list[int], dtype: torch.dtype, backends: list[str]) -> list[dict]:
    """Time one layer shape at every batch; one dict per batch and backend."""
    weight = random_24(rows, columns, dtype)
    packed = ops.pack(weight)
    copies = copies_for(packed.nbytes)
    dense = [weight.clone() for _ in range(copies_for(weight.nbytes))]
    sparse = [Packed24(packed.values.clone(), packed.metadata.clone(), rows, columns) for _ in range(copies)]
    results = []
    for batch in batches:
        x = torch.randn(batch, columns, device="cuda", dtype=dtype)
        reference = torch.nn.functional.linear(x.double(), weight.double())
        dense_error = relative_error(torch.nn.functional.linear(x, weight), reference)
        dense_time = graph_time_us(lambda x=x: [torch.nn.functional.linear(x, w) for w in dense], len(dense))
        for backend in backends:
            error = relative_error(ops.linear24(x, packed, backend=backend), reference)
            if not error <= 2 * dense_error:
                raise SystemExit(
                    f"{rows}x{columns} batch {batch} {backend}: error {error:.2e}, cuBLAS {dense_error:.2e}"
                )
            time = graph_time_us(
                lambda x=x, backend=backend: [ops.linear24(x, p, backend=backend) for p in sparse], copies
            )
            results.append(
                {
                    "out_features": rows,
                    "in_features": columns,
                    "batch": batch,
                    "backend": backend,
                    "kernel": str(ops.explain(rows, columns, batch, dtype=dtype, backend=backend)).splitlines()[0],
                    "dense_us": dense_time,
                    "sparse_us": time,
                    "speedup": dense_time["median"] / time["median"],
                    "dense_gb_per_s": weight.nbytes / dense_time["median"] / 1e3,
                    "sparse_gb_per_s": packed.nbytes / time["median"] / 1e3,
                    "error": error,
                    "dense_error": dense_error,
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-2-7b,llama-3.1-8b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batches", default="1,2,4,8,16,24,32,48,64")
    parser.add_argument("--backends", default="native", help="of native, triton, dense")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="write the record here, as JSON")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    batches = [int(b) for b in arguments.batches.split(",")]
    bandwidth = read_bandwidth()
    record: dict = {"machine": machine(), "dtype": arguments.dtype, "read_gb_per_s": bandwidth / 1e9, "layers": []}
    print(f"{record['machine']['gpu']}: plain read of 2 GB {bandwidth / 1e12:.2f} TB/s", flush=True)
    print(f"{'layer':>32} batch backend cuBLAS us   2:4 us   GB/s of read  faster")
    measured: dict[tuple[int, int], list[dict]] = {}
    for model in arguments.models.split(","):
        for name, shape in MODELS[model].items():
            if shape not in measured:
                measured[shape] = measure(
                    *shape, batches, getattr(torch, arguments.dtype), arguments.backends.split(",")
                )
            for row in measured[shape]:
                row = {"model": model, "layer": name, **row, "share_of_read": row["sparse_gb_per_s"] * 1e9 / bandwidth}
                record["layers"].append(row)
                label = f"{model} {name} {shape[0]}x{shape[1]}"
                print(
                    f"{label:>32} {row['batch']:5d} {row['backend']:>7} {row['dense_us']['median']:9.2f} "
                    f"{row['sparse_us']['median']:8.2f} {row['sparse_gb_per_s']:6.0f} {row['share_of_read']:7.0%} "
                    f"{row['speedup']:6.2f}x",
                    flush=True,
                )
            torch.cuda.empty_cache()
    small = [r["speedup"] for r in record["layers"] if r["batch"] <= 16 and r["backend"] == "native"]
    every = [r["speedup"] for r in record["layers"] if r["backend"] == "native"]
    if small:
        print(f"native: at least {min(small):.2f}x up to batch 16, at least {min(every):.2f}x overall")
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
