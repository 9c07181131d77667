"""Damaged files of every kind: one sentence, never a crash, a hang, or another error than those a user can mend.

Whole files are built once, then damaged by hypothesis: bytes changed, cut, repeated, inserted, numbers and JSON tokens
put where they hurt. What still opens is read to the end and has to be what its header says. A change inside the
numbers of a tensor cannot be told from another model's weights, as no format here has a checksum, but for npz, whose
masks must be the right ones or an error.

The default is a few seconds; ``SPARSERT_FUZZ_CASES=100000 pytest -m slow tests/checkpoint/test_fuzz_readers.py`` runs
that many.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_files import tiny_config, tiny_tensors, write_sharded
from tiny_gguf import write_tiny_gguf

from sparsert.checkpoint import inspect_checkpoint, open_checkpoint, read_maskllm, write_maskllm
from sparsert.checkpoint.gguf_file import convert_gguf
from sparsert.checkpoint.gguf_header import check_gguf_header
from sparsert.checkpoint.stored import BITMASK_24
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, InputError, SparsertError, UnsupportedError
from sparsert.formats import bitmask_from_dense, dense_from_bitmask
from sparsert.models import DecoderConfig
from sparsert.schedule import LayerPlan

pytest.importorskip("hypothesis")  # of the extra "test"; a machine without a network may lack it
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SAMPLES = Path(__file__).parent / "samples"
SECONDS_A_CASE = 20
SMALL, LARGE = 40, int(os.environ.get("SPARSERT_FUZZ_CASES", "0"))

TOKENS = (
    b"-1", b"1e999", b"NaN", b"99999999999999999999", b"4294967296", b"0", b"null", b"true", b'"', b"{", b"}", b"[[[[",
    b'"a":1,', b"..", b"../x", b"\\ud800", b"\xff\xfe", b"2:4", b"weight", b"BF16", b"F8_E4M3", b"shape", b"\0" * 8,
)  # fmt: skip
NUMBERS = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62, 2**63, 2**64 - 1)


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, bool, Any]]:
    """Up to three changes: what, where (share of the file), whether near an end, and with what."""
    changes = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["byte", "bit", "cut", "drop", "repeat", "token", "number"]))
        value: Any = {
            "byte": st.integers(0, 255),
            "bit": st.integers(0, 7),
            "cut": st.just(0),
            "drop": st.integers(1, 64),
            "repeat": st.integers(1, 64),
            "token": st.sampled_from(TOKENS),
            "number": st.sampled_from(NUMBERS),
        }[kind]
        changes.append((kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.booleans()), draw(value)))
    return changes


def damage(content: bytes, changes: list[tuple[str, float, bool, Any]]) -> bytes:
    data = bytearray(content)
    for kind, share, near_an_end, value in changes:
        # headers stand in front, the directories of zip files at the end
        reach = min(len(data), 1500)
        place = int(share * len(data))
        if near_an_end:
            place = int(share * 2 * reach) if share < 0.5 else len(data) - 1 - int((share - 0.5) * 2 * reach)
        place = max(0, min(place, len(data) - 1))
        if not data:
            break
        if kind == "byte":
            data[place] = value
        elif kind == "bit":
            data[place] ^= 1 << value
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + value]
        elif kind == "repeat":
            data[place:place] = data[place : place + value]
        elif kind == "token":
            data[place : place + len(value)] = value
        else:
            data[place : place + 8] = struct.pack("<Q", value)
    return bytes(data)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still busy after {SECONDS_A_CASE} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.alarm(0)


def read_directory(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    with TensorStream(checkpoint, torch.device("cpu")) as stream:
        for name in checkpoint.names:
            tensor = checkpoint.read(name)
            assert tuple(tensor.shape) == checkpoint.shape(name) and tensor.dtype == checkpoint.dtype(name)
            checkpoint.claims_two_of_four(name)
            checkpoint.nbytes(name)
            assert same_bits(stream.read(name, tensor.dtype), tensor)
            if checkpoint.storage(name) == BITMASK_24:
                parts = stream.read_packed(name, tensor.dtype)
                assert same_bits(dense_from_bitmask(*parts, tensor.shape), tensor)
    report = inspect_checkpoint(checkpoint, architecture_check=DecoderConfig.from_hf)
    json.dumps(report.to_dict())
    report.to_text()


def all_bytes(tensor: torch.Tensor) -> bytes:
    content: bytes = tensor.contiguous().reshape(-1).clone().view(torch.uint8).numpy().tobytes()
    return content


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return all_bytes(one) == all_bytes(other)


def read_masks(file: Path) -> None:
    masks = read_maskllm(file)
    masks.check(dict.fromkeys(MASKS, (24, 40)))
    for name, expected in MASKS.items():
        mask = masks.mask(name, (24, 40))
        assert file.suffix == ".pt" or torch.equal(mask, expected), "a wrong mask passed the checksum"


def read_order(file: Path) -> None:
    LayerPlan.remove(32, order=(file, 3))


def read_gguf(file: Path) -> None:
    # the whole conversion takes a second; what it trusts is this
    check_gguf_header(file)


MASKS = {f"model.layers.{block}.mlp.up_proj.weight": torch.rand(24, 40) < 0.5 for block in range(3)}


class Corpus:
    """Whole files by kind: a directory's files, which of them is damaged, and what reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, tuple[dict[str, bytes], str, Callable[[Path], None]]] = {}
        config = json.dumps(tiny_config()).encode()
        dense = {name: tensor for name, tensor in tiny_tensors().items() if ".layers." not in name or ".1." in name}
        packed = dict(dense)
        for name in [name for name in dense if name.endswith("_proj.weight")]:
            weight = packed.pop(name)
            parts = bitmask_from_dense(weight * magnitude_mask(weight))
            packed |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
        files = {"config.json": config, "model.safetensors": save(dense)}
        self._add("safetensors", files, "model.safetensors")
        self._add("config", files, "config.json")
        ours = json.loads(config) | {
            "quantization_config": {
                "quant_method": "sparsert",
                "version": 1,
                "format": "sparse-24-bitmask",
                "ignore": [],
            },
            "per_layer_config": {"2": {"skip": ["mlp"]}},
            "sparsert": {"version": "0", "base_num_blocks": 8, "kept_blocks": list(range(8)), "dense_linears": []},
        }
        self._add("ours", {**files, "model.safetensors": save(packed)}, "model.safetensors")
        self._add(
            "our config", {"config.json": json.dumps(ours).encode(), "model.safetensors": save(packed)}, "config.json"
        )
        for name in ("sparse-bitmask", "marlin24-int8-channel", "sparse-24-bitmask-fp8"):
            tensors = load_file(SAMPLES / f"{name}.safetensors")
            self._add(name, {**files, "model.safetensors": save(tensors)}, "model.safetensors")
        shards = folder / "shards"
        shards.mkdir()
        write_sharded(shards, dense, 2)
        sharded = {"config.json": config, **{file.name: file.read_bytes() for file in shards.iterdir()}}
        self._add("index", sharded, "model.safetensors.index.json")
        for layout, zipped in (("pickle", True), ("old pickle", False)):
            torch.save(dense, folder / "bin", _use_new_zipfile_serialization=zipped)
            content = {"config.json": config, "pytorch_model.bin": (folder / "bin").read_bytes()}
            self._add(layout, content, "pytorch_model.bin")
        write_maskllm(folder / "m.npz", MASKS.items())
        self.kinds["masks"] = ({"m.npz": (folder / "m.npz").read_bytes()}, "m.npz", read_masks)
        torch.save({f"{name}.mask": mask for name, mask in MASKS.items()}, folder / "m.pt")
        self.kinds["raw masks"] = ({"m.pt": (folder / "m.pt").read_bytes()}, "m.pt", read_masks)
        self.kinds["order"] = ({"order.csv": b"8,9,10,11,27,14,23,24,26,25\n"}, "order.csv", read_order)
        write_tiny_gguf(folder / "m.gguf")
        self.kinds["gguf"] = ({"m.gguf": (folder / "m.gguf").read_bytes()}, "m.gguf", read_gguf)

    def _add(self, kind: str, files: dict[str, bytes], damaged: str) -> None:
        self.kinds[kind] = (files, damaged, read_directory)

    def run(self, kind: str, changes: list[tuple[str, float, bool, Any]] | None) -> None:
        files, damaged, read = self.kinds[kind]
        directory = self.folder / "case"
        directory.mkdir(exist_ok=True)
        for stale in directory.iterdir():
            stale.unlink()
        for name, content in files.items():
            changed = changes is not None and name == damaged
            (directory / name).write_bytes(damage(content, changes or []) if changed else content)
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(directory if read is read_directory else directory / damaged)


KINDS = (
    "safetensors", "config", "ours", "our config", "sparse-bitmask", "marlin24-int8-channel", "sparse-24-bitmask-fp8",
    "index", "pickle", "old pickle", "masks", "raw masks", "order", "gguf",
)  # fmt: skip

#: What each kind may raise: a checkpoint's content is always a CheckpointError.
ALLOWED: dict[str, tuple[type[SparsertError], ...]] = {
    kind: (CheckpointError, UnsupportedError, InputError) if "config" in kind else (CheckpointError,) for kind in KINDS
} | {"order": (InputError,)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(corpus: Corpus, kind: str) -> None:
    assert set(corpus.kinds) == set(KINDS)
    corpus.run(kind, None)


def _try_damaged(corpus: Corpus, kind: str, changes: list[tuple[str, float, bool, Any]]) -> None:
    try:
        corpus.run(kind, changes)
    except ALLOWED[kind] as error:
        assert str(error) and "Traceback" not in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(corpus: Corpus, kind: str) -> None:
    @settings(
        max_examples=SMALL, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changes=damages())
    def run(changes: list[tuple[str, float, bool, Any]]) -> None:
        _try_damaged(corpus, kind, changes)

    run()


@pytest.mark.slow
@pytest.mark.skipif(LARGE == 0, reason="set SPARSERT_FUZZ_CASES to how many damaged files to try")
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(corpus: Corpus, kind: str) -> None:
    @settings(
        max_examples=-(-LARGE // len(KINDS)), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changes=damages())
    def run(changes: list[tuple[str, float, bool, Any]]) -> None:
        _try_damaged(corpus, kind, changes)

    run()


@pytest.mark.parametrize(
    "changes",
    [
        [("cut", 0.5, False, 0)],
        [("number", 0.0, False, 7)],
        [("token", 0.3, False, b"\xff\xfe")],
        [("token", 0.02, False, b"999999")],
    ],
)
def test_conversion_of_a_damaged_gguf_file(tmp_path: Path, changes: list[tuple[str, float, bool, Any]]) -> None:
    file = tmp_path / "m.gguf"
    write_tiny_gguf(file)
    file.write_bytes(damage(file.read_bytes(), changes))
    try:
        convert_gguf(file, tmp_path / "out")
    except (CheckpointError, UnsupportedError) as error:
        assert "m.gguf" in str(error) or "GGUF tensor" in str(error)
