"""How long the levels of `sokoban-env` take to make, on one core.

    python -m bench.sokoban [--levels 1000] [--out FILE]

The settings are those of the public context-distillation experiment: 15,000 train examples of 4 to
9 cells a side with 1 to 7 boxes, solved in at most 80 moves. Times are CPU seconds, so that other
programs do not count. Levels are spread over the numbers of the split; none is cached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.levels import Level, LevelMaker, Recipe

EXAMPLES = 15_000
DIFFICULTY = Difficulty(min_w=4, max_w=9, min_h=4, max_h=9, min_boxes=1, max_boxes=7, max_depth=80)


def measure(count: int) -> dict[str, Any]:
    """Make `count` levels. Returns milliseconds a level, and what the levels are like."""
    maker = LevelMaker(Recipe.of(DIFFICULTY, seed=0, split="train", count=EXAMPLES))
    seconds = []
    levels: list[Level] = []
    for number in np.linspace(0, EXAMPLES - 1, count).astype(int).tolist():
        began = time.process_time()
        levels.append(maker.make(number))
        seconds.append(time.process_time() - began)
    milliseconds = 1000 * np.array(seconds)
    boxes = Counter(sum(level.board.count(symbol) for symbol in "$*") for level in levels)
    moves = [len(level.solution) for level in levels]
    return {
        "levels": count,
        "ms_mean": round(float(milliseconds.mean()), 2),
        "ms_median": round(float(np.median(milliseconds)), 2),
        "ms_p99": round(float(np.percentile(milliseconds, 99)), 1),
        "ms_worst": round(float(milliseconds.max()), 1),
        "boxes": dict(sorted(boxes.items())),
        "moves_mean": round(float(np.mean(moves)), 1),
        "moves_most": max(moves),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", type=int, default=1000, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(arguments)
    if options.levels < 1:
        parser.error("--levels takes a whole number above 0")
    results = measure(options.levels)
    for name, value in results.items():
        print(f"{name.replace('_', ' '):12} {value}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
