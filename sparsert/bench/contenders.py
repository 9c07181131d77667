"""Who runs one linear layer: ours, and what a user would run instead, all behind one small interface.

A contender takes a layer (a random 2:4 weight) and makes its copies of it once, then binds to an input. What
it binds to is a function of one weight copy; how it is checked and timed is the same for all
(``layers.py``). A contender that cannot run here, or not this shape or batch, says why with an
``UnsupportedError``, and the run goes on without it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsert import ops
from sparsert.bench import cusparselt, cutlass
from sparsert.bench.search import fastest_correct
from sparsert.bench.timing import copies_for
from sparsert.errors import UnsupportedError
from sparsert.formats import Packed24
from sparsert.formats.semi_structured import why_unsupported
from sparsert.models.random import prune_at_random_

#: In the order in which they are listed; ``dense`` is what the others are compared with.
CONTENDERS = ("dense", "ours", "ours-triton", "torch-sparse", "cusparselt", "cutlass")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer to run.

    Attributes:
        weight: ``[out_features, in_features]``, two of every four inputs kept.
        packed: the same weight, packed.
    """

    weight: Tensor
    packed: Packed24

    @classmethod
    def random(cls, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Layer:
        """A layer with a random 2:4 weight."""
        weight = random_24(out_features, in_features, dtype, device)
        return cls(weight, ops.pack(weight))


@dataclasses.dataclass(frozen=True)
class Bound:
    """A contender bound to an input.

    Attributes:
        kernel: what runs, in words.
        weights: equal copies of the weight as the contender stores it, to rotate over.
        call: weight copy -> ``y [batch, out_features]``; capturable on a GPU.
        details: further keys for the row of the record.
    """

    kernel: str
    weights: Sequence[Any]
    call: Callable[[Any], Tensor]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Dense:
    """cuBLAS on the same weight stored densely."""

    def __init__(self, layer: Layer) -> None:
        self.weight_bytes = layer.weight.nbytes
        self._weights = [layer.weight.clone() for _ in range(copies_for(self.weight_bytes, layer.weight.device))]

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        kernel = "cuBLAS" if x.is_cuda else "dense"
        return Bound(kernel, self._weights, lambda weight: torch.nn.functional.linear(x, weight))


class Ours:
    """:func:`sparsert.ops.linear24`, with the kernel that ``auto`` chooses."""

    backend = "auto"

    def __init__(self, layer: Layer) -> None:
        packed = layer.packed
        self.weight_bytes = packed.nbytes
        self._weights = [
            dataclasses.replace(packed, values=packed.values.clone(), metadata=packed.metadata.clone())
            for _ in range(copies_for(self.weight_bytes, packed.device))
        ]

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        packed = self._weights[0]
        choice = ops.explain(
            packed.out_features, packed.in_features, x.shape[0], device=x.device, dtype=x.dtype, backend=self.backend
        )
        self._check(choice)
        kernel = str(choice).splitlines()[0]
        return Bound(kernel, self._weights, lambda weight: ops.linear24(x, weight, backend=self.backend))

    def _check(self, choice: ops.Choice) -> None:
        pass


class OursTriton(Ours):
    """The Triton kernel, where it is one that runs."""

    backend = "triton"

    def _check(self, choice: ops.Choice) -> None:
        if choice.kernel != "triton":
            raise UnsupportedError(next((why for kernel, why in choice.rejected if kernel == "triton"), str(choice)))


class TorchSparse:
    """``torch.sparse.to_sparse_semi_structured`` as it is, the way its documentation uses it."""

    def __init__(self, layer: Layer) -> None:
        _check_cusparselt(layer)
        self._weights = [
            _to_semi_structured(layer.weight) for _ in range(copies_for(layer.packed.nbytes, layer.weight.device))
        ]
        self.weight_bytes = self._weights[0].packed.nbytes

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        return Bound(
            "torch.sparse, cuSPARSELt's default algorithm",
            self._weights,
            lambda weight: torch.nn.functional.linear(x, weight),
        )


class CuSparseLt:
    """cuSPARSELt with the fastest algorithm that gives right results, searched for each shape and batch."""

    def __init__(self, layer: Layer) -> None:
        _check_cusparselt(layer)
        compressed = _to_semi_structured(layer.weight).packed
        self.weight_bytes = compressed.nbytes
        self._weights = [compressed.clone() for _ in range(copies_for(self.weight_bytes, compressed.device))]

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        batch = x.shape[0]
        rows = -(-batch // cusparselt.ROW_MULTIPLE) * cusparselt.ROW_MULTIPLE
        x_t = torch.nn.functional.pad(x, (0, 0, 0, rows - batch)).t()
        found = cusparselt.search(self._weights, x_t, lambda y: is_correct(y.t()[:batch]), batch)
        return Bound(
            str(found.best),
            self._weights,
            lambda weight: found.best.run(weight, x_t).t()[:batch],
            {"search": found.counts()},
        )


class Cutlass:
    """CUTLASS's sparse GEMM of Hopper with the fastest kernel that gives right results, of those that are compiled."""

    def __init__(self, layer: Layer) -> None:
        reason = cutlass.why_not(layer.weight.device, layer.weight.dtype)
        if reason is not None:
            raise UnsupportedError(reason)
        self._library = cutlass.load()
        compressed = self._library.compress(layer.weight)
        self.weight_bytes = compressed.nbytes
        self._weights = [compressed.clone() for _ in range(copies_for(self.weight_bytes, layer.weight.device))]

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        found = fastest_correct("CUTLASS", self._library.candidates(), self._weights, x, is_correct)
        best = found.best
        return Bound(str(best), self._weights, lambda weight: best.run(weight, x), {"search": found.counts()})


#: How each contender is made from a layer.
MAKERS: dict[str, Callable[[Layer], Any]] = {
    "dense": Dense,
    "ours": Ours,
    "ours-triton": OursTriton,
    "torch-sparse": TorchSparse,
    "cusparselt": CuSparseLt,
    "cutlass": Cutlass,
}


def random_24(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A random normal weight ``[out_features, in_features]`` that keeps two of every four inputs.

    Example:
        >>> int((random_24(8, 16, torch.float32, "cpu") != 0).view(-1, 4).sum(-1).max())
        2
    """
    return prune_at_random_(torch.randn(out_features, in_features, device=device).to(dtype))


def _check_cusparselt(layer: Layer) -> None:
    reason = why_unsupported(layer.packed, "cusparselt")
    if reason is not None:
        raise UnsupportedError(reason)


def _to_semi_structured(weight: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its interface may change
        return torch.sparse.to_sparse_semi_structured(weight)
