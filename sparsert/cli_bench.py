"""``sparsert bench``: which measurements there are, and what happens to their records.

Each measurement is a module of ``sparsert.bench`` with ``add_options(parser)`` and ``run(arguments)``, which
prints its table and returns its record. They import torch, so a module is loaded only when its own
command is parsed: ``sparsert --help`` and ``sparsert bench --help`` answer from the table below.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sparsert.cli_options import Parser

#: `bench check` found something slower, or wrong where it was right.
EXIT_SLOWER = 3

_EXAMPLES = """\
examples:
  sparsert bench kernels --output kernels.json             single layers against cuBLAS, cuSPARSELt, CUTLASS
  sparsert bench latency --arch llama-3.1-8b --peers dense,hf,hf-compile --output latency.json
  sparsert bench report kernels.json latency.json -o report.html
  sparsert bench check                                     quick set against the committed records of this GPU

Each run writes one JSON record with --output: machine, roofs, every number with its correctness check, and
what was skipped and why. docs/bench.md describes the format.
"""


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """One command of ``sparsert bench``.

    Attributes:
        module: of ``sparsert.bench``, loaded when the command is parsed.
        help_text: one line for ``--help``.
        measures: whether it runs on a device and returns a record, and so takes the common options.
    """

    module: str
    help_text: str
    measures: bool = True


MEASUREMENTS: dict[str, _Measurement] = {
    "kernels": _Measurement("kernels", "time single linear layers against cuBLAS, cuSPARSELt and CUTLASS"),
    "latency": _Measurement("latency", "time to first token and per token, by batch and length, against peers"),
    "throughput": _Measurement("throughput", "measure tokens per second of many prompts, against peers"),
    "fit": _Measurement("fit", "find the largest batch and the longest output that fit into a given memory"),
    "profile": _Measurement("profile", "split one decode step into linears, attention, head, sampling and gaps"),
    "report": _Measurement("report", "draw records as one self-contained HTML page", measures=False),
    "check": _Measurement("check", "compare a quick run with committed records of this GPU; exit code 3 if slower"),
}


class _MeasurementParser(Parser):
    """A parser that gets its options when it is first used, so that the others' modules stay unloaded."""

    measurement: _Measurement | None = None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if self.measurement is not None:
            measurement, self.measurement = self.measurement, None
            module = _module(measurement)
            module.add_options(self)
            if measurement.measures:
                from sparsert.bench.options import add_common_options

                add_common_options(self)
            self.epilog = getattr(module, "EXAMPLES", None)
        return super().parse_known_args(args, namespace)


def add_bench(commands: Any) -> None:
    """Add ``bench`` and its subcommands to what ``add_subparsers`` returned."""
    bench = commands.add_parser(
        "bench",
        help="measure layers and models against dense and peers",
        description="Measure layers and models against dense and peers, in the same run on the same machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    measurements = bench.add_subparsers(
        title="measurements", metavar="WHAT", required=True, parser_class=_MeasurementParser
    )
    for name, measurement in MEASUREMENTS.items():
        parser = measurements.add_parser(
            name,
            help=measurement.help_text,
            description=measurement.help_text[0].upper() + measurement.help_text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.measurement = measurement
        parser.set_defaults(run=functools.partial(run_measurement, measurement))


def run_measurement(measurement: _Measurement, arguments: argparse.Namespace) -> int | None:
    """Run one measurement, then write and print its record as the options say, also if a signal cut it off.

    Returns:
        :data:`EXIT_SLOWER` when a check failed, 128 and the number of a signal that cut it off, else None.

    Raises:
        SparsertError: options that do not fit, or a device or file that is not there.
    """
    from sparsert.bench.cut_off import CutOff, signals_raise
    from sparsert.bench.options import check_outputs, deliver, say

    if measurement.measures:
        check_outputs(arguments)
    try:
        with signals_raise():
            record = _module(measurement).run(arguments)
    except CutOff as cut:
        say(str(cut))
        deliver(cut.record, arguments)
        return 128 + cut.signal_number
    if record is None:
        return None
    deliver(record, arguments)
    failed = record["kind"] == "check" and any(row["slower"] or row["correct"] is False for row in record["results"])
    return EXIT_SLOWER if failed else None


def _module(measurement: _Measurement) -> ModuleType:
    return importlib.import_module(f"sparsert.bench.{measurement.module}")
