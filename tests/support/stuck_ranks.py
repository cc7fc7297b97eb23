"""`minidistill` whose ranks never get beyond their imports."""

import sys

from minidistill import cli
from minidistill.trainer.distributed import launcher

launcher.MODULE = "support.stuck_import"

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
