"""The one door to a kernel: operators, their CPU reference, and the choice between implementations."""

from sparsert.ops.choice import BACKENDS, CAPABILITIES, Capability, Choice
from sparsert.ops.linear24 import explain, linear24
from sparsert.ops.pack import pack, unpack

__all__ = ["BACKENDS", "CAPABILITIES", "Capability", "Choice", "explain", "linear24", "pack", "unpack"]
