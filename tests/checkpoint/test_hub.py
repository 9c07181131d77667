"""Hub ids: what is fetched, what the cache serves, and one sentence for each way it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from tiny_files import BLOCKS, tiny_tensors

from sparsert.checkpoint import hub, open_checkpoint
from sparsert.checkpoint.hub import files_to_fetch, resolve_checkpoint
from sparsert.cli import main
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError


class Server:
    """Stands in for the hub; ``failure`` is raised on first contact, ``cached`` is what the cache holds."""

    def __init__(self, files: list[str], failure: Exception | None = None, cached: Path | None = None) -> None:
        self.files, self.failure, self.cached = files, failure, cached
        self.timeout: float | None = None
        self.fetched: list[str] = []

    def model_info(self, repository: str, *, timeout: float) -> Any:
        self.timeout = timeout
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, repository: str, **options: Any) -> str:
        if options.get("local_files_only"):
            if self.cached is None:
                raise hub_errors.LocalEntryNotFoundError("not cached")
            return str(self.cached)
        self.fetched = options["allow_patterns"]
        return "/fetched"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(*arguments: Any, **options: Any) -> Server:
        server = Server(*arguments, **options)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: server)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", server.snapshot_download)
        return server

    return start


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error.\nmore lines")
    return error


def test_directories_are_returned_as_they_are(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/place", "./model", "a/b/c", "", "name", "https://x/y"])
def test_what_is_neither_directory_nor_id(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "":
        assert resolve_checkpoint(model) == Path()  # the working directory
        return
    with pytest.raises(CheckpointError, match="no such directory, and no hub id either"):
        resolve_checkpoint(model)


def test_only_needed_files_are_fetched(serve: Any) -> None:
    files = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tokenizer.json"]
    server = serve([*files, "runs/events.1", "model.onnx", "onnx/config.json", "flax_model.msgpack"])
    assert resolve_checkpoint("owner/name") == Path("/fetched")
    assert server.timeout == hub.FIRST_CONTACT_SECONDS
    assert sorted(server.fetched) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_bin_only_where_there_is_nothing_else(serve: Any) -> None:
    assert files_to_fetch("o/n", ["pytorch_model-00001-of-00002.bin", "config.json", "training_args.bin"]) == [
        "pytorch_model-00001-of-00002.bin",
        "config.json",
    ]
    serve(["config.json", "model.gguf", "adapter_model.safetensors"])
    with pytest.raises(CheckpointError, match=r"o/n: the hub repository has neither model\*\.safetensors nor"):
        resolve_checkpoint("o/n")


def test_offline_takes_the_cache(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    serve([], failure=ConnectionError("no route"), cached=tmp_path)
    assert resolve_checkpoint("owner/name") == tmp_path


def test_offline_and_not_cached(serve: Any, tmp_path: Path) -> None:
    for cached in (None, tmp_path):  # a snapshot without weights is none
        serve([], failure=TimeoutError("timed out\nmore"), cached=cached)
        with pytest.raises(CheckpointError, match=r"owner/name: .*cannot be reached \(timed out\); connect") as caught:
            resolve_checkpoint("owner/name")
        assert "\n" not in str(caught.value)


def test_offline_mode_is_honoured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, repository: str, *, timeout: float) -> None:
        raise hub_errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(CheckpointError, match="offline mode is enabled"):
        resolve_checkpoint("no-such-owner/no-such-name")


def test_unknown_and_gated(serve: Any) -> None:
    serve([], failure=http_error(hub_errors.RepositoryNotFoundError))
    with pytest.raises(CheckpointError, match="no such public model on the hub; check the spelling"):
        resolve_checkpoint("owner/name")
    serve([], failure=http_error(hub_errors.GatedRepoError))
    with pytest.raises(CheckpointError, match="accounts that accepted its licence"):
        resolve_checkpoint("owner/name")


def test_the_bar_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    list(hub._terminal_bar()(range(3)))
    assert capsys.readouterr().err == ""


def test_commands_take_hub_ids(
    serve: Any, make_directory: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_tensors()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name] * magnitude_mask(tensors[name])
    serve([], failure=ConnectionError("no route"), cached=make_directory(tensors))
    assert main(["inspect", "owner/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["sparse_linears"] == 4 * BLOCKS
    assert main(["convert", "owner/name", str(tmp_path / "packed")]) == 0
    provenance = open_checkpoint(tmp_path / "packed").config["quantization_config"]["provenance"]
    assert provenance.get("base_model", "owner/name") == "owner/name"
