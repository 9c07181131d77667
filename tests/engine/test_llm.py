"""The facade: text out equals transformers, stopping, streaming, refusals, summary."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import (
    LLAMA3_ROPE,
    delete_blocks_,
    greedy_reference,
    magnitude_prune_,
    make_llama,
    random_prompts,
    save,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsert.checkpoint import open_checkpoint, write_maskllm
from sparsert.compress import magnitude_mask
from sparsert.engine import LLM, Completion, SamplingParams
from sparsert.errors import CheckpointError, InputError, UnsupportedError

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def _save_byte_tokenizer(directory: Path, chat_template: str | None = TEMPLATE) -> None:
    """One token a byte; special tokens 0-2 and 256 + 3-5 for the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "<e>": 2}
    for character in alphabet:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<s>", "<e>", "<u>", "<a>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<e>")
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(directory)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    model = make_llama(num_hidden_layers=8, vocab_size=262, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    magnitude_prune_(model)
    return model


@pytest.fixture(scope="module")
def directory(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(reference, tmp_path_factory.mktemp("model"))
    _save_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, device="cpu")


def _greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6, "attention_bias": True},
        {"num_attention_heads": 8, "head_dim": 16, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ],
    ids=["group 3", "group 1, biases", "group 4, llama3 rope, tied"],
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_greedy_tokens_equal_transformers(changes: dict[str, Any], sparse: bool, tmp_path: Path) -> None:
    model = make_llama(**changes)
    if sparse:
        magnitude_prune_(model)
    prompts = random_prompts([5, 1, 33, 18, 7])
    completions = LLM(save(model, tmp_path), device="cpu").generate(prompts, _greedy(48))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == greedy_reference(model, prompt, 48)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")


def test_removed_blocks_equal_transformers(directory: Path) -> None:
    shorter = LlamaForCausalLM.from_pretrained(directory)
    delete_blocks_(shorter, (4, 5))
    llm = LLM(directory, device="cpu", remove_blocks="4-5")
    prompts = random_prompts([9, 20])
    for prompt, completion in zip(prompts, llm.generate(prompts, _greedy(32)), strict=True):
        assert list(completion.token_ids) == greedy_reference(shorter, prompt, 32)
    assert llm.summary()["blocks_removed"] == [4, 5]
    assert llm.runner.cache_nbytes == 2 * 256 * 6 * 2 * 2 * 24 * 4, "six blocks in the cache, not eight"


def test_block_order_file(directory: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.csv"
    order.write_text("0,5,7,4,6")
    assert LLM(directory, device="cpu", block_order=(order, 1)).model.plan.removed == (5,)
    with pytest.raises(InputError, match="asked to remove 3 blocks, but it offers 2 candidates"):
        LLM(directory, device="cpu", block_order=(order, 3))
    with pytest.raises(InputError, match="exclude each other"):
        LLM(directory, device="cpu", block_order=(order, 1), remove_blocks="4")


def test_masks_and_mask_maker(tmp_path: Path) -> None:
    model = make_llama()
    path = save(model, tmp_path / "model")
    checkpoint = open_checkpoint(path)
    magnitude_prune_(model)
    prompts = random_prompts([11])
    expected = greedy_reference(model, prompts[0], 24)
    pruned = LLM(path, device="cpu", mask_maker=magnitude_mask)
    assert list(pruned.generate(prompts, _greedy(24))[0].token_ids) == expected
    state = model.state_dict()
    write_maskllm(tmp_path / "masks.npz", ((name, state[name] != 0) for name in checkpoint.block_linears()))
    masked = LLM(path, device="cpu", masks=tmp_path / "masks.npz")
    assert list(masked.generate(prompts, _greedy(24))[0].token_ids) == expected
    with pytest.raises(InputError, match="masks and mask_maker exclude each other"):
        LLM(path, device="cpu", masks=tmp_path / "masks.npz", mask_maker=magnitude_mask)


def test_more_prompts_than_a_batch_holds(llm: LLM, reference: LlamaForCausalLM) -> None:
    prompts = random_prompts(list(range(1, 20)))
    completions = llm.generate(prompts, _greedy(6))
    assert [completion.index for completion in completions] == list(range(19))
    assert [completion.timings.batch_size for completion in completions] == [16] * 16 + [3] * 3
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == greedy_reference(reference, prompt, 6)


def test_text_and_timings(llm: LLM) -> None:
    prompts = ["the sea was", "ü"]
    completions = llm.generate(prompts, _greedy(12, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt == prompt
        assert list(completion.prompt_token_ids) == llm.tokenizer.encode(prompt)
        whole = llm.tokenizer.decode([*completion.prompt_token_ids, *completion.token_ids], skip_special_tokens=True)
        assert prompt + completion.text == whole
        assert len(completion.token_ids) == 12 and completion.finish_reason == "length"
    timings = completions[0].timings
    assert timings is completions[1].timings
    assert (timings.batch_size, timings.prompt_tokens, timings.new_tokens) == (2, 13, 24)
    assert timings.prefill_ms > 0 and timings.decode_ms > 0 and timings.capture_ms == 0
    assert timings.decode_tok_per_s == pytest.approx(22 / (timings.decode_ms / 1e3))
    assert llm.generate("the sea was", _greedy(12, ignore_eos=True))[0].text == completions[0].text


def test_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=1.0, top_p=0.9, seed=4, ignore_eos=True)
    prompts = random_prompts([4, 9, 2])
    together = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        assert llm.generate([prompt], params)[0].token_ids == completion.token_ids
    assert (
        llm.generate(prompts[:1], SamplingParams(max_new_tokens=16, temperature=1.0, seed=5, ignore_eos=True))[
            0
        ].token_ids
        != together[0].token_ids
    )


def test_repetition_penalty_equals_transformers(llm: LLM, reference: LlamaForCausalLM) -> None:
    prompts = random_prompts([12, 3])
    for prompt, completion in zip(prompts, llm.generate(prompts, _greedy(24, repetition_penalty=1.3)), strict=True):
        assert list(completion.token_ids) == greedy_reference(reference, prompt, 24, repetition_penalty=1.3)


def _free(llm: LLM, prompt: list[int], count: int = 30) -> Completion:
    """A text that no end token stops."""
    return llm.generate([prompt], _greedy(count, ignore_eos=True))[0]


def test_stop_token_ids(llm: LLM) -> None:
    prompts = random_prompts([6, 10])
    free = [_free(llm, prompt) for prompt in prompts]
    token = free[0].token_ids[9]
    stopped = llm.generate(prompts, _greedy(30, ignore_eos=True, stop_token_ids=[token]))
    for before, after in zip(free, stopped, strict=True):
        if token in before.token_ids:
            end = before.token_ids.index(token) + 1
            assert after.token_ids == before.token_ids[:end] and after.finish_reason == "stop"
            assert after.text == "" or before.text.startswith(after.text)
        else:
            assert after.token_ids == before.token_ids and after.finish_reason == "length"


def test_eos_list_of_the_generation_config(directory: Path, llm: LLM, tmp_path: Path) -> None:
    prompt = random_prompts([8])[0]
    free = _free(llm, prompt)
    token = free.token_ids[4]
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, token]}))
    other = LLM(tmp_path, device="cpu")
    assert other.eos_token_ids == {2, token} and llm.eos_token_ids == {2}
    stopped = other.generate([prompt], _greedy(30))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert other.generate([prompt], _greedy(30, ignore_eos=True))[0].token_ids == free.token_ids
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        LLM(tmp_path, device="cpu")


def test_stop_string_cuts_the_text(llm: LLM) -> None:
    prompt = random_prompts([6])[0]
    free = _free(llm, prompt, 60)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    pieces: list[str] = []
    params = _greedy(60, ignore_eos=True, stop=["never to be seen", stop])
    stopped = llm.generate([prompt], params, stream=lambda index, text, tokens: pieces.append(text))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.find(stop)] == "".join(pieces)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)] and len(stopped.token_ids) < 60


def test_streaming_gives_the_same_text_in_pieces(llm: LLM) -> None:
    prompts: list[Any] = ["one", random_prompts([20])[0], "drei ü"]
    seen: dict[int, tuple[str, list[int]]] = {}

    def stream(index: int, text: str, tokens: list[int]) -> None:
        assert len(tokens) == 1
        before = seen.get(index, ("", []))
        seen[index] = (before[0] + text, before[1] + tokens)

    for completion in llm.generate(prompts, _greedy(40), stream=stream):
        assert seen[completion.index] == (completion.text, list(completion.token_ids))


def test_chat_template(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    expected = tokenizer.convert_tokens_to_ids(["<u>", "h", "i", "<e>", "<a>"])
    as_text = llm.generate(["hi"], _greedy(4), chat=True)[0]
    as_messages = llm.generate([[{"role": "user", "content": "hi"}]], _greedy(4), chat=True)[0]
    assert list(as_text.prompt_token_ids) == list(as_messages.prompt_token_ids) == expected
    with pytest.raises(InputError, match="prompt 0 is a conversation; pass chat=True"):
        llm.generate([[{"role": "user", "content": "hi"}]], _greedy(4))


def test_no_chat_template(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _save_byte_tokenizer(tmp_path, chat_template=None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UnsupportedError, match="no chat template; leave --chat"):
        LLM(tmp_path, device="cpu").generate(["hi"], _greedy(4), chat=True)


def test_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    model = make_llama()
    magnitude_prune_(model)
    llm = LLM(save(model, tmp_path), device="cpu")
    completion = llm.generate(random_prompts([4]), _greedy(5, ignore_eos=True))[0]
    assert completion.text == "" and len(completion.token_ids) == 5
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*or give prompts as token ids"):
        llm.generate(["text"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        llm.generate(["text"])


def test_prompts_that_do_not_fit(directory: Path) -> None:
    llm = LLM(directory, device="cpu", max_length=20)
    with pytest.raises(
        InputError,
        match=r"prompt 1 has 20 tokens, .* max_length 20; shorten it to 19 or fewer, .* \(this model: up to 512\)",
    ):
        llm.generate([[5], [5] * 20])
    with pytest.warns(UserWarning, match="prompt 0 has 15 tokens, so at most 5 can follow within max_length 20"):
        completion = llm.generate([[5] * 15], _greedy(50, ignore_eos=True))[0]
    assert len(completion.token_ids) == 5 and completion.finish_reason == "length"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(llm.generate([[5] * 15], _greedy(5, ignore_eos=True))[0].token_ids) == 5
    for wrong in (1, 513):
        with pytest.raises(InputError, match=f"max_length {wrong} is out of range; this model takes 2-512"):
            LLM(directory, device="cpu", max_length=wrong)


def test_ragged_limits_in_one_batch(directory: Path, reference: LlamaForCausalLM) -> None:
    """A row that fills its room first must not disturb the others."""
    llm = LLM(directory, device="cpu", max_length=32)
    prompts = random_prompts([31, 4, 25])
    with pytest.warns(UserWarning, match="2 prompts leave less room"):
        completions = llm.generate(prompts, _greedy(20, ignore_eos=True))
    assert [len(completion.token_ids) for completion in completions] == [1, 20, 7]
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = greedy_reference(reference, prompt, len(completion.token_ids), eos_token_id=None)
        assert list(completion.token_ids) == expected


def test_refused_prompts(llm: LLM) -> None:
    with pytest.raises(InputError, match="no prompts given"):
        llm.generate([])
    with pytest.raises(InputError, match=r"write one list of ids as \[\[1, 2, 3\]\]"):
        llm.generate([1, 2, 3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="prompt 1 is empty"):
        llm.generate([[5], []])
    with pytest.raises(InputError, match="prompt 0 is empty; give at least one character"):
        llm.generate([""])
    with pytest.raises(InputError, match="prompt 0: token id 262 is outside the vocabulary, 0-261"):
        llm.generate([[5, 262]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the message without a GPU")
def test_no_gpu(directory: Path) -> None:
    with pytest.raises(UnsupportedError, match="no CUDA GPU here; run on the CPU"):
        LLM(directory, device="cuda")


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "nowhere")
    with pytest.raises(InputError, match="refusing to remove block 0"):
        LLM(save(make_llama(num_hidden_layers=8), tmp_path / "model"), device="cpu", remove_blocks=[0, 4])


def test_summary_is_json(directory: Path) -> None:
    llm = LLM(directory, device="cpu", dtype="bfloat16", remove_blocks=[4])
    summary = json.loads(json.dumps(llm.summary()))
    assert summary["architecture"] == "LlamaForCausalLM"
    assert summary["blocks"] == 8 and summary["blocks_removed"] == [4] and len(summary["blocks_kept"]) == 7
    assert summary["linears_sparse"] == 49 and summary["linears_dense"] == 0
    assert summary["linear_bytes"] < 0.75 * summary["linear_bytes_dense"]
    assert summary["embedding_bytes"] == 262 * 96 * 2 and summary["tied_head"] is True
    assert summary["dtype"] == "bfloat16" and summary["device"] == "cpu"
    assert summary["backend"] == "auto" and summary["kernel"] in ("cpu", "unpack")  # unpack where no compiler was found
    assert summary["attention"] == "torch"
    assert summary["kv_bytes_per_token"] == 2 * 7 * 2 * 24 * 2
    assert summary["max_length"] == 512 and summary["warnings"] == []


@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_dense_model_says_so_in_the_summary(tmp_path: Path) -> None:
    summary = LLM(save(make_llama(), tmp_path), device="cpu").summary()
    assert summary["linears_sparse"] == 0 and summary["linear_share"] == 1.0 and summary["kernel"] == "dense"
    assert summary["warnings"][0].startswith("no linear layer is 2:4, so the whole model runs dense")
