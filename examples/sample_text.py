"""Text that a model writes itself, as token ids: something to learn masks on that is of the model's own language.

    python examples/sample_text.py --model SmolLM2-135M-Instruct --tokens 4000000 --output sampled.npy
    sparsert learn-masks --model SmolLM2-135M-Instruct --text corpus.jsonl sampled.npy --distillation 0.5 --output OUT

A corpus at hand is of some domain, and masks learned on it favour that domain. What a model samples is of what it was
trained on, whatever that was. Each text starts with a random token, goes on with the likeliest ones for a few steps, so
that it finds a subject, and is sampled from there on; end tokens stand where the model ends a document and begins
another.

Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (arXiv 2305.17888),
section 2.1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsert.jobs.models import load_model, open_dense
from sparsert.jobs.progress import Progress

#: Steps that take the likeliest token before sampling begins.
_SETTLING = 4


def main(words: list[str] | None = None) -> None:
    """Sample and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory or hub id, of dense weights")
    parser.add_argument("--output", required=True, type=Path, help=".npy file to write")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="about how many (default: 4000000)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text (default: 512)")
    parser.add_argument("--batch-size", type=int, default=2048, help="texts at a time (default: 2048)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU if there is one)")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(open_dense(arguments.model), device=device)
    torch.manual_seed(arguments.seed)
    batches = -(-arguments.tokens // (arguments.length * arguments.batch_size))
    texts = []
    with Progress(batches, "sampling", "batch") as progress:
        for _ in range(batches):
            texts.append(sample(model, arguments.batch_size, arguments.length, arguments.temperature))
            progress.advance()
    ids = np.concatenate(texts).reshape(-1)
    np.save(arguments.output, ids)
    print(f"{arguments.output}: {ids.size:,} tokens in texts of {arguments.length}")


def sample(model: Any, count: int, length: int, temperature: float) -> np.ndarray:
    """``[count, length]`` token ids that the model goes on with from random first tokens."""
    start = torch.randint(0, model.config.vocab_size, (count, 1), device=model.device)
    # no end: a text goes on behind an end token as a window of a corpus does
    shared = {"eos_token_id": None, "pad_token_id": 0, "use_cache": True, "top_k": 0, "top_p": 1.0}
    settled = _continue(model, start, min(1 + _SETTLING, length), do_sample=False, **shared)
    texts = _continue(model, settled, length, do_sample=True, temperature=temperature, **shared)
    return texts.cpu().numpy().astype(np.int32)


@torch.no_grad()
def _continue(model: Any, tokens: torch.Tensor, length: int, **options: Any) -> torch.Tensor:
    if tokens.shape[1] >= length:
        return tokens
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("top_k", "top_p")}
    longer: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length - tokens.shape[1], **options
    )
    return longer


if __name__ == "__main__":
    main()
