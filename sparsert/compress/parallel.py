"""Several processes, one GPU each, that train the same parameters: what a training loop needs of it, and no more.

Started by ``accelerate launch`` or ``torchrun``, every process holds the whole model, reads its part of each batch, and
the gradients are averaged before the update; started alone, all of this is nothing. Gradients are summed by hand
rather than by a wrapper around the model: what is trained here (mask logits, LoRA, a student beside its teacher) is not
always reached through one module's forward, which is what DistributedDataParallel watches. What it gives up is the
overlap of that sum with the backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsert.errors import UnsupportedError


class Processes:
    """The processes of this run.

    Attributes:
        count: how many there are.
        index: which of them this is.
        device: the GPU of this process, or the CPU.

    Args:
        device: where a process that is alone works, default a GPU if there is one; of several each takes its own GPU,
            unless this is the CPU.

    Raises:
        UnsupportedError: several processes, and accelerate is not installed.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = 0
        if self.count == 1:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            return
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise UnsupportedError(
                f"training in {self.count} processes needs accelerate ({error}); run pip install accelerate"
            ) from error
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu")
        self.count, self.index, self.device = state.num_processes, state.process_index, state.device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and shows progress."""
        return self.index == 0

    def part(self, tokens: Tensor) -> Tensor:
        """The rows of a batch that this process reads; the batch size must be a multiple of :attr:`count`."""
        return tokens.tensor_split(self.count)[self.index]

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
                tensor /= self.count

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()
