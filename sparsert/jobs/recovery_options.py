"""Options of ``sparsert finetune`` and ``sparsert distill``, and the two commands."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsert.jobs.options import REQUIRED, option
from sparsert.jobs.training_options import TrainingJobOptions

if TYPE_CHECKING:
    from sparsert.jobs.recovery import RecoveryResult


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(TrainingJobOptions):
    """Training of a pruned model on text alone."""

    model: str = option(REQUIRED, "the pruned model: directory or hub id, dense weights with zeros", metavar="DIR|ID")
    output: str = option(REQUIRED, "directory to create; must be new or empty", metavar="DIR")
    train: str = option("full", "train all weights, or a LoRA adapter merged at the end", choices=("full", "lora"))
    rank: int = option(8, "LoRA: inner width of the update")
    alpha: float = option(16.0, "LoRA: the update is scaled by alpha / rank")
    dropout: float = option(0.0, "LoRA: dropout of the update's input")
    targets: tuple[str, ...] = option(
        (), "LoRA: last parts of the names of layers, e.g. q_proj v_proj (default: all of the blocks)", metavar="NAME"
    )
    preserve_zeros: bool = option(True, "keep 2:4 weights 2:4")
    recompute: bool = option(
        False, "compute a block's activations again in the backward pass: less memory, a third slower"
    )
    evaluate_text: tuple[str, ...] = option((), "text files whose perplexity is measured by the way", metavar="FILE")
    evaluate_windows: int = option(64, "windows of it that are read")
    evaluate_every: int = option(0, "updates from one measurement to the next; 0: only at the end")
    learning_rate: float = option(1e-4, "highest learning rate")
    warmup_steps: int = option(20, "updates in which the learning rate rises from 0")
    final_learning_rate: float = option(0.1, "learning rate of the last step, as a share of the highest")
    weight_decay: float = option(0.0, "of AdamW")


@dataclasses.dataclass(frozen=True)
class DistillOptions(FinetuneOptions):
    """Training of a pruned model beside the model that it was pruned from."""

    teacher: str = option(REQUIRED, "the unpruned model: directory or hub id", metavar="DIR|ID")
    teacher_dtype: str | None = option(
        None,
        "number format of the teacher (default: float32 on a CPU, else as stored)",
        choices=("bfloat16", "float16", "float32"),
    )
    temperature: float = option(1.0, "softens both distributions")
    logit_weight: float = option(1.0, "weight of the difference of logits")
    label_weight: float = option(0.0, "weight of the text's own likelihood")
    states: bool = option(False, "also compare hidden states, which helps when much depth is gone")
    state_blocks: tuple[int, ...] = option(
        (), "blocks of the student to compare (default: the middle one and the last but one)", metavar="N"
    )
    embedding: bool = option(False, "also compare token embeddings")
    state_loss: str = option("cosine", "how states are compared", choices=("cosine", "mse"))
    state_weight: float | None = option(
        None, "weight of the states (default: makes them as large as the difference of logits)"
    )


def finetune(options: FinetuneOptions) -> RecoveryResult | None:
    """Train on text alone, see :func:`sparsert.jobs.recovery.recover`."""
    from sparsert.jobs.recovery import recover

    return recover(options)


def distill(options: DistillOptions) -> RecoveryResult | None:
    """Train beside a teacher, see :func:`sparsert.jobs.recovery.recover`."""
    from sparsert.jobs.recovery import recover

    return recover(options)
