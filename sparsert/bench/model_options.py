"""Which model is measured: the options that latency, throughput, fit and profile share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.bench.architectures import ARCHITECTURES, choose_blocks, hf_config
from sparsert.bench.options import dtype_name
from sparsert.bench.subject import SPARSITIES, Subject, stored_sparsity
from sparsert.bench.workload import Setting, parse_lengths
from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "native", "triton", "dense")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model --arch --sparsity --masks --remove-blocks --force-remove --backend`` to a command."""
    what = parser.add_argument_group("what to run")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR|ID", help="model directory or hub id")
    which.add_argument(
        "--arch", metavar="NAME", help=f"random weights in the shape of one of {', '.join(ARCHITECTURES)}"
    )
    what.add_argument(
        "--sparsity",
        choices=SPARSITIES,
        help="of the linear layers (default: 2:4 for --arch, what the checkpoint holds for --model)",
    )
    what.add_argument("--masks", metavar="FILE", help="2:4 masks of a mask_compressed.npz for --model")
    what.add_argument(
        "--remove-blocks",
        metavar="N|LIST",
        help="leave out N transformer blocks in front of the last two, or those listed, e.g. 21-25,27",
    )
    what.add_argument("--force-remove", action="store_true", help="allow blocks 0-3 and the last two in the list")
    what.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="kernels of our engine for 2:4 layers (default: auto)"
    )


def check_corners(corners: bool, subject: Subject) -> None:
    """Refuse ``--corners`` for a model that has not all four.

    Raises:
        InputError: no blocks are removed, or the model is dense.
    """
    if corners and (not subject.removed or not subject.sparse):
        raise InputError("--corners compares dense, 2:4, blocks removed and both; give --remove-blocks N, and no dense")


def subject_of(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[Subject, list[str]]:
    """The model that the options name, in the corner that they ask for.

    Args:
        arguments: with what :func:`add_model_options` adds, and ``seed``.
        dtype: to run in.

    Returns:
        The subject, and sentences that a record should have as notes.

    Raises:
        InputError: neither a model nor an architecture, masks without weights for them, or blocks that
            cannot be removed.
        CheckpointError, UnsupportedError: a checkpoint that cannot be read or run.
    """
    if arguments.model is None and arguments.arch is None:
        raise InputError(f"nothing to measure; give --arch ({', '.join(ARCHITECTURES)}) or --model DIR|ID")
    common: dict[str, Any] = {
        "dtype": dtype_name(dtype),
        "seed": arguments.seed,
        "backend": arguments.backend,
    }
    if arguments.arch is not None:
        if arguments.masks is not None:
            raise InputError("--masks fits the weights of a --model; --arch has random weights and random masks")
        config = hf_config(arguments.arch)
        removed = choose_blocks(arguments.remove_blocks, config["num_hidden_layers"], force=arguments.force_remove)
        subject = Subject(arguments.arch, config, sparsity=arguments.sparsity or "2:4", removed=removed, **common)
        return subject, [f"weights of {arguments.arch} are random"]
    return _checkpoint_subject(arguments, common)


def _checkpoint_subject(arguments: argparse.Namespace, common: dict[str, Any]) -> tuple[Subject, list[str]]:
    from sparsert.checkpoint import open_checkpoint, resolve_checkpoint
    from sparsert.models import DecoderConfig

    if arguments.masks is not None and arguments.sparsity == "dense":
        raise InputError("--masks and --sparsity dense exclude each other; leave one of them out")
    if arguments.masks is not None and not Path(arguments.masks).expanduser().is_file():
        raise InputError(f"--masks {arguments.masks}: there is no such file; give a mask_compressed.npz")
    checkpoint = open_checkpoint(resolve_checkpoint(arguments.model))
    config = DecoderConfig.from_hf(checkpoint.config)
    removed = choose_blocks(arguments.remove_blocks, config.num_blocks, force=arguments.force_remove)
    stored = stored_sparsity(checkpoint, config)
    sparsity = arguments.sparsity or ("2:4" if arguments.masks is not None else stored)
    prune = sparsity == "2:4" and stored == "dense" and arguments.masks is None
    notes = []
    if prune:
        notes.append(
            "the checkpoint is not 2:4: magnitude masks were made while loading, so its texts are worth nothing"
        )
    if stored == "2:4":
        notes.append("dense rows of our engine have random values where the checkpoint holds zeros")
    subject = Subject(
        checkpoint.directory.resolve().name,
        checkpoint.config,
        sparsity=sparsity,
        removed=removed,
        checkpoint=str(checkpoint.directory),
        masks=str(Path(arguments.masks).expanduser()) if arguments.masks is not None else None,
        prune=prune,
        **common,
    )
    return subject, notes


def parse_settings(
    lengths: str, batches: list[int], subject: Subject, prompts_of: dict[int, int] | None = None
) -> list[Setting]:
    """Every batch at every pair of lengths.

    Args:
        lengths: of ``--lengths``.
        batches: of ``--batch``.
        prompts_of: prompts in all for each batch; default as many as the batch.

    Raises:
        InputError: texts longer than the model was made for.
    """
    most = subject.config.max_position_embeddings
    pairs = parse_lengths(lengths)
    for input_len, output_len in pairs:
        if input_len + output_len > most:
            raise InputError(
                f"--lengths {input_len}/{output_len}: {subject.name} takes texts of up to {most} tokens; shorten them"
            )
    prompts_of = prompts_of or {}
    return [Setting(batch, *pair, prompts_of.get(batch, batch)) for pair in pairs for batch in batches]
