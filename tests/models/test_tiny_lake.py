"""The model for Frozen Lake matches its card, and its script builds such a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.conversations import Stage
from support.paths import ROOT

from minidistill.config import load_config
from minidistill.models.registry import BUILT_IN
from minidistill.types import Message, Role, Turn
from tools import build_tiny_lake
from tools.build_tiny_lake import OTHERS, PERSONA, expert, load, shown

FOLDER = BUILT_IN["tiny-lake"]
FILE = str(ROOT / "configs" / "frozen-lake.toml")
TASKS = 128


def card() -> dict[str, str]:
    """The values in the card's table."""
    text = (FOLDER / "README.md").read_text()
    return dict(re.findall(r"^\| ([\w ,]+?) +\| `?([\w.%]+)`? +\|$", text, re.MULTILINE))


def test_the_weights_match_the_card() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 3_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card()["sha256 of the weights"]
    tensors = load_file(weights)
    assert sum(t.numel() for t in tensors.values()) == int(card()["parameters"])
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.fixture(scope="module")
def solved() -> Callable[[str], float]:
    """The share of held-out lakes that are crossed with a context."""

    def play(context: str) -> float:
        flags = {
            "orchestrator.batch_size": "4", "orchestrator.eval.num_examples": str(TASKS),
            "orchestrator.env.0.args.num_train_examples": "8",
            "orchestrator.env.0.args.num_eval_examples": str(TASKS),
            "orchestrator.teacher_model.context": context or "none",
        }  # fmt: skip
        pairs = (text for key, value in flags.items() for text in (f"--{key}", value))
        stage = Stage(load_config([FILE, *pairs]))
        try:
            scores = stage.evaluator().run("x", Role.TEACHER, context=bool(context))
        finally:
            for environment in stage.environments.values():
                environment.close()  # type: ignore[attr-defined]
        [rewards] = scores.rewards.values()
        return sum(rewards) / len(rewards)

    return play


def test_the_success_matches_the_card(solved: Callable[[str], float]) -> None:
    """The card's figures are of more lakes."""
    for context, row in ((PERSONA, "with the persona"), ("", "without context")):
        assert solved(context) == pytest.approx(float(card()[f"crossed {row}"]), abs=0.08)


def test_other_contexts_do_not_help(solved: Callable[[str], float]) -> None:
    assert solved(OTHERS[0]) <= 0.25


def test_an_expert_takes_a_shortest_way() -> None:
    """Played with the environment, from what it shows."""
    environment = load(20, 1, rules="omit", max_turns=9, moves_per_turn=2)
    for task in environment.train:
        said: list[str] = []

        async def policy(messages: list[Message], said: list[str] = said) -> Turn:
            said.append(expert(shown(messages), build_tiny_lake.random.Random(0)))
            return Turn(f"<answer>{said[-1]}</answer>", token_ids=(1,))

        playing: Any = environment.rollout(task, policy)  # type: ignore[arg-type]
        with pytest.raises(StopIteration) as ended:
            playing.send(None)
        assert ended.value.value.metrics["length_vs_optimal"] == 1
        assert max(map(len, said)) <= 2


def test_the_builder_is_deterministic_and_makes_the_shipped_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a step of each kind: first turns alone, then conversations."""
    monkeypatch.setattr(build_tiny_lake, "LAKES", 60)
    monkeypatch.setattr(build_tiny_lake, "EASY", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("one", "two"):
            build_tiny_lake.train(tmp_path / name, 2, 24, 3e-3, 3, 96, 0)
    finally:
        torch.set_num_threads(threads)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    weights = load_file(FOLDER / "model.safetensors")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(one[k], two[k]) for k in one)
    shipped, built = ((p / "tokenizer.json").read_bytes() for p in (FOLDER, tmp_path / "one"))
    assert shipped == built
