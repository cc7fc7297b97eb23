"""One point of `bench.growth`: a process that takes a case's steps apart.

python -m bench.growth_point CASE REPEATS THREADS    # the case in JSON; the figures on stdout
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench.our_step import open_run, use_cpu
from bench.step import measure
from bench.workload import Case


def main(case: Case, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name, open_run(case, Path(name)) as run:
        measured = measure(run, repeats)
    figures = {
        "pieces": measured.pieces,
        "step": measured.step,
        "first_step": measured.first_step,
        "peak_gib": measured.peak_bytes / 2**30,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    use_cpu(int(sys.argv[3]))
    main(Case(**json.loads(sys.argv[1])), int(sys.argv[2]))
