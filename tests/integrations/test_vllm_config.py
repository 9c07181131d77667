"""The plugin's configuration: which checkpoints it claims, which layers of them it packs, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stand_in
from packed_llama import RECORD, pruned_llama, write_packed
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from sparsert.errors import CheckpointError, UnsupportedError

BITMASK_24 = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
QUANTIZED = {**BITMASK_24, "format": "float-quantized", "config_groups": {"group_0": {"targets": ["Linear"]}}}
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield vllm_stand_in.import_plugin(patch)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A dense tiny Llama with 2:4 zeros, and our format of it in three files."""
    directory = tmp_path_factory.mktemp("packed")
    model = pruned_llama(torch.bfloat16)
    write_packed(model, directory, shards=3)
    return model, directory


def read(plugin: Any, directory: Path, quantization: dict[str, Any] | None = None, hf_config: Any = None) -> Any:
    """The configuration as vLLM makes it, once it knows the directory."""
    config = plugin.SparsertConfig() if quantization is None else plugin.SparsertConfig.from_config(quantization)
    config.packed_modules_mapping = copy.deepcopy(MAPPING)
    config.maybe_update_config(str(directory), hf_config=hf_config)
    return config


def test_registration_may_be_repeated(plugin: Any) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    plugin.register()
    plugin.register()
    found = get_quantization_config("sparsert")
    assert found is plugin.SparsertConfig and found().get_name() == "sparsert"
    assert found.get_min_capability() == 80 and found.get_config_filenames() == []
    assert found.get_supported_act_dtypes() == [torch.bfloat16, torch.float16]


def test_the_entry_point_names_it(plugin: Any) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["sparsert"].partition(":")
    assert module == plugin.__name__ and callable(getattr(plugin, function))
    assert any("vllm" in requirement for requirement in project["optional-dependencies"]["vllm"])


def test_the_package_does_not_import_it() -> None:
    code = "import sys, sparsert, sparsert.ops, sparsert.nn, sparsert.engine; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("quantization", "user", "claimed"),
    [
        (RECORD, None, True),
        (BITMASK_24, None, True),
        (BITMASK_24, "compressed-tensors", True),
        (QUANTIZED, None, False),
        ({**BITMASK_24, "sparsity_config": {"format": "dense"}}, None, False),
        ({**BITMASK_24, "sparsity_config": {"format": "dense"}}, "sparsert", True),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {}}}, "sparsert", False),
        ({**BITMASK_24, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsert", False),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {}}}, None, False),
        ({"quant_method": "gptq", "bits": 4}, "sparsert", False),
        ({}, None, False),
    ],
)
def test_claims(plugin: Any, quantization: dict[str, Any], user: str | None, claimed: bool) -> None:
    given = copy.deepcopy(quantization)
    answer = plugin.SparsertConfig.override_quantization_method(given, user, hf_config=None)
    assert answer == ("sparsert" if claimed else None) and given == quantization


def test_configurations_that_cannot_be_run(plugin: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: is of sparsert format 'sparse-24-bitmask', version 9"):
        plugin.SparsertConfig.from_config({**RECORD, "version": 9})
    with pytest.raises(UnsupportedError, match=r"method 'compressed-tensors', format 'sparse-bitmask'; .* convert DIR"):
        plugin.SparsertConfig.from_config({**BITMASK_24, "sparsity_config": {"format": "sparse-bitmask"}})
    with pytest.raises(UnsupportedError, match=r"method 'gptq', format None"):
        plugin.SparsertConfig.from_config({"quant_method": "gptq"})


@pytest.mark.parametrize("version", ["0.23.1", "0.9.2"])
def test_old_releases_are_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(plugin.vllm, "__version__", version)
    with pytest.raises(UnsupportedError, match=rf"needs vLLM 0\.24, this is {version}; install vllm==0\.24"):
        plugin.SparsertConfig()


@pytest.mark.parametrize(("version", "warned"), [("0.24.0", False), ("0.24.3+cu130", False), ("0.25.0rc1", True)])
def test_new_releases_are_warned_of(plugin: Any, monkeypatch: pytest.MonkeyPatch, version: str, warned: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin.vllm, "__version__", version)
    monkeypatch.setattr(plugin._logger, "warning_once", said.append)
    plugin.SparsertConfig()
    assert said == (
        [f"sparsert's plugin was tested with vLLM 0.24, this is {version}; check what it generates"] * warned
    )


def prefixes(block: int) -> dict[str, list[str]]:
    """vLLM's layer -> linears of the checkpoint, in one block."""
    at = f"model.layers.{block}"
    joined = {"self_attn": ["qkv_proj", "o_proj"], "mlp": ["gate_up_proj", "down_proj"]}
    return {
        f"{at}.{half}.{layer}": [f"{at}.{half}.{part}" for part in MAPPING.get(layer, [layer])]
        for half, layers in joined.items()
        for layer in layers
    }


def build_block(config: Any, sizes: LlamaConfig, block: int) -> dict[str, Any]:
    from vllm.model_executor.layers import linear

    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config}
    hidden, wide, heads = sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads
    with vllm_stand_in.as_rank(0, 1):
        qkv, out, gate_up, down = (dict(common, prefix=prefix) for prefix in prefixes(block))
        layers = (
            linear.QKVParallelLinear(hidden, sizes.head_dim, heads, sizes.num_key_value_heads, **qkv),
            linear.RowParallelLinear(heads * sizes.head_dim, hidden, **out),
            linear.MergedColumnParallelLinear(hidden, [wide, wide], **gate_up),
            linear.RowParallelLinear(wide, hidden, **down),
        )
    return dict(zip(prefixes(block), layers, strict=True))


def load_model(config: Any, model: Any, directory: Path) -> dict[str, Any]:
    """All linears of a model, loaded from its files in their order as vLLM's Llama does."""
    layers: dict[str, Any] = {}
    for block in range(model.config.num_hidden_layers):
        layers |= build_block(config, model.config, block)
    owners = {}
    for block in range(model.config.num_hidden_layers):
        for prefix, parts in prefixes(block).items():
            shards = ["q", "k", "v"] if "qkv" in prefix else [0, 1] if "gate_up" in prefix else [None]
            owners |= {part: (layers[prefix], shard) for part, shard in zip(parts, shards, strict=True)}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            if module in owners:
                layer, shard = owners[module]
                parameter = getattr(layer, part)
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return layers


@pytest.mark.parametrize("quantization", [RECORD, BITMASK_24], ids=["sparsert", "compressed-tensors"])
def test_a_whole_checkpoint(
    plugin: Any,
    packed: tuple[Any, Path],
    quantization: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every layer holds what the dense model does; configurations travel to other processes as pickles."""
    model, directory = packed
    config = pickle.loads(pickle.dumps(read(plugin, directory, quantization, model.config)))
    assert config.packed and len(config.stored) == 21
    said: list[str] = []
    monkeypatch.setattr(sys.modules[type(config.report).__module__]._logger, "info", said.append)
    layers = load_model(config, model, directory)
    dense = dict(model.named_modules())
    for block in range(3):
        for prefix, parts in prefixes(block).items():
            layer = layers[prefix]
            weight = torch.ops.sparsert.unpack24(
                layer.weight_packed, layer.weight_metadata, layer.packed_outputs, layer.packed_inputs
            )
            assert torch.equal(weight, torch.cat([dense[part].weight for part in parts])), prefix
    assert said == config.report.lines()
    assert config.report.lines()[0].startswith("sparsert: 12 linear layers run 2:4 packed, 0.000 GB")


def test_dense_layers_of_a_packed_checkpoint(plugin: Any, packed: tuple[Any, Path], tmp_path: Path) -> None:
    """One line a cause, whatever the list of ignored modules says: what counts is which tensors there are."""
    model, directory = packed
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    dense = dict(model.named_modules())
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in list(tensors):
            module = name.rpartition(".")[0]
            if module.endswith(("0.mlp.down_proj", "1.mlp.down_proj", "2.self_attn.v_proj")):
                del tensors[name]
                tensors[f"{module}.weight"] = dense[module].weight.contiguous()
        save_file(tensors, tmp_path / file.name)
    config = read(plugin, tmp_path, RECORD)
    load_model(config, model, tmp_path)
    assert config.report.lines()[1:] == [
        "sparsert: 2 linear layers run dense, because the checkpoint holds them dense: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj",
        "sparsert: 1 linear layers run dense, because the checkpoint holds only some of their joined parts packed: "
        "model.layers.2.self_attn.qkv_proj",
    ]


def test_a_dense_checkpoint_by_request(plugin: Any, packed: tuple[Any, Path], tmp_path: Path) -> None:
    model = packed[0]
    model.save_pretrained(tmp_path)
    config = read(plugin, tmp_path, None, model.config)
    assert not config.packed and config.stored == {}
    load_model(config, model, tmp_path)
    assert len(config.report.packed) == 12 and not config.report.dense


def test_long_lists_of_names_are_cut(plugin: Any) -> None:
    report = plugin.LayerReport()
    for index in range(7):
        report.expect()
        report.add_dense(f"layer{index}", "of something")
    assert report.lines()[1].endswith("because of something: layer0, layer1, layer2, layer3 and 3 more")


def test_names_follow_the_model_class(plugin: Any, packed: tuple[Any, Path]) -> None:
    """Classes with a tower of their own put the text model elsewhere."""

    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {name.replace("model.", "language_model.model.", 1): value for name, value in values.items()}

    config = read(plugin, packed[1], RECORD)
    config.apply_vllm_mapper(Mapper())
    assert "language_model.model.layers.0.self_attn.q_proj" in config.stored and len(config.stored) == 21


def test_layers_that_are_no_linears(plugin: Any, packed: tuple[Any, Path]) -> None:
    config = read(plugin, packed[1], RECORD)
    assert config.get_quant_method(torch.nn.Embedding(3, 2), "lm_head") is None
    assert config.get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None
    assert config.get_quant_method(torch.nn.Embedding(3, 2), "") is None
    config.stored |= {"lm_head": (8, 8), "model.layers.1.mlp.experts.3.up_proj": (8, 8)}
    with pytest.raises(
        UnsupportedError, match=r"lm_head is packed, and vLLM runs it in a Embedding, which takes dense"
    ):
        config.get_quant_method(torch.nn.Embedding(3, 2), "lm_head")
    with pytest.raises(UnsupportedError, match=r"experts\.3\.up_proj is packed, and vLLM runs it in a Identity"):
        config.get_quant_method(torch.nn.Identity(), "model.layers.1.mlp.experts")


def test_unknown_files_are_refused(plugin: Any, tmp_path: Path) -> None:
    config = plugin.SparsertConfig(packed=True)
    from vllm.model_executor.layers.linear import LinearBase

    layer = LinearBase.__new__(LinearBase)
    with pytest.raises(UnsupportedError, match=r"vLLM did not say which files it will load.* vLLM 0\.24 does"):
        config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
    with pytest.raises(UnsupportedError, match="says that weights are packed, but no packed weight was found"):
        config.maybe_update_config(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a.bitmask": None}, CheckpointError, r"'a' is stored as sparse-24-bitmask but a\.bitmask is missing"),
        ({"a.bitmask": torch.zeros((4, 2), dtype=torch.uint8)}, CheckpointError, r"'a\.weight' do not fit each other"),
        ({"a.weight": torch.zeros(4, 8)}, CheckpointError, r"holds 'a\.weight' twice"),
        ({"a.compressed": torch.zeros((4, 4)).to(torch.float8_e4m3fn)}, UnsupportedError, "a.weight are torch.float8"),
        ({"a.compressed": torch.zeros((4, 3))}, CheckpointError, "a.weight is packed, but has 6 inputs"),
        (
            {"a.row_offsets": torch.zeros(4, dtype=torch.int64)},
            UnsupportedError,
            "a.shape: is stored as sparse-bitmask",
        ),
        ({"b.weight": torch.zeros(4, 8), "b._weight_mask": torch.ones(4, 8)}, UnsupportedError, "as modelopt-mask"),
    ],
)
def test_files_that_cannot_be_run(
    plugin: Any, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = {
        "a.compressed": torch.zeros((4, 4), dtype=torch.bfloat16),
        "a.bitmask": torch.full((4, 1), 0x33, dtype=torch.uint8),
        "a.shape": torch.tensor([[4], [8]]),
        **change,
    }
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises(error, match=message):
        plugin.SparsertConfig(packed=True).maybe_update_config(str(tmp_path))


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, r"block 1: \{'skip': \['mlp'\]\}"),
        ({"per_layer_config": {"0": {"intermediate_size": 64}}}, "block 0: "),
        ({"text_config": {"intermediate_size": [160, 160, 64]}}, "a list for intermediate_size"),
    ],
)
def test_blocks_with_layouts_of_their_own(
    plugin: Any, packed: tuple[Any, Path], layout: dict[str, Any], named: str
) -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {**packed[0].config.to_dict(), **layout}

    with pytest.raises(UnsupportedError, match=rf"layouts of their own \({named}.*sparsert\.LLM.*--remove-blocks LIST"):
        read(plugin, packed[1], RECORD, Config())


def test_what_transformers_makes_of_skipped_halves(plugin: Any, packed: tuple[Any, Path]) -> None:
    """The same through transformers' own class, which has ways of its own to keep them."""
    content = json.loads((packed[1] / "config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"block 2: \{'skip': \['self_attn'\]\}"):
        read(plugin, packed[1], RECORD, LlamaConfig(**content, per_layer_config={"2": {"skip": ["self_attn"]}}))
    read(plugin, packed[1], RECORD, LlamaConfig(**content))
