"""How much a model needs each of its transformer blocks: four criteria, the lowest score goes first.

    magnitude    sum of |w| over the weights of the block                     no text, milliseconds
    taylor       sum of |w * dL/dw|, the mean of short texts' gradients       one backward pass
    perplexity   exp(loss) of the model without this block                    a forward pass a block
    influence    1 - mean cosine of what goes into and comes out of it        one forward pass

Magnitude and Taylor look at weights alone or at one point of the loss, and both rank the first blocks as the least
needed, which are the ones no model survives without; hence the "+" rule in :mod:`sparsert.compress.depth`. Perplexity
asks the question itself, block by block. Influence is nearly as good for one pass over the text.

Taylor's gradient is that of ten texts of 128 tokens, as published, and not by accident: the gradient of a trained model
over much text is near zero, and what its products with the weights then rank lowest are the late blocks together. More
text is used as more such gradients, whose scores are averaged; one alone depends on which ten texts it saw.

Each function takes the blocks that are left out already, so the same scores serve one-shot and iterative removal.

Source: Kim et al., "Shortened LLaMA" (arXiv 2402.02834), section 3 (magnitude, Taylor, perplexity); Men et al.,
"ShortGPT" (arXiv 2403.03853) and Muralidharan et al. (arXiv 2407.14679), section 2.2 (block influence).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.head_loss import label_loss
from sparsert.compress.score_windows import Remember, batches_of, check_windows, compute_always, finite, perplexity
from sparsert.compress.skipping import skipping
from sparsert.errors import InputError
from sparsert.schedule import format_block_list

#: Names of the criteria.
CRITERIA = ("magnitude", "taylor", "perplexity", "influence")

#: Texts of one of Taylor's gradients, and tokens of each at most.
TAYLOR_TEXTS, TAYLOR_TOKENS = 10, 128

#: Called after each block (or batch, or gradient) with how many are done of how many.
Progress = Callable[[int, int], None]


def score_blocks(
    anatomy: Anatomy,
    criterion: str,
    windows: Tensor | None = None,
    *,
    skipped: Collection[int] = (),
    batch_size: int = 1,
    progress: Progress | None = None,
    remember: Remember = compute_always,
) -> dict[int, float]:
    """Score every block that still runs.

    Args:
        anatomy: of the model; weights, gradients and modes are left as they were.
        criterion: one of :data:`CRITERIA`.
        windows: int64 ``[windows, length]`` of calibration text; only magnitude does without.
        skipped: blocks that are left out already.
        batch_size: windows in one pass; Taylor, which cuts them up, takes as many tokens.
        progress: called as the work goes on.
        remember: asked for every perplexity, the one criterion that takes long.

    Returns:
        Block -> score, for the blocks that run; lowest is needed least.

    Raises:
        InputError: unknown criterion, no or unusable windows, or a score that is not finite.
    """
    if criterion not in CRITERIA:
        raise InputError(f"criterion {criterion!r} is not known; choose one of {', '.join(CRITERIA)}")
    running = [block for block in range(anatomy.num_blocks) if block not in set(skipped)]
    report = progress or (lambda done, of: None)
    if criterion == "magnitude":
        return magnitude_scores(anatomy, running)
    if windows is None:
        raise InputError(f"criterion {criterion} needs calibration text; give windows of it, or use magnitude")
    check_windows(anatomy, windows)
    with skipping(anatomy, skipped), _evaluating(anatomy.model):
        if criterion == "taylor":
            scores = _taylor(anatomy, running, windows, batch_size, report)
        elif criterion == "influence":
            batches = batches_of(windows, batch_size, anatomy.embedding.weight.device)
            scores = _influence(anatomy, running, batches, report)
        else:
            scores = {}
            for done, block in enumerate(running, start=1):
                gone = sorted({*skipped, block})
                scores[block] = perplexity_without(anatomy, gone, windows, batch_size=batch_size, remember=remember)
                report(done, len(running))
    return {block: finite(score, f"the {criterion} score of block {block}") for block, score in scores.items()}


def perplexity_without(
    anatomy: Anatomy,
    blocks: Collection[int],
    windows: Tensor,
    *,
    batch_size: int = 1,
    remember: Remember = compute_always,
) -> float:
    """Perplexity of windows without some blocks."""

    def compute() -> float:
        with skipping(anatomy, blocks):
            return perplexity(anatomy, windows, batch_size=batch_size)

    return remember(f"perplexity without {format_block_list(blocks)}", compute)


def magnitude_scores(anatomy: Anatomy, blocks: Collection[int]) -> dict[int, float]:
    """Sum of the absolute values of the weights of blocks: linear layers and norms, no biases."""
    return {
        block: finite(
            math.fsum(float(weight.detach().float().abs().sum()) for weight in _weights(anatomy.blocks[block])),
            f"the magnitude of block {block}",
        )
        for block in blocks
    }


def taylor_gradients(windows: int, length: int) -> int:
    """How many gradients Taylor's score of so many windows is the mean of."""
    return max(1, windows * max(1, length // TAYLOR_TOKENS) // TAYLOR_TEXTS)


def _taylor(
    anatomy: Anatomy, running: list[int], windows: Tensor, batch_size: int, report: Progress
) -> dict[int, float]:
    weights = {block: _weights(anatomy.blocks[block]) for block in running}
    length = min(windows.shape[1], TAYLOR_TOKENS)
    texts = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    count = taylor_gradients(*windows.shape)
    device = anatomy.embedding.weight.device
    sums = {block: torch.zeros((), dtype=torch.float64, device=device) for block in running}
    with _only_gradients_of(anatomy.model, {id(weight) for block in running for weight in weights[block]}):
        for number in range(count):
            group = texts[number::count]  # of different windows
            for batch in batches_of(group, batch_size * windows.shape[1] // length, device):
                # the mean over all texts, so that the score does not depend on the batch size
                loss = label_loss(anatomy, anatomy.hidden(batch), batch) * (batch.shape[0] / group.shape[0])
                torch.autograd.backward(loss)
            for block in running:
                for weight in weights[block]:
                    if weight.grad is not None:
                        product = weight.detach().float() * weight.grad.float()
                        sums[block] += product.abs_().sum(dtype=torch.float64) / count
                        weight.grad = None
            report(number + 1, count)
    return {block: float(total) for block, total in sums.items()}


def _influence(anatomy: Anatomy, running: list[int], batches: list[Tensor], report: Progress) -> dict[int, float]:
    sums = dict.fromkeys(running, 0.0)
    tokens = 0
    with torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            cosines: dict[int, Tensor] = {}

            def look(block: int, before: Tensor, after: Tensor, found: dict[int, Tensor] = cosines) -> None:
                found[block] = _cosine(before, after)

            with observing(anatomy, running, look):
                anatomy.hidden(batch)
            for block, cosine in cosines.items():
                sums[block] += float(cosine)
            tokens += batch.numel()
            report(done, len(batches))
    return {block: 1.0 - total / tokens for block, total in sums.items()}


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """Sum over tokens of the cosine between two hidden states ``[batch, length, hidden]``."""
    return functional.cosine_similarity(before.float(), after.float(), dim=-1).sum(dtype=torch.float64)


@contextlib.contextmanager
def observing(anatomy: Anatomy, blocks: Collection[int], look: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``look(block, what goes in, what comes out)`` in every forward inside the ``with``."""
    handles = []

    def hook_of(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor], output: object) -> None:
            before = arguments[0] if arguments else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            assert isinstance(after, Tensor)
            look(block, before, after)

        return hook

    try:
        for block in blocks:
            handles.append(anatomy.blocks[block].register_forward_hook(hook_of(block), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in block.named_parameters() if name.endswith("weight")]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _only_gradients_of(model: nn.Module, wanted: set[int]) -> Iterator[None]:
    """Let the parameters with these ids alone gather a gradient, from zero; put everything back afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with torch.enable_grad():
            for parameter, _, _ in before:
                parameter.requires_grad_(id(parameter) in wanted)
                parameter.grad = None
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
