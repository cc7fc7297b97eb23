"""`minidistill chat`: ask a trained model, and the base beside it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from minidistill.config.adapter import SETTINGS
from minidistill.error_output import print_to_stderr
from minidistill.errors import EXIT_OK, UserError, bounded, printable
from minidistill.export.check import vllm_rank
from minidistill.export.source import Source, open_source
from minidistill.export.usage import other_server
from minidistill.look.chat import Chat
from minidistill.look.model import Model, load
from minidistill.look.notes import notes_to_stderr
from minidistill.look.screen import Columns, Lines
from minidistill.look.views import (
    BASE,
    BASE_IN_CONTEXT,
    STUDENT,
    STUDENT_IN_CONTEXT,
    View,
    find_contexts,
    unknown_context,
)
from minidistill.models.registry import resolve
from minidistill.system.files import read_json, shown_path
from minidistill.system.foreign import Interrupted, was_interrupted
from minidistill.types import Context, Role, SamplingParams

LONGEST = 1 << 15
"""Tokens of a conversation, if the model takes that many."""
SHOWN = 20_000
"""Characters of a context that are shown."""
PROMPT = "> "
HELP = """\
/reset         begin a new conversation
/system TEXT   begin a new conversation with this system message
/context       show the context
/exit          end, as Ctrl-D does; Ctrl-C ends an answer"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    base: str | None = None
    context: str | None = None
    with_context: bool = False
    side_by_side: bool = False
    question: str | None = None
    server: bool = False
    temperature: float | None = None
    max_tokens: int | None = None


def chat(name: str, options: Options) -> int:
    """Answer questions until there are no more. Returns the exit code. Raises UserError."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with notes_to_stderr():
        source = open_source(name, base=options.base, context=options.context)
        if options.server:
            if source.checkpoint is not None:
                print_to_stderr(printable(describe(source)))
            print(printable(server_line(source)))
            if note := other_server():
                print_to_stderr(note)
            return EXIT_OK
        contexts = find_contexts(source.config)
        if options.with_context and not contexts:
            raise unknown_context(source)
        views = _views(source, options, has_context=bool(contexts))
        model = load(source, longest=LONGEST)
        context = contexts[0] if contexts else Context("")
        talk = Chat(model, views, context, _params(model, options))
        interactive = options.question is None and sys.stdin.isatty() and sys.stdout.isatty()
        on_terminal = sys.stdout.isatty()
        _say_what_answers(model, talk, len(contexts), all_of_it=interactive)
        screen: Lines | Columns = Lines(views, sys.stdout, streams=on_terminal)
        if on_terminal and len(views) > 1:
            console = Console(markup=False, emoji=False, highlight=False)
            screen = Columns(views, console)
        if options.question is not None:
            _ask(talk, screen, options.question)
        elif interactive:
            _converse(talk, screen)
        else:
            for line in sys.stdin:
                if not _take(talk, screen, line.strip()):
                    break
    return EXIT_OK


# -- what answers ----------------------------------------------------------------------------------


def _views(source: Source, options: Options, *, has_context: bool) -> list[View]:
    trained, in_context = STUDENT, STUDENT_IN_CONTEXT
    if not source.knows_base:
        trained = View("model", Role.STUDENT, False)
        in_context = View("model in context", Role.STUDENT, True)
    if not options.side_by_side:
        return [in_context if options.with_context else trained]
    views = [BASE, *([BASE_IN_CONTEXT] if has_context else [])] if source.knows_base else []
    return [*views, trained, *([in_context] if options.with_context else [])]


def _params(model: Model, options: Options) -> SamplingParams:
    """Those of the run, unless others are asked for."""
    sampling = model.config.orchestrator.sampling
    return SamplingParams(
        options.max_tokens or sampling.max_tokens,
        sampling.temperature if options.temperature is None else options.temperature,
    )


def describe(source: Source) -> str:
    """What the weights are of, in words."""
    if source.kind == "model" and not source.knows_base:
        return f"the model {source.run}"
    of = f"the {source.kind} in {source.run}" if source.kind != "model" else f"{source.run}"
    step = source.checkpoint
    state = "" if step is None else f", which has not finished: its checkpoint of step {step}"
    return f"{of}{state}, and its base {source.base}"


def _say_what_answers(model: Model, talk: Chat, contexts: int, *, all_of_it: bool) -> None:
    source, params = model.source, talk.params
    missing = not contexts and source.knows_base and len(talk.views) > 1
    if missing:
        print_to_stderr("no context is known: --context FILE|TEXT adds the base that reads it")
    if contexts > 1 and any(view.context for view in talk.views):
        print_to_stderr(
            printable(
                f"there are {contexts} contexts, and this is {talk.context.name}: --context gives "
                "another"
            )
        )
    if source.checkpoint is not None and not all_of_it:
        print_to_stderr(printable(describe(source)))
    if all_of_it:
        sampling = f"temperature {params.temperature:g}, at most {params.max_tokens} tokens"
        print(printable(f"{describe(source)}; {sampling}"))
        print("/help shows the commands; Ctrl-C ends an answer, Ctrl-D the chat")


# -- questions -------------------------------------------------------------------------------------


def _ask(talk: Chat, screen: Lines | Columns, question: str, ctrl_c: CtrlC | None = None) -> None:
    # the answers are drawn within: Ctrl-C as one ends would else end the chat
    with contextlib.nullcontext() if ctrl_c is None else ctrl_c.answering():
        screen.begin()
        try:
            answers = talk.ask(question, screen.show, lambda: ctrl_c is not None and ctrl_c.take())
        except BaseException:
            if isinstance(screen, Columns):
                screen.close()
            raise
        screen.end(answers)


def _take(talk: Chat, screen: Lines | Columns, line: str, ctrl_c: CtrlC | None = None) -> bool:
    """Answer a line, or do what its command says. Returns whether the chat goes on."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command in ("/reset", "/system"):
        talk.reset(rest.strip() if command == "/system" else "")
    elif command == "/context":
        shown = bounded(talk.context.text, SHOWN).strip()
        print(printable(shown or "no context is known: --context FILE|TEXT gives one"))
    elif command == "/help":
        print(HELP)
    elif line.startswith("/"):
        raise UserError(f"there is no command {command}", fix=f"one of\n{HELP}")
    elif line:
        _ask(talk, screen, line, ctrl_c)
    return True


def _converse(talk: Chat, screen: Lines | Columns) -> None:
    """Questions on a terminal, with line editing, until /exit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it
    ctrl_c = CtrlC()
    with ctrl_c.handled():
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                print()
                return
            except Interrupted:
                if was_interrupted():  # SIGTERM
                    raise
                print()
                continue
            try:
                if not _take(talk, screen, line, ctrl_c):
                    return
            except UserError as error:
                print_to_stderr(f"error: {error}")


class CtrlC:
    """Ctrl-C ends an answer, a second one while it does not end the chat; at the prompt it clears
    the line."""

    def __init__(self) -> None:
        self._answering = self._pressed = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        self._answering, self._pressed = True, False
        try:
            yield
        finally:
            self._answering = False

    def take(self) -> bool:
        """Whether it was pressed since the last call."""
        pressed, self._pressed = self._pressed, False
        return pressed

    def _handle(self, signum: int, frame: Any) -> None:
        if self._answering and not self._pressed:
            self._pressed = True
            return
        raise Interrupted


# -- serving ---------------------------------------------------------------------------------------


def server_line(source: Source) -> str:
    """The command that serves the weights with vLLM, under the name of the run or the folder."""
    name = source.run.resolve().name
    model = source.config.model
    more = ["--revision", model.revision] if model.revision and not source.base_is_local else []
    more += ["--trust-remote-code"] if model.trust_remote_code else []
    if not source.is_adapter:
        words = ["vllm", "serve", _place(str(source.weights)), "--served-model-name", name, *more]
        return shlex.join(words)
    settings = read_json(source.weights / SETTINGS)
    rank = vllm_rank(settings)
    if settings.get("use_dora") or rank is None:
        reason = "it is DoRA" if settings.get("use_dora") else "its rank is above 512"
        raise UserError(
            f"vLLM cannot serve this adapter: {reason}",
            where="--server",
            fix=f"merge it: minidistill export {source.run} --to DIR --merge, and serve DIR",
        )
    template = source.weights / "chat_template.jinja"
    if model.chat_template is not None and template.is_file():
        more += ["--chat-template", shown_path(Path(os.path.abspath(template)))]
    elif model.chat_template is not None:
        print_to_stderr(
            "the chat template is not the base's own: save it to a file, and add --chat-template "
            "FILE. `minidistill export` writes it as chat_template.jinja"
        )
    words = ["vllm", "serve", _place(source.base), "--enable-lora", "--max-lora-rank", str(rank)]
    return shlex.join([*words, *more, "--lora-modules", f"{name}={_place(str(source.weights))}"])


def _place(name: str) -> str:
    """The path of a folder, from the current directory if it is below that; a hub's id as it is."""
    path = Path(resolve(name)).expanduser()
    return shown_path(Path(os.path.abspath(path))) if path.is_dir() else name
