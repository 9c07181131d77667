"""Options of jobs: flags, config files, defaults, and which wins."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from sparsert.errors import InputError
from sparsert.jobs.options import REQUIRED, add_options, option, parse_options, to_record


@dataclasses.dataclass(frozen=True)
class Options:
    text: tuple[str, ...] = option(REQUIRED, "text files", metavar="FILE")
    steps: int = option(10, "updates")
    learning_rate: float = option(0.5, "highest")
    micro_batch: int | None = option(None, "windows at a time")
    method: str = option("wanda", "which", choices=("wanda", "magnitude"))
    resume: bool = option(False, "go on")


@dataclasses.dataclass(frozen=True)
class Changed(Options):
    steps: int = option(99, "updates")


def parse(*words: object, kind: type = Options) -> Options:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, kind)
    return parse_options(parser.parse_args([str(word) for word in words]), kind)


def test_defaults_flags_and_subclasses() -> None:
    assert parse("--text", "a", "b") == Options(text=("a", "b"))
    given = parse("--text", "a", "--steps", 3, "--learning-rate", 1, "--micro-batch", 2, "--resume")
    assert given == Options(text=("a",), steps=3, learning_rate=1.0, micro_batch=2, resume=True)
    assert parse("--text", "a", "--resume", "--no-resume").resume is False
    assert parse("--text", "a", kind=Changed).steps == 99
    assert to_record(given)["text"] == ["a"]


@pytest.mark.parametrize("form", ["json", "toml"])
def test_a_file_stands_in_for_flags_and_flags_win(form: str, tmp_path: Path) -> None:
    file = tmp_path / f"job.{form}"
    if form == "json":
        file.write_text(json.dumps({"text": ["a", "b"], "learning-rate": 2, "micro_batch": 4, "steps": 5}))
    else:
        pytest.importorskip("tomllib")
        file.write_text('text = ["a", "b"]\nlearning-rate = 2\nmicro_batch = 4\nsteps = 5\n')
    options = parse("--config", file, "--steps", 7)
    assert options == Options(text=("a", "b"), learning_rate=2.0, micro_batch=4, steps=7)
    assert isinstance(options.learning_rate, float)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": "a", "step": 5}, "no option is called 'step'; did you mean 'steps'?"),
        ({"text": "a", "zebra": 5}, "no option is called 'zebra'; there are text, steps"),
        ({"text": "a", "steps": "5"}, "steps is '5', of type str; it must be int"),
        ({"text": "a", "steps": True}, "steps is True, of type bool; it must be int"),
        ({"text": "a", "resume": 1}, "resume is 1, of type int; it must be bool"),
        ({"text": ["a", 3]}, "text is 3, of type int; it must be str"),
        ({"text": "a", "method": "random"}, "method is 'random'; choose one of wanda, magnitude"),
        ({"text": "a", "steps": None}, "steps is None"),
        ({"steps": 5}, "--text: must be given, as a flag or in the file of --config"),
        ([1], "holds no table of options"),
    ],
)
def test_what_a_file_may_not_say(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as raised:
        parse("--config", file)
    assert message in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.json: cannot be read"):
        parse("--config", tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"it must be a JSON or, named \.toml, a TOML file"):
        parse("--config", tmp_path / "broken.json")
    (tmp_path / "broken.toml").write_text("=")
    with pytest.raises(InputError, match=r"broken\.toml: cannot be read"):
        parse("--config", tmp_path / "broken.toml")
