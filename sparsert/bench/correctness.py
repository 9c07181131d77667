"""The check that stands beside every speed-up: does the engine compute what the weights say?

A few random texts go through the engine as they are measured, prompt first and then token by token, with
the packed kernels and CUDA graphs of that batch. The logits are held against a forward that is written out
in plain torch operations over unpacked weights (:mod:`sparsert.bench.plain_forward`), once in fp64 and once in
the model's own dtype:

    error        rms(engine - fp64) / rms(fp64)
    torch_error  rms(plain torch in the same dtype - fp64) / rms(fp64)
    correct      error <= 2 x torch_error

The plain forward takes one block at a time to fp64, so that a model needs one block's memory beside itself.
What it gives up: some two dozen tokens say nothing about contexts of thousands.

Source: the rule of twice the error is that of flash-attention's tests.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsert.bench.plain_forward import plain_logits
from sparsert.engine.runner import Runner

if TYPE_CHECKING:
    from sparsert.models import DecoderModel

_PROMPT_TOKENS = 16
_DECODE_STEPS = 8

#: How much larger than torch's own error ours may be.
ERROR_FACTOR = 2.0

HOW_CHECKED = (
    f"logits of {_PROMPT_TOKENS} prompt tokens and {_DECODE_STEPS} decode steps against the same weights unpacked in "
    f"fp64; rms error at most {ERROR_FACTOR:g} x that of plain torch in the same dtype"
)


@dataclasses.dataclass(frozen=True)
class LogitsCheck:
    """How far the engine's logits are from those in fp64.

    Attributes:
        error, torch_error: rms error of the engine, and of plain torch in the same dtype, relative to the
            logits' rms.
    """

    error: float
    torch_error: float

    @property
    def correct(self) -> bool:
        """Whether the engine is as exact as the rule asks for; never for an error that is not finite."""
        return self.error <= ERROR_FACTOR * self.torch_error

    def to_dict(self) -> dict[str, Any]:
        """As a row of a record holds it."""
        return {"correct": self.correct, "error": self.error, "torch_error": self.torch_error, "check": HOW_CHECKED}


class LogitsReference:
    """Logits of some random texts in fp64 and in the model's dtype, made once for all batch sizes."""

    def __init__(self, model: DecoderModel, rows: int, seed: int = 0) -> None:
        """Run the plain forwards.

        Args:
            model: whose weights are used; packed ones are unpacked a layer at a time.
            rows: texts, at least the largest batch to be checked.
            seed: of the texts.
        """
        draw = random.Random(seed)
        tokens = _PROMPT_TOKENS + _DECODE_STEPS
        self._model = model
        self._tokens = [[draw.randrange(model.config.vocab_size) for _ in range(tokens)] for _ in range(rows)]
        there = torch.tensor(self._tokens, device=model.device)
        # on the host: what is measured between two checks must not find them on the device
        self._exact = plain_logits(model, there, torch.float64)[:, _PROMPT_TOKENS - 1 :].cpu()
        self._torch = plain_logits(model, there, model.dtype)[:, _PROMPT_TOKENS - 1 :].double().cpu()

    def check(self, batch: int) -> LogitsCheck:
        """Run the first ``batch`` texts through the engine and compare."""
        model = self._model
        runner = Runner(model, _PROMPT_TOKENS + _DECODE_STEPS)
        rows = self._tokens[:batch]
        logits = [runner.prefill([row[:_PROMPT_TOKENS] for row in rows], len(rows[0])).double().cpu()]
        for step in range(_PROMPT_TOKENS, len(rows[0])):
            tokens = torch.tensor([row[step] for row in rows], device=model.device)
            logits.append(runner.decode(tokens, step).double().cpu())  # a copy: the next step overwrites it
        exact = self._exact[:batch]
        scale = _rms(exact)
        return LogitsCheck(
            error=_rms(torch.stack(logits, dim=1) - exact) / scale,
            torch_error=_rms(self._torch[:batch] - exact) / scale,
        )


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
