"""The report of `sparsert inspect`: patterns, counts, bytes, claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_files import BLOCKS, tiny_config, tiny_tensors

from sparsert.checkpoint import inspect as inspect_module
from sparsert.checkpoint import inspect_checkpoint, open_checkpoint
from sparsert.compress import magnitude_mask
from sparsert.errors import UnsupportedError
from sparsert.formats import packed_nbytes
from sparsert.schedule import LayerPlan

Make = Callable[..., Path]
PREFIX = "model.layers.2."


def test_patterns_counts_and_bytes(make_directory: Make) -> None:
    tensors = tiny_tensors()
    q, k, up, down = (
        PREFIX + name + ".weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    )
    tensors[q] = tensors[q] * magnitude_mask(tensors[q])
    tensors[k] = tensors[k] * torch.tensor([0, 0, 1, 0]).repeat(6)
    tensors[up][:, :12] = 0
    tensors[down] = tensors[down] * magnitude_mask(tensors[down])
    tensors[down][7, 8:11] = 1.0
    report = inspect_checkpoint(open_checkpoint(make_directory(tensors)))
    by_name = {tensor.name: tensor for tensor in report.tensors}

    assert (by_name[q].pattern, by_name[q].bad_groups, by_name[q].zero_share) == ("2:4", 0, 0.5)
    assert (by_name[k].pattern, by_name[k].zero_share) == ("1:4", 0.75)
    assert (by_name[up].pattern, by_name[up].bad_groups, by_name[up].zero_share) == ("other", 40 * 3, 0.5)
    assert (by_name[down].pattern, by_name[down].bad_groups) == ("other", 1)
    dense = by_name["model.layers.0.mlp.up_proj.weight"]
    assert (dense.pattern, dense.bad_groups, dense.zero_share) == ("dense", 40 * 6, 0.0)
    assert by_name["model.norm.weight"].pattern == "-" and by_name["model.norm.weight"].bad_groups is None

    assert [tensor.name for tensor in report.tensors if tensor.runs_sparse] == [
        name for name in report_order(report) if name in (q, k)
    ]
    assert by_name[q].packed_bytes == packed_nbytes(24, 24, torch.bfloat16) and by_name[q].nbytes == 24 * 24 * 2
    assert dense.packed_bytes == dense.nbytes
    totals = report.totals()
    assert totals["sparse_linears"] == 2 and totals["tensors"] == len(tensors)
    assert totals["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert (
        totals["device_bytes"] == totals["bytes"] - totals["sparse_linear_bytes"] + totals["sparse_linear_packed_bytes"]
    )
    assert report.num_blocks == BLOCKS and report.architecture == "LlamaForCausalLM"


def report_order(report: inspect_module.CheckpointReport) -> list[str]:
    return [tensor.name for tensor in report.tensors]


def test_embeddings_with_zeros_do_not_run_sparse(make_directory: Make) -> None:
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"].zero_()
    report = inspect_checkpoint(open_checkpoint(make_directory(tensors)))
    embedding = next(tensor for tensor in report.tensors if "embed" in tensor.name)
    assert embedding.pattern == "1:4" and not embedding.runs_sparse


def test_other_dtypes_are_listed(make_directory: Make) -> None:
    tensors = tiny_tensors()
    tensors[PREFIX + "mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)
    tensors[PREFIX + "mlp.down_proj.weight"] = torch.zeros(24, 40).to(torch.float8_e4m3fn)
    tensors["odd"] = torch.randn(3, 22)
    report = inspect_checkpoint(open_checkpoint(make_directory(tensors)))
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert by_name[PREFIX + "mlp.up_proj.weight"].dtype == "int8"
    assert by_name[PREFIX + "mlp.up_proj.weight"].pattern == "-"
    assert not by_name[PREFIX + "mlp.down_proj.weight"].runs_sparse
    assert by_name["odd"].pattern == "-" and by_name["odd"].bad_groups is None


def test_text_and_json(make_directory: Make) -> None:
    record = {"version": "0.1.0", "method": "magnitude", "pattern": "2:4", "base_model": "owner/base"}
    config = tiny_config(
        sparsert={**record, "base_num_blocks": 10, "kept_blocks": [0, 1, 2, 3, 6, 7, 8, 9], "removed_blocks": [4, 5]}
    )

    def refuse(config: dict[str, object]) -> None:
        raise UnsupportedError("only Llama")

    checkpoint = open_checkpoint(make_directory(config=config))
    report = inspect_checkpoint(checkpoint, architecture_check=refuse)
    text = report.to_text()
    assert text.splitlines()[0].split()[:6] == ["tensor", "shape", "dtype", "zeros", "bad", "groups"]
    assert "not supported: only Llama" in text and "8 blocks" in text
    assert "base model owner/base, runs 8 of 10 blocks: 0-3,6-9 (removed: 4-5)" in text
    assert f"broken: {4 * BLOCKS} weights are said to be 2:4 and are not" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["supported"] is False and data["record"]["removed_blocks"] == [4, 5]
    assert len(data["tensors"]) == len(checkpoint.names) and len(data["totals"]["broken_claims"]) == 4 * BLOCKS
    assert inspect_checkpoint(checkpoint, architecture_check=lambda config: None).supported is True
    assert inspect_checkpoint(checkpoint).supported is None


def test_halves_that_the_configuration_skips(make_directory: Make) -> None:
    config = tiny_config(per_layer_config={"3": {"skip": ["mlp"]}})
    report = inspect_checkpoint(open_checkpoint(make_directory(config=config)))
    assert report.plan == LayerPlan(BLOCKS, tuple(range(BLOCKS)), without_mlp=(3,))
    assert "runs all 8 blocks, without mlp in 3 (per_layer_config)" in report.to_text()
    assert report.to_dict()["plan"]["without_mlp"] == (3,)
