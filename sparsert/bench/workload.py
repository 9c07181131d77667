"""What is asked of a model: how many texts at once, how long they are, and which token ids they start with.

Everything a contender is asked is a :class:`Setting`, and its prompts follow from the setting and a seed by
Python's own random generator, so that every process and every peer reads the same token ids, whatever
releases of torch it has. Lengths can be named after the papers that measured them.

Source of the presets: MaskLLM (Fang et al., 2024), table of throughput; Shortened LLaMA (Kim et al., 2024), 12
input tokens and 128 or 512 output tokens.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from sparsert.errors import InputError

#: Prompt and output lengths in tokens by name.
LENGTH_PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    "maskllm": ((128, 128), (128, 2048), (2048, 128), (2048, 2048)),
    "shortened-llama": ((12, 128), (12, 512)),
}

#: Token ids below it are special in most vocabularies.
_FIRST_TOKEN = 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row to measure.

    Attributes:
        batch: texts that run together at most.
        input_len: tokens of every prompt.
        output_len: tokens generated for every prompt; end tokens do not end a text.
        num_prompts: texts in all, sent at once; more than ``batch`` wait for their turn.
    """

    batch: int
    input_len: int
    output_len: int
    num_prompts: int

    @property
    def length(self) -> int:
        """Tokens of a text in the end."""
        return self.input_len + self.output_len

    @property
    def mean_context(self) -> float:
        """Tokens whose keys and values a decode step reads, on average over the output."""
        return self.input_len + self.output_len / 2

    def to_json(self) -> dict[str, int]:
        """As plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Setting:
        """The inverse of :meth:`to_json`."""
        return cls(**value)

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.input_len}/{self.output_len} tokens"


def parse_lengths(text: str) -> list[tuple[int, int]]:
    """Prompt and output lengths that ``--lengths`` names.

    Args:
        text: preset names and pairs such as ``128/512``, separated by commas.

    Returns:
        Pairs of input and output tokens, each once, in the order given.

    Raises:
        InputError: something else.

    Example:
        >>> parse_lengths("shortened-llama,128/128")
        [(12, 128), (12, 512), (128, 128)]
    """
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        name = part.strip()
        numbers = name.split("/")
        if name in LENGTH_PRESETS:
            pairs += LENGTH_PRESETS[name]
        elif len(numbers) == 2 and all(n.isascii() and n.isdigit() and int(n) > 0 for n in numbers):
            pairs.append((int(numbers[0]), int(numbers[1])))
        else:
            raise InputError(
                f"--lengths {text}: {name!r} is no pair of prompt and output tokens such as 128/512, and none of "
                f"{', '.join(LENGTH_PRESETS)}"
            )
    return list(dict.fromkeys(pairs))


def random_prompts(setting: Setting, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of every prompt of a setting: the same for the same arguments, on every machine.

    Example:
        >>> setting = Setting(batch=1, input_len=4, output_len=1, num_prompts=2)
        >>> random_prompts(setting, 512, seed=0) == random_prompts(setting, 512, seed=0)
        True
    """
    first = min(_FIRST_TOKEN, vocab_size - 1)
    draw = random.Random(f"{seed} {setting.input_len}")
    return [[draw.randrange(first, vocab_size) for _ in range(setting.input_len)] for _ in range(setting.num_prompts)]
