"""The tensors of a checkpoint in the dtype and on the device of the model that is loaded, checked for damage.

Whether values are finite and bitmasks 2:4 is asked on the device and answered a block at a time: an answer for each
tensor would let device and disk wait for each other once a tensor. What was loaded before a bad answer is thrown away
with the error. What it gives up: the bitmasks of a block, a sixteenth of its dense size, are held until then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.errors import CheckpointError, InputError, SparsityError
from sparsert.formats import Packed24
from sparsert.models.config import NormConfig
from sparsert.models.names import StoredLinear


class ModelReader:
    """Reads what a model is made of.

    Args:
        stream: tensors of the checkpoint on the model's device.
        dtype: of the model.

    Attributes:
        checkpoint: where tensors come from.
        dtype: as given.
    """

    def __init__(self, stream: TensorStream, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = stream.checkpoint, dtype
        self._stream = stream
        #: on the device, whether something is right, and what raises if it is not
        self._unchecked: list[tuple[Tensor, Callable[[], None]]] = []

    def read(self, name: str, rows: tuple[int, int] | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, or some of its rows, in ``dtype`` or else the model's."""
        tensor = self._stream.read(name, dtype or self.dtype, rows)
        self._check_later(name, tensor)
        return tensor

    def read_packed(self, stored: StoredLinear) -> Packed24:
        """A weight that stands packed in its file, without making it dense on the way.

        Raises:
            CheckpointError: its parts are damaged.
        """
        name = f"{stored.tensor}.weight"
        compressed, bitmask = self._stream.read_packed(name, self.dtype, stored.rows)
        self._check_later(name, compressed)
        columns = self.checkpoint.shape(name)[1]
        with self._as_damage(name):
            packed, bad = ops.pack_bitmask_unchecked(compressed, bitmask, columns, name=stored.label)

        def refuse() -> None:
            with self._as_damage(name):
                ops.refuse_bitmask(bitmask, columns, stored.label)

        self._unchecked.append((bad == 0, refuse))
        return packed

    def parameter(self, name: str, *, dtype: torch.dtype | None = None) -> nn.Parameter:
        """One tensor as a parameter without gradient."""
        return nn.Parameter(self.read(name, dtype=dtype), requires_grad=False)

    def norm(self, name: str, config: NormConfig) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight of a norm as it is multiplied, and its bias; in float32 if the checkpoint holds ``weight - 1``."""
        dtype = torch.float32 if config.stored_minus_one else self.dtype
        weight = self.parameter(f"{name}.weight", dtype=dtype)
        if config.stored_minus_one:
            weight.add_(1)
        return weight, self.parameter(f"{name}.bias", dtype=dtype) if config.centered else None

    def check(self) -> None:
        """Refuse what is damaged in all that was read since the last call; waits for the device.

        Raises:
            CheckpointError: a tensor holds NaN or infinite values, or float16 cannot hold them; a bitmask is no 2:4.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        right = torch.stack([flag for flag, _ in unchecked]).tolist()
        for is_right, (_, refuse) in zip(right, unchecked, strict=True):
            if not is_right:
                refuse()

    def _check_later(self, name: str, tensor: Tensor) -> None:
        """Remember to ask whether the values of a tensor are finite."""
        if not tensor.numel():
            return
        dtype = tensor.dtype

        def refuse() -> None:
            if dtype == torch.float16 and self.checkpoint.dtype(name) != torch.float16:
                raise CheckpointError(
                    f"{name}: has values beyond float16's range (65504) or not finite; use --dtype bfloat16"
                )
            raise CheckpointError(
                f"{self.checkpoint.file(name)}: {name!r} holds NaN or infinite values; the checkpoint is damaged, "
                "fetch it again"
            )

        # of extremes, because isfinite() would take as much memory again, and both pass a NaN on
        self._unchecked.append((torch.stack(torch.aminmax(tensor)).isfinite().all(), refuse))

    @contextlib.contextmanager
    def _as_damage(self, name: str) -> Iterator[None]:
        """What is wrong with the parts of a tensor is damage of its file."""
        try:
            yield
        except (InputError, SparsityError) as error:
            raise CheckpointError(f"{self.checkpoint.file(name)}: {error}") from error
