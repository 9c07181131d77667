"""vLLM's engine on our checkpoints, on a GPU: graphs and compiled code, batches, several GPUs, adapters.

Each engine runs in a process of its own (benchmarks/vllm_worker.py), since vLLM does not give a GPU back. What tokens
have to fulfil in bf16 is said in near_ties.py; our own engine is held to the same.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from near_ties import check_greedy, exact_logits
from packed_llama import pruned_llama, write_packed
from safetensors.torch import save_file
from tiny_llama import random_prompts

from sparsert import LLM, SamplingParams

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from vllm_worker import run_worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "initializer_range": 0.05, "eos_token_id": None,
}  # fmt: skip
NEW_TOKENS = 24
PROMPTS = random_prompts([5, 17, 70, 1, 33, 64, 65, 12, 3, 90, 40, 41, 8, 9, 100, 2])
#: Memory is given, not measured: other tests may use the GPU at the same time.
ENGINE = {"max_model_len": 256, "max_num_seqs": 16, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 256 * 2**20}
#: Linear layers as vLLM joins them.
LAYERS = 4 * 4

BITMASK_24 = {"quant_method": "compressed-tensors", "sparsity_config": {
    "format": "sparse-24-bitmask", "global_sparsity": 0.5, "ignore": ["lm_head"], "registry_requires_subclass": False,
    "sparsity_structure": "2:4", "targets": ["Linear"],
}}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A dense model with 2:4 zeros in bf16, and our format of it."""
    directory = tmp_path_factory.mktemp("packed")
    dense = pruned_llama(torch.bfloat16, **SIZES)
    write_packed(dense, directory)
    return dense, directory


@pytest.fixture(scope="module")
def on_one_gpu(packed: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Prompts alone and sixteen together, compiled and captured as vLLM does by default."""
    runs = [[PROMPTS[0]], [PROMPTS[2]], PROMPTS]
    return run(tmp_path_factory.mktemp("one"), {"model": str(packed[1])}, runs)


def run(folder: Path, engine: dict[str, Any], batches: list[list[list[int]]], **job: Any) -> dict[str, Any]:
    return run_worker(folder, {"engine": {**ENGINE, **engine}, "prompts": batches, "new_tokens": NEW_TOKENS, **job})


def check_all(dense: Any, prompts: list[list[int]], texts: list[list[int]]) -> None:
    for prompt, tokens in zip(prompts, texts, strict=True):
        assert len(tokens) == NEW_TOKENS
        check_greedy(dense, prompt, tokens)


def dense_bytes(dense: Any) -> int:
    return sum(parameter.nbytes for name, parameter in dense.named_parameters() if name.endswith("_proj.weight"))


def test_tokens_are_as_good_as_those_of_a_dense_model(packed: tuple[Any, Path], on_one_gpu: dict[str, Any]) -> None:
    alone, long, together = on_one_gpu["tokens"]
    check_all(packed[0], [PROMPTS[0], PROMPTS[2], *PROMPTS], [*alone, *long, *together])


def test_every_layer_is_packed_once(packed: tuple[Any, Path], on_one_gpu: dict[str, Any]) -> None:
    (rank,) = on_one_gpu["ranks"]
    assert len(rank["modules"]) == LAYERS and len(rank["lines"]) == 1
    assert sum(rank["modules"].values()) == dense_bytes(packed[0]) * 9 // 16


@pytest.mark.parametrize("batch", [1, 16])
def test_tokens_are_those_of_our_engine(packed: tuple[Any, Path], on_one_gpu: dict[str, Any], batch: int) -> None:
    """Up to a near-tie: where two texts part, both tokens are as good as bf16 can tell."""
    dense, directory = packed
    llm = LLM(directory, device="cuda", dtype="bfloat16")
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = PROMPTS if batch == 16 else [PROMPTS[0]]
    ours = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
    theirs = on_one_gpu["tokens"][2] if batch == 16 else on_one_gpu["tokens"][0]
    same = 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        parted = next((index for index in range(NEW_TOKENS) if a[index] != b[index]), None)
        if parted is None:
            same += 1
            continue
        exact, error = exact_logits(dense, prompt, a)
        assert exact[parted].max() - exact[parted][[a[parted], b[parted]]].min() <= 4 * error
    assert same >= len(prompts) // 2, "near-ties are the exception"


@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_other_checkpoints(packed: tuple[Any, Path], tmp_path: Path, form: str) -> None:
    dense, directory = packed
    engine: dict[str, Any] = {"model": str(tmp_path / "model"), "enforce_eager": True}
    if form == "dense":
        dense.save_pretrained(tmp_path / "model")
        engine["quantization"] = "sparsert"
    else:
        write_packed(dense, tmp_path / "model", shards=2)
        config = json.loads((directory / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": BITMASK_24}))
    answer = run(tmp_path, engine, [PROMPTS[:4]], check_rows=[1, 16, 64])
    check_all(dense, PROMPTS[:4], answer["tokens"][0])
    assert len(answer["ranks"][0]["modules"]) == LAYERS
    assert answer["worst"]["layer"] is not None and answer["worst"]["ratio"] <= 2


def test_an_adapter(packed: tuple[Any, Path], tmp_path: Path) -> None:
    """LoRA on packed layers computes what merging it into the dense model does."""
    dense, directory = packed
    rank, scale, targets = 8, 2.0, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    merged = pruned_llama(torch.bfloat16, **SIZES)
    tensors = {}
    generator = torch.Generator().manual_seed(7)
    for name, module in merged.named_modules():
        if name.endswith(targets):
            a = (torch.randn((rank, module.in_features), generator=generator) * 0.05).bfloat16()
            b = (torch.randn((module.out_features, rank), generator=generator) * 0.05).bfloat16()
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            module.weight.data += (scale * b.float() @ a.float()).bfloat16()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    record = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": int(scale * rank), "bias": "none",
        "target_modules": list(targets), "base_model_name_or_path": str(directory),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    engine = {"model": str(directory), "enforce_eager": True, "enable_lora": True, "max_lora_rank": rank}
    answer = run(tmp_path, engine, [PROMPTS[:4]], adapter=str(adapter))
    check_all(merged, PROMPTS[:4], answer["tokens"][0])
    unadapted = exact_logits(dense, PROMPTS[0], answer["tokens"][0][0])[0].argmax(dim=1)
    assert unadapted.tolist() != answer["tokens"][0][0], "the adapter changes something"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_two_gpus(packed: tuple[Any, Path], on_one_gpu: dict[str, Any], tmp_path: Path, axis: str) -> None:
    dense, directory = packed
    engine = {"model": str(directory), f"{axis}_parallel_size": 2}
    answer = run(tmp_path, engine, [PROMPTS])
    check_all(dense, PROMPTS, answer["tokens"][0])
    equal = sum(a == b for a, b in zip(answer["tokens"][0], on_one_gpu["tokens"][2], strict=True))
    assert equal >= len(PROMPTS) // 2, "texts of one GPU and of two part at near-ties only"
    sizes = [sum(rank["modules"].values()) for rank in answer["ranks"]]
    assert sizes == [dense_bytes(dense) * 9 // 32] * 2
