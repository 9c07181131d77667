"""Checkpoints that hold packed weights load into the same model as dense ones, without a dense weight on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import make_variant, prune_blocks_
from tiny_llama import greedy_reference, magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor

from sparsert.checkpoint import convert_checkpoint, open_checkpoint, read_maskllm, staging, write_maskllm
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.compress import magnitude_mask
from sparsert.engine import LLM, SamplingParams
from sparsert.errors import CheckpointError
from sparsert.models import load_model
from sparsert.schedule import LayerPlan

GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("packed")
    model = make_llama()
    magnitude_prune_(model)
    save(model, folder / "dense")
    convert_checkpoint(open_checkpoint(folder / "dense"), folder / "ours", shard_bytes=100_000)
    return folder / "dense", folder / "ours"


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_model(directories: tuple[Path, Path], dtype: str) -> None:
    dense, ours = (load_model(open_checkpoint(path), device="cpu", dtype=dtype) for path in directories)
    assert_same_model(dense, ours)
    assert ours.report.count("2:4") == 21 and ours.report.linears[GATE + ".weight"].reason == "packed in the checkpoint"
    assert ours.report.dense_bytes == dense.report.dense_bytes and ours.report.stored_bytes == dense.report.stored_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["dense", "ours", "masks"])
def test_a_gpu_holds_the_same_bytes(
    directories: tuple[Path, Path], tmp_path: Path, dtype: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in many pieces, converted, unpacked and packed there."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096)
    monkeypatch.setattr(staging, "PIECES", 3)
    path, masks = directories[form == "ours"], None
    if form == "masks":
        path = save(model := make_llama(), tmp_path / "base")
        weights = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
        write_maskllm(tmp_path / "m.npz", ((name, magnitude_mask(weight)) for name, weight in weights.items()))
        masks = read_maskllm(tmp_path / "m.npz")
    here, there = (load_model(open_checkpoint(path), device=d, dtype=dtype, masks=masks) for d in ("cpu", "cuda"))
    assert there.device.type == "cuda" and there.report.count("2:4") == 21
    assert_same_model(here, there.cpu())


def test_no_dense_weight_is_made(directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = TensorStream.read

    def refuse(self: TensorStream, name: str, *arguments: Any) -> Tensor:
        assert not name.endswith("_proj.weight"), "a packed weight was expanded"
        return read(self, name, *arguments)

    monkeypatch.setattr(TensorStream, "read", refuse)
    load_model(open_checkpoint(directories[1]), device="cpu", plan=LayerPlan.remove(3, [1], force=True))


def test_greedy_tokens_are_those_of_transformers(directories: tuple[Path, Path]) -> None:
    model = make_llama()
    magnitude_prune_(model)
    prompt = random_prompts([9])[0]
    completion = LLM(directories[1], device="cpu").generate([prompt], SamplingParams(max_new_tokens=12))[0]
    assert list(completion.token_ids) == greedy_reference(model, prompt, 12)


def test_parts_of_one_stored_tensor(tmp_path: Path) -> None:
    """Phi-3 stores q, k and v as one tensor; packed, its parts are rows of values and of bits."""
    model = make_variant("phi3, fused")
    prune_blocks_(model)
    model.save_pretrained(tmp_path / "dense")
    convert_checkpoint(open_checkpoint(tmp_path / "dense"), tmp_path / "ours")
    dense, ours = (load_model(open_checkpoint(tmp_path / name), device="cpu") for name in ("dense", "ours"))
    assert_same_model(dense, ours)


def test_masks_go_over_what_is_packed(directories: tuple[Path, Path]) -> None:
    one_of_four = torch.tensor([True, False, False, False])
    model = load_model(
        open_checkpoint(directories[1]),
        device="cpu",
        mask_maker=lambda weight: one_of_four.repeat(weight.shape[0], weight.shape[1] // 4),
    )
    assert model.report.linears[GATE + ".weight"].reason == "mask maker"


def _damage(directory: Path, part: str, value: float) -> Path:
    file = next(file for file in directory.glob("*.safetensors") if f"{GATE}.{part}" in load_file(file))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[f"{GATE}.{part}"].view(-1)[5 if part != "shape" else 1] = value
    save_file(tensors, file)
    return directory


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("bitmask", 0xFF, r"gate_proj.weight: 2 groups of the bitmask do not have exactly 2 of 4 bits"),
        ("shape", 92, r"gate_proj.weight: the part 'shape' says \[160, 92\], the others are those of \[160, 96\]"),
        ("compressed", float("nan"), r"gate_proj.weight' holds NaN or infinite values; the checkpoint is damaged"),
    ],
)
def test_damaged_parts_are_found(
    directories: tuple[Path, Path], tmp_path: Path, part: str, value: float, message: str
) -> None:
    convert_checkpoint(open_checkpoint(directories[0]), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        load_model(open_checkpoint(_damage(tmp_path / "ours", part, value)), device="cpu")


def test_dense_values_that_are_not_finite(directories: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    save(model, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values"):
        load_model(open_checkpoint(tmp_path / "nan"), device="cpu")
