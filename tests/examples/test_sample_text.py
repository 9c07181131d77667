"""Sampled text: as long as asked for, repeatable, and of the model's own making."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tiny_llama import VOCABULARY, make_llama, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import sample_text


def run(model: Path, output: Path, *words: object) -> np.ndarray:
    options = ("--tokens", 200, "--length", 20, "--batch-size", 4, "--device", "cpu", *words)
    sample_text.main([str(word) for word in ("--model", model, "--output", output, *options)])
    ids: np.ndarray = np.load(output)
    return ids


def test_texts(tmp_path: Path) -> None:
    llama = make_llama(num_hidden_layers=2)
    model = save(llama, tmp_path / "tiny")
    ids = run(model, tmp_path / "a.npy")
    assert ids.dtype == np.int32 and ids.shape == (240,)  # whole batches
    assert ids.min() >= 0 and ids.max() < VOCABULARY
    assert np.array_equal(ids, run(model, tmp_path / "b.npy"))
    assert not np.array_equal(ids, run(model, tmp_path / "c.npy", "--seed", 1))
    # where sampling is as good as greedy, every token is the model's favourite
    import torch

    greedy = torch.from_numpy(run(model, tmp_path / "d.npy", "--temperature", 1e-4).reshape(12, 20)).long()
    favourites = llama(greedy).logits.argmax(-1)
    assert float((favourites[:, :-1] == greedy[:, 1:]).float().mean()) > 0.95
