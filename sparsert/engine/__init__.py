"""From prompts to text: KV cache, prefill and decode, sampling, stop conditions, streaming."""

from sparsert.engine.llm import LLM
from sparsert.engine.params import SamplingParams
from sparsert.engine.results import Completion, SpeculationStats, Timings

__all__ = ["LLM", "Completion", "SamplingParams", "SpeculationStats", "Timings"]
