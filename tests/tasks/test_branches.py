"""The conversations of a program: which sample a request goes on with, and who reads what of it."""

from __future__ import annotations

from typing import Any

import pytest
from support.tokenizers import CHATML, byte_level
from tasks.test_conversation import answer, completion

from minidistill.envs.strip import Strip
from minidistill.errors import UserError
from minidistill.tasks.conversations import Conversations
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Context, Role, Task, Turn

CONTEXT = "Secret: say hello twice."
SYSTEM = {"role": "system", "content": f"You help.\n{CONTEXT}\nGo on."}
USER = {"role": "user", "content": "is it 12 o'clock?"}
OTHER = {"role": "user", "content": "another turn"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
# As Qwen's: tools are in the system's turn, their answers in one of the user
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% set tool = m['role'] == 'tool' %}"
    "<|im_start|>{{ 'user' if tool else m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talks(strip: Strip | None, template: str = CHATML, context: str = CONTEXT) -> Conversations:
    builder = PromptBuilder(byte_level(template), context, "user")
    task = Task("t", ({"role": "user", "content": "stands for a request"},))
    prompt = builder.build("env", task, context=Context(context))
    return Conversations(builder, prompt, strip)


def take(talk: Conversations, text: str, stop: Any = ()) -> Turn:
    return talk.take(completion(talk.builder, text), stop)


def seen(talk: Conversations, role: Role) -> str:
    return str(talk.builder.tokenizer.decode(talk.ids(role, context=role is Role.TEACHER)))


def test_the_student_does_not_read_the_system_message() -> None:
    talk = talks(Strip("system"))
    messages = [SYSTEM, USER]
    for turn in range(3):
        talk.ask(messages)
        student, teacher = (seen(talk, role) for role in (Role.STUDENT, Role.TEACHER))
        assert "Secret" not in student
        assert "You help" not in student
        assert teacher.count(CONTEXT) == 1
        assert teacher.count("You help.") == 1
        text = take(talk, f"hello {turn}").text
        messages = [*messages, answer(text), OTHER]
    [sample] = talk.samples
    assert len(sample.completion.inserted) == 2
    assert talk.whole == 0
    # what follows the prompts is the same, and each view is what the template renders
    for messages_of, ids in (
        (messages[1:], sample.prompt.student_ids), (messages, sample.prompt.teacher_ids)
    ):  # fmt: skip
        rendered = talk.builder.student.render(messages_of[:-1], add_generation_prompt=False)
        whole = talk.builder.tokenizer.decode([*ids, *sample.completion.sequence])
        assert rendered.removesuffix("\n") == whole


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_student_does_not_read_the_context(end: str) -> None:
    """Wherever it is. A file ends in a line break, which the program may have dropped."""
    talk = talks(Strip("context"), context=CONTEXT + end)
    user = {"role": "user", "content": f"{CONTEXT} {USER['content']}"}
    talk.ask([SYSTEM, user])
    assert "Secret" not in seen(talk, Role.STUDENT)
    assert "You help." in seen(talk, Role.STUDENT)
    assert seen(talk, Role.TEACHER).count(CONTEXT) == 2
    assert seen(talk, Role.STUDENT).count("o'clock") == 1
    take(talk, "yes")
    talk.ask([{"role": "system", "content": CONTEXT}, USER])
    assert "system" not in seen(talk, Role.STUDENT)
    assert talk.whole == 0
    take(talk, "yes")
    talk.ask([USER])
    assert talk.whole == 1
    assert seen(talk, Role.STUDENT) == seen(talk, Role.TEACHER)


def test_a_request_of_nothing_but_instructions_is_refused() -> None:
    with pytest.raises(UserError, match="no message"):
        talks(Strip("system")).ask([SYSTEM])


def test_two_conversations_at_once_go_on_with_their_own_samples() -> None:
    talk = talks(Strip("system"))
    threads = [[SYSTEM, USER], [SYSTEM, OTHER]]
    for _ in range(3):
        for i, messages in enumerate(threads):
            talk.ask(messages)
            text = take(talk, f"hello {i}").text
            threads[i] = [*messages, answer(text), USER]
    assert [len(sample.completion.inserted) for sample in talk.samples] == [2, 2]
    assert [sample.prompt.task.messages[1] for sample in talk.samples] == [USER, OTHER]


def test_equal_requests_are_samples_of_their_own() -> None:
    talk = talks(Strip("system"))
    for text in ("hello", "yes"):
        talk.ask([SYSTEM, USER])
        take(talk, text)
    talk.ask([SYSTEM, USER, answer("hello"), OTHER])
    take(talk, "and")
    assert [len(s.completion.inserted) for s in talk.samples] == [1, 0]


@pytest.mark.parametrize("changed", [[{**SYSTEM, "content": "Other."}, USER], [SYSTEM, OTHER]])
def test_what_does_not_extend_begins_a_sample(changed: list[Any]) -> None:
    talk = talks(Strip("system"))
    talk.ask([SYSTEM, USER])
    text = take(talk, "hello").text
    talk.ask([*changed, answer(text), OTHER])
    take(talk, "yes")
    assert len(talk.samples) == 2
    assert talk.samples[1].prompt.task.messages == (*changed, answer(text), OTHER)


def test_an_answer_that_is_forgotten_is_in_no_sample() -> None:
    talk = talks(Strip("system"))
    talk.ask([SYSTEM, USER])
    first = take(talk, "hello")
    before = talk.samples
    again = [SYSTEM, USER, answer(first.text), OTHER]
    talk.ask(again)
    unread = take(talk, "yes")
    assert talk.samples != before
    talk.ask(again)
    take(talk, "no")
    assert talk.forget(unread)
    assert talk.samples[0] == before[0]
    assert [s.text for s in talk.samples] == ["hello", "no"]
    assert not talk.forget(unread)
    assert talk.forget(first)
    assert [s.text for s in talk.samples] == ["no"]


def test_an_answer_that_ends_at_a_text() -> None:
    """What is sampled is trained on; the next request, without that text, begins a sample."""
    talk = talks(Strip("system"))
    talk.ask([SYSTEM, USER])
    turn = take(talk, "hello, and", [", "])
    assert turn.text == "hello"
    assert len(turn.token_ids) == len(talk.samples[0].completion.token_ids)
    talk.ask([SYSTEM, USER, answer("hello"), OTHER])
    take(talk, "yes")
    assert len(talk.samples) == 2


def test_tools_are_in_both_views_and_their_answers_extend() -> None:
    talk = talks(Strip("system"), WITH_TOOLS)
    talk.ask([SYSTEM, USER], TOOLS)
    for role in (Role.STUDENT, Role.TEACHER):
        assert seen(talk, role).count('"name": "clock"') == 1
    text = take(talk, "<tool_call>clock</tool_call>").text
    messages = [SYSTEM, USER, answer(text), {"role": "tool", "content": "12 o'clock"}]
    talk.ask(messages, TOOLS)
    assert seen(talk, Role.STUDENT).count("12 o'clock") == 2
    take(talk, "yes")
    assert len(talk.samples) == 1
    talk.ask([*messages, answer("yes"), OTHER])  # without the tools
    take(talk, "no")
    assert len(talk.samples) == 2


def test_tools_that_the_template_does_not_show_are_refused() -> None:
    talk = talks(Strip("system"))
    with pytest.raises(UserError, match="takes no tools"):
        talk.ask([SYSTEM, USER], TOOLS)


def test_without_strip_the_context_is_added_for_the_teacher() -> None:
    talk = talks(None)
    messages = [USER]
    for _ in range(2):
        talk.ask(messages)
        assert "Secret" not in seen(talk, Role.STUDENT)
        assert seen(talk, Role.TEACHER).count(CONTEXT) == 1
        messages = [*messages, answer(take(talk, "hello").text), OTHER]
    assert len(talk.samples) == 1
