"""sparsert runs pruned language models: 2:4 weights packed once, removed blocks skipped, small batch.

Three doors: ``sparsert.LLM`` loads a checkpoint and generates, ``sparsert.sparsify_`` drops 2:4 linears
into a model of your own, ``sparsert.ops`` is the kernel itself. Importing this package loads neither
triton, transformers nor CUDA; names are fetched on first use. transformers reads our checkpoints from
then on, whichever of the two is imported first (:mod:`sparsert.integrations.registration`).
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from sparsert.integrations.registration import register_with_transformers

__version__ = "0.1.0"

# In a source tree the GPU kernels lie beside this package, in kernels/; a wheel installs them as
# sparsert/kernels. Adding the tree's root to this package's path makes both the same import. The
# guard keeps an installed package from picking up a foreign folder called kernels.
_source_root = pathlib.Path(__file__).resolve().parent.parent
if (_source_root / "kernels" / "cuda" / "layout.cuh").is_file() and (_source_root / "csrc").is_dir():
    __path__.append(str(_source_root))

register_with_transformers()

_LAZY = {
    "LLM": "sparsert.engine",
    "SamplingParams": "sparsert.engine",
    "LayerPlan": "sparsert.schedule",
    "SparseLinear": "sparsert.nn",
    "sparsify_": "sparsert.nn",
    "SparsertError": "sparsert.errors",
    "SparsityError": "sparsert.errors",
    "CheckpointError": "sparsert.errors",
    "UnsupportedError": "sparsert.errors",
    "InputError": "sparsert.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparsert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
