"""Whether vLLM with sparsert and our own engine write the same greedy texts, as one JSON document.

    sparsert prune --model HuggingFaceTB/SmolLM2-135M-Instruct --to sparsert --output /tmp/smollm2
    python benchmarks/vllm_tokens.py /tmp/smollm2

Prompts of several lengths, each alone and all together in one batch of sixteen. Both engines compute in bf16 and round
at other places, so texts may part where two logits nearly tie. Each place where they part is therefore looked at in
fp32: how far is the token that either picked behind the best one, and how wrong is transformers' bf16 model about the
logits there? Two logits wrong by twice that much each explain a gap of four errors; beyond it the run has failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from json_document import publish
from vllm_worker import run_worker

from sparsert import LLM, SamplingParams
from sparsert.bench.records import machine_facts

LENGTHS = (1, 2, 5, 16, 17, 31, 64, 65, 100, 128, 129, 200, 255, 256, 300, 400)

#: Of bf16's own error in a logit; see above.
_MOST_ERRORS = 4.0


def make_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids without the first few, which are special in most vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def our_texts(directory: Path, batches: list[list[list[int]]], new_tokens: int) -> list[list[list[int]]]:
    """Greedy texts of our engine, on the GPU in bf16."""
    llm = LLM(directory, device="cuda", dtype="bfloat16")
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    texts = [[list(text.token_ids) for text in llm.generate(prompts, params)] for prompts in batches]
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return texts


class Judge:
    """Logits in fp32 and bf16 of transformers' model with the same weights."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._models = [
            AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cuda").eval()
            for dtype in (torch.float32, torch.bfloat16)
        ]

    def gap(self, text: list[int], tokens: list[int]) -> float:
        """How far the worst of ``tokens`` is behind the best after ``text``, in errors of bf16."""
        with torch.inference_mode():
            exact, rounded = (model(torch.tensor([text]).cuda()).logits[0, -1].float() for model in self._models)
        return float((exact.max() - exact[tokens].min()) / (rounded - exact).abs().max())


def compare(
    batches: list[list[list[int]]], ours: list[list[list[int]]], theirs: list[list[list[int]]], judge: Judge
) -> list[dict[str, Any]]:
    """A row for each prompt: whether the texts are the same, or where they part and how near the tie was."""
    rows = []
    for prompts, own, other in zip(batches, ours, theirs, strict=True):
        for prompt, a, b in zip(prompts, own, other, strict=True):
            row: dict[str, Any] = {"batch": len(prompts), "prompt_len": len(prompt), "same": a == b}
            if a != b:
                parted = next(index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                errors = judge.gap(prompt + a[:parted], [a[parted], b[parted]])
                row |= {"parted_at": parted, "errors_of_bf16": errors, "near_tie": errors <= _MOST_ERRORS}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="packed checkpoint of a small model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-log", action="store_true", help="print what vLLM says")
    parser.add_argument("--output", type=Path, help="the JSON document as a file")
    arguments = parser.parse_args()
    vocab_size = json.loads((arguments.directory / "config.json").read_text())["vocab_size"]
    prompts = make_prompts(vocab_size, arguments.seed)
    batches = [*([prompt] for prompt in prompts), prompts]
    engine = {"model": str(arguments.directory), "max_model_len": max(LENGTHS) + arguments.new_tokens}
    job = {"engine": engine, "prompts": batches, "new_tokens": arguments.new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        answer = run_worker(Path(folder), job, quiet=not arguments.show_log)
    ours = our_texts(arguments.directory, batches, arguments.new_tokens)
    rows = compare(batches, ours, answer["tokens"], Judge(arguments.directory))
    record = {
        "benchmark": "vllm_tokens",
        "machine": machine_facts(None),
        "vllm_version": answer["vllm"],
        "model": arguments.directory.name,
        "new_tokens": arguments.new_tokens,
        "same": sum(row["same"] for row in rows),
        "near_ties": sum(row.get("near_tie", False) for row in rows),
        "texts": len(rows),
        "correct": all(row["same"] or row["near_tie"] for row in rows),
        "results": rows,
    }
    for row in rows:
        if not row["same"]:
            print(
                f"batch {row['batch']:2} prompt {row['prompt_len']:3}: part at token {row['parted_at']}, "
                f"{row['errors_of_bf16']:.2f} errors of bf16 behind the best"
            )
    print(f"{record['same']} of {record['texts']} texts are the same, {record['near_ties']} part at a near-tie")
    publish(record, arguments.output)
    raise SystemExit(0 if record["correct"] else 1)


if __name__ == "__main__":
    main()
