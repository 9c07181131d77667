"""What the tuner of the kernel for prompts tries and how it decides; measuring needs a Hopper GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

#: Configs as `gemm24_configs()` names them: name, outputs, tokens, inputs split.
CONFIGS = [
    ("256x128", 256, 128, False),
    ("128x256", 128, 256, False),
    ("128x128", 128, 128, False),
    ("256x64", 256, 64, False),
    ("128x32 split", 128, 32, True),
    ("128x64 split", 128, 64, True),
]


@pytest.fixture(scope="module")
def tuner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_gemm24", BENCHMARKS / "tune_gemm24.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch", [512, 1024, 2048])
def test_small_layers_get_a_config_that_fills_the_gpu(tuner: ModuleType, batch: int) -> None:
    rows = 1024
    filled = []
    for config, cluster, even in tuner.candidates(CONFIGS, rows, batch):
        _, outputs, tokens, split = CONFIGS[config]
        blocks = -(-rows // outputs) * -(-batch // tokens) * (cluster if split else 1)
        filled.append(even or 0.9 * tuner.BLOCKS <= blocks <= tuner.BLOCKS)
    assert any(filled)


def test_every_shape_has_candidates_at_every_batch(tuner: ModuleType) -> None:
    for rows, _ in tuner.SHAPES:
        for batch in tuner.BATCHES:
            tried = list(tuner.candidates(CONFIGS, rows, batch))
            assert tried and len(set(tried)) == len(tried)
            token_tiles = [-(-batch // CONFIGS[config][2]) for config, _, even in tried if even]
            assert all(tiles <= tuner.MOST_TOKEN_TILES for tiles in token_tiles)


def test_many_tokens_are_not_cut_into_small_tiles(tuner: ModuleType) -> None:
    assert {CONFIGS[config][2] for config, _, _ in tuner.candidates(CONFIGS, 28672, 4096)} == {256}


def test_ties_of_many_tokens_go_to_shared_activations(tuner: ModuleType) -> None:
    best = [(100.0, (1, 1, False)), (101.0, (1, 2, False)), (101.5, (1, 2, True))]
    assert tuner.decide(best, 2048) == (1, 2, False)
    assert tuner.decide(best, 1024) == (1, 1, False)
    assert tuner.decide([(100.0, (1, 1, False)), (104.0, (1, 2, False))], 2048) == (1, 1, False)


def test_the_committed_table_has_a_row_for_every_shape(tuner: ModuleType) -> None:
    lines = (BENCHMARKS.parent / "csrc" / "gemm24_table.inc").read_text().splitlines()
    written = [line for line in lines if not line.startswith("//")]
    assert len(written) == len(tuner.SHAPES)
    assert all(f"{{{rows}, {columns}, {{{{" in "\n".join(written) for rows, columns in tuner.SHAPES)
    assert all(line.count("{") == 2 + len(tuner.BATCHES) for line in written)
