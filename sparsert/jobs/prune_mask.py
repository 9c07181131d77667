"""``sparsert prune mask``: one-shot 2:4 masks, with or without an update of the weights that stay."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparsert.jobs.options import REQUIRED, option
from sparsert.jobs.training_options import DeviceOptions, TextOptions

if TYPE_CHECKING:
    from sparsert.jobs.masked_output import MaskedResult


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """From which model to where."""

    model: str = option(REQUIRED, "model directory or hub id, of dense weights", metavar="DIR|ID")
    output: str | None = option(None, "checkpoint to create; must be new or empty", metavar="DIR")
    masks_output: str | None = option(None, "write the masks as MaskLLM's npz", metavar="FILE")
    to: str | None = option(
        None,
        "how to store 2:4 weights: with zeros, or packed (default: dense)",
        choices=("dense", "sparsert", "sparse-24-bitmask"),
    )
    keep_dense: tuple[str, ...] = option(
        (), "linear layers that stay dense, patterns of names: '*.layers.29.*' '*.o_proj'", metavar="PATTERN"
    )


@dataclasses.dataclass(frozen=True)
class PruneMaskOptions(OutputOptions, TextOptions, DeviceOptions):
    """What ``sparsert prune mask`` takes."""

    text: tuple[str, ...] = option(
        (), "text files to calibrate on: .txt, .jsonl, .gz, .xz or .npy; magnitude needs none", metavar="FILE"
    )
    method: str = option("sparsegpt", "how masks are chosen", choices=("magnitude", "wanda", "sparsegpt"))
    update_weights: bool = option(False, "sparsegpt: change the weights that stay, so that they make up for the rest")
    masks: str | None = option(None, "with --update-weights: fit the weights to these masks", metavar="FILE")
    samples: int = option(128, "windows of the text to calibrate on")
    damping: float = option(0.01, "sparsegpt: added to the Hessian's diagonal, as a share of its mean")
    batch_size: int = option(8, "windows of one forward")


def prune_mask(options: PruneMaskOptions) -> MaskedResult:
    """Run the job.

    Raises:
        SparsertError: what the options ask for cannot be done.
    """
    import torch

    from sparsert.compress.anatomy import anatomy_of
    from sparsert.compress.oneshot import OneShotSettings, maskable_linears, prune_blocks_
    from sparsert.errors import InputError
    from sparsert.jobs import masked_output
    from sparsert.jobs.models import load_model, load_tokenizer, open_dense
    from sparsert.jobs.progress import Progress
    from sparsert.jobs.text_files import load_windows

    started = time.perf_counter()
    masked_output.check_places(options.output, options.masks_output)
    settings = OneShotSettings(options.method, options.update_weights, options.damping)
    if options.masks is not None and not options.update_weights:
        raise InputError(
            "--masks fits weights to masks and needs --update-weights; to apply them alone: `sparsert prune --masks`"
        )
    if settings.needs_text and not options.text:
        raise InputError(f"{options.method} needs a calibration text; give --text FILE, or --method magnitude")
    checkpoint = open_dense(options.model)
    masked_output.check_maskable(checkpoint)
    fixed = None if options.masks is None else masked_output.read_masks(options.masks, checkpoint)
    keep_dense = options.keep_dense
    tokens = None
    if settings.needs_text:
        needs_tokenizer = any(not file.endswith(".npy") for file in options.text)
        tokenizer = load_tokenizer(checkpoint) if needs_tokenizer or options.bos else None
        windows = load_windows(options, tokenizer, vocabulary=checkpoint.config.get("vocab_size"))
        tokens = windows.sample(options.samples, seed=options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # the model stays on the host, but in the number format of where it computes
    dtype = options.dtype or ("float32" if device.type == "cpu" else None)
    model = load_model(checkpoint, dtype=dtype or _stored_dtype(checkpoint.config))
    anatomy = anatomy_of(model)
    linears = maskable_linears(anatomy, keep_dense)
    if fixed is not None:
        missing = [name for name in linears if name not in fixed]
        keep_dense = (*keep_dense, *missing)
    masks = masked_output.MaskStore()
    with Progress(len(linears), options.method, "layer") as progress:
        for name, mask in prune_blocks_(
            anatomy, settings, tokens, keep_dense=keep_dense, masks=fixed, device=device, batch_size=options.batch_size
        ):
            masks.put(name, mask)
            progress.advance()
    method = "mask file" if fixed is not None else options.method
    output, masks_file, dense = masked_output.write_masked(
        checkpoint,
        masks,
        output=options.output,
        masks_output=options.masks_output,
        method=f"{method}, weights updated" if options.update_weights else method,
        base_model=base_name(options.model, checkpoint.directory),
        target=options.to,
        weights=(lambda name: model.get_parameter(f"{name}.weight")) if options.update_weights else None,
    )
    seconds = time.perf_counter() - started
    memory = masked_output.peak_memory_bytes(device)
    return masked_output.MaskedResult(output, masks_file, options.method, len(masks), dense, seconds, memory)


def base_name(model: str, directory: Path) -> str:
    """What to record as the base: a path of this machine means nothing to the next reader, its last part may."""
    return directory.resolve().name if Path(model).expanduser().exists() else model


def _stored_dtype(config: dict[str, object]) -> str | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    return str(dtype).removeprefix("torch.") if dtype else None
