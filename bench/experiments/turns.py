"""Games of several turns: tiny-sokoban on Sokoban, tiny-lake on Frozen Lake."""

from __future__ import annotations

from collections.abc import Iterator

from bench.experiments.claims import Claim, EverySeed, Higher
from bench.experiments.runs import Run
from bench.experiments.tables import (
    ADDED_BACK,
    BEFORE,
    DRIFT,
    GAP,
    IN_CONTEXT,
    KL_AFTER,
    STUDENT,
    TOKENS,
    WORST_GAP,
    Experiment,
    Row,
    Table,
)

GAMES = {"sokoban-turns": "Sokoban in turns", "frozen-lake": "Frozen Lake in turns"}
STEPS = {"sokoban-turns": (40, 73), "frozen-lake": (40, 48)}
"""Of on-policy runs, and of runs on the teacher's conversations, which are shorter. So both are
trained on about as many tokens."""
WHO = {
    "on": ("on-policy", "pure"),
    "off": ("off-policy: the teacher's conversations, full KL", "off-policy"),
    "sft": ("SFT on the teacher's conversations", "sft"),
}
COLUMNS = (BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, ADDED_BACK, KL_AFTER, DRIFT, TOKENS)


def runs() -> Iterator[Run]:
    for game in GAMES:
        for who, (_, overlay) in WHO.items():
            yield run(f"{game}-{who}", game, overlay, STEPS[game][who != "on"])
        live = ("--orchestrator.teacher_model.update", "live")
        yield run(f"{game}-live", game, "pure", STEPS[game][0], *live)


def run(name: str, game: str, overlay: str, steps: int, *flags: str) -> Run:
    length = ("--max_steps", str(steps), "--orchestrator.eval.interval", "0")
    config = (f"configs/{game}.toml", "@", f"configs/overlays/{overlay}.toml")
    return Run(name, (*config, *length, *flags))


def tables() -> Iterator[Table]:
    for game, title in GAMES.items():
        rows = [Row(label, f"{game}-{who}") for who, (label, _) in WHO.items()]
        rows.append(Row("on-policy, live teacher", f"{game}-live"))
        on, off, sft, live = (row.run for row in rows)
        claims: tuple[Claim, ...] = (
            EverySeed("On-policy closes at least 80% in every seed.", on, "gap_closed", 0.8),
            Higher("On-policy closes more of the gap than off-policy.", on, off),
            Higher("On-policy closes more of the gap than SFT.", on, sft),
            Higher("A frozen teacher closes more of the gap than a live one.", on, live),
        )
        yield Table(game.replace("-", "_"), title, tuple(rows), COLUMNS, claims)


TURNS = Experiment("turns", tuple(runs()), tuple(tables()), seeds=3)
