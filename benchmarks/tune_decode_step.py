"""Measure tiles of the CUDA linear inside decode steps, where a layer starts while the one before it ends.

    python benchmarks/tune_decode_step.py --output sweep.json

Alone a layer prefers other tiles than in a step: there its first weights are requested while the layer before
it finishes, its input comes in tiles, and its end overlaps with the next one's start. For each layer of a few
blocks, every tile and split is tried in turn, and kept if the whole step gets faster. It prints rows for
csrc/linear24_table.inc; about a minute a model on an H100.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sparsert.bench.architectures import hf_config
from sparsert.bench.records import machine_facts
from sparsert.engine.runner import Runner
from sparsert.models import DecoderConfig
from sparsert.models.random import random_model
from sparsert.ops import native

BATCHES = (1, 8, 16)
SPLITS = (1, 2, 4)
BLOCKS = 6  # more weight than fits into the L2
CONTEXT = 192
#: A choice is kept when the step gets shorter by more than timings scatter.
LEAST_GAIN = 0.002


def step_us(model: torch.nn.Module, batch: int, replays: int = 12) -> float:
    """Microseconds of a decode step as a new CUDA graph, the best of three series."""
    runner = Runner(model, 4096)  # type: ignore[arg-type]
    tokens = runner.prefill([[1] * CONTEXT] * batch, room=256).argmax(-1)
    runner.decode_greedy(tokens, CONTEXT)  # captures
    best = float("inf")
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            tokens = runner.decode_greedy(tokens, CONTEXT)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / replays * 1e3)
        runner.place_(torch.full((batch,), CONTEXT, device="cuda"))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="llama-2-7b,llama-3.1-8b", help="models, separated by commas")
    parser.add_argument("--output", type=Path, required=True, help="all times, as JSON")
    arguments = parser.parse_args()

    extension = native.module()
    names = extension.linear24_configs()
    record: dict = {"machine": machine_facts("cuda"), "configs": names, "tried": [], "chosen": []}
    for name in arguments.arch.split(","):
        config = DecoderConfig.from_hf(hf_config(name) | {"num_hidden_layers": BLOCKS, "vocab_size": 1024})
        model = random_model(config, device="cuda", dtype=torch.bfloat16, sparse=True)
        attention, mlp = model.blocks[0].self_attn, model.blocks[0].mlp
        layers = (attention.qkv_proj.joined, attention.o_proj, mlp.gate_up_proj.joined, mlp.down_proj)
        for batch in BATCHES:
            fastest = step_us(model, batch, replays=30)
            print(f"{name} batch {batch}: {fastest:.1f} us for {BLOCKS} blocks")
            for layer in layers:
                shape = (layer.out_features, layer.in_features)
                best: tuple[float, int, int] = (fastest, -1, 0)
                for tile in range(len(names)):
                    for splits in SPLITS:
                        extension.linear24_override(*shape, batch, tile, splits)
                        try:
                            found = step_us(model, batch)
                        except RuntimeError:
                            break  # this tile is not built for this batch, or not for gates
                        record["tried"].append({"model": name, "batch": batch, "shape": shape, "tile": tile,
                                                "splits": splits, "us": found})  # fmt: skip
                        best = min(best, (found, tile, splits))
                extension.linear24_override(*shape, batch, *best[1:])
                again = step_us(model, batch, replays=30)
                if best[1] >= 0 and again < fastest * (1 - LEAST_GAIN):
                    fastest = again
                    record["chosen"].append({"batch": batch, "shape": shape, "tile": best[1], "splits": best[2]})
                    print(f"  {shape[0]}x{shape[1]}: {{{best[1]}, {best[2]}}} {names[best[1]]}, step {again:.1f} us")
                else:
                    extension.linear24_override(*shape, batch, -1, 0)
            for layer in layers:
                extension.linear24_override(layer.out_features, layer.in_features, batch, -1, 0)
    arguments.output.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
