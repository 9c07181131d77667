"""Options of a measurement as the command line would parse them, for calling its ``run`` directly."""

from __future__ import annotations

import argparse
from types import ModuleType

from sparsert.bench.options import add_common_options


def parsed(module: ModuleType, *words: str) -> argparse.Namespace:
    """What ``sparsert bench`` hands to ``module.run``."""
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    add_common_options(parser)
    return parser.parse_args(words)
