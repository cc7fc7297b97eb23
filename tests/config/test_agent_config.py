"""Contexts of the environment `agent`: its program's requests have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from minidistill.config import load_config
from minidistill.errors import UserError

TEACHER = "[orchestrator.teacher_model]\n"
AGENT = '[[orchestrator.env]]\nid = "agent"\n'


def load(folder: Path, text: str) -> bool:
    """Whether the environment's requests bring what the teacher alone reads."""
    path = folder / "a.toml"
    path.write_text(text)
    return load_config([str(path)]).config.orchestrator.env[0].brings_context


def test_the_system_message_of_a_program_is_its_context(tmp_path: Path) -> None:
    assert load(tmp_path, TEACHER + AGENT)
    assert load(tmp_path, TEACHER + AGENT + 'args = { strip = "system" }')
    assert load(tmp_path, TEACHER + AGENT + 'args = { strip = "sytem" }'), (
        "the environment refuses it"
    )
    context = TEACHER + 'context = "Be brief."\n' + AGENT + 'args = { strip = "context" }'
    assert not load(tmp_path, context)
    assert not load(tmp_path, TEACHER + AGENT + 'context = "Hi."\nargs = { strip = "context" }')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEACHER + AGENT + 'args = { strip = "context" }', "nothing to distill"),
        (TEACHER + AGENT + 'context = "Be brief."', "does not read"),
        (TEACHER + AGENT + '[[orchestrator.env.contexts]]\ncontext = "A."', "its program decides"),
        (TEACHER + AGENT + 'examples = { path = "a.jsonl" }', "its program decides"),
        (TEACHER + AGENT + '[[orchestrator.env]]\nid = "sokoban-env"', "no context of its own"),
    ],
)
def test_contexts_that_a_program_cannot_have(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, text)
