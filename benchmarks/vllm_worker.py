"""One engine of vLLM in a process of its own, which is the only way to get its GPU back.

    answer = run_worker(folder, {"engine": {"model": DIR}, "prompts": [[[1, 2, 3]]], "new_tokens": 16})

A job is a file of JSON that the process overwrites with its answer. Keys of a job, all but the first may be left out:

    engine        arguments of vllm.LLM
    prompts       batches of prompts, token ids: their greedy texts are the answer's "tokens"
    new_tokens    length of those texts
    adapter       LoRA directory to generate them with
    decode        {"batches", "input_len", "output_len", "runs", "seed"}: the answer's "rows" are times of decoding
    check_rows    batches at which every packed layer is held against its own dense product: the answer's "worst"

"ranks" is what each rank holds: "weight_bytes" of all parameters, "modules" that are packed with their bytes, and
"lines" of the plugin's report.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Beyond this a start or a measurement hangs.
TIMEOUT_SECONDS = 1500

#: Lines of an engine's log that an error repeats.
_CAUSE_LINES = 60

_GROUP, _PLUGIN = "vllm.general_plugins", "sparsert.integrations.vllm:register"


def run_worker(folder: Path, job: dict[str, Any], *, quiet: bool = True) -> dict[str, Any]:
    """Run a job in a new process.

    Args:
        folder: takes the job and vLLM's caches.
        job: see above.
        quiet: keep vLLM's log for the error, if there is one.

    Raises:
        RuntimeError: the process failed; with the end of its log.
    """
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    finished = subprocess.run(
        [sys.executable, __file__, str(file)], env=vllm_environment(folder), capture_output=quiet, text=True,
        check=False, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    if finished.returncode:
        said = f"{finished.stdout or ''}\n{finished.stderr or ''}"
        # what went wrong in an engine's process stands far in front of the traceback that ends the log
        causes = [line for line in said.splitlines() if re.search(r"\bERROR\b|Error:", line)]
        raise RuntimeError(
            "\n".join([f"vLLM ended with code {finished.returncode}", *causes[:_CAUSE_LINES], "...", said[-4000:]])
        )
    answer: dict[str, Any] = json.loads(file.read_text())
    return answer


def vllm_environment(folder: Path) -> dict[str, str]:
    """Environment in which vLLM finds the plugin, whether sparsert is installed or runs from its source tree.

    Args:
        folder: takes vLLM's caches, and in a source tree the entry point that an installation would have written.
    """
    import sparsert

    paths = []
    if "sparsert" not in importlib.metadata.entry_points(group=_GROUP).names:
        facts = folder / "site" / "sparsert_in_tree-0.dist-info"
        facts.mkdir(parents=True, exist_ok=True)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsert-in-tree\nVersion: 0\n")
        (facts / "entry_points.txt").write_text(f"[{_GROUP}]\nsparsert = {_PLUGIN}\n")
        paths = [str(facts.parent), str(Path(sparsert.__file__).resolve().parents[1])]
    paths.append(os.environ.get("PYTHONPATH", ""))
    return {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # would be compiled at the first request
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc sends functions of this file
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def describe(worker: Any) -> dict[str, Any]:
    """What a rank holds; runs in vLLM's worker."""
    model = worker.get_model()
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    sizes = {name: module.weight_packed.nbytes + module.weight_metadata.nbytes for name, module in packed.items()}
    reports = {id(module.quant_method._report): module.quant_method._report for module in packed.values()}
    # packed weights are parameters as well; what is left out are tables of rotary positions, which are no weights
    tensors = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    return {
        "weight_bytes": sum(tensors.values()),
        "modules": sizes,
        "lines": [line for report in reports.values() for line in report.lines()],
    }


def checker(batches: list[int]) -> Any:
    """A function for vLLM's workers: the largest error of a packed layer, in errors of cuBLAS on the same weight."""

    def check(worker: Any) -> dict[str, Any]:
        import torch

        worst: dict[str, Any] = {"layer": None, "ratio": 0.0}
        generator = torch.Generator(device="cuda").manual_seed(0)
        for name, module in worker.get_model().named_modules():
            if not hasattr(module, "weight_packed"):
                continue
            weight = torch.ops.sparsert.unpack24(
                module.weight_packed, module.weight_metadata, module.packed_outputs, module.packed_inputs
            )
            for rows in batches:
                x = torch.randn((rows, module.packed_inputs), device="cuda", generator=generator).to(weight.dtype)
                exact = x.float() @ weight.float().T
                ours = (module.quant_method.apply(module, x, None).float() - exact).abs().max()
                theirs = ((x @ weight.T).float() - exact).abs().max()
                ratio = float(ours / theirs)
                if not ratio <= worst["ratio"]:
                    worst = {"layer": name, "rows": rows, "ratio": ratio}
        return worst

    return check


def measure_decoding(llm: Any, decode: dict[str, Any], vocab_size: int) -> list[dict[str, Any]]:
    """Times of decoding: a text of ``1 + output_len`` tokens less a text of one, so that the prompt cancels out."""
    import statistics

    import numpy as np
    from vllm import SamplingParams

    generator = np.random.default_rng(decode["seed"])

    def seconds(batch: int, new_tokens: int) -> float:
        ids = generator.integers(3, vocab_size, (batch, decode["input_len"])).tolist()
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        return time.perf_counter() - start

    rows = []
    for batch in decode["batches"]:
        seconds(batch, 8)
        firsts, steps = [], []
        for _ in range(decode["runs"]):
            first = seconds(batch, 1)
            firsts.append(first)
            steps.append((seconds(batch, 1 + decode["output_len"]) - first) / decode["output_len"])
        step_s = statistics.median(steps)
        rows.append(
            {
                "batch": batch,
                "step_ms": 1e3 * step_s,
                "fastest_step_ms": 1e3 * min(steps),
                "slowest_step_ms": 1e3 * max(steps),
                "tok_per_s": batch / step_s,
                "ttft_ms": 1e3 * statistics.median(firsts),
            }
        )
    return rows


def generate(llm: Any, job: dict[str, Any]) -> list[list[list[int]]]:
    """Greedy texts of a job's prompts."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=job["new_tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
    adapter = LoRARequest("adapter", 1, job["adapter"]) if job.get("adapter") else None
    texts = []
    for prompts in job["prompts"]:
        results = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=adapter
        )
        texts.append([list(result.outputs[0].token_ids) for result in results])
    return texts


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    import vllm

    start = time.perf_counter()
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "enable_prefix_caching": False}
    llm = vllm.LLM(**{**options, **job["engine"]})
    answer: dict[str, Any] = {"load_s": time.perf_counter() - start, "vllm": vllm.__version__}
    answer["ranks"] = llm.collective_rpc(describe)
    if job.get("check_rows"):
        answer["worst"] = max(llm.collective_rpc(checker(job["check_rows"])), key=lambda found: found["ratio"])
    if job.get("prompts"):
        answer["tokens"] = generate(llm, job)
    if job.get("decode"):
        config = json.loads((Path(job["engine"]["model"]) / "config.json").read_text())
        answer["rows"] = measure_decoding(llm, job["decode"], config["vocab_size"])
    file.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
