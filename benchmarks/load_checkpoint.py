"""Measure loading: a checkpoint's bytes through safetensors' own reader, and the model that we make of them.

    python benchmarks/load_checkpoint.py DIR [--masks FILE] [--device cuda] [--cold] [--output load.json]

Contenders take turns in one process, on the same files and device, after a run of each that is not counted:

    load_file         ``safetensors.torch.load_file`` of every file, and with its ``pread`` backend
    stream            our reader alone: every tensor of the files onto the device, nothing packed
    load_model        the model: read, checked, packed 2:4, projections joined

Before every run the files are in the page cache (warm: read once by this process), or with ``--cold`` the system was
asked to drop them from it, which it does for files that nobody else holds. GB/s count the bytes of the files, shares
are of the faster load_file. What was read is compared bit for bit first. Host memory is what the process held privately
above what it had before, sampled every few milliseconds; page-locked memory may not show in it: it is ``ring_bytes``.
On a CPU load_file only maps, so it is left out there. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from json_document import publish
from safetensors.torch import load_file
from torch import Tensor

from sparsert.bench.records import machine_facts
from sparsert.checkpoint import Checkpoint, open_checkpoint, read_maskllm
from sparsert.checkpoint.staging import PIECE_BYTES, PIECES
from sparsert.checkpoint.stored import BITMASK_24, DENSE
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.models import load_model

_READ_BYTES = 1 << 24


class PrivateMemory:
    """The most private memory of this process in a ``with``, above what it had at the start, in bytes."""

    def __enter__(self) -> PrivateMemory:
        self._begin, self.growth_bytes = self._now(), 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._over.wait(0.003):
            self.growth_bytes = max(self.growth_bytes, self._now() - self._begin)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0


def place_in_cache(files: list[Path], *, cold: bool) -> None:
    """Read all files, or ask the system to forget them."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            if cold:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(_READ_BYTES):
                    pass


def stream_all(checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """Every tensor of the files, by its name in them, but for the few bytes of shapes."""
    tensors: dict[str, Tensor] = {}
    with TensorStream(checkpoint, device) as stream:
        for name in checkpoint.names:
            if checkpoint.storage(name) == BITMASK_24:
                infos = checkpoint.part_infos(name)
                parts = stream.read_packed(name, checkpoint.dtype(name))
                tensors |= dict(zip((infos["compressed"][0], infos["bitmask"][0]), parts, strict=True))
            elif checkpoint.storage(name) == DENSE:
                tensors[name] = stream.read(name, checkpoint.dtype(name))
    return tensors


def check_same(checkpoint: Checkpoint, device: torch.device) -> int:
    """Compare what the stream reads with the library's reader, bit for bit; how many tensors were equal."""
    ours = stream_all(checkpoint, device)
    for file in checkpoint.files:
        theirs = load_file(file, device=str(device))
        for name in [name for name in theirs if name in ours]:
            if not torch.equal(theirs[name].reshape(-1).view(torch.uint8), ours[name].reshape(-1).view(torch.uint8)):
                raise SystemExit(f"{file}: {name} was read differently")
    return len(ours)


def measure(run: Callable[[], Any], prepare: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds and private host memory of one run."""
    prepare()
    with PrivateMemory() as memory:
        begin = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    del result
    return {"seconds": seconds, "host_bytes": memory.growth_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--masks", type=Path, help="mask file for the model's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every run")
    parser.add_argument("--output", type=Path, help="the JSON document as a file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    checkpoint = open_checkpoint(arguments.directory)
    files = [*checkpoint.files, *([arguments.masks] if arguments.masks else [])]
    nbytes = checkpoint.total_nbytes

    def plain(**options: str) -> list[dict[str, Tensor]]:
        return [load_file(file, device=str(device), **options) for file in checkpoint.files]

    def ours() -> torch.nn.Module:
        masks = read_maskllm(arguments.masks) if arguments.masks else None
        return load_model(open_checkpoint(arguments.directory), device=device, dtype=arguments.dtype, masks=masks)

    contenders: dict[str, Callable[[], Any]] = {"load_file": plain} if device.type == "cuda" else {}
    if "backend" in inspect.signature(load_file).parameters:
        contenders["load_file pread"] = lambda: plain(backend="pread")
    contenders |= {"stream": lambda: stream_all(checkpoint, device), "load_model": ours}
    record: dict[str, Any] = {
        "benchmark": "load_checkpoint",
        "machine": machine_facts(device),
        "checkpoint_bytes": nbytes,
        "files": len(checkpoint.files),
        "masks": arguments.masks is not None,
        "page_cache": "dropped before every run" if arguments.cold else "warm",
        "ring_bytes": PIECE_BYTES * PIECES,
        "largest_tensor_bytes": max(checkpoint.nbytes(name) for name in checkpoint.names),
        "tensors_compared": check_same(checkpoint, device),
        "results": [],
    }
    for run in contenders.values():
        run()  # what is imported, allocated and set up once in a process is not counted
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            runs[name].append(measure(run, lambda: place_in_cache(files, cold=arguments.cold), device))
    medians = {name: statistics.median(entry["seconds"] for entry in found) for name, found in runs.items()}
    fastest_plain = min((medians[name] for name in medians if name.startswith("load_file")), default=float("nan"))
    for name, found in runs.items():
        row = {
            "contender": name,
            "seconds": (seconds := medians[name]),
            "fastest_seconds": min(entry["seconds"] for entry in found),
            "gb_per_s": nbytes / seconds / 1e9,
            "share_of_load_file": fastest_plain / seconds,
            "host_bytes": max(entry["host_bytes"] for entry in found),
        }
        record["results"].append(row)
        print(
            f"{name:16} {seconds:8.3f} s  {row['gb_per_s']:7.2f} GB/s  {row['share_of_load_file']:6.2f} of load_file  "
            f"{row['host_bytes'] / 1e6:8.1f} MB of host memory"
        )
    publish(record, arguments.output)


if __name__ == "__main__":
    main()
