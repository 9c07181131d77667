"""What this installation can use: versions, GPUs, the compiled extension, and why something is missing.

``sparsert env`` prints it, bug reports carry it, and benchmark records hold it. Versions of packages
come from their metadata, so asking does not import them; only torch is loaded, because only torch
knows the GPUs. Every part that is absent has a reason in words.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

from sparsert import __version__

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "huggingface_hub", "tokenizers", "numpy", "gguf")

#: nvidia-smi answers in under a second; a driver that hangs must not hang us.
_DRIVER_TIMEOUT_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        index: number for ``--device cuda:N``.
        name: marketing name.
        compute_capability: e.g. ``9.0``.
        memory_bytes: total memory.
        missing: why the compiled CUDA kernels do not run on it; None if they do.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    missing: str | None


@dataclasses.dataclass(frozen=True)
class Environment:
    """Versions, devices, and what was built.

    Attributes:
        sparsert, python, platform: versions.
        packages: version of each package, None where it is not installed.
        cuda_runtime: version of CUDA that torch was built with, None for a CPU build.
        driver: version of the NVIDIA driver, None without one.
        gpus: the CUDA devices torch finds.
        native: what :func:`sparsert.ops.native.status` says of the extension ``sparsert._C``.
        missing: a sentence for each thing that is not there.
    """

    sparsert: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cuda_runtime: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    native: dict[str, Any]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """A line an entry, for people."""
        lines = [f"sparsert         {self.sparsert}", f"python           {self.python} on {self.platform}"]
        lines += [f"{name:<17}{version or 'not installed'}" for name, version in self.packages.items()]
        lines += [f"CUDA runtime     {self.cuda_runtime or 'none'}", f"NVIDIA driver    {self.driver or 'none'}"]
        for gpu in self.gpus:
            kernels = "CUDA kernels built for it" if gpu.missing is None else "no CUDA kernels for it"
            lines.append(
                f"GPU {gpu.index:<13}{gpu.name}, compute capability {gpu.compute_capability}, "
                f"{gpu.memory_bytes / 2**30:.0f} GiB, {kernels}"
            )
        if not self.gpus:
            lines.append("GPU              none")
        architectures = ", ".join(f"sm_{architecture}" for architecture in self.native["architectures"])
        if not self.native["available"]:
            built = "not built"
        elif not self.native["cuda"]:
            built = "built for the CPU only"
        else:
            built = f"built with CUDA kernels for {architectures}"
        lines.append(f"extension        {built}")
        if self.missing:
            lines += ["", "missing:"] + [f"- {sentence}" for sentence in self.missing]
        return "\n".join(lines)


def describe_environment() -> Environment:
    """Look at this machine and this installation.

    Example:
        >>> describe_environment().sparsert == __version__
        True
    """
    import torch

    from sparsert.ops import native

    # torch's own version also names its build, e.g. +cu130 or +cpu
    packages = {name: _version(name) for name in _PACKAGES} | {"torch": str(torch.__version__)}
    status = native.status()
    driver, driver_reason = _driver_version()
    cuda_available = torch.cuda.is_available()
    gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count())) if cuda_available else ()

    missing = []
    if not cuda_available:
        missing.append(_no_gpu_reason(torch.version.cuda, driver, driver_reason))
    if packages["triton"] is None:
        missing.append("triton is not installed, so its portable GPU kernels cannot run; run `pip install triton`")
    if status["reason"]:
        missing.append(str(status["reason"]))
    for gpu in gpus:
        if gpu.missing is not None and gpu.missing not in missing:
            missing.append(gpu.missing)
    return Environment(
        sparsert=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        cuda_runtime=torch.version.cuda,
        driver=driver,
        gpus=gpus,
        native=status,
        missing=tuple(missing),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    import torch

    from sparsert.ops import native

    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        index=index,
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        missing=native.cuda_reason(torch.device("cuda", index)),
    )


def _driver_version() -> tuple[str | None, str]:
    """Version of the NVIDIA driver, and why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, "no NVIDIA driver is installed (nvidia-smi is not found)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_SECONDS, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"nvidia-smi does not answer ({error})"
    return (answer[0], "") if answer else (None, "nvidia-smi lists no GPU")


def _no_gpu_reason(cuda_runtime: str | None, driver: str | None, driver_reason: str) -> str:
    if cuda_runtime is None:
        return "no GPU can be used: this torch is built for the CPU only; install a CUDA build of torch"
    if driver is None:
        return f"no GPU can be used: {driver_reason}"
    return (
        f"no GPU can be used: torch finds none, though driver {driver} answers; it may be too old for CUDA "
        f"{cuda_runtime}, or CUDA_VISIBLE_DEVICES may hide the GPUs"
    )
