"""Two processes that learn masks together do what one does alone in two parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import VOCABULARY, make_llama, save

from sparsert.checkpoint import open_checkpoint, read_maskllm
from sparsert.cli import main

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_two_processes_are_one_in_two_parts(tmp_path: Path) -> None:
    model = save(make_llama(num_hidden_layers=2), tmp_path / "tiny")
    ids = torch.randint(3, VOCABULARY, (2000,), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "ids.npy", ids.numpy())
    options = [
        "learn-masks", "--model", model, "--text", tmp_path / "ids.npy", "--window", 32, "--steps", 4, "--batch-size",
        4, "--samples", 6, "--device", "cpu", "--save-every", 2, "--micro-batch", 2,
    ]  # fmt: skip
    words = [str(option) for option in options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparsert"]
    finished = subprocess.run(
        [*launch, *words, "--masks-output", str(tmp_path / "two.npz")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("linear weights 2:4 by maskllm") == 1  # only the first says so

    assert main([*words, "--masks-output", str(tmp_path / "one.npz")]) == 0
    one, two, source = read_maskllm(tmp_path / "one.npz"), read_maskllm(tmp_path / "two.npz"), open_checkpoint(model)
    for name in source.block_linears():
        same = one.mask(name, source.shape(name)) == two.mask(name, source.shape(name))
        assert float(same.float().mean()) > 0.999, name  # sums in another order
