"""``python -m diffcore`` is the command ``diffcore``."""

import sys

from diffcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
