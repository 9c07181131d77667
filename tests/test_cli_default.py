"""Commands and ``LLM()`` without a model: the base out of the cache, under the masks and the plan of the package."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat_model import BLOCKS, save_chat_model
from tiny_default import install_default
from transformers import LlamaForCausalLM

from sparsert import LLM, LayerPlan, SamplingParams
from sparsert.checkpoint import default_masks, fetch_default_model, read_maskllm
from sparsert.cli import main
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError

Capture = pytest.CaptureFixture[str]
SHORT = ("--prompt", "abc", "--max-new-tokens", "12", "--ignore-eos", "--device", "cpu", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def masks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    return install_default(model, tmp_path, monkeypatch)


def generate(capsys: Capture, *arguments: object) -> tuple[dict[str, Any], str]:
    """The answer to one prompt and what was said beside it."""
    capsys.readouterr()
    code = main(["generate", *SHORT, *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), captured.err


def test_the_masks_of_the_package_are_applied(
    capsys: Capture, model: Path, masks: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    answer, said = generate(capsys)
    assert "no --model given, so this is HuggingFaceTB/SmolLM2-135M-Instruct under the 2:4 masks" in said
    assert answer["model"]["linears_sparse"] == 7 * BLOCKS and answer["model"]["linears_dense"] == 0
    named, said = generate(capsys, "--model", model, "--masks", default_masks.DIRECTORY / "masks.npz")
    assert "note" not in said and answer["token_ids"] == named["token_ids"]
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    for name, weight in reference.named_parameters():
        if name in masks:
            weight.mul_(masks[name])
    tokens = torch.tensor([[*LLM(device="cpu").tokenizer.encode("abc"), *answer["token_ids"]]])
    expected = reference(tokens).logits[0].argmax(-1)[-len(answer["token_ids"]) - 1 : -1]
    assert answer["token_ids"] == expected.tolist()


def test_half_of_each_group_is_zero_in_what_was_loaded(model: Path, masks: dict[str, torch.Tensor]) -> None:
    first = LLM(device="cpu").model.blocks[0].mlp.down_proj.weight
    with pytest.warns(UserWarning, match="no linear layer is 2:4"):
        dense = LLM(model, device="cpu").model.blocks[0].mlp.down_proj.weight
    kept = masks["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(first, dense * kept) and int((first.view(-1, 4) != 0).sum(1).max()) == 2


def test_masks_none_is_the_unpruned_model(capsys: Capture, model: Path, masks: dict[str, torch.Tensor]) -> None:
    answer, said = generate(capsys, "--masks", "none")
    assert "no linear layer is 2:4" in said and "no --model given" not in said
    assert answer["model"]["linears_sparse"] == 0
    dense, _ = generate(capsys, "--model", model)
    assert generate(capsys, "--model", model, "--masks", "none")[0]["token_ids"] == dense["token_ids"]
    assert answer["token_ids"] == dense["token_ids"] != generate(capsys)[0]["token_ids"]


def test_blocks_are_removed_within_the_plan(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_default(model, tmp_path, monkeypatch, LayerPlan.remove(BLOCKS, "4"))
    answer, _ = generate(capsys)
    assert answer["model"]["blocks_removed"] == [4]
    fewer, _ = generate(capsys, "--remove-blocks", "5")
    assert fewer["model"]["blocks_removed"] == [4, 5]
    named = ("--model", model, "--masks", default_masks.DIRECTORY / "masks.npz", "--remove-blocks", "4,5")
    assert fewer["token_ids"] == generate(capsys, *named)[0]["token_ids"] != answer["token_ids"]
    # a plan belongs to its masks: without them the model is whole
    assert generate(capsys, "--masks", "none")[0]["model"]["blocks_removed"] == []


def test_eval_measures_the_same_model(
    capsys: Capture, model: Path, masks: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("A text of a few more tokens than one window holds. " * 4)
    common = ("eval", "--text", str(tmp_path / "text.txt"), "--window", "64", "--device", "cpu", "--json")

    def perplexity(*arguments: object) -> float:
        capsys.readouterr()
        assert main([*common, *(str(argument) for argument in arguments)]) == 0
        return json.loads(capsys.readouterr().out)["perplexity"]["perplexity"]

    pruned, dense = perplexity(), perplexity("--masks", "none")
    assert pruned == perplexity("--model", model, "--masks", default_masks.DIRECTORY / "masks.npz")
    assert dense == perplexity("--model", model) != pruned


def test_in_python(model: Path, masks: dict[str, torch.Tensor]) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)

    def tokens(llm: LLM) -> tuple[int, ...]:
        return llm.generate("abc", params)[0].token_ids

    pruned = LLM(device="cpu")
    assert tokens(pruned) == tokens(LLM(masks=default_masks.DIRECTORY / "masks.npz", device="cpu"))
    assert pruned.plan == LayerPlan.full(BLOCKS) and pruned.checkpoint.directory == fetch_default_model()
    with pytest.warns(UserWarning, match="no linear layer is 2:4"):
        dense = LLM(fetch_default_model(), device="cpu")
    magnitude = LLM(mask_maker=magnitude_mask, device="cpu")
    assert dense.summary()["linears_sparse"] == 0
    assert tokens(magnitude) == tokens(LLM(model, mask_maker=magnitude_mask, device="cpu"))
    assert len({tokens(pruned), tokens(dense), tokens(magnitude)}) == 3


def fails(capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["generate", *SHORT]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["masks.npz", "plan.json"])
def test_a_missing_file(capsys: Capture, masks: dict[str, torch.Tensor], name: str) -> None:
    (default_masks.DIRECTORY / name).unlink()
    message = fails(capsys)
    assert f"{default_masks.DIRECTORY}: the masks of the default model, a part of this package, cannot" in message
    assert f"(missing: {name}); install sparsert again, or run the model unpruned (--masks none)" in message
    assert generate(capsys, "--masks", "none")[0]["model"]["linears_sparse"] == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("truncated", "truncated or no npz file"),
        ("pointer", "truncated or no npz file"),
        ("plan", "layer plan: "),
    ],
)
def test_a_damaged_file(capsys: Capture, masks: dict[str, torch.Tensor], damage: str, expected: str) -> None:
    file, plan = default_masks.DIRECTORY / "masks.npz", default_masks.DIRECTORY / "plan.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "pointer":
        file.write_bytes(b"version of a pointer to a large file")
    else:
        plan.write_text('{"num_blocks": 8}')
    message = fails(capsys)
    assert f"{default_masks.DIRECTORY}: the masks of the default model" in message and "sparsert again" in message
    assert expected in message


def test_a_damaged_bit(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first kilobytes of a large mask, where opening the file does not see it."""
    install_default(save_chat_model(tmp_path / "wide", intermediate_size=1024), tmp_path, monkeypatch)
    file = default_masks.DIRECTORY / "masks.npz"
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("model.layers.4.mlp.down_proj.weight.mask.npy")
    assert member.compress_size > 8000
    content = bytearray(file.read_bytes())
    content[member.header_offset + member.compress_size - 500] ^= 8
    file.write_bytes(content)
    read_maskllm(file)
    message = fails(capsys)
    assert f"{default_masks.DIRECTORY}: the masks of the default model" in message and "sparsert again" in message


def test_a_base_of_another_shape(
    capsys: Capture, masks: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_chat_model(tmp_path / "other", intermediate_size=192)
    base = fetch_default_model()
    base.unlink()
    base.symlink_to(other)
    message = fails(capsys)
    assert f"{base}: is not HuggingFaceTB/SmolLM2-135M-Instruct" in message and "remove that directory" in message
    assert "the mask of 'model.layers.0.mlp" in message
    (default_masks.DIRECTORY / "plan.json").write_text(LayerPlan.full(9).to_json())
    base.unlink()
    base.symlink_to(save_chat_model(tmp_path / "same"))
    with pytest.raises(CheckpointError, match=r"is not HuggingFaceTB.*it has 8 blocks, the plan 9"):
        LLM(device="cpu")
