"""Recovery on a GPU: autocast, memory of large vocabularies, zeros under every kind of optimizer."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.block_scores import CRITERIA, score_blocks
from sparsert.compress.distillation import Distillation, DistillationSettings
from sparsert.compress.head_loss import LOGIT_BYTES, label_loss
from sparsert.compress.keep_zeros import ZeroKeeper
from sparsert.compress.text import TextWindows
from sparsert.compress.training import Trainer, TrainingOptions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_the_cpu(criterion: str) -> None:
    model = make_llama(num_hidden_layers=6)
    windows = torch.randint(0, 211, (5, 40))
    expected = score_blocks(anatomy_of(model), criterion, windows, batch_size=2)
    found = score_blocks(anatomy_of(model.cuda()), criterion, windows, batch_size=3)
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_vocabulary_of_128k_takes_no_more_than_its_chunks(frozen_head: bool) -> None:
    """8192 tokens have 2.1 GB of logits in bf16; a chunk of 256 MiB is there once, and becomes its gradient."""
    vocabulary, hidden = 128256, 256
    model = make_llama(hidden_size=hidden, num_attention_heads=4, vocab_size=vocabulary).cuda().requires_grad_(True)
    model.lm_head.requires_grad_(not frozen_head)
    anatomy = anatomy_of(model)
    tokens = torch.randint(0, vocabulary, (8, 1024), device="cuda")
    states = torch.randn(8, 1024, hidden, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        label_loss(anatomy, states, tokens).backward()
    peak = torch.cuda.max_memory_allocated() - before
    # beside the chunks: the head and a chunk's gradient of it in bf16, and two gradients in float32
    head = vocabulary * hidden * (2 + 2 + 4 + 4)
    assert peak < 1.5 * LOGIT_BYTES + head, f"{peak / 1e9:.2f} GB"
    assert states.grad is not None and bool(states.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_a_2_4_student_learns_and_stays_2_4(dtype: torch.dtype, state: str) -> None:
    teacher = make_llama(seed=1).cuda().to(torch.bfloat16)
    student = make_llama(seed=1)
    magnitude_prune_(student)
    student = student.to("cuda", dtype).requires_grad_(True)
    anatomy = anatomy_of(student)
    keeper = ZeroKeeper(anatomy.block_linears())
    settings = DistillationSettings(state_pairs=((1, 1),), embedding=True)
    losses: list[float] = []
    Trainer(
        student.parameters(),
        Distillation(anatomy, anatomy_of(teacher), settings),
        TextWindows(torch.randint(0, 211, (4000,)), 64),
        TrainingOptions(steps=60, batch_size=8, learning_rate=2e-3, weight_decay=0.0, optimizer_state=state),
        after_update=keeper.apply_,
    ).train(callback=lambda record: losses.append(record.loss))
    assert losses[-1] < 0.8 * losses[0]
    for name, linear in anatomy.block_linears().items():
        assert not bool(linear.weight[~keeper.masks[name]].count_nonzero()), name
