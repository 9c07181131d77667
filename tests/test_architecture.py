"""The house: who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import sparsert

PACKAGE = Path(sparsert.__file__).resolve().parent

#: A room may import itself and the rooms named here; docs/design.md has the picture.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "formats": {"errors"},
    "ops": {"errors", "formats", "kernels"},
    "nn": {"errors", "formats", "ops"},
    "checkpoint": {"errors", "formats", "schedule"},
    "schedule": {"errors"},
    "compress": {"errors", "formats", "ops", "schedule"},
    "jobs": {"errors", "formats", "schedule", "checkpoint", "compress", "models"},
    "models": {"errors", "formats", "ops", "nn", "checkpoint", "schedule"},
    "engine": {"errors", "ops", "checkpoint", "schedule", "models"},
    "bench": {"errors", "formats", "ops", "nn", "checkpoint", "compress", "schedule", "models", "engine"},
    "evaluate": {"errors", "models", "engine"},
    "integrations": {
        "errors",
        "formats",
        "ops",
        "nn",
        "checkpoint",
        "compress",
        "schedule",
        "models",
        "engine",
        "evaluate",
    },
    "environment": {"ops"},
    "cli_options": {"errors"},
    "cli_bench": {"bench", "cli_options"},
    "cli_convert": {"errors", "checkpoint", "compress"},
    "cli_jobs": {"jobs"},
    "cli": {
        "errors",
        "checkpoint",
        "compress",
        "schedule",
        "models",
        "engine",
        "evaluate",
        "integrations",
        "environment",
        "cli_options",
        "cli_bench",
        "cli_convert",
        "cli_jobs",
    },
    "__main__": {"cli"},
    "__init__": {"integrations"},
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "sparsert":
                names = [f"sparsert.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("sparsert.")}
    return rooms


def _modules() -> list[Path]:
    found = [path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts]
    assert len(found) > 40
    return found


def test_imports_point_one_way() -> None:
    for path in _modules():
        room = _room(path)
        assert room in ALLOWED, f"{path}: a new room needs its place in the house"
        reached = _imported_rooms(path) - {room, "_C", "__version__"}
        assert reached <= ALLOWED[room], f"{path} imports {sorted(reached - ALLOWED[room])}"


def test_only_ops_reaches_a_kernel() -> None:
    for path in _modules():
        if _room(path) != "ops":
            assert not {"kernels", "_C"} & _imported_rooms(path), path


def test_kernels_import_nothing_of_the_package() -> None:
    import sparsert.kernels.linear24 as kernel

    folder = Path(kernel.__file__).resolve().parent
    assert not (folder / "__init__.py").exists(), "Hugging Face's package is called kernels too"
    for path in folder.glob("*.py"):
        assert _imported_rooms(path) <= {"kernels"}, path


def test_files_stay_readable() -> None:
    for path in _modules():
        assert len(path.read_text().splitlines()) <= 500, f"{path}: split it"


def _printed(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_is_light() -> None:
    """``import sparsert`` and the command line's help load neither torch's compilers, triton nor transformers."""
    code = (
        "import sys, sparsert, sparsert.cli; from sparsert.errors import SparsityError; "
        "print([m for m in ('torch', 'triton', 'transformers', 'vllm', 'numpy') if m in sys.modules])"
    )
    assert _printed(code) == "[]"


def test_operators_load_no_triton_or_transformers() -> None:
    code = (
        "import sys, torch, sparsert.ops, sparsert.nn; "
        "print([m for m in ('triton', 'transformers') if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert _printed(code) == "[] False"


def test_docstring_examples_run() -> None:
    import doctest
    import importlib

    examples = 0
    for path in _modules():
        relative = path.relative_to(PACKAGE).with_suffix("")
        if ">>>" not in path.read_text():
            continue
        name = ".".join(("sparsert", *relative.parts)).removesuffix(".__init__")
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        examples += result.attempted
    assert examples > 10
