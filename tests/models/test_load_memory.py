"""What loading leaves and what it takes on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert.checkpoint import convert_checkpoint, open_checkpoint
from sparsert.models import load_model


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "dense float32", "packed"])
def test_peak_is_packed_size_and_two_dense_layers(tmp_path: Path, form: str) -> None:
    model = make_llama(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, vocab_size=2048,
    ).bfloat16()  # fmt: skip
    magnitude_prune_(model)
    path = save(model.float() if form == "dense float32" else model, tmp_path / "model")
    model.bfloat16()
    if form == "packed":
        convert_checkpoint(open_checkpoint(path), tmp_path / "packed")
        path = tmp_path / "packed"
    largest = max(p.nbytes for n, p in model.named_parameters() if "proj" in n)
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = _requested("current")
    loaded = load_model(open_checkpoint(path), device="cuda", dtype="bfloat16")
    after, peak = _requested("current") - before, _requested("peak") - before
    dense = loaded.report.dense_bytes
    print(
        f"\nlinears {loaded.report.share:.4f} of dense; peak {(peak - after) / largest:.2f} dense layers over the end"
    )
    assert loaded.report.share <= 0.57
    others = sum(p.nbytes for p in loaded.parameters())  # embedding, head and norms; packed weights are buffers
    assert after <= 0.5626 * dense + others + 2**16
    assert peak <= after + 2 * largest


def _requested(when: str) -> int:
    """Bytes asked of torch's allocator, before it rounds them up to its blocks."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])
