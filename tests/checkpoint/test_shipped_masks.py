"""The files of the default model as the package holds them: complete, in MaskLLM's form, two kept of each four."""

from __future__ import annotations

import numpy as np
import pytest

from sparsert.bench.architectures import hf_config
from sparsert.checkpoint import read_default_masks
from sparsert.checkpoint.default_masks import DIRECTORY
from sparsert.models import DecoderConfig
from sparsert.schedule import LayerPlan

#: Bytes with two kept of four in both of their groups.
LEGAL = np.array([byte.bit_count() == 4 and (byte >> 4).bit_count() == 2 for byte in range(256)])


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, int]]:
    """Shape of every block linear of SmolLM2-135M, by name of its weight."""
    config = DecoderConfig.from_hf(hf_config("smollm2-135m"))
    return {
        f"model.layers.{block}.{name}.weight": (shape.out_features, shape.in_features)
        for block in range(config.num_blocks)
        for name, shape in config.block_linears(block).items()
    }


def test_masks_and_plan_are_those_of_the_model(shapes: dict[str, tuple[int, int]]) -> None:
    default = read_default_masks()
    assert len(shapes) == 210
    default.masks.check(shapes)
    assert default.plan == LayerPlan.full(30)


def test_numpy_reads_two_kept_of_each_four(shapes: dict[str, tuple[int, int]]) -> None:
    with np.load(DIRECTORY / "masks.npz", allow_pickle=False) as file:
        assert set(file.files) == {f"{name}.mask" for name in shapes}
        patterns = np.zeros(16, dtype=np.int64)
        for name, (rows, columns) in shapes.items():
            bits = file[f"{name}.mask"]
            assert bits.dtype == np.uint8 and bits.shape == (rows * columns // 8,)
            assert LEGAL[bits].all(), name
            patterns += np.bincount(bits >> 4, minlength=16) + np.bincount(bits & 15, minlength=16)
    # a file of one pattern, zeros first or last, would be legal and no choice
    assert (patterns[[3, 5, 6, 9, 10, 12]] > 0.05 * patterns.sum()).all()


def test_size_and_card() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 10_000_000
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card and "Apache-2.0" in card and "perplexity" in card
