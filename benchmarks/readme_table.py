"""README's tables, from records of `sparsert bench kernels` and `latency`, so that nobody types their numbers.

    sparsert bench kernels --shapes llama-2-7b,llama-3.1-8b --batch 1,4,8,16,32,64 --peers none --output kernels.json
    sparsert bench latency --arch llama-2-7b --remove-blocks 8 --corners --peers vllm --output latency.json
    python benchmarks/readme_table.py kernels.json latency.json

Only rows of `ours` that were checked and found right are quoted, and only beside dense of the same run. A test
holds README against the committed record with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsert.bench.records import read_record

#: How README calls the models.
MODELS = {"llama-2-7b": "7B", "llama-3.1-8b": "8B"}

BATCHES = (1, 4, 8, 16, 32, 64)

PROMPT_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


def decode_cell(ours: dict[str, Any], dense: dict[str, Any]) -> str:
    """What is said of a layer at a small batch: it is a read."""
    return (
        f"**{ours['speedup']:.2f}x** {ours['time_us']['median']:.1f} us, {ours['gb_per_s']:.0f} GB/s "
        f"({ours['share_of_read']:.0%}); dense {dense['time_us']['median']:.1f}"
    )


def prompt_cell(ours: dict[str, Any], dense: dict[str, Any]) -> str:
    """What is said of a layer and a prompt: it is a product."""
    return f"**{ours['speedup']:.2f}x** {ours['tflop_per_s']:.0f}; dense {dense['tflop_per_s']:.0f}"


def table_lines(
    record: dict[str, Any],
    batches: tuple[int, ...] = BATCHES,
    cell: Callable[[dict[str, Any], dict[str, Any]], str] = decode_cell,
) -> list[str]:
    """The table in Markdown, a line for each shape of :data:`MODELS` and a column for each batch.

    Args:
        record: of kind ``kernels``.
        batches: the columns.
        cell: text for a row of ours and the dense one beside it.

    Raises:
        SystemExit: a batch is missing, or was not measured, or not found right.
    """
    by_contender: dict[str, dict[tuple[int, int, int], dict[str, Any]]] = {"dense": {}, "ours": {}}
    names: dict[tuple[int, int], dict[str, str]] = {}
    for row in record["results"]:
        shape = (row["out_features"], row["in_features"])
        if row["model"] in MODELS and row["contender"] in by_contender:
            by_contender[row["contender"]][(*shape, row["batch"])] = row
            names.setdefault(shape, {})[MODELS[row["model"]]] = row["layer"].removesuffix(" fused")
    lines = [
        f"| layer, outputs x inputs | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---" * (1 + len(batches)) + "|",
    ]
    for shape, models in names.items():
        cells = ["; ".join(f"{model} {layer}" for model, layer in models.items()) + f": {shape[0]} x {shape[1]}"]
        for batch in batches:
            ours, dense = (by_contender[name].get((*shape, batch)) for name in ("ours", "dense"))
            if ours is None or dense is None or ours["speedup"] is None or ours["correct"] is not True:
                raise SystemExit(f"{shape[0]}x{shape[1]}, batch {batch}: the record holds no checked speed-up")
            cells.append(cell(ours, dense))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


#: How README calls who was measured, by (peer, corner), in the order of its lines.
CONTENDERS = {
    ("hf", "dense"): "transformers, dense",
    ("hf-compile", "dense"): "transformers compiled, dense",
    ("vllm", "dense"): "vLLM, dense",
    ("gpt-fast", "dense"): "gpt-fast, dense",
    ("dense", "dense"): "ours, dense",
    ("ours", "blocks removed"): "ours, 8 of 32 blocks removed",
    ("ours", "2:4"): "ours, **2:4**",
    ("ours", "2:4 + blocks removed"): "ours, **2:4 and 8 blocks removed**",
}

DECODE_BATCHES = (1, 4, 8, 16)

#: Beside whom ours are said to be so many times faster, and how README calls them.
BESIDE = {"vllm": "vLLM", "gpt-fast": "gpt-fast", "dense": "dense"}


def decode_lines(record: dict[str, Any]) -> list[str]:
    """Lines of the table of models: milliseconds a token, times faster than peers and than our dense, peak memory.

    Args:
        record: of kind ``latency``; prompts and outputs of 128 tokens.

    Raises:
        SystemExit: one of ours was not found right.
    """
    rows = {(row["peer"], row["corner"], row["batch"]): row for row in record["results"]}
    model = record["settings"]["model"]
    lines = []
    for (peer, corner), name in CONTENDERS.items():
        if not any((peer, corner, batch) in rows for batch in DECODE_BATCHES):
            continue
        cells = [f"{model}: {name}"]
        for batch in DECODE_BATCHES:
            row = rows.get((peer, corner, batch))
            if row is None:
                cells.append("-")
                continue
            if peer in ("ours", "dense") and row["correct"] is not True:
                raise SystemExit(f"{model}, {name}, batch {batch}: the record holds no checked row")
            ratios = []
            for other, label in BESIDE.items():
                beside = rows.get((other, "dense", batch))
                if beside is not None and peer == "ours":
                    ratios.append(f"{beside['tpot_ms']['p50'] / row['tpot_ms']['p50']:.2f}x {label}")
            share = "" if row["share_of_read"] is None else f" ({row['share_of_read']:.0%})"
            cells.append(f"{row['tpot_ms']['p50']:.2f} ms{share}" + (f", {', '.join(ratios)}" if ratios else ""))
        first = rows.get((peer, corner, 1))
        peak = None if first is None else first["peak_bytes"]
        cells.append("-" if peak is None else f"{peak / 1e9:.2f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def first_token_lines(record: dict[str, Any]) -> list[str]:
    """Lines of the table of first tokens: milliseconds of ours, and of others with how many times ours are faster.

    Args:
        record: of kind ``latency``, batch 1, several lengths of prompts; see :func:`is_of_first_tokens`.

    Raises:
        SystemExit: one of ours was not found right.
    """
    rows = {(row["peer"], row["corner"], row["input_len"]): row for row in record["results"]}
    lines = []
    for tokens in sorted({length for _, _, length in rows}):
        ours = rows["ours", "2:4", tokens]
        dense = rows["dense", "dense", tokens]
        if not ours["correct"] or not dense["correct"]:
            raise SystemExit(f"{tokens} tokens: the record holds no checked row")
        first = ours["ttft_ms"]["p50"]
        others = [row["ttft_ms"]["p50"] for row in (dense, rows["vllm", "dense", tokens])]
        cells = [f"{tokens:,}", f"**{first:.1f}**", *(f"{other:.1f}, {other / first:.2f}x" for other in others)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def is_of_first_tokens(record: dict[str, Any]) -> bool:
    """Whether a record of kind ``latency`` is about prompts: texts of a few tokens behind them."""
    return all(row["output_len"] < min(PROMPT_TOKENS) for row in record["results"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="made by sparsert bench kernels or latency, --output")
    for path in parser.parse_args().records:
        record = read_record(path)
        if record["kind"] == "kernels":
            print("\n".join([*table_lines(record), "", *table_lines(record, PROMPT_TOKENS, prompt_cell)]))
        else:
            lines = first_token_lines if is_of_first_tokens(record) else decode_lines
            print("\n".join(lines(record)))


if __name__ == "__main__":
    main()
