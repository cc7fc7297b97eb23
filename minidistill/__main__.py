"""`python -m minidistill`, the same as the `minidistill` command."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    # `-m` puts the current directory first: a file there would replace any module of its name
    del sys.path[0]
    if os.path.samefile(os.path.dirname(os.path.dirname(__file__)), os.getcwd()):
        sys.path.append(os.getcwd())  # a checkout that is not installed: vLLM's processes need it

from minidistill.cli import entry

if __name__ == "__main__":
    entry()
