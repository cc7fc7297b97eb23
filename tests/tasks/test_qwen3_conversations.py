"""Conversations with Qwen3's chat template, which drops thinking: each turn is a sample of its own.

Always with a template that has what matters here; with the published text too where
`python -m bench.peers` has installed it.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.tokenizers import byte_level

from bench.peers_venv import cache
from minidistill.tasks.chat_template import TemplateSettings
from minidistill.tasks.conversation import Conversation, extends
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Completion, Role, Task

LIKE_IT = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set parts = m.content.split('</think>') %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role != 'assistant' %}{{ m.content }}
    {%- elif loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}
    {%- else %}{{ parts[-1].lstrip('\\n') if parts | length > 1 else m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
PUBLISHED = sorted(cache().glob("trl-*/lib/python*/site-packages/trl/chat_templates/qwen3.jinja"))
TEMPLATES = [
    pytest.param(lambda: LIKE_IT, id="like it"),
    pytest.param(
        lambda: PUBLISHED[-1].read_text(),
        id="published",
        marks=pytest.mark.skipif(not PUBLISHED, reason="needs the environment of bench.peers"),
    ),
]
SILENT = {"enable_thinking": False}
CONTEXT = "Context: be brief.\n"


def builder_of(template: str, **arguments: Any) -> PromptBuilder:
    settings = TemplateSettings(arguments=arguments)
    return PromptBuilder(byte_level(template), CONTEXT, "user", settings=settings)


def played(builder: PromptBuilder, *answers: str) -> Conversation:
    """A conversation with these answers; what each turn reads is what the template renders."""
    messages: list[dict[str, str]] = [{"role": "user", "content": "Where to?"}]
    talk = Conversation(builder, builder.build("env", Task("t", tuple(messages))))
    for answer in answers:
        talk.ask(messages)
        assert talk.ids(Role.STUDENT, context=False) == builder.encode(builder.render(messages))
        ids = (*builder.encode(answer), builder.student.end_of_turn or 0)
        assert talk.take(Completion(ids, (-1.0,) * len(ids), "eos")).text == answer
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And now?"},
        ]
    return talk


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_thinking_each_turn_begins_a_new_sample(template: Any) -> None:
    """As `configs/overlays/qwen3-1.7b.toml` uses it: an empty thought is before the newest answer
    alone."""
    builder = builder_of(template(), **SILENT)
    question = {"role": "user", "content": "x"}
    assert not extends(builder, builder.build("env", Task("t", (question,))))
    samples = played(builder, "up", "down", "left").samples
    assert len(samples) == 3, "two restarts"
    for number, sample in enumerate(samples):
        assert sample.completion.inserted == ()
        student, teacher = sample.prompt.student_text, sample.prompt.teacher_text
        assert student.count("And now?") == number
        assert student.count("<think>\n\n</think>\n\n") == 1
        assert student.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert (student.count(CONTEXT), teacher.count(CONTEXT)) == (0, 1)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_thought_is_dropped_with_a_new_sample(template: Any) -> None:
    samples = played(builder_of(template()), "<think>\nhm\n</think>\n\nup", "down").samples
    assert len(samples) == 2
    assert "hm" not in samples[1].prompt.student_text
    assert "<|im_start|>assistant\nup<|im_end|>" in samples[1].prompt.student_text


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_without_a_thought_are_extended(template: Any) -> None:
    """Where thinking is allowed, and the model did not think."""
    [sample] = played(builder_of(template()), "up", "down", "left").samples
    assert len(sample.completion.inserted) == 2
