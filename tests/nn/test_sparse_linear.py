"""SparseLinear and sparsify_."""

from __future__ import annotations

import copy

import pytest
import torch
from random_24 import random_24
from torch import nn

from sparsert import SparseLinear, sparsify_
from sparsert.errors import InputError, SparsityError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def linear_24(rows: int, columns: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    linear.weight.data = random_24(rows, columns, dtype=dtype)
    return linear


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_same_result_as_the_dense_layer(device: str, bias: bool) -> None:
    linear = linear_24(100, 260, bias=bias, dtype=torch.bfloat16).to(device)
    sparse = SparseLinear.from_linear(linear)
    for shape in ((260,), (3, 260), (2, 5, 260), (70, 260)):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        torch.testing.assert_close(sparse(x), linear(x), rtol=2e-2, atol=2e-2)
    again = sparse.to_linear()
    assert torch.equal(again.weight, linear.weight)
    assert (again.bias is None) == (not bias)


def test_mask_is_applied() -> None:
    linear = nn.Linear(64, 32)
    mask = random_24(32, 64, dtype=torch.float32) != 0
    sparse = SparseLinear.from_linear(linear, mask)
    x = torch.randn(4, 64)
    torch.testing.assert_close(sparse(x), nn.functional.linear(x, linear.weight * mask, linear.bias))


def test_representation_tells_the_bytes() -> None:
    text = repr(SparseLinear.from_linear(linear_24(4096, 256, dtype=torch.bfloat16)))
    assert "in_features=256, out_features=4096" in text and "1,179,648 bytes (0.562 of dense)" in text


def test_state_dict_round_trip() -> None:
    sparse = SparseLinear.from_linear(linear_24(40, 64))
    empty = SparseLinear(64, 40, dtype=torch.float32)
    empty.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), sparse(x))
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))


def test_errors() -> None:
    with pytest.raises(SparsityError, match=r"block\.up\.weight"):
        SparseLinear.from_linear(nn.Linear(64, 32), name="block.up.weight")
    with pytest.raises(InputError, match="choose one of auto, native, triton, dense, torch"):
        SparseLinear(64, 32, backend="magic")
    packed = SparseLinear.from_linear(linear_24(32, 64)).packed()
    with pytest.raises(InputError, match="32 outputs"):
        SparseLinear.from_packed(packed, torch.zeros(31))


def test_weight_is_what_was_packed() -> None:
    """Code of others looks at ``.weight``: its shape, dtype and values are the dense layer's."""
    linear = linear_24(40, 68, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear)
    assert torch.equal(sparse.weight, linear.weight) and "weight" not in sparse.state_dict()
    assert sparse.to("meta").weight.shape == (40, 68)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x.to(looked_at.weight.dtype)

    looked_at = SparseLinear.from_linear(linear)
    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).dtype == torch.bfloat16
    operands = (looked_at.values, looked_at.metadata, 40, 68)
    torch.library.opcheck(torch.ops.sparsert.unpack24.default, operands)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = linear_24(48, 64)
        self.dense = nn.Linear(48, 64)
        self.odd = nn.Linear(6, 4)
        self.odd.weight.data.zero_()
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight


def test_sparsify_replaces_only_what_is_24() -> None:
    model = Tied()
    x = torch.randn(2, 64)
    before = model.up(x)
    report = sparsify_(model)
    assert report.packed == ("up",) and isinstance(model.up, SparseLinear)
    torch.testing.assert_close(model.up(x), before)
    assert set(report.dense) == {"dense", "odd", "head"}
    assert "shared" in report.dense["head"] and "no multiple of 4" in report.dense["odd"]
    assert "more than half" in report.dense["dense"]
    assert report.packed_bytes < report.dense_bytes and "1 linears packed" in str(report)


def test_sparsify_filter_and_masks() -> None:
    model = Tied()
    mask = random_24(64, 48, dtype=torch.float32) != 0
    report = sparsify_(model, lambda module, name: name == "dense", masks={"dense": mask})
    assert report.packed == ("dense",) and report.dense["up"] == "left out by filter_fn"
    bad = torch.ones(64, 48)
    with pytest.raises(SparsityError, match=r"dense\.weight"):
        sparsify_(Tied(), masks={"dense": bad})
    with pytest.raises(InputError, match=r"the first 'dense\.weight'; name modules .* e\.g\. 'up'"):
        sparsify_(Tied(), masks={"dense.weight": mask})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton", "dense", "torch"])
def test_backends_agree(backend: str) -> None:
    linear = linear_24(256, 512, dtype=torch.bfloat16).cuda()
    sparse = SparseLinear.from_linear(linear, backend=backend)
    for batch in (1, 8, 17, 64, 130):
        x = torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(sparse(x), linear(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_no_dense_copy_is_left() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    linear = linear_24(4096, 4096, bias=False, dtype=torch.bfloat16).cuda()
    model = nn.Sequential(linear)
    dense = linear.weight.nbytes
    del linear
    sparsify_(model)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    for batch in (1, 64, 128):  # by the kernels for decoding and for prompts
        model(x.expand(batch, -1).contiguous())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before - x.nbytes <= 0.57 * dense
