"""Our checkpoints through transformers' own doors: from_pretrained, generate, pipeline, save_pretrained, compile."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_llama import RECORD, pruned_llama, write_packed
from random_24 import random_mask, raw_bits
from safetensors.torch import load_file, save_file
from tiny_chat_model import save_tokenizer
from tiny_llama import greedy_reference, make_llama, random_prompts
from torch import nn

from sparsert import LLM, CheckpointError, SamplingParams, SparseLinear, SparsityError, UnsupportedError

transformers = pytest.importorskip("transformers")
AutoModelForCausalLM = transformers.AutoModelForCausalLM

PARTS = ("compressed", "bitmask", "shape")

CHANGES: list[dict[str, Any]] = [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}]


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_bit_exact(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype, shards: int) -> None:
    dense = pruned_llama(dtype, **changes)
    written = write_packed(dense, tmp_path / "in", shards=shards)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == dtype and len(sparse_layers(model)) == 21
    for name, layer in sparse_layers(model).items():
        assert torch.equal(raw_bits(layer.to_linear().weight), raw_bits(dense.get_submodule(name).weight))
    ids = torch.tensor(random_prompts([11]))
    error = (model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)

    model.save_pretrained(tmp_path / "out", max_shard_size="40KB" if shards > 1 else "5GB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    again = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert again.keys() == written.keys()
    for name, tensor in written.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == RECORD


@pytest.mark.parametrize("changes", CHANGES)
def test_generates_the_tokens_of_our_engine(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = pruned_llama(**changes)
    dense.save_pretrained(tmp_path / "dense")
    write_packed(dense, tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    prompts = random_prompts([5, 17, 1, 9])
    ours = LLM(tmp_path / "dense", device="cpu").generate(prompts, SamplingParams(max_new_tokens=24))
    for prompt, completion in zip(prompts, ours, strict=True):
        expected = list(completion.token_ids)
        assert greedy_reference(model, prompt, 24)[: len(expected)] == expected
        assert greedy_reference(model, prompt, 24, cache_implementation="static")[: len(expected)] == expected


def test_what_convert_writes_and_what_our_engine_reads(tmp_path: Path) -> None:
    """convert -> transformers -> save_pretrained -> engine: one format."""
    pytest.importorskip("sparsert.checkpoint.convert")
    from sparsert.cli import main

    pruned_llama(attention_bias=True).save_pretrained(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "packed"), "--to", "sparsert"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    prompt = random_prompts([9])
    expected = greedy_reference(model, prompt[0], 20)
    for directory in ("dense", "packed", "again"):
        (completion,) = LLM(tmp_path / directory, device="cpu").generate(prompt, SamplingParams(max_new_tokens=20))
        assert list(completion.token_ids) == expected[: len(completion.token_ids)]


def test_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # transformers needs it for device maps
    write_packed(pruned_llama(vocab_size=save_tokenizer(tmp_path)), tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device_map="cpu")
    assert len(sparse_layers(pipe.model)) == 21
    text = "hello"
    result = pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert result.startswith(text) and len(result) > len(text)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")  # transformers needs it for device maps
    dense = pruned_llama()
    write_packed(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert len(sparse_layers(model)) == 21
    ids = torch.tensor(random_prompts([6])).to(model.device)
    torch.testing.assert_close(model(ids).logits.cpu(), dense(ids.cpu()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    dense = pruned_llama(torch.bfloat16)
    write_packed(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=torch.bfloat16)
    assert all(layer.values.is_cuda for layer in sparse_layers(model).values())
    ids = torch.tensor(random_prompts([6]), device="cuda")
    with torch.no_grad():
        exact = copy.deepcopy(dense).double().cuda()(ids).logits
        errors = [(found(ids).logits.double() - exact).norm().item() for found in (model, dense.cuda())]
    assert errors[0] <= 2 * errors[1]
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")  # compiles by itself
    assert static.shape == (1, 14)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole(tmp_path: Path, backend: str) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("inductor needs a C++ compiler for the CPU")
    dense = pruned_llama(num_hidden_layers=1)
    write_packed(dense, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.tensor(random_prompts([7, 7]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_base_model_alone(tmp_path: Path) -> None:
    """Names lose their prefix; the head's tensors are none of this model's."""
    dense = pruned_llama()
    write_packed(dense, tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(sparse_layers(model)) == 21
    ids = torch.tensor(random_prompts([6]))
    expected = dense.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_dense_checkpoint_is_packed_while_loading(tmp_path: Path) -> None:
    from sparsert.integrations.transformers import SparsertConfig

    dense = pruned_llama()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="dense: lm_head: more than half"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SparsertConfig())
    assert len(model.hf_quantizer.report.packed) == 21
    model.save_pretrained(tmp_path / "packed")
    record = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert record["ignore"] == ["lm_head"] and record["version"] == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.tensor(random_prompts([6]))
    assert torch.equal(again(ids).logits, model(ids).logits)
    plain = again.dequantize()
    assert not sparse_layers(plain) and not hasattr(plain.config, "quantization_config")
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)

    make_llama().save_pretrained(tmp_path / "full")
    with pytest.raises(SparsityError, match="no linear of the model is 2:4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=SparsertConfig())


def test_an_encoder_saves_and_loads(tmp_path: Path) -> None:
    """A BERT with a classifier, and its base model out of the same files."""
    from sparsert.integrations.transformers import SparsertConfig

    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 68}
    config = transformers.BertConfig(vocab_size=51, num_labels=3, **sizes)
    dense = transformers.BertForSequenceClassification(config).eval()
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= random_mask(*module.weight.shape)
    dense.save_pretrained(tmp_path / "dense")
    packed = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "dense", quantization_config=SparsertConfig()
    )
    packed.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    base = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    assert len(sparse_layers(again)) == 14 and len(sparse_layers(base)) == 13  # without the classifier
    ids = torch.randint(0, 51, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
        expected = dense.bert(ids).last_hidden_state
        torch.testing.assert_close(base(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_offloaded_layers_are_refused() -> None:
    from sparsert.integrations.stored_layers import is_stored, pack_stored_, stored_layer

    layer = stored_layer(nn.Linear(32, 20, device="meta"), "up_proj")
    assert is_stored(layer) and set(layer.state_dict()) == {"bias", *PARTS}
    with pytest.raises(UnsupportedError, match="up_proj: packed layers cannot be offloaded"):
        pack_stored_(layer, "up_proj")
    layer = stored_layer(nn.Linear(32, 20), "up_proj")
    layer._hf_hook = SimpleNamespace(offload=True)
    with pytest.raises(UnsupportedError, match="give a device_map of GPUs"):
        pack_stored_(layer, "up_proj")
    with pytest.raises(CheckpointError, match="has 30 inputs, no multiple of 4"):
        stored_layer(nn.Linear(30, 20), "up_proj")
    with pytest.raises(UnsupportedError, match=r"torch\.float64 cannot be packed"):
        stored_layer(nn.Linear(32, 20, dtype=torch.float64), "up_proj")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    """transformers would go on with random weights for what is missing; here each is an error."""
    pytest.importorskip("accelerate")  # transformers needs it for device maps
    tensors = write_packed(pruned_llama(), tmp_path)
    layer = "model.layers.1.mlp.up_proj"

    def load_with(changes: dict[str, torch.Tensor | None]) -> None:
        kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        AutoModelForCausalLM.from_pretrained(tmp_path)

    for part in ("compressed", "bitmask", "shape"):
        with pytest.raises(CheckpointError, match=f"{layer}: {part} of a packed weight is missing"):
            load_with({f"{layer}.{part}": None})
    with pytest.raises(CheckpointError, match="both packed and as a dense weight"):
        load_with({f"{layer}.weight": torch.zeros(160, 96)})
    with pytest.raises(CheckpointError, match=f"{layer}: 1 groups of the bitmask do not have exactly 2 of 4 bits"):
        bitmask = tensors[f"{layer}.bitmask"].clone()
        bitmask[3, 5] = bitmask[3, 5] & 0xF0 | 0x0F
        load_with({f"{layer}.bitmask": bitmask})
    with pytest.raises(CheckpointError, match=r"up_proj: stored for a weight \[96, 160\], the model's is \[160, 96\]"):
        load_with({f"{layer}.shape": torch.tensor([[96], [160]])})
    with pytest.raises(UnsupportedError, match=r"3 packed weights are for no nn.Linear of a LlamaForCausalLM"):
        of = {f"model.layers.1.mlp.{name}.{part}": f"{layer}.{part}" for name in "abc" for part in PARTS}
        load_with({name: tensors[source].clone() for name, source in of.items()})
    with pytest.raises(UnsupportedError, match="device_map names the disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "disk"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="version 2; this sparsert reads 'sparse-24-bitmask' up to"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsert; import transformers; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM; import sparsert",
        "import transformers; import sparsert; from transformers import LlamaForCausalLM",
        "import sparsert, sparsert; from sparsert.integrations.transformers import register; register()",
    ],
)
def test_registered_in_any_order_of_imports(imports: str) -> None:
    code = (
        f"{imports}; from transformers.quantizers import auto; import sparsert.integrations.registration as own; "
        "own.register_with_transformers(); print(auto.AUTO_QUANTIZER_MAPPING['sparsert'].__name__, "
        "auto.AUTO_QUANTIZATION_CONFIG_MAPPING['sparsert'].__name__, type(auto.__loader__).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["SparsertHfQuantizer", "SparsertConfig", "SourceFileLoader"]


def test_a_transformers_that_we_do_not_know_still_imports() -> None:
    code = (
        "import sparsert, sys, types, warnings; "
        "sys.modules['sparsert.integrations.transformers'] = types.ModuleType('x'); warnings.simplefilter('error'); "
        "exec('try:\\n import transformers.quantizers.auto\\nexcept UserWarning as w: print(w)')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not register with transformers" in result.stdout and "transformers 5 is needed" in result.stdout
