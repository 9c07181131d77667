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


def test_sparsify_a_transformers_model() -> None:
    """A ViT and a BERT: any module tree, not only decoders."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).eval()
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    for model, inputs in (
        (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (bert, {"input_ids": torch.randint(0, 50, (2, 9))}),
    ):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= random_24(*module.weight.shape, dtype=torch.float32) != 0
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            report = sparsify_(model)
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        assert len(report.packed) >= 12


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
    for batch in (1, 64, 128):  # also after the unpacking path ran once
        model(x.expand(batch, -1).contiguous())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before - x.nbytes <= 0.57 * dense
