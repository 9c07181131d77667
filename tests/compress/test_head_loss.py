"""The chunked head against plain float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from tiny_families import make_model
from tiny_llama import make_llama
from torch import Tensor

from sparsert.compress.anatomy import anatomy_of, block_of
from sparsert.compress.head_loss import TokenLoss, head_loss, label_loss
from sparsert.compress.score_windows import mean_loss
from sparsert.errors import InputError, UnsupportedError


def _tokens(rows: int, length: int, vocabulary: int = 211) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Nemotron", "Phi3"])
def test_label_loss_is_that_of_transformers(family: str) -> None:
    changes = {"final_logit_softcapping": 3.0} if family == "Gemma2" else {}
    changes |= {"head_dim": None} if family == "Phi3" else {}
    model = make_model(family, **changes).double()
    tokens = _tokens(3, 13)
    anatomy = anatomy_of(model)
    expected = model(tokens, labels=tokens).loss
    ours = label_loss(anatomy, anatomy.hidden(tokens), tokens, logit_bytes=4 * 211 * 7)
    torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
def test_gradients_do_not_depend_on_the_chunks(rows_at_once: int) -> None:
    model = make_llama(tie_word_embeddings=True).double().requires_grad_(True)
    anatomy = anatomy_of(model)
    assert anatomy.tied
    tokens = _tokens(2, 9)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # the mean is behind the sum, so the outer gradient is not 1
    (label_loss(anatomy, anatomy.hidden(tokens), tokens, logit_bytes=4 * 211 * rows_at_once) * 3).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # transformers takes its loss in float32, whatever the model is in
        torch.testing.assert_close(parameter.grad, expected[name] * 3, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_16_bits_and_sums_in_32() -> None:
    model = make_llama().requires_grad_(True)
    anatomy = anatomy_of(model)
    tokens = _tokens(4, 33)
    hidden = anatomy.hidden(tokens).detach().requires_grad_(True)
    label_loss(anatomy, hidden, tokens).backward()
    weight = anatomy.head.weight
    expected = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    seen: list[torch.dtype] = []
    plain = functional.linear

    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", lambda x, w: seen.append(w.dtype) or plain(x, w))
        label_loss(anatomy, hidden, tokens, logit_bytes=2 * 211 * 16).backward()
    assert seen == [torch.bfloat16] * 8
    for gradient, exact in zip((hidden.grad, weight.grad), expected, strict=True):
        assert gradient is not None and gradient.dtype == torch.float32
        assert float((gradient - exact).norm() / exact.norm()) < 0.02


def test_a_frozen_head_gets_no_gradient() -> None:
    anatomy = anatomy_of(make_llama())
    hidden = torch.randn(11, 96, requires_grad=True)
    labels = torch.randint(0, 211, (11,))
    total, sums = head_loss(anatomy, hidden, TokenLoss(labels), logit_bytes=1)
    total.backward()
    weight = anatomy.head.weight
    again = hidden.detach().requires_grad_(True)
    expected = functional.cross_entropy(functional.linear(again, weight), labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(sums, torch.stack([expected.detach(), torch.zeros(())]))
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-4, atol=1e-6)
    assert weight.grad is None


def test_mean_loss_weighs_windows_alike_and_leaves_the_model_as_it_was() -> None:
    model = make_llama().train()
    anatomy = anatomy_of(model)
    tokens = _tokens(5, 17)
    with torch.no_grad():
        expected = float(model(tokens, labels=tokens).loss)
    assert mean_loss(anatomy, tokens, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_bad_windows_and_weights_are_named() -> None:
    model = make_llama()
    anatomy = anatomy_of(model)
    with pytest.raises(InputError, match="token id 211, the model's vocabulary is 0-210"):
        mean_loss(anatomy, torch.full((1, 4), 211))
    with pytest.raises(InputError, match="3 windows of 1 tokens"):
        mean_loss(anatomy, _tokens(3, 1))
    with pytest.raises(InputError, match="int64"):
        mean_loss(anatomy, torch.zeros(1, 4))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="the loss is nan"):
        mean_loss(anatomy, _tokens(2, 8))


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear: its layers is NoneType, not ModuleList"):
        anatomy_of(torch.nn.Linear(2, 2))
    assert block_of("base_model.model.model.layers.3.mlp.up_proj.weight") == 3
