"""Which kernels a loaded model runs, and what had to be passed over: for summaries and records."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sparsert import ops
from sparsert.engine.prompt_step import PROMPT_GRAPH_TOKENS, prompt_graph_tokens
from sparsert.models import DecoderModel
from sparsert.ops import AttentionShape


def linear_kernel(model: DecoderModel, backend: str) -> tuple[str, list[str]]:
    """The kernel of the packed layers at batch 1, and sentences if it is not the one meant for them.

    Args:
        backend: which the layers were packed for.

    Returns:
        A kernel of ``ops.explain``, ``torch.sparse``, or ``dense`` if no layer is packed; and why better ones do not
        run.
    """
    if not model.report.count("2:4"):
        return "dense", []
    if backend == "torch":
        return "torch.sparse", []
    sizes = model.config.hidden_size, model.config.intermediate_size
    choice = ops.explain(*sizes, 1, device=model.device, dtype=model.dtype, backend=backend)
    passed_over = [f"2:4 layers run on {choice.kernel}, not {name}: {why}" for name, why in choice.rejected]
    return choice.kernel, passed_over if choice.is_fallback else []


def attention_kernel(
    shapes: Iterable[AttentionShape], device: torch.device, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """What decode attention runs on, and sentences if that, or attention of prompts, is not what is meant for a GPU.

    Args:
        shapes: of the model's attention layers.

    Returns:
        ``fused``, ``torch`` (its operations one by one), or both where layers differ; and on a GPU why, why prompts
        of a batch are attended for one by one, and why short ones are not captured.
    """
    shapes = list(dict.fromkeys(shapes))
    reasons = list(dict.fromkeys(ops.explain_attention(shape, device, dtype) for shape in shapes))
    names = dict.fromkeys("fused" if reason is None else "torch" for reason in reasons)
    passed_over = [f"decode attention runs on torch's operations: {reason}" for reason in reasons if reason is not None]
    of_prompts = dict.fromkeys(ops.explain_packed_attention(shape, device, dtype) for shape in shapes)
    text_by_text = [reason for reason in of_prompts if reason is not None]
    passed_over += [
        f"attention of prompts runs text by text, and short prompts are no CUDA graphs: {reason}"
        for reason in text_by_text
    ]
    captured = prompt_graph_tokens(shapes, device, dtype)
    windows = [shape.sliding_window for shape in shapes if shape.sliding_window is not None]
    if windows and not text_by_text and captured < PROMPT_GRAPH_TOKENS:
        passed_over.append(
            f"prompts of more than {captured} tokens are no CUDA graphs: a text longer than the sliding window of "
            f"{min(windows)} tokens is attended for alone"
        )
    return " and ".join(sorted(names)), passed_over if device.type == "cuda" else []
