"""Chat templates: their arguments, the date, the end of a turn, the beginning of an answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from support.tokenizers import CHATML, byte_level

from minidistill.driver import preflight
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.tasks.chat_template import ChatTemplate, TemplateSettings
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Role, Task

Configure = Callable[..., Any]

LOOP = "{% for m in messages %}"
PHI3 = (
    LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
THINKS = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
DATED = "Today is {{ strftime_now('%d %b %Y') }}, {{ strftime_now('%H:%M:%S') }}.\n" + CHATML
MISTRAL = (
    LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GLM = LOOP + (
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_UNCLOSED = LOOP + (
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% if not loop.last %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
)
PLAIN = LOOP + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
NO_ANSWERS = (
    LOOP
    + "{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}"
    + ("{{ m['content'] }}{% endfor %}")
)
GENERATION = CHATML.replace(
    "{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"
)
TASK = Task("t", ({"role": "user", "content": "hello"},))


def builder(template: str, **settings: Any) -> PromptBuilder:
    tokenizer = byte_level(template, eos="</s>")
    return PromptBuilder(tokenizer, "Think.\n", "user", settings=TemplateSettings(**settings))


@pytest.fixture
def warnings(configure: Configure, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What preflight warns about with a builder."""

    def warnings(prompts: PromptBuilder) -> list[str]:
        caplog.clear()
        preflight.check_prompts(configure().config, prompts, [prompts.build("env", TASK)])
        return [r.message for r in caplog.records if r.levelno == logging.WARNING]

    return warnings


@pytest.mark.parametrize(
    "template", [CHATML, PHI3, THINKS, OPENS_THOUGHT, DATED, MISTRAL, GLM, PLAIN, GENERATION]
)
def test_templates_of_the_field_pass_preflight(template: str, warnings: Any) -> None:
    assert len(warnings(builder(template))) == (template == PLAIN)


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (CHATML, "<|im_start|>assistant\n"),
        (PHI3, "<|im_start|>assistant\n"),
        (OPENS_THOUGHT, "<|im_start|>assistant\n<think>\n"),
        (MISTRAL, ""),
        (PLAIN, ""),
    ],
)
def test_the_generation_prompt(template: str, ending: str) -> None:
    prompts = builder(template)
    ids = prompts.student.generation_prompt(TASK.messages)
    assert prompts.tokenizer.decode(list(ids)) == ending


def test_a_template_that_does_not_begin_the_answer_is_refused(warnings: Any) -> None:
    without = CHATML.partition("{% if add_generation_prompt")[0]
    with pytest.raises(UserError, match="does not begin the assistant's turn") as caught:
        warnings(builder(without))
    assert "assistant" in caught.value.what
    assert caught.value.exit_code == EXIT_USAGE


def test_a_template_with_chance_in_it_is_refused(warnings: Any) -> None:
    drawn = "{{ range(90000) | random }}"
    with pytest.raises(UserError, match="renders the same messages differently each time"):
        warnings(builder(drawn + CHATML))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (PHI3, "<|im_end|>"),
        (THINKS, "<|im_end|>"),
        (MISTRAL, "</s>"),
        (GLM, "<|im_start|>"),
        (LAST_UNCLOSED, "<|im_end|>"),
        (PLAIN, None),
        (NO_ANSWERS, None),
    ],
)
def test_the_end_of_a_turn(template: str, end: str | None, warnings: Any) -> None:
    prompts = builder(template)
    found = prompts.student.end_of_turn
    assert (None if found is None else prompts.tokenizer.decode([found])) == end
    if template == PLAIN:
        (warning,) = warnings(prompts)
        assert "ends an answer with no token" in warning


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ '%21000000d' % 1 }}",
            "makes a text of 210[0-9]* characters",
        ),
        ("x" * 300_000, "it has 300[0-9]* characters"),
        ("{{ " + "(" * 10_000, "not valid"),
    ],
)
def test_a_template_that_is_too_large_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        builder(template + CHATML).build("env", TASK)


def test_the_end_of_a_turn_is_not_part_of_a_completions_text() -> None:
    tokenizer = byte_level(eos="</s>", special=False)
    prompts = PromptBuilder(tokenizer, "Think.\n", "user")
    ids = prompts.encode("It is <|im_end|> 12.<|im_end|>")
    assert prompts.decode(ids) == "It is <|im_end|> 12."


def test_arguments_reach_both_views() -> None:
    plain = builder(THINKS).build("env", TASK)
    given = builder(THINKS, arguments={"enable_thinking": False}).build("env", TASK)
    for before, after in (
        (plain.student_text, given.student_text),
        (plain.teacher_text, given.teacher_text),
    ):
        assert after == before + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("enable_thinkng", "does not read enable_thinkng", "bos_token, enable_thinking"),
        ("add_generation_prompt", "is set by the run", "remove"),
        ("strftime_now", "is set by the run", "remove"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(name: str, what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        builder(THINKS, arguments={name: False})
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.where == f"model.chat_template_kwargs.{name}"
    assert fix in caught.value.fix


def test_the_date_and_the_time_are_fixed() -> None:
    began = datetime(2026, 3, 1, 23, 59, 58)
    prompts = builder(DATED, now=began)
    assert prompts.render(TASK.messages).startswith("Today is 01 Mar 2026, 23:59:58.\n")
    assert prompts.began == began
    assert builder(CHATML, now=began).began is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("\n  {% if true %}\n x{% endif %}\n{{ strftime_now('%d') }}\n", "\n x01"),
        ("  {% if true %}y{% endif %}{{ strftime_now('%d' ~ '.%m') }}", "y01.03"),
        (
            "{% if strftime_now is defined %}{% set d = strftime_now('%d') %}{% endif %}"
            "{% if d|int > 0 %}{{ d + '!' }}{% endif %}",
            "01!",
        ),
    ],
)
def test_a_fixed_date_changes_nothing_else(template: str, expected: str) -> None:
    prompts = builder(template, now=datetime(2026, 3, 1))
    assert prompts.render(TASK.messages) == expected
    clock = builder(template.replace("%m", "%%m")).render(TASK.messages)
    assert re.sub("[0-9]+", "N", clock.replace("%m", "03")) == re.sub("[0-9]+", "N", expected)


def test_a_date_that_cannot_be_fixed(caplog: pytest.LogCaptureFixture) -> None:
    for template in (
        "{% set f = strftime_now %}{{ f('%Y') }}",
        "{{ strftime_now(messages[0].x) }}",
    ):
        caplog.clear()
        prompts = builder(template + CHATML, now=datetime(1999, 3, 1))
        assert prompts.began is None
        assert "cannot be fixed" in caplog.text
    unfixed = builder("{% set f = strftime_now %}{{ f('%Y') }}", now=datetime(1999, 3, 1))
    assert unfixed.render(TASK.messages) == f"{datetime.now():%Y}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}\n{{ m['content'] }}", "not valid, line"),
        ({"tool_use": CHATML, "rag": CHATML}, "names no default"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_cannot_be_used(template: Any, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        ChatTemplate(byte_level(template), TemplateSettings())
    assert caught.value.exit_code == EXIT_USAGE
    assert "model.chat_template" in caught.value.fix


def test_a_separate_teacher_reads_its_own_template(warnings: Any) -> None:
    """With arguments that only one of the two reads."""
    settings = TemplateSettings({"enable_thinking": False})
    teacher = byte_level(THINKS, eos="</s>")
    prompts = PromptBuilder(
        byte_level(MISTRAL, eos="</s>"), "Think.\n", "user",
        teacher_tokenizer=teacher, settings=settings,
    )  # fmt: skip
    prompt = prompts.build("env", TASK)
    assert prompt.student_text == "[INST] hello [/INST]"
    own = "<s><|im_start|>user\nThink.\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.teacher_text == own + "<think>\n\n</think>\n\n"
    assert prompts.tokenizer.decode(list(prompt.teacher_ids)) == prompt.teacher_text
    # the student with the context added reads the student's template
    in_context = prompt.ids(Role.STUDENT, context=True)
    assert prompts.tokenizer.decode(list(in_context)) == "[INST] Think.\nhello [/INST]"
    assert prompt.ids(Role.TEACHER, context=True) == prompt.teacher_ids
    assert prompt.ids(Role.STUDENT, context=False) == prompt.student_ids
    ends = prompts.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert prompts.end_of_turn_ids == set(ends)
    (warning,) = warnings(prompts)
    assert "end a turn with different tokens (</s>, <|im_end|>)" in warning


def test_a_teacher_without_a_template_reads_the_students(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minidistill")
    prompts = PromptBuilder(byte_level(), "Think.\n", "user", teacher_tokenizer=byte_level(None))
    assert prompts.teacher is prompts.student
    assert "it reads the student's" in caplog.text


def test_a_filter_that_templates_do_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"the chat template is not valid.*from_json"):
        builder("{% for m in messages %}{{ m.content | from_json }}{% endfor %}")
