"""``sparsert bench report``: records of the measuring commands as one page that can be looked at and sent on.

The records stay the truth; the page draws them and repeats every number. It is one file without
script or external parts, so it opens anywhere, also from a mail, and can be kept beside the records.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from sparsert.bench.records import read_record
from sparsert.bench.report.page import build_page
from sparsert.bench.report.png import require_matplotlib, write_pngs
from sparsert.errors import InputError

HELP = "draw records as one HTML page"

EXAMPLES = """\
examples:
  sparsert bench report kernels.json latency.json -o report.html
  sparsert bench report h100/*.json h200/*.json -o report.html --png plots

Any records in any number: charts that they cannot give are left out, and the page says which. GPUs
stand side by side; what one GPU measured twice is shown as measured last.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsert bench report``."""
    parser.add_argument(
        "records", metavar="RECORD", nargs="+", help="JSON record that a bench command wrote with --output"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="report.html", help="page to write (default: %(default)s)"
    )
    parser.add_argument("--png", metavar="DIR", help="write each chart as a PNG here too; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print what was written as one line of JSON")


def run(arguments: argparse.Namespace) -> None:
    """Read the records, write the page and, if asked, the PNGs, and say so on standard output.

    Raises:
        InputError: a record cannot be read, nothing was given to draw, the output cannot be written,
            or ``--png`` is asked for without matplotlib.
    """
    output = Path(arguments.output).expanduser()
    if output.is_dir():
        raise InputError(
            f"--output {output}: this is a directory; give the name of the page, e.g. {output / 'report.html'}"
        )
    if arguments.png is not None:
        require_matplotlib()
    records = [read_record(path) for path in dict.fromkeys(arguments.records)]
    if not any(record["results"] or record["skipped"] for record in records):
        raise InputError("none of the records holds a result; give records of runs that measured something")
    page = build_page(records)
    _write(output, page.html)
    pngs = [] if arguments.png is None else write_pngs(page.figures, Path(arguments.png).expanduser())
    if arguments.json:
        facts = {
            "report": str(output),
            "records": len(records),
            "charts": len(page.figures),
            "pngs": [str(png) for png in pngs],
        }
        print(json.dumps(facts))
        return
    charts = _count(len(page.figures), "chart")
    said = f"{output}: {_count(len(records), 'record')}, {charts}, {len(page.html) / 1e3:.0f} kB"
    print(said + (f"; {_count(len(pngs), 'PNG')} in {arguments.png}" if pngs else ""))


def _write(path: Path, text: str) -> None:
    """Write through a file beside it, so that a page that is open elsewhere is never half written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({error.strerror}); give another file") from error


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
