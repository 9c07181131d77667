"""transformers and peft on our format, on the CPU and on a GPU: what only there can go wrong is asked in the same way.

In fp32 the tokens have to be those of our engine; in bf16, where the sparse kernels run, near_ties.py says what they
have to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from near_ties import check_greedy, pruned_copy
from packed_llama import pruned_llama, write_packed
from safetensors.torch import load_file
from tiny_chat_model import save_chat_model, save_tokenizer
from tiny_llama import magnitude_prune_, random_prompts
from torch import Tensor, nn

from sparsert import LLM, SamplingParams, SparseLinear, ops
from sparsert.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers needs it for device maps
AutoModelForCausalLM = transformers.AutoModelForCausalLM

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]

#: How generate keeps its cache; on a GPU transformers itself compiles the step of a static one.
STATIC = {"cache_implementation": "static"}
MODES: dict[str, dict[str, Any]] = {"eager": {}, "static": {**STATIC, "disable_compile": True}, "compiled": STATIC}

SIZES: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "initializer_range": 0.05, "eos_token_id": None,
}  # fmt: skip
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A dense model with 2:4 zeros in bf16, and our format of it."""
    directory = tmp_path_factory.mktemp("devices")
    dense = pruned_llama(torch.bfloat16, **SIZES)
    write_packed(dense, directory)
    return dense, directory


def prompts(mode: str) -> list[list[int]]:
    """Of different lengths; one where each would be compiled anew."""
    return random_prompts([17] if mode == "compiled" else [5, 17, 70])


def load(directory: Path, device: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, device_map=device, dtype=dtype)


def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def generate_ours(llm: LLM, prompt: list[int]) -> list[int]:
    completion = llm.generate([prompt], SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))[0]
    return list(completion.token_ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_fp32_tokens_are_those_of_our_engine(packed: tuple[Any, Path], device: str, mode: str) -> None:
    model, llm = load(packed[1], device, torch.float32), LLM(packed[1], device=device, dtype="float32")
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert len(layers) == 7 * 4 and all(layer.values.device.type == device for layer in layers)
    for prompt in prompts(mode):
        expected = generate_ours(llm, prompt)
        assert len(expected) == NEW_TOKENS and generate(model, prompt, **MODES[mode]) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [*MODES, "our engine"])
def test_bf16_tokens_are_as_good_as_dense_ones(packed: tuple[Any, Path], device: str, mode: str) -> None:
    dense, directory = packed
    if device == "cuda":
        choice = ops.explain(384, 1024, 1, device=torch.device("cuda"), dtype=torch.bfloat16)
        assert choice.kernel == "mma_sp", str(choice)
    if mode == "our engine":
        llm = LLM(directory, device=device, dtype="bfloat16")
        texts = [(prompt, generate_ours(llm, prompt)) for prompt in prompts(mode)]
    else:
        model = load(directory, device, torch.bfloat16)
        texts = [(prompt, generate(model, prompt, **MODES[mode])) for prompt in prompts(mode)]
    for prompt, tokens in texts:
        check_greedy(dense, prompt, tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shards", [1, 3])
def test_saving_gives_every_bit_back(tmp_path: Path, device: str, shards: int) -> None:
    written = write_packed(pruned_llama(torch.bfloat16), tmp_path / "in", shards=shards)
    model = load(tmp_path / "in", device, torch.bfloat16)
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB" if shards > 1 else "5GB")
    again = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in written)
    assert LLM(tmp_path / "out", device=device, dtype="bfloat16").model.report.count("2:4") == 21


@pytest.mark.parametrize("device", DEVICES)
def test_pipeline(tmp_path: Path, device: str) -> None:
    write_packed(pruned_llama(torch.bfloat16, vocab_size=save_tokenizer(tmp_path)), tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device=device, dtype=torch.bfloat16)
    assert pipe.model.device.type == device
    assert sum(isinstance(layer, SparseLinear) for layer in pipe.model.modules()) == 21
    # three texts of different lengths in one batch
    pipe.tokenizer.padding_side = "left"
    results = pipe(["a", "hello there", "x y z"], max_new_tokens=5, do_sample=False, batch_size=3)
    assert [result[0]["generated_text"][0] for result in results] == ["a", "h", "x"]


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["auto", "cuda:0", {"": 0}, {"model": 0, "lm_head": "cuda:0"}])
def test_device_maps_of_a_gpu(packed: tuple[Any, Path], device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed[1], device_map=device_map, dtype=torch.bfloat16)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {torch.device("cuda", 0)}
    ids = torch.tensor(random_prompts([9]))
    exact = pruned_copy(packed[0], torch.float64)(ids).logits
    error = (packed[0](ids).logits - exact).abs().max()
    assert (model(ids.cuda()).logits.cpu() - exact).abs().max() <= 2 * error


@pytest.mark.parametrize("device", DEVICES)
def test_a_lora_step(packed: tuple[Any, Path], device: str) -> None:
    """Gradients of adapters on 2:4 layers are within twice the dense bf16 model's error; a few steps lower the loss."""
    peft = pytest.importorskip("peft")
    from sparsert.integrations.peft import support_sparse_linears

    dense, directory = packed
    ids = torch.tensor(random_prompts([13, 13]))

    def gradients(model: Any, sparse: bool) -> tuple[Any, dict[str, Tensor]]:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"])
        adapted = peft.get_peft_model(model, support_sparse_linears(config, model) if sparse else config)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter)
        there = ids.to(model.device)
        adapted(there, labels=there).loss.backward()
        return adapted, {n: p.grad.cpu().double() for n, p in adapted.named_parameters() if p.requires_grad}

    _, exact = gradients(pruned_copy(dense, torch.float64), False)
    _, rounded = gradients(pruned_copy(dense, torch.bfloat16, device), False)
    adapted, ours = gradients(load(directory, device, torch.bfloat16), True)
    assert ours.keys() == exact.keys() and len(ours) == 2 * 3 * 4
    for name, gradient in exact.items():
        theirs = (rounded[name] - gradient).norm()
        assert (ours[name] - gradient).norm() <= 2 * theirs + 1e-3 * gradient.norm(), name
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    there, losses = ids.to(adapted.device), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(adapted(there, labels=there).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, adapted.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("device", [GPU])
def test_eval_command(tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16 on a GPU within a percent of fp32 on the CPU."""
    directory = save_chat_model(tmp_path / "tiny", max_position_embeddings=128)
    model = AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False)
    magnitude_prune_(model)
    write_packed(model, tmp_path / "packed")
    save_tokenizer(tmp_path / "packed")
    (tmp_path / "text.txt").write_text("The tower of Pisa leans, and has leaned for a long time. " * 12)
    options = ["eval", "--model", str(tmp_path / "packed"), "--text", str(tmp_path / "text.txt"), "--json"]
    values = []
    for place, dtype in ((device, "bfloat16"), ("cpu", "float32")):
        assert main([*options, "--device", place, "--dtype", dtype]) == 0
        values.append(json.loads(capsys.readouterr().out)["perplexity"]["perplexity"])
    assert values[0] == pytest.approx(values[1], rel=0.01)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(device: str, kind: str) -> None:
    """sparsify_ on a GPU: BERT and ViT within twice the error of the dense bf16 model."""
    from random_24 import random_mask

    from sparsert import sparsify_

    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 320}
    model: nn.Module
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=51, **sizes))
        inputs: dict[str, Tensor] = {"input_ids": torch.randint(0, 51, (2, 9))}
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
        inputs = {"pixel_values": torch.randn(3, 3, 32, 32)}
    for module in model.eval().requires_grad_(False).to(device, torch.bfloat16).modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= random_mask(*module.weight.shape, device=device)

    def logits(dtype: torch.dtype) -> Tensor:
        there = {name: value.to(device) for name, value in inputs.items()}
        there = {name: value.to(dtype) if value.is_floating_point() else value for name, value in there.items()}
        result: Tensor = model.to(dtype)(**there).logits.double()
        return result

    exact, rounded = logits(torch.float64), logits(torch.bfloat16)
    assert len(sparsify_(model).packed) >= 13
    assert (logits(torch.bfloat16) - exact).abs().max() <= 2 * (rounded - exact).abs().max()
