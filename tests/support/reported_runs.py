"""Run directories without a run, for the tests of the report, and its page as they read it."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOID = {"meta", "img", "br", "rect", "line", "path", "circle"}


class Page(HTMLParser):
    """A parsed page. Fails on an end tag that does not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.spans: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.spans.append((dict(attrs).get("class") or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def rollout(step: int, task: str, tokens: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "step": step,
        "env": "sokoban-env",
        "task_id": task,
        "teacher_prompt_text": "You are an expert.\nPlay well.",
        "completion": "".join(tokens),
        "reward": 1.0,
        "stop": "eos",
        "tokens": tokens,
        **fields,
    }


def write_rollouts(
    run_dir: Path, step: int, rows: list[dict[str, Any]], kl: list[list[float]] | None
) -> None:
    folder = run_dir / "rollouts"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kl is not None:
        flat = np.array([v for values in kl for v in values], dtype=np.float32)
        offsets = np.cumsum([0, *map(len, kl)]).astype(np.int64)
        save_file({"kl": flat, "offsets": offsets}, path.with_suffix(".safetensors"))


def finished_run(run_dir: Path) -> Path:
    """A finished run of 20 steps."""
    run_dir.mkdir()
    lines: list[dict[str, Any]] = [
        {
            "step": 0,
            "eval/sokoban-env/baseline_student/avg": 0.05,
            "eval/sokoban-env/baseline_teacher/avg": 0.95,
            "eval/sokoban-env/baseline_diff": 0.9,
        }
    ]
    for step in range(1, 21):
        lines.append(
            {
                "step": step,
                "teacher_kl": 4.93 / step,
                "reward/mean": step / 20,
                "loss/policy": 0.1,
                "entropy/student": 1.0,
                "entropy/teacher": 0.5,
                "completions/length_mean": 6.0,
                "kl/sampler_mismatch": 0.0,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval/sokoban-env/student/avg": 0.04 * step})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (run_dir / "config.toml").write_text("max_steps = 20\n")
    (run_dir / "env.json").write_text(json.dumps({"python": "3.11", "packages": {"rich": "15"}}))
    board = {"env": "sokoban-env", "gap_closed": 0.92, "gap_closed_low": 0.88}
    board |= {"gap_closed_high": 0.95, "verdict": "closed", "steps": 20, "seconds": 73.0}
    (run_dir / "scoreboard.json").write_text(json.dumps(board))
    for step in (1, 5, 10, 15, 20):
        rows = [rollout(step, f"t{i}", [f"s{step}t{i}", "\n"]) for i in (0, 0, 1, 2, 3)]
        write_rollouts(run_dir, step, rows, [[0.001, 5.0]] * 5)
    return run_dir
