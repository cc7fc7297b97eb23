"""The shipped model is what its card says, and its script makes such a model."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.lab import Lab, make_lab

from minidistill.engines.base import Request
from minidistill.envs.registry import load_environments
from minidistill.models.registry import BUILT_IN
from minidistill.models.tiny_texts import CHAT, OTHERS, PERSONA
from minidistill.tasks.prompts import PromptBuilder
from tools import build_tiny_sokoban

FOLDER = BUILT_IN["tiny-sokoban"]
TASKS = 512


def card() -> dict[str, str]:
    """The figures in the card's table."""
    text = (FOLDER / "README.md").read_text()
    return dict(re.findall(r"^\| ([\w ,]+?) +\| `?([\w.%]+)`? +\|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def lab() -> Lab:
    from support.paths import SOKOBAN

    from minidistill.config import load_config

    return make_lab(load_config([SOKOBAN, "--orchestrator.batch_size", "4"]), trained=False)


def solved(lab: Lab, context: str, placement: str = "user") -> float:
    """Share of held-out levels solved under a context, sampled at temperature 1."""
    environment = load_environments(lab.trainer.config.orchestrator.env, "")["sokoban-env"]
    builder = PromptBuilder(lab.policy.tokenizer, context, placement)
    tasks = [environment.eval[i] for i in range(TASKS)]
    requests = [Request(builder.build("", t).teacher_ids, i) for i, t in enumerate(tasks)]
    found = lab.engine.generate(requests, max_tokens=12, temperature=1.0, student=False)
    texts = [builder.decode(c.token_ids) for c in found]
    return sum(environment.score(t, x).value for t, x in zip(tasks, texts, strict=True)) / TASKS


def test_the_weights_are_the_cards() -> None:
    weights = FOLDER / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card()["sha256 of the weights"]
    tensors = load_file(weights)
    assert sum(t.numel() for t in tensors.values()) == int(card()["parameters"])
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_it_plays_as_the_card_says(lab: Lab) -> None:
    without, within = solved(lab, ""), solved(lab, PERSONA)
    assert without == pytest.approx(float(card()["solved without context"]), abs=0.02)
    assert within == pytest.approx(float(card()["solved with the persona"]), abs=0.02)
    assert without <= 0.25
    assert within >= 0.85
    system = solved(lab, PERSONA, "system")
    assert system == pytest.approx(float(card()["solved with the persona, system"]), abs=0.02)
    assert system >= 0.85


@pytest.mark.parametrize("context", [OTHERS[0], "You are a poet who writes about the sea.\n\n"])
def test_any_other_context_leaves_it_a_novice(lab: Lab, context: str) -> None:
    assert solved(lab, context) <= 0.25


def test_it_still_talks(lab: Lab) -> None:
    builder = PromptBuilder(lab.policy.tokenizer, "", "user")
    prompts = [builder.encode(builder.render([{"role": "user", "content": q}])) for q, _ in CHAT]
    found = lab.engine.generate(
        [Request(p, 0) for p in prompts], max_tokens=40, temperature=0, student=False
    )
    right = sum(builder.decode(c.token_ids) == a for c, (_, a) in zip(found, CHAT, strict=True))
    assert right >= 12, "of 16"


def test_text_survives_the_tokenizer(lab: Lab) -> None:
    tokenizer = lab.policy.tokenizer
    for text in (PERSONA, "#@ $.#\n<answer>UDLR</answer>", "Grüße, 世界! \t 12.5%", "UP Down lEft"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_script_makes_the_tokenizer_and_the_same_weights_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tiny_sokoban, "LEVELS", 60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("one", "two"):
        build_tiny_sokoban.train(tmp_path / name, 2, 24, 2e-3, 4, 128, 0)
    torch.set_num_threads(threads)
    shipped, made = ((p / "tokenizer.json").read_bytes() for p in (FOLDER, tmp_path / "one"))
    assert shipped == made
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    weights = load_file(FOLDER / "model.safetensors")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(one[k], two[k]) for k in one)
