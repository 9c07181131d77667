"""How often a setting is measured: warm-up, a number of runs, and an end to patience.

Contenders differ in speed by a factor of five and more, and an equal number of runs would spend most of the
time on the slowest of them. So the number of runs is a wish and the seconds of a setting are a limit:
no run is begun that would end beyond them, but one is always made. How many there were stands in the row. What it
gives up: the spread of a slow contender comes from fewer requests than that of a fast one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sparsert.bench.metrics import Run


@dataclasses.dataclass(frozen=True)
class Effort:
    """What may be spent on one setting.

    Attributes:
        warmup: runs before the measured ones, at least.
        runs: measured runs, at most.
        time_limit_s: seconds of measured runs after which no other is begun.
    """

    warmup: int
    runs: int
    time_limit_s: float

    def measure(self, send: Callable[[], Run]) -> list[Run]:
        """Call ``send`` once, and again as long as runs and seconds are left.

        Example:
            >>> def send():
            ...     return Run(token_s=((2.0,),), elapsed_s=4.0)
            >>> len(Effort(warmup=0, runs=3, time_limit_s=10.0).measure(send))
            2
        """
        done = [send()]
        while len(done) < self.runs:
            spent = sum(run.elapsed_s for run in done)
            if spent + spent / len(done) > self.time_limit_s:
                break
            done.append(send())
        return done
