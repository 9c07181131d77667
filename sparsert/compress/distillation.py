"""Knowledge distillation: a pruned student learns to say what its unpruned teacher says.

    L = label_weight * L_label + logit_weight * L_logit + alpha * L_state

    L_label   negative log-likelihood of the text itself
    L_logit   T^2 * KL(softmax(teacher / T) || softmax(student / T)), forward, mean over all tokens
    L_state   mean over pairs of blocks of 1 - cos(P student, teacher), or of the mean square of the difference; the
              token embeddings count as one more pair if asked for
    alpha     state_weight, or L_logit / L_state at every step (detached), which keeps the two of one size

Logits alone, forward, T = 1 and without the label loss is what both papers end up with and is the default; states help
when much depth is gone. Where the student is narrower, one projection P, shared by all pairs, lifts its states to the
teacher's width; it is trained along and thrown away afterwards.

Logits of teacher and student exist for a chunk of tokens at a time (:mod:`sparsert.compress.head_loss`), so a
vocabulary of 128k costs as much memory as one of 32k. What it gives up: the teacher runs beside the student in every
step; nothing of it is stored, since logits of a corpus would take a terabyte.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (arXiv 2407.14679),
section 3; T^2: Hinton et al. (arXiv 1503.02531), section 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.block_scores import observing
from sparsert.compress.head_loss import LOGIT_BYTES, TokenLoss, head_loss, next_tokens
from sparsert.errors import InputError

if TYPE_CHECKING:
    from sparsert.compress.training import Position

STATE_LOSSES = ("cosine", "mse")


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """What the student is to copy.

    Attributes:
        logit_weight: weight of the difference of logits; 0: none.
        label_weight: weight of the text's own likelihood; 0: none.
        temperature: both distributions are softened by it.
        state_pairs: (student block, teacher block) whose outputs are to agree; empty: none.
        embedding: the token embeddings are to agree as well.
        state_loss: one of :data:`STATE_LOSSES`.
        state_weight: weight of the states; None: the ratio of the losses at each step.

    Raises:
        InputError: a value out of range, or nothing to learn.
    """

    logit_weight: float = 1.0
    label_weight: float = 0.0
    temperature: float = 1.0
    state_pairs: tuple[tuple[int, int], ...] = ()
    embedding: bool = False
    state_loss: str = "cosine"
    state_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("logit_weight", "label_weight", "state_weight"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} is {value}; it must not be negative")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it must be above 0")
        if self.state_loss not in STATE_LOSSES:
            raise InputError(f"state_loss {self.state_loss!r} is not known; choose one of {', '.join(STATE_LOSSES)}")
        if self.states and self.state_weight is None and not self.logit_weight:
            raise InputError("without logits there is no ratio of losses; give state_weight a number")
        if not (self.logit_weight or self.label_weight or (self.states and self.state_weight)):
            raise InputError("every weight is 0, so there is nothing to learn; give one of them a positive value")

    @property
    def states(self) -> bool:
        """Whether hidden states or embeddings are compared."""
        return bool(self.state_pairs) or self.embedding


def pair_blocks(
    student_blocks: int, teacher_blocks: int, kept: Sequence[int] | None, students: Sequence[int] = ()
) -> tuple[tuple[int, int], ...]:
    """Which blocks of student and teacher are to agree.

    Args:
        student_blocks, teacher_blocks: how many each has.
        kept: teacher's block for every block of the student, as a plan says; None: spread evenly.
        students: blocks of the student to pair; empty: the last but one and the one in the middle.

    Returns:
        (student block, teacher block), ascending. A student's block answers for the teacher's blocks that were removed
        behind it, so its partner is the last one in front of the next kept block.

    Raises:
        InputError: a block that does not exist, or a plan of another length.

    Example:
        >>> pair_blocks(4, 6, [0, 1, 4, 5], [1, 2])
        ((1, 3), (2, 4))
    """
    if kept is not None and len(kept) != student_blocks:
        raise InputError(f"the plan keeps {len(kept)} blocks and the student has {student_blocks}; they must agree")
    chosen = sorted(set(students)) or sorted({student_blocks // 2, max(0, student_blocks - 2)})
    pairs = []
    for block in chosen:
        if not 0 <= block < student_blocks:
            raise InputError(f"the student has no block {block}; its blocks are 0-{student_blocks - 1}")
        if kept is None:
            partner = (block + 1) * teacher_blocks // student_blocks - 1
        else:
            partner = (kept[block + 1] if block + 1 < student_blocks else teacher_blocks) - 1
        pairs.append((block, partner))
    return tuple(pairs)


class Distillation:
    """The loss of a student beside its teacher; :class:`sparsert.compress.training.Trainer` calls it.

    Attributes:
        projection: ``[teacher hidden, student hidden]``, to be trained along; None where widths agree or states are
            not compared.
        last: the parts of the latest loss by name, detached: ``label``, ``logit``, ``state``.

    Args:
        student, teacher: anatomies; the teacher is frozen by whoever made it.
        settings: what to copy.
        logit_bytes: see :func:`sparsert.compress.head_loss.head_loss`.
        seed: of the projection's first values.

    Raises:
        InputError: different vocabularies, or a block that does not exist.
    """

    def __init__(
        self,
        student: Anatomy,
        teacher: Anatomy,
        settings: DistillationSettings,
        *,
        logit_bytes: int = LOGIT_BYTES,
        seed: int = 0,
    ) -> None:
        words = [anatomy.head.weight.shape[0] for anatomy in (student, teacher)]
        if words[0] != words[1]:
            raise InputError(
                f"the student's vocabulary has {words[0]} entries, the teacher's {words[1]}; the teacher must be the "
                f"model that the student was pruned from, or one with the same tokenizer"
            )
        for block, partner in settings.state_pairs:
            for who, anatomy, index in (("student", student, block), ("teacher", teacher, partner)):
                if not 0 <= index < anatomy.num_blocks:
                    raise InputError(f"the {who} has no block {index}; its blocks are 0-{anatomy.num_blocks - 1}")
        self.student, self.teacher, self.settings = student, teacher, settings
        self.last: dict[str, Tensor] = {}
        self._logit_bytes = logit_bytes
        self.projection: nn.Parameter | None = None
        widths = [anatomy.embedding.embedding_dim for anatomy in (student, teacher)]
        if settings.states and widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            # orthonormal columns: lengths and angles of the student's states are kept at first
            start = torch.linalg.qr(torch.randn(max(widths), min(widths), generator=generator))[0]
            start = start if widths[1] > widths[0] else start.T
            self.projection = nn.Parameter(start.contiguous().to(student.embedding.weight.device))

    def __call__(self, tokens: Tensor, position: Position | None = None) -> Tensor:
        """The loss of a batch, a scalar; ``tokens``: int64 ``[windows, window]`` on the student's device."""
        settings = self.settings
        with torch.no_grad(), _states(self.teacher, [pair[1] for pair in settings.state_pairs]) as theirs:
            teacher_hidden = self.teacher.hidden(tokens) if self._needs_teacher else None
        with _states(self.student, [pair[0] for pair in settings.state_pairs]) as ours:
            hidden = self.student.hidden(tokens)
        self.last = {}
        total = torch.zeros((), device=tokens.device)
        if settings.label_weight or settings.logit_weight:
            # of every token of a window but the last, which has no label
            counts = tokens.numel() - len(tokens), tokens.numel()
            scale = settings.temperature**2
            loss = TokenLoss(
                next_tokens(tokens) if settings.label_weight else None,
                self.teacher if settings.logit_weight else None,
                teacher_hidden.flatten(0, 1) if settings.logit_weight and teacher_hidden is not None else None,
                label_weight=settings.label_weight * counts[1] / counts[0],
                teacher_weight=settings.logit_weight * scale,
                temperature=settings.temperature,
            )
            weighted, sums = head_loss(self.student, hidden.flatten(0, 1), loss, logit_bytes=self._logit_bytes)
            total = total + weighted / counts[1]
            if settings.label_weight:
                self.last["label"] = sums[0] / counts[0]
            if settings.logit_weight:
                self.last["logit"] = sums[1] * scale / counts[1]
        if settings.states:
            state = self._state_loss(ours, theirs)
            weight = settings.state_weight
            if weight is None:
                # as large as the difference of logits, whatever the scale of the states
                ratio = self.last["logit"] / state.detach().clamp_min(torch.finfo(torch.float32).tiny)
                total = total + ratio * state
            else:
                total = total + weight * state
            self.last["state"] = state.detach()
        return total

    def parts(self) -> dict[str, float]:
        """The parts of the latest loss as numbers, for a log."""
        return {f"{name}_loss": float(value) for name, value in self.last.items()}

    @property
    def _needs_teacher(self) -> bool:
        return bool(self.settings.logit_weight) or self.settings.states

    def _state_loss(self, ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> Tensor:
        pairs = list(self.settings.state_pairs) + ([(_EMBEDDING, _EMBEDDING)] if self.settings.embedding else [])
        losses = []
        for block, partner in pairs:
            states = ours[block].float()
            if self.projection is not None:
                states = functional.linear(states, self.projection)
            losses.append(state_loss(states.float(), theirs[partner].float(), self.settings.state_loss))
        return torch.stack(losses).mean()


def state_loss(states: Tensor, wanted: Tensor, kind: str = "cosine") -> Tensor:
    """How far states ``[..., hidden]`` are from those wanted: mean of ``1 - cos``, or mean squared difference."""
    if kind == "cosine":
        return 1.0 - functional.cosine_similarity(states, wanted, dim=-1).mean()
    return functional.mse_loss(states, wanted)


#: Stands for the token embedding among block numbers.
_EMBEDDING = -1


@contextlib.contextmanager
def _states(anatomy: Anatomy, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Outputs of blocks in the forward inside the ``with``, by block; that of the embedding under -1."""
    found: dict[int, Tensor] = {}

    def look(block: int, before: Tensor, after: Tensor) -> None:
        found[block] = after

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found[_EMBEDDING] = output

    handle = anatomy.embedding.register_forward_hook(keep)
    try:
        with observing(anatomy, sorted(set(blocks)), look):
            yield found
    finally:
        handle.remove()
