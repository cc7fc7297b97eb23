"""One point of `bench.growth`: a process that takes a case's steps apart.

python -m bench.growth_point CASE REPEATS THREADS CLOCK    # the case in JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench.our_step import open_run, use_cpu
from bench.step import measure
from bench.step_pieces import CLOCKS, Clock
from bench.workload import Case


def main(case: Case, repeats: int, clock: Clock) -> None:
    """Print the figures, in JSON."""
    with tempfile.TemporaryDirectory() as name, open_run(case, Path(name)) as run:
        measured = measure(run, repeats, clock)
    figures = {
        "pieces": measured.parts.pieces,
        "step": measured.parts.step,
        "training": measured.parts.training,
        "first_step": measured.first_step,
        "peak_gib": measured.peak_bytes / 2**30,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    use_cpu(int(sys.argv[3]))
    main(Case(**json.loads(sys.argv[1])), int(sys.argv[2]), CLOCKS[sys.argv[4]])
