"""The two views of a prompt, with common kinds of chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minidistill.errors import EXIT_USAGE, UserError
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Task

CONTEXT = "Think ahead.\n\n"
BODY = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
DEFAULT = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a default.<|im_end|>
{% endif %}"""
GEMMA = """{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}"""
DROPPING = """{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}assistant:"""
FOLDING = """{% if messages[0]['role'] == 'system' %}\
{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}\
{% else %}{% set first = '' %}{% endif %}\
{% for m in messages %}<{{ m['role'] }}>{{ first if loop.first else '' }}{{ m['content'] }}\
{% endfor %}<assistant>"""
TEMPLATES = {
    "chatml": TOOLS + BODY,
    "default": TOOLS + DEFAULT + BODY,
    "gemma": GEMMA + TOOLS + BODY,
    "dropping": DROPPING,
    "folding": FOLDING,
}

TEXT_PART = {"type": "text", "text": "x"}
USER = {"role": "user", "content": "Solve this."}
SYSTEM = {"role": "system", "content": "Be terse. "}
HISTORY = (
    SYSTEM,
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = template
    return fast


def builder(template: str, placement: str, context: str = CONTEXT) -> PromptBuilder:
    return PromptBuilder(tokenizer(TEMPLATES[template]), context, placement)


def views(
    template: str, placement: str, *messages: Any, context: str = CONTEXT, tools: Any = None
) -> tuple[str, str]:
    """The student's and the teacher's text. Also checks what holds for every prompt."""
    prompt_builder = builder(template, placement, context)
    before = repr(messages)
    prompt = prompt_builder.build("env", Task("t", messages), tools)
    assert repr(messages) == before
    for ids, text in (
        (prompt.student_ids, prompt.student_text),
        (prompt.teacher_ids, prompt.teacher_text),
    ):
        assert prompt_builder.tokenizer.decode(list(ids)) == text
    return prompt.student_text, prompt.teacher_text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "look"}}]])
def test_user_placement_adds_only_the_context(template: str, tools: Any) -> None:
    student, teacher = views(template, "user", USER, tools=tools)
    assert teacher.count(CONTEXT) == 1
    assert CONTEXT + "Solve this." in teacher
    assert teacher.replace(CONTEXT, "") == student
    assert ("look" in student) == (tools is not None and template not in ("dropping", "folding"))


@pytest.mark.parametrize("template", ["chatml", "default", "dropping", "folding"])
def test_the_context_precedes_the_first_user_message(template: str) -> None:
    student, teacher = views(template, "user", *HISTORY)
    assert CONTEXT + "One?" in teacher
    assert teacher.replace(CONTEXT, "") == student
    assert "Two." in student
    assert "Three?" in student


def test_rendered_texts() -> None:
    user = "<|im_start|>user\nSolve this.<|im_end|>\n<|im_start|>assistant\n"
    assert views("chatml", "system", USER) == (
        user,
        f"<|im_start|>system\n{CONTEXT}<|im_end|>\n{user}",
    )
    assert views("default", "system", USER) == (
        f"<|im_start|>system\nYou are a default.<|im_end|>\n{user}",
        f"<|im_start|>system\nYou are a default.{CONTEXT}<|im_end|>\n{user}",
    )
    assert views("folding", "system", USER) == (
        "<user>Solve this.<assistant>",
        f"<user>{CONTEXT}\n\nSolve this.<assistant>",
    )


@pytest.mark.parametrize("template", ["chatml", "default", "folding"])
def test_system_placement_appends_to_the_system_message(template: str) -> None:
    student, teacher = views(template, "system", *HISTORY)
    assert SYSTEM["content"] + CONTEXT in teacher
    assert teacher.replace(CONTEXT, "") == student
    assert "You are a default." not in teacher


def test_a_default_system_message_is_kept_before_the_context() -> None:
    student, teacher = views("default", "system", USER, tools=[{"name": "look"}])
    assert teacher.replace(CONTEXT, "") == student
    assert builder("default", "system").default_system == "You are a default."
    for plain in ("chatml", "folding"):
        assert builder(plain, "system").default_system == ""


@pytest.mark.parametrize("template", ["gemma", "dropping"])
def test_a_template_without_system_messages(template: str) -> None:
    with pytest.raises(UserError, match="system") as caught:
        views(template, "system", USER)
    assert caught.value.exit_code == EXIT_USAGE
    assert 'context_placement = "user"' in caught.value.fix


def test_a_template_that_rejects_the_messages() -> None:
    with pytest.raises(UserError, match="System role not supported") as caught:
        views("gemma", "user", *HISTORY)
    assert "system, user, assistant, user" in caught.value.what


def test_message_content_in_parts() -> None:
    first, second = {"type": "text", "text": "Solve "}, {"type": "text", "text": "this."}
    parts = {"role": "user", "content": [first, second]}
    plain, plain_teacher = views("chatml", "user", USER)
    assert views("chatml", "user", parts) == (plain, plain_teacher)
    # a template that writes any content as it is gets text too
    assert views("folding", "user", parts) == views("folding", "user", USER)
    (message,) = builder("chatml", "user").with_context([parts], CONTEXT)
    assert message["content"] == CONTEXT + "Solve this."
    system = {"role": "system", "content": [{"type": "text", "text": "Be terse."}]}
    student, teacher = views("chatml", "system", system, USER)
    assert teacher == student.replace("Be terse.", f"Be terse.{CONTEXT}")


def test_parts_that_are_not_text_are_refused_by_their_type() -> None:
    image = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    with pytest.raises(UserError, match="part 1 is 'image'"):
        views("chatml", "user", image)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("placement", ["user", "system"])
def test_an_empty_context_changes_nothing(template: str, placement: str) -> None:
    student, teacher = views(template, placement, USER, context="")
    assert teacher == student


def test_no_user_message() -> None:
    with pytest.raises(UserError, match="no user message") as caught:
        views("chatml", "user", SYSTEM)
    assert 'context_placement = "system"' in caught.value.fix


def test_no_chat_template() -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        PromptBuilder(tokenizer(None), CONTEXT, "user")
    assert caught.value.where == "model.name"


def test_completions_are_decoded_without_special_tokens() -> None:
    chatml = builder("chatml", "user")
    ids = chatml.encode("Go ahead, ünïcode 🧱 !<|im_end|>")
    assert ids[-1] == chatml.tokenizer.eos_token_id
    assert chatml.decode(ids) == "Go ahead, ünïcode 🧱 !"


@pytest.mark.parametrize(
    ("template", "placement", "context", "messages", "boundary"),
    [
        ("chatml", "user", "Think.", (USER,), "Think.Solve this."),
        ("chatml", "user", "Think", (SYSTEM, USER), "ThinkSolve this."),
        (
            "chatml",
            "user",
            "user",
            (USER,),
            "userSolve this.",
        ),  # the template contains this word too
        ("chatml", "user", "Think. ", (USER,), None),
        ("chatml", "user", "Think.\n", (USER,), None),
        ("chatml", "user", "Think.", ({"role": "user", "content": " x"},), None),
        ("chatml", "user", "Think.", ({"role": "user", "content": "#x"},), None),
        ("chatml", "user", "Think.", ({"role": "user", "content": ""},), None),
        ("chatml", "user", "Think.", ({"role": "user", "content": [TEXT_PART]},), "Think.x"),
        ("chatml", "system", "Think.", (SYSTEM, USER), None),
        ("chatml", "system", "Think.", ({"role": "system", "content": "Be."}, USER), "Be.Think."),
        ("chatml", "system", "\nThink.", ({"role": "system", "content": "Be."}, USER), None),
        ("chatml", "system", "Think.", (USER,), None),
        ("default", "system", "Think.", (USER,), "u are a default.Think."),
        ("default", "system", " Think.", (USER,), None),
        ("dropping", "user", "", (USER,), None),
    ],
)
def test_a_context_that_merges_with_the_adjacent_text(
    template: str, placement: str, context: str, messages: Any, boundary: str | None
) -> None:
    prompt_builder = builder(template, placement, context)
    prompt = prompt_builder.build("env", Task("t", messages))
    warning = prompt_builder.boundary_warning(prompt)
    assert (warning is None) == (boundary is None)
    assert boundary is None or repr(boundary) in (warning or "")
