"""The Triton kernel of token losses against the reference, and the reference against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsert.errors import InputError
from sparsert.ops.token_loss import token_loss_, token_loss_reference

pytest.importorskip("triton")

from sparsert.kernels.token_loss import token_loss_ as kernel

SHAPES = [(1, 5), (7, 211), (3, 4096), (2, 9001)]
if torch.cuda.is_available():
    SHAPES += [(33, 49152), (5, 128256)]

CASES: dict[str, dict[str, Any]] = {
    "labels": {"teacher": False},
    "teacher": {"labels": False, "teacher_weight": 0.3},
    "both": {"label_weight": 0.25, "teacher_weight": 0.75},
    "soft": {"temperature": 2.5},
    "capped": {"softcap": 2.0, "teacher_softcap": 3.0, "temperature": 0.7},
    "no gradient": {"gradient": False},
}
DEFAULTS = {
    "label_weight": 1.0, "teacher_weight": 1.0, "temperature": 1.0, "softcap": None, "teacher_softcap": None,
    "gradient": True,
}  # fmt: skip


def problem(shape: tuple[int, int], dtype: torch.dtype, device: str, case: dict[str, Any]) -> tuple[Any, ...]:
    logits, teacher = (3 * torch.randn(2, *shape, device=device)).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    labels[0] = -100 if len(labels) > 1 else shape[1] - 1
    return logits, labels if case.get("labels", True) else None, teacher if case.get("teacher", True) else None


def options(case: dict[str, Any]) -> dict[str, Any]:
    return DEFAULTS | {name: value for name, value in case.items() if name in DEFAULTS}


def by_autograd(logits: Tensor, labels: Tensor | None, teacher: Tensor | None, o: dict[str, Any]) -> tuple[Any, ...]:
    """Losses in float64, and the gradient as torch finds it."""
    leaf = logits.double().requires_grad_(True)

    def capped(x: Tensor, cap: float | None) -> Tensor:
        return x if cap is None else cap * torch.tanh(x / cap)

    z = capped(leaf, o["softcap"])
    nll = kl = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    if labels is not None:
        nll = functional.cross_entropy(z, labels, reduction="none", ignore_index=-100)
    if teacher is not None:
        t = capped(teacher.double(), o["teacher_softcap"])
        kl = functional.kl_div(
            (z / o["temperature"]).log_softmax(1), (t / o["temperature"]).softmax(1), reduction="none"
        ).sum(1)
    total = o["label_weight"] * nll.sum() + o["teacher_weight"] * kl.sum()
    return nll.detach(), kl.detach(), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_autograd_finds(name: str) -> None:
    o = options(CASES[name])
    logits, labels, teacher = problem((6, 37), torch.float64, "cpu", CASES[name])
    nll, kl, gradient = by_autograd(logits, labels, teacher, o)
    given = logits.clone()
    found = token_loss_(logits, labels=labels, teacher=teacher, **o)
    torch.testing.assert_close(found, (nll, kl))
    torch.testing.assert_close(logits, gradient if o["gradient"] else given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_as_right_as_its_dtype(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    o = options(CASES[name])
    logits, labels, teacher = problem(shape, dtype, device, CASES[name])
    nll, kl, gradient = by_autograd(logits, labels, teacher, o)
    # rows that lie apart, and something between them that must stay
    room = torch.full((shape[0], shape[1] + 8), 7.0, dtype=dtype, device=device)
    rows = room[:, : shape[1]]
    rows.copy_(logits)
    found_nll, found_kl = torch.full((2, shape[0]), float("nan"), device=device)
    names = {"cap": o["softcap"], "teacher_cap": o["teacher_softcap"]}
    weights = {key: o[key] for key in ("label_weight", "teacher_weight", "temperature", "gradient")}
    kernel(rows, labels, teacher, found_nll, found_kl, **weights, **names)
    for found, exact, wanted in ((found_nll, nll, labels), (found_kl, kl, teacher)):
        if wanted is not None:
            torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)
    if o["gradient"]:
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(rows.double(), gradient, rtol=step, atol=step * 1e-2 if step > 1e-5 else 1e-6)
    else:
        assert torch.equal(rows, logits)
    assert bool((room[:, shape[1] :] == 7).all())


def test_a_word_that_the_teacher_rules_out_adds_nothing(device: str) -> None:
    logits = torch.zeros(1, 3, device=device)
    teacher = torch.tensor([[0.0, 0.0, float("-inf")]], device=device)
    nll, kl = torch.zeros(2, 1, device=device)
    other = logits.clone()
    weights = {"label_weight": 1.0, "teacher_weight": 1.0, "temperature": 1.0, "gradient": True}
    kernel(logits, None, teacher, nll, kl, **weights, cap=None, teacher_cap=None)
    assert kl.item() == pytest.approx(0.405465, abs=1e-5)
    expected = token_loss_reference(other, None, teacher, **weights, softcap=None, teacher_softcap=None)[1]
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(logits, other)


def test_what_does_not_fit_is_named() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(InputError, match="needed: two dimensions, and labels, a teacher or both"):
        token_loss_(logits)
    with pytest.raises(InputError, match=r"2 rows need int64 \(2,\)"):
        token_loss_(logits, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"the teacher's logits are \(2, 4\)"):
        token_loss_(logits, teacher=torch.zeros(2, 4))
