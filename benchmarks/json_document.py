"""How the scripts here hand over what they found: as the last line that they print, and as a file if one was named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def publish(record: dict[str, Any], output: Path | None) -> None:
    """Print a record as one line of JSON, and write it to ``output`` unless that is None."""
    document = json.dumps(record)
    if output is not None:
        output.write_text(document + "\n")
    print(document)
