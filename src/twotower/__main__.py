"""`python -m twotower` is the command `twotower`."""

import sys

from twotower.cli import main

if __name__ == "__main__":
    sys.exit(main())
