"""Conversations that `minidistill env check` plays: with scripted answers, and with the model."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver.env_answers import gives_examples, own_answers
from minidistill.driver.env_report import Report
from minidistill.engines.base import Engine
from minidistill.envs.episodes import MOST_TURNS
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.rollouts.conversations import Played, Player, metrics_of
from minidistill.seeding import stable_seed
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Completion, Message, Prompt, Request, Role, SamplingParams, Task, Turn

SILENT, RANDOM, OWN, MODEL = "empty", "random", "own", "model"
_ANSWERS = {SILENT: "empty answers", RANDOM: "random words", OWN: "the task's own", MODEL: "model"}
WORDS = 12
"""Of a random answer, which are drawn from those that the conversation shows."""


@dataclass(frozen=True, slots=True)
class _Play:
    """One conversation to play, and the answers if they are the task's own."""

    prompt: Prompt
    kind: str
    own: Sequence[str] = ()

    def text(self, turn: int, shown: Callable[[], str]) -> str:
        if self.kind == OWN:
            return self.own[min(turn, len(self.own) - 1)]
        if self.kind == SILENT:
            return ""
        rng = random.Random(stable_seed("env check", self.prompt.task.id, turn))
        words = shown().split() or ["word"]
        return " ".join(rng.choices(words, k=rng.randint(1, WORDS)))


class _Scripted:
    """Samples the scripted answers. A request's seed is the number of its play and its turn."""

    description = "engine of scripted answers"

    def __init__(self, builder: PromptBuilder, plays: Sequence[_Play]) -> None:
        self.builder, self.plays = builder, plays

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, role: Role
    ) -> list[Completion]:
        return [self._completion(request, params.max_tokens) for request in requests]

    def _completion(self, request: Request, most: int) -> Completion:
        number, turn = divmod(request.seed, MOST_TURNS)
        text = self.plays[number].text(turn, lambda: self.builder.decode(request.prompt_ids))
        end = self.builder.student.end_of_turn
        ids = [*self.builder.encode(text), *(() if end is None else (end,))]
        ids = (ids or [*self.builder.encode(".")])[:most]
        stop = "eos" if ids[-1] == end else "length"
        return Completion(tuple(ids), (0.0,) * len(ids), stop)


class _Watched:
    """An environment, with the seconds that it takes from an answer to the next question."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.seconds: list[float] = []
        self.full = 0
        """Conversations that were told that they have no room for another turn."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    async def rollout(self, task: Task, policy: Any) -> Any:
        watch = _Watch(policy, self.seconds)
        value = await self._environment.rollout(task, watch)
        watch.stop()
        self.full += watch.full
        return value

    def close(self) -> None:
        """Whoever has loaded the environment closes it."""


class _Watch:
    def __init__(self, policy: Any, seconds: list[float]) -> None:
        self._policy, self._seconds, self._since = policy, seconds, time.perf_counter()
        self.full = False

    async def __call__(self, messages: Sequence[Message], **asked: Any) -> Turn:
        self.stop()
        try:
            turn: Turn = await self._policy(messages, **asked)
            self.full |= not turn.token_ids
            return turn
        finally:
            self._since = time.perf_counter()

    def forget(self, turn: Turn) -> None:
        self._policy.forget(turn)

    def stop(self) -> None:
        self._seconds.append(time.perf_counter() - self._since)


def check_conversations(
    report: Report,
    config: Config,
    env: EnvConfig,
    environment: MultiTurnEnvironment,
    builder: PromptBuilder,
    tasks: Sequence[Task],
    model: Engine | None,
) -> None:
    """Play a conversation about each task with each kind of answers, all at once and then one by
    one. With `model`, that plays one more of each."""
    environment.check_ready()
    plays = []
    for task in tasks:
        prompt = builder.build(env.name, task)
        plays += [_Play(prompt, SILENT), _Play(prompt, RANDOM)]
        if own := own_answers(environment, task):
            plays.append(_Play(prompt, OWN, own))
    watched = _Watched(environment.environment)
    limits = env.turn_timeout, env.episode_timeout
    stage = MultiTurnEnvironment(watched, environment.id, *limits)
    engine: Any = _Scripted(builder, plays)
    try:
        played = _play(config, builder, stage, engine, plays, range(len(plays)))
        full = watched.full
        watched.seconds.clear()
        again = [_play(config, builder, stage, engine, plays, [n])[0] for n in range(len(plays))]
        seconds = list(watched.seconds)
        if model is not None:
            prompts = {id(play.prompt): _Play(play.prompt, MODEL) for play in plays}
            sampled = list(prompts.values())
            played += _play(config, builder, stage, model, sampled, range(len(sampled)))
            plays += sampled
    finally:
        stage.close()
    if not _check_ends(report, env, plays, played):
        return
    _check_repeats(report, plays, played, again)
    if environment.strip is None:
        _check_views(report, builder, played)
    _check_room(report, config, played, full)
    _check_rewards(report, environment, plays, played)
    mean_ms, max_ms = 1000 * statistics.fmean(seconds), 1000 * max(seconds)
    report.figures.update({"turn_ms_mean": mean_ms, "turn_ms_max": max_ms})
    limit = f"of {env.turn_timeout:g} s (turn_timeout)"
    report.add("time", True, f"{mean_ms:.1f} ms a turn, at most {max_ms:.1f} ms, {limit}")


def _play(
    config: Config,
    builder: PromptBuilder,
    stage: MultiTurnEnvironment,
    engine: Engine,
    plays: Sequence[_Play],
    numbers: Sequence[int],
) -> list[Played]:
    """Play these of the `plays` together."""
    chosen = [plays[number] for number in numbers]
    sampling = config.orchestrator.sampling
    player = Player(
        builder,
        {play.prompt.env: stage for play in chosen},
        config.seq_len,
        SamplingParams(sampling.max_tokens, sampling.temperature),
        seed=lambda row, turn: numbers[row] * MOST_TURNS + turn,
    )
    return player.play(engine, [(play.prompt, 0) for play in chosen], lambda count: None)


def _check_ends(
    report: Report, env: EnvConfig, plays: Sequence[_Play], played: Sequence[Played]
) -> bool:
    """No conversation fails, and none has more turns than its args say."""
    if failed := [(play, p) for play, p in zip(plays, played, strict=True) if p.error]:
        play, first = failed[0]
        what = f"{len(failed)} of {len(plays)} fail, first with {_ANSWERS[play.kind]}"
        report.add("conversations", False, f"{what}: {first.error}")
        return False
    turns = [p.turns for p in played]
    report.figures.update(metrics_of(played))
    kinds = ", ".join(_ANSWERS[kind] for kind in dict.fromkeys(play.kind for play in plays))
    shown = f"{len(plays)} of {min(turns)} to {max(turns)} turns, with {kinds}"
    most = env.args.get("max_turns")
    within = not isinstance(most, int) or max(turns) <= most
    report.add("conversations", within, shown + ("" if within else f": max_turns is {most}"))
    return True


def _check_repeats(
    report: Report, plays: Sequence[_Play], played: Sequence[Played], again: Sequence[Played]
) -> None:
    """The same answers lead to the same conversations, beside others and alone."""
    pairs = zip(plays, played, again, strict=False)
    differ = [play for play, ours, theirs in pairs if _content(ours) != _content(theirs)]
    if differ:
        what = f"{len(differ)} of {len(again)} conversations are others the second time"
        first = f"first that of the task {differ[0].prompt.task.id!r}"
        report.add("repeats", False, f"{what}, {first} with {_ANSWERS[differ[0].kind]}")
    else:
        report.add("repeats", True, f"{len(again)} are equal, all at once and one by one")


def _content(played: Played) -> Any:
    samples = [(s.prompt.student_ids, s.prompt.teacher_ids, s.completion) for s in played.samples]
    return samples, played.reward


def _check_views(report: Report, builder: PromptBuilder, played: Sequence[Played]) -> None:
    """The context is once in the teacher's view of each sample, and not in the student's."""
    samples = [sample for p in played for sample in p.samples]
    for sample in samples:
        context = sample.prompt.context.text.strip()
        later = sample.text.count(context)
        student, teacher = (
            text.count(context) + later
            for text in (sample.prompt.student_text, sample.prompt.teacher_text)
        )
        if (student, teacher) != (0, 1):
            counts = f"{student} times in the student's view, {teacher} in the teacher's"
            id = sample.prompt.task.id
            report.add("views", False, f"in a conversation of the task {id!r} it is {counts}")
            return
    shown = f"the context once in the teacher's view and not in the student's, of {len(samples)}"
    report.add("views", True, f"{shown} samples")


def _check_room(report: Report, config: Config, played: Sequence[Played], full: int) -> None:
    """No conversation is ended by `seq_len`, which ends `full` of them."""
    samples = [sample for p in played for sample in p.samples]
    for view in ("student", "teacher"):
        lengths = [
            len(getattr(sample.prompt, f"{view}_ids")) + len(sample.completion.sequence)
            for sample in samples
        ]
        report.figures[f"{view}_sample_max"] = max(lengths)
    longest = report.figures["teacher_sample_max"]
    shown = f"at most {longest:g} tokens, of {config.seq_len} (seq_len)"
    report.add("room", not full, shown + (f": {full} have no room for a turn" if full else ""))


def _check_rewards(
    report: Report,
    environment: MultiTurnEnvironment,
    plays: Sequence[_Play],
    played: Sequence[Played],
) -> None:
    """Rewards differ between kinds of answers, and an example is the best of the scripted."""
    if not environment.has_rewards:
        report.add("rewards", None, "it has none")
        return
    values: dict[str, list[float]] = {}
    for play, p in zip(plays, played, strict=True):
        assert p.reward is not None
        values.setdefault(play.kind, []).append(p.reward.value)
    means = {kind: statistics.fmean(each) for kind, each in values.items()}
    report.figures.update({f"reward_{kind}": mean for kind, mean in means.items()})
    shown = "means: " + ", ".join(f"{_ANSWERS[kind]} {mean:.3g}" for kind, mean in means.items())
    if OWN in means and gives_examples(environment):
        best = means[OWN] > max(means[SILENT], means[RANDOM])
        end = "" if best else ": the environment's example_answer is not the best"
        report.add("rewards", best, shown + end)
    elif len({value for each in values.values() for value in each}) > 1:
        report.add("rewards", True, shown)
    else:
        end = "; all are equal, and an example_answer(task) would show whether others can be"
        report.add("rewards", None, shown + end)
