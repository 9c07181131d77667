"""The scripts that measure vLLM with our plugin, as far as they go without vLLM."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import vllm_plugin
import vllm_tokens
import vllm_worker


def answer(step_ms: list[float], weight_bytes: list[int], **more: Any) -> dict[str, Any]:
    rows = [
        {"batch": batch, "step_ms": step, "tok_per_s": 1e3 * batch / step, "ttft_ms": 1.0}
        for batch, step in zip((1, 16), step_ms, strict=True)
    ]
    ranks = [{"weight_bytes": nbytes, "modules": {"a": nbytes // 2}, "lines": ["line"]} for nbytes in weight_bytes]
    return {"rows": rows, "ranks": ranks, "load_s": 2.0, "vllm": "0.24.0", **more}


@pytest.mark.parametrize(("ratio", "layer", "correct"), [(1.9, "a", True), (2.1, "a", False), (0.0, None, False)])
def test_a_record_compares_two_engines(ratio: float, layer: str | None, correct: bool) -> None:
    record = vllm_plugin.compare(
        {
            "vllm": answer([6.0, 8.0], [1000, 1000]),
            "vllm + sparsert": answer([4.0, 6.4], [600, 600], worst={"layer": layer, "ratio": ratio}),
        }
    )
    assert record["weight_share"] == 0.6 and record["packed_layers"] == 2 and record["report"] == ["line"] * 2
    assert [row["speedup"] for row in record["results"]] == [1.0, 1.0, 1.5, 1.25]
    assert record["correct"] is correct, "a run in which nothing was packed proves nothing"


def test_the_dense_engine_runs_the_same_configuration(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_text(
        json.dumps({"hidden_size": 8, "quantization_config": {"quant_method": "sparsert"}})
    )
    arguments = argparse.Namespace(
        directory=packed, dense=None, batch=[1, 8], input_len=32, output_len=16, runs=3, seed=0, tensor_parallel=2,
        engine={"disable_custom_all_reduce": True},
    )  # fmt: skip
    jobs = vllm_plugin.contenders(arguments, tmp_path)
    dense, ours = jobs["vllm"]["engine"], jobs["vllm + sparsert"]["engine"]
    assert dense["load_format"] == "dummy" and json.loads(Path(dense["model"], "config.json").read_text()) == {
        "hidden_size": 8
    }
    assert ours["model"] == str(packed) and "load_format" not in ours
    assert dense["disable_custom_all_reduce"] and ours["disable_custom_all_reduce"], "both or none"
    assert jobs["vllm"]["decode"] == jobs["vllm + sparsert"]["decode"]
    assert {key: dense[key] for key in ("max_model_len", "max_num_seqs", "tensor_parallel_size")} == {
        "max_model_len": 49, "max_num_seqs": 8, "tensor_parallel_size": 2,
    }  # fmt: skip
    arguments.dense = tmp_path / "other"
    stored = vllm_plugin.contenders(arguments, tmp_path)["vllm"]["engine"]
    assert stored["model"] == str(tmp_path / "other") and "load_format" not in stored


@pytest.mark.parametrize(("errors", "near_tie"), [(3.9, True), (4.1, False)])
def test_texts_may_part_at_a_near_tie_only(errors: float, near_tie: bool) -> None:
    asked: list[Any] = []

    class Judge:
        def gap(self, text: list[int], tokens: list[int]) -> float:
            asked.append((text, tokens))
            return errors

    batches = [[[1, 2]], [[1, 2], [3]]]
    ours, theirs = [[[5, 6, 7]], [[5, 6, 7], [8, 8, 8]]], [[[5, 9, 7]], [[5, 6, 7], [8, 8, 8]]]
    rows = vllm_tokens.compare(batches, ours, theirs, Judge())  # type: ignore[arg-type]
    assert [row["same"] for row in rows] == [False, True, True] and asked == [([1, 2, 5], [6, 9])]
    assert rows[0]["parted_at"] == 1 and rows[0]["near_tie"] is near_tie


def test_a_worker_finds_the_plugin_without_an_installation(tmp_path: Path) -> None:
    environment = vllm_worker.vllm_environment(tmp_path)
    assert vllm_worker.vllm_environment(tmp_path)["VLLM_CACHE_ROOT"] == str(tmp_path / "cache"), "and once more"
    code = "import importlib.metadata as m; print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.count("'sparsert.integrations.vllm:register'") == 1
    assert os.environ.get("PYTHONPATH", "") in environment["PYTHONPATH"]


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed, so it would start")
    with pytest.raises(RuntimeError, match=r"vLLM ended with code 1[\s\S]*No module named 'vllm'"):
        vllm_worker.run_worker(tmp_path, {"engine": {"model": "nowhere"}})


@pytest.mark.parametrize("script", ["vllm_plugin.py", "vllm_tokens.py", "vllm_serve_check.py"])
def test_scripts_explain_themselves(script: str) -> None:
    path = Path(vllm_worker.__file__).with_name(script)
    finished = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0 and "--output" in finished.stdout
