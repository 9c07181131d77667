"""Four ways to a 2:4 mask of one model, one table: perplexity, time and memory of each.

    python examples/compare_masks.py --model DIR --text corpus.jsonl --validation wikitext2-valid.txt --work OUT

makes, under OUT, a checkpoint and a mask file by magnitude, Wanda, SparseGPT (its mask alone, and with the weights
updated) and by learning (MaskLLM, starting from SparseGPT's mask), measures every one of them on text that none of them
has seen, and prints the table as Markdown. What is there already is not made again, so a run that was killed goes on.
``table.json`` holds the numbers.

Options of the learning that are not here come from a file: ``--learn-config learn.json``, with the keys of
``sparsert learn-masks``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.score_windows import perplexity
from sparsert.jobs.learn_masks import LearnMasksOptions, learn_masks
from sparsert.jobs.models import load_model, load_tokenizer, open_dense
from sparsert.jobs.options import add_options, parse_options
from sparsert.jobs.prune_mask import PruneMaskOptions, prune_mask
from sparsert.jobs.text_files import load_windows
from sparsert.jobs.training_options import TextOptions

METHODS = ("magnitude", "wanda", "sparsegpt mask alone", "sparsegpt", "learned", "learned, weights fitted")


def main(words: list[str] | None = None) -> None:
    """Make and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory or hub id, of dense weights")
    parser.add_argument("--text", required=True, nargs="+", help="text to calibrate and learn on")
    parser.add_argument("--validation", required=True, help="text to measure on")
    parser.add_argument("--work", required=True, type=Path, help="directory for all results")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--validation-windows", type=int, default=128, help="windows measured (default: 128)")
    parser.add_argument("--samples", type=int, default=128, help="windows calibrated on (default: 128)")
    parser.add_argument("--steps", type=int, default=2000, help="updates of the learning (default: 2000)")
    parser.add_argument("--learn-config", help="JSON or TOML file with further options of learn-masks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which (default: all)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU if there is one)")
    arguments = parser.parse_args(words)
    arguments.work.mkdir(parents=True, exist_ok=True)
    record_file = arguments.work / "table.json"
    record: dict[str, Any] = json.loads(record_file.read_text()) if record_file.is_file() else {}
    for method in ("dense", *arguments.methods):
        if method not in record:
            made = {} if method == "dense" else make(method, arguments)
            place = arguments.model if method == "dense" else str(arguments.work / slug(method))
            record[method] = {"perplexity": measure(place, arguments), **made}
            record_file.write_text(json.dumps(record, indent=2) + "\n")
            print(f"{method}: {record[method]}", flush=True)
    print(table(record))


def make(method: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Make one checkpoint; returns seconds and bytes of GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    output = arguments.work / slug(method)
    masks = arguments.work / f"{slug(method)}.npz"
    if output.exists():  # a run was killed between writing and measuring
        return {}
    shared = {
        "model": arguments.model,
        "text": tuple(arguments.text),
        "output": str(output),
        "masks_output": str(masks),
        "window": arguments.window,
        "samples": arguments.samples,
        "device": arguments.device,
    }
    started = time.perf_counter()
    if method == "learned":
        config = argparse.ArgumentParser()
        add_options(config, LearnMasksOptions)
        flags = ["--config", arguments.learn_config] if arguments.learn_config else []
        given = config.parse_args(flags)
        for name, value in {**shared, "steps": arguments.steps, "resume": True}.items():
            setattr(given, name, value)
        result = learn_masks(parse_options(given, LearnMasksOptions))
    else:
        fitted = str(arguments.work / "learned.npz") if method == "learned, weights fitted" else None
        options = PruneMaskOptions(
            **shared,
            method=method.split()[0] if fitted is None else "sparsegpt",
            update_weights=method in ("sparsegpt", "learned, weights fitted"),
            masks=fitted,
        )
        result = prune_mask(options)
    memory = 0 if result is None else result.peak_memory_bytes
    return {"seconds": time.perf_counter() - started, "peak_memory_bytes": memory}


def measure(place: str, arguments: argparse.Namespace) -> float:
    """Perplexity of the validation text, each window read on its own, in the model's dtype."""
    checkpoint = open_dense(place)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = None if arguments.validation.endswith(".npy") else load_tokenizer(checkpoint)
    windows = load_windows(TextOptions(text=(arguments.validation,), window=arguments.window), tokenizer)
    count = min(arguments.validation_windows, len(windows))
    model = load_model(checkpoint, device=device)
    return perplexity(anatomy_of(model), torch.stack([windows[index] for index in range(count)]))


def slug(method: str) -> str:
    """A method's name as that of a directory."""
    return method.replace(",", "").replace(" ", "-")


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = ["| masks | perplexity | x dense | seconds | GPU memory, GB |", "|---|---|---|---|---|"]
    dense = record["dense"]["perplexity"]
    for method, row in record.items():
        seconds, memory = row.get("seconds"), row.get("peak_memory_bytes")
        lines.append(
            f"| {method} | {row['perplexity']:.2f} | {row['perplexity'] / dense:.2f} | "
            f"{'' if seconds is None else f'{seconds:.0f}'} | {f'{memory / 1e9:.1f}' if memory else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
