"""`python -m twotower` is the command `twotower`."""

import os
import sys

from twotower.cli import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    from twotower.utils.distributed import leave  # loads PyTorch, which --help does without

    leave(code)
