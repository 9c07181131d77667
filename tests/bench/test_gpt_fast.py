"""gpt-fast as a peer, with a stand-in of its two files: found by a variable, asked by its own functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsert.bench.architectures import hf_config
from sparsert.bench.effort import Effort
from sparsert.bench.gpt_fast_contender import GptFastContender
from sparsert.bench.peers import GPT_FAST_VARIABLE, why_absent
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting
from sparsert.errors import UnsupportedError

CPU = torch.device("cpu")
SUBJECT = Subject("tiny", hf_config("tiny") | {"num_hidden_layers": 2}, "float32", "dense")
EFFORT = Effort(warmup=1, runs=2, time_limit_s=60.0)

#: The interface that is used of gpt-fast, on a model of an embedding and a head.
MODEL = """
import dataclasses, types, torch

@dataclasses.dataclass
class ModelArgs:
    block_size: int = 0
    vocab_size: int = 0
    n_layer: int = 0
    n_head: int = 0
    n_local_heads: int = 0
    dim: int = 0
    intermediate_size: int = 0
    rope_base: float = 0
    norm_eps: float = 0

class Layer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = torch.nn.Module()
        self.attention_norm = torch.nn.LayerNorm(args.dim, bias=False)

class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.config = args
        self.tok_embeddings = torch.nn.Embedding(args.vocab_size, args.dim)
        self.layers = torch.nn.ModuleList(Layer(args) for _ in range(args.n_layer))
        self.output = torch.nn.Linear(args.dim, args.vocab_size, bias=False)
        self.seen = []

    def setup_caches(self, max_batch_size, max_seq_length):
        assert self.max_batch_size == self.max_seq_length == -1 and self.layers[0].attention.kv_cache is None
        self.sizes = (max_batch_size, max_seq_length)
        self.layers[0].attention.kv_cache = torch.zeros(self.sizes)

    def forward(self, tokens, positions):
        self.seen.append((tuple(tokens.shape), positions.tolist()))
        return self.output(self.layers[0].attention_norm(self.tok_embeddings(tokens)))
"""

GENERATE = """
from model import Transformer
from tokenizer import get_tokenizer

def prefill(model, x, input_pos, temperature, top_k):
    return model(x, input_pos)[:, -1:].argmax(-1)

def decode_one_token(model, x, input_pos):
    return model(x, input_pos)[:, -1:].argmax(-1)

def decode_n_tokens(model, cur_token, input_pos, num_new_tokens, callback, temperature, top_k):
    for _ in range(num_new_tokens):
        cur_token = decode_one_token(model, cur_token, input_pos)
        input_pos += 1
        callback(cur_token)

def generate(model, prompt, max_new_tokens, BATCH):
    raise AssertionError("a stand-in")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with both files; modules of these names are forgotten afterwards."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "generate.py").write_text(GENERATE.replace("BATCH", "batch_size"))
    monkeypatch.setenv(GPT_FAST_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("model", "generate", "tokenizer"):
        sys.modules.pop(name, None)


def test_it_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(GPT_FAST_VARIABLE, raising=False)
    assert f"in the variable {GPT_FAST_VARIABLE}" in str(why_absent("gpt-fast", "cuda"))
    monkeypatch.setenv(GPT_FAST_VARIABLE, str(tmp_path))
    assert "there is no model.py and generate.py" in str(why_absent("gpt-fast", "cuda"))
    for name in ("model.py", "generate.py"):
        (tmp_path / name).write_text("")
    assert why_absent("gpt-fast", "cuda") is None
    assert why_absent("gpt-fast", "cpu") == "gpt-fast captures its decode step on a GPU only, and this is the CPU"


def test_every_token_is_timed(checkout: Path) -> None:
    contender = GptFastContender(SUBJECT, CPU)
    facts = contender.facts()
    assert facts["weight_bytes"] == 4 * (2 * 512 * 64 + 2 * 64) and facts["read_bytes"] == 4 * (512 * 64 + 2 * 64)
    for setting in (Setting(1, 6, 4, 1), Setting(3, 5, 2, 3), Setting(2, 5, 1, 2)):
        contender.model.seen.clear()
        runs, more = contender.measure(setting, EFFORT, seed=0)
        assert contender.model.sizes == (setting.batch, setting.length)
        assert len(runs) == 2 and [len(times) for times in runs[0].token_s] == setting.batch * [setting.output_len]
        assert all(list(times) == sorted(times) and 0 < times[0] <= runs[0].elapsed_s for times in runs[0].token_s)
        assert more["peak_bytes"] > 0 and contender.check(setting.batch)["correct"] is None
        prompt = ((setting.batch, setting.input_len), list(range(setting.input_len)))
        steps = [((setting.batch, 1), [setting.input_len + step]) for step in range(setting.output_len - 1)]
        assert contender.model.seen == 3 * [prompt, *steps], "one warm-up, two runs"


def test_what_it_does_not_run(checkout: Path) -> None:
    contender = GptFastContender(SUBJECT, CPU)
    with pytest.raises(UnsupportedError, match="has no queue"):
        contender.measure(Setting(2, 4, 2, 3), EFFORT, 0)
    with pytest.raises(UnsupportedError, match="unpruned models only"):
        GptFastContender(SUBJECT.at_corner(sparse=True, removed=()), CPU)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"attention_bias": True}, "without biases; tiny has others"),
        ({"head_dim": 16}, "without biases; tiny has others"),
        ({"rope_parameters": hf_config("llama-3.1-8b")["rope_parameters"]}, "does not know rope_scaling of tiny"),
    ]
    for change, message in changes:
        with pytest.raises(UnsupportedError, match=message):
            GptFastContender(Subject("tiny", SUBJECT.hf_config | change, "float32", "dense"), CPU)


def test_an_old_version_runs_one_text(checkout: Path) -> None:
    (checkout / "generate.py").write_text(GENERATE.replace("BATCH", "more"))
    contender = GptFastContender(SUBJECT, CPU)
    assert len(contender.measure(Setting(1, 4, 2, 1), EFFORT, 0)[0]) == 2
    with pytest.raises(UnsupportedError, match="one text at a time"):
        contender.measure(Setting(2, 4, 2, 2), EFFORT, 0)
