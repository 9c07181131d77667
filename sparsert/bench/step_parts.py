"""The parts of a decode step, and which part a kernel or an operator belongs to.

    linears                     q k v, o, gate up, down of every block
    attention                   attention over the cache, rope, its mask, and writing keys and values
    norms, rope, activation     everything else between the embedding and the head
    head                        the projection onto the vocabulary
    sampling                    what comes behind the head: a soft cap, and from logits to tokens
    gaps                        nothing runs

A CUDA graph says of a kernel its name and its time and nothing of the layer that asked for it, so names it has
to be. They tell the kinds apart, and order tells the head from other products. What that gives up: where a
kernel does two things, its whole time goes to the one in its name. The additions, norms and activations that
``linear24`` takes along count as linears, rope as attention where ``decode_attention`` does it; and if attention
runs as plain matrix products (float32 on a GPU), those count as linears.
"""

from __future__ import annotations

from collections.abc import Sequence

LINEARS, ATTENTION, OTHER = "linears", "attention", "norms, rope, activation"
HEAD, SAMPLING, GAPS = "head", "sampling", "gaps"

#: In the order in which they are shown.
PARTS = (LINEARS, ATTENTION, OTHER, HEAD, SAMPLING, GAPS)

#: Parts of kernels by what their names contain, in lower case. The first that fits counts: attention kernels of
#: libraries are also called "cutlass" or "splitkv". What fits nowhere is OTHER: gathers, elementwise kernels, copies.
KERNEL_PARTS = (
    ("linear24", LINEARS),
    ("_add_parts_kernel", LINEARS),  # the sums of a split of our Triton linear
    ("decode_attention", ATTENTION),
    ("flash", ATTENTION),
    ("fmha", ATTENTION),
    ("sdpa", ATTENTION),
    ("softmax", ATTENTION),
    ("residual_norm", OTHER),
    ("activate_kernel", OTHER),
)

#: Names of dense products in lower case, cuBLAS' and ours: linears of dense blocks, and the head.
DENSE_PRODUCTS = ("dense_linear", "nvjet", "gemm", "gemv", "cublas", "splitk", "cutlass", "s16816")

#: Operators of linear layers on a CPU, dense and packed. They may contain each other.
LINEAR_OPERATORS = ("aten::linear", "sparsert::linear24")


def parts_of_kernels(names: Sequence[str]) -> list[str]:
    """The part of each kernel of one step.

    The head is the last dense product, with those right before it (a split product is two kernels): before them
    stands the final norm, which is none.

    Args:
        names: of all kernels of one step, copies and fills, in time order.
    """
    kinds = [_kind_of(name.lower()) for name in names]
    behind = 1 + max((place for place, kind in enumerate(kinds) if kind is None), default=-1)
    if behind == 0:
        return [kind or OTHER for kind in kinds]
    head = behind
    while head > 0 and kinds[head - 1] is None:
        head -= 1
    parts = [kind or LINEARS for kind in kinds[:head]]
    return parts + [HEAD] * (behind - head) + [SAMPLING] * (len(kinds) - behind)


def _kind_of(name: str) -> str | None:
    """The part by the name alone; None for a dense product."""
    for substring, part in KERNEL_PARTS:
        if substring in name:
            return part
    return None if any(substring in name for substring in DENSE_PRODUCTS) else OTHER
