"""``sparsert finetune`` and ``sparsert distill``: train a pruned model and keep its zeros.

Both are one job; distillation has a teacher and another loss. All weights are trained, or a LoRA adapter that is
merged under the masks at the end. The output is the checkpoint of the input with other numbers: same tensors, same
dtypes, same zeros, and a line in its record that says what was done. A run that is killed goes on with ``--resume``
to the same weights (:mod:`sparsert.jobs.training_run`).

On a GPU, weights in float32 are trained under bf16 autocast; weights in bfloat16 are trained as they are, with random
rounding, which for a model of 7 billion is the difference between 112 and 56 GB (``--dtype bfloat16 --optimizer-state
bfloat16``).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.errors import InputError, UnsupportedError
from sparsert.jobs.options import to_record
from sparsert.jobs.recovery_options import DistillOptions, FinetuneOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsert.checkpoint import Checkpoint
    from sparsert.compress.anatomy import Anatomy
    from sparsert.compress.distillation import Distillation
    from sparsert.compress.text import TextWindows
    from sparsert.compress.training import LossFunction, Position


@dataclasses.dataclass(frozen=True)
class RecoveryResult:
    """What was trained and written.

    Attributes:
        output: the directory.
        steps: updates.
        tokens: read in training.
        masked_linears: how many linear layers were kept 2:4.
        perplexity: of the evaluation text before and after; None without one.
        total_bytes: of the written weights.
    """

    output: Path
    steps: int
    tokens: int
    masked_linears: int
    perplexity: tuple[float, float] | None
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**dataclasses.asdict(self), "output": str(self.output)}

    def to_text(self) -> str:
        """One line."""
        change = ""
        if self.perplexity is not None:
            change = f", perplexity {self.perplexity[0]:.4g} -> {self.perplexity[1]:.4g}"
        return (
            f"{self.output}: {self.steps} updates, {self.tokens:,} tokens{change}, {self.masked_linears} linear "
            f"weights kept 2:4, {self.total_bytes / 1e6:.1f} MB"
        )


def recover(options: FinetuneOptions) -> RecoveryResult | None:
    """Run the job: distillation if the options are :class:`DistillOptions`, else finetuning.

    Returns:
        What was made; None in all but the first of several processes.

    Raises:
        SparsertError: what the options ask for cannot be done, the loss is no number, or the disk is full.
    """
    from sparsert.checkpoint.work import check_output
    from sparsert.compress.anatomy import anatomy_of
    from sparsert.compress.parallel import Processes
    from sparsert.compress.training import Trainer
    from sparsert.jobs.calibration_job import check_window
    from sparsert.jobs.models import checkpoint_fingerprint, load_model, load_tokenizer, open_dense
    from sparsert.jobs.text_files import load_windows
    from sparsert.jobs.training_run import TrainingRun
    from sparsert.jobs.write_models import write_trained
    from sparsert.models import resolve_device

    if options.dtype == "float16":
        raise InputError("--dtype float16: small gradients vanish in it; train in bfloat16 or float32")
    if options.recompute and options.train == "lora" and options.dropout:
        raise InputError("--recompute would draw another dropout in the backward pass; leave it out, or --dropout")
    output = Path(options.output).expanduser()
    check_output(output)
    processes = Processes(resolve_device(options.device))
    source = open_dense(options.model)
    check_window(options.window, source)
    ids_only = all(path.endswith(".npy") for path in (*options.text, *options.evaluate_text)) and not options.bos
    tokenizer = None if ids_only else load_tokenizer(source)
    windows = load_windows(options, tokenizer, vocabulary=source.config.get("vocab_size"))
    held_out = _held_out(options, tokenizer, source)
    identity: dict[str, Any] = {
        "job": "distill" if isinstance(options, DistillOptions) else "finetune",
        "options": to_record(options),
        "processes": processes.count,
        "text_fingerprint": windows.fingerprint(),
        "model_fingerprint": checkpoint_fingerprint(source),
    }
    teacher = None
    if isinstance(options, DistillOptions):
        teacher_source = open_dense(options.teacher)
        identity["teacher_fingerprint"] = checkpoint_fingerprint(teacher_source)
        teacher = anatomy_of(load_model(teacher_source, dtype=options.teacher_dtype, device=processes.device))
    model = load_model(source, dtype=options.dtype, device=processes.device)
    student = _Student(model, source, options, teacher)

    def evaluate() -> dict[str, float]:
        return {} if held_out is None else {"perplexity": student.perplexity(held_out, options.micro_batch or 4)}

    with TrainingRun(output, identity, resume=options.resume, is_first=processes.is_first) as run:
        before = evaluate().get("perplexity")
        trainer = Trainer(
            student.parameters,
            student.loss,
            windows,
            options.training_options(),
            processes=processes,
            after_update=student.after_update,
        )
        model.train()
        run.train(
            trainer,
            description="finetune" if teacher is None else "distil",
            save_every=options.save_every,
            evaluate=evaluate,
            evaluate_every=options.evaluate_every,
            step_values=student.step_values,
        )
        model.eval()
        student.merge()
        after = evaluate().get("perplexity")
        tokens = options.steps * options.batch_size * options.window
        total_bytes = 0
        if processes.is_first:
            done = {
                "method": "finetuning" if teacher is None else "distillation",
                "train": options.train,
                "steps": options.steps,
                "tokens": tokens,
                "learning_rate": options.learning_rate,
            }
            total_bytes = write_trained(
                model, source, output, recovery=done, zeros_kept=options.preserve_zeros, progress=True
            )
        run.finish()
    processes.wait()
    if not processes.is_first:
        return None
    perplexity = None if before is None or after is None else (before, after)
    return RecoveryResult(output, options.steps, tokens, student.masked, perplexity, total_bytes)


class _Student:
    """A model being trained: what of it is trained, by which loss, and what keeps its zeros.

    Attributes:
        parameters: what the optimizer changes.
        loss: tokens to a loss.
        after_update: sets masked weights to zero again; None where nothing is masked.
        step_values: parts of the latest loss, for the log; None where it has none.
        masked: how many linear layers are kept 2:4.
    """

    def __init__(self, model: nn.Module, source: Checkpoint, options: FinetuneOptions, teacher: Anatomy | None) -> None:
        from sparsert.compress.anatomy import anatomy_of
        from sparsert.compress.keep_zeros import ZeroKeeper, masks_of
        from sparsert.compress.mask_learning import recompute_blocks_
        from sparsert.compress.training import compile_blocks_

        self.anatomy = anatomy_of(model)
        self.after_update: Callable[[], None] | None = None
        self._adapted: Any = None
        linears = self.anatomy.block_linears()
        self.masked = len(masks_of(linears)) if options.preserve_zeros else 0
        if options.train == "lora":
            low_rank = _import_lora()
            settings = low_rank.LoraSettings(options.rank, options.alpha, options.dropout, options.targets)
            self._merge = low_rank.merge_lora
            self._adapted = low_rank.add_lora(model, settings, preserve_zeros=options.preserve_zeros, seed=options.seed)
        else:
            model.requires_grad_(True)
            if self.masked:
                keeper = ZeroKeeper(linears)
                self.after_update = keeper.apply_
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if options.compile:
            for anatomy in (self.anatomy, *([] if teacher is None else [teacher])):
                compile_blocks_(anatomy)
        if options.recompute:
            recompute_blocks_(self.anatomy)
        distillation = None if teacher is None else _distillation(self.anatomy, teacher, source, options)
        if distillation is not None and distillation.projection is not None:
            self.parameters.append(distillation.projection)
        self.step_values = None if distillation is None else distillation.parts
        plain = self._label_loss if distillation is None else distillation
        self.loss: LossFunction = _reseeded(plain) if options.train == "lora" and options.dropout else plain

    def perplexity(self, windows: Tensor, batch_size: int) -> float:
        """Of windows of text."""
        from sparsert.compress.score_windows import perplexity

        return perplexity(self.anatomy, windows, batch_size=batch_size)

    def merge(self) -> None:
        """Put what an adapter has learned into the weights; nothing to do where they were trained themselves."""
        if self._adapted is not None:
            self._merge(self._adapted)

    def _label_loss(self, tokens: Tensor, position: Position) -> Tensor:
        from sparsert.compress.head_loss import label_loss

        return label_loss(self.anatomy, self.anatomy.hidden(tokens), tokens)


def _distillation(student: Anatomy, teacher: Anatomy, source: Checkpoint, options: FinetuneOptions) -> Distillation:
    from sparsert.compress.distillation import Distillation, DistillationSettings, pair_blocks

    assert isinstance(options, DistillOptions)
    pairs: tuple[tuple[int, int], ...] = ()
    if options.states or options.state_blocks:
        kept = _kept_blocks(source, student.num_blocks, teacher.num_blocks)
        pairs = pair_blocks(student.num_blocks, teacher.num_blocks, kept, options.state_blocks)
    settings = DistillationSettings(
        logit_weight=options.logit_weight,
        label_weight=options.label_weight,
        temperature=options.temperature,
        state_pairs=pairs,
        embedding=options.embedding,
        state_loss=options.state_loss,
        state_weight=options.state_weight,
    )
    return Distillation(student, teacher, settings, seed=options.seed)


def _kept_blocks(source: Checkpoint, student_blocks: int, teacher_blocks: int) -> list[int] | None:
    """The teacher's block of each block of the student, if the student's record knows."""
    from sparsert.checkpoint.quantization import pruning_record

    record = pruning_record(source.config) or {}
    kept = record.get("kept_blocks")
    if kept is None or len(kept) != student_blocks or record.get("base_num_blocks") != teacher_blocks:
        return None
    return list(kept)


def _held_out(options: FinetuneOptions, tokenizer: Any, source: Checkpoint) -> Tensor | None:
    """The evaluation text's first windows, in its order, as published perplexities are measured."""
    if not options.evaluate_text:
        return None
    import torch

    from sparsert.jobs.text_files import load_windows

    text: TextWindows = load_windows(
        dataclasses.replace(options, text=options.evaluate_text), tokenizer, vocabulary=source.config.get("vocab_size")
    )
    return torch.stack([text[index] for index in range(min(len(text), options.evaluate_windows))])


def _import_lora() -> Any:
    try:
        from sparsert.compress import low_rank
    except ImportError as error:
        raise UnsupportedError(
            f"--train lora needs peft ({error}); run pip install 'sparsert[peft]', or use --train full"
        ) from error
    return low_rank


def _reseeded(loss: LossFunction) -> LossFunction:
    """Draw dropout from the position in the run, so that a run that is resumed draws the same."""
    import torch

    def seeded(tokens: Tensor, position: Position) -> Tensor:
        digest = hashlib.sha256(f"{position.seed} {position.step} {position.part}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        return loss(tokens, position)

    return seeded
