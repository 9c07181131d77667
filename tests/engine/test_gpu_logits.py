"""On a GPU, in bf16: as close to float64 as twice transformers' own error, in prefill and in decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_smollm2_acceptance import PROMPTS, REMOVED, directory  # noqa: F401
from tiny_llama import BLOCK_LINEARS, delete_blocks_, magnitude_prune_, make_llama, save
from torch import Tensor
from transformers import LlamaForCausalLM

from sparsert.compress import magnitude_mask
from sparsert.engine import LLM

pytestmark = pytest.mark.gpu


def _ours(llm: LLM, tokens: Tensor, prompt_tokens: int) -> Tensor:
    """Logits of every token from the last of the prompt on: one prefill, then decode on given tokens."""
    rows = tokens.tolist()
    logits = [llm.runner.prefill([row[:prompt_tokens] for row in rows], tokens.shape[1])]
    for step in range(prompt_tokens, tokens.shape[1]):
        logits.append(llm.runner.decode(tokens[:, step].cuda(), step).clone())
    return torch.stack(logits, dim=1)


def _check(llm: LLM, reference: LlamaForCausalLM, tokens: Tensor, prompt_tokens: int) -> None:
    there = tokens.cuda()
    with torch.no_grad():
        exact = reference.double().cuda()(there).logits[:, prompt_tokens - 1 :]
        theirs = reference.bfloat16()(there).logits[:, prompt_tokens - 1 :].double() - exact
    ours = _ours(llm, tokens, prompt_tokens).double() - exact
    scale = exact.pow(2).mean().sqrt()
    print(
        f"\nbatch {tokens.shape[0]}: rms error ours {float(ours.pow(2).mean().sqrt() / scale):.2e}, "
        f"transformers {float(theirs.pow(2).mean().sqrt() / scale):.2e} of the logits' size"
    )
    assert theirs.abs().max() > 0, "the comparison must not be trivial"
    assert ours.pow(2).mean().sqrt() <= 2 * theirs.pow(2).mean().sqrt()
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize(("batch", "prompt_tokens"), [(1, 5), (3, 80), (16, 40)])
def test_random_model(tmp_path: Path, batch: int, prompt_tokens: int) -> None:
    model = make_llama(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, initializer_range=0.05,
    )  # fmt: skip
    model = model.bfloat16()
    magnitude_prune_(model)
    llm = LLM(save(model, tmp_path / "model"), device="cuda", dtype="bfloat16", remove_blocks="4", force_remove=True)
    assert llm.summary()["kernel"] == "mma_sp" and llm.summary()["linears_dense"] == 0
    delete_blocks_(model, (4,))
    _check(llm, model, torch.randint(3, 1000, (batch, prompt_tokens + 24)), prompt_tokens)


@pytest.mark.slow
def test_smollm2(directory: Path) -> None:  # noqa: F811
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, module in reference.named_modules():
        if name.rpartition(".")[2] in BLOCK_LINEARS:  # 4-bit weights have ties: both sides need the same mask
            module.weight.mul_(magnitude_mask(module.weight))
    llm = LLM(directory, device="cuda", dtype="bfloat16", mask_maker=magnitude_mask, remove_blocks=REMOVED)
    delete_blocks_(reference, REMOVED)
    tokens = torch.tensor([llm.tokenizer.encode(" ".join(PROMPTS))])
    _check(llm, reference, tokens, tokens.shape[1] // 2)
