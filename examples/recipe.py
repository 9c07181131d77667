"""What the recipes share: options, stages that are done once, and a table that grows as results come in.

Every stage writes its result into ``WORK/results.json`` when it is done, so a recipe that was interrupted goes on
where it stopped when it is run again; trainings inside a stage go on from their last saved state.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.score_windows import mean_loss
from sparsert.jobs.models import load_model, load_tokenizer, open_dense
from sparsert.jobs.text_files import load_windows
from sparsert.jobs.training_options import TextOptions
from sparsert.models import resolve_device


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all recipes take; the defaults are those of the tables in README.md."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", required=True, help="model directory or hub id, e.g. SmolLM2-135M-Instruct")
    made.add_argument("--text", required=True, nargs="+", help="text to calibrate and train on")
    made.add_argument("--evaluate-text", required=True, nargs="+", help="text whose perplexity is measured")
    made.add_argument("--work", required=True, type=Path, help="directory for models and results; may be gone on with")
    made.add_argument("--window", type=int, default=1024, help="tokens of a window")
    made.add_argument("--windows", type=int, default=64, help="windows to calibrate on")
    made.add_argument("--evaluate-windows", type=int, default=128, help="windows that perplexity is measured on")
    made.add_argument("--steps", type=int, default=1000, help="updates of each training")
    made.add_argument("--batch-size", type=int, default=32, help="windows of an update")
    made.add_argument("--micro-batch", type=int, default=8, help="windows of one forward")
    made.add_argument("--learning-rate", type=float, default=2e-4, help="highest learning rate")
    made.add_argument("--save-every", type=int, default=250, help="updates between saved states")
    made.add_argument("--compile", action="store_true", help="run blocks through torch.compile while training")
    made.add_argument("--device", default=None, help="cpu, cuda or cuda:N (a GPU if there is one)")
    made.add_argument("--seed", type=int, default=0, help="same seed, same result")
    return made


class Recipe:
    """Stages of a recipe and the table of their results.

    Attributes:
        arguments: the parsed options.
        rows: name of the row -> its numbers, in order.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = resolve_device(arguments.device)
        arguments.work.mkdir(parents=True, exist_ok=True)
        self._file = arguments.work / "results.json"
        options = {key: str(value) for key, value in vars(arguments).items() if key not in ("work", "device")}
        self.rows: dict[str, dict[str, float]] = {}
        if self._file.is_file():
            stored = json.loads(self._file.read_text())
            if stored["options"] != options:
                raise SystemExit(f"{self._file}: holds results of other options; give the same, or another --work")
            self.rows = stored["rows"]
        self._options = options

    def place(self, name: str) -> Path:
        """Where a stage puts its model."""
        return self.arguments.work / name

    def stage(self, name: str, make: Callable[[Path], Any] | None = None) -> dict[str, float]:
        """Make a model once, measure it, and add a row.

        Args:
            name: of the row and of the model's directory.
            make: writes the model into the directory that it is given; None: the model of the options as it is.

        Returns:
            The row.
        """
        if name not in self.rows:
            started = time.perf_counter()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            place = self.place(name)
            if make is not None and not (place / "config.json").is_file():
                make(place)
            seconds = time.perf_counter() - started
            memory = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
            directory = self.arguments.model if make is None else str(place)
            row = {"perplexity": self.perplexity(directory), "seconds": seconds, "GB": memory}
            row["MB"] = sum(file.stat().st_size for file in open_dense(directory).files) / 1e6
            self._add(name, row)
        return self.rows[name]

    def perplexity(self, directory: str) -> float:
        """Of the first windows of the evaluation text."""
        checkpoint = open_dense(directory)
        arguments = self.arguments
        options = TextOptions(text=tuple(arguments.evaluate_text), window=arguments.window)
        text = load_windows(options, load_tokenizer(checkpoint), vocabulary=checkpoint.config["vocab_size"])
        rows = torch.stack([text[index] for index in range(min(len(text), arguments.evaluate_windows))])
        model = load_model(checkpoint, device=self.device)
        return math.exp(mean_loss(anatomy_of(model), rows, batch_size=arguments.micro_batch))

    def calibration(self) -> dict[str, Any]:
        """Options of jobs that read the text once."""
        arguments = self.arguments
        return {
            "model": arguments.model,
            "text": tuple(arguments.text),
            "window": arguments.window,
            "windows": arguments.windows,
            "batch_size": arguments.micro_batch,
            "device": str(self.device),
            "seed": arguments.seed,
            "resume": True,
        }

    def training(self) -> dict[str, Any]:
        """Options of jobs that train: weights in float32, computed in bf16 on a GPU."""
        arguments = self.arguments
        return {
            "text": tuple(arguments.text),
            "window": arguments.window,
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "micro_batch": arguments.micro_batch,
            "learning_rate": arguments.learning_rate,
            "warmup_steps": min(50, arguments.steps // 4),
            "save_every": arguments.save_every,
            "compile": arguments.compile,
            "device": str(self.device),
            "dtype": "float32",
            "seed": arguments.seed,
            "resume": True,
        }

    def _add(self, name: str, row: dict[str, float]) -> None:
        dense = self.rows.get("dense", row)["perplexity"]
        self.rows[name] = {**row, "share": row["perplexity"] / dense}
        temporary = self._file.with_suffix(".partial")
        temporary.write_text(json.dumps({"options": self._options, "rows": self.rows}, indent=2) + "\n")
        temporary.replace(self._file)
        print(f"{name}: perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s", flush=True)

    def table(self) -> str:
        """All rows in Markdown."""
        lines = ["| model | perplexity | x dense | seconds | GB | MB |", "|---|---|---|---|---|---|"]
        for name, row in self.rows.items():
            numbers = [f"{row['perplexity']:.2f}", f"{row['share']:.2f}"]
            numbers += [f"{row['seconds']:.0f}", f"{row['GB']:.1f}", f"{row['MB']:.0f}"]
            lines.append(f"| {' | '.join([name, *numbers])} |")
        return "\n".join(lines)
