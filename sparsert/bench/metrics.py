"""From the times at which tokens came to the numbers that people compare.

Definitions are vLLM's, because those are the ones in use:

    TTFT   request sent -> first token
    TPOT   (E2E - TTFT) / (output tokens - 1) of each request, 0 for a single token
    ITL    every gap between tokens of a request, all requests together
    E2E    request sent -> last token
    output tok/s, total tok/s   tokens generated, or generated and read, over the time from sending the
                                requests until the last one has ended

and one that vLLM does not have: MBU, the share of the measured read bandwidth that a decode step reaches on
the bytes it cannot avoid reading, which are the weights once and the keys and values of the texts so far.

Source: vLLM ``benchmarks/{latency,throughput,serve}.py``; MBU as in nanochat's ``infer_bench.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsert.bench.workload import Setting


@dataclasses.dataclass(frozen=True)
class Run:
    """One time that the prompts of a setting were sent.

    Attributes:
        token_s: for each request the seconds from sending it until each of its tokens came. A peer that does
            not say when tokens come gives the first and the last only, see ``output_len``.
        elapsed_s: seconds until the last request had ended.
        streamed: whether ``token_s`` holds every token.
    """

    token_s: tuple[tuple[float, ...], ...]
    elapsed_s: float
    streamed: bool = True


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation, as numpy's default; NaN of nothing.

    Example:
        >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
        2.5
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(seconds: Iterable[float], percents: Sequence[int] = (50, 95)) -> dict[str, float] | None:
    """``p50``, ``p95``, ... and ``mean`` in milliseconds; None if there are no values."""
    values = [value * 1e3 for value in seconds]
    if not values:
        return None
    spread = {f"p{percent}": percentile(values, percent) for percent in percents}
    return spread | {"mean": math.fsum(values) / len(values)}


def summarize(runs: Sequence[Run], setting: Setting) -> dict[str, Any]:
    """The times of a row.

    Returns:
        ``ttft_ms``, ``tpot_ms``, ``itl_ms``, ``e2e_ms`` (each with ``p50``, ``p95`` and ``mean``; ITL with ``p99``,
        None where a peer does not say), ``elapsed_s`` (median), ``output_tok_per_s``, ``total_tok_per_s``,
        ``requests_per_s`` (of the median run), ``decode_tok_per_s`` (batch / TPOT p50), and ``runs``.
    """
    # without a stream the first and last token of a request are known only if no request waited for another
    known = [run for run in runs if run.streamed or setting.num_prompts <= setting.batch]
    requests = [times for run in known for times in run.token_s]
    steps = setting.output_len - 1
    tpot = spread_ms((times[-1] - times[0]) / steps if steps else 0.0 for times in requests)
    gaps = [
        after - before
        for run in runs
        if run.streamed
        for times in run.token_s
        for before, after in itertools.pairwise(times)
    ]
    elapsed_s = percentile([run.elapsed_s for run in runs], 50)
    return {
        "runs": len(runs),
        "ttft_ms": spread_ms(times[0] for times in requests),
        "tpot_ms": tpot,
        "itl_ms": spread_ms(gaps, (50, 95, 99)),
        "e2e_ms": spread_ms(times[-1] for times in requests),
        "elapsed_s": elapsed_s,
        "requests_per_s": setting.num_prompts / elapsed_s,
        "output_tok_per_s": setting.num_prompts * setting.output_len / elapsed_s,
        "total_tok_per_s": setting.num_prompts * setting.length / elapsed_s,
        "decode_tok_per_s": setting.batch / tpot["p50"] * 1e3 if tpot and tpot["p50"] > 0 else None,
    }


def share_of_read(
    read_bytes: int, kv_bytes_per_token: int, setting: Setting, tpot_ms: float, read_bytes_per_s: float | None
) -> float | None:
    """MBU of a decode step: bytes that it has to read, per second of TPOT, as a share of the measured bandwidth.

    Args:
        read_bytes: weights that every step reads.
        kv_bytes_per_token: keys and values of one token of one text.
        tpot_ms: of the batch; one step adds a token to every text.
        read_bytes_per_s: measured roof, None if there is none.
    """
    if read_bytes_per_s is None or not tpot_ms > 0:
        return None
    step_bytes = read_bytes + setting.batch * setting.mean_context * kv_bytes_per_token
    return step_bytes / (tpot_ms * 1e-3) / read_bytes_per_s
