"""The process in which one contender runs: ``python -m sparsert.bench.peer_worker``.

Reads one job as JSON from standard input and writes one line of JSON for each thing that happened, as it
happens, so that a crash at batch 16 does not take the numbers of batch 1 with it:

    {"event": "loaded", ...facts}                        the model is there
    {"event": "row", "setting": 0, ...keys of the row}   a setting was measured
    {"event": "skipped", "setting": 1, "reason": "..."}  a setting could not be
    {"event": "result", "value": ...}                    of a job that is no series of settings (fit)
    {"event": "failed", "reason": "..."}                 nothing could be measured
    {"event": "done"}                                    the end; without it the process has died

Libraries print what they like: file descriptor 1 is turned to standard error before any is imported, and
events go to where it pointed. ``sparsert.bench.peers`` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

Emit = Callable[..., None]


def main() -> None:
    """Run the job on standard input; events go to what was standard output."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=events, flush=True)

    execute(json.load(sys.stdin), emit)


def execute(job: dict[str, Any], emit: Emit) -> None:
    """Run one job; whatever goes wrong becomes an event.

    Args:
        job: from :func:`sparsert.bench.peers.generation_job`, or with ``"task": "fit"`` from ``sparsert.bench.fit``.
        emit: called as ``emit(event, **values)``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what matters is in the facts
            if job["task"] == "fit":
                from sparsert.bench.fit_trial import run_trial

                emit("result", value=run_trial(job))
            else:
                _measure(job, emit)
    except Exception as error:
        emit("failed", reason=reason_of(error))
    emit("done")


def _measure(job: dict[str, Any], emit: Emit) -> None:
    import torch

    from sparsert.bench.effort import Effort
    from sparsert.bench.metrics import summarize
    from sparsert.bench.subject import Subject
    from sparsert.bench.workload import Setting

    subject, device = Subject.from_json(job["subject"]), torch.device(job["device"])
    settings = [Setting.from_json(value) for value in job["settings"]]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    effort = Effort(**job["effort"])
    contender = _make_contender(job, subject, device, settings)
    emit("loaded", **contender.facts())
    checks: dict[int, dict[str, Any]] = {}
    for index, setting in enumerate(settings):
        try:
            # the measurement first: a check of a batch that cannot run would say less
            start = time.perf_counter()
            runs, more = contender.measure(setting, effort, job["seed"])
            measured = time.perf_counter()
            if setting.batch not in checks:
                checks[setting.batch] = contender.check(setting.batch)
            run_s = sum(run.elapsed_s for run in runs)
            spent = {
                "warmup_s": measured - start - run_s,
                "run_s": run_s,
                "check_s": time.perf_counter() - measured,
            }
            emit("row", setting=index, **summarize(runs, setting), **more, **checks[setting.batch], **spent)
        except Exception as error:
            emit("skipped", setting=index, reason=reason_of(error))
            del error
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _make_contender(job: dict[str, Any], subject: Any, device: Any, settings: list[Any]) -> Any:
    peer = job["peer"]
    if peer in ("hf", "hf-compile"):
        from sparsert.bench.transformers_contender import TransformersContender

        return TransformersContender(subject, device, compiled=peer == "hf-compile")
    if peer == "vllm":
        from sparsert.bench.vllm_contender import VllmContender

        longest = max(setting.length for setting in settings)
        return VllmContender(subject, device, batch=max(setting.batch for setting in settings), length=longest)
    if peer == "gpt-fast":
        from sparsert.bench.gpt_fast_contender import GptFastContender

        return GptFastContender(subject, device)
    from sparsert.bench.engine_contender import EngineContender

    largest = max(setting.batch for setting in settings) if job["check"] else 0
    return EngineContender(subject, device, torch_sparse=peer == "torch-sparse", check_rows=largest)


def reason_of(error: BaseException) -> str:
    """One sentence about an exception: what went wrong, in the first line of its message."""
    from sparsert.errors import SparsertError

    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {text.split('. ')[0]}" if text else "out of memory"
    if isinstance(error, SparsertError):
        return text
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
