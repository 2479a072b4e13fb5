"""`python -m fastpost` is the command `fastpost`."""

import sys

from fastpost.cli import main

if __name__ == "__main__":
    sys.exit(main())
