"""Counting groups of four."""

from __future__ import annotations

import pytest
import torch

from sparsert.formats import groups


@pytest.mark.parametrize("slice_values", [1, 50, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_counting_in_slices_equals_counting_at_once(
    monkeypatch: pytest.MonkeyPatch, slice_values: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(groups, "_SLICE_VALUES", slice_values)
    weight = torch.randint(-1, 2, (37, 52)).to(dtype)
    weight.view(torch.uint8)[:1] = 0
    kept = (weight.float() != 0).view(37, 13, 4).sum(-1)
    expected = (weight.numel() - int(kept.sum()), int((kept > 2).sum()), int(kept.max()))
    assert groups.count_groups(weight) == expected
