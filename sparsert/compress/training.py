"""The training loop of mask learning, distillation and finetuning: one step, and the state that makes it repeatable.

A step reads ``batch_size`` windows in parts of ``micro_batch``, adds up gradients, clips them, and updates. What
differs between methods is a function from tokens to a loss, and which tensors are trained; the loop knows neither
models nor files.

A run is a function of its options: the order of the text follows from seed and step (``text.py``), the learning rate
from the step, and whatever a loss draws at random must follow from the :class:`Position` that it is given. So
``state_dict`` is parameters, moments and one number, and a run resumed from it goes on to the bits that it would have
reached.

Every step waits for the device once, before the update, to see whether the loss is a number: an update with NaN would
destroy what has been learned. That costs the time to fill the queue again, a few per cent of a step on a small model.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.optimizer import STATES, make_optimizer
from sparsert.compress.parallel import Processes
from sparsert.compress.text import TextWindows
from sparsert.errors import CheckpointError, InputError, TrainingError

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How to train; nothing about what.

    Attributes:
        steps: updates.
        batch_size: windows of one update, over all processes.
        micro_batch: windows of one forward and backward; None: all that a process has of a batch.
        learning_rate: the highest.
        final_learning_rate: at the last step, as a share of it.
        warmup_steps: updates in which it rises from 0.
        schedule: how it falls after that.
        weight_decay, beta1, beta2, epsilon: of AdamW.
        clip_norm: gradients are scaled down to this norm; 0 leaves them alone.
        optimizer_state: how the moments are kept, see ``optimizer.py``.
        autocast: compute in bf16 on a GPU where tensors are fp32.
        seed: of the order of the text and of all that is random.

    Raises:
        InputError: a value out of range.
    """

    steps: int
    batch_size: int = 32
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    final_learning_rate: float = 0.01
    warmup_steps: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    optimizer_state: str = "float32"
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "final_learning_rate", "epsilon"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be positive")
        for name, choices in (("schedule", SCHEDULES), ("optimizer_state", STATES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of an update, counted from 0.

        Example:
            >>> options = TrainingOptions(steps=101, learning_rate=1.0, final_learning_rate=0.1, schedule="linear")
            >>> [round(options.learning_rate_at(step), 3) for step in (0, 50, 100)]
            [1.0, 0.55, 0.1]
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        passed = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        if self.schedule == "constant":
            share = 1.0
        elif self.schedule == "linear":
            share = 1 - passed
        else:
            share = (1 + math.cos(math.pi * passed)) / 2
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * share)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in a run a loss is asked for; all that a loss draws at random follows from it.

    Attributes:
        step: update, counted from 0.
        part: which forward of the update, counted from 0 over all processes.
        progress: 0 at the first update, 1 at the last.
        seed: of the run.
        share: of the update's windows that this forward reads in its process; what a loss adds that is no mean over
            tokens must be multiplied with it.
    """

    step: int
    part: int
    progress: float
    seed: int
    share: float = 1.0


class LossFunction(Protocol):
    """Tokens to a loss."""

    def __call__(self, tokens: Tensor, position: Position) -> Tensor:
        """Mean loss of a token, a scalar, of ``tokens``: int64 ``[windows, window]`` on the device."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one update did.

    Attributes:
        step: updates done so far, this one included.
        loss: mean of the batch.
        learning_rate: of this update.
        gradient_norm: before clipping.
        tokens: read by this update.
        seconds: of this update.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


def compile_blocks_(anatomy: Anatomy) -> None:
    """Run each block of a model through ``torch.compile``: one compilation serves all blocks of one shape."""
    for block in anatomy.blocks:
        block.compile()


class Trainer:
    """A run: parameters, their optimizer, and the next step.

    Attributes:
        step: updates done.

    Args:
        parameters: leaves that require a gradient; those of one dtype and device are a group of AdamW.
        loss_function: see :class:`LossFunction`.
        windows: the text.
        options: how to train.
        processes: which GPU, and whether there are others; default where the first parameter is.
        after_update: called behind every update, before the next forward; keeps masked weights at zero, for example.

    Raises:
        InputError: nothing to train, or a batch that cannot be divided among the processes.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(50))
        >>> def loss_function(tokens, position):
        ...     return torch.nn.functional.cross_entropy(weight.expand(tokens.numel(), -1), tokens.flatten())
        >>> windows = TextWindows(torch.arange(50) % 7, 10)
        >>> options = TrainingOptions(steps=3, batch_size=2, learning_rate=0.1)
        >>> trainer = Trainer([weight], loss_function, windows, options)
        >>> trainer.train()
        >>> trainer.step, bool(weight[:7].min() > weight[7:].max())
        (3, True)
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        loss_function: LossFunction,
        windows: TextWindows,
        options: TrainingOptions,
        *,
        processes: Processes | None = None,
        after_update: Callable[[], None] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise InputError("there is nothing to train; every weight was left out")
        self.processes = processes or Processes(self.parameters[0].device)
        if options.batch_size % self.processes.count:
            raise InputError(
                f"batch_size is {options.batch_size}, no multiple of the {self.processes.count} processes; change one"
            )
        self.options = options
        self.windows = windows
        self.step = 0
        self._loss_function = loss_function
        self._after_update = after_update
        self.optimizer = make_optimizer(
            self.parameters,
            learning_rate=options.learning_rate,
            betas=(options.beta1, options.beta2),
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
            state=options.optimizer_state,
            seed=options.seed,
        )

    def train(self, *, until: int | None = None, callback: Callable[[StepRecord], None] | None = None) -> None:
        """Go on to the last step, or to ``until`` updates.

        Args:
            until: stop there.
            callback: called behind every update: shows progress, evaluates, saves.

        Raises:
            TrainingError: the loss is no number; the update that follows from it was not made.
        """
        last = self.options.steps if until is None else min(until, self.options.steps)
        while self.step < last:
            record = self.train_step()
            if callback is not None:
                callback(record)

    def train_step(self) -> StepRecord:
        """One update."""
        started = time.perf_counter()
        options = self.options
        tokens = self.processes.part(self.windows.batch(self.step, options.batch_size, seed=options.seed))
        tokens = tokens.to(self.processes.device, non_blocking=True)
        parts = tokens.split(options.micro_batch or len(tokens))
        progress = self.step / max(1, options.steps - 1)
        loss = torch.zeros((), device=tokens.device)
        for number, part in enumerate(parts):
            part_number = self.processes.index * len(parts) + number
            share = len(part) / len(tokens)
            position = Position(self.step, part_number, progress, options.seed, share)
            with torch.autocast("cuda", torch.bfloat16, enabled=options.autocast and tokens.is_cuda):
                part_loss = self._loss_function(part, position) * share
            part_loss.backward()
            loss += part_loss.detach()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.processes.average_([loss, *gradients])
        norm = self._clip()
        value, gradient_norm = torch.stack([loss.float(), norm]).tolist()
        if not (math.isfinite(value) and math.isfinite(gradient_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            advice = (
                "try a smaller learning rate or a longer warm-up, or look for broken text"
                if self.step
                else "nothing had been changed yet, so look for damaged weights (`sparsert inspect`), or compute in "
                "bfloat16 or float32"
            )
            raise TrainingError(
                f"step {self.step + 1}: the loss is {value} and the norm of its gradient {gradient_norm}; the update "
                f"was not made: {advice}"
            )
        learning_rate = options.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._after_update is not None:
            self._after_update()
        self.step += 1
        read = options.batch_size * self.windows.window
        return StepRecord(self.step, value, learning_rate, gradient_norm, read, time.perf_counter() - started)

    def _clip(self) -> Tensor:
        limit = self.options.clip_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit, foreach=None).float()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; the tensors are those of the run, not copies."""
        return {
            "step": self.step,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: the state is of other parameters.
        """
        stored = state["parameters"]
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        if [tuple(tensor.shape) for tensor in stored] != shapes:
            raise CheckpointError(
                f"the training state holds {len(stored)} tensors, this run trains {len(shapes)} or of other shapes; it "
                "belongs to another run, start anew without --resume"
            )
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, stored, strict=True):
                parameter.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
