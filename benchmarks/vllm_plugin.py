"""vLLM with and without sparsert on one machine, in one run: decoding speed and weight memory, as one JSON document.

    python benchmarks/random_checkpoint.py llama-3.1-8b /tmp/8b --form sparsert
    python benchmarks/vllm_plugin.py /tmp/8b --output record.json
    python benchmarks/vllm_plugin.py /tmp/8b --tensor-parallel 2

Two engines, one after the other, each in a process of its own (vllm_worker.py): vLLM on the same configuration with
dense random weights of its own making (or ``--dense DIR``), then on the packed checkpoint. Both decode greedily under
vLLM's CUDA graphs and compiled code. A speed-up counts only beside its check: every packed layer is held against the
dense product of the weight it holds, and may be off by at most twice what cuBLAS is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from json_document import publish
from vllm_worker import run_worker

from sparsert.bench.records import machine_facts

#: Share of the GPU's memory that vLLM may take for weights and cache.
_MEMORY_SHARE = 0.85

#: Errors of cuBLAS that a packed layer may make.
_MOST_ERRORS = 2.0


def dense_directory(packed: Path, folder: Path) -> Path:
    """A directory with the configuration of a packed checkpoint, without what says that it is packed."""
    config = json.loads((packed / "config.json").read_text())
    config.pop("quantization_config", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def contenders(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> job of its worker."""
    decode = {
        "batches": arguments.batch, "input_len": arguments.input_len, "output_len": arguments.output_len,
        "runs": arguments.runs, "seed": arguments.seed,
    }  # fmt: skip
    engine = {
        "max_model_len": arguments.input_len + arguments.output_len + 1, "max_num_seqs": max(arguments.batch),
        "gpu_memory_utilization": _MEMORY_SHARE, "tensor_parallel_size": arguments.tensor_parallel, **arguments.engine,
    }  # fmt: skip
    if arguments.dense is not None:
        dense = {**engine, "model": str(arguments.dense)}
    else:
        dense = {**engine, "model": str(dense_directory(arguments.directory, folder / "dense")), "load_format": "dummy"}
    return {
        "vllm": {"engine": dense, "decode": decode},
        "vllm + sparsert": {
            "engine": {**engine, "model": str(arguments.directory)}, "decode": decode, "check_rows": arguments.batch,
        },
    }  # fmt: skip


def compare(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of a record: a row for each contender and batch, memory, and whether the products were right."""
    dense, ours = answers["vllm"], answers["vllm + sparsert"]
    weight_bytes = {name: sum(rank["weight_bytes"] for rank in answer["ranks"]) for name, answer in answers.items()}
    results = []
    for name, answer in answers.items():
        for row, base in zip(answer["rows"], dense["rows"], strict=True):
            results.append({"contender": name, **row, "speedup": base["step_ms"] / row["step_ms"]})
    return {
        "vllm_version": ours["vllm"],
        "weight_bytes": weight_bytes,
        "weight_share": weight_bytes["vllm + sparsert"] / weight_bytes["vllm"],
        "load_s": {name: answer["load_s"] for name, answer in answers.items()},
        "packed_layers": sum(len(rank["modules"]) for rank in ours["ranks"]),
        "report": [line for rank in ours["ranks"] for line in rank["lines"]],
        "worst_layer": ours["worst"],
        "correct": ours["worst"]["layer"] is not None and ours["worst"]["ratio"] <= _MOST_ERRORS,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="packed checkpoint")
    parser.add_argument("--dense", type=Path, help="dense checkpoint to compare with, default random weights")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 16])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each layer")
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON with arguments of vllm.LLM for both")
    parser.add_argument("--show-log", action="store_true", help="print what vLLM says")
    parser.add_argument("--output", type=Path, help="the JSON document as a file")
    arguments = parser.parse_args()
    answers = {}
    with tempfile.TemporaryDirectory() as name:
        for contender, job in contenders(arguments, Path(name)).items():
            answers[contender] = run_worker(Path(name), job, quiet=not arguments.show_log)
    record = {
        "benchmark": "vllm_plugin",
        "machine": machine_facts(None),
        "model": arguments.directory.name,
        "dense_weights": "random" if arguments.dense is None else arguments.dense.name,
        "tensor_parallel": arguments.tensor_parallel,
        "engine": arguments.engine,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "runs": arguments.runs,
        **compare(answers),
    }
    for row in record["results"]:
        print(
            f"{row['contender']:16} batch {row['batch']:3} {row['step_ms']:8.3f} ms/step {row['tok_per_s']:9.1f} tok/s "
            f"{row['speedup']:5.2f}x  TTFT {row['ttft_ms']:7.1f} ms"
        )
    print(f"weights: {record['weight_share']:.3f} of dense; every layer right: {record['correct']}")
    publish(record, arguments.output)


if __name__ == "__main__":
    main()
