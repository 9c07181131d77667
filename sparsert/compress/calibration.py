"""Hidden states of a calibration text, carried through a model block by block.

One-shot pruning looks at what goes into each layer, and what goes into a block depends on how the blocks in front of it
were pruned. So the text goes through the model once, a block at a time: the states behind block N are kept, and go into
block N + 1 when that has been dealt with. At any time one block is on the device, and the states of the text (128
windows of 2048 at width 4096 in bf16: 2.1 GB) on the device or on the host.

What a block is given beside the states (rotation, masks) is recorded from the model's own forward, run with blocks that
hand on what they get: whatever a family passes to its blocks, by whatever rule (Gemma's alternating windows), arrives
as it would in the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.skipping import replaced_forwards


class CalibrationStates:
    """The hidden states in front of the next block.

    Attributes:
        device: where blocks run.

    Args:
        anatomy: of the model; its embedding is where its weights are.
        tokens: int64 ``[windows, window]``.
        device: where blocks run.
        batch_size: windows of one forward.
        on_host: keep states in host memory; None: on the device if they fill less than a quarter of what is free.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Tensor,
        *,
        device: torch.device,
        batch_size: int = 8,
        on_host: bool | None = None,
    ) -> None:
        self.device = device
        self._blocks = anatomy.blocks
        self._states: list[Tensor] = []
        self._given: dict[int, list[dict[str, Any]]] = {}  # by windows in a batch: what each block is given
        home = anatomy.embedding.weight
        if on_host is None:
            needed = tokens.numel() * anatomy.embedding.embedding_dim * home.element_size()
            on_host = device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0] // 4
        self._storage = torch.device("cpu") if on_host else device
        for batch in tokens.split(batch_size):
            states, given = _record(anatomy, batch.to(home.device))
            self._states.append(states.to(self._storage))
            if len(batch) not in self._given:
                self._given[len(batch)] = _moved(given, device, {})

    @torch.no_grad()
    def run(self, index: int, *, keep: bool) -> None:
        """Send all states through a block, which must be on :attr:`device`.

        Args:
            index: of the block.
            keep: its outputs become the states; otherwise only hooks see them.
        """
        for number, states in enumerate(self._states):
            output = self._blocks[index](states.to(self.device), **self._given[len(states)][index])
            if keep:
                # blocks of older versions of transformers returned a tuple
                hidden = output[0] if isinstance(output, tuple) else output
                self._states[number] = hidden.to(self._storage)


@contextlib.contextmanager
def watching_inputs(linears: dict[str, nn.Linear], see: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
    """Show the inputs of linear layers; layers that read the same tensor (q, k and v; gate and up) are shown once.

    Args:
        linears: by name, all of one block.
        see: called with the names of the layers that read a tensor, and the tensor, after each forward of the
            last of ``linears`` to run.
    """
    reading: dict[int, tuple[Tensor, list[str]]] = {}
    seen: set[str] = set()

    def note(name: str, inputs: Tensor) -> None:
        # the tensor is held, so that no other one can get its identity
        reading.setdefault(id(inputs), (inputs, []))[1].append(name)
        seen.add(name)
        if len(seen) == len(linears):
            for tensor, names in reading.values():
                see(tuple(names), tensor)
            reading.clear()
            seen.clear()

    hooks = [
        linear.register_forward_pre_hook(lambda module, arguments, name=name: note(name, arguments[0]))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _record(anatomy: Anatomy, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """States in front of the first block, and what every block is given beside them."""
    given: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def hand_on(hidden_states: Tensor, **options: Any) -> Tensor:
        if not first:
            first.append(hidden_states)
        given.append(options)
        return hidden_states

    with replaced_forwards(dict.fromkeys(anatomy.blocks, hand_on)):
        anatomy.hidden(tokens)
    return first[0], given


def _moved(value: Any, device: torch.device, done: dict[int, Tensor]) -> Any:
    """The same with every tensor on a device; what all blocks are given, such as a mask, is moved once."""
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = value.to(device)
        return done[id(value)]
    if isinstance(value, dict):
        return {key: _moved(item, device, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device, done) for item in value)
    return value
