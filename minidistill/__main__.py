"""`python -m minidistill`, the same as the `minidistill` command."""

from minidistill.cli import entry

if __name__ == "__main__":
    entry()
