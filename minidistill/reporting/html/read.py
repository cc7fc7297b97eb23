"""Reads a run directory that may be incomplete or damaged."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minidistill.reporting.html.files import figure, lines, read, read_end, read_object
from minidistill.reporting.html.rollouts import ShownRollout, selected
from minidistill.reporting.run_lock import is_locked
from minidistill.system.run_folders import no_run

RUN_FILES = ("metrics.jsonl", "scoreboard.json", "config.resolved.json", "config.toml")
"""A directory with none of these holds no run."""
LAST_STEP = 10**9
"""No run has more steps."""
LOG_LINES = 12
"""Lines of the log that are shown of a run that stopped."""

Unfinished = Literal["running", "stopped"]
State = Unfinished | Literal["finished"]


@dataclass(frozen=True, slots=True)
class Run:
    """The readable files. `steps` is {step: {metric: value}}, without values that are no numbers.

    `completions` are the scoreboard's, or the baseline's, which lack those after training. `log` is
    the end of the log of a run that stopped. `damage` says which files are damaged, `notes` also
    what is missing.
    """

    name: str
    state: State
    steps: dict[int, dict[str, float]]
    board: dict[str, Any]
    completions: list[Any]
    config: str
    settings: dict[str, Any]
    env: dict[str, Any]
    rollouts: tuple[tuple[int, tuple[ShownRollout, ...]], ...]
    log: str = ""
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def max_steps(self) -> int | None:
        """How many steps the run is to have, None if that is not known."""
        value = self.settings.get("max_steps")
        return value if isinstance(value, int) and 0 < value < LAST_STEP else None

    @property
    def placement(self) -> list[tuple[str, str]]:
        """What the run printed at its start: (name, value) pairs, a name only in its first row."""
        rows = self.env.get("header")
        pairs = (row for row in rows if isinstance(row, list)) if isinstance(rows, list) else ()
        return [(str(row[0]), str(row[1])) for row in pairs if len(row) == 2]

    @property
    def facts(self) -> dict[str, str]:
        """The other facts of the environment in which it ran."""
        facts = {}
        for name, value in self.env.items():
            if name == "packages" and isinstance(value, Mapping):
                value = ", ".join(f"{package} {version}" for package, version in value.items())
            if name != "header" and value not in ([], ""):
                facts[name] = str(value)
        return facts

    @property
    def resume(self) -> str:
        """The command that goes on with the run, empty if it is not known."""
        argv = self.env.get("argv")
        if not isinstance(argv, list) or argv[:1] != ["run"]:
            return ""
        words = [str(word) for word in argv if word != "--resume"]
        return f"minidistill {shlex.join(words)} --resume"


def read_run(run_dir: Path, unfinished: Unfinished | None = None) -> Run:
    """Read the files that exist. Raises UserError (exit code 2) if there are none.

    `unfinished` is the state of a run without a whole scoreboard; without it the run's lock says
    whether it is running.
    """
    if not any((run_dir / name).is_file() for name in RUN_FILES):
        raise no_run(
            run_dir, "give the output directory of a run; it contains metrics.jsonl and config.toml"
        )
    state: State
    damage: list[str] = []
    steps = _steps(run_dir / "metrics.jsonl", damage)
    board = read_object(run_dir / "scoreboard.json", damage)
    completions = board.get("completions")
    if not completions and not board:
        completions = read_object(run_dir / "baseline.json", damage).get("completions")
    if board and not board.get("missing"):
        state = "finished"
    elif unfinished is None:
        state = "running" if is_locked(run_dir) else "stopped"
    else:
        state = unfinished
    env = read_object(run_dir / "env.json", damage)
    settings = read_object(run_dir / "config.resolved.json", damage)
    rollouts = tuple(selected(run_dir / "rollouts", damage))
    notes = list(damage)
    if not steps:
        notes.append("There are no metrics yet.")
    stopped = state == "stopped"
    return Run(
        name=run_dir.resolve().name,
        state=state,
        steps=steps,
        board=board,
        completions=completions if isinstance(completions, list) else [],
        config=read(run_dir / "config.toml") or "",
        settings=settings,
        env=env,
        rollouts=rollouts,
        log=_log_end(run_dir / "logs" / "run.log") if stopped else "",
        notes=notes,
        damage=damage,
    )


def _log_end(path: Path) -> str:
    return "\n".join(read_end(path).splitlines()[-LOG_LINES:])


def _steps(path: Path, damage: list[str]) -> dict[int, dict[str, float]]:
    """Metrics by step. Of two values for one step the later one counts."""
    steps: dict[int, dict[str, float]] = {}
    for row in lines(path, damage):
        step = row.pop("step", None)
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < LAST_STEP:
            continue
        values = {k: f for k, v in row.items() if (f := figure(v)) is not None}
        steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))
