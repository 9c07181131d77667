"""One JSON document a run: what was measured, on what machine, against what roofs, and what could not be measured.

A number without its circumstances cannot be compared with anything, so the circumstances are part of the
format and a record without them is refused. The schema is written out in docs/bench.md; a change that a
reader of old records would notice raises ``SCHEMA_VERSION``. Reading needs neither torch nor a GPU. What
it gives up: rows are checked for the keys that every reader relies on, not value by value.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert import __version__
from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

KINDS = ("kernels", "latency", "throughput", "fit", "profile", "check")

#: Keys of a record and the JSON types they hold.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "kind": str,
    "created": str,
    "command": list,
    "machine": dict,
    "roofs": dict,
    "settings": dict,
    "results": list,
    "skipped": list,
    "fallbacks": list,
    "notes": list,
}

MACHINE_KEYS = (
    "gpu", "compute_capability", "multiprocessors", "memory_bytes", "driver", "clocks", "temperature", "python",
    "torch", "cuda", "triton", "transformers", "sparsert", "commit", "cpu",
)  # fmt: skip

ROOF_KEYS = ("read_bytes_per_s", "dense_flop_per_s")

#: Keys that every row of a kind has; a row may have more.
ROW_KEYS: dict[str, tuple[str, ...]] = {
    "kernels": (
        "model", "layer", "out_features", "in_features", "batch", "dtype", "contender", "kernel", "time_us",
        "gb_per_s", "tflop_per_s", "share_of_read", "share_of_rate", "speedup", "error", "dense_error", "correct",
        "reason",
    ),
    "check": ("what", "before", "now", "change", "slower", "correct"),
    "latency": ("peer", "corner", "model", "batch", "input_len", "output_len"),
    "throughput": ("peer", "corner", "model", "batch", "input_len", "output_len"),
    "fit": ("corner",),
    "profile": ("part",),
}  # fmt: skip

#: nvidia-smi and git answer in under a second; one that hangs must not hang a benchmark.
_TOOL_TIMEOUT_SECONDS = 10


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def new_record(
    kind: str,
    settings: dict[str, Any],
    *,
    device: torch.device | str | None = None,
    roofs: dict[str, float | None] | None = None,
) -> dict[str, Any]:
    """An empty record of a run that starts now on this machine.

    Args:
        kind: one of :data:`KINDS`.
        settings: the run's options as plain JSON types.
        device: where it runs, default a GPU if there is one.
        roofs: what :func:`sparsert.bench.timing.measure_roofs` returned, if it was measured already.

    Returns:
        The record; append rows to ``results`` and sentences to ``skipped``, ``fallbacks`` and ``notes``.

    Raises:
        InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"record kind {kind!r}: choose one of {', '.join(KINDS)}")
    return {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # files without their folders: a path of this machine means nothing to the next reader
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "sparsert"), *map(_without_folder, sys.argv[1:])],
        "machine": machine_facts(device),
        "roofs": dict(roofs) if roofs is not None else dict.fromkeys(ROOF_KEYS),
        "settings": dict(settings),
        "results": [],
        "skipped": [],
        "fallbacks": [],
        "notes": [],
    }


def write_record(record: dict[str, Any], path: str | Path) -> Path:
    """Check a record and write it as JSON; folders are made, numbers that are not finite become null.

    Raises:
        InputError: the record is not one (see :func:`validate_record`), or the file cannot be written.
    """
    path = Path(path).expanduser()
    plain = to_json_types(record)
    validate_record(plain, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the record cannot be written ({error.strerror}); give another file") from error
    return path


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record and check it.

    Raises:
        InputError: there is no such file, it is no JSON, or no record; the message says where and what.
    """
    path = Path(path).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the record cannot be read ({error.strerror}); give a file of --output") from error
    except ValueError as error:
        raise InputError(f"{path}: this is not JSON ({error}); give a file that --output wrote") from error
    validate_record(record, str(path))
    assert isinstance(record, dict)
    return record


def validate_record(record: Any, name: str = "record") -> None:
    """Check that something is a record of this schema.

    Raises:
        InputError: names the first key or row that is wrong.

    Example:
        >>> validate_record({"schema": 0}, "old.json")
        Traceback (most recent call last):
        sparsert.errors.InputError: old.json: schema 0, this version reads 1; measure again
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise InputError(f"{name}: this is not a sparsert benchmark record (no key 'schema'); give a file of --output")
    if record["schema"] != SCHEMA_VERSION:
        raise InputError(f"{name}: schema {record['schema']}, this version reads {SCHEMA_VERSION}; measure again")
    for key, kind in _KEYS.items():
        if key not in record:
            raise InputError(f"{name}: key {key!r} is missing; the record is damaged, measure again")
        if not isinstance(record[key], kind):
            raise InputError(f"{name}: {key!r} holds a {type(record[key]).__name__}, which the schema does not have")
    if record["kind"] not in KINDS:
        raise InputError(f"{name}: kind {record['kind']!r} is unknown; known are {', '.join(KINDS)}")
    for key, needed in (("machine", MACHINE_KEYS), ("roofs", ROOF_KEYS)):
        missing = [part for part in needed if part not in record[key]]
        if missing:
            raise InputError(f"{name}: {key!r} lacks {', '.join(missing)}; the record is damaged, measure again")
    for index, row in enumerate(record["results"]):
        if not isinstance(row, dict):
            raise InputError(f"{name}: results[{index}] is a {type(row).__name__}, not an object")
        missing = [key for key in ROW_KEYS[record["kind"]] if key not in row]
        if missing:
            raise InputError(f"{name}: results[{index}] of kind {record['kind']} lacks {', '.join(missing)}")
    for index, entry in enumerate(record["skipped"]):
        if not isinstance(entry, dict) or not {"peer", "reason"} <= set(entry):
            raise InputError(f"{name}: skipped[{index}] must be an object with 'peer' and 'reason'")


def to_json_types(value: Any) -> Any:
    """The same as dicts, lists, strings, finite numbers, booleans and null."""
    if isinstance(value, dict):
        return {str(key): to_json_types(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_csv(record: dict[str, Any], path: str | Path) -> Path:
    """Write the rows as CSV, one line a row, for spreadsheets and data frames.

    Columns: ``created, kind, gpu, commit``, then the keys of the rows in the order in which they first
    come; what a row holds as an object becomes one column a part, e.g. ``time_us.median``.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path).expanduser()
    head = {
        "created": record["created"],
        "kind": record["kind"],
        "gpu": record["machine"]["gpu"],
        "commit": record["machine"]["commit"],
    }
    rows = [head | _flatten(row) for row in to_json_types(record["results"])]
    columns = list(dict.fromkeys(key for row in [head, *rows] for key in row))
    # what is an object in one row and null in another needs no column of its own
    columns = [column for column in columns if not any(other.startswith(f"{column}.") for other in columns)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"{path}: the table cannot be written ({error.strerror}); give another file") from error
    return path


def _flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
        else:
            flat[prefix + key] = value
    return flat


def machine_facts(device: torch.device | str | None = None) -> dict[str, Any]:
    """What every record says about where it was made.

    Args:
        device: the device measured on, default a GPU if there is one. For the CPU all that is the GPU's
            is None.

    Returns:
        :data:`MACHINE_KEYS`; ``clocks`` in MHz and watts as ``{sm, memory, sm_max, memory_max, power_limit_w}``,
        ``temperature`` in degrees Celsius. What could not be found out is None.
    """
    import torch

    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = dict.fromkeys(MACHINE_KEYS)
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
        facts |= _driver_facts(properties, where.index or 0)
    return facts | {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sparsert": __version__,
        "commit": source_commit(),
        "cpu": _cpu_name(),
    }


def machine_slug(machine: dict[str, Any]) -> str:
    """Folder name of a machine's records under benchmarks/results.

    Example:
        >>> machine_slug({"gpu": "NVIDIA H100 80GB HBM3"}), machine_slug({"gpu": None})
        ('nvidia-h100-80gb-hbm3', 'cpu')
    """
    return re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"] or "cpu").lower()).strip("-")


def _driver_facts(properties: Any, index: int) -> dict[str, Any]:
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    # by its unique name: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what the driver's tool sees
    which = f"GPU-{properties.uuid}" if getattr(properties, "uuid", None) else str(index)
    answer = _tool(
        "nvidia-smi", "-i", which, f"--query-gpu=driver_version,{','.join(fields)}", "--format=csv,noheader,nounits"
    )
    parts = [part.strip() for part in (answer or "").split(",")]
    if len(parts) != 1 + len(fields):
        return {}
    sm, memory, sm_max, memory_max, power, temperature = (_number(part) for part in parts[1:])
    clocks = {"sm": sm, "memory": memory, "sm_max": sm_max, "memory_max": memory_max, "power_limit_w": power}
    return {"driver": parts[0], "clocks": clocks, "temperature": temperature}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # e.g. "[N/A]" on a virtual GPU
        return None


def source_commit() -> str | None:
    """Commit of the source tree that runs, with ``-dirty`` when files differ from it; None outside of one.

    A copy without git history can say its commit in the environment variable SPARSERT_COMMIT.
    """
    told = os.environ.get("SPARSERT_COMMIT")
    if told:
        return told
    # a package installed from the tree one stands in has that tree's commit, but no other repository's
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "csrc" / "linear24_table.inc").is_file() and (folder / "sparsert" / "__init__.py").is_file():
            return _tool("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*")
    return None


def _tool(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {os.cpu_count()} threads"
