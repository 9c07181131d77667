"""Every packer gives the bytes of the plain-torch reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from random_24 import random_24

from sparsert import ops
from sparsert.errors import InputError, SparsityError, UnsupportedError
from sparsert.formats import pack_reference, unpack_reference
from sparsert.formats.bitmask import bitmask_from_dense

#: The module, whose name is also that of its function.
pack_module = importlib.import_module("sparsert.ops.pack")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = ((1, 4), (16, 64), (17, 100), (33, 576), (40, 1028), (256, 2048))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bytes_as_the_reference(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    zeros = random_24(*shape, dtype=dtype, device=device)
    dense = torch.randn(shape, device=device).to(dtype)
    mask = random_24(*shape, dtype=torch.float32, device=device) != 0
    for weight, chosen in ((zeros, None), (dense, mask), (dense, mask.to(torch.uint8)), (dense, mask.float())):
        packed = ops.pack(weight, chosen)
        expected = pack_reference(weight.cpu(), None if chosen is None else chosen.cpu())
        assert torch.equal(packed.metadata.cpu(), expected.metadata)
        assert torch.equal(packed.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
        dense_again = ops.unpack(packed)
        assert torch.equal(dense_again, torch.where((weight if chosen is None else chosen) != 0, weight, 0))
        assert torch.equal(dense_again.cpu(), unpack_reference(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_weights(device: str) -> None:
    wide = random_24(20, 128, dtype=torch.bfloat16, device=device)
    for weight in (wide[:, 64:], wide[::2], wide.t().contiguous().t()):
        assert torch.equal(ops.pack(weight).values.cpu(), pack_reference(weight.cpu().contiguous()).values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_three_of_four_names_the_place(device: str, backend: str) -> None:
    weight = random_24(40, 64, dtype=torch.bfloat16, device=device)
    weight[3, 8:12] = 1
    weight[7, 0:3] = 2
    with pytest.raises(SparsityError) as caught:
        ops.pack(weight, name="model.layers.3.mlp.up_proj.weight", backend=backend)
    message = str(caught.value)
    assert message.startswith("model.layers.3.mlp.up_proj.weight: 2 of 640 groups keep more than 2 of 4 values")
    assert "the first in row 3, columns 8-11" in message and "`sparsert inspect`" in message


def test_negative_zero_is_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0]])
    assert ops.unpack(ops.pack(weight)).tolist() == [[0.0, 1.0, 0.0, 2.0]]


def test_nan_and_infinity_are_kept() -> None:
    weight = torch.tensor([[float("nan"), 0.0, 0.0, float("inf")]])
    dense = ops.unpack(ops.pack(weight))
    assert dense[0, 0].isnan() and dense[0, 3] == float("inf")


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="input width 6 is no multiple of 4"):
        ops.pack(torch.zeros(4, 6))
    with pytest.raises(InputError, match=r"got torch\.int8"):
        ops.pack(torch.zeros(4, 8, dtype=torch.int8))
    with pytest.raises(InputError, match="non-empty matrix"):
        ops.pack(torch.zeros(8))
    with pytest.raises(InputError, match="they must agree"):
        ops.pack(torch.zeros(4, 8), torch.zeros(4, 4))
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        ops.pack(torch.zeros(4, 8), backend="triton")
    with pytest.raises(InputError, match="choose one of auto, native, triton, reference"):
        ops.pack(torch.zeros(4, 8), backend="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_each_gpu_packer_by_name(backend: str) -> None:
    weight = random_24(100, 1028, dtype=torch.bfloat16, device="cuda")
    packed = ops.pack(weight, backend=backend)
    expected = pack_reference(weight.cpu())
    assert torch.equal(packed.values.cpu(), expected.values) and torch.equal(packed.metadata.cpu(), expected.metadata)
    assert torch.equal(ops.unpack(packed, backend=backend), weight)


@pytest.mark.gpu
def test_a_7b_model_packs_in_seconds() -> None:
    """All linears of Llama-2-7B, layer by layer: under 10 s of GPU time, one dense layer at a time."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed, seconds, largest = [], 0.0, 0
    for _ in range(32):
        for rows, columns in shapes:
            weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            weight.view(-1, 4)[:, 1:3] = 0
            largest = max(largest, weight.nbytes)
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            packed.append(ops.pack(weight))
            end.record()
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
            del weight
    kept = sum(p.nbytes for p in packed)
    dense_bytes = sum(p.out_features * p.in_features * 2 for p in packed)
    print(f"\n7B packed in {seconds:.3f} s of GPU time, {kept / dense_bytes:.4f} of dense")
    assert seconds < 10
    assert kept <= 0.5626 * dense_bytes
    after = torch.cuda.memory_allocated()
    assert after - before <= 1.02 * kept  # the allocator rounds
    assert torch.cuda.max_memory_allocated() <= after + 2 * largest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 60), (31, 8), (3, 12)])
def test_a_bitmask_packs_to_the_same_bytes(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_24(*shape, dtype=dtype)
    parts = bitmask_from_dense(weight)
    compressed, bitmask = parts["compressed"].to(device), parts["bitmask"].to(device)
    packed = ops.pack_bitmask(compressed, bitmask, shape[1])
    expected = pack_reference(weight)
    assert torch.equal(packed.metadata.cpu(), expected.metadata)
    assert torch.equal(packed.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
    # rows of a wider tensor, as parts of one stored tensor are
    wide = torch.cat([compressed, compressed], dim=1)[:, : compressed.shape[1]]
    assert torch.equal(ops.pack_bitmask(wide, bitmask, shape[1]).values, packed.values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("row", "byte", "value", "message"),
    [
        (7, 3, 0x37, r"up_proj.weight: 1 groups .* row 7, columns 24-27 \(3 bits\)"),
        (20, 0, 0x23, r"up_proj.weight: 1 groups .* row 20, columns 4-7 \(1 bits\)"),
        (0, 2, 0, r"up_proj.weight: 2 groups .* row 0, columns 16-19 \(0 bits\)"),
        (12, 12, 0x13, r"up_proj.weight: row 12 of the bitmask has bits past its 100 columns"),
    ],
)
def test_bits_that_are_damaged(device: str, row: int, byte: int, value: int, message: str) -> None:
    parts = bitmask_from_dense(random_24(21, 100, dtype=torch.bfloat16))
    parts["bitmask"][row, byte] = value
    with pytest.raises(SparsityError, match=message):
        ops.pack_bitmask(parts["compressed"].to(device), parts["bitmask"].to(device), 100, name="up_proj.weight")


@pytest.mark.parametrize("device", DEVICES)
def test_parts_that_do_not_fit(device: str) -> None:
    values, bits = torch.ones(4, 8, device=device), torch.full((4, 2), 0x33, dtype=torch.uint8, device=device)
    assert ops.unpack(ops.pack_bitmask(values, bits, 16)).tolist() == [[1.0, 1.0, 0.0, 0.0] * 4] * 4
    with pytest.raises(InputError, match=r"for a weight \[4, 20\]"):
        ops.pack_bitmask(values, bits, 20)
    with pytest.raises(InputError, match=r"need \(4, 8\) and uint8 \(4, 2\)"):
        ops.pack_bitmask(values, bits.int(), 16)
    with pytest.raises(InputError, match=r"got compressed torch\.int8"):
        ops.pack_bitmask(values.to(torch.int8), bits, 16)


@pytest.mark.gpu
def test_wrong_bits_are_told_later() -> None:
    parts = bitmask_from_dense(random_24(21, 100, dtype=torch.bfloat16))
    compressed, bitmask = parts["compressed"].cuda(), parts["bitmask"].cuda()
    _, bad = ops.pack_bitmask_unchecked(compressed, bitmask, 100)
    assert bad.shape == () and not bad
    bitmask[20, 0] = 0x23
    _, bad = ops.pack_bitmask_unchecked(compressed, bitmask, 100)
    assert bool(bad)
    with pytest.raises(SparsityError, match=r"w: 1 groups of the bitmask .* row 20, columns 4-7 \(1 bits\)"):
        ops.refuse_bitmask(bitmask, 100, "w")


def test_a_bitmask_is_not_refused_in_silence() -> None:
    bitmask = torch.full((3, 2), 0x33, dtype=torch.uint8)
    with pytest.raises(SparsityError, match=r"w: the GPU found groups .* its memory or driver is at fault"):
        ops.refuse_bitmask(bitmask, 16, "w")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("native", [True, False])
def test_packed_if_its_zeros_allow(device: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(pack_module, "choose_packer", lambda device, backend: "reference")
    weight = random_24(33, 100, dtype=torch.float16, device=device)
    packed, too_full = ops.pack_if_24(weight)
    assert packed is not None and too_full == 0
    expected = pack_reference(weight.cpu())
    assert torch.equal(packed.values.cpu(), expected.values) and torch.equal(packed.metadata.cpu(), expected.metadata)
    weight[32, 96:99] = 1
    weight[0, :4] = 2
    assert ops.pack_if_24(weight) == (None, 2)
    with pytest.raises(InputError, match="input width 6 is no multiple of 4"):
        ops.pack_if_24(torch.zeros(4, 6))
