"""What every measuring command takes and does with it: device, number format, seed, and where results go.

``sparsert.cli_bench`` calls :func:`add_common_options` for every command that measures, after the module's
own ``add_options``; a module must not add these itself. It also calls :func:`deliver` with the record that
``run`` returned. So a command prints its table on standard output and returns its record, and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")

_Item = TypeVar("_Item")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device --dtype --seed --output --csv --json`` to a command."""
    how = parser.add_argument_group("where to run")
    how.add_argument("--device", metavar="cpu|cuda", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    how.add_argument("--dtype", choices=DTYPES, help="number format (default: bfloat16, float32 on a CPU)")
    how.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random data (default: 0)")
    output = parser.add_argument_group("results")
    output.add_argument("--output", metavar="FILE", help="write the record of this run here, as JSON")
    output.add_argument("--csv", metavar="FILE", help="write the rows here, as CSV")
    output.add_argument("--json", action="store_true", help="print the record as one line of JSON, the last one")


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype that ``--dtype`` names; by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InputError: no such dtype.
    """
    import torch

    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: choose one of {', '.join(DTYPES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as records and ``--dtype`` say it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def parse_names(text: str, known: Sequence[str], option: str) -> list[str]:
    """A list of names separated by commas; ``all`` is all of them and ``none`` is none.

    Raises:
        InputError: a name that is not known.

    Example:
        >>> parse_names("b, a", ("a", "b", "c"), "--peers"), parse_names("none", ("a",), "--peers")
        (['b', 'a'], [])
    """
    if text in ("all", "none"):
        return list(known) if text == "all" else []
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"{', '.join(unknown)} is not known" if unknown else "nothing is named"
        raise InputError(f"{option} {text}: {what}; choose of {', '.join(known)}")
    return names


def parse_counts(text: str, option: str) -> list[int]:
    """A list of positive whole numbers separated by commas.

    Raises:
        InputError: something else.

    Example:
        >>> parse_counts("1,2,16", "--batch")
        [1, 2, 16]
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text}: give whole numbers from 1, separated by commas, e.g. {option} 1,8,64")
    return list(dict.fromkeys(int(part) for part in parts))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a run as its record holds them: all but the functions and where results go."""
    left_out = {"run", "output", "csv", "json"}
    return {
        name: value
        for name, value in sorted(vars(arguments).items())
        if name not in left_out
        and not callable(value)
        and (value is None or isinstance(value, (str, int, float, list)))
    }


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse an ``--output`` or ``--csv`` that could not be written, before an hour has been spent on measuring.

    Raises:
        InputError: it is a folder, or its folder cannot be written to.
    """
    for option in ("output", "csv"):
        given = getattr(arguments, option, None)
        if given is None:
            continue
        path = Path(given).expanduser()
        if path.is_dir():
            raise InputError(f"--{option} {given}: this is a folder; give a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"--{option} {given}: {folder} is no folder that can be written to; give another file")


def deliver(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the record to ``--output`` and ``--csv`` and print it with ``--json``, as asked.

    Raises:
        InputError: a file cannot be written, or the record breaks the schema.
    """
    from sparsert.bench.records import to_json_types, validate_record, write_csv, write_record

    validate_record(record, "this run")
    if arguments.output is not None:
        say(f"record: {write_record(record, arguments.output)}")
    if arguments.csv is not None:
        say(f"table: {write_csv(record, arguments.csv)}")
    if arguments.json:
        print(json.dumps(to_json_types(record), ensure_ascii=False), flush=True)


def say(sentence: str) -> None:
    """Prose goes to standard error; standard output is for results."""
    print(f"sparsert: {sentence}", file=sys.stderr, flush=True)


def remarks(record: dict[str, Any], *keys: str) -> list[str]:
    """The lines below a table: what was skipped and why, what fell back, and notes.

    Args:
        keys: of ``skipped``, ``fallbacks`` and ``notes``, default all.
    """
    lines = {
        "skipped": [f"skipped: {entry['peer']}: {entry['reason']}" for entry in record["skipped"]],
        "fallbacks": [f"fallback: {sentence}" for sentence in record["fallbacks"]],
        "notes": [f"note: {sentence}" for sentence in record["notes"]],
    }
    return [line for key in keys or lines for line in lines[key]]


def show(line: str) -> None:
    """A line of results: on standard output at once, above the progress bar if there is one."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def progress(items: Iterable[_Item], what: str, *, total: int | None = None) -> Iterator[_Item]:
    """Pass items on behind a progress bar on standard error; silent when that is not a terminal."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=what, total=total, disable=not sys.stderr.isatty(), leave=False, file=sys.stderr)
