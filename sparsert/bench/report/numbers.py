"""How numbers are written in a report: three digits to read, all digits kept.

A reader wants "7.52 µs", a script wants 7.518344. Every number of a record is therefore written as
an HTML ``data`` element, whose ``value`` attribute holds it as the record does and whose text is
short. Units are decimal (1 GB is 10^9 bytes), as GPU makers and the papers count them.
"""

from __future__ import annotations

import html
import math
from typing import Any

DASH = "–"


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number that can be drawn (JSON's true and NaN are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lookup(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path such as ``time_us.median``, None where any step is missing."""
    value: Any = row
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value


def number(row: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path, None when there is none."""
    value = lookup(row, path)
    return float(value) if is_number(value) else None


def positive(row: dict[str, Any], path: str) -> float | None:
    """As :func:`number`, without what a logarithmic axis or a quotient cannot take."""
    value = number(row, path)
    return value if value is not None and value > 0 else None


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted names, in the order of the record.

    >>> flatten({"batch": 1, "time_us": {"p20": 7.4, "median": 7.5}})
    {'batch': 1, 'time_us.p20': 7.4, 'time_us.median': 7.5}
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def digits(value: float, count: int = 3) -> str:
    """A number with ``count`` significant digits, whole thousands grouped.

    >>> digits(7.518), digits(15.0), digits(1234.5), digits(0), digits(0.00021)
    ('7.52', '15.0', '1,234', '0', '0.00021')
    """
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (count - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{count - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) < 1e-2:
        return f"{value:.{count}g}"
    return f"{value:#.{count}g}".removesuffix(".")


def microseconds(value: float) -> str:
    """``7.52 µs``, or milliseconds from a thousand on."""
    return f"{digits(value)} µs" if value < 1000 else f"{digits(value / 1e3)} ms"


def milliseconds(value: float) -> str:
    """``4.31 ms``, or seconds from ten thousand on."""
    return f"{digits(value)} ms" if value < 10_000 else f"{digits(value / 1e3)} s"


def size(value: float) -> str:
    """Bytes in the decimal unit that fits.

    >>> size(13_476_839_424), size(33_554_432), size(512)
    ('13.5 GB', '33.6 MB', '512 B')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    """A share of one as whole percent, with a decimal below ten."""
    return f"{value * 100:.0f} %" if abs(value) >= 0.0995 else f"{value * 100:.1f} %"


def times(value: float) -> str:
    """A ratio: ``2.12×``."""
    return f"{value:.2f}×"


def data(value: Any, text: str | None = None) -> str:
    """One value of a record as HTML, numbers with all their digits in the ``value`` attribute."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        if text is None:
            text = str(value) if isinstance(value, int) else digits(value, 4)
        return f'<data value="{value!r}">{html.escape(text)}</data>'
    if isinstance(value, (list, tuple)):
        return ", ".join(data(item) for item in value) or DASH
    return html.escape(str(value))
