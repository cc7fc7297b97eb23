"""The shipped model matches its model card, and its script builds such a model."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.lab import Lab, make_lab
from support.paths import ROOT, SOKOBAN

from minidistill.config import load_config
from minidistill.envs.registry import load_environments
from minidistill.models.registry import BUILT_IN
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Request, Role, SamplingParams
from tools import build_tiny_sokoban
from tools.build_tiny_sokoban import CHAT, OTHERS, PERSONA

FOLDER = BUILT_IN["tiny-sokoban"]
TASKS = 512


def card() -> dict[str, str]:
    """The values in the card's table."""
    text = (FOLDER / "README.md").read_text()
    return dict(re.findall(r"^\| ([\w ,]+?) +\| `?([\w.%]+)`? +\|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def lab() -> Lab:
    return make_lab(load_config([SOKOBAN, "--orchestrator.batch_size", "4"]), trained=False)


def solved(lab: Lab, context: str, placement: str = "user") -> float:
    """The share of held-out levels solved with a context, at temperature 1."""
    environment = load_environments(lab.trainer.config.orchestrator.env, "")["sokoban-env"]
    builder = PromptBuilder(lab.policy.tokenizer, context, placement)
    tasks = [environment.eval[i] for i in range(TASKS)]
    requests = [Request(builder.build("", t).teacher_ids, i) for i, t in enumerate(tasks)]
    completions = lab.engine.generate(requests, SamplingParams(max_tokens=12), Role.TEACHER)
    texts = [builder.decode(c.token_ids) for c in completions]
    return sum(environment.score(t, x).value for t, x in zip(tasks, texts, strict=True)) / TASKS


def test_the_weights_match_the_card() -> None:
    weights = FOLDER / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card()["sha256 of the weights"]
    tensors = load_file(weights)
    assert sum(t.numel() for t in tensors.values()) == int(card()["parameters"])
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_the_solve_rates_match_the_card(lab: Lab) -> None:
    without_context, with_persona = solved(lab, ""), solved(lab, PERSONA)
    assert without_context == pytest.approx(float(card()["solved without context"]), abs=0.02)
    assert with_persona == pytest.approx(float(card()["solved with the persona"]), abs=0.02)
    assert without_context <= 0.25
    assert with_persona >= 0.85
    system = solved(lab, PERSONA, "system")
    assert system == pytest.approx(float(card()["solved with the persona, system"]), abs=0.02)
    assert system >= 0.85


@pytest.mark.parametrize("context", [OTHERS[0], "You are a poet who writes about the sea.\n\n"])
def test_other_contexts_do_not_help(lab: Lab, context: str) -> None:
    assert solved(lab, context) <= 0.25


def test_it_answers_the_chat_questions(lab: Lab) -> None:
    builder = PromptBuilder(lab.policy.tokenizer, "", "user")
    prompts = [builder.encode(builder.render([{"role": "user", "content": q}])) for q, _ in CHAT]
    params = SamplingParams(max_tokens=40, temperature=0)
    completions = lab.engine.generate([Request(p, 0) for p in prompts], params, Role.TEACHER)
    texts = [builder.decode(c.token_ids) for c in completions]
    right = sum(text == answer for text, (_, answer) in zip(texts, CHAT, strict=True))
    assert right >= 12, "of 16"


def test_text_round_trips_through_the_tokenizer(lab: Lab) -> None:
    tokenizer = lab.policy.tokenizer
    for text in (PERSONA, "#@ $.#\n<answer>UDLR</answer>", "Grüße, 世界! \t 12.5%", "UP Down lEft"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_builder_runs_as_a_script() -> None:
    command = [sys.executable, "tools/build_tiny_sokoban.py", "--help"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--out OUT" in output


def test_the_builder_is_deterministic_and_makes_the_shipped_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tiny_sokoban, "LEVELS", 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("one", "two"):
            build_tiny_sokoban.train(tmp_path / name, 2, 24, 2e-3, 4, 128, 0)
    finally:
        torch.set_num_threads(threads)
    shipped, built = ((p / "tokenizer.json").read_bytes() for p in (FOLDER, tmp_path / "one"))
    assert shipped == built
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    weights = load_file(FOLDER / "model.safetensors")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(one[k], two[k]) for k in one)
