"""Files made to mislead: links that lead out, repeated keys, absurd sizes, tensors larger than their bytes."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_chat_model import save_chat_model
from tiny_files import tiny_config, tiny_tensors

from sparsert.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    open_checkpoint,
    read_maskllm,
    write_checkpoint,
)
from sparsert.checkpoint.gguf_header import check_gguf_header
from sparsert.checkpoint.json_file import read_json
from sparsert.checkpoint.safetensors_file import read_header
from sparsert.engine import LLM, SamplingParams
from sparsert.errors import CheckpointError

Make = Callable[..., Path]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_that_lead_out_of_the_directory(make_directory: Make, tmp_path: Path, file: str) -> None:
    directory = make_directory()
    secret = tmp_path / "elsewhere"
    os.rename(directory / file, secret)
    (directory / file).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere, outside of the model directory; nothing was"):
        open_checkpoint(directory)
    (directory / file).unlink()
    (directory / file).symlink_to(directory / file)
    with pytest.raises(CheckpointError, match=r"leads nowhere|no such file|holds none of"):
        open_checkpoint(directory)


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    """A directory that says that its configuration, model and tokenizer are classes of its own, as on the hub."""
    directory, evidence = save_chat_model(tmp_path / "model"), tmp_path / "evidence"
    code = f"open({str(evidence)!r}, 'w')\nclass Own: pass\n"
    (directory / "own.py").write_text(code)
    own = {f"Auto{kind}": "own.Own" for kind in ("Config", "ModelForCausalLM")}
    for name, classes in (("config.json", own), ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]})):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, "auto_map": classes}))
    try:
        llm = LLM(directory, device="cpu")
        llm.generate(["hello"], SamplingParams(max_new_tokens=2))
    except CheckpointError as error:
        assert "tokenizer" in str(error)
    inspect_checkpoint(open_checkpoint(directory))
    assert not evidence.exists()


def test_links_of_shards_and_small_files(make_directory: Make, tmp_path: Path) -> None:
    directory = make_directory(layout="sharded")
    shard = directory / "model-00002-of-00003.safetensors"
    os.rename(shard, tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002.*outside of the model directory"):
        open_checkpoint(directory)
    other = make_directory()
    (tmp_path / "key").write_text("secret")
    (other / "tokenizer.json").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to .*key"):
        write_checkpoint(open_checkpoint(other), tmp_path / "copy")
    assert not (tmp_path / "copy").exists(), "nothing of the link went into a copy"


def test_links_as_the_cache_of_the_hub_has_them(make_directory: Make, tmp_path: Path) -> None:
    directory = make_directory()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1a2b", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        os.rename(file, blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"hash{number}")
    checkpoint = open_checkpoint(snapshot)
    assert torch.equal(checkpoint.read("model.norm.weight"), tiny_tensors()["model.norm.weight"])
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert open_checkpoint(linked).names == checkpoint.names, "the directory itself may be a link"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b"[" * 200_000, "is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b'{"a": "\xff"}', "is no JSON"),
        (b"3", "holds a JSON int, need an object"),
    ],
)
def test_json(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read_json(file)


def test_json_of_absurd_size(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(10**9)  # a hole: no bytes on the disk
    with pytest.raises(CheckpointError, match=r"has 1000000000 bytes, a configuration or index at most 64000000"):
        read_json(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
         "header names 'a' twice"),
        ('{"a":{"dtype":"U8","shape":[0,99999999999999999999],"data_offsets":[0,0]}}', "tensor 'a' is damaged"),
        ('{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}', "entry of tensor 'a' is damaged"),
        ('{"a":{"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]}}', "entry of tensor 'a' is damaged"),
        ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "entry of tensor 'a' is damaged"),
        ('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "entry of tensor .* is damaged"),
        ('{"' + "n" * 1001 + '":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "entry of tensor 'nnn"),
        ('{"a":{"dtype":"U8","shape":[281474976710655],"data_offsets":[0,281474976710655]}}', "truncated"),
        ("[" * 100_000, "header is no JSON"),
    ],
)  # fmt: skip
def test_safetensors_headers(tmp_path: Path, header: str, message: str) -> None:
    file = tmp_path / "model.safetensors"
    text = header.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_pickled_tensors_that_are_larger_than_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    for tensor in (torch.zeros(1).expand(10**6, 10**6), torch.eye(4).to_sparse()):
        torch.save({"w": tensor}, file)
        with pytest.raises(CheckpointError, match=r"sparse, quantized or larger than what is stored"):
            open_checkpoint(tmp_path)


def test_index_without_tensors_or_with_paths(make_directory: Make) -> None:
    directory = make_directory(layout="sharded")
    index = directory / "model.safetensors.index.json"
    for shard in ("/etc/passwd.safetensors", "..", "", "a/../model-00001-of-00003.safetensors", "model.safetensors/"):
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(CheckpointError, match=r"no weight file beside it|has no weight_map"):
            open_checkpoint(directory)
    index.write_text('{"weight_map": {"w": "model-00001-of-00003.safetensors", "w": "x"}}')
    with pytest.raises(CheckpointError, match="the key 'w' stands twice"):
        open_checkpoint(directory)


def test_mask_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight.mask.npy"
    file = tmp_path / "m.npz"

    def array_header(length: int) -> bytes:
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({length},), }}".encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, array_header(10**15) + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"claims 1000000000000000 bytes in a member of 228"):
        read_maskllm(file)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "w") as archive:
        for _ in range(2):
            archive.writestr(name, array_header(3) + b"\0" * 3)
    with pytest.raises(CheckpointError, match="holds 2 arrays, or one of them twice"):
        read_maskllm(file)
    np.savez(file, **{name.removesuffix(".npy"): np.array([{}], dtype=object)})
    with pytest.raises(CheckpointError, match="holds object of shape"):
        read_maskllm(file)


def test_gguf_counts_that_would_never_end(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    key = struct.pack("<Q", 1) + b"k"
    for body, message in (
        (struct.pack("<IQQ", 3, 0, 2**60), "1152921504606846976 entries do not fit"),
        (struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, 2**60), "entries do not fit"),
        (struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 4, 2**60), "an entry goes past its end"),
        (struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 77) + b"\0" * 9, "a value of unknown type 77"),
        (struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"", "unpack_from requires"),
    ):
        file.write_bytes(b"GGUF" + body)
        with pytest.raises(CheckpointError, match=message):
            check_gguf_header(file)
    file.write_bytes(b"GGML" + b"\0" * 40)
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        check_gguf_header(file)


def test_nan_in_a_packed_checkpoint(make_directory: Make, tmp_path: Path) -> None:
    values = torch.ones(40, 12)
    values[3, 3] = float("nan")
    bits = torch.full((40, 3), 0x33, dtype=torch.uint8)
    prefix = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{prefix}.compressed": values,
        f"{prefix}.bitmask": bits,
        f"{prefix}.shape": torch.tensor([[40], [24]]),
    }
    directory = make_directory(tensors, tiny_config())
    with pytest.raises(CheckpointError, match=r"1 of 960 values of 'model.layers.0.mlp.up_proj.weight' are NaN"):
        convert_checkpoint(open_checkpoint(directory), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 3}, "architectures is '3'; it must be a list of names"),
        ({"architectures": ["A", None]}, "architectures is .* must be a list of names"),
        ({"layer_types": "full"}, "layer_types is 'full'; it must be a list"),
        ({"sparsert": {"dense_linears": 7}}, "dense_linears is '7'"),
        ({"quantization_config": {"ignore": {}}}, "ignore is '{}'"),
        ({"sparsity_config": {"ignore": [1]}}, "ignore is .* must be a list of names"),
        (
            {"sparsity_config": {"ignore": ["re:(a+)+$"]}},
            r".* ignores 're:\(a\+\)\+\$', which is no regular expression of names",
        ),
        (
            {"quantization_config": {"sparsity_config": {"ignore": ["re:" + ".*x" * 5]}}},
            ".* which is no regular expression of names",
        ),
        (
            {"compression_config": {"sparsity_config": {"ignore": ["re:["]}}},
            ".* which is no regular expression of names",
        ),
    ],
)
def test_values_of_another_kind_in_config(make_directory: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        open_checkpoint(make_directory(config=tiny_config(**changes)))


def test_ignore_rules(make_directory: Make) -> None:
    rules = ["re:.*layers.2.mlp.*", r"re:^model\.layers\.\d+\.self_attn.(q|k)_proj$", "model.layers.5.mlp.up_proj"]
    sparsity = {"sparsity_structure": "2:4", "ignore": rules}
    checkpoint = open_checkpoint(make_directory(config=tiny_config(sparsity_config=sparsity)))
    claimed = [name for name in checkpoint.names if checkpoint.claims_two_of_four(name)]
    assert len(claimed) == 2 * 8 - 2 - 1
    assert not any(".2.mlp" in name or "q_proj" in name for name in claimed)
