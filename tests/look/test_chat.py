"""Chats: what is answered is what transformers and peft answer; lines, columns and keys."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.terminal import terminal
from transformers import AutoModelForCausalLM, AutoTokenizer

from minidistill.cli import main
from minidistill.errors import UserError
from minidistill.export import usage
from minidistill.export.source import open_source
from minidistill.look.chat import Answer, Chat
from minidistill.look.chat_command import CtrlC
from minidistill.look.model import Model, load
from minidistill.look.screen import Columns, Lines
from minidistill.look.views import (
    BASE,
    BASE_IN_CONTEXT,
    STUDENT,
    STUDENT_IN_CONTEXT,
    find_contexts,
)
from minidistill.models.registry import resolve
from minidistill.system.foreign import Interrupted
from minidistill.types import Request, SamplingParams, Task

SOKOBAN_MODEL = resolve("tiny-sokoban")
QUESTIONS = ("What do bees make?", "And how do plants grow?")
VIEWS = [BASE, BASE_IN_CONTEXT, STUDENT, STUDENT_IN_CONTEXT]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@torch.no_grad()
def reference(adapter: Path | None, context: str) -> list[str]:
    """The greedy answers by transformers and peft alone, of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(SOKOBAN_MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(SOKOBAN_MODEL, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": (context if not messages else "") + question})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.fixture(scope="module")
def model(kept_far_run: Path) -> Model:
    return load(open_source(str(kept_far_run)), longest=1024)


def chat(model: Model, views: Any = VIEWS) -> Chat:
    return Chat(model, views, find_contexts(model.config)[0], GREEDY)


def test_each_view_answers_as_transformers_and_peft_do(model: Model, kept_far_run: Path) -> None:
    talk = chat(model)
    answers = [talk.ask(question) for question in QUESTIONS]
    context = talk.context.text
    expected = [
        reference(adapter, text)
        for adapter in (None, kept_far_run / "adapter")
        for text in ("", context)
    ]
    assert [[turn[i].text for turn in answers] for i in range(4)] == expected
    first = [texts[0] for texts in expected]
    assert len(set(first)) == 4, "the views can be told apart"


def test_an_answer_grows_and_can_be_stopped(model: Model) -> None:
    talk = chat(model, [STUDENT])
    (whole,) = talk.ask(QUESTIONS[0])
    talk.reset()
    shown: list[str] = []

    def show(view: int, text: str) -> None:
        shown.append(text)

    (stopped,) = talk.ask(QUESTIONS[0], show, lambda: len(shown) > 2)
    assert stopped.end == "stopped"
    assert 0 < len(stopped.text) < len(whole.text)
    assert whole.text.startswith(stopped.text)
    assert all(b.startswith(a) for a, b in pairwise(shown))
    assert shown[-1] == stopped.text
    (after,) = talk.ask(QUESTIONS[1])
    assert after.end in ("eos", "length")
    assert model.engine.watch is None


@pytest.mark.gpu
def test_streaming_changes_no_answer(kept_far_run: Path) -> None:
    """On a GPU rows leave the batch later than their last token is drawn."""
    on_device = load(open_source(str(kept_far_run)), longest=1024)
    talk = chat(on_device)
    shown: dict[int, str] = {}
    answers = talk.ask(QUESTIONS[0], shown.__setitem__)
    assert [shown[i] for i in range(4)] == [answer.text for answer in answers]
    for view, answer in zip(VIEWS, answers, strict=True):
        prompt = on_device.builder.build(
            "chat",
            Task("chat", ({"role": "user", "content": QUESTIONS[0]},)),
            context=talk.context,
        )
        request = Request(prompt.ids(view.role, context=view.context), 0)
        (plain,) = on_device.engine.generate([request], GREEDY, view.role)
        assert answer.text == on_device.builder.decode(plain.token_ids)
        assert answer.end == plain.stop


def test_a_conversation_that_is_too_long_is_refused(model: Model) -> None:
    talk = chat(model, [STUDENT])
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, and the model takes"):
        talk.ask("bees " * 2000)
    talk.reset()
    assert talk.ask(QUESTIONS[0])[0].text


# -- the command -----------------------------------------------------------------------------------


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_lines_are_questions_of_one_conversation(
    far: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = reference(far / "adapter", "")
    first, second = QUESTIONS
    piped(monkeypatch, f"{first}\n\n{second}\n/reset\n{first}\n/context\n/exit\n{second}\n")
    assert main(["chat", str(far), "--temperature", "0"]) == 0
    out = capsys.readouterr()
    shown = "\n".join([*expected, expected[0], ""])
    assert out.out == f"{shown}Name a fruit.\n"
    assert out.err == ""


def test_one_question_side_by_side(
    far: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "")
    flags = ["--side-by-side", "--with-context", "--ask", QUESTIONS[0], "--temperature", "0"]
    assert main(["chat", str(far), *flags]) == 0
    context = find_contexts(open_source(str(far)).config)[0].text
    texts = [reference(a, t)[0] for a in (None, far / "adapter") for t in ("", context)]
    lines = [f"{view.name}: {text}" for view, text in zip(VIEWS, texts, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines


def test_an_adapter_and_a_merged_model(
    far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(far), "--to", str(adapter), "--no-vllm"]) == 0
    assert main(["export", str(far), "--to", str(merged), "--no-vllm", "--merge"]) == 0
    capsys.readouterr()
    expected, base = reference(far / "adapter", "")[0], reference(None, "")[0]
    ask = ["--ask", QUESTIONS[0], "--temperature", "0", "--max-tokens", "12"]
    assert main(["chat", str(adapter), "--side-by-side", *ask]) == 0
    out = capsys.readouterr()
    assert out.out == f"base: {base}\nstudent: {expected}\n"
    assert "no context is known: --context FILE|TEXT adds" in out.err
    assert main(["chat", str(merged), *ask]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    both = ["--side-by-side", "--base", "tiny-sokoban"]
    assert main(["chat", str(merged), *both, "--context", "Hello. ", *ask]) == 0
    in_context = reference(None, "Hello. ")[0]
    shown = f"base: {base}\nbase in context: {in_context}\nstudent: {expected}\n"
    assert capsys.readouterr().out == shown
    assert main(["chat", str(adapter), "--with-context", *ask]) == 2
    assert "no context is known for" in capsys.readouterr().err


def test_a_run_that_trained_every_weight(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.lab import SMALL_STEP, make_lab

    from minidistill.trainer.checkpoint import save_model

    loaded = configure(*SMALL_STEP, "--no-trainer.model.lora")
    policy = make_lab(loaded).policy
    save_model(policy, tmp_path)
    (tmp_path / "config.toml").write_text(loaded.text)
    ask = ["--ask", QUESTIONS[0], "--temperature", "0", "--side-by-side"]
    assert main(["chat", str(tmp_path), *ask]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"base: {reference(None, '')[0]}"
    tokenizer = AutoTokenizer.from_pretrained(SOKOBAN_MODEL)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    trained: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    out = trained.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert lines[2] == f"student: {text}"


def test_the_line_that_serves_it(far: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(far), "--server"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == ["vllm", "serve"]
    assert Path(words[2]).resolve() == Path(SOKOBAN_MODEL)
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"far={far / 'adapter'}"]
    assert words[3:] == lora
    file = far / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for changed, what in (({"use_dora": True}, "it is DoRA"), ({"r": 1000}, "is above 512")):
        file.write_text(json.dumps(settings | changed))
        assert main(["chat", str(far), "--server"]) == 2
        error = capsys.readouterr().err
        assert what in error
        assert "--merge" in error


def test_the_line_says_what_to_write_with_the_cpu_build(
    far: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dists, modules, noted in (
        ([], ["vllm"], True),
        (["vllm"], ["vllm"], False),
        ([], [], False),
    ):
        monkeypatch.setattr(usage, "find_spec", lambda name, found=modules: name in found or None)

        def version(name: str, found: list[str] = dists) -> str:
            if name not in found:
                raise PackageNotFoundError(name)
            return "0.32.0"

        monkeypatch.setattr(usage, "version", version)
        assert main(["chat", str(far), "--server"]) == 0
        out = capsys.readouterr()
        assert len(out.out.splitlines()) == 1, "what a script reads"
        assert ("vllm.entrypoints.openai.api_server" in out.err) == noted


@pytest.mark.parametrize("width", [60, 80, 200])
def test_columns_fit_the_terminal(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=20, force_terminal=True, color_system=None)
    screen = Columns([BASE, BASE_IN_CONTEXT, STUDENT], console)
    texts = ["plain words " * 30, "\x1b[31mred\x1b[0m \u202e" + "x" * 500, "日本 " * 40]
    screen.begin()
    for view, text in enumerate(texts):
        screen.show(view, text[:50])
    stream.truncate(0)
    screen.end([Answer(text, "length" if i == 1 else "eos") for i, text in enumerate(texts)])
    from rich.cells import cell_len

    lines = stream.getvalue().replace("\x1b[?25h", "").replace("\x1b[2K", "").splitlines()
    lines = [line.replace("\x1b[1A", "").lstrip("\r\0") for line in lines]
    assert max(map(cell_len, lines)) <= width
    joined = "".join(lines)
    assert joined.count("x") == 500 + joined.count("ma" + "x") + joined.count("conte" + "x")
    assert "\u202e" not in joined
    assert "\x1b[31m" not in joined
    beside = any("base in context" in line and "student" in line for line in lines)
    assert beside == (width >= 80)


def test_ctrl_c_ends_an_answer_and_a_second_one_the_chat() -> None:
    ctrl_c, before = CtrlC(), signal.getsignal(signal.SIGINT)
    with ctrl_c.handled():
        with ctrl_c.answering():
            assert not ctrl_c.take()
            os.kill(os.getpid(), signal.SIGINT)
            assert ctrl_c.take()
            assert not ctrl_c.take(), "it ends one answer"
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):  # at the prompt
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_as_an_answer_ends_is_not_the_end_of_the_chat(
    far: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [QUESTIONS[1], QUESTIONS[0]]

    def ask(prompt: str) -> str:
        if questions:
            return questions.pop()
        raise EOFError

    real = Lines.end

    def end(self: Lines, answers: Sequence[Answer]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(self, answers)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(Lines, "end", end)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(["chat", str(far), "--max-tokens", "3"]) == 0
    assert not questions, "the next one is asked"


def test_a_chat_on_a_terminal(far: Path) -> None:
    """Questions, a command, an unknown one, Ctrl-C at the prompt, and Ctrl-D."""
    with terminal("chat", str(far), "--temperature", "0", rows=40, columns=100) as screen:
        header = screen.read_until("Ctrl-D the chat")
        assert "temperature 0, at most 12 tokens" in header
        screen.read_until("> ")
        screen.send(f"{QUESTIONS[0]}\n".encode())
        screen.read_until(reference(far / "adapter", "")[0])
        screen.read_until("> ")
        screen.send(b"/nope\n")
        screen.read_until("there is no command /nope")
        screen.read_until("> ")
        screen.send(b"half a line")
        screen.read_until("half a line")
        # a Ctrl-C before Python is back in `select` is noticed only at the next key
        screen.send_until(b"\x03", "\n> ")
        screen.send(b"\x04")
        assert screen.wait() == 0
        assert screen.settings() == screen.before
