"""What a model's quality is: how likely it finds given tokens, and the perplexity of a text."""

from sparsert.evaluate.perplexity import PerplexityProtocol, PerplexityResult, measure_perplexity
from sparsert.evaluate.scoring import TokenScores, score_sequences

__all__ = ["PerplexityProtocol", "PerplexityResult", "TokenScores", "measure_perplexity", "score_sequences"]
