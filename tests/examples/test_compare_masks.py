"""The recipe for masks, at toy size: every row is there, and nothing is made twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import VOCABULARY, make_llama, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_masks


def test_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_llama(num_hidden_layers=2), tmp_path / "tiny")
    generator = torch.Generator().manual_seed(0)
    for name in ("text", "validation"):
        np.save(tmp_path / f"{name}.npy", torch.randint(3, VOCABULARY, (600,), generator=generator).numpy())
    (tmp_path / "learn.json").write_text(json.dumps({"batch_size": 2, "distillation": 0.5}))
    words = [
        "--model", tmp_path / "tiny", "--text", tmp_path / "text.npy", "--validation", tmp_path / "validation.npy",
        "--work", tmp_path / "work", "--window", 24, "--samples", 8, "--steps", 3, "--device", "cpu",
        "--validation-windows", 5, "--learn-config", tmp_path / "learn.json",
    ]  # fmt: skip
    compare_masks.main([str(word) for word in words])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(compare_masks.METHODS)
    record = json.loads((tmp_path / "work" / "table.json").read_text())
    assert list(record) == ["dense", *compare_masks.METHODS]
    assert all(row["perplexity"] > 1 for row in record.values())
    run = json.loads((tmp_path / "work" / "learned.training" / "run.json").read_text())
    assert run["options"]["distillation"] == 0.5 and run["options"]["steps"] == 3

    monkeypatch.setattr(compare_masks, "make", lambda *arguments: pytest.fail("made again"))
    compare_masks.main([str(word) for word in words])
    assert capsys.readouterr().out.strip() == "\n".join(rows)
