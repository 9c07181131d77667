"""Running what ``sparsert bench fit`` predicted, in a process whose allocator may take only so much.

Every trial makes the whole cache, reads all prompts into it, and takes two decode steps: the first one, and
the one that fills the last position. One that runs out of memory is repeated a little smaller.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from sparsert.bench.subject import Subject, build_model
from sparsert.engine.cache import DecodeAttention, KVCache, PackedPrefillAttention
from sparsert.engine.prompt_chunks import cut_prompts
from sparsert.engine.runner import PREFILL_CHUNK_TOKENS
from sparsert.errors import InputError

if TYPE_CHECKING:
    from sparsert.models import DecoderModel

#: What can be asked of a memory.
QUESTIONS = ("largest batch", "longest output")

#: How much smaller a size is after it did not fit, and how often.
_SHRINK = 0.97
_MOST_TRIALS = 40

#: Cache lengths are multiples of it, as in the engine.
LENGTH_UNIT = 16


def run_trial(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all trials of one model.

    Args:
        job: ``subject``, ``device``, ``memory_bytes`` and ``trials``, each with ``question``, ``batch``,
            ``input_len`` and ``output_len``.

    Returns:
        For each trial ``batch``, ``output_len``, ``measured_bytes``, ``reserved_bytes`` and ``fits``.
    """
    device = torch.device(job["device"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["memory_bytes"] / total), device)
    nothing = {"measured_bytes": None, "reserved_bytes": None, "fits": False}
    try:
        model = build_model(Subject.from_json(job["subject"]), device)
    except torch.OutOfMemoryError:
        # the model alone is too large, or the moment in which two of its layers are joined
        return [{"batch": 0, "output_len": 0, **nothing} for _ in job["trials"]]
    results = []
    for trial in job["trials"]:
        batch, output_len = trial["batch"], trial["output_len"]
        result = {"batch": 0, "output_len": 0, **nothing}
        for _ in range(_MOST_TRIALS):
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                generate_at_limits(model, batch, trial["input_len"], output_len)
            except (torch.OutOfMemoryError, InputError):  # InputError: no room for the cache
                if trial["question"] == QUESTIONS[0]:
                    batch = min(batch - 1, int(batch * _SHRINK))
                else:
                    output_len = min(output_len - 1, int(output_len * _SHRINK))
                if batch < 1 or output_len < 1:
                    break
                continue
            result = {
                "batch": batch,
                "output_len": output_len,
                "measured_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
                "reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
                "fits": True,
            }
            break
        results.append(result)
    return results


@torch.inference_mode()
def generate_at_limits(model: DecoderModel, batch: int, input_len: int, output_len: int) -> None:
    """Hold ``batch`` texts of ``input_len + output_len`` tokens at once, and take their first and last step.

    Raises:
        torch.OutOfMemoryError, InputError: there is no room.
    """
    device, config = model.device, model.config
    length = -(-(input_len + output_len) // LENGTH_UNIT) * LENGTH_UNIT
    model.reserve_positions_(length)
    cache = KVCache(model.attention_shapes, batch, length, device, model.dtype)
    prompts = torch.randint(config.vocab_size, (batch, input_len)).tolist()
    chosen = []
    for chunk in cut_prompts(prompts, PREFILL_CHUNK_TOKENS, device):
        logits = model(chunk.tokens, PackedPrefillAttention(cache, chunk), rows=chunk.ends)[0]
        chosen.append(logits.float().argmax(-1))
    following = torch.cat(chosen)
    for position in dict.fromkeys((input_len, input_len + output_len - 1)):
        if output_len == 1:
            break  # the only token came out of the prefill
        lengths = torch.full((batch,), position, device=device)
        logits = model(following.unsqueeze(1), DecodeAttention(cache, lengths, length))
        following = logits.squeeze(1).float().argmax(-1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
