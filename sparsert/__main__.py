"""``python -m sparsert``: the command line."""

import sys

from sparsert.cli import main

if __name__ == "__main__":
    sys.exit(main())
