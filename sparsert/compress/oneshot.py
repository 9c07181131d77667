"""One-shot 2:4 masks of a whole model: magnitude, Wanda or SparseGPT, block by block.

Each block sees the text as the pruned blocks in front of it hand it on, as published: its linear layers are pruned from
what goes into them, then the text goes through the pruned block to the next one. Layers of one block are pruned
together, from inputs of the block as it was.

Memory is that of the model on the host, and on the device one block, its Hessians (fp32, the largest is that of the
layer with the most inputs: 4 x 11008^2 = 485 MB for Llama-2-7B) and the calibration text's states: a model of 7 billion
fits on a GPU of 16 GB. Head, embeddings and norms stay dense, and so does what ``keep_dense`` names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy, block_of
from sparsert.compress.calibration import CalibrationStates, watching_inputs
from sparsert.compress.magnitude import magnitude_mask
from sparsert.compress.sparsegpt import BLOCK_SIZE, DAMPING, Hessian, sparsegpt
from sparsert.compress.wanda import InputNorms, wanda_mask
from sparsert.errors import InputError

#: What is known of the inputs of a layer.
Statistics = InputNorms | Hessian | None

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclasses.dataclass(frozen=True)
class OneShotSettings:
    """How to choose masks.

    Attributes:
        method: one of :data:`METHODS`.
        update_weights: SparseGPT also changes the weights that stay, so that they make up for those that go.
        damping, block_size: of SparseGPT.

    Raises:
        InputError: an unknown method, or an update that the method does not have.
    """

    method: str = "sparsegpt"
    update_weights: bool = False
    damping: float = DAMPING
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.update_weights and self.method != "sparsegpt":
            raise InputError(f"{self.method} changes no weights; update_weights goes with sparsegpt only")
        if not self.damping > 0:
            raise InputError(f"damping is {self.damping}; it must be above 0")

    @property
    def needs_text(self) -> bool:
        """Whether a calibration text is read."""
        return self.method != "magnitude"


def maskable_linears(anatomy: Anatomy, keep_dense: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Linear layers of the blocks that get a mask, by module name.

    Args:
        anatomy: of the model.
        keep_dense: patterns of module names that stay dense, as a shell's: ``*.layers.29.*``, ``*.o_proj``.

    Raises:
        InputError: a pattern that no layer matches, or nothing is left.
    """
    linears = anatomy.block_linears()
    for pattern in keep_dense:
        if not fnmatch.filter(linears, pattern):
            raise InputError(
                f"keep_dense {pattern!r} matches no linear layer of a block; the first is called {next(iter(linears))}"
            )
    left = {
        name: linear
        for name, linear in linears.items()
        if linear.in_features % 4 == 0 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep_dense)
    }
    if not left:
        raise InputError("no linear layer is left to mask; keep fewer of them dense")
    return left


def prune_blocks_(
    anatomy: Anatomy,
    settings: OneShotSettings,
    tokens: Tensor | None = None,
    *,
    keep_dense: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[str, Tensor]]:
    """Prune a model in place and hand out the masks as they are made.

    Args:
        anatomy: of the model; may lie on the host, blocks are moved to ``device`` one at a time and back.
        settings: how.
        tokens: calibration text, int64 ``[windows, window]``; magnitude needs none.
        keep_dense: see :func:`maskable_linears`.
        masks: masks to take instead of choosing any, by module name: with ``update_weights`` the weights are then
            fitted to them.
        device: where to compute, default where the model is.
        batch_size: windows of one forward.

    Yields:
        ``(module name, mask)``, a bool mask on the device, block by block. When a block's masks have been handed
        out, its weights are zero where they say so, and updated if asked for.

    Raises:
        InputError: no text for a method that needs it, or a weight that cannot be masked.
    """
    linears = maskable_linears(anatomy, keep_dense)
    home = anatomy.embedding.weight.device
    target = home if device is None else torch.device(device)
    needs_text = settings.needs_text and (masks is None or settings.update_weights)
    if needs_text and tokens is None:
        raise InputError(f"{settings.method} needs a calibration text; give some windows")
    states = None
    if needs_text and tokens is not None:
        states = CalibrationStates(anatomy, tokens, device=target, batch_size=batch_size)
    for index, block in enumerate(anatomy.blocks):
        block.to(target)
        members = {name: linear for name, linear in linears.items() if block_of(f"{name}.") == index}
        groups: list[tuple[dict[str, nn.Linear], Statistics]] = [
            ({name: linear}, None) for name, linear in members.items()
        ]
        if states is not None:
            groups = _inputs(states, index, members, settings)
        for group, statistics in groups:
            fixed = None if masks is None else torch.cat([masks[name].to(target) for name in group])
            made = _prune_group_(group, statistics, settings, fixed)
            yield from zip(group, made, strict=True)
        if states is not None:
            states.run(index, keep=True)
        block.to(home)


def _inputs(
    states: CalibrationStates, index: int, members: dict[str, nn.Linear], settings: OneShotSettings
) -> list[tuple[dict[str, nn.Linear], Statistics]]:
    """What goes into the layers of a block; layers that read the same tensor are one group."""
    kind: type[InputNorms] | type[Hessian] = Hessian if settings.method == "sparsegpt" else InputNorms
    found: dict[tuple[str, ...], InputNorms | Hessian] = {}

    def see(names: tuple[str, ...], inputs: Tensor) -> None:
        if names not in found:
            found[names] = kind(inputs.shape[-1], inputs.device)
        found[names].add(inputs)

    if members:
        with watching_inputs(members, see):
            states.run(index, keep=False)
    return [({name: members[name] for name in names}, statistics) for names, statistics in found.items()]


@torch.no_grad()
def _prune_group_(
    group: dict[str, nn.Linear], statistics: Statistics, settings: OneShotSettings, mask: Tensor | None
) -> list[Tensor]:
    """Prune layers that read the same inputs, as one layer with the outputs of all: rows do not know of each other."""
    name = ", ".join(group)
    weight = torch.cat([linear.weight for linear in group.values()])
    if isinstance(statistics, Hessian):
        mask, updated = sparsegpt(
            weight, statistics, mask=mask, damping=settings.damping, block_size=settings.block_size, name=name
        )
        weight = updated if settings.update_weights else weight
    elif mask is None:
        mask = magnitude_mask(weight, name=name) if statistics is None else wanda_mask(weight, statistics, name=name)
    weight = weight.masked_fill(~mask, 0)
    rows = [linear.out_features for linear in group.values()]
    for linear, part in zip(group.values(), weight.split(rows), strict=True):
        linear.weight.copy_(part)
    return list(mask.split(rows))
