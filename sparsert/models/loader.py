"""From a checkpoint to a model on its device, one tensor at a time.

Every name and shape is checked against the architecture before the first byte is read. Then each
linear layer of a block is read to the host, converted, moved, packed if it is 2:4, and let go of before
the next one comes: beside what is packed the device holds one dense layer at most. Blocks that the
plan skips are checked by name only and never read.

A weight is packed by the first of these that applies: the mask file's mask for it; what the mask maker
returns for it; its own zeros, if no group of four keeps more than two. Zeros that do not make 2:4
leave the layer dense, which the report says, unless the checkpoint claims of itself to be 2:4: then it
is damaged, and that is an error. Embedding, head and norms are always dense.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.checkpoint import Checkpoint, MaskFile
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.formats.groups import count_groups
from sparsert.models.config import DecoderConfig, LinearShape
from sparsert.models.decoder import DecoderBlock, DecoderModel
from sparsert.models.linears import dense_linear
from sparsert.models.placement import resolve_device, resolve_dtype
from sparsert.models.report import LinearRecord, LoadReport, dense_warning
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"

_BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")

#: Buffers that older releases of transformers stored; they follow from the configuration.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_NAMES_SHOWN = 4


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    plan: LayerPlan | None = None,
    masks: MaskFile | None = None,
    mask_maker: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> DecoderModel:
    """Load the blocks that run, packed where they are 2:4.

    Args:
        checkpoint: an opened model directory.
        device: ``"cpu"``, ``"cuda"``, ...; default a GPU if there is one.
        dtype: bfloat16, float16 or float32; weights are converted before they are packed. Default:
            see :func:`sparsert.models.placement.resolve_dtype`.
        plan: blocks to run, default all; what the checkpoint itself skips never runs.
        masks: an opened mask file, in the checkpoint's block numbering; it must fit the whole model.
        mask_maker: weight ``[out_features, in_features]`` on the device -> bool mask of the same shape.
        backend: which kernels the packed layers use, see ``sparsert.ops.linear24``.
        progress: show a bar on standard error.

    Returns:
        The model, in evaluation mode, without gradients; ``model.report`` says what was done.

    Raises:
        UnsupportedError: architecture, device, dtype or backend that cannot be run.
        CheckpointError: missing, unexpected or misshapen tensors, or masks of another model.
        SparsityError: a mask, or a weight that is said to be 2:4, keeps three or four of a group.
        InputError: a plan for another number of blocks.
    """
    config = DecoderConfig.from_hf(checkpoint.config)
    stored = LayerPlan.from_per_layer_config(config.num_blocks, checkpoint.config.get("per_layer_config"))
    plan = stored if plan is None else stored.intersect(plan)
    model = DecoderModel(config, plan)
    tied = _check_tensors(checkpoint, config, stored)
    if masks is not None:
        masks.check({name: checkpoint.shape(name) for name in _linear_names(config, stored)})
    target = resolve_device(device)
    reader = _Reader(checkpoint, target, resolve_dtype(dtype, target, checkpoint.dtype(NORM)))
    _check_backend(config, backend, reader.device, reader.dtype)
    linears: dict[str, LinearRecord] = {}
    notes: list[str] = []
    with torch.no_grad():
        _load_embeddings(model, reader, tied, notes)
        model.norm.weight = reader.parameter(NORM)
        for place, original in enumerate(_with_progress(plan.kept, progress)):
            block = model.blocks[place]
            assert isinstance(block, DecoderBlock)
            for norm in _BLOCK_NORMS:
                if _runs(plan, original, norm):
                    getattr(block, norm).weight = reader.parameter(f"model.layers.{original}.{norm}.weight")
            for name, shape in config.block_linears().items():
                if not _runs(plan, original, name):
                    continue
                full_name = f"model.layers.{original}.{name}.weight"
                linear, linears[full_name] = _load_linear(full_name, shape, reader, masks, mask_maker, backend)
                place_linear(block, name, linear)
                del linear
            if plan.runs_attention(original):
                block.self_attn.qkv_proj.join_()
            if plan.runs_mlp(original):
                block.mlp.gate_up_proj.join_()
    kept_dense = dense_warning(linears)
    if kept_dense:
        notes.append(kept_dense)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    model.report = LoadReport(linears, tuple(notes))
    return model.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads tensors in the dtype and onto the device of the model."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """One tensor; ``copy=False`` may return memory that the file is mapped to."""
        stored = self.checkpoint.read(name)
        # converted on the host, so the device never sees a wider copy; a copy is what outlives the file
        tensor = stored.to(self.dtype)
        if self.dtype == torch.float16 and stored.dtype != torch.float16 and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{name}: has values beyond float16's range (65504) or not finite; use --dtype bfloat16"
            )
        tensor = tensor.to(self.device)
        return tensor.clone() if copy and tensor.data_ptr() == stored.data_ptr() else tensor.contiguous()

    def parameter(self, name: str) -> nn.Parameter:
        """One tensor as a parameter without gradient."""
        return nn.Parameter(self.read(name), requires_grad=False)


def _check_backend(config: DecoderConfig, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before loading a backend that could not run the packed layers."""
    if backend == "torch":
        if device.type == "cpu":
            raise UnsupportedError("backend='torch' (torch.sparse) needs a GPU; use backend='auto' on the CPU")
        return
    shape = config.block_linears()["mlp.down_proj"]
    ops.explain(shape.out_features, shape.in_features, 1, device=device, dtype=dtype, backend=backend)


def _linear_names(config: DecoderConfig, stored: LayerPlan) -> Iterator[str]:
    for block in stored.kept:
        for name in config.block_linears():
            if _runs(stored, block, name):
                yield f"model.layers.{block}.{name}.weight"


def _runs(plan: LayerPlan, block: int, part: str) -> bool:
    """Whether a plan runs the half of a block that a norm or linear layer belongs to."""
    return plan.runs_attention(block) if part.startswith(("self_attn", "input_")) else plan.runs_mlp(block)


def _expected_shapes(config: DecoderConfig, stored: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors but embedding and head, of removed blocks too, but not of what the checkpoint skips."""
    expected: dict[str, tuple[int, ...]] = {NORM: (config.hidden_size,)}
    for block in stored.kept:
        prefix = f"model.layers.{block}."
        for norm in _BLOCK_NORMS:
            if _runs(stored, block, norm):
                expected[f"{prefix}{norm}.weight"] = (config.hidden_size,)
        for name, shape in config.block_linears().items():
            if not _runs(stored, block, name):
                continue
            expected[f"{prefix}{name}.weight"] = (shape.out_features, shape.in_features)
            if shape.bias:
                expected[f"{prefix}{name}.bias"] = (shape.out_features,)
    return expected


def _check_tensors(checkpoint: Checkpoint, config: DecoderConfig, stored: LayerPlan) -> bool:
    """Check names, shapes and dtypes; return whether the head is to share the embedding's matrix."""
    expected = _expected_shapes(config, stored)
    matrix = (config.vocab_size, config.hidden_size)
    # a tied checkpoint may hold the shared matrix under either name, or under both
    tied = config.tie_word_embeddings and (EMBEDDING not in checkpoint or HEAD not in checkpoint)
    expected.update({name: matrix for name in (EMBEDDING, HEAD) if not tied or name in checkpoint})
    if tied and EMBEDDING not in checkpoint and HEAD not in checkpoint:
        expected[EMBEDDING] = matrix
    where = checkpoint.directory
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing: {_shown(missing)}; the checkpoint is incomplete, or "
            f"config.json (num_hidden_layers {config.num_blocks}) is of another model"
        )
    unexpected = [name for name in checkpoint.names if name not in expected and not _DERIVED.search(name)]
    if unexpected:
        raise CheckpointError(
            f"{where}: {len(unexpected)} tensors are none of a {config.architecture} with {config.num_blocks} blocks: "
            f"{_shown(unexpected)}; config.json is of another model, or the weights are stored in another format"
        )
    misshapen = [
        f"{name} is {list(checkpoint.shape(name))}, need {list(shape)}"
        for name, shape in expected.items()
        if tuple(checkpoint.shape(name)) != shape
    ]
    if misshapen:
        raise CheckpointError(
            f"{where}: {len(misshapen)} tensors do not have the shape that config.json gives: {_shown(misshapen)}; "
            f"tensors and config.json are of different models"
        )
    wrong = [f"{name} is {checkpoint.dtype(name)}" for name in expected if checkpoint.dtype(name) not in _FLOAT_DTYPES]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors are not of a floating-point dtype that can be loaded: {_shown(wrong)}; "
            f"convert the checkpoint to bfloat16, float16 or float32"
        )
    return tied


def _shown(entries: list[str]) -> str:
    more = len(entries) - _NAMES_SHOWN
    return ", ".join(entries[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _load_embeddings(model: DecoderModel, reader: _Reader, tied: bool, notes: list[str]) -> None:
    """Load embedding and head; a tied head is the embedding's own storage."""
    embedding = EMBEDDING if EMBEDDING in reader.checkpoint else HEAD
    model.embed_tokens.weight = reader.parameter(embedding)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
        return
    head = reader.parameter(HEAD)
    if model.config.tie_word_embeddings:
        # both stored although config.json ties them: as in transformers, equal ones are shared
        if torch.equal(head, model.embed_tokens.weight):
            head = model.embed_tokens.weight
        else:
            notes.append(f"config.json ties the head to the embedding, but {HEAD} differs; both are used as stored")
    model.lm_head.weight = head


def _load_linear(
    name: str,
    shape: LinearShape,
    reader: _Reader,
    masks: MaskFile | None,
    mask_maker: Callable[[Tensor], Tensor] | None,
    backend: str,
) -> tuple[nn.Module, LinearRecord]:
    """Load one linear layer of a block, packed if it is 2:4."""
    weight = reader.read(name, copy=False)
    bias = reader.read(name.removesuffix("weight") + "bias") if shape.bias else None
    mask, reason, packable = _find_mask(name, weight, reader.checkpoint, masks, mask_maker)
    if packable:
        packed = ops.pack(weight, mask, name=name)
        record = LinearRecord("2:4", reason, packed.nbytes, weight.nbytes)
        return SparseLinear.from_packed(packed, bias, backend=backend), record
    if reader.device.type == "cpu":
        weight = weight.clone()  # may be mapped to the file
    return dense_linear(weight, bias), LinearRecord("dense", reason, weight.nbytes, weight.nbytes)


def _find_mask(
    name: str,
    weight: Tensor,
    checkpoint: Checkpoint,
    masks: MaskFile | None,
    mask_maker: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor | None, str, bool]:
    """Mask of a weight (None: its own zeros), where it comes from, and whether to pack."""
    if weight.shape[1] % 4:
        return None, f"input width {weight.shape[1]} is no multiple of 4", False
    if masks is not None and name in masks:
        return masks.mask(name, tuple(weight.shape)).to(weight.device), "mask file", True
    if mask_maker is not None:
        return mask_maker(weight), "mask maker", True
    if checkpoint.claims_two_of_four(name):
        return None, "zeros in the weight", True  # packing refuses it if the claim is wrong
    _, too_full, _ = count_groups(weight)
    if too_full == 0:
        return None, "zeros in the weight", True
    return None, f"{too_full} of {weight.numel() // 4} groups of four keep more than 2 values", False


def place_linear(block: DecoderBlock, name: str, linear: nn.Module) -> None:
    """Put a loaded layer where the block runs it; ``name`` is e.g. ``self_attn.q_proj``."""
    part, _, leaf = name.partition(".")
    owner = getattr(block, part)
    for group in ("qkv_proj", "gate_up_proj"):
        parts = getattr(owner, group, None)
        if parts is not None and leaf in parts.parts:
            parts.parts[leaf] = linear
            return
    setattr(owner, leaf, linear)


def _with_progress(blocks: tuple[int, ...], progress: bool) -> Iterator[int]:
    if not progress:
        yield from blocks
        return
    from tqdm import tqdm

    yield from tqdm(blocks, desc="loading", unit="block", disable=None)  # None: silent unless on a terminal
