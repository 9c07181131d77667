"""Options that all trainings share: the text, the loop, where results go, and how a killed run goes on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsert.jobs.options import REQUIRED, option

if TYPE_CHECKING:
    from sparsert.compress.training import TrainingOptions


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Which text is read, and in what windows."""

    text: tuple[str, ...] = option(
        REQUIRED, "text files: .txt, .jsonl (one {'text': ...} a line), both also .gz or .xz, or .npy", metavar="FILE"
    )
    window: int = option(1024, "tokens of a window")
    separator: str = option("eos", "token between documents", choices=("eos", "bos", "none"))
    bos: bool = option(False, "put the tokenizer's BOS in front of every window; Gemma needs it")
    seed: int = option(0, "same seed, same order of the text and same noise")


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where and in what number format a model runs."""

    device: str | None = option(None, "cpu, cuda or cuda:N (default: a GPU if there is one)", metavar="DEVICE")
    dtype: str | None = option(
        None,
        "number format of the model (default: float32 on a CPU, else as stored)",
        choices=("bfloat16", "float16", "float32"),
    )


@dataclasses.dataclass(frozen=True)
class TrainingJobOptions(TextOptions, DeviceOptions):
    """How to train. Subclasses change defaults by naming a field again."""

    steps: int = option(1000, "updates")
    batch_size: int = option(32, "windows of an update, over all GPUs")
    micro_batch: int | None = option(None, "windows of one forward (default: all of the batch); fewer need less memory")
    learning_rate: float = option(1e-4, "highest learning rate")
    final_learning_rate: float = option(0.01, "learning rate of the last step, as a share of the highest")
    warmup_steps: int = option(0, "updates in which the learning rate rises from 0")
    schedule: str = option("cosine", "how the learning rate falls", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.1, "of AdamW")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.95, "of AdamW")
    epsilon: float = option(1e-8, "of AdamW")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them")
    optimizer_state: str = option(
        "float32", "number format of AdamW's moments", choices=("float32", "bfloat16", "int8")
    )
    compile: bool = option(False, "run each block through torch.compile: faster steps after half a minute")
    save_every: int = option(500, "updates from one saved state to the next; 0 saves none")
    resume: bool = option(False, "go on with a run of the same options that was killed")

    def training_options(self) -> TrainingOptions:
        """The part that ``compress.training`` knows."""
        from sparsert.compress.training import TrainingOptions

        shared = [field.name for field in dataclasses.fields(TrainingOptions) if hasattr(self, field.name)]
        return TrainingOptions(**{name: getattr(self, name) for name in shared})
