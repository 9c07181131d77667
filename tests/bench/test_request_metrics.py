"""TTFT, TPOT, ITL and the rest by vLLM's definitions, on token times made by hand; prompts and lengths."""

from __future__ import annotations

import math

import numpy
import pytest

from sparsert.bench.metrics import Run, percentile, share_of_read, spread_ms, summarize
from sparsert.bench.workload import LENGTH_PRESETS, Setting, parse_lengths, random_prompts
from sparsert.errors import InputError

SETTING = Setting(batch=2, input_len=10, output_len=3, num_prompts=2)


def test_definitions() -> None:
    runs = [
        Run(((0.1, 0.2, 0.4), (0.1, 0.3, 0.7)), elapsed_s=0.8),
        Run(((0.2, 0.3, 0.4), (0.2, 0.3, 0.4)), elapsed_s=0.4),
    ]
    found = summarize(runs, SETTING)
    assert found["runs"] == 2
    assert found["ttft_ms"] == {"p50": pytest.approx(150), "p95": pytest.approx(200), "mean": pytest.approx(150)}
    # (E2E - TTFT) / 2 of each request: 150, 300, 100, 100
    assert found["tpot_ms"]["mean"] == pytest.approx(162.5) and found["tpot_ms"]["p50"] == pytest.approx(125)
    assert found["itl_ms"]["mean"] == pytest.approx((100 + 200 + 200 + 400 + 4 * 100) / 8)
    assert set(found["itl_ms"]) == {"p50", "p95", "p99", "mean"}
    assert found["e2e_ms"]["mean"] == pytest.approx((400 + 700 + 400 + 400) / 4)
    assert found["elapsed_s"] == pytest.approx(0.6)
    assert found["requests_per_s"] == pytest.approx(2 / 0.6)
    assert found["output_tok_per_s"] == pytest.approx(6 / 0.6)
    assert found["total_tok_per_s"] == pytest.approx(26 / 0.6)
    assert found["decode_tok_per_s"] == pytest.approx(2 / 0.125)


def test_one_token_has_no_tpot() -> None:
    found = summarize([Run(((0.1,),), 0.1)], Setting(1, 10, 1, 1))
    assert found["tpot_ms"]["mean"] == 0 and found["itl_ms"] is None and found["decode_tok_per_s"] is None
    assert found["ttft_ms"] == found["e2e_ms"]


def test_a_peer_that_does_not_stream() -> None:
    known = summarize([Run(((0.1, 0.5), (0.1, 0.5)), 0.5, streamed=False)], SETTING)
    assert known["itl_ms"] is None and known["tpot_ms"]["p50"] == pytest.approx(200)
    # requests that wait for others: nobody knows when their first token came
    queued = summarize([Run(((0.1, 0.5),) * 8, 0.5, streamed=False)], Setting(2, 10, 3, 8))
    assert queued["ttft_ms"] is None and queued["tpot_ms"] is None and queued["decode_tok_per_s"] is None
    assert queued["output_tok_per_s"] == pytest.approx(8 * 3 / 0.5)


@pytest.mark.parametrize("percent", [0, 5, 50, 95, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    for values in ([3.0], [1.0, 9.0], [4.0, 1.0, 8.0, 2.0, 9.5]):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))
    assert math.isnan(percentile([], 50))
    assert spread_ms([]) is None


def test_share_of_the_bandwidth() -> None:
    setting = Setting(batch=4, input_len=128, output_len=128, num_prompts=4)
    share = share_of_read(8_000_000_000, 1000, setting, tpot_ms=4.0, read_bytes_per_s=3e12)
    assert share == pytest.approx((8e9 + 4 * 192 * 1000) / 4e-3 / 3e12)
    assert share_of_read(1, 1, setting, 4.0, None) is None
    assert share_of_read(1, 1, setting, 0.0, 3e12) is None


def test_lengths() -> None:
    assert parse_lengths("maskllm") == [(128, 128), (128, 2048), (2048, 128), (2048, 2048)]
    assert parse_lengths("12/128,shortened-llama, 1/1") == [(12, 128), (12, 512), (1, 1)]
    assert all(parse_lengths(name) == list(pairs) for name, pairs in LENGTH_PRESETS.items())
    for text in ("", "128", "0/5", "5/", "a/b", "1/2/3", "maskllm,"):
        with pytest.raises(InputError, match="--lengths"):
            parse_lengths(text)


def test_prompts_are_the_same_everywhere() -> None:
    setting = Setting(batch=2, input_len=5, output_len=1, num_prompts=4)
    prompts = random_prompts(setting, 512, seed=1)
    # the very ids: Python's generator is the same in every version, so a peer on another machine reads these
    assert prompts[0] == [440, 418, 322, 369, 472]
    assert prompts == random_prompts(setting, 512, seed=1) != random_prompts(setting, 512, seed=2)
    assert [len(prompt) for prompt in prompts] == [5] * 4 and len({tuple(prompt) for prompt in prompts}) == 4
    assert all(3 <= token < 512 for prompt in prompts for token in prompt)
    # a smaller batch reads the first prompts of a larger one
    assert random_prompts(Setting(1, 5, 9, 1), 512, seed=1) == prompts[:1]
