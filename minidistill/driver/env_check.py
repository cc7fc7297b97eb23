"""`minidistill env check`: an environment against its contract, before a run finds out."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver import preflight
from minidistill.driver.env_answers import gives_examples, own_answer
from minidistill.driver.env_play import check_conversations
from minidistill.driver.env_report import Report
from minidistill.driver.program_check import check_program, program_of
from minidistill.engines.base import Engine
from minidistill.envs.isolated import IsolatedEnvironment
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import Attempt, Outcome, ScoringError, score_attempts
from minidistill.envs.protocol import Environment, check_ready, has_rewards
from minidistill.envs.task_rows import first_tasks, rows_elsewhere, task_rows
from minidistill.errors import UserError
from minidistill.tasks.lengths import PromptLimit
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Prompt, Reward, Task

NONSENSE = "I do not know."
"""A wrong answer, where there is none of another task."""
_ANSWERS = {"empty": "an empty answer", "wrong": "a wrong answer", "own": "the task's own answer"}
"""The completions that are scored. A wrong one is another task's."""


def check_environment(
    config: Config,
    env: EnvConfig,
    environment: Environment,
    builder: PromptBuilder,
    samples: int,
    model: Engine | None = None,
) -> Report:
    """Check `environment`, which `env` has loaded. `samples` tasks of each split are scored.

    Conversations about these are played, also by `model` if that is there.
    """
    report = Report(env.name)
    splits = {"train": first_tasks(environment.train), "eval": first_tasks(environment.eval)}
    counts = {"train": len(environment.train), "eval": len(environment.eval)}
    sizes = ", ".join(f"{n} task{'' if n == 1 else 's'} in {split}" for split, n in counts.items())
    report.add("tasks", all(counts.values()), sizes)
    if not all(counts.values()):
        return report
    _check_equal(report, env, environment)
    _check_splits(report, splits, hidden=isinstance(environment, MultiTurnEnvironment))
    if (program := program_of(environment)) is not None:
        found, figures = check_program(config, env, program, builder, splits["train"][0])
        for finding in found:
            report.add(*finding)
        report.figures.update(figures)
        report.add("rewards", None, "it plays conversations, and each gives its own reward")
        return report
    _check_views(report, config, env, builder, splits)
    chosen = [task for tasks in splits.values() for task in tasks[:samples]]
    if isinstance(environment, MultiTurnEnvironment):
        check_conversations(report, config, env, environment, builder, chosen, model)
    else:
        _check_rewards(report, env, environment, chosen)
    return report


def _check_equal(report: Report, env: EnvConfig, environment: Environment) -> None:
    """Two loads give equal tasks: resumed runs, ranks and scoring processes load it again."""
    try:
        here, there = task_rows(environment), rows_elsewhere(env.id, env.args)
    except (RuntimeError, TypeError, ValueError) as error:
        report.add("deterministic", False, str(error))
        return
    for split in here:
        if len(here[split]) != len(there[split]):
            sizes = f"{len(here[split])} and {len(there[split])} tasks in {split}"
            report.add("deterministic", False, f"two loads give {sizes}")
            return
        pairs = enumerate(zip(here[split], there[split], strict=True))
        differ = [index for index, (ours, theirs) in pairs if ours != theirs]
        if differ:
            what = f"two loads give other tasks: {len(differ)} of {len(here[split])} in {split}"
            report.add("deterministic", False, f"{what}, first number {differ[0]}")
            return
    total = sum(map(len, here.values()))
    report.add("deterministic", True, f"{total} tasks are equal in another process")


def _check_splits(report: Report, splits: dict[str, list[Task]], *, hidden: bool) -> None:
    """Ids are unique, and neither an id nor a prompt is in both splits.

    With `hidden` a prompt may be: what differs is in the answer, and shows in later turns.
    """
    ids = {split: [task.id for task in tasks] for split, tasks in splits.items()}
    for split, of_split in ids.items():
        twice, times = Counter(of_split).most_common(1)[0]
        if times > 1:
            report.add("splits", False, f"the id {twice!r} is twice in {split}")
            return
    if shared := set(ids["train"]) & set(ids["eval"]):
        report.add("splits", False, f"the id {min(shared, key=str)!r} is in both splits")
        return
    prompts = [{_content(task, hidden): task.id for task in tasks} for tasks in splits.values()]
    if both := prompts[0].keys() & prompts[1].keys():
        first = prompts[0][min(both)]
        prompts_are = "1 prompt is" if len(both) == 1 else f"{len(both)} prompts are"
        what = f"{prompts_are} in both splits, as that of the task {first!r}"
        report.add("splits", False, what)
        return
    report.add("splits", True, "ids are unique, and no id and no prompt is in both")


def _content(task: Task, hidden: bool) -> str:
    messages = [sorted(dict(message).items(), key=str) for message in task.messages]
    return repr((messages, task.answer if hidden else None))


def _check_views(
    report: Report,
    config: Config,
    env: EnvConfig,
    builder: PromptBuilder,
    splits: dict[str, list[Task]],
) -> None:
    """Both views render, the teacher's alone has the context, and a completion has room."""
    prompts = [builder.build(env.name, task) for tasks in splits.values() for task in tasks]
    try:
        preflight.check_prompts(config, builder, prompts)
    except UserError as error:
        report.add("context", False, error.what)
    else:
        report.add("context", *_context_in_place(prompts))
    limit = PromptLimit.of(config, config.seq_len)
    for view in ("student", "teacher"):
        lengths = [len(getattr(prompt, f"{view}_ids")) for prompt in prompts]
        report.figures[f"{view}_tokens_mean"] = statistics.fmean(lengths)
        report.figures[f"{view}_tokens_max"] = max(lengths)
    long = [prompt for prompt in prompts if not limit.allows(prompt)]
    shown = ", ".join(
        f"{view} {report.figures[f'{view}_tokens_mean']:.0f} "
        f"(at most {report.figures[f'{view}_tokens_max']:.0f})"
        for view in ("student", "teacher")
    )
    detail = f"{shown}; with a completion at most {limit.tokens} fit"
    if long:
        detail += f": {len(long)} of {len(prompts)} prompts are too long"
    report.add("tokens", not long, detail)


def _context_in_place(prompts: Sequence[Prompt]) -> tuple[bool, str]:
    for prompt in prompts:
        context = prompt.context.text.strip()
        in_views = [text.count(context) for text in (prompt.student_text, prompt.teacher_text)]
        if in_views != [0, 1]:
            counts = f"{in_views[0]} times in the student's view, {in_views[1]} in the teacher's"
            return False, f"of the task {prompt.task.id!r} the context is {counts}"
    return True, f"once in the teacher's view and not in the student's, of {len(prompts)} prompts"


def _check_rewards(
    report: Report, env: EnvConfig, environment: Environment, tasks: Sequence[Task]
) -> None:
    """Rewards are finite, and tell an empty, a wrong and the own answer apart."""
    if not has_rewards(environment):
        report.add("rewards", None, "it has none")
        return
    check_ready(environment)
    if isinstance(environment, IsolatedEnvironment):
        environment.check()
    own = [own_answer(environment, task) for task in tasks]
    by_kind = {
        "empty": [Attempt(task, "", 0) for task in tasks],
        "wrong": [Attempt(task, _other(own, i)) for i, task in enumerate(tasks)],
        "own": [Attempt(t, text) for t, text in zip(tasks, own, strict=True) if text is not None],
    }
    means: dict[str, float] = {}
    slowest = total = 0.0
    count = 0
    for kind, attempts in by_kind.items():
        outcomes, seconds = _timed(environment, attempts)
        slowest, total = max([slowest, *seconds]), total + sum(seconds)
        count += len(attempts)
        if failures := [str(o) for o in outcomes if isinstance(o, ScoringError)]:
            what = f"{len(failures)} of {len(attempts)} scores of {_ANSWERS[kind]} fail"
            report.add("rewards", False, f"{what}: {failures[0]}")
            return
        if attempts:
            means[kind] = statistics.fmean(o.value for o in outcomes if isinstance(o, Reward))
    report.figures.update({f"reward_{kind}": value for kind, value in means.items()})
    report.add("rewards", *_discriminating(environment, means, len(tasks)))
    mean_ms, max_ms = 1000 * total / count, 1000 * slowest
    report.figures.update({"score_ms_mean": mean_ms, "score_ms_max": max_ms})
    limit = env.score_timeout
    within = limit == "off" or slowest <= limit
    report.add(
        "time",
        within,
        f"{mean_ms:.1f} ms a score, at most {max_ms:.1f} ms"
        + ("" if limit == "off" else f", of {limit:g} s (score_timeout)"),
    )


def _discriminating(
    environment: Environment, means: dict[str, float], tasks: int
) -> tuple[bool | None, str]:
    shown = ", ".join(f"{_ANSWERS[kind]} {value:.3g}" for kind, value in means.items())
    shown = f"means over {tasks} tasks: {shown}"
    if "own" not in means:
        if means["empty"] != means["wrong"]:
            return True, shown
        return None, f"{shown}; the tasks have no answer of their own to compare with"
    if gives_examples(environment):
        if means["own"] > max(means["empty"], means["wrong"]):
            return True, shown
        return False, f"{shown}: the environment's example_answer is not the best"
    if means["own"] != means["wrong"]:
        return True, shown
    return False, f"{shown}: if answers have a form, give the environment example_answer(task)"


def _other(own: Sequence[str | None], index: int) -> str:
    """An answer that is another task's, and not this one's."""
    others = (text for text in [*own[index + 1 :], *own[:index]] if text not in (None, own[index]))
    return next(others, None) or NONSENSE


def _timed(
    environment: Environment, attempts: Sequence[Attempt]
) -> tuple[list[Outcome], list[float]]:
    """The outcomes in the order of the attempts, and the seconds from one to the next."""
    outcomes: dict[int, Outcome] = {}
    seconds: list[float] = []
    last = time.perf_counter()

    def report(index: int, outcome: Outcome) -> None:
        nonlocal last
        outcomes[index] = outcome
        now = time.perf_counter()
        seconds.append(now - last)
        last = now

    score_attempts(environment, attempts, report)
    return [outcomes[i] for i in range(len(attempts))], seconds
