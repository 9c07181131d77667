"""A real model with two ropes, a sliding window and norms on both sides: Gemma 3 270M against transformers.

Takes the model directory from SPARSERT_GEMMA3_DIR; ``sparsert.checkpoint.gguf_file.convert_gguf`` makes one of a
GGUF file. Nothing is fetched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import BLOCK_LINEARS, greedy_reference

from sparsert.compress import magnitude_mask
from sparsert.engine import LLM, SamplingParams

#: The last one is longer than the window of 512 tokens.
PROMPTS = [
    "The sea was calm that morning, and",
    "In 1969, the first humans",
    "def fibonacci(n):",
    "¿Dónde está la biblioteca? Está",
    "The list of all numbers: " + ", ".join(map(str, range(1, 200))),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory() -> Path:
    named = os.environ.get("SPARSERT_GEMMA3_DIR")
    if not named or not (Path(named) / "config.json").is_file():
        pytest.skip("no Gemma 3 270M: set SPARSERT_GEMMA3_DIR to its directory")
    return Path(named)


@pytest.fixture(scope="module", params=["dense", "2:4"])
def pair(request: pytest.FixtureRequest, directory: Path) -> tuple[Any, LLM]:
    from transformers import Gemma3ForCausalLM

    reference = Gemma3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    if request.param == "dense":
        with pytest.warns(UserWarning, match="no linear layer is 2:4"):
            return reference, LLM(directory, device="cpu", dtype="float32", max_length=2048)
    for name, module in reference.named_modules():
        if name.rpartition(".")[2] in BLOCK_LINEARS:
            module.weight.mul_(magnitude_mask(module.weight))
    llm = LLM(directory, device="cpu", dtype="float32", mask_maker=magnitude_mask, max_length=2048)
    assert llm.model.report.count("2:4") == 7 * 18
    return reference, llm


def test_logits(pair: tuple[Any, LLM]) -> None:
    """Over a text longer than the window; weights of norms up to 300 leave fp32 more to round than 1e-5."""
    reference, llm = pair
    ids = llm.tokenizer.encode(PROMPTS[-1])
    assert ids[0] == llm.model.config.bos_token_id, "Gemma's texts begin with this token"
    assert len(ids) > 512
    tokens = torch.tensor([ids])
    ours, theirs = llm.model(tokens).double(), reference(tokens).logits.double()
    exact = reference.double()(tokens).logits
    reference.float()
    scale, error = exact.abs().max(), (ours - exact).abs()
    assert error.max() <= 1e-4 * scale and error.pow(2).mean().sqrt() <= 1e-5 * scale
    assert error.pow(2).mean().sqrt() <= 2 * (theirs - exact).pow(2).mean().sqrt()


def test_greedy_tokens(pair: tuple[Any, LLM]) -> None:
    """64 tokens on prompts of different lengths in one batch; the penalty keeps the texts from repeating themselves."""
    reference, llm = pair
    params = SamplingParams(max_new_tokens=64, ignore_eos=True, repetition_penalty=1.3)
    seen: set[int] = set()
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        options = {"eos_token_id": None, "repetition_penalty": 1.3}
        expected = greedy_reference(reference, llm.tokenizer.encode(prompt), 64, **options)
        assert list(completion.token_ids) == expected, prompt
        seen.update(expected)
    assert len(seen) >= 100
