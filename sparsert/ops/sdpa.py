"""PyTorch's own attention, but for the one of its kernels that does not suit an engine.

``scaled_dot_product_attention`` chooses a kernel by itself, and on Hopper in 16 bits its first choice is cuDNN. cuDNN
makes a plan for every new combination of batch and lengths and keeps it: on an H100 1.1 MB of the host's memory for
each, never freed, and tens of milliseconds before the first result. Prompts come in every length, so a process would
grow and stumble for as long as it runs. Whatever this package asks of torch's attention therefore goes through here,
where flash, memory-efficient and plain attention are left to choose from: their kernels are compiled once for all
lengths.

What it gives up: a shape that comes again and again might be a little faster in cuDNN. And which kernels may run is a
setting of the process, not an argument, so it is set around the call and put back: another thread that
attends at that very moment is kept from cuDNN too.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``softmax(q k^T * scale + mask) v``.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k, v: ``[batch, kv_heads, keys, head_dim]``; heads is a multiple of kv_heads.
        scale: of the scores.
        mask: added to the scores, dtype of q, broadcasts to ``[batch, heads, queries, keys]``.
        causal: query i sees the keys 0 to i; instead of a mask.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    # cuDNN takes 16 bits only, and setting and putting back costs the host some microseconds
    may_be_cudnn = q.is_cuda and q.dtype.itemsize == 2
    with sdpa_kernel(_KERNELS) if may_be_cudnn else contextlib.nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
