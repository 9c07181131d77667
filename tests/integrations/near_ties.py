"""What greedy tokens in bf16 have to fulfil.

Two correct models part at a near-tie, so each token is held against float64 logits of the same text: whoever picked it
may have been wrong about two logits by at most twice what a dense bf16 model is wrong about any, so the best logit may
be ahead by four such errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_greedy(dense: Any, prompt: list[int], tokens: list[int]) -> None:
    """Check the tokens that follow a prompt; ``dense`` is the model in bf16, on the CPU."""
    exact, error = exact_logits(dense, prompt, tokens)
    chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = exact.max(dim=1).values - chosen
    assert behind.max() <= 4 * error
    assert (exact.max(dim=1).values - exact.mean(dim=1)).min() > 8 * error, "any token would do"


def exact_logits(dense: Any, prompt: list[int], tokens: list[int]) -> tuple[Tensor, float]:
    """float64 logits where each token was picked, and the largest error of the dense bf16 model there."""
    ids = torch.tensor([prompt + tokens[:-1]])
    with torch.no_grad():
        exact = pruned_copy(dense, torch.float64)(ids).logits[0, len(prompt) - 1 :]
        rounded = dense(ids).logits[0, len(prompt) - 1 :].double()
    return exact, float((rounded - exact).abs().max())


def pruned_copy(dense: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The same model in another dtype."""
    model = type(dense)(dense.config).eval().requires_grad_(False)
    model.load_state_dict(dense.state_dict())
    return model.to(device, dtype)
