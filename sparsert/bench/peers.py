"""Contenders in processes of their own, and what becomes of their numbers.

A fresh process for each contender, ours included: all start with an empty GPU, nobody inherits another's
compiled code, allocator or settings, and a peer that crashes, hangs or runs out of memory costs its own rows
only. They run one after the other on the same device and read the same token ids.

    this process                                  sparsert.bench.peer_worker
    job as JSON -------------- stdin ------------->  load, measure, check
    rows, reasons  <---------- stdout ------------   one JSON line an event
    last words     <---------- stderr ------------   whatever libraries print

What it gives up: the seconds that Python, torch and the GPU's context take to start, once a contender.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting

#: Whom ``--peers`` can name; ``ours`` runs always.
PEERS = ("dense", "hf", "hf-compile", "torch-sparse", "vllm", "gpt-fast")

#: What rows of other engines say about their correctness.
NOT_CHECKED = "not checked: another engine on weights of its own"

#: A checkout of gpt-fast, which is a repository and no package.
GPT_FAST_VARIABLE = "SPARSERT_GPT_FAST"

#: Python package of each peer that needs one.
_PACKAGES = {"hf": "transformers", "hf-compile": "transformers", "vllm": "vllm"}

#: Peers that do not run on a CPU, and why.
_GPU_ONLY = {
    "hf-compile": "transformers compiles its decode step",
    "torch-sparse": "torch.sparse runs 2:4 weights",
    "vllm": "vLLM runs here",
    "gpt-fast": "gpt-fast captures its decode step",
}

#: How often a silent process is looked at.
_POLL_SECONDS = 1.0

#: Lines of a dead process's standard error that are looked through for its last words.
_TAIL_LINES = 40

#: Without the working directory, which "-c" and "-m" put first: a source tree there is not the package that runs here.
_WORKER = "import sys; sys.path[:] = filter(None, sys.path); from sparsert.bench.peer_worker import main; main()"

Event = dict[str, Any]
Events = Generator[Event, None, None]
Start = Callable[[dict[str, Any], float], Events]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contender of a run.

    Attributes:
        peer: ``ours`` or one of :data:`PEERS`.
        subject: the model it runs, in its corner.
    """

    peer: str
    subject: Subject

    @property
    def label(self) -> str:
        """For people: the peer, and for our engine its corner."""
        return self.subject.corner if self.peer in ("ours", "dense") else self.peer


def line_up(subject: Subject, peers: Sequence[str], *, corners: bool) -> tuple[list[Entry], list[dict[str, str]]]:
    """Who runs, in this order: the dense baseline, our corners, the other peers.

    Peers run the unpruned model, which is what a user would run otherwise; ``torch-sparse`` runs ours.

    Args:
        subject: the model in the corner asked for.
        peers: names of :data:`PEERS`.
        corners: all four corners of our engine.

    Returns:
        Entries, and for peers that make no sense here ``{"peer", "reason"}``.
    """
    dense = subject.at_corner(sparse=False, removed=())
    entries: list[Entry] = []
    skipped: list[dict[str, str]] = []
    if "dense" in peers or corners or subject.corner == "dense":
        entries.append(Entry("dense", dense))
    if corners:
        entries.append(Entry("ours", subject.at_corner(sparse=True, removed=())))
        entries.append(Entry("ours", subject.at_corner(sparse=False, removed=subject.removed)))
        entries.append(Entry("ours", subject.at_corner(sparse=True, removed=subject.removed)))
    elif subject.corner != "dense":
        entries.append(Entry("ours", subject))
    for peer in peers:
        if peer == "torch-sparse":
            if subject.sparse:
                entries.append(Entry(peer, subject))
            else:
                skipped.append({"peer": peer, "reason": "the model measured is dense, so there is nothing 2:4 in it"})
        elif peer != "dense":
            entries.append(Entry(peer, dense))
    return entries, skipped


def why_absent(peer: str, device_type: str) -> str | None:
    """Why a peer cannot run here, as far as that can be told without starting it; None if it may.

    Args:
        peer: ``ours`` or one of :data:`PEERS`.
        device_type: ``cuda`` or ``cpu``.
    """
    package = _PACKAGES.get(peer)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if peer == "gpt-fast":
        folder = os.environ.get(GPT_FAST_VARIABLE)
        if not folder:
            return f"gpt-fast is not installed; clone it and give its folder in the variable {GPT_FAST_VARIABLE}"
        if not all(Path(folder, name).is_file() for name in ("model.py", "generate.py")):
            return f"{GPT_FAST_VARIABLE}={folder}: there is no model.py and generate.py; give a checkout of gpt-fast"
    if peer in _GPU_ONLY and device_type != "cuda":
        return f"{_GPU_ONLY[peer]} on a GPU only, and this is the {device_type.upper()}"
    return None


def generation_job(
    entry: Entry,
    settings: Sequence[Setting],
    *,
    device: str,
    warmup: int,
    runs: int,
    time_limit_s: float,
    seed: int,
    check: bool,
) -> dict[str, Any]:
    """The job of one contender, as plain types; ``warmup``, ``runs`` and the limit are those of ``Effort``."""
    return {
        "task": "generate",
        "peer": entry.peer,
        "subject": entry.subject.to_json(),
        "settings": [setting.to_json() for setting in settings],
        "device": device,
        "effort": {"warmup": warmup, "runs": runs, "time_limit_s": time_limit_s},
        "seed": seed,
        "check": check,
    }


def start_process(job: dict[str, Any], silence_s: float) -> Events:
    """Run a job in a fresh process.

    Args:
        job: for :mod:`sparsert.bench.peer_worker`.
        silence_s: seconds without an event after which the process counts as hanging and is ended.

    Yields:
        Its events. If it dies or hangs, the last one is ``failed`` with the reason.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=_environment(job["device"]),
            start_new_session=True,  # so that its own children can be ended with it
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(json.dumps(job))
            for event in _events(process, process.stdout, silence_s):
                if event is None:
                    yield {"event": "failed", "reason": f"no sign of life for {silence_s:.0f} s"}
                    return
                last = event["event"] == "done"
                yield event
                if last:
                    return
            yield {"event": "failed", "reason": _last_words(process.wait(), stderr)}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def start_here(job: dict[str, Any], silence_s: float) -> Events:
    """Run a job in this process: no isolation, no start-up time; events come at the end."""
    from sparsert.bench.peer_worker import execute

    events: list[Event] = []
    execute(job, lambda event, **values: events.append({"event": event, **values}))
    yield from json.loads(json.dumps(events))


def _environment(device: str) -> dict[str, str]:
    """Variables of a child: one that finds this package and what this process found, and the GPU if it needs one."""
    here = str(Path(__file__).resolve().parents[2])
    path = dict.fromkeys([here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
    # a process that does not see the GPU spends no seconds on starting it
    return environment | {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else environment


def _events(process: subprocess.Popen[str], stdout: IO[str], silence_s: float) -> Iterator[Event | None]:
    """Events as they come; None when there was none for too long; ends with the stream or the process."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed while it was being read
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last_word = time.monotonic()
    while True:
        # before the wait: what a process wrote before it ended is read by the end of it
        ended = process.poll() is not None
        try:
            line = lines.get(timeout=min(_POLL_SECONDS, silence_s))
        except queue.Empty:
            if ended:  # its own children may hold the stream open
                return
            if time.monotonic() - last_word > silence_s:
                yield None
                return
            continue
        last_word = time.monotonic()
        if line is None:
            return
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a child of the child that writes past what it was told
        if isinstance(event, dict) and "event" in event:
            yield event


def _last_words(code: int, stderr: IO[str]) -> str:
    """Why a process ended, from its exit code and the last line it wrote to standard error."""
    stderr.seek(0)
    lines = [line.strip() for line in collections.deque(stderr, _TAIL_LINES) if line.strip()]
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"ended by {signal.Signals(-code).name}"
            return f"{how}: {lines[-1][:300]}" if lines else how
    return f"ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")
