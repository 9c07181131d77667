"""Measure every config of the kernel for prompts on mma.sp, beside cuBLAS, the unpacked weight and Triton.

    python benchmarks/sweep_gemm24_mma.py --output sweep.json
    python benchmarks/sweep_gemm24_mma.py --batch 128,2048 --shapes 4096x4096

Which config runs is not a table but a model of clocks (csrc/select.cpp), because the GPUs that it is for were not at
hand. This shows how good the model is: what it chose beside the best there is. On a Hopper GPU, where another kernel
serves prompts, the times are a lower bound for an A100: there dense products run on the same instructions as these,
here on faster ones. Under a minute on an H100. Every config is checked: its error against float64 is at most twice
cuBLAS'.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsert import ops
from sparsert.bench.contenders import random_24
from sparsert.bench.records import machine_facts
from sparsert.bench.timing import Replay, copies_for, time_in_turn
from sparsert.formats import Packed24
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

SHAPES = "1024x4096,4096x4096,6144x4096,28672x4096,4096x14336,3072x576"
BATCHES = "65,128,256,512,1024,2048,4096"
SPLITS = (1, 2, 3, 4, 6, 8)
#: Tokens whose outputs are checked; float64 is slow on most GPUs.
CHECKED = 32


def multiply(x: Tensor, packed: Packed24, choice: tuple[int, int]) -> Tensor:
    """The kernel with a given (config, splits)."""
    extension, rows, columns = native.module(), packed.out_features, packed.in_features
    y = torch.empty(x.shape[0], rows, device=x.device, dtype=x.dtype)
    size = extension.gemm24_mma_workspace(x.shape[0], rows, columns, choice)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    extension.gemm24_mma_cuda(
        packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), 0, y.data_ptr(), x.shape[0], rows, columns,
        x.stride(0), -1, False, native.address(workspace), dtype_code(x.dtype), native.stream(x.device), choice,
    )  # fmt: skip
    return y


def candidates(rows: int, columns: int, batch: int, multiprocessors: int) -> list[tuple[int, int]]:
    """(config, splits) that may be the best."""
    found = []
    for config, (_, outputs, tokens) in enumerate(native.module().gemm24_mma_configs()):
        tiles = -(-rows // outputs) * -(-batch // tokens)
        most = min(SPLITS[-1], -(-columns // 256)) if tiles < 2 * multiprocessors else 1
        found += [(config, splits) for splits in SPLITS if splits <= most]
    return found


def over(weights: Sequence[Any], call: Callable[[Any], object]) -> Replay:
    """Ready to be timed: a call for each copy of a weight."""

    def run_all() -> None:
        for weight in weights:
            call(weight)

    return Replay(run_all, len(weights), "cuda")


def median_times(replays: dict[str, Replay], repeats: int) -> dict[str, float]:
    """Microseconds of a call."""
    return {name: spread["median"] for name, spread in time_in_turn(replays, repeats=repeats).items()}


def measure(x: Tensor, dense: Sequence[Tensor], packed: Sequence[Packed24]) -> dict[str, Any]:
    """Times of one layer in microseconds: of every candidate, and of the chosen and the best beside the others."""
    batch, rows, columns = x.shape[0], packed[0].out_features, packed[0].in_features
    checked = torch.linspace(0, batch - 1, CHECKED, device=x.device).long()
    exact = x[checked].double() @ dense[0].double().t()

    def error_of(y: Tensor) -> float:
        return float((y[checked].double() - exact).norm() / exact.norm())

    facts = torch.cuda.get_device_properties(x.device)
    limit = 2 * error_of(linear(x, dense[0]))
    every = []
    for choice in candidates(rows, columns, batch, facts.multi_processor_count):
        error = error_of(multiply(x, packed[0], choice))
        if not error <= limit:
            raise SystemExit(f"{rows}x{columns}, {batch} tokens, {choice}: error {error:.2e}, allowed {limit:.2e}")
        replay = over(packed, functools.partial(multiply, x, choice=choice))
        every.append((median_times({"it": replay}, 3)["it"], choice))
    every.sort()
    capability = facts.major * 10 + facts.minor
    chosen = native.module().gemm24_mma_choice(batch, rows, columns, facts.multi_processor_count, capability)[:2]
    replays = {
        "dense": over(dense, functools.partial(linear, x)),
        "chosen": over(packed, functools.partial(multiply, x, choice=chosen)),
        "best": over(packed, functools.partial(multiply, x, choice=every[0][1])),
        "unpacked": over(packed, functools.partial(ops.linear24, x, backend="dense")),
        "triton": over(packed, functools.partial(ops.linear24, x, backend="triton")),
    }
    times = median_times(replays, 5)
    return {"shape": (rows, columns), "batch": batch, "us": times, "chosen": chosen, "best": every[0][1], "all": every}


def measure_layer(rows: int, columns: int, batches: list[int]) -> Iterator[dict[str, Any]]:
    """Times of a layer by batch, printed as they come."""
    weight = random_24(rows, columns, torch.bfloat16, "cuda")
    packed = ops.pack(weight)
    dense = [weight.clone() for _ in range(copies_for(weight.nbytes))]
    copies = [
        Packed24(packed.values.clone(), packed.metadata.clone(), rows, columns)
        for _ in range(copies_for(packed.nbytes))
    ]
    for batch in batches:
        row = measure(torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16), dense, copies)
        times = row["us"]
        ratios = "".join(f"  {name} {times['dense'] / us:5.2f}x" for name, us in times.items() if name != "dense")
        line = f"{rows:>5}x{columns:<5} {batch:>5}  cuBLAS {times['dense']:7.1f} us{ratios}"
        print(f"{line}  {row['chosen']}, best {row['best']}", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="OUTPUTSxINPUTS,... (default: %(default)s)")
    parser.add_argument("--batch", default=BATCHES, help="tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="all times, as JSON")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batch.split(",")]
    record: dict[str, Any] = {"machine": machine_facts("cuda"), "configs": native.module().gemm24_mma_configs()}
    record["layers"] = []
    for shape in arguments.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        record["layers"] += measure_layer(rows, columns, batches)
        torch.cuda.empty_cache()
    for batch in batches:
        ratios = [row["us"]["dense"] / row["us"]["chosen"] for row in record["layers"] if row["batch"] == batch]
        lost = max(row["us"]["chosen"] / row["us"]["best"] for row in record["layers"] if row["batch"] == batch)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(
            f"{batch:>5} tokens: {mean:.2f}x of cuBLAS, least {min(ratios):.2f}x; at most {lost - 1:.0%} from the best"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
