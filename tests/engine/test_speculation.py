"""Drafting and checking: greedy texts are those of plain decoding, sampled ones have its distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_acceptance import accepted_by_the_target_alone, chi_square_per_degree, replaced_by_the_target
from tiny_chat_model import save_chat_model
from tiny_llama import magnitude_prune_, make_llama, random_prompts, save

from sparsert.engine import LLM, Completion, SamplingParams, SpeculationStats, speculate
from sparsert.engine.sampler import process_scores
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan

#: Small enough that removing blocks changes some of the likeliest tokens but not all.
INITIALIZER_RANGE = 0.05

pytestmark = pytest.mark.filterwarnings("ignore:no linear layer is 2.4")

DRAFTS = {
    "blocks": LayerPlan.remove(8, "3,4,6", force=True),
    "halves": LayerPlan.remove(8, "5", skip_attention="1,4", skip_mlp="2-3", force=True),
    "all but one": LayerPlan(8, (7,)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_chat_model(path, initializer_range=INITIALIZER_RANGE)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, device="cpu")


@pytest.fixture(scope="module")
def sparse(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with 2:4 weights, as a draft of the dense one; its two smallest of four are zero."""
    model = make_llama(seed=0, num_hidden_layers=8, vocab_size=259, initializer_range=INITIALIZER_RANGE)
    magnitude_prune_(model)
    return save(model, tmp_path_factory.mktemp("sparse"))


def outcome(completions: list[Completion]) -> list[tuple[tuple[int, ...], str, str]]:
    return [(completion.token_ids, completion.text, completion.finish_reason) for completion in completions]


def stats(completion: Completion) -> SpeculationStats:
    assert completion.timings.speculation is not None
    return completion.timings.speculation


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("draft_tokens", [1, 4, 7])
def test_greedy_texts_are_those_of_plain_decoding(llm: LLM, name: str, draft_tokens: int) -> None:
    prompts = random_prompts([5, 1, 33, 18, 7])
    params = SamplingParams(max_new_tokens=40)
    drafted = llm.generate(prompts, params, draft_plan=DRAFTS[name], draft_tokens=draft_tokens)
    assert outcome(drafted) == outcome(llm.generate(prompts, params))
    record = stats(drafted[0])
    assert record.draft_tokens == draft_tokens and record.drafted == record.rounds * draft_tokens
    assert 0 < record.accepted < record.drafted, "the comparison must not be trivial"
    assert record.acceptance_rate == record.accepted / record.drafted
    assert record.tokens_per_round == 1 + record.accepted / record.rounds
    new_tokens = sum(len(completion.token_ids) for completion in drafted)
    assert record.rounds < new_tokens - 5 <= record.rounds + record.accepted


def test_repetition_penalty(llm: LLM) -> None:
    prompts, params = random_prompts([12, 3, 8]), SamplingParams(max_new_tokens=40, repetition_penalty=1.3)
    drafted = llm.generate(prompts, params, draft_plan=DRAFTS["blocks"])
    assert outcome(drafted) == outcome(llm.generate(prompts, params))
    assert outcome(drafted) != outcome(llm.generate(prompts, SamplingParams(max_new_tokens=40)))
    assert stats(drafted[0]).accepted > 0 and stats(drafted[0]).draft_tokens == 4


@pytest.mark.parametrize("place", range(1, 7))
def test_texts_end_inside_a_draft(llm: LLM, place: int) -> None:
    """By a stop token, a stop string, or their limit, wherever in a round that falls."""
    prompts = random_prompts([6, 10])
    free = llm.generate(prompts, SamplingParams(max_new_tokens=30, ignore_eos=True))
    token, text = free[0].token_ids[place], free[0].text
    for params in (
        SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=[token]),
        SamplingParams(max_new_tokens=30, ignore_eos=True, stop=[text[place : place + 2]]),
        SamplingParams(max_new_tokens=place, ignore_eos=True),
    ):
        drafted = llm.generate(prompts, params, draft_plan=DRAFTS["halves"], draft_tokens=5)
        assert outcome(drafted) == outcome(llm.generate(prompts, params))


def test_streams_every_token_once(llm: LLM) -> None:
    seen: dict[int, tuple[str, list[int]]] = {}

    def stream(index: int, text: str, tokens: list[int]) -> None:
        assert len(tokens) == 1
        before = seen.get(index, ("", []))
        seen[index] = (before[0] + text, before[1] + tokens)

    for completion in llm.generate(["one", "drei ü"], stream=stream, draft_plan=DRAFTS["blocks"]):
        assert seen[completion.index] == (completion.text, list(completion.token_ids))


def test_rows_fill_a_short_context(directory: Path) -> None:
    """Drafts reach behind the end of texts and of the cache that plain decoding would have."""
    llm = LLM(directory, device="cpu", max_length=32)
    prompts, params = random_prompts([31, 4, 25, 30]), SamplingParams(max_new_tokens=20, ignore_eos=True)
    with pytest.warns(UserWarning, match="3 prompts leave less room"):
        plain = llm.generate(prompts, params)
        drafted = llm.generate(prompts, params, draft_plan=DRAFTS["blocks"], draft_tokens=16)
    assert outcome(drafted) == outcome(plain)
    assert [len(completion.token_ids) for completion in drafted] == [1, 20, 7, 2]


def test_crosses_a_window(llm: LLM) -> None:
    prompts, params = random_prompts([240, 3]), SamplingParams(max_new_tokens=40, ignore_eos=True)
    drafted = llm.generate(prompts, params, draft_plan=DRAFTS["blocks"])
    assert outcome(drafted) == outcome(llm.generate(prompts, params))


def test_another_model_drafts(llm: LLM, sparse: Path) -> None:
    """The 2:4 model drafts for the dense one; as an object, as a path, shortened, and after other texts."""
    prompts, params = random_prompts([5, 1, 33, 18, 7]), SamplingParams(max_new_tokens=40)
    plain = outcome(llm.generate(prompts, params))
    draft = LLM(sparse, device="cpu")
    assert draft.model.report.count("2:4") == 56 and llm.model.report.count("2:4") == 0
    by_object = llm.generate(prompts, params, draft=draft, draft_tokens=3)
    assert outcome(by_object) == plain and 0 < stats(by_object[0]).accepted < stats(by_object[0]).drafted
    assert outcome(llm.generate(prompts, params, draft=sparse, draft_tokens=3)) == plain
    assert llm._load_draft(str(sparse)) is llm._load_draft(str(sparse)), "a path is loaded once"
    shorter = draft.with_plan(LayerPlan.remove(8, "4", force=True))
    assert outcome(llm.generate(prompts[:2], params, draft=shorter)) == plain[:2]
    penalised = SamplingParams(max_new_tokens=40, repetition_penalty=1.2)
    assert outcome(llm.generate(prompts, penalised, draft=draft)) == outcome(llm.generate(prompts, penalised))


def test_a_draft_equal_to_the_target_always_stands(llm: LLM, directory: Path) -> None:
    """With its own cache as well: what it lacks after a full round is filled in, or the next drafts would differ."""
    prompts = random_prompts([5, 9])
    for params in (SamplingParams(max_new_tokens=33), SamplingParams(max_new_tokens=33, temperature=0.8, seed=1)):
        for draft in (llm.with_plan(llm.plan), LLM(directory, device="cpu")):
            drafted = llm.generate(prompts, params, draft=draft, draft_tokens=4)
            assert stats(drafted[0]).acceptance_rate > 0.99
            assert stats(drafted[0]).tokens_per_round > 4.9


def test_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=4, ignore_eos=True)
    prompts = random_prompts([4, 9, 2])
    together = llm.generate(prompts, params, draft_plan=DRAFTS["blocks"])
    for prompt, completion in zip(prompts, together, strict=True):
        assert llm.generate([prompt], params, draft_plan=DRAFTS["blocks"])[0].token_ids == completion.token_ids
    assert outcome(llm.generate(prompts, params, draft_plan=DRAFTS["blocks"])) == outcome(together)


class TestDistribution:
    """Thousands of short sampled texts of a tiny vocabulary against their exact distribution."""

    VOCABULARY = 7
    TEXTS = 3200

    @pytest.fixture(scope="class")
    def llm(self, tmp_path_factory: pytest.TempPathFactory) -> LLM:
        model = make_llama(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, vocab_size=self.VOCABULARY, initializer_range=0.5, eos_token_id=None,
        )  # fmt: skip
        return LLM(save(model, tmp_path_factory.mktemp("model")), device="cpu")

    def exact(self, llm: LLM, prompt: list[int], params: SamplingParams, count: int) -> torch.Tensor:
        """Probabilities of the next ``count`` tokens together, ``[vocabulary, ...]``."""
        seen = torch.zeros(1, self.VOCABULARY, dtype=torch.bool)
        seen[0, prompt] = True
        following = process_scores(llm.model(torch.tensor([prompt]))[:, -1], params, seen).softmax(-1)[0]
        if count == 1:
            return following
        rest = [self.exact(llm, [*prompt, token], params, count - 1) for token in range(self.VOCABULARY)]
        return torch.stack([share * part for share, part in zip(following, rest, strict=True)])

    def deviation(self, llm: LLM, params: SamplingParams) -> float:
        """Chi-square per degree of freedom of second and third token; the first one is the prefill's, not a draft's."""
        prompt, size = [3, 1, 5], self.VOCABULARY
        counts = torch.zeros(size, size, dtype=torch.long)
        torch.manual_seed(0)  # of the seeds of rows
        rates = []
        for _ in range(self.TEXTS // 16):
            completions = llm.generate([prompt] * 16, params, draft_plan=LayerPlan(3, (0, 2)), draft_tokens=2)
            rates.append(stats(completions[0]).acceptance_rate)
            for completion in completions:
                counts[completion.token_ids[1:]] += 1
        assert 0.1 < sum(rates) / len(rates) < 0.95
        return chi_square_per_degree(counts.flatten(), self.exact(llm, prompt, params, 3).sum(0).flatten())

    @pytest.mark.parametrize(
        "options",
        [{}, {"top_k": 4, "temperature": 1.3}, {"top_p": 0.8, "min_p": 0.05}, {"repetition_penalty": 1.5}],
        ids=["plain", "top-k", "top-p and min-p", "repetition penalty"],
    )
    def test_is_that_of_plain_sampling(self, llm: LLM, options: dict[str, float]) -> None:
        params = SamplingParams(**{"max_new_tokens": 3, "temperature": 1.0, **options})  # type: ignore[arg-type]
        deviation = self.deviation(llm, params)
        assert deviation < 1.7

    @pytest.mark.parametrize("rule", [replaced_by_the_target, accepted_by_the_target_alone])
    def test_a_wrong_rule_fails(self, llm: LLM, rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speculate, "accept_sampled", rule)
        deviation = self.deviation(llm, SamplingParams(max_new_tokens=3, temperature=1.0))
        assert deviation > 3


def test_refusals(llm: LLM, directory: Path, sparse: Path, tmp_path: Path) -> None:
    prompts = random_prompts([3])
    plan = DRAFTS["blocks"]
    with pytest.raises(InputError, match="draft_tokens 3 without a draft; give draft_plan or draft"):
        llm.generate(prompts, draft_tokens=3)
    with pytest.raises(InputError, match="draft_plan and draft both say what drafts"):
        llm.generate(prompts, draft_plan=plan, draft=llm)
    for wrong in (0, 17, 2.5, True):
        with pytest.raises(InputError, match=rf"draft_tokens is {wrong}; it must be a whole number, 1-16"):
            llm.generate(prompts, draft_plan=plan, draft_tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the plan is for 9 blocks, the loaded model has 8"):
        llm.generate(prompts, draft_plan=LayerPlan.full(9))
    with pytest.raises(InputError, match="block 3-4,6 and mlp of block 3-4,6, but the model it drafts for runs 5"):
        llm.with_plan(plan).generate(prompts, draft=llm)
    other = LLM(save(make_llama(vocab_size=100), tmp_path), device="cpu")
    with pytest.raises(InputError, match="the draft has a vocabulary of 100 tokens, this model one of 259"):
        llm.generate(prompts, draft=other)
    renamed = save_chat_model(tmp_path / "renamed")
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(
        text.replace('"a"', '"swap"').replace('"b"', '"a"').replace('"swap"', '"b"')
    )
    with pytest.raises(InputError, match="the draft's tokenizer gives other numbers to tokens"):
        llm.generate(prompts, draft=LLM(renamed, device="cpu"))
    with pytest.raises(InputError, match=r"the draft takes texts of 40 tokens, this model 512; .* with max_length=40"):
        llm.generate(prompts, draft=LLM(sparse, device="cpu", max_length=40))


@pytest.mark.gpu
def test_graphs_of_drafts_and_checks(directory: Path, sparse: Path) -> None:
    """In fp32, where a forward of several tokens takes the tokens of as many steps; each twice, then replayed."""
    llm = LLM(directory, device="cuda", dtype="float32")
    prompts = random_prompts([5, 1, 250, 18, 7])
    for params in (SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=40, repetition_penalty=1.2)):
        plain = outcome(llm.generate(prompts, params))
        for draft in (llm.with_plan(DRAFTS["blocks"]), llm.with_plan(DRAFTS["halves"]), sparse):
            for turn in range(2):
                drafted = llm.generate(prompts, params, draft=draft, draft_tokens=4)
                assert outcome(drafted) == plain
                assert 0 < stats(drafted[0]).accepted < stats(drafted[0]).drafted
                assert (drafted[0].timings.capture_ms == 0) or turn == 0
    sampled = SamplingParams(max_new_tokens=30, temperature=0.8, top_p=0.9, seed=3)
    once, again = (outcome(llm.generate(prompts, sampled, draft_plan=DRAFTS["blocks"])) for _ in range(2))
    assert once == again
