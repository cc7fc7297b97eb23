"""The scoreboard in every situation: terminal, HTML and JSON, compared with golden files.

    pytest tests/driver/test_scoreboard_goldens.py --regenerate-goldens

writes them again; read the difference before it is committed.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.scoreboard_runs import Results, run, solved

from minidistill.reporting.terminal.panels import render_scoreboard

GOLDENS = Path(__file__).parent / "goldens"


def scored(before: int, teacher: int, after: int, tasks: int = 40) -> Results:
    """A run whose tasks are solved from the first one on."""
    rewards = ({"sokoban": solved(count, tasks)} for count in (before, teacher, after))
    return Results(*rewards, prompts=min(tasks, 12))


NO_GAP = scored(8, 0, 8)
NO_GAP.teacher = {"sokoban": [0.0] * 3 + solved(8, 37)}  # three gained, three lost
SITUATIONS = {
    "closed": scored(4, 36, 35),
    "partly": scored(4, 36, 18),
    "none": scored(4, 36, 5),
    "worse": scored(20, 36, 8),
    "no_gap": NO_GAP,
    "context_harms": scored(30, 10, 12),
    "too_few_tasks": scored(0, 1, 1, tasks=1),
    "no_reward": Results(),
    "no_reward_too_few_tasks": Results(prompts=4),
    "no_reward_no_gap": Results(kl=(0.001, 0.0002), unrelated=(0.001, 0.0002)),
    "no_baseline": Results(evaluates=False),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_scoreboard(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    board, plain = run(tmp_path / "run", SITUATIONS[name])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(render_scoreboard(board))
    live = "\n".join(map(str.rstrip, console.file.getvalue().splitlines()))  # type: ignore[attr-defined]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    main = re.search("<main.*?(?=<section aria-labelledby=.curves)", page, re.DOTALL)
    assert main is not None
    outputs = {
        "txt": f"{plain}\n{live}\n",
        "html": main[0],
        "json": json.dumps(board, indent=1, ensure_ascii=False) + "\n",
    }
    for suffix, text in outputs.items():
        golden = GOLDENS / f"{name}.{suffix}"
        if pytestconfig.getoption("--regenerate-goldens"):
            golden.parent.mkdir(exist_ok=True)
            golden.write_text(text, encoding="utf-8")
        assert text == golden.read_text(encoding="utf-8"), golden.name
    assert board["outcome"] == name.removeprefix("no_reward_").replace("no_reward", "closed")
