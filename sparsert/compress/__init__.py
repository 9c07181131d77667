"""Mask makers: functions that choose what a weight keeps. They return masks and never save."""

from sparsert.compress.magnitude import magnitude_mask

__all__ = ["magnitude_mask"]
