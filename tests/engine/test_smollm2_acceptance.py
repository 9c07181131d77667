"""A real model end to end: SmolLM2-135M, pruned 2:4 and with blocks removed, against transformers.

Takes the model directory from SPARSERT_SMOLLM2_DIR, else the cache of the default model; nothing is fetched.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_llama import BLOCK_LINEARS, delete_blocks_, greedy_reference
from transformers import AutoTokenizer, LlamaForCausalLM

from sparsert.checkpoint import DEFAULT_MODEL, read_default_masks
from sparsert.checkpoint.default_model import cache_directory
from sparsert.checkpoint.hub import cached_snapshot
from sparsert.compress import magnitude_mask
from sparsert.engine import LLM, SamplingParams
from sparsert.evaluate import measure_perplexity

REMOVED = (10, 11, 20, 24)

PROMPTS = [
    "The sea was calm that morning, and",
    "In 1969, the first humans",
    "def fibonacci(n):",
    "The three states of matter are",
    "Once upon a time",
    "A good recipe for bread needs flour, water, salt and yeast. First, mix the flour with the water until no dry bits",
    "Q: What is the capital of France?\nA:",
    "¿Dónde está la biblioteca? Está",
]

ENGLISH = """\
The river had been rising since the morning, and by noon the lower road was under water. Most of the farmers had moved
their animals to the hills the day before, because the old people in the village remembered the last flood and did not
trust the new wall. At the school the teacher let the children go home early. She stayed behind to carry the books up
to the second floor, and when she looked out of the window she could see boats where the market used to be. Nobody
was hurt. The water went back after three days, and it took the whole of the following month to clean the houses, to dry
the wood, and to find out which of the stored grain could still be used for bread.
"""


@pytest.fixture(scope="module")
def directory() -> Path:
    named = os.environ.get("SPARSERT_SMOLLM2_DIR")
    converted = cache_directory() / DEFAULT_MODEL.split("/")[-1]
    found = Path(named) if named else converted if converted.is_dir() else cached_snapshot(DEFAULT_MODEL)
    if found is None or not (found / "config.json").is_file():
        pytest.skip(
            f"no SmolLM2-135M-Instruct in {named or converted}: set SPARSERT_SMOLLM2_DIR to its directory, or run "
            f"`sparsert generate` once, which fetches it"
        )
    return found


@pytest.fixture(scope="module")
def reference(directory: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LINEARS:
            module.weight.mul_(magnitude_mask(module.weight))
    delete_blocks_(model, REMOVED)
    return model


@pytest.fixture(scope="module")
def pruned(directory: Path) -> LLM:
    return LLM(directory, device="cpu", dtype="float32", mask_maker=magnitude_mask, remove_blocks=REMOVED)


def _check_tokens(llm: LLM, reference: LlamaForCausalLM, repetition_penalty: float) -> set[int]:
    """64 greedy tokens on 8 prompts of different lengths in one batch; returns the different tokens seen."""
    tokenizer = AutoTokenizer.from_pretrained(llm.checkpoint.directory)
    params = SamplingParams(max_new_tokens=64, ignore_eos=True, repetition_penalty=repetition_penalty)
    seen: set[int] = set()
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        options = {"eos_token_id": None, "repetition_penalty": repetition_penalty}
        expected = greedy_reference(reference, tokenizer.encode(prompt), 64, **options)
        assert len(expected) == 64
        assert list(completion.token_ids) == expected, prompt
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
        seen.update(expected)
    return seen


# magnitude alone leaves a model that soon repeats itself; the penalty makes it go through many tokens
@pytest.mark.slow
@pytest.mark.parametrize(("repetition_penalty", "different_tokens"), [(1.0, 8), (1.3, 100)])
def test_greedy_tokens_equal_transformers(
    pruned: LLM, reference: LlamaForCausalLM, repetition_penalty: float, different_tokens: int
) -> None:
    """Packed 2:4 with blocks removed, fp32 on the CPU."""
    summary = pruned.summary()
    assert summary["blocks_removed"] == list(REMOVED) and summary["linears_dense"] == 0
    assert summary["linears_sparse"] == 7 * (30 - len(REMOVED))
    assert len(_check_tokens(pruned, reference, repetition_penalty)) >= different_tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_unpruned_model_equals_transformers(directory: Path) -> None:
    """The same on the model as it was trained, which writes sense."""
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    llm = LLM(directory, device="cpu", dtype="float32")
    assert len(_check_tokens(llm, reference, 1.0)) >= 100


@pytest.mark.slow
def test_error_in_bfloat16_is_at_most_twice_that_of_transformers(directory: Path, reference: LlamaForCausalLM) -> None:
    """Logits on a text, both in bfloat16 against the same weights in fp32."""
    llm = LLM(directory, device="cpu", dtype="bfloat16", mask_maker=magnitude_mask, remove_blocks=REMOVED)
    tokens = torch.tensor([llm.tokenizer.encode(" ".join(PROMPTS))])
    exact = reference(tokens).logits
    theirs = (reference.bfloat16()(tokens).logits.float() - exact).abs()
    reference.float()
    ours = (llm.model(tokens).float() - exact).abs()
    assert theirs.max() > 0.05, "the comparison must not be trivial"
    assert ours.max() <= 2 * theirs.max()
    assert ours.pow(2).mean().sqrt() <= 2 * theirs.pow(2).mean().sqrt()


@pytest.mark.slow
def test_tokens_under_the_shipped_masks_equal_transformers(directory: Path) -> None:
    masks = read_default_masks().masks
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    for name, weight in reference.named_parameters():
        if name in masks:
            weight.mul_(masks.mask(name, tuple(weight.shape)))
    pruned = LLM(directory, masks=masks, device="cpu", dtype="float32")
    assert pruned.summary()["linears_sparse"] == 7 * 30
    # under the masks of magnitude 8, of Wanda 26
    assert len(_check_tokens(pruned, reference, 1.0)) >= 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_shipped_masks_keep_the_language(directory: Path, device: str) -> None:
    pruned = LLM(directory, masks=read_default_masks().masks, device=device)
    dense = LLM(directory, device=device)
    ratio = measure_perplexity(pruned, ENGLISH).perplexity / measure_perplexity(dense, ENGLISH).perplexity
    # masks of Wanda and SparseGPT, chosen on a little text, come to 5.2
    assert ratio < 2.5
