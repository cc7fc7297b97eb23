"""The opening and the end of a user's turn, of several kinds of chat templates."""

from __future__ import annotations

import pytest
from support.tiny_models import CHATML, tiny_tokenizer

from minidistill.errors import UserError
from minidistill.tasks.chat_template import ChatTemplate, TemplateSettings
from minidistill.tasks.user_turn import UserTurn

DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nBe kind, and brief.<|im_end|>\n' -}}{%- endif -%}" + CHATML
)
WORDS = (
    "{%- for m in messages -%}{{- ('USER: ' if m['role'] == 'user' else 'ASSISTANT: ') + "
    "m['content'] + ' ' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}"
    "{%- endif -%}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(source), TemplateSettings())


def test_control_tokens_open_and_end_a_turn() -> None:
    chat = template(CHATML)
    turn = UserTurn.of(chat)
    assert turn.opening == "<|im_start|>user\n"
    assert turn.opening_ids == chat.encode("<|im_start|>user\n")
    assert turn.end_id == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn.lines == ["user", "assistant"]
    ids = chat.encode("Why?<|im_end|>")
    assert turn.read(ids, ended=True) == ("Why?", True)
    assert turn.read(ids[:2], ended=False) == ("Wh", False)


def test_the_opening_has_the_default_system_message_or_that_of_the_topic() -> None:
    assert UserTurn.of(template(DEFAULT_SYSTEM)).lines == [
        "system",
        "Be kind, and brief.",
        "user",
        "assistant",
    ]
    turn = UserTurn.of(template(DEFAULT_SYSTEM), "The user asks about tea.")
    assert turn.opening == (
        "<|im_start|>system\nThe user asks about tea.<|im_end|>\n<|im_start|>user\n"
    )


def test_words_may_end_a_turn() -> None:
    turn = UserTurn.of(template(WORDS))
    assert turn.opening == "USER: "
    assert turn.opening_ids == turn.template.encode("USER:")  # the model writes the space
    assert turn.end_id is None
    ids = turn.template.encode(" Why? ASSISTANT: Because.")
    assert turn.read(ids, ended=False) == (" Why? ", True)
    assert turn.read(ids[:5], ended=False) == (" Why?", False)


@pytest.mark.parametrize(
    ("source", "system", "words"),
    [
        ("{{ 'nothing' }}", "", "does not show a user's message"),
        (CHATML.replace("m in messages", "m in messages[-1:]"), "Tea.", "no system message"),
        (CHATML, "Say <|im_end|>.", "control tokens"),
    ],
)
def test_what_a_template_does_not_show_is_refused(source: str, system: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        UserTurn.of(template(source), system)
