"""Writes what `minidistill plan` says into docs/published.md, between two comments for each part.

python -m tools.published_plans          writes the plans and the table of costs
python -m tools.published_plans --check  exits with 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK
from tools.blocks import placed

PAGE = Path(__file__).parents[1] / "docs" / "published.md"
PRICE = 2
"""Of a GPU hour in the page's tables: an example."""
FULL = " @ opcd-full"
NAMES = {
    "Sokoban": "sokoban-turns-qwen3-4b @ opcd-sokoban",
    "Frozen Lake": "frozen-lake-qwen3-4b @ opcd-frozen-lake",
    "medical": "opcd-medical",
    "safety": "opcd-safety",
}
"""The configurations by the names of the published tables."""
LORA_MACHINES = ((1, 24), (1, 80), (4, 80))
FULL_MACHINES = ((1, 80), (4, 80))
SHOWN = f"{NAMES['Sokoban']} --gpus 1 --gpu-memory 80 --gpu-price {PRICE}"
"""The plan that the page shows in full."""


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration on a machine."""

    name: str
    is_full: bool
    gpus: int
    gib: int

    @property
    def arguments(self) -> str:
        """Of `minidistill plan`."""
        files = NAMES[self.name] + (FULL if self.is_full else "")
        return f"{files} --gpus {self.gpus} --gpu-memory {self.gib} --gpu-price {PRICE}"

    def cells(self) -> list[str]:
        plan = json.loads(printed(f"{self.arguments} --json"))
        cells = [
            self.name,
            "all weights" if self.is_full else "adapter",
            f"{self.gpus} × {self.gib}",
        ]
        timing: dict[str, Any] | None = plan["timing"]
        if timing is None:
            return [*cells, "does not fit", "", "", ""]
        figures = (timing["hours"], timing["gpu_hours"], timing["cost"])
        seconds = f"{timing['seconds']['step']:.1f} ({timing['card']})"
        return [*cells, seconds, *(f"{figure:.2f}" for figure in figures)]


ROWS = [
    Row(name, is_full, *machine)
    for name in NAMES
    for is_full, machines in ((False, LORA_MACHINES), (True, FULL_MACHINES))
    for machine in machines
]


def printed(arguments: str) -> str:
    """What `minidistill plan` prints on a console that is no terminal."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(["plan", *arguments.split()])
    assert code in (EXIT_OK, EXIT_ENVIRONMENT), arguments
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table() -> str:
    head = [
        "table",
        "trained",
        "GPUs × GiB",
        "seconds a step",
        "hours",
        "GPU hours",
        f"cost at {PRICE}",
    ]
    rows = [head, ["---"] * len(head), *(row.cells() for row in ROWS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def page(text: str) -> str:
    """The page's text with the parts as they are now."""
    parts = {"costs": table(), "plan": f"```text\n{printed(SHOWN)}\n```"}
    for name, part in parts.items():
        text = placed(text, f"<!-- {name} -->", f"<!-- end of {name} -->", part)
    return text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("tools.published_plans")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is out of date")
    check = parser.parse_args(arguments).check
    text = PAGE.read_text()
    now = page(text)
    if check:
        return int(now != text)
    PAGE.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
