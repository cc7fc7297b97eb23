"""A subprocess that prints what it imports `json` from, and what a program that it starts does."""

import json
import subprocess
import sys

if __name__ == "__main__":
    print(json.__file__)
    print(sys.path)
    subprocess.run([sys.executable, "-c", "import json; print(json.__file__)"], check=True)
