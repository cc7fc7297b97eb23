"""An environment whose every text is hostile: ids, prompts, metrics and errors."""

from __future__ import annotations

from typing import Any

from minidistill.envs import Task

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
FORGED = "x\n2030-01-01 00:00:00  warning: forged\r\nstep 9/9  kl 0"
MARKUP = "<script>alert(1)</script>&\"'"
LONG = "A" * 5_000_000


class Hostile:
    def __init__(self) -> None:
        texts = (ESCAPES, FORGED, MARKUP, f"{ESCAPES}{MARKUP}", "plain", "other", "last", "more")
        tasks = [
            Task(f"{index}\ud800{ESCAPES}{MARKUP}", ({"role": "user", "content": text},))
            for index, text in enumerate(texts)
        ]
        self.train, self.eval = tasks[:6], tasks[6:]
        self.scored = 0

    def score(self, task: Task, completion: str) -> Any:
        self.scored += 1
        if self.scored == 2:
            raise ValueError(f"{FORGED}{ESCAPES}\udfff{LONG}")
        return {"reward": 0.5, "a/b": 1.0, "loss/total": 7.0, MARKUP: 2.0}


def load() -> Hostile:
    return Hostile()
