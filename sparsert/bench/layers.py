"""One linear layer at some batches: check every contender against float64, then time all of them in turn.

A contender's error may be at most twice cuBLAS's in the same dtype, both against float64. One that errs more
is not timed, so no speed can be quoted of a wrong result. One that raises gets its reason into its row
and the others go on; what a broken peer can do to the whole process is ``isolation.py``'s matter.

Source of the tolerance: flash-attention's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsert.bench.contenders import MAKERS, Layer
from sparsert.bench.layer_task import BrokenDeviceError, LayerTask, Row, empty_rows
from sparsert.bench.timing import CaptureError, Replay, Spread, time_in_turn

#: Errors below this are rounding of the accumulation itself: eight units in float32's last place.
LEAST_TOLERANCE = 8 * torch.finfo(torch.float32).eps

#: Outputs compared at a time, so that float64 copies of a large result stay small.
_COMPARED_AT_ONCE = 2**26


def relative_error(y: Tensor, reference: Tensor) -> float:
    """``|y - reference| / |reference|`` (Frobenius) with a float64 reference; infinite when y is not finite."""
    difference = norm = 0.0
    rows = max(1, _COMPARED_AT_ONCE // max(1, y.shape[-1]))
    for part, exact in zip(y.split(rows), reference.split(rows), strict=True):
        difference += float((part.double() - exact).square_().sum())
        norm += float(exact.square().sum())
    error = (difference / norm) ** 0.5 if norm else float(difference > 0)
    return error if error == error else float("inf")


def measure_layer(task: LayerTask, tell: Callable[[str], None] = lambda contender: None) -> Iterator[list[Row]]:
    """Measure one layer.

    Args:
        task: what to measure.
        tell: is called with a contender's name before anything of it runs.

    Yields:
        For each batch one row a contender, with the keys of a record's row of kind ``kernels`` except
        ``model``, ``layer`` and the shares, which need the roofs.

    Raises:
        BrokenDeviceError: a contender left the GPU unusable.
    """
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a capture cannot give back what earlier layers left
    torch.manual_seed(task.seed)
    made: dict[str, Any] = {}
    reasons: dict[str, str] = dict(task.excluded)
    tell("dense")
    try:
        layer = Layer.random(task.out_features, task.in_features, dtype, device)
    except torch.OutOfMemoryError as error:
        reason = _reason(error, device)
        yield from (empty_rows(task, batch, reason) for batch in task.batches)
        return
    for name in task.contenders:
        if name in reasons:
            continue
        tell(name)
        try:
            made[name] = MAKERS[name](layer)
        except Exception as error:
            reasons[name] = _reason(error, device)
    for batch in task.batches:
        rows = {row["contender"]: row for row in empty_rows(task, batch, None)}
        for name, reason in reasons.items():
            rows[name]["reason"] = reason
        try:
            replays = _check_all(layer, made, rows, tell)
        except torch.OutOfMemoryError as error:
            yield empty_rows(task, batch, _reason(error, device))
            continue
        tell("timing")
        for name, times in time_in_turn(replays, repeats=task.repeats).items():
            _fill(rows[name], times, made[name].weight_bytes)
        dense = rows["dense"]["time_us"]
        for name, row in rows.items():
            if dense is not None and name != "dense" and row["time_us"] is not None:
                row["speedup"] = dense["median"] / row["time_us"]["median"]
        yield list(rows.values())


def _check_all(
    layer: Layer, made: dict[str, Any], rows: dict[str, Row], tell: Callable[[str], None]
) -> dict[str, Replay]:
    """Run every contender once against float64 and capture those that are right; the rest get their reason."""
    device = layer.weight.device
    batch = rows["dense"]["batch"]
    x = torch.randn(batch, layer.weight.shape[1], device=device).to(layer.weight.dtype)
    reference = torch.nn.functional.linear(x.double(), layer.weight.double())
    dense_error = relative_error(torch.nn.functional.linear(x, layer.weight), reference)
    tolerance = max(2 * dense_error, LEAST_TOLERANCE)
    replays: dict[str, Replay] = {}
    for name, contender in made.items():
        tell(name)
        row = rows[name]
        row["dense_error"] = dense_error
        try:
            bound = contender.bind(x, lambda y: relative_error(y, reference) <= tolerance)
            row["kernel"] = bound.kernel
            row |= bound.details
            row["error"] = relative_error(bound.call(bound.weights[0]), reference)
            row["correct"] = row["error"] <= tolerance
            if row["correct"]:
                replays[name] = Replay(_all_of(bound.call, bound.weights), len(bound.weights), device)
            else:
                row["reason"] = f"wrong: error {row['error']:.1e}, more than twice dense's {dense_error:.1e}; not timed"
        except Exception as error:
            row["reason"] = _reason(error, device)
    return replays


def _all_of(call: Callable[[Any], Tensor], weights: Any) -> Callable[[], None]:
    def run_all() -> None:
        for weight in weights:  # results are dropped at once, so that all calls share the memory of one
            call(weight)

    return run_all


def _fill(row: Row, times: Spread, weight_bytes: int) -> None:
    row["time_us"] = times
    row["gb_per_s"] = weight_bytes / times["median"] / 1e3
    flop = 2 * row["batch"] * row["out_features"] * row["in_features"]
    row["tflop_per_s"] = flop / times["median"] / 1e6


def _reason(error: Exception, device: torch.device) -> str:
    """One sentence of an error, after a look whether the GPU still answers."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    if type(error).__name__ == "UnsupportedError":
        text = " ".join(lines)
    if isinstance(error, CaptureError):
        raise BrokenDeviceError(text) from error
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as broken:
            raise BrokenDeviceError(text) from broken
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
    return text
