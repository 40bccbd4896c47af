"""``python -m llmprune``: the command line, for launchers that start modules (``torchrun -m llmprune``)."""

import sys

from llmprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
