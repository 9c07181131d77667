"""README's table of layers, from a record of `sparsert bench kernels`, so that nobody types its numbers.

    sparsert bench kernels --shapes llama-2-7b,llama-3.1-8b --batch 1,4,8,16,32,64 --peers none --output kernels.json
    python benchmarks/readme_table.py kernels.json

Only rows of `ours` that were checked and found right are quoted, and only beside dense of the same run. A test
holds README against the committed record with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsert.bench.records import read_record

#: How README calls the models.
MODELS = {"llama-2-7b": "7B", "llama-3.1-8b": "8B"}

BATCHES = (1, 4, 8, 16, 32, 64)


def table_lines(record: dict[str, Any]) -> list[str]:
    """The table in Markdown, a line for each shape of :data:`MODELS` and a column for each batch.

    Args:
        record: of kind ``kernels``.

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
        f"| layer, outputs x inputs | {' | '.join(f'batch {batch}' for batch in BATCHES)} |",
        "|---" * (1 + len(BATCHES)) + "|",
    ]
    for shape, models in names.items():
        cells = ["; ".join(f"{model} {layer}" for model, layer in models.items()) + f": {shape[0]} x {shape[1]}"]
        for batch in BATCHES:
            ours, dense = (by_contender[name].get((*shape, batch)) for name in ("ours", "dense"))
            if ours is None or dense is None or ours["speedup"] is None or ours["correct"] is not True:
                raise SystemExit(f"{shape[0]}x{shape[1]}, batch {batch}: the record holds no checked speed-up")
            cells.append(
                f"**{ours['speedup']:.2f}x** {ours['time_us']['median']:.1f} us, {ours['gb_per_s']:.0f} GB/s "
                f"({ours['share_of_read']:.0%}); dense {dense['time_us']['median']:.1f}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="made by sparsert bench kernels --output")
    print("\n".join(table_lines(read_record(parser.parse_args().record))))


if __name__ == "__main__":
    main()
