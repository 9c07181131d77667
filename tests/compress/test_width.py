"""Width: importance by its formulae, the choice of units, and trimming in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import VARIANTS, assert_logits_close, make_variant, prune_blocks_
from tiny_llama import magnitude_prune_, make_llama, save
from torch import Tensor

from sparsert.checkpoint import open_checkpoint
from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.trim import trim_model
from sparsert.compress.width import (
    Selection,
    Widths,
    retained_importance,
    rounded_widths,
    select_units,
    widths_of,
)
from sparsert.compress.width_scores import WidthScores, score_widths
from sparsert.errors import InputError, UnsupportedError
from sparsert.models import load_model

VOCABULARY = 211


def _tokens(rows: int = 4, length: int = 13) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def _random_scores(whole: Widths, blocks: int = 3) -> WidthScores:
    return WidthScores(
        torch.rand(blocks, whole.heads).double(),
        torch.rand(blocks, whole.heads).double(),
        torch.rand(blocks, whole.intermediate).double(),
        torch.rand(whole.hidden).double(),
    )


def _aggregated(values: Tensor, over_windows: str, over_positions: str) -> Tensor:
    """``[windows, positions, units]`` -> ``[units]``, as the paper writes it, float64."""

    def reduce(tensor: Tensor, how: str) -> Tensor:
        if how == "mean":
            return tensor.abs().sum(0) / tensor.shape[0]
        if how == "l2":
            return (tensor**2).sum(0).sqrt()
        return ((tensor - tensor.mean(0)) ** 2).sum(0) / tensor.shape[0]

    return reduce(reduce(values.double(), over_windows), over_positions)


@pytest.mark.parametrize("aggregations", [("l2", "mean"), ("mean", "mean"), ("var", "l2"), ("mean", "var")])
@pytest.mark.parametrize("variant", ["llama, group 3", "gemma2, soft caps, window 6, tied", "nemotron, tied"])
def test_scores_follow_the_formulae(variant: str, aggregations: tuple[str, str]) -> None:
    model = make_variant(variant)
    windows = _tokens()
    seen: dict[str, Tensor] = {}
    handles = []
    for index, block in enumerate(model.model.layers):
        second = (
            "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else "post_attention_layernorm"
        )
        for name, module in (("heads", block.self_attn.o_proj), ("neurons", block.mlp.down_proj)):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, key=f"{name}{index}": seen.__setitem__(key, a[0]))
            )
        for name in ("input_layernorm", second):
            module = getattr(block, name)
            handles.append(module.register_forward_hook(lambda m, a, o, key=f"{name}{index}": seen.__setitem__(key, o)))
    model(windows)
    for handle in handles:
        handle.remove()
    scores = score_widths(
        anatomy_of(model), windows, over_windows=aggregations[0], over_positions=aggregations[1], batch_size=3
    )
    channels = torch.zeros(96, dtype=torch.float64)
    for index in range(3):
        heads = seen[f"heads{index}"].unflatten(-1, (-1, 24)).double().norm(dim=-1)
        torch.testing.assert_close(scores.heads[index], _aggregated(heads, *aggregations), rtol=1e-3, atol=1e-7)
        output = model.model.layers[index].self_attn.o_proj.weight.double()
        added = torch.einsum(
            "bshd,ohd->bsho", seen[f"heads{index}"].unflatten(-1, (-1, 24)).double(), output.unflatten(1, (-1, 24))
        )
        contributions = _aggregated(added.norm(dim=-1), *aggregations)
        torch.testing.assert_close(scores.contributions[index], contributions, rtol=1e-3, atol=1e-7)
        neurons = _aggregated(seen[f"neurons{index}"], *aggregations)
        torch.testing.assert_close(scores.neurons[index], neurons, rtol=1e-3, atol=1e-7)
        channels += sum(
            _aggregated(v, *aggregations) for k, v in seen.items() if "norm" in k and k.endswith(str(index))
        )
    torch.testing.assert_close(scores.channels, channels, rtol=1e-3, atol=1e-7)


def test_units_are_chosen_by_rank_and_stay_in_order() -> None:
    whole = Widths(6, 5, 6, 3, 8)
    scores = WidthScores(
        torch.tensor([[1.0, 2.0, 9.0, 0.5, 4.0, 5.0]]).double(),  # groups: 3.0, 9.5, 9.0
        torch.tensor([[9.0, 9.0, 1.0, 2.0, 7.0, 3.0]]).double(),  # choose inside of them
        torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]]).double(),
        torch.tensor([1.0, 6.0, 2.0, 5.0, 3.0, 4.0]).double(),
    )
    selection = select_units(scores, whole, Widths(3, 2, 2, 2, 8))
    assert selection.channels.tolist() == [1, 3, 5]
    assert selection.neurons.tolist() == [[3, 4]]
    assert selection.kv_heads.tolist() == [[1, 2]]
    assert selection.heads.tolist() == [[3, 4]]
    share = ((0.5 + 4) / 21.5) * (9 / 15) * (15 / 21)
    assert retained_importance(scores, selection) == pytest.approx(share)
    everything = select_units(scores, whole, whole)
    assert everything.heads.tolist() == [[0, 1, 2, 3, 4, 5]] and everything.channels.tolist() == [0, 1, 2, 3, 4, 5]
    assert retained_importance(scores, everything) == pytest.approx(1.0)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_trimming_to_its_own_size_changes_nothing(variant: str) -> None:
    model = make_variant(variant)
    anatomy = anatomy_of(model)
    whole = widths_of(anatomy)
    made = trim_model(anatomy, whole, select_units(_random_scores(whole), whole, whole))
    tokens = _tokens()
    assert_logits_close(made(tokens).logits, model(tokens).logits)
    assert made is not model and made.model.embed_tokens.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_cut_heads_and_neurons_are_those_whose_output_counts_no_more(variant: str) -> None:
    model = make_variant(variant)
    anatomy = anatomy_of(model)
    whole = widths_of(anatomy)
    kv_heads = max(1, whole.kv_heads // 2)
    group = max(1, whole.group // 2)
    target = Widths(whole.hidden, 64, kv_heads * group, kv_heads, whole.head_dim)
    selection = select_units(_random_scores(whole), whole, target)
    trimmed = trim_model(anatomy, target, selection)
    for index, block in enumerate(model.model.layers):
        for linear, kept, width in (
            (block.self_attn.o_proj, selection.heads[index], whole.head_dim),
            (block.mlp.down_proj, selection.neurons[index], 1),
        ):
            units = linear.weight.view(linear.out_features, -1, width)
            gone = torch.ones(units.shape[1], dtype=torch.bool)
            gone[kept] = False
            units[:, gone] = 0.0
    tokens = _tokens()
    assert_logits_close(trimmed(tokens).logits, model(tokens).logits)
    assert trimmed.config.head_dim == whole.head_dim and trimmed.config.num_attention_heads == target.heads


RMS_NORM = [name for name in VARIANTS if not name.startswith("nemotron")]


@pytest.mark.parametrize("variant", RMS_NORM)
def test_cut_channels_are_those_that_hold_nothing(variant: str) -> None:
    """Channels that are always zero can be cut, but for the mean square that is then one of fewer channels."""
    model = make_variant(variant)
    anatomy = anatomy_of(model)
    whole = widths_of(anatomy)
    target = Widths(48, whole.intermediate, whole.heads, whole.kv_heads, whole.head_dim)
    selection = select_units(_random_scores(whole), whole, target)
    gone = torch.ones(whole.hidden, dtype=torch.bool)
    gone[selection.channels] = False
    model.model.embed_tokens.weight[:, gone] = 0.0
    scale = (target.hidden / whole.hidden) ** 0.5
    offset = 1.0 if variant.startswith("gemma") else 0.0
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight[gone] = 0.0
            if linear.bias is not None:
                linear.bias[gone] = 0.0
    trimmed = trim_model(anatomy, target, selection)
    for name, parameter in model.named_parameters():
        if "norm" in name and "q_norm" not in name and "k_norm" not in name:
            parameter.copy_((parameter + offset) * scale - offset)
    tokens = _tokens()
    assert_logits_close(trimmed(tokens).logits, model(tokens).logits, 2e-3)  # the norms add epsilon


def test_layer_norms_are_cut_channel_by_channel() -> None:
    model = make_variant("nemotron, group 6, biases, quarter rotary")
    anatomy = anatomy_of(model)
    whole = widths_of(anatomy)
    target = Widths(48, 64, 12, 2, 16)
    selection = select_units(_random_scores(whole), whole, target)
    trimmed = trim_model(anatomy, target, selection)
    channels, neurons = selection.channels, selection.neurons[1]
    ours, theirs = trimmed.model.layers[1], model.model.layers[1]
    assert torch.equal(ours.input_layernorm.bias, theirs.input_layernorm.bias[channels])
    assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight[neurons][:, channels])
    assert torch.equal(ours.mlp.up_proj.bias, theirs.mlp.up_proj.bias[neurons])
    assert torch.equal(ours.mlp.down_proj.bias, theirs.mlp.down_proj.bias[channels])
    assert torch.equal(trimmed.lm_head.weight, model.lm_head.weight[:, channels])


#: One of each kind of family.
KINDS = [
    "llama, llama3 rope, biases, tied",
    "qwen3, group 3",
    "gemma2, no caps, biases, group 1, untied",
    "gemma3, pattern 2, two ropes, tied",
    "nemotron, half rotary, group 3",
    "phi3, group 3, window 6, partial rotary, tied",
]


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_the_result_is_a_plain_checkpoint_for_both_readers(variant: str, sparse: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    anatomy = anatomy_of(make_variant(variant))
    whole = widths_of(anatomy)
    kv_heads = max(1, whole.kv_heads // 2)
    target = Widths(48, 64, kv_heads * min(2, whole.group), kv_heads, whole.head_dim)
    trimmed: Any = trim_model(anatomy, target, select_units(_random_scores(whole), whole, target))
    if sparse:
        prune_blocks_(trimmed)
    directory = save(trimmed, tmp_path)
    tokens = _tokens()
    expected = trimmed(tokens).logits
    reread = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert_logits_close(reread(tokens).logits, expected)
    ours = load_model(open_checkpoint(directory), device="cpu")
    assert_logits_close(ours(tokens), expected)
    assert ours.config.head_dim == whole.head_dim
    assert ours.report.count("2:4") == (sum(len(ours.config.block_linears(b)) for b in range(3)) if sparse else 0)


def test_the_best_units_serve_better_than_the_worst() -> None:
    """Heads and neurons that say nothing are found and cut: the model stays what it was."""
    model = make_llama()
    quiet = torch.arange(0, 160, 2)
    for block in model.model.layers:
        block.mlp.up_proj.weight[quiet] *= 1e-4
        block.self_attn.v_proj.weight[:24] *= 1e-4  # the first of two key/value heads
    anatomy = anatomy_of(model)
    whole, tokens = widths_of(anatomy), _tokens()
    scores = score_widths(anatomy, tokens)
    target = Widths(96, 80, 3, 1, 24)
    selection = select_units(scores, whole, target)
    assert selection.kv_heads.tolist() == [[1]] * 3
    assert not set(selection.neurons.flatten().tolist()) & set(quiet.tolist())
    assert_logits_close(trim_model(anatomy, target, selection)(tokens).logits, model(tokens).logits, 1e-2)


def test_sizes_are_rounded_and_refused_by_name() -> None:
    whole = Widths(576, 1536, 9, 3, 64)
    assert rounded_widths(whole, hidden=30) == Widths(64, 1536, 9, 3, 64)
    assert rounded_widths(whole, hidden=400, multiple=1).hidden == 400
    assert rounded_widths(whole, kv_heads=2) == Widths(576, 1536, 6, 2, 64)
    assert rounded_widths(whole, heads=6) == Widths(576, 1536, 6, 3, 64)
    odd = Widths(100, 1000, 4, 4, 8)
    assert rounded_widths(odd, hidden=100, intermediate=990).intermediate == 960 and rounded_widths(odd) == odd
    for wanted, message in (
        ({"hidden": 577}, "hidden is to be 577, the model has 576; ask for 1-576"),
        ({"heads": 8}, "8 query heads cannot share 3"),
        ({"heads": 8, "kv_heads": 2}, "8 query heads for 2 key/value heads are more than the 3"),
        ({"intermediate": 0}, "intermediate is to be 0"),
        ({"hidden": 64, "multiple": 0}, "multiple is 0"),
    ):
        with pytest.raises(InputError, match=message):
            rounded_widths(whole, **wanted)


def test_models_that_cannot_be_trimmed() -> None:
    model = make_llama()
    anatomy = anatomy_of(model)
    whole = widths_of(anatomy)
    uneven = Widths(64, 64, 6, 2, 24)
    with pytest.raises(UnsupportedError, match=r"no llama model of hidden 64.*not a multiple.*choose sizes that fit"):
        trim_model(anatomy, uneven, select_units(_random_scores(whole), whole, uneven))
    magnitude_prune_(model)
    target = Widths(96, 64, 6, 2, 24)
    with pytest.raises(InputError, match=r"21 weights are 2:4 already, the first model\.layers\.0\.self_attn\.q_proj"):
        trim_model(anatomy, target, select_units(_random_scores(whole), whole, target))
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match="block 1 has no attention or no mlp"):
        widths_of(anatomy)


def test_blocks_of_different_widths_are_refused() -> None:
    model = make_llama()
    mlp = model.model.layers[2].mlp
    mlp.down_proj = torch.nn.Linear(80, 96, bias=False)
    with pytest.raises(UnsupportedError, match=r"blocks differ in width \(\(144, 80, 24\), \(144, 160, 24\)"):
        score_widths(anatomy_of(model), _tokens())


def test_unknown_aggregations_and_broken_weights() -> None:
    model = make_llama()
    with pytest.raises(InputError, match="over_windows 'max' is not known; choose one of mean, l2, var"):
        score_widths(anatomy_of(model), _tokens(), over_windows="max")
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="are not finite"):
        score_widths(anatomy_of(model), _tokens())


def test_selection_is_plain_data() -> None:
    selection = Selection(torch.arange(2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1))
    assert selection.channels.tolist() == [0, 1]
