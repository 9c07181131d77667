"""``sparsert learn-masks``: 2:4 masks learned end to end from a one-shot prior, or from the masks of another text.

    prior      SparseGPT's masks on a sample of the text, kept as ``prior.npz`` in the run's directory
    learning   ``compress.mask_learning`` in ``compress.training``; resumable at every saved state
    result     the likeliest masks: a checkpoint, MaskLLM's npz, or both

Several processes each hold the whole model and read their part of every batch. The first makes the prior and writes.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparsert.jobs.options import option, to_record
from sparsert.jobs.prune_mask import OutputOptions, base_name
from sparsert.jobs.training_options import TrainingJobOptions

if TYPE_CHECKING:
    from sparsert.checkpoint import Checkpoint
    from sparsert.compress.mask_learning import MaskLearner
    from sparsert.compress.parallel import Processes
    from sparsert.compress.text import TextWindows
    from sparsert.jobs.masked_output import MaskedResult, MaskStore


@dataclasses.dataclass(frozen=True)
class LearnMasksOptions(OutputOptions, TrainingJobOptions):
    """What ``sparsert learn-masks`` takes; schedules are the paper's, steps and batch are for one GPU.

    The paper's AdamW has an epsilon of 1e-5. A gradient of norm 0.1 is 8e-6 for each of 160 million logits, less than
    that, and updates shrink with it; docs/masks.md has what 1e-7 changes.
    """

    steps: int = option(2000, "updates")
    learning_rate: float = option(5e-4, "highest learning rate")
    epsilon: float = option(1e-7, "of AdamW; gradients of logits are small")
    prior: str = option("sparsegpt", "masks to begin near", choices=("none", "magnitude", "wanda", "sparsegpt"))
    masks: str | None = option(
        None, "begin near these masks instead, learned on other text for example", metavar="FILE"
    )
    samples: int = option(128, "windows of the text that the prior is made of")
    prior_strength: float = option(3.0, "lead of the prior's masks, in deviations of the first logits")
    initial_temperature: float = option(4.0, "of the Gumbel softmax, at the first step")
    final_temperature: float = option(0.05, "of the Gumbel softmax, at the last step")
    initial_scale: float = option(100.0, "factor of the logits, at the first step")
    final_scale: float = option(500.0, "factor of the logits, at the last step")
    logit_deviation: float = option(0.01, "standard deviation of the first logits")
    regularisation: float = option(1e-5, "reward for keeping large weights, falling to 0")
    distillation: float = option(0.0, "share of the loss that is the divergence from the dense model, 0-1")
    logit_dtype: str = option("float32", "number format of the logits", choices=("float32", "bfloat16"))
    recompute: bool = option(False, "compute each block again in the backward pass: less memory, a third more time")
    evaluate_text: tuple[str, ...] = option((), "text files to measure the perplexity of, by the way", metavar="FILE")
    evaluate_every: int = option(500, "updates from one measurement to the next; 0: only after the last")
    evaluate_windows: int = option(32, "windows that are measured, from the start")


def learn_masks(options: LearnMasksOptions) -> MaskedResult | None:
    """Run the job.

    Returns:
        What was made; None in all but the first of several processes.

    Raises:
        SparsertError: what the options ask for cannot be done.
    """
    from sparsert.compress.anatomy import anatomy_of
    from sparsert.compress.mask_learning import MaskLearner, MaskSettings, recompute_blocks_
    from sparsert.compress.parallel import Processes
    from sparsert.compress.training import Trainer, compile_blocks_
    from sparsert.errors import InputError
    from sparsert.jobs import masked_output
    from sparsert.jobs.models import checkpoint_fingerprint, load_model, load_tokenizer, open_dense
    from sparsert.jobs.text_files import load_windows
    from sparsert.jobs.training_run import TrainingRun

    started = time.perf_counter()
    if options.dtype == "float16":
        raise InputError("--dtype float16: small gradients of masks vanish in it; learn in bfloat16 or float32")
    masked_output.check_places(options.output, options.masks_output)
    settings = MaskSettings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(MaskSettings)})
    training = dataclasses.replace(options.training_options(), autocast=False)
    processes = Processes(options.device)
    checkpoint = open_dense(options.model)
    masked_output.check_maskable(checkpoint)
    vocabulary = checkpoint.config.get("vocab_size")
    files = (*options.text, *options.evaluate_text)
    tokenizer = load_tokenizer(checkpoint) if options.bos or any(not file.endswith(".npy") for file in files) else None
    windows = load_windows(options, tokenizer, vocabulary=vocabulary)
    evaluated = None
    if options.evaluate_text:
        evaluated = load_windows(
            dataclasses.replace(options, text=options.evaluate_text), tokenizer, vocabulary=vocabulary
        )
    identity = {
        "job": "learn-masks",
        "options": to_record(options),
        "weights": checkpoint_fingerprint(checkpoint),
        "tokens": windows.fingerprint(),
        "processes": processes.count,
    }
    dtype = options.dtype or ("float32" if processes.device.type == "cpu" else "bfloat16")
    target = options.output or options.masks_output
    assert target is not None  # checked above
    with TrainingRun(target, identity, resume=options.resume, is_first=processes.is_first) as run:
        processes.wait()
        prior = _prior(options, checkpoint, windows, run.directory / "prior.npz", processes, dtype)
        model = load_model(checkpoint, dtype=dtype, device=processes.device)
        anatomy = anatomy_of(model)
        learner = MaskLearner(anatomy, settings, prior=prior, keep_dense=options.keep_dense, seed=options.seed)
        if options.compile:
            compile_blocks_(anatomy)
        if options.recompute:
            recompute_blocks_(anatomy)
        del prior
        trainer = Trainer(learner.parameters, learner, windows, training, processes=processes)
        measured: dict[str, float] = {}

        def evaluate() -> dict[str, float]:
            measured["certainty"] = learner.certainty()
            if evaluated is not None:
                measured["perplexity"] = hard_perplexity(learner, evaluated, options.evaluate_windows)
            return measured

        run.train(
            trainer,
            description="learning masks",
            save_every=options.save_every,
            evaluate=evaluate,
            evaluate_every=options.evaluate_every,
        )
        if not processes.is_first:
            return None
        if not measured:  # resumed behind the last step
            evaluate()
        masks = masked_output.MaskStore()
        for name, mask in learner.masks():
            masks.put(name, mask)
        output, masks_file, dense = masked_output.write_masked(
            checkpoint,
            masks,
            output=options.output,
            masks_output=options.masks_output,
            method="maskllm",
            base_model=base_name(options.model, checkpoint.directory),
            target=options.to,
        )
        run.finish()
    seconds = time.perf_counter() - started
    memory = masked_output.peak_memory_bytes(processes.device)
    return masked_output.MaskedResult(output, masks_file, "maskllm", len(masks), dense, seconds, memory, measured)


def hard_perplexity(learner: MaskLearner, windows: TextWindows, count: int, *, batch_size: int = 8) -> float:
    """Perplexity of the first windows of a text under the masks as they would be written now."""
    import torch

    from sparsert.compress.score_windows import perplexity

    tokens = torch.stack([windows[index] for index in range(min(count, len(windows)))])
    with learner.running("hard"):
        return perplexity(learner.anatomy, tokens, batch_size=batch_size)


def _prior(
    options: LearnMasksOptions,
    checkpoint: Checkpoint,
    windows: TextWindows,
    file: Path,
    processes: Processes,
    dtype: str,
) -> MaskStore | None:
    """Masks to begin near: given, kept from before the run was killed, or made by the first process."""
    from sparsert.compress.anatomy import anatomy_of
    from sparsert.compress.oneshot import OneShotSettings, maskable_linears, prune_blocks_
    from sparsert.jobs.masked_output import MaskStore, read_masks, save_masks
    from sparsert.jobs.models import load_model
    from sparsert.jobs.progress import Progress

    if options.masks is not None:
        return read_masks(options.masks, checkpoint)
    if options.prior == "none":
        return None
    if processes.is_first and not file.is_file():
        settings = OneShotSettings(options.prior)
        tokens = windows.sample(options.samples, seed=options.seed) if settings.needs_text else None
        anatomy = anatomy_of(load_model(checkpoint, dtype=dtype))
        store = MaskStore()
        with Progress(
            len(maskable_linears(anatomy, options.keep_dense)), f"prior: {options.prior}", "layer"
        ) as progress:
            for name, mask in prune_blocks_(
                anatomy, settings, tokens, keep_dense=options.keep_dense, device=processes.device
            ):
                store.put(name, mask)
                progress.advance()
        save_masks(file, store, compress=False)
    processes.wait()
    return read_masks(file, checkpoint)
