"""The cards at the top of a report: what a reader takes away, from checked results only.

A card never picks the best case: layers are summed up by their geometric mean at the smallest
batch with the range and the largest layer beside it, models are shown at the first lengths and the
smallest batch of the record. A result that was wrong turns its card into a warning; one that was
not compared gives none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsert.bench.report.numbers import microseconds, milliseconds, number, percent, size, times
from sparsert.bench.report.rows import Gpu, Row, batches, contender, distinct, in_order, lengths, matching


@dataclass(frozen=True)
class Card:
    """One headline: what it is about, the figure, and the words that put it in place."""

    about: str
    figure: str
    words: tuple[str, ...]
    good: bool | None = None


def cards(gpu: Gpu) -> list[Card]:
    """The headlines of one GPU, in the order of the page."""
    return [
        *_layers(gpu.rows("kernels")),
        *_models(gpu.rows("latency") or gpu.rows("throughput")),
        *_check(gpu.rows("check")),
    ]


def _layers(rows: Sequence[Row]) -> list[Card]:
    ours = [row for row in matching(rows, contender="ours") if number(row, "time_us.median") is not None]
    found = batches(ours)
    if not found:
        return []
    at_smallest = matching(ours, batch=found[0])
    failed = sum(row.get("correct") is False for row in ours)
    if failed:
        return [Card("Linear layers", f"{failed} wrong", (f"of {len(ours)} results; see the tables below",), False)]
    if any(row.get("correct") is not True for row in at_smallest):
        return []
    out = []
    gains = [(number(row, "speedup"), row) for row in at_smallest]
    known = [(gain, row) for gain, row in gains if gain]
    if known:
        mean = math.exp(sum(math.log(gain) for gain, _ in known) / len(known))
        low, high = min(gain for gain, _ in known), max(gain for gain, _ in known)
        gain, largest = max(
            known, key=lambda pair: (number(pair[1], "out_features") or 0) * (number(pair[1], "in_features") or 0)
        )
        words = [f"geometric mean of {len(known)} layers, {times(low)} to {times(high)}"]
        ours_us = number(largest, "time_us.median")
        if ours_us is not None:
            shape = f"{largest.get('out_features')} × {largest.get('in_features')}"
            words.append(f"{shape}: {microseconds(ours_us)}, dense {microseconds(ours_us * gain)}")
        out.append(Card(f"Linear layers over dense, batch {found[0]:g}", times(mean), tuple(words), True))
    even = _break_even(ours, found)
    if even is not None:
        out.append(Card("Largest batch at which no layer is slower", f"{even:g}", (_losses(ours, found, even),), True))
    shares = [share for row in at_smallest if (share := number(row, "share_of_read")) is not None]
    if shares:
        median = f"median of the layers at batch {found[0]:g}, {percent(min(shares))} to {percent(max(shares))}"
        out.append(Card("Of the measured read bandwidth", percent(sorted(shares)[len(shares) // 2]), (median,), True))
    return out


def _break_even(ours: Sequence[Row], found: Sequence[float]) -> float | None:
    """The largest batch up to which no layer is slower than dense."""
    reached = None
    for batch in found:
        gains = [number(row, "speedup") for row in matching(ours, batch=batch) if row.get("correct") is True]
        if not gains or any(gain is None or gain < 1 for gain in gains):
            break
        reached = batch
    return reached


def _losses(ours: Sequence[Row], found: Sequence[float], even: float) -> str:
    above = [batch for batch in found if batch > even]
    if not above:
        return "at every batch size measured"
    gains = [gain for row in matching(ours, batch=above[0]) if (gain := number(row, "speedup")) is not None]
    return f"at batch {above[0]:g} the slowest layer is at {times(min(gains))}" if gains else "no more was measured"


def _models(rows: Sequence[Row]) -> list[Card]:
    out = []
    for model, dtype in distinct(rows, "model", "dtype"):
        of_model = matching(rows, model=model, dtype=dtype)
        smallest = batches(of_model)[:1]
        if not smallest:
            continue
        first = of_model[0]
        group = matching(
            of_model, batch=smallest[0], input_len=first.get("input_len"), output_len=first.get("output_len")
        )
        baseline = next((row for row in group if contender(row) == "dense"), None)
        ours = [row for row in group if row.get("peer") == "ours" and contender(row) != "dense"]
        for name in in_order(contender(row) for row in ours):
            row = matching(ours, corner=name)[0]
            about = f"{model}, {name}"
            if row.get("correct") is False:
                out.append(Card(about, "wrong", ("its result differs from the reference; see the table below",), False))
            elif row.get("correct") is True and (gain := number(row, "speedup_vs_dense")) is not None:
                out.append(Card(about, times(gain), _model_words(row, baseline, group), True))
    return out


def _model_words(row: Row, baseline: Row | None, group: Sequence[Row]) -> tuple[str, ...]:
    """Where it was measured, time per token, weights, and the fastest peer of the same run."""
    words = [", ".join(filter(None, (f"batch {row.get('batch')}", lengths(row))))]
    for key, name, write in (("tpot_ms.p50", " a token", milliseconds), ("weight_bytes", " of weights", size)):
        own, dense = number(row, key), number(baseline or {}, key)
        if own is not None:
            words.append(write(own) + name + (f", dense {write(dense)}" if dense is not None else ""))
    peers = [
        (spent, contender(peer))
        for peer in group
        if peer.get("peer") not in ("ours", "dense")
        and peer.get("correct") is not False
        and (spent := number(peer, "tpot_ms.p50")) is not None
    ]
    if peers:
        spent, name = min(peers)
        words.append(f"fastest peer: {name}, {milliseconds(spent)} a token")
    return tuple(words)


def _check(rows: Sequence[Row]) -> list[Card]:
    if not rows:
        return []
    about, of_all = "Against the committed records", (f"of {len(rows)} ratios to dense",)
    failed, slower = sum(row.get("correct") is False for row in rows), sum(bool(row.get("slower")) for row in rows)
    if failed:
        return [Card(about, f"{failed} wrong", of_all, False)]
    return [Card(about, f"{slower} slower" if slower else "none slower", of_all, not slower)]
