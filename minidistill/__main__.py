"""`python -m minidistill`, the same as the `minidistill` command."""

import sys

from minidistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
