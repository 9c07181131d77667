"""Learn which two of four weights stay, end to end, with the weights frozen (MaskLLM).

Every group of four inputs has six candidate masks and as many logits. In training a mask is a soft mixture of the six,
drawn by Gumbel softmax (``ops/masked_weight.py``); the loss of the whole model moves the logits. Two schedules, linear
in the steps, take it from exploring to choosing: the temperature falls from 4 to 0.05, and the scale of the logits,
against noise of fixed size, rises from 100 to 500. At the end the likeliest candidate of each group is the mask.

    logits = N(0, 0.01^2) + (overlap with the prior's mask - 1) * deviation * prior_strength
    loss   = likelihood of the text, or distance to the dense model, - regularisation * (1 - progress) * |W * M|^2

A prior, any one-shot mask or one learned on other text, is worth most of the training: with none a 7B model ends at
perplexity 9.1 instead of 6.7 (MaskLLM, ablations). The regularisation rewards masks that keep large weights, so that
gradients do not vanish. Distillation is ours to add: the frozen weights are their own teacher, a second forward with
all masks off, and no second copy.

What it costs: per weight 1.5 logits, so logits, gradients and two moments take 24 bytes a weight in fp32 and 12 in
bf16.

Source: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models" (arXiv 2409.17481),
sections 3 and 4; values of the schedules: its appendix and ablations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.head_loss import TokenLoss, head_loss
from sparsert.compress.oneshot import maskable_linears
from sparsert.compress.training import Position
from sparsert.errors import InputError
from sparsert.ops import candidate_masks, hard_mask, masked_weight

LOGIT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """How masks are learned; defaults are the paper's.

    Attributes:
        initial_temperature, final_temperature: of the Gumbel softmax.
        initial_scale, final_scale: what logits are multiplied with.
        logit_deviation: standard deviation of the first logits.
        prior_strength: how far the prior's mask is ahead, in standard deviations.
        regularisation: reward for keeping large weights, falling to 0 over the run.
        distillation: share of the loss that is the Kullback-Leibler divergence from the dense model instead of the
            text's likelihood, 0-1.
        logit_dtype: one of :data:`LOGIT_DTYPES`.

    Raises:
        InputError: a value out of range.
    """

    initial_temperature: float = 4.0
    final_temperature: float = 0.05
    initial_scale: float = 100.0
    final_scale: float = 500.0
    logit_deviation: float = 0.01
    prior_strength: float = 3.0
    regularisation: float = 1e-5
    distillation: float = 0.0
    logit_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("initial_temperature", "final_temperature", "initial_scale", "final_scale", "logit_deviation"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("prior_strength", "regularisation"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.distillation <= 1:
            raise InputError(f"distillation is {self.distillation}; it must be from 0 to 1")
        if self.logit_dtype not in LOGIT_DTYPES:
            raise InputError(f"logit_dtype is {self.logit_dtype!r}; choose one of {', '.join(LOGIT_DTYPES)}")

    def controls_at(self, progress: float) -> tuple[float, float, float]:
        """Scale, temperature and regularisation at a share of the run.

        Example:
            >>> MaskSettings().controls_at(0.5)
            (300.0, 2.025, 5e-06)
        """
        return (
            self.initial_scale + (self.final_scale - self.initial_scale) * progress,
            self.initial_temperature + (self.final_temperature - self.initial_temperature) * progress,
            self.regularisation * (1 - progress),
        )


class _Mode:
    """What all masked layers of a model do at the moment: ``soft``, ``hard`` or ``dense``."""

    def __init__(self) -> None:
        self.name = "soft"


class MaskedLinear(nn.Module):
    """A linear layer whose frozen weight passes through a mask that is learned.

    Args:
        linear: the layer; its tensors are shared.
        logits: ``[out_features * in_features / 4, 6]``.
        controls: float32 ``[3]``, see :func:`sparsert.ops.masked_weight`; shared by all layers.
        seed: int64 ``[1]``, of this layer.
        mode: shared by all layers.
    """

    def __init__(self, linear: nn.Linear, logits: Tensor, controls: Tensor, seed: Tensor, mode: _Mode) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.logits = nn.Parameter(logits)
        self._controls, self._seed, self._mode = controls, seed, mode

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias`` with the weight as the mode says; x ``[..., in_features]``."""
        if self._mode.name == "soft":
            weight = masked_weight(self.weight, self.logits, self._controls, self._seed)
        elif self._mode.name == "hard":
            weight = self.weight * self.mask()
        else:
            weight = self.weight
        return functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """The likeliest mask, bool ``[out_features, in_features]``."""
        return hard_mask(self.logits, (self.out_features, self.in_features))


class MaskLearner:
    """A model whose linear layers have been replaced by ones with a mask to learn.

    Attributes:
        layers: the masked layers by module name.
        parameters: their logits, to be trained.

    Args:
        anatomy: of a model without gradients, in evaluation mode; its layers are replaced in place.
        settings: how.
        prior: masks to begin near, by module name, bool or 0/1 like the weights; None: none.
        keep_dense: patterns of module names that stay dense.
        seed: of the first logits.

    Raises:
        InputError: a layer without a prior, or one of another shape.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        settings: MaskSettings,
        *,
        prior: Mapping[str, Tensor] | None = None,
        keep_dense: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.anatomy = anatomy
        self.settings = settings
        linears = maskable_linears(anatomy, keep_dense)
        device = anatomy.embedding.weight.device
        self._mode = _Mode()
        self._controls = torch.zeros(3, device=device)
        self._seeds = torch.zeros(len(linears), dtype=torch.int64, device=device)
        self._originals = linears
        self.layers: dict[str, MaskedLinear] = {}
        for number, (name, linear) in enumerate(linears.items()):
            logits = first_logits(name, linear.weight, settings, None if prior is None else prior.get(name), seed=seed)
            if prior is not None and name not in prior:
                raise InputError(f"{name}: the prior has no mask for it; keep the layer dense, or give another prior")
            seed_of_layer = self._seeds[number : number + 1]
            self.layers[name] = MaskedLinear(linear, logits, self._controls, seed_of_layer, self._mode)
            _replace(anatomy.model, name, self.layers[name])
        self.parameters = [layer.logits for layer in self.layers.values()]

    def __call__(self, tokens: Tensor, position: Position) -> Tensor:
        """The loss of a training step, see :class:`sparsert.compress.training.LossFunction`."""
        self._set_position(position)
        share = self.settings.distillation
        teacher = None
        if share > 0:
            with self.running("dense"), torch.no_grad():
                teacher = _rows(self.anatomy.hidden(tokens))
        labels = tokens[:, 1:].reshape(-1)
        loss = TokenLoss(
            labels if share < 1 else None, None if teacher is None else self.anatomy, teacher,
            label_weight=1 - share, teacher_weight=share,
        )  # fmt: skip
        return head_loss(self.anatomy, _rows(self.anatomy.hidden(tokens)), loss)[0] / labels.numel()

    @contextlib.contextmanager
    def running(self, mode: str) -> Iterator[None]:
        """Run the model for a while with masks ``soft`` (as in training), ``hard`` (as they will be) or ``dense``."""
        before, self._mode.name = self._mode.name, mode
        try:
            yield
        finally:
            self._mode.name = before

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """``(module name, mask)`` as the logits say now; bool like the weights, True keeps."""
        for name, layer in self.layers.items():
            yield name, layer.mask()

    @torch.no_grad()
    def certainty(self) -> float:
        """Mean probability of the likeliest candidate at the last step's scale, without noise, 0.17-1."""
        scale = max(float(self._controls[0]), self.settings.initial_scale)
        means = [(logits.float() * scale).softmax(1).amax(1).mean() for logits in self.parameters]
        return float(torch.stack(means).mean())

    def finish_(self) -> None:
        """Put the layers back with their masks applied to the weights."""
        for name, linear in self._originals.items():
            with torch.no_grad():
                linear.weight.mul_(self.layers[name].mask())
            _replace(self.anatomy.model, name, linear)

    def _set_position(self, position: Position) -> None:
        scale, temperature, regularisation = self.settings.controls_at(position.progress)
        # the loop weights the loss of a part by its share; the regularisation, which is no part of the loss, is here
        self._controls.copy_(torch.tensor([scale, temperature, regularisation * position.share]))
        digest = hashlib.sha256(f"{position.seed} {position.step} {position.part}".encode()).digest()
        first = int.from_bytes(digest[:7], "little")
        self._seeds.copy_(torch.arange(first, first + len(self._seeds)))


def recompute_blocks_(anatomy: Anatomy) -> None:
    """Keep the input of each block for the backward pass and compute the rest again: less memory, a third more time.

    Masked weights are then made anew in the backward pass, from the same noise.
    """
    for block in anatomy.blocks:
        # nothing here draws from torch's generators, so there is no state of theirs to keep
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def first_logits(name: str, weight: Tensor, settings: MaskSettings, prior: Tensor | None, *, seed: int) -> Tensor:
    """Logits before the first step: small noise, and the prior's mask ahead of those that overlap it less.

    Args:
        name: of the layer; part of the seed.
        weight: ``[out_features, in_features]``.
        settings: deviation, strength, dtype.
        prior: mask like the weight, or None.
        seed: of the run.

    Returns:
        ``[groups, 6]`` on the device of ``weight``, which draws the noise: another kind of device draws other numbers.

    Raises:
        InputError: a prior of another shape.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:7], "little"))
    logits = torch.randn(weight.numel() // 4, 6, generator=generator, device=weight.device) * settings.logit_deviation
    if prior is not None:
        if prior.shape != weight.shape:
            raise InputError(
                f"{name}: the prior's mask is {tuple(prior.shape)}, the weight {tuple(weight.shape)}; the masks are of "
                "another model"
            )
        groups = prior.to(weight.device).ne(0).view(-1, 4).float()
        overlap = groups @ candidate_masks(weight.device).t()
        logits += (overlap - 1) * logits.std() * settings.prior_strength
    return logits.to(getattr(torch, settings.logit_dtype))


def _rows(hidden: Tensor) -> Tensor:
    """Hidden states that predict a token: ``[windows, window, width]`` -> ``[windows * (window - 1), width]``."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
