"""The decoder's logits against transformers on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import LLAMA3_ROPE, VOCABULARY, delete_blocks_, magnitude_prune_, make_llama, save

from sparsert.checkpoint import open_checkpoint
from sparsert.models import DecoderModel, load_model
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

VARIANTS: dict[str, dict[str, Any]] = {
    "group 3, odd head_dim": {},
    "group 1": {"num_key_value_heads": 6},
    "group 4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "widths that are no multiple of 16": {"intermediate_size": 100, "head_dim": 20, "hidden_size": 60},
}

#: Packed modules of the three blocks: 4 a block when both groups are joined; a part whose outputs are
#: no multiple of 16 keeps its group apart.
PACKED_MODULES = {"group 4": 18, "widths that are no multiple of 16": 21}


def _tokens(length: int = 41) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_logits_equal_transformers(variant: str, sparse: bool, tmp_path: Path) -> None:
    reference = make_llama(**VARIANTS[variant])
    if sparse:
        magnitude_prune_(reference)
    model = load_model(open_checkpoint(save(reference, tmp_path)), device="cpu")
    assert model.dtype == torch.float32
    assert model.report.count("2:4" if sparse else "dense") == 21
    assert _count_sparse(model) == (PACKED_MODULES.get(variant, 12) if sparse else 0)
    tokens = _tokens()
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def _count_sparse(model: DecoderModel) -> int:
    return sum(isinstance(module, SparseLinear) for module in model.modules())


def test_rows_picks_one_token_of_each_text(tmp_path: Path) -> None:
    reference = make_llama()
    magnitude_prune_(reference)
    model = load_model(open_checkpoint(save(reference, tmp_path)), device="cpu")
    tokens, rows = _tokens(), torch.tensor([4, 40])
    picked = model(tokens, rows=rows)
    assert picked.shape == (2, VOCABULARY)
    torch.testing.assert_close(picked, model(tokens)[torch.arange(2), rows], atol=1e-6, rtol=1e-5)
    several = torch.tensor([[4, 0, 39], [40, 40, 7]])
    picked = model(tokens, rows=several)
    assert picked.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(picked, model(tokens)[torch.arange(2)[:, None], several], atol=1e-6, rtol=1e-5)
    none = model(tokens, rows=several[:, :0])
    assert none.shape == (2, 0, VOCABULARY) and none.dtype == picked.dtype


@pytest.mark.parametrize("removed", [(4,), (1, 4, 5)])
def test_removed_blocks_equal_a_model_without_them(removed: tuple[int, ...], tmp_path: Path) -> None:
    reference = make_llama(num_hidden_layers=8)
    magnitude_prune_(reference)
    checkpoint = open_checkpoint(save(reference, tmp_path))
    model = load_model(checkpoint, device="cpu", plan=LayerPlan.remove(8, removed, force=True))
    assert len(model.blocks) == 8 - len(removed)
    whole = load_model(checkpoint, device="cpu")
    delete_blocks_(reference, removed)
    tokens = _tokens()
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)
    assert (whole(tokens) - model(tokens)).abs().max() > 1e-2


def test_a_block_with_one_dense_part_is_not_joined(tmp_path: Path) -> None:
    reference = make_llama(attention_bias=True)
    magnitude_prune_(reference)
    reference.model.layers[1].self_attn.k_proj.weight.normal_(std=0.1)
    reference.model.layers[2].mlp.up_proj.weight.normal_(std=0.1)
    with pytest.warns(UserWarning, match=r"2 of 21 linear layers are not 2:4 and run dense \(first .*1.*k_proj"):
        model = load_model(open_checkpoint(save(reference, tmp_path)), device="cpu")
    assert model.report.count("dense") == 2
    assert model.blocks[1].self_attn.qkv_proj.joined is None
    assert model.blocks[0].self_attn.qkv_proj.joined is not None
    tokens = _tokens()
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_16_bit_is_at_most_twice_that_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    rounded = make_llama(num_hidden_layers=6, rope_parameters=LLAMA3_ROPE).to(dtype)
    magnitude_prune_(rounded)
    exact = copy.deepcopy(rounded).double()
    model = load_model(open_checkpoint(save(rounded, tmp_path)), device="cpu", dtype=dtype)
    assert model.dtype == dtype
    tokens = torch.randint(0, VOCABULARY, (4, 96), generator=torch.Generator().manual_seed(5))
    expected = exact(tokens).logits
    theirs = (rounded(tokens).logits.double() - expected).abs()
    ours = (model(tokens).double() - expected).abs()
    assert theirs.max() > 1e-4, "the comparison must not be trivial"
    assert ours.max() <= 2 * theirs.max()
    assert ours.pow(2).mean().sqrt() <= 1.25 * theirs.pow(2).mean().sqrt()
