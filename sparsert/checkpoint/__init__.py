"""Files <-> tensors: model directories, hub ids, mask files, the writer, and what `sparsert inspect` shows."""

from sparsert.checkpoint.convert import ConvertSummary, convert_checkpoint
from sparsert.checkpoint.default_masks import DefaultMasks, read_default_masks
from sparsert.checkpoint.default_model import DEFAULT_MODEL, fetch_default_model
from sparsert.checkpoint.hub import resolve_checkpoint
from sparsert.checkpoint.inspect import CheckpointReport, TensorReport, inspect_checkpoint
from sparsert.checkpoint.masks import MaskFile, read_maskllm, write_maskllm
from sparsert.checkpoint.prune import PruneSummary, check_not_pruned, prune_checkpoint
from sparsert.checkpoint.reader import Checkpoint, block_of, open_checkpoint, rename_block
from sparsert.checkpoint.writer import TARGETS, Form, pruned_config, write_checkpoint

__all__ = [
    "DEFAULT_MODEL",
    "TARGETS",
    "Checkpoint",
    "CheckpointReport",
    "ConvertSummary",
    "DefaultMasks",
    "Form",
    "MaskFile",
    "PruneSummary",
    "TensorReport",
    "block_of",
    "check_not_pruned",
    "convert_checkpoint",
    "fetch_default_model",
    "inspect_checkpoint",
    "open_checkpoint",
    "prune_checkpoint",
    "pruned_config",
    "read_default_masks",
    "read_maskllm",
    "rename_block",
    "resolve_checkpoint",
    "write_checkpoint",
    "write_maskllm",
]
