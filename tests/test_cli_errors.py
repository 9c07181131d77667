"""What a user can get wrong: exit code 2, one sentence that says what to do, and no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat_model import save_chat_model

from sparsert import cli, engine
from sparsert.checkpoint import open_checkpoint, write_checkpoint, write_maskllm
from sparsert.cli import main
from sparsert.compress import magnitude_mask

Capture = pytest.CaptureFixture[str]
Copy = Callable[..., Path]
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Copy:
    """Call with changes to config.json, tensors, or how to write them -> a copy of the model."""

    def make(
        change: Callable[[str, torch.Tensor], torch.Tensor] | None = None, shard_bytes: int = 10**9, **config: Any
    ) -> Path:
        directory = tmp_path / "copy"
        write_checkpoint(open_checkpoint(model), directory, shard_bytes=shard_bytes)
        content = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**content, **config}))
        if change is not None:
            tensors = load_file(directory / "model.safetensors")
            save_file({name: change(name, tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
        return directory

    return make


def fails(capsys: Capture, *arguments: object) -> str:
    """Run a command that must fail through the user's fault; return its one sentence."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == "" and "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert lines[-1].startswith("sparsert: error: ")
    assert all(line.startswith("sparsert: ") for line in lines), lines
    assert sum("error: " in line for line in lines) == 1
    return lines[-1].removeprefix("sparsert: error: ")


def generate_fails(capsys: Capture, directory: object, *arguments: object) -> str:
    return fails(
        capsys,
        "generate",
        "--model",
        directory,
        "--prompt",
        "abc",
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        *arguments,
    )


def every_command_fails(capsys: Capture, directory: Path) -> str:
    """The same sentence from generate, prune and inspect."""
    message = generate_fails(capsys, directory)
    assert fails(capsys, "inspect", directory) == message
    assert fails(capsys, "prune", "--model", directory, "--output", directory.parent / "out") == message
    assert not (directory.parent / "out").exists()
    return message


def test_missing_shard(capsys: Capture, copy: Copy) -> None:
    directory = copy(shard_bytes=300_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    message = every_command_fails(capsys, directory)
    assert f"{shard}: missing, but model.safetensors.index.json names it" in message and "fetch" in message


def test_truncated_shard(capsys: Capture, copy: Copy) -> None:
    directory = copy(shard_bytes=300_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    message = every_command_fails(capsys, directory)
    assert f"{shard}: truncated: the header promises" in message and "fetch the file again" in message


def test_wrong_dtype(capsys: Capture, copy: Copy) -> None:
    directory = copy(lambda name, tensor: tensor.to(torch.int8) if name == UP else tensor)
    message = generate_fails(capsys, directory)
    assert f"{UP} is torch.int8" in message and "convert the checkpoint" in message
    message = fails(capsys, "prune", "--model", directory, "--output", directory.parent / "out")
    assert message.startswith(f"{UP}: got torch.int8")


def test_wrong_shape(capsys: Capture, copy: Copy) -> None:
    directory = copy(lambda name, tensor: tensor[:-4].contiguous() if name == UP else tensor)
    message = generate_fails(capsys, directory)
    assert f"{UP} is [156, 96], need [160, 96]" in message


def test_missing_tensor_and_foreign_tensor(capsys: Capture, copy: Copy) -> None:
    directory = copy()
    tensors = load_file(directory / "model.safetensors")
    weight = tensors.pop(UP)
    save_file(tensors, directory / "model.safetensors")
    assert UP in generate_fails(capsys, directory)
    save_file(
        {**tensors, UP: weight, "model.layers.3.mlp.router.weight": weight.clone()}, directory / "model.safetensors"
    )
    assert "model.layers.3.mlp.router.weight" in generate_fails(capsys, directory)


def masks_of(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: magnitude_mask(checkpoint.read(name)) for name in checkpoint.block_linears()}


def test_three_of_four_in_a_mask(capsys: Capture, model: Path, tmp_path: Path) -> None:
    masks = masks_of(model)
    masks[UP][7, 8:12] = torch.tensor([True, True, False, True])
    masks[UP][9, 0:4] = True
    write_maskllm(tmp_path / "m.npz", masks.items())
    message = generate_fails(capsys, model, "--masks", tmp_path / "m.npz")
    assert message.startswith(f"{UP}: 2 of 3840 groups keep more than 2 of 4 values, the first in row 7, columns 8-11")


def test_three_of_four_in_a_checkpoint_that_says_it_is_2_of_4(capsys: Capture, model: Path, tmp_path: Path) -> None:
    assert main(["prune", "--model", str(model), "--output", str(tmp_path / "p")]) == 0
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    tensors[UP][7, 8:11] = 1.0
    tensors[UP][7, 11] = 0.0
    save_file(tensors, tmp_path / "p" / "model.safetensors")
    message = generate_fails(capsys, tmp_path / "p")
    assert message.startswith(f"{UP}: 1 of 3840 groups keep more than 2 of 4 values, the first in row 7, columns 8-11")
    assert main(["inspect", str(tmp_path / "p")]) == 0
    assert f"broken: 1 weights are said to be 2:4 and are not, the first {UP}" in capsys.readouterr().out


def test_a_dense_checkpoint_without_a_claim_just_runs(capsys: Capture, model: Path) -> None:
    assert main(["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert "sparsert: warning: no linear layer is 2:4" in capsys.readouterr().err


def test_masks_of_another_model(capsys: Capture, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.npz"
    masks = masks_of(model)
    write_maskllm(file, [*masks.items(), ("model.layers.8.mlp.up_proj.weight", masks[UP])])
    message = generate_fails(capsys, model, "--masks", file)
    assert "1 of 57 masks are for parameters this model does not have" in message and "layers.8" in message
    write_maskllm(file, [(name, mask) for name, mask in masks.items() if name != UP])
    message = generate_fails(capsys, model, "--masks", file)
    assert f"1 of the model's 56 block linears have no mask, the first '{UP}'" in message
    write_maskllm(file, {**masks, UP: masks[UP][:-8]}.items())
    assert f"the mask of '{UP}' has 1824 bytes" in generate_fails(capsys, model, "--masks", file)


def test_mask_files_that_are_none(capsys: Capture, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.npz"
    assert "no such mask file" in generate_fails(capsys, model, "--masks", file)
    masks = masks_of(model)
    write_maskllm(file, masks.items())
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or no npz file" in generate_fails(capsys, model, "--masks", file)
    np.savez(file, **{name + ".mask": mask.numpy() for name, mask in masks.items()})
    assert "holds bool of shape [96, 160], need flat uint8" in generate_fails(capsys, model, "--masks", file)
    np.savez(file, **{UP + ".mask": np.array([{"a": 1}], dtype=object)})
    assert "holds object of shape [1]" in generate_fails(capsys, model, "--masks", file)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--remove-blocks", "8"), "cannot remove block 8: the model has 8 blocks, numbered 0-7"),
        (("--remove-blocks", "4-99"), "cannot remove block"),
        (("--remove-blocks", "0"), "refusing to remove block 0 of 8"),
        (("--remove-blocks", "7"), "--force-remove"),
        (("--remove-blocks", "four"), "'four' is neither a block number nor a range"),
        (("--remove-blocks", "5-4"), "runs backwards"),
        (("--remove-blocks", "4,4"), "named twice"),
        (("--remove-blocks", "absent.csv:2"), "block order absent.csv: cannot be read"),
        (("--remove-blocks", "absent.csv:two"), "after the colon stands how many blocks to remove"),
        (("--skip-attention", "0"), "refusing to skip the attention of block 0 of 8"),
        (("--skip-mlp", ""), "'' is neither a block number nor a range"),
        (("--skip-mlp", "4", "--remove-blocks", "4"), "cannot skip the mlp of block 4: the plan removes it as a whole"),
        (("--block-order", "absent.csv"), "--block-order FILE and --remove-count N belong together"),
        (("--remove-count", "2"), "--block-order FILE and --remove-count N belong together"),
        (("--remove-blocks", "4", "--block-order", "a.csv", "--remove-count", "2"), "give one of them"),
    ],
)
def test_blocks(capsys: Capture, model: Path, tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in generate_fails(capsys, model, *options)
    assert expected in fails(capsys, "prune", "--model", model, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--draft-tokens", "3"), "draft_tokens 3 without a draft"),
        (("--draft-remove-blocks", "4", "--draft-tokens", "99"), "draft_tokens is 99; it must be a whole number, 1-16"),
        (("--draft-remove-blocks", "9"), "cannot remove block 9: the model has 8 blocks"),
        (("--draft-remove-blocks", "order.csv:x"), "--draft-remove-blocks order.csv:x: after the colon stands"),
        (("--draft-skip-mlp", "4", "--draft-model", "x"), "give one of the two"),
        (("--draft-model", "./absent"), "no such directory"),
    ],
)
def test_drafts(capsys: Capture, model: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in generate_fails(capsys, model, *options)


def test_unknown_architecture(capsys: Capture, copy: Copy) -> None:
    directory = copy(architectures=["FalconForCausalLM"], model_type="falcon")
    message = generate_fails(capsys, directory)
    assert "FalconForCausalLM" in message and "LlamaForCausalLM" in message
    assert fails(capsys, "prune", "--model", directory, "--output", directory.parent / "out") == message
    assert main(["inspect", str(directory)]) == 0
    assert "not supported: " in capsys.readouterr().out


class _RunsCode:
    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.evidence}",)


def test_a_pickle_that_wants_code(capsys: Capture, copy: Copy, tmp_path: Path) -> None:
    directory = copy()
    (directory / "model.safetensors").unlink()
    evidence = tmp_path / "evidence"
    torch.save({"w": torch.zeros(2), "x": _RunsCode(evidence)}, directory / "pytorch_model.bin")
    message = every_command_fails(capsys, directory)
    assert "would run code from the file; nothing was run: get the model as safetensors instead" in message
    assert not evidence.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: Capture, model: Path) -> None:
    for device in ("cuda", "cuda:1"):
        message = generate_fails(capsys, model, "--device", device)
        assert "no CUDA GPU" in message and "--device cpu" in message and "`sparsert env`" in message


def test_prompt_longer_than_the_cache(capsys: Capture, model: Path) -> None:
    message = generate_fails(capsys, model, "--max-length", 8, "--prompt", "x" * 20)
    assert "prompt 1 has 20 tokens" in message and "max_length 8" in message
    assert "max_length 513 is out of range; this model takes 2-512" in generate_fails(
        capsys, model, "--max-length", 513
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "2"), "top_p is 2.0"),
        (("--top-k", "-3"), "top_k is -3"),
        (("--min-p", "1.5"), "min_p is 1.5"),
        (("--repetition-penalty", "0"), "repetition_penalty is 0.0"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--stop", ""), "strings that are not empty"),
        (("--device", "gpu"), "gpu"),
        (("--dtype", "int4"), "invalid choice: 'int4'"),
        (("--backend", "magic"), "invalid choice: 'magic'"),
        (("--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("--stream", "--prompt", "second"), "--stream shows one text as it comes, but there are 2 prompts"),
        (("--stream", "--json"), "not allowed with argument"),
        (("--prompts", "/no/such/file"), "--prompts /no/such/file: cannot be read"),
        (("--mask", "m.npz"), "unrecognized arguments: --mask"),
    ],
)
def test_options(capsys: Capture, model: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in generate_fails(capsys, model, *options)


def test_usage(capsys: Capture, model: Path) -> None:
    assert "required: COMMAND; see `sparsert --help`" in fails(capsys)
    assert "invalid choice: 'run'" in fails(capsys, "run")
    assert "required: --model, --output; see `sparsert prune --help`" in fails(capsys, "prune")
    assert "give --prompt TEXT" in fails(capsys, "generate", "--model", model)
    assert "prompt 0 is empty" in fails(capsys, "generate", "--model", model, "--prompt", "", "--device", "cpu")


def test_models_that_are_none(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such directory, and no hub id either" in generate_fails(capsys, tmp_path / "absent")
    assert "config.json: no such file" in every_command_fails(capsys, tmp_path)

    import huggingface_hub

    def offline(self: object, repository: str, *, timeout: float) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    assert "the hub cannot be reached (no route to host)" in generate_fails(capsys, "no-such-owner/no-such-model")


def test_no_tokenizer_and_no_template(capsys: Capture, copy: Copy) -> None:
    directory = copy()
    (directory / "chat_template.jinja").unlink()
    assert "no chat template" in generate_fails(capsys, directory, "--chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text("{")
    assert "tokenizer" in generate_fails(capsys, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert "holds no tokenizer" in generate_fails(capsys, directory)


def test_prune_targets(capsys: Capture, model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    message = fails(capsys, "prune", "--model", model, "--output", tmp_path / "full")
    assert "exists and is not an empty directory; choose a new directory" in message
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["file"]
    message = fails(capsys, "prune", "--model", model, "--output", tmp_path / "absent" / "out")
    assert "the parent directory does not exist" in message


def test_nan_weights(capsys: Capture, copy: Copy) -> None:
    directory = copy(lambda name, tensor: tensor.fill_(float("nan")) if name == UP else tensor)
    message = fails(capsys, "prune", "--model", directory, "--output", directory.parent / "out")
    assert message.startswith(f"{UP}: 15360 of 15360 values are NaN")
    assert not list(directory.parent.glob("*out*"))


def raise_when_loading(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(engine, "LLM", fail)


def test_out_of_memory_is_the_users_to_mend(capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_when_loading(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    message = generate_fails(capsys, model)
    assert message.startswith("out of memory (CUDA out of memory. Tried to allocate 2 GiB.); use fewer prompts")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_when_loading(monkeypatch, RuntimeError("broken inside"))
    assert main(["generate", "--model", str(model), "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "broken inside" in error
    assert error.splitlines()[-1].startswith("sparsert: this is a bug: please report it")


def test_interrupts(capsys: Capture, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_when_loading(monkeypatch, KeyboardInterrupt())
    assert main(["generate", "--model", str(model), "--prompt", "a"]) == cli.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "sparsert: interrupted\n"
