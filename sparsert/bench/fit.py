"""``sparsert bench fit``: the largest batch and the longest output that fit into a given memory.

Less weight leaves more room for texts. How much is predicted from bytes alone:

    weights as stored  +  texts x tokens x bytes of keys and values  +  what a forward holds for a moment

and on a GPU it is confirmed by running it, in a fresh process whose allocator may take no more than that
memory: the cache for all texts, their prefill, and a decode step at the last position. Where the prediction
was too high the size is taken down until it runs, and the row says both. What it gives up: the GPU's own
context of some hundred megabytes is outside of the allocator and not counted, and caches here are exactly as
long as asked, while the engine's runner rounds texts and lengths up to powers of two.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparsert.bench.card import amount
from sparsert.bench.cut_off import keeping
from sparsert.bench.fit_trial import LENGTH_UNIT, QUESTIONS
from sparsert.bench.model_options import add_model_options, check_corners, parse_settings, subject_of
from sparsert.bench.options import parse_counts, progress, remarks, resolve_dtype, settings_of, show
from sparsert.bench.peers import Start, start_process
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting
from sparsert.engine.runner import PREFILL_CHUNK_TOKENS
from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  sparsert bench fit --arch llama-3.1-8b                   what fits into this GPU
  sparsert bench fit --arch llama-3.1-8b --memory 24GB     what would fit into one of 24 GB; runs it if there is room
  sparsert bench fit --arch llama-2-13b --remove-blocks 10 --corners --memory 24GB --lengths 128/512 --batch 1,8
"""

#: Workspaces of cuBLAS and what the allocator cannot give out of its last blocks: a rule of thumb, not measured yet.
_RESERVE_BYTES = 128_000_000

#: What a process takes from a GPU before its first tensor, libraries' kernels included: a rule of thumb as well.
_CONTEXT_BYTES = 600_000_000

#: More texts than this are not looked for.
_MOST_TEXTS = 1 << 20

_MEMORY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]i?b|b)?\s*", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse_memory(text: str) -> int:
    """Bytes that ``--memory`` names.

    Raises:
        InputError: no amount of memory.

    Example:
        >>> parse_memory("24GB"), parse_memory("1.5 GiB"), parse_memory("4096")
        (24000000000, 1610612736, 4096)
    """
    match = _MEMORY.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--memory {text}: give bytes, or an amount such as 24GB or 80GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])


def _free_memory(device: torch.device) -> int:
    """Bytes that a process of its own can give to tensors on this GPU now.

    Raises:
        InputError: there is no GPU.
    """
    import torch

    if device.type != "cuda":
        raise InputError("--memory: there is no GPU here whose memory could be taken; give an amount, e.g. 24GB")
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free - _CONTEXT_BYTES)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    add_model_options(parser)
    parser.add_argument("--corners", action="store_true", help="all four corners, not only dense and the one asked for")
    size = parser.add_argument_group("what has to fit")
    size.add_argument(
        "--memory", metavar="AMOUNT", help="bytes, or e.g. 24GB, 80GiB (default: what is free on the GPU)"
    )
    size.add_argument(
        "--lengths", metavar="P/N,...", default="128/128", help="texts of the largest batch (default: 128/128)"
    )
    size.add_argument("--batch", metavar="LIST", default="1,16", help="texts of the longest output (default: 1,16)")
    size.add_argument("--predict", action="store_true", help="predict only, also on a GPU")
    size.add_argument("--timeout", metavar="SECONDS", type=float, default=600.0, help="for each corner (default: 600)")


def run(arguments: argparse.Namespace, *, start: Start = start_process) -> dict[str, Any]:
    """Predict, confirm where there is a GPU, print the table and return the record.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
        CutOff: a signal ended the run; it has the record so far.
    """
    from sparsert.bench.records import new_record
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)  # with its number, which another process needs
    # also on a CPU: what is asked about is a GPU's memory
    dtype = resolve_dtype(arguments.dtype or "bfloat16", device)
    memory = _free_memory(device) if arguments.memory is None else parse_memory(arguments.memory)
    subject, notes = subject_of(arguments, dtype)
    check_corners(arguments.corners, subject)
    texts = parse_settings(arguments.lengths, [1], subject)
    batches = parse_counts(arguments.batch, "--batch")
    record = new_record(
        "fit",
        settings_of(arguments)
        | {"model": subject.name, "memory_bytes": memory, "device": str(device), "dtype": subject.dtype},
        device=device,
    )
    record["notes"] += notes
    why_not = _why_not_confirmed(arguments, memory, record["machine"]["memory_bytes"])
    if why_not:
        record["notes"].append(f"predicted only, not confirmed by running: {why_not}")
    show(_head(memory))
    with keeping(record):
        for corner in progress(_corners(subject, arguments.corners), "fit"):
            rows = predict_rows(corner, memory, texts, batches)
            if not why_not:
                _confirm(record, corner, rows, memory, str(device), arguments.timeout, start)
            record["results"] += rows
            for row in rows:
                show(_row_line(row))
    for line in remarks(record):
        show(line)
    return record


def _corners(subject: Subject, every: bool) -> list[Subject]:
    kinds = [(False, ()), (subject.sparse, subject.removed)]
    if every:
        kinds = [(False, ()), (True, ()), (False, subject.removed), (True, subject.removed)]
    return [subject.at_corner(sparse=sparse, removed=removed) for sparse, removed in dict.fromkeys(kinds)]


def _why_not_confirmed(arguments: argparse.Namespace, memory: int, available: int | None) -> str | None:
    if available is None:
        return "there is no GPU here"
    if arguments.predict:
        return "--predict"
    return f"this GPU has {amount(available)}" if memory > available else None


def predict_rows(
    subject: Subject, memory_bytes: int, texts: Sequence[Setting], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of a record for one corner, as far as bytes tell.

    Args:
        texts: lengths to find the largest batch for.
        batches: batches to find the longest output for, with the first prompt length of ``texts``.
    """
    needed = _BytesNeeded(subject)
    rows = []
    for text in texts:
        batch = _largest_batch(needed, text, memory_bytes)
        limited_by = "memory" if batch < _MOST_TEXTS else "the search"
        rows.append(_row(needed, QUESTIONS[0], batch, text.input_len, text.output_len, limited_by, memory_bytes))
    input_len = texts[0].input_len
    most = subject.config.max_position_embeddings - input_len
    for batch in batches:
        output_len = _longest_output(needed, batch, input_len, most, memory_bytes)
        limited_by = "memory" if output_len < most else "what the model was made for"
        rows.append(_row(needed, QUESTIONS[1], batch, input_len, output_len, limited_by, memory_bytes))
    return rows


def _largest_batch(needed: _BytesNeeded, text: Setting, memory_bytes: int) -> int:
    return _largest(_MOST_TEXTS, lambda batch: needed.total(batch, text.input_len, text.length) <= memory_bytes)


def _longest_output(needed: _BytesNeeded, batch: int, input_len: int, most: int, memory_bytes: int) -> int:
    return _largest(most, lambda tokens: needed.total(batch, input_len, input_len + tokens) <= memory_bytes)


def _row(
    needed: _BytesNeeded,
    question: str,
    batch: int,
    input_len: int,
    output_len: int,
    limited_by: str,
    memory_bytes: int,
) -> dict[str, Any]:
    subject, card = needed.subject, needed.card
    # where nothing fits, the bytes are those of the least that was asked for
    at_least, length = max(1, batch), input_len + max(1, output_len)
    return {
        "model": subject.name,
        "corner": subject.corner,
        "dtype": subject.dtype,
        "question": question,
        "batch": batch,
        "input_len": input_len,
        "output_len": output_len,
        "length": input_len + output_len,
        "predicted": batch if question == QUESTIONS[0] else output_len,
        "limited_by": limited_by,
        "memory_bytes": memory_bytes,
        "weight_bytes": card.weight_bytes,
        "kv_bytes_per_token": card.kv_bytes_per_token,
        "cache_bytes": needed.cache(at_least, length),
        "activation_bytes": needed.activations(at_least, input_len),
        "predicted_bytes": needed.total(at_least, input_len, length),
        "measured_bytes": None,
        "fits": batch > 0 and output_len > 0,
        "confirmed": False,
    }


class _BytesNeeded:
    """Bytes of a model at work, from its configuration."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.card = subject, subject.card()
        self._config, self._size = subject.config, subject.torch_dtype.itemsize
        # cosines and sines; Gemma 3 has two ropes
        width = sum(2 * rotary_dim for _, rotary_dim in self._config.rope_tables(subject.plan))
        self._rotary_bytes_per_position = width * self._size

    def cache(self, batch: int, length: int) -> int:
        """Keys and values of ``batch`` texts of ``length`` tokens, and the rotary tables of as many positions."""
        rounded = -(-length // LENGTH_UNIT) * LENGTH_UNIT
        return batch * rounded * self.card.kv_bytes_per_token + rounded * self._rotary_bytes_per_position

    def activations(self, batch: int, input_len: int) -> int:
        """What the widest moment of a prefill holds, and the logits of all texts in the model's dtype and in fp32."""
        config, size = self._config, self._size
        tokens = max(batch, min(batch * input_len, PREFILL_CHUNK_TOKENS))
        hidden, heads = config.hidden_size, (config.num_heads + config.num_kv_heads) * config.head_dim
        # residual stream and its norm; gate and up, silu of one, the product
        mlp = (2 * hidden + 4 * config.intermediate_size) * size
        # residual stream, its norm, q k v, three steps of the rotation, the result
        attention = (3 * hidden + 5 * heads) * size
        norm = hidden * (2 * size + 3 * 4)  # in fp32
        widest = tokens * max(mlp, attention, norm)
        unpacked = 0
        if self.subject.sparse and size == 4:  # in fp32 no GPU kernel takes a packed weight (sparsert.ops.linear24)
            joined = max(2 * config.intermediate_size, heads + config.num_kv_heads * config.head_dim)
            unpacked = max(joined * hidden, config.intermediate_size * hidden) * size
        return widest + unpacked + batch * config.vocab_size * (2 * size + 4)

    def total(self, batch: int, input_len: int, length: int) -> int:
        """Everything, with the reserve of workspaces."""
        moment = self.activations(batch, input_len) + _RESERVE_BYTES
        return self.card.weight_bytes + self.cache(batch, length) + moment


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, by bisection; 0 if not even 1 does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _confirm(
    record: dict[str, Any],
    subject: Subject,
    rows: list[dict[str, Any]],
    memory_bytes: int,
    device: str,
    timeout: float,
    start: Start,
) -> None:
    """Run what was predicted and put into the rows what it took."""
    asked = [row for row in rows if row["fits"]]
    job = {
        "task": "fit",
        "subject": subject.to_json(),
        "device": device,
        "memory_bytes": memory_bytes,
        "trials": [{key: row[key] for key in ("question", "batch", "input_len", "output_len")} for row in asked],
    }
    results: list[dict[str, Any]] = []
    for event in start(job, timeout) if asked else ():
        if event["event"] == "result":
            results = event["value"]
        elif event["event"] == "failed":
            record["skipped"].append({"peer": "ours", "reason": f"{subject.corner}: {event['reason']}"})
    for row, result in zip(asked, results, strict=False):
        row |= result | {"length": row["input_len"] + result["output_len"], "confirmed": True}


def _head(memory_bytes: int) -> str:
    return (
        f"{'corner':<22}{'question':<16}{'batch':>8}{'prompt':>8}{'output':>8}{'weights':>10}{'cache':>10}"
        f"{'predicted':>11}{'measured':>10}  of {amount(memory_bytes)}"
    )


def _row_line(row: dict[str, Any]) -> str:
    """One row; below :func:`_head`."""
    measured = "-" if row["measured_bytes"] is None else amount(row["measured_bytes"])
    if not row["fits"]:
        verdict = "does not fit"
    elif not row["confirmed"]:
        verdict = "predicted, not run"
    else:
        ran = row["batch"] if row["question"] == QUESTIONS[0] else row["output_len"]
        verdict = "ran" if ran == row["predicted"] else f"ran; {row['predicted']} predicted"
    limit = "" if row["limited_by"] == "memory" or not row["fits"] else f", limited by {row['limited_by']}"
    return (
        f"{row['corner']:<22}{row['question']:<16}{row['batch']:>8}{row['input_len']:>8}{row['output_len']:>8}"
        f"{amount(row['weight_bytes']):>10}{amount(row['cache_bytes']):>10}{amount(row['predicted_bytes']):>11}"
        f"{measured:>10}  {verdict}{limit}"
    )
