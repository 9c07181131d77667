"""Modules that hold packed weights, and the function that puts them into a model."""

from sparsert.nn.linear import BACKENDS, SparseLinear
from sparsert.nn.sparsify import SparsifyReport, sparsify_

__all__ = ["BACKENDS", "SparseLinear", "SparsifyReport", "sparsify_"]
