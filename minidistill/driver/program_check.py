"""What `minidistill env check` finds of a program: its first request, and both views of it."""

from __future__ import annotations

import time
from dataclasses import replace

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.agent.env import AgentEnvironment
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import ScoringError
from minidistill.envs.protocol import Environment
from minidistill.errors import UserError
from minidistill.tasks.lengths import PromptLimit, length
from minidistill.tasks.messages import plain_messages
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Task

Findings = list[tuple[str, bool | None, str]]


def program_of(environment: Environment) -> AgentEnvironment | None:
    """The environment, if each of its conversations is led by a program."""
    inner = environment.environment if isinstance(environment, MultiTurnEnvironment) else None
    return inner if isinstance(inner, AgentEnvironment) else None


def check_program(
    config: Config,
    env: EnvConfig,
    environment: AgentEnvironment,
    builder: PromptBuilder,
    task: Task,
) -> tuple[Findings, dict[str, float]]:
    """Start the program for a task, and end it at its first request.

    Returns what was found, as `Report.add` takes it, and the figures.
    """
    began = time.perf_counter()
    try:
        environment.check_ready()
        question = environment.first_question(task, env.turn_timeout)
    except UserError as error:
        return [("program", False, error.what)], {}
    except ScoringError as error:
        return [("program", False, str(error))], {}
    seconds = time.perf_counter() - began
    found: Findings = [("program", True, f"its first request came after {seconds:.1f} s")]
    figures = {"first_request_s": seconds}
    messages = plain_messages(question.messages)
    context = builder.contexts.draw(env.name, task)
    asked = replace(task, messages=tuple(messages))
    if question.tools and not builder.student.takes_tools:
        return [*found, ("context", False, "the model's chat template takes no tools")], figures
    try:
        student = environment.strip.student(messages, context.text)
        prompt = builder.build(
            env.name, asked, question.tools, context=context, strip=environment.strip
        )
    except UserError as error:
        return [*found, ("context", False, error.what)], figures
    part = "system message" if environment.strip.part == "system" else "context"
    if student == messages:
        found.append(("context", False, f"its first request has no {part} to leave out"))
    else:
        what = f"the teacher reads the {part} of its first request, and the student does not"
        found.append(("context", True, what))
    sizes = len(prompt.student_ids), len(prompt.teacher_ids)
    figures |= {"student_tokens_max": float(sizes[0]), "teacher_tokens_max": float(sizes[1])}
    limit = PromptLimit.of(config, config.seq_len)
    detail = f"student {sizes[0]}, teacher {sizes[1]}; with a completion at most {limit.tokens} fit"
    found.append(("tokens", length(prompt) <= limit.tokens, detail))
    return found, figures
