"""Text from tokens as they come, and stop strings."""

from __future__ import annotations

import random

import pytest

from sparsert.engine.text import StopScanner, TextStream


class ByteTokenizer:
    """One token a byte, as a byte-level vocabulary at its worst; 256 and above are special tokens."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")


class SpaceTokenizer:
    """Words that bring their space along unless they stand first, like sentencepiece."""

    words = ("the", "sea", "was", "calm")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return " ".join(self.words[token] for token in token_ids)


TEXT = "Ein Fluß — 日本語, 👩‍🚀 and é."


def test_every_piece_is_whole_characters() -> None:
    stream = TextStream(ByteTokenizer(), list("prompt ü".encode()))
    pieces = [stream.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) == TEXT and stream.flush() == ""
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[:3] == ["E", "i", "n"], "complete characters are not held back"


def test_the_space_before_the_first_word_is_kept() -> None:
    stream = TextStream(SpaceTokenizer(), [0, 1])
    assert [stream.push(2), stream.push(3)] == [" was", " calm"]
    assert [TextStream(SpaceTokenizer(), []).push(2)] == ["was"]


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(ByteTokenizer(), [256])
    assert [stream.push(token) for token in (ord("a"), 300, ord("b"))] == ["a", "", "b"]


def test_unfinished_character_comes_with_flush() -> None:
    stream = TextStream(ByteTokenizer(), [])
    assert [stream.push(byte) for byte in b"a\xe6\x97"] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_invalid_bytes_do_not_block_what_follows() -> None:
    stream = TextStream(ByteTokenizer(), [])
    text = "".join(stream.push(byte) for byte in b"a\xff\xfebc") + stream.flush()
    assert text == "a\ufffd\ufffdbc"


def test_windows_stay_short() -> None:
    longest = 0

    class Watching(ByteTokenizer):
        def decode(self, token_ids: list[int], **options: bool) -> str:  # type: ignore[override]
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, **options)  # type: ignore[arg-type]

    stream = TextStream(Watching(), list(b"a long prompt " * 20))
    for byte in (TEXT * 20).encode():
        stream.push(byte)
    assert longest <= 12


@pytest.mark.parametrize("stop", [("STOP",), ("OPS", "STOP"), ("P!", "STOP"), ("S", "x")])
def test_stop_scanner_equals_a_search_in_the_whole_text(stop: tuple[str, ...]) -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("STOP!x ") for _ in range(30))
        scanner, shown, position = StopScanner(stop), "", 0
        while position < len(text) and not scanner.stopped:
            step = generator.randint(1, 4)
            piece = scanner.push(text[position : position + step])
            position += step
            shown += piece
            assert not any(word in shown for word in stop), "nothing past a stop string is ever shown"
        shown += scanner.flush()
        seen = text[:position]
        places = [seen.find(word) for word in stop if word in seen]
        assert scanner.stopped == bool(places)
        assert shown == (seen[: min(places)] if places else seen)


def test_stop_scanner_without_stop_strings_holds_nothing() -> None:
    scanner = StopScanner(())
    assert scanner.push("abc") == "abc" and scanner.flush() == "" and not scanner.stopped


def test_after_the_stop_nothing_comes() -> None:
    scanner = StopScanner(("\n\n",))
    assert scanner.push("one\n") == "one"
    assert scanner.push("\ntwo") == ""
    assert scanner.stopped and scanner.push("three") == "" and scanner.flush() == ""
