"""Options of a job, said once: a frozen dataclass whose fields are flags of the command line and keys of a file.

A field carries its help text, so that flag, key of the config file and entry of the record cannot drift apart:

    steps: int = option(2000, "updates")

is ``--steps N``, ``"steps": N`` in a JSON file and ``steps = N`` in a TOML one; a dash and an underscore are the same.
A flag beats the file, the file beats the default. Keys that no option has are errors, with the nearest one named. A
bool is switched by ``--name`` and ``--no-name``; a tuple takes several values.

Nothing here imports torch, for the command line's help is made of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sparsert.errors import InputError, first_line

Options = TypeVar("Options")

#: Stands for "there is no default": the flag, or the key in the file, must be given.
REQUIRED: Any = dataclasses.MISSING


def option(default: Any, help_text: str, *, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    """A field of an options dataclass.

    Args:
        default: value, or :data:`REQUIRED`; then the field's type must not be a bool.
        help_text: for ``--help``; the default is added to it.
        choices: strings that are allowed.
        metavar: what stands behind the flag, default the type's letter.
    """
    metadata = {"help": help_text, "choices": choices, "metavar": metavar}
    # all options are keywords, so one without a default may follow one with
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def add_options(parser: Any, options_type: type) -> None:
    """Add a flag for every field of an options dataclass, and ``--config FILE``.

    Args:
        parser: of argparse, or a group of one.
        options_type: a dataclass with fields made by :func:`option`.
    """
    parser.add_argument("--config", metavar="FILE", help="read options from this JSON or TOML file; flags win over it")
    hints = typing.get_type_hints(options_type)
    for field in dataclasses.fields(options_type):
        base, many = _value_type(hints[field.name])
        help_text = field.metadata["help"]
        if field.default is not dataclasses.MISSING and field.default not in (None, ()):
            shown = ("on" if field.default else "off") if base is bool else field.default
            help_text += f" (default: {shown})"
        arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text}
        if base is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = base
            arguments["metavar"] = field.metadata["metavar"] or {int: "N", float: "X", str: "TEXT"}[base]
            if field.metadata["choices"]:
                arguments["choices"] = field.metadata["choices"]
                arguments["metavar"] = field.metadata["metavar"] or "|".join(field.metadata["choices"])
            if many:
                arguments["nargs"] = "+"
        parser.add_argument("--" + field.name.replace("_", "-"), **arguments)


def parse_options(arguments: argparse.Namespace, options_type: type[Options]) -> Options:
    """Options from the flags that were given, the config file, and defaults, in this order.

    Raises:
        InputError: an unknown key, a value of the wrong type or none of the choices, or a required option that is
            nowhere given.
    """
    given: dict[str, Any] = {}
    if arguments.config is not None:
        given = _checked(read_config(arguments.config), options_type, arguments.config)
    fields = {field.name: field for field in dataclasses.fields(options_type)}  # type: ignore[arg-type]
    # None is what an outer command knows by the same name and was not given
    given |= {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise InputError(f"{flags}: must be given, as a flag or in the file of --config")
    return options_type(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def read_config(path: str | Path) -> dict[str, Any]:
    """A JSON or TOML file as a flat dictionary.

    Raises:
        InputError: the file cannot be read, or holds no table of options.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".toml":
            import tomllib

            content: Any = tomllib.loads(text)
        else:
            content = json.loads(text)
    except ImportError as error:
        raise InputError(f"--config {file}: TOML needs Python 3.11; write the same options as JSON") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {file}: cannot be read ({first_line(error)}); it must be a JSON or, named .toml, a TOML file"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f'--config {file}: holds no table of options; write {{"steps": 1000, ...}}')
    return content


def to_record(options: Any) -> dict[str, Any]:
    """Options as plain JSON types."""
    record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return record


def _checked(content: Mapping[str, Any], options_type: type, path: str) -> dict[str, Any]:
    hints = typing.get_type_hints(options_type)
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    checked: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(fields)}"
            raise InputError(f"--config {path}: no option is called {key!r}{hint}")
        base, many = _value_type(hints[name])
        values = value if many and isinstance(value, list) else [value]
        optional = type(None) in typing.get_args(hints[name])
        for one in values:
            fits = type(one) is base or (base is float and type(one) is int) or (one is None and optional)
            if not fits:
                raise InputError(
                    f"--config {path}: {key} is {one!r}, of type {type(one).__name__}; it must be {base.__name__}"
                )
            choices = fields[name].metadata["choices"]
            if choices and one not in choices and one is not None:
                raise InputError(f"--config {path}: {key} is {one!r}; choose one of {', '.join(choices)}")
        if base is float:
            values = [None if one is None else float(one) for one in values]
        checked[name] = tuple(values) if many else values[0]
    return checked


def _value_type(hint: Any) -> tuple[type, bool]:
    """int, float, str or bool of a field's annotation, and whether it takes several."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
