"""Algorithms on plain transformers models: masks, training. They return and never write files."""

from sparsert.compress.magnitude import magnitude_mask

__all__ = ["magnitude_mask"]
