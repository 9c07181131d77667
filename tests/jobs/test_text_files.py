"""Text files: every kind that is read, and what is said of those that cannot be."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsert.errors import InputError
from sparsert.jobs.text_files import load_tokens, load_windows, read_texts
from sparsert.jobs.training_options import TextOptions

LINES = "".join(json.dumps({"source": "x", "text": text}) + "\n" for text in ("first é", "second"))


class CodeTokenizer:
    """A character is a token: its code."""

    eos_token_id, bos_token_id = 0, None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(LINES + "\n", encoding="utf-8")
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("naïve".encode()))
    assert list(read_texts(tmp_path / "a.txt")) == ["one\ntwo"]
    assert list(read_texts(tmp_path / "b.jsonl")) == ["first é", "second"]
    assert list(read_texts(tmp_path / "c.jsonl.xz")) == ["first é", "second"]
    assert list(read_texts(tmp_path / "d.txt.gz")) == ["naïve"]
    np.save(tmp_path / "e.npy", np.arange(5, dtype=np.uint16))
    tokens = load_tokens([str(tmp_path / "b.jsonl"), str(tmp_path / "e.npy")], CodeTokenizer())
    assert tokens.tolist() == [*map(ord, "first é"), 0, *map(ord, "second"), 0, 1, 2, 3, 4]
    windows = load_windows(TextOptions(text=(str(tmp_path / "e.npy"),), window=2), None, vocabulary=5)
    assert len(windows) == 2 and torch.equal(windows[1], torch.tensor([2, 3]))


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as raised:
            load_tokens([str(tmp_path / name)], CodeTokenizer())
        assert name in str(raised.value)

    refused("empty.txt", b" \n", "holds no text")
    refused("empty.jsonl", b"", "holds no text")
    refused("bytes.txt", b"\xff\xfe\xfa", "cannot be read .* give a UTF-8 text file")
    refused("cut.jsonl.xz", lzma.compress(LINES.encode())[:-30], "cannot be read")
    refused("broken.xz", b"no xz", "cannot be read")
    refused("bad.jsonl", b'{"text": "a"}\nnonsense\n', 'line 2 is no JSON object with "text"')
    refused("key.jsonl", b'{"words": "a"}\n', "line 1 is no JSON object")
    refused("type.jsonl", b'{"text": 5}\n', "line 1: text is int, it must be a string")
    refused("broken.npy", b"abc", "cannot be read")
    np.save(tmp_path / "matrix.npy", np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(InputError, match=r"holds int64 of shape \(2, 2\); need token ids"):
        load_tokens([str(tmp_path / "matrix.npy")], None)
    with pytest.raises(InputError, match=r"missing\.txt: cannot be read"):
        load_tokens([str(tmp_path / "missing.txt")], CodeTokenizer())


def test_windows_need_the_right_vocabulary_and_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(40))
    ids = (str(tmp_path / "ids.npy"),)
    with pytest.raises(InputError, match="holds token ids from 0 to 39, the model knows 0 to 29"):
        load_windows(TextOptions(text=ids, window=8), None, vocabulary=30)
    with pytest.raises(InputError, match="tokenizer has no BOS token"):
        load_windows(TextOptions(text=ids, window=8, bos=True), CodeTokenizer())
    with pytest.raises(InputError, match="the text has 40 tokens and one window takes 64"):
        load_windows(TextOptions(text=ids, window=64), None)
