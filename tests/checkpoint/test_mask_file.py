"""MaskLLM mask files: byte order, round trips, one tensor at a time, and files that do not fit."""

from __future__ import annotations

import random
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsert.checkpoint import read_maskllm, write_maskllm
from sparsert.errors import CheckpointError, InputError

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).view(rows, columns)


@pytest.mark.parametrize("shape", [(4, 8), (3, 20), (1, 4), (5, 4), (17, 36)])
@pytest.mark.parametrize("compress", [True, False])
def test_round_trip(tmp_path: Path, shape: tuple[int, int], compress: bool) -> None:
    masks = {UP: random_mask(*shape, 1), DOWN: random_mask(*shape, 2)}
    write_maskllm(tmp_path / "m.npz", masks.items(), compress=compress)
    file = read_maskllm(tmp_path / "m.npz")
    assert file.names == [UP, DOWN] and len(file) == 2 and UP in file and "lm_head.weight" not in file
    file.check(dict.fromkeys((UP, DOWN), shape))
    for name, mask in masks.items():
        assert file.mask(name, shape).dtype == torch.bool
        assert torch.equal(file.mask(name, shape), mask)


def test_random_masks_are_compressed_by_a_quarter(tmp_path: Path) -> None:
    mask = random_mask(256, 1024)
    write_maskllm(tmp_path / "small.npz", [(UP, mask)])
    write_maskllm(tmp_path / "large.npz", [(UP, mask)], compress=False)
    sizes = [(tmp_path / name).stat().st_size for name in ("small.npz", "large.npz")]
    assert sizes[0] < 0.75 * sizes[1] and sizes[1] > mask.numel() / 8


def test_reads_what_numpy_writes_in_the_published_layout(tmp_path: Path) -> None:
    mask = random_mask(6, 16)
    np.savez_compressed(tmp_path / "m.npz", **{UP + ".mask": np.packbits(mask.numpy())})
    assert torch.equal(read_maskllm(tmp_path / "m.npz").mask(UP, (6, 16)), mask)


def test_writes_what_numpy_reads_first_position_in_the_highest_bit(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]])
    write_maskllm(tmp_path / "m.npz", [(UP, mask)])
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        assert file.files == [UP + ".mask"]
        assert file[UP + ".mask"].tolist() == [0b11000101]


def test_one_mask_at_a_time_in_memory(tmp_path: Path) -> None:
    shape, count = (1024, 1024), 8
    write_maskllm(tmp_path / "m.npz", ((f"layers.{i}.weight", random_mask(*shape, i)) for i in range(count)))
    bits_as_bytes = shape[0] * shape[1]
    tracemalloc.start()
    file = read_maskllm(tmp_path / "m.npz")
    assert tracemalloc.get_traced_memory()[1] < bits_as_bytes  # opening unpacks nothing
    kept = sum(int(file.mask(name, shape).sum()) for name in file.names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == count * bits_as_bytes // 2
    assert peak < 2.5 * bits_as_bytes


def test_masks_of_another_model(tmp_path: Path) -> None:
    write_maskllm(tmp_path / "m.npz", [(UP, random_mask(4, 8)), (DOWN, random_mask(8, 4))])
    file = read_maskllm(tmp_path / "m.npz")
    with pytest.raises(CheckpointError, match=r"1 of 2 masks are for parameters this model does not have.*down_proj"):
        file.check({UP: (4, 8)})
    with pytest.raises(CheckpointError, match=r"1 of the model's 3 block linears have no mask, the first 'x\.weight'"):
        file.check({UP: (4, 8), DOWN: (8, 4), "x.weight": (4, 4)})
    with pytest.raises(CheckpointError, match=r"has 4 bytes, a weight of shape \[8, 8\] needs 8"):
        file.check({UP: (8, 8), DOWN: (8, 4)})
    with pytest.raises(CheckpointError, match="has 4 bytes"):
        file.mask(UP, (8, 8))
    with pytest.raises(CheckpointError, match=r"has no mask for 'x\.weight'"):
        file.mask("x.weight", (4, 8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({UP: np.zeros(4, np.uint8)}, "none of the form '<parameter>.weight.mask'"),
        ({"model.bias.mask": np.zeros(4, np.uint8)}, "none of the form"),
        ({UP + ".mask": np.zeros(4, np.int8)}, "holds int8 of shape"),
        ({UP + ".mask": np.zeros(4, bool)}, "holds bool of shape"),
        ({UP + ".mask": np.zeros((2, 2), np.uint8)}, r"holds uint8 of shape \[2, 2\], need flat uint8"),
        ({UP + ".mask": np.array([object()])}, "holds object of shape"),
        ({}, "holds no masks"),
    ],
)
def test_arrays_that_are_no_masks(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(CheckpointError, match=message):
        read_maskllm(tmp_path / "m.npz")


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such mask file"):
        read_maskllm(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(CheckpointError, match="truncated or no npz"):
        read_maskllm(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr(UP + ".mask.npy", b"not an array")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.mask' is damaged"):
        read_maskllm(tmp_path / "z.npz")


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    masks = {UP: random_mask(64, 64), DOWN: random_mask(64, 64, 3)}
    write_maskllm(tmp_path / "m.npz", masks.items())
    content = (tmp_path / "m.npz").read_bytes()
    generator = random.Random(1)
    found = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        cut = generator.choice([len(damaged), len(damaged), generator.randrange(len(damaged))])
        (tmp_path / "d.npz").write_bytes(damaged[:cut])
        try:
            file = read_maskllm(tmp_path / "d.npz")
            file.check(dict.fromkeys(masks, (64, 64)))
            for name in masks:
                # the zip's checksum leaves no way for a wrong mask to pass
                assert torch.equal(file.mask(name, (64, 64)), masks[name])
        except CheckpointError:
            found += 1
    assert found > 150


def test_writer_refuses_what_is_no_mask_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "m.npz"
    good = random_mask(4, 8)
    for masks in ([("bias", good)], [(UP, good), (UP, good)], [(UP, torch.randn(4, 8))], [(UP, good[0])]):
        with pytest.raises(InputError, match="mask '"):
            write_maskllm(target, masks)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_maskllm(tmp_path / "absent" / "m.npz", [(UP, good)])
    assert list(tmp_path.iterdir()) == []
