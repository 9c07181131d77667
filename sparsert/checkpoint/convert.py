"""From one form of a pruned checkpoint to another: ours, dense with zeros, or the tensors of compressed-tensors.

    sparsert            every linear of a block that is 2:4 is packed (docs/format.md), 9/16 of its 16-bit size
    sparse-24-bitmask   the same tensors under the keys of compressed-tensors
    dense               zeros and all, which every loader opens
    safetensors         as it is: packed stays packed, and only the files change; what comes from a format that has no
                        writer here (marlin-24, sparse-bitmask) becomes dense

The values are the same in all of them but for one thing: a -0.0 in a packed weight is a zero, and becomes +0.0. NaN and
infinite values are refused: no model has them, damaged files do. Each file is read back and compared before it counts
as written, and a conversion that was interrupted goes on with the file at which it stopped.

Which linears are 2:4 is found out first, because a file begins with what it holds; where the checkpoint does not say
it, that reads all block linears once more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsert.checkpoint.quantization import QUANT_METHOD, quantization_of, unsupported_quantization
from sparsert.checkpoint.reader import Checkpoint
from sparsert.checkpoint.shards import SHARD_BYTES
from sparsert.checkpoint.stored import BITMASK_24, DENSE
from sparsert.checkpoint.work import check_output
from sparsert.checkpoint.writer import SPARSERT, Form, write_checkpoint
from sparsert.errors import CheckpointError, InputError, UnsupportedError
from sparsert.formats.groups import count_groups, count_not_finite
from sparsert.formats.packed import PACKED_DTYPES

AS_IT_IS = "safetensors"

#: What a checkpoint can be converted to.
CONVERSIONS = (SPARSERT, DENSE, BITMASK_24, AS_IT_IS)


@dataclasses.dataclass(frozen=True)
class ConvertSummary:
    """What :func:`convert_checkpoint` wrote.

    Attributes:
        output: the new directory.
        target: ``sparsert``, ``dense``, ``sparse-24-bitmask`` or ``safetensors``.
        packed_linears: weights that are stored packed.
        dense_linears: block linears that are stored dense.
        source_bytes: bytes of the tensors of the source.
        total_bytes: bytes of the tensors written.
    """

    output: Path
    target: str
    packed_linears: int
    dense_linears: tuple[str, ...]
    source_bytes: int
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def convert_checkpoint(
    source: Checkpoint,
    output: str | Path,
    *,
    target: str = SPARSERT,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> ConvertSummary:
    """Write a checkpoint in another form.

    Args:
        source: the opened checkpoint, in any form that can be read.
        output: directory to create; an empty one may exist.
        target: one of :data:`CONVERSIONS`.
        shard_bytes: most bytes of tensors in one file.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        What was done.

    Raises:
        InputError: an unknown target, ``output`` is not free, or nothing of the source is 2:4.
        UnsupportedError: the source is quantized in a way that nothing here decodes.
        SparsityError: a weight that the source says is 2:4 is not.
        CheckpointError: the source is damaged or holds values that are not finite, or the target cannot be written.

    Example:
        >>> convert_checkpoint(open_checkpoint("PRUNED"), "PACKED").packed_linears  # doctest: +SKIP
        210
    """
    if target not in CONVERSIONS:
        raise InputError(f"cannot convert to {target!r}; choose one of {', '.join(CONVERSIONS)}")
    output = Path(output).expanduser()
    check_output(output)
    reason = unsupported_quantization(source.config)
    if reason is not None:
        raise UnsupportedError(f"{source.directory}: {reason} and cannot be converted; get the model in 16 bits")
    form = _form(source, target, progress)

    def checked(name: str, tensor: Tensor) -> Tensor:
        count = count_not_finite(tensor)
        if count:
            raise CheckpointError(
                f"{source.file(name)}: {count} of {tensor.numel()} values of {name!r} are NaN or infinite; the "
                "checkpoint is damaged, fetch it again"
            )
        return tensor

    total_bytes = write_checkpoint(
        source,
        output,
        transform=checked,
        form=form,
        checked_resume=True,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    dense = tuple(name for name in source.block_linears() if name not in form.packed)
    return ConvertSummary(output, target, len(form.packed), dense, source.total_nbytes, total_bytes)


def _form(source: Checkpoint, target: str, progress: bool) -> Form:
    """What of a checkpoint is written packed."""
    if target == DENSE:
        return Form(DENSE)
    already = frozenset(name for name in source.names if source.storage(name) == BITMASK_24)
    if target == AS_IT_IS:
        ours = quantization_of(source.config).get("quant_method") == QUANT_METHOD
        return Form(SPARSERT if ours else BITMASK_24 if already else DENSE, already)
    from tqdm import tqdm

    linears = [name for name in source.block_linears() if name not in already]
    # disable=None: tqdm stays silent when standard error is no terminal
    bar = tqdm(linears, unit="tensor", desc="looking for 2:4", disable=None if progress else True)
    packed = already | {name for name in bar if _is_two_of_four(source, name)}
    if not packed:
        raise InputError(
            f"{source.directory}: none of its {len(linears)} linear weights is 2:4, so there is nothing to pack; run "
            "`sparsert inspect` to see what they are, `sparsert prune` to prune them, or convert --to safetensors"
        )
    return Form(target, packed)


def _is_two_of_four(source: Checkpoint, name: str) -> bool:
    if source.shape(name)[1] % 4 or source.dtype(name) not in PACKED_DTYPES:
        return False
    # a claim is taken at its word here: packing refuses it if it is wrong
    return source.claims_two_of_four(name) or count_groups(source.read(name))[1] == 0
