"""lm-eval's interface on our engine, against transformers and lm-eval's own hf model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_chat_model import save_tokenizer
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert import LLM, InputError, SamplingParams, UnsupportedError

integration = pytest.importorskip("sparsert.integrations.lm_eval")

PAIRS = [
    ("The sea was", " blue"),
    ("a", "b"),
    ("", "hello"),
    ("x " * 60, " tail of a long context"),  # longer than the model reads: cut on its left
    ("trailing space ", "moves"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Any, Path]:
    directory = tmp_path_factory.mktemp("model")
    dense = make_llama(vocab_size=save_tokenizer(directory), max_position_embeddings=96)
    magnitude_prune_(dense)
    save(dense, directory)
    return LLM(directory, device="cpu"), dense, directory


def requests(arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=entry) for entry in arguments]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods(model: tuple[LLM, Any, Path], batch_size: int) -> None:
    llm, dense, _ = model
    answers = integration.SparsertLM(llm, batch_size).loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, answers, strict=True):
        whole = llm.tokenizer.encode(context + continuation)
        ids = whole if context else [llm.tokenizer.bos_token_id, *whole]
        split = len(context.rstrip()) if context else 1  # a byte is a token
        count = len(ids) - split
        ids = ids[-97:]
        logits = dense(torch.tensor([ids[:-1]])).logits[0, -count:].double().log_softmax(-1)
        targets = torch.tensor(ids[-count:])
        assert score == pytest.approx(float(logits.gather(1, targets[:, None]).sum()), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == targets).all())


def test_a_greedy_continuation_is_recognised(model: tuple[LLM, Any, Path]) -> None:
    llm, _, _ = model
    harness = integration.SparsertLM(llm)
    prompt = [5, 6, 7, 8]
    text = llm.generate([prompt], SamplingParams(max_new_tokens=6, ignore_eos=True))[0].token_ids
    answers = harness._loglikelihood_tokens([(None, prompt, list(text)), (None, prompt, [*text[:-1], 9])], True)
    assert answers[0][1] and not answers[1][1] and answers[0][0] > answers[1][0]


def test_rolling_loglikelihood_scores_each_token_once(model: tuple[LLM, Any, Path]) -> None:
    llm, dense, _ = model
    texts = ["short", "".join(chr(97 + index % 26) for index in range(250))]
    answers = integration.SparsertLM(llm, 2).loglikelihood_rolling(requests([(text,) for text in texts]), True)
    bos = llm.tokenizer.bos_token_id
    for text, answer in zip(texts, answers, strict=True):
        ids = [bos, *llm.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + 96, len(ids))
            # the last window is filled up with context on its left
            begin = 0 if done == 1 else end - 97
            window = ids[begin:end]
            logits = dense(torch.tensor([window[:-1]])).logits[0, done - end :].double().log_softmax(-1)
            total += float(logits.gather(1, torch.tensor(ids[done:end])[:, None]).sum())
            done = end
        assert answer == pytest.approx(total, rel=1e-4)


def test_generate_until(model: tuple[LLM, Any, Path]) -> None:
    llm, _, _ = model
    harness = integration.SparsertLM(llm, 2)
    free = llm.generate([llm.tokenizer.encode("The sea")], SamplingParams(max_new_tokens=12))[0].text
    stop = free[4:6]
    asked = [
        ("The sea", {"until": [], "max_gen_toks": 12}),
        ("The sea", {"until": stop, "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        ("another", {"until": ["\n\n"], "max_gen_toks": 5}),
        ("The sea", {"until": [], "max_new_tokens": 12, "temperature": 0.0}),
        ("y" * 200, {"until": [], "max_gen_toks": 12}),
    ]
    answers = harness.generate_until(requests(asked), disable_tqdm=True)
    assert answers[0] == answers[3] == free
    assert answers[1] == free[: free.index(stop)]
    assert answers[4] == llm.generate([llm.tokenizer.encode("y" * 84)], SamplingParams(max_new_tokens=12))[0].text
    sampled = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "seed": 3}
    expected = llm.generate(
        [llm.tokenizer.encode("The sea")], SamplingParams(max_new_tokens=12, temperature=0.9, seed=3)
    )[0].text
    assert harness.generate_until(requests([("The sea", sampled)]), disable_tqdm=True) == [expected]


def test_chat_template(model: tuple[LLM, Any, Path]) -> None:
    llm, _, _ = model
    text = integration.SparsertLM(llm).apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert integration.SparsertLM(llm).tok_encode(text)[0] == llm.tokenizer.bos_token_id


def test_what_cannot_be_done_is_refused(model: tuple[LLM, Any, Path]) -> None:
    harness = integration.SparsertLM(model[0])
    with pytest.raises(InputError, match="batch_size is 0"):
        integration.SparsertLM(model[0], 0)
    with pytest.raises(UnsupportedError, match="a task sets num_beams for generation; known are until"):
        harness.generate_until(requests([("a", {"num_beams": 4, "max_gen_toks": 8})]))
    with pytest.raises(InputError, match="a task generates 256 tokens; this model takes 96"):
        harness.generate_until(requests([("a", {"until": ["."]})]))
    with pytest.raises(InputError, match="97 to score; need at least one each, and at most 96"):
        harness.loglikelihood(requests([("a", "b" * 97)]), disable_tqdm=True)


def test_same_numbers_as_the_hf_model_of_lm_eval(model: tuple[LLM, Any, Path]) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    llm, dense, _ = model
    theirs = huggingface.HFLM(pretrained=dense, tokenizer=llm.tokenizer, batch_size=2, device="cpu")
    ours = integration.SparsertLM(llm, 2)
    for one, other in zip(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS)), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4) and one[1] == other[1]
    texts = requests([("some words",), ("z" * 230,)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    asked = requests([("The sea", {"until": ["q"], "max_gen_toks": 9}), ("b", {"until": [], "max_gen_toks": 9})])
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_run_a_task_of_ones_own(model: tuple[LLM, Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.evaluator")
    documents = [{"question": f"{i} and {i}", "choices": ["even", "odd"], "label": i % 2} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "parity.yaml").write_text(
        "task: parity_of_ours\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path / 'data.jsonl'}'}}, cache_dir: '{tmp_path}'}}\n"
        "doc_to_text: '{{question}} is'\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    results = integration.run_tasks(model[0], ["parity_of_ours"], task_path=str(tmp_path), limit=4, batch_size=3)
    assert results["parity_of_ours"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(InputError, match="lm-eval knows no task no_such_task"):
        integration.run_tasks(model[0], ["no_such_task"], task_path=str(tmp_path))
