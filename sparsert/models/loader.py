"""From a checkpoint to a model on its device, one tensor at a time.

Every name and shape is checked against the architecture before the first byte is read. Then each
linear layer of a block is read onto the device, packed if it is 2:4, and let go of before the next one
comes: beside what is packed the device holds one dense layer at most, the host a small ring of pieces
(``sparsert/checkpoint/staging.py``). Blocks that the plan skips are checked by name only and never read.

A weight is packed by the first of these that applies: the mask file's mask for it; what the mask maker
returns for it; the checkpoint, which holds it packed and is read as it is (docs/format.md); its own zeros,
if no group of four keeps more than two. Zeros that do not make 2:4 leave the layer dense, which the report
says, unless the checkpoint claims of itself to be 2:4: then it is damaged, and that is an error. Embedding,
head and norms are always dense. Values that are not finite are refused.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.checkpoint import Checkpoint, MaskFile
from sparsert.checkpoint.mask_stream import MaskStream
from sparsert.checkpoint.stored import BITMASK_24
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.formats import Packed24
from sparsert.models.config import DecoderConfig, LinearShape
from sparsert.models.decoder import DecoderBlock, DecoderModel
from sparsert.models.linears import dense_linear
from sparsert.models.model_reader import ModelReader
from sparsert.models.names import StoredLinear, TensorNames
from sparsert.models.placement import resolve_device, resolve_dtype
from sparsert.models.report import LinearRecord, LoadReport, dense_warning
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

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
        plan: blocks to run, default all.
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
    plan = plan or LayerPlan.full(config.num_blocks)
    model = DecoderModel(config, plan)
    names = TensorNames(config, checkpoint)
    tied = _check_tensors(checkpoint, config, names)
    if masks is not None:
        masks.check({name: checkpoint.shape(name) for name in names.linear_tensors()})
    target = resolve_device(device)
    run_dtype = resolve_dtype(dtype, target, checkpoint.dtype(f"{names.norm}.weight"))
    _check_backend(config, backend, target, run_dtype)
    linears: dict[str, LinearRecord] = {}
    notes: list[str] = []
    with torch.no_grad(), contextlib.ExitStack() as opened:
        reader = ModelReader(opened.enter_context(TensorStream(checkpoint, target)), run_dtype)
        given = None
        if masks is not None:
            shapes = {name: checkpoint.shape(name) for name in names.linear_tensors(plan)}
            given = opened.enter_context(MaskStream(masks, shapes, target))
        _load_embeddings(model, names, reader, tied, notes)
        model.norm.weight, model.norm.bias = reader.norm(names.norm, config.norm)
        for place, original in enumerate(_with_progress(plan.kept, progress)):
            block = model.blocks[place]
            assert isinstance(block, DecoderBlock)
            for name in config.block_norms(original, plan):
                place_norm(block, name, *reader.norm(names.block_norm(original, name), config.norm))
            for name, shape in config.block_linears(original, plan).items():
                stored = names.block_linear(original, name)
                linear, linears[stored.label] = _load_linear(stored, shape, reader, given, mask_maker, backend)
                place_linear(block, name, linear)
                del linear
            reader.check()
            join_groups_(block)
        reader.check()
    kept_dense = dense_warning(linears)
    if kept_dense:
        notes.append(kept_dense)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    model.report = LoadReport(linears, tuple(notes))
    return model.eval().requires_grad_(False)


def _check_backend(config: DecoderConfig, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before loading a backend that could not run the packed layers."""
    if backend == "torch":
        if device.type == "cpu":
            raise UnsupportedError("backend='torch' (torch.sparse) needs a GPU; use backend='auto' on the CPU")
        return
    for block in range(config.num_blocks):
        for shape in config.block_linears(block).values():
            ops.explain(shape.out_features, shape.in_features, 1, device=device, dtype=dtype, backend=backend)
            return  # one layer stands for all


def _check_tensors(checkpoint: Checkpoint, config: DecoderConfig, names: TensorNames) -> bool:
    """Check names, shapes and dtypes; return whether the head is to share the embedding's matrix."""
    expected = names.expected()
    matrix = (config.vocab_size, config.hidden_size)
    # a tied checkpoint may hold the shared matrix under either name, or under both
    stored = [name for name in (names.embedding, names.head) if name in checkpoint]
    tied = config.tie_word_embeddings and len(stored) < 2
    expected.update(dict.fromkeys((stored or [names.embedding]) if tied else (names.embedding, names.head), matrix))
    where = checkpoint.directory
    missing = [name for name in expected if name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing: {_shown(missing)}; the checkpoint is incomplete, or "
            f"config.json (num_hidden_layers {config.num_blocks}) is of another model"
        )
    unexpected = [
        name
        for name in checkpoint.names
        if name not in expected and not names.is_absent(name) and not _DERIVED.search(name)
    ]
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


def _load_embeddings(
    model: DecoderModel, names: TensorNames, reader: ModelReader, tied: bool, notes: list[str]
) -> None:
    """Load embedding and head; a tied head is the embedding's own storage."""
    embedding = names.embedding if names.embedding in reader.checkpoint else names.head
    model.embed_tokens.weight = reader.parameter(embedding)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
        return
    head = reader.parameter(names.head)
    if model.config.tie_word_embeddings:
        # both stored although config.json ties them: as in transformers, equal ones are shared
        if torch.equal(head, model.embed_tokens.weight):
            head = model.embed_tokens.weight
        else:
            notes.append(
                f"config.json ties the head to the embedding, but {names.head} differs; both are used as stored"
            )
    model.lm_head.weight = head


def _load_linear(
    stored: StoredLinear,
    shape: LinearShape,
    reader: ModelReader,
    masks: MaskStream | None,
    mask_maker: Callable[[Tensor], Tensor] | None,
    backend: str,
) -> tuple[nn.Module, LinearRecord]:
    """Load one linear layer of a block, packed if it is 2:4."""
    name = f"{stored.tensor}.weight"
    as_stored = reader.checkpoint.storage(name) == BITMASK_24 and shape.in_features % 4 == 0
    if as_stored and mask_maker is None and (masks is None or name not in masks):
        bias = reader.read(f"{stored.tensor}.bias", stored.rows) if shape.bias else None
        packed = reader.read_packed(stored)
        dense_bytes = shape.out_features * shape.in_features * reader.dtype.itemsize
        record = LinearRecord("2:4", "packed in the checkpoint", packed.nbytes, dense_bytes)
        return SparseLinear.from_packed(packed, bias, backend=backend), record
    weight = reader.read(f"{stored.tensor}.weight", stored.rows)
    bias = reader.read(f"{stored.tensor}.bias", stored.rows) if shape.bias else None
    packed24, reason = _pack(stored, weight, reader.checkpoint, masks, mask_maker)
    if packed24 is not None:
        record = LinearRecord("2:4", reason, packed24.nbytes, weight.nbytes)
        return SparseLinear.from_packed(packed24, bias, backend=backend), record
    return dense_linear(weight, bias), LinearRecord("dense", reason, weight.nbytes, weight.nbytes)


def _pack(
    stored: StoredLinear,
    weight: Tensor,
    checkpoint: Checkpoint,
    masks: MaskStream | None,
    mask_maker: Callable[[Tensor], Tensor] | None,
) -> tuple[Packed24 | None, str]:
    """A weight packed, and by what; or None, and why it stays dense."""
    name = f"{stored.tensor}.weight"
    if weight.shape[1] % 4:
        return None, f"input width {weight.shape[1]} is no multiple of 4"
    if masks is not None and name in masks:
        mask = masks.mask(name, tuple(checkpoint.shape(name)))
        mask = mask if stored.rows is None else mask[slice(*stored.rows)]
        return ops.pack(weight, mask, name=stored.label), "mask file"
    if mask_maker is not None:
        return ops.pack(weight, mask_maker(weight), name=stored.label), "mask maker"
    if checkpoint.claims_two_of_four(name):
        return ops.pack(weight, name=stored.label), "zeros in the weight"  # refused if the claim is wrong
    packed, too_full = ops.pack_if_24(weight, name=stored.label)
    if packed is None:
        return None, f"{too_full} of {weight.numel() // 4} groups of four keep more than 2 values"
    return packed, "zeros in the weight"


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


def place_norm(block: DecoderBlock, name: str, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Put the weights of a norm where the block uses them; ``name`` is e.g. ``mlp_norm`` or ``self_attn.q_norm``."""
    part, _, leaf = name.rpartition(".")
    if part:
        setattr(getattr(block, part), leaf, weight)
    else:
        norm = getattr(block, leaf)
        norm.weight, norm.bias = weight, bias


def join_groups_(block: DecoderBlock) -> None:
    """Join projections that read the same input, where they are of one kind."""
    if block.self_attn is not None:
        block.self_attn.qkv_proj.join_()
    if block.mlp is not None:
        block.mlp.gate_up_proj.join_(interleave=block.mlp.gated)


def _with_progress(blocks: tuple[int, ...], progress: bool) -> Iterator[int]:
    if not progress:
        yield from blocks
        return
    from tqdm import tqdm

    yield from tqdm(blocks, desc="loading", unit="block", disable=None)  # None: silent unless on a terminal
