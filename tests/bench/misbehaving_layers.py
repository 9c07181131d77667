"""What measuring processes run in tests: functions of a module, since a child imports them by name; no torch here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

from sparsert.bench.layer_task import LayerTask, Row, empty_rows


def misbehave(task: LayerTask, tell: Callable[[str], None]) -> Iterator[list[Row]]:
    """cusparselt crashes from batch 2 on, torch-sparse hangs on layer 2, dense breaks at batch 3 of layer 3."""
    for batch in task.batches:
        tell("dense")
        if task.out_features == 3 and batch == 3:
            raise ValueError("no baseline")
        if "cusparselt" not in task.excluded and batch >= 2:
            tell("cusparselt")
            os.kill(os.getpid(), signal.SIGSEGV)
        if "torch-sparse" not in task.excluded and task.out_features == 2:
            tell("torch-sparse")
            time.sleep(60)
        rows = empty_rows(task, batch, None)
        for row in rows:
            row["reason"] = task.excluded.get(row["contender"])
        yield rows


def die_at_once(task: LayerTask, tell: Callable[[str], None]) -> Iterator[list[Row]]:
    """A process that ends before it has said anything."""
    os._exit(7)
    yield []
