"""Options of ``sparsert prune width``."""

from __future__ import annotations

import dataclasses

from sparsert.jobs.calibration_job import CalibrationOptions
from sparsert.jobs.options import REQUIRED, option


@dataclasses.dataclass(frozen=True)
class WidthOptions(CalibrationOptions):
    """What ``sparsert prune width`` takes."""

    output: str = option(REQUIRED, "directory to create; must be new or empty", metavar="DIR")
    hidden: int | None = option(None, "channels that stay")
    intermediate: int | None = option(None, "neurons of the feed-forward layers that stay")
    heads: int | None = option(None, "query heads that stay")
    kv_heads: int | None = option(None, "key/value heads that stay")
    multiple: int = option(64, "channels and neurons are rounded to a multiple of this")
    over_windows: str = option("l2", "how activations are aggregated over windows", choices=("mean", "l2", "var"))
    over_positions: str = option("mean", "... and then over positions", choices=("mean", "l2", "var"))
    parameters: float | None = option(None, "budget: find sizes with at most so many parameters")
    bytes: float | None = option(None, "budget: ... so many bytes of weights at 16 bits a value")
    us: float | None = option(None, "budget: ... so many microseconds of linear layers a decode step")
    layer_times: str | None = option(None, "record of `sparsert bench kernels`, for --us", metavar="FILE")
    batch: int = option(1, "texts decoded at a time, for --us")
    packed: bool = option(False, "count block weights as packed 2:4 in --bytes and --us")
    most_width: float = option(0.4, "search: most share of a width that is cut")
    most_depth: float = option(0.0, "search: most share of the blocks that is cut")
    top: int = option(8, "search: candidates that are trimmed and measured")
    search_steps: int = option(0, "search: updates of distillation before a candidate is measured")
    search_learning_rate: float = option(2e-4, "search: learning rate of these")
