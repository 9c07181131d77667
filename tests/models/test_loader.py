"""Loading: what is read, what is packed and why, what is refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import VOCABULARY, delete_blocks_, magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor
from transformers import LlamaForCausalLM

from sparsert.checkpoint import open_checkpoint, read_maskllm, write_maskllm
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, InputError, SparsityError, UnsupportedError
from sparsert.models import DecoderModel, load_model
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    model = make_llama()
    magnitude_prune_(model)
    return model, save(model, tmp_path)


def _edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Watch:
    """Records what is read onto the device, and how many earlier reads are still in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[str] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.most_alive_linears = 0
        original = TensorStream.read

        def read(stream: TensorStream, name: str, *arguments: Any) -> Tensor:
            self.alive = [reference for reference in self.alive if reference() is not None]
            tensor = original(stream, name, *arguments)
            self.reads.append(name)
            if name.endswith("_proj.weight"):
                self.alive.append(weakref.ref(tensor))
                self.most_alive_linears = max(self.most_alive_linears, len(self.alive))
            return tensor

        monkeypatch.setattr(TensorStream, "read", read)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def test_report_counts_bytes(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    model = load_model(open_checkpoint(pruned[1]), device="cpu", dtype="bfloat16")
    report = model.report
    assert report.count("2:4") == 21 and report.count("dense") == 0 and report.warnings == ()
    assert report.linears[GATE].kind == "2:4" and report.linears[GATE].reason == "zeros in the weight"
    assert report.linears[GATE].dense_bytes == 160 * 96 * 2
    held = sum(module.weight_nbytes for module in model.modules() if isinstance(module, SparseLinear))
    assert report.stored_bytes == held, "joined layers take what their parts took"
    assert report.dense_bytes == sum(record.dense_bytes for record in report.linears.values())
    assert 0.56 < report.share < 0.75, "inputs are padded to 64, which shows at these widths"
    assert str(report).startswith("21 linear layers packed 2:4, 0 dense")


def test_packed_model_holds_no_dense_copy(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    model = load_model(open_checkpoint(pruned[1]), device="cpu", dtype="bfloat16")
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors if tensor.numel())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    other = 2 * (2 * VOCABULARY * 96 + 7 * 96)  # embedding, head, norms in bf16
    assert sum(storages.values()) == model.report.stored_bytes + other


def test_one_dense_layer_at_a_time(pruned: tuple[LlamaForCausalLM, Path], watch: Watch) -> None:
    checkpoint = open_checkpoint(pruned[1])
    load_model(checkpoint, device="cpu")
    assert len(watch.reads) == len(set(watch.reads)) == len(checkpoint.names), "each tensor is read once"
    assert watch.most_alive_linears == 1


def test_removed_blocks_are_not_read(pruned: tuple[LlamaForCausalLM, Path], watch: Watch) -> None:
    checkpoint = open_checkpoint(pruned[1])
    model = load_model(checkpoint, device="cpu", plan=LayerPlan.remove(3, [1], force=True))
    assert not any(".layers.1." in name for name in watch.reads)
    assert {int(name.split(".")[2]) for name in model.report.linears} == {0, 2}, "the report keeps the file's numbers"
    with pytest.raises(InputError, match="layer plan is for 5 blocks, the model has 3"):
        load_model(checkpoint, device="cpu", plan=LayerPlan.full(5))


def test_tied_head_shares_storage(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    magnitude_prune_(model)
    directory = save(model, tmp_path)
    assert "lm_head.weight" not in open_checkpoint(directory)
    loaded = load_model(open_checkpoint(directory), device="cpu")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    magnitude_prune_(model)
    directory = save(model, tmp_path)
    _edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_model(open_checkpoint(directory), device="cpu")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    _edit_tensors(directory, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.warns(UserWarning, match=r"ties the head to the embedding, but lm_head\.weight differs"):
        loaded = load_model(open_checkpoint(directory), device="cpu")
    torch.testing.assert_close(loaded.lm_head.weight, 2 * loaded.embed_tokens.weight)
    assert len(loaded.report.warnings) == 1


def test_tied_head_stored_under_the_other_name(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    magnitude_prune_(model)
    directory = save(model, tmp_path)
    _edit_tensors(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    loaded = load_model(open_checkpoint(directory), device="cpu")
    assert torch.equal(loaded.embed_tokens.weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_masks_from_a_file(tmp_path: Path) -> None:
    reference = make_llama(num_hidden_layers=6)
    checkpoint = open_checkpoint(save(reference, tmp_path))
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name in checkpoint.block_linears():
        order = torch.rand(checkpoint.shape(name), generator=generator).view(-1, 4).argsort(dim=1)
        masks[name] = (order < 2).view(checkpoint.shape(name))
    write_maskllm(tmp_path / "masks.npz", masks.items())
    plan = LayerPlan.remove(6, [2], force=True)
    model = load_model(checkpoint, device="cpu", plan=plan, masks=read_maskllm(tmp_path / "masks.npz"))
    assert {record.reason for record in model.report.linears.values()} == {"mask file"}
    for name, parameter in reference.named_parameters():
        if name in masks:
            parameter.mul_(masks[name])
    delete_blocks_(reference, (2,))
    tokens = torch.tensor(random_prompts([19]))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_masks_of_another_model(pruned: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(pruned[1])
    names = checkpoint.block_linears()
    masks = {name: torch.zeros(checkpoint.shape(name), dtype=torch.bool) for name in names}
    write_maskllm(tmp_path / "short.npz", list(masks.items())[:-1])
    with pytest.raises(CheckpointError, match="1 of the model's 21 block linears have no mask"):
        load_model(checkpoint, device="cpu", masks=read_maskllm(tmp_path / "short.npz"))
    masks[GATE][3, 4:7] = True
    write_maskllm(tmp_path / "full.npz", masks.items())
    with pytest.raises(SparsityError, match=rf"{GATE}: 1 of 3840 groups keep more than 2.*row 3, columns 4-7"):
        load_model(checkpoint, device="cpu", masks=read_maskllm(tmp_path / "full.npz"))


def test_mask_maker(tmp_path: Path) -> None:
    reference = make_llama()
    checkpoint = open_checkpoint(save(reference, tmp_path))
    model = load_model(checkpoint, device="cpu", mask_maker=magnitude_mask)
    assert {record.reason for record in model.report.linears.values()} == {"mask maker"}
    magnitude_prune_(reference)
    tokens = torch.tensor(random_prompts([23]))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_dense_layers_are_reported(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t[GATE][0, 0:3].fill_(0.5))
    with pytest.warns(UserWarning, match=r"1 of 21 linear layers are not 2:4 and run dense") as caught:
        model = load_model(open_checkpoint(pruned[1]), device="cpu")
    assert len(caught) == 1
    assert model.report.linears[GATE].kind == "dense"
    assert model.report.linears[GATE].reason == "1 of 3840 groups of four keep more than 2 values"
    assert model.report.warnings[0].endswith("prune it with `sparsert prune` or give masks")


def test_broken_claim_is_an_error(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t[GATE][0, 0:3].fill_(0.5))
    _edit_config(pruned[1], sparsert={"pattern": "2:4"})
    with pytest.raises(SparsityError, match=rf"{GATE}: 1 of 3840 groups keep more than 2 of 4 values"):
        load_model(open_checkpoint(pruned[1]), device="cpu")


def test_width_without_groups_stays_dense(tmp_path: Path) -> None:
    reference = make_llama(intermediate_size=158)
    checkpoint = open_checkpoint(save(reference, tmp_path))
    with pytest.warns(UserWarning, match="3 of 21 linear layers"):
        model = load_model(checkpoint, device="cpu", mask_maker=magnitude_mask)
    assert model.report.linears["model.layers.0.mlp.down_proj.weight"].reason == "input width 158 is no multiple of 4"


def _check_refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(open_checkpoint(directory), device="cpu")


def test_missing_tensor(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t.pop(GATE))
    _check_refused(pruned[1], rf"1 tensors are missing: {GATE}; the checkpoint is incomplete")


def test_missing_blocks_name_the_first(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_config(pruned[1], num_hidden_layers=4)
    _check_refused(pruned[1], r"9 tensors are missing: model\.layers\.3\..* and 5 more; .*num_hidden_layers 4")


def test_unexpected_tensors(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_config(pruned[1], num_hidden_layers=2)
    _check_refused(pruned[1], r"9 tensors are none of a LlamaForCausalLM with 2 blocks: model\.layers\.2\.")


def test_stored_rope_buffers_are_passed_over(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}))
    assert isinstance(load_model(open_checkpoint(pruned[1]), device="cpu"), DecoderModel)


def test_misshapen_tensor(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t.update({GATE: torch.zeros(160, 92)}))
    _check_refused(pruned[1], rf"{GATE} is \[160, 92\], need \[160, 96\]; tensors and config.json are of different")


def test_wrong_dtype(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t.update({GATE: torch.zeros(160, 96, dtype=torch.int8)}))
    _check_refused(pruned[1], rf"{GATE} is torch.int8; convert the checkpoint to bfloat16, float16 or float32")


def test_values_beyond_float16(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    _edit_tensors(pruned[1], lambda t: t["model.norm.weight"].fill_(1e5))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: has values beyond float16's range.*bfloat16"):
        load_model(open_checkpoint(pruned[1]), device="cpu", dtype="float16")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_backend_that_cannot_run_is_refused_before_loading(
    pruned: tuple[LlamaForCausalLM, Path], watch: Watch, backend: str
) -> None:
    checkpoint = open_checkpoint(pruned[1])
    with pytest.raises(UnsupportedError, match=r"use (backend=)?'auto'"):
        load_model(checkpoint, device="cpu", backend=backend)
    with pytest.raises(InputError, match="backend='fast'"):
        load_model(checkpoint, device="cpu", backend="fast")
    assert not watch.reads


def test_weights_do_not_alias_the_file(pruned: tuple[LlamaForCausalLM, Path]) -> None:
    """A file that is rewritten while the model lives must not change it."""
    model = load_model(open_checkpoint(pruned[1]), device="cpu")
    tokens = torch.tensor(random_prompts([9]))
    before = model(tokens)
    path = pruned[1] / "model.safetensors"
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 4)
        stream.write(b"\x7f" * (path.stat().st_size // 2))
    assert torch.equal(model(tokens), before)
