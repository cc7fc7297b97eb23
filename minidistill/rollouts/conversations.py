"""Conversations of multi-turn environments with an engine: a step's, or those of an evaluation."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, named
from minidistill.envs.episodes import Episode, EpisodeRounds
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import RefusedError, ScoringError
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.tasks.conversation import Conversation, Sample
from minidistill.tasks.conversations import Conversations
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import (
    Advance,
    Completion,
    Metrics,
    Prompt,
    Question,
    Request,
    Reward,
    Role,
    SamplingParams,
    Turn,
)

Talk = Conversation | Conversations


@dataclass(frozen=True, slots=True)
class Played:
    """A conversation that has ended."""

    samples: list[Sample] = field(default_factory=list)
    """Without any, it failed."""
    reward: Reward | None = None
    error: str = ""
    kind: str = ""
    """Of the error, if it has one."""
    turns: int = 0
    """Answers, of which `forgotten` ones are in no sample, because nobody has read them."""
    forgotten: int = 0
    asked: int = 0
    """Requests of an environment whose requests are stripped."""
    whole: int = 0
    """Those of them that had nothing to leave out."""
    text: str = ""
    """The whole conversation, without its first messages."""


@dataclass(frozen=True, slots=True)
class Player:
    """Plays conversations in rounds: one call of the engine for all that wait for their next turn.

    `role` and `context` say who answers. `max_length` is the number of tokens that a sample may
    have, its prompt included: a conversation without room for another turn is answered with an
    empty turn, and ends. `seed` gives that of a turn, from the number of the job and of the turn.
    Without `rewarded`, what the environments return is not read.
    """

    builder: PromptBuilder
    environments: Mapping[str, MultiTurnEnvironment]
    max_length: int
    params: SamplingParams
    seed: Callable[[int, int], int]
    role: Role = Role.STUDENT
    context: bool = False
    rewarded: bool = True

    def play(
        self,
        engine: Engine,
        jobs: Sequence[tuple[Prompt, int]],
        advance: Advance,
        check: Callable[[Sequence[str]], None] = lambda errors: None,
    ) -> list[Played]:
        """The conversations of `jobs`: of each prompt's task, with its number among the samples.

        `check` is called with the failures so far after each that took long, and may raise to stop.
        Raises what the engine raises.
        """
        environments = [self.environments[prompt.env] for prompt, _ in jobs]
        episodes = [
            Episode(environment, prompt.task, self.rewarded and environment.has_rewards)
            for environment, (prompt, _) in zip(environments, jobs, strict=True)
        ]
        conversations = [
            Conversations(self.builder, prompt, environment.strip)
            if environment.branches
            else Conversation(self.builder, prompt)
            for environment, (prompt, _) in zip(environments, jobs, strict=True)
        ]
        numbers = {episode: number for number, episode in enumerate(episodes)}

        def failures() -> list[str]:
            outcomes = [e.outcome for e in episodes]
            return [
                f"task {prompt.task.id} of {prompt.env}: {outcome}"
                for (prompt, _), outcome in zip(jobs, outcomes, strict=True)
                if isinstance(outcome, ScoringError)
            ]

        rounds = EpisodeRounds(episodes, lambda: check(failures()))
        ended = 0
        try:
            while waiting := rounds.wait():
                asking = [
                    (numbers[episode], question)
                    for episode in waiting
                    if (question := self._asks(rounds, episode, conversations[numbers[episode]]))
                ]
                turns = self._answers(engine, jobs, conversations, asking)
                for (row, question), turn in zip(asking, turns, strict=True):
                    rounds.answer(episodes[row], turn, question)
                ended, before = sum(e.outcome is not None for e in episodes), ended
                advance(ended - before)
        finally:
            rounds.close()
        advance(len(jobs) - ended)
        triples = zip(jobs, conversations, episodes, strict=True)
        played = [_played(prompt, talk, episode) for (prompt, _), talk, episode in triples]
        _check_stripped(played, [prompt.env for prompt, _ in jobs])
        return played

    def _asks(self, rounds: EpisodeRounds, episode: Episode, talk: Talk) -> Question | None:
        """What the engine is to answer with the episode's next turn."""
        question = episode.asked
        if question is None:  # its program has ended meanwhile
            return None
        if not talk.full:
            try:
                talk.ask(question.messages, question.tools)
            except UserError as error:  # messages that the chat template cannot take
                rounds.answer(episode, RefusedError(error.what), question)
                return None
            if talk.length() + self._tokens(question) <= self.max_length:
                return question
            talk.full = True
        rounds.answer(episode, Turn("", truncated=True), question)
        return None

    def _tokens(self, question: Question) -> int:
        """How long the answer may be."""
        return min(question.max_tokens or self.params.max_tokens, self.params.max_tokens)

    def _answers(
        self,
        engine: Engine,
        jobs: Sequence[tuple[Prompt, int]],
        conversations: Sequence[Talk],
        asking: Sequence[tuple[int, Question]],
    ) -> list[Turn]:
        """The next turns of these conversations."""
        if not asking:
            return []
        requests = [
            Request(
                conversations[row].ids(self.role, context=self.context),
                self.seed(row, conversations[row].turns),
            )
            for row, _ in asking
        ]
        # what is drawn does not depend on it
        longest = max(self._tokens(question) for _, question in asking)
        params = replace(self.params, max_tokens=longest)
        completions = engine.generate(requests, params, self.role)
        name = named([jobs[row] for row, _ in asking])
        check_completions(engine, completions, len(asking), params, name)
        return [
            conversations[row].take(
                _cut(c, self._tokens(question), question.stop, self.builder), question.stop
            )
            for (row, question), c in zip(asking, completions, strict=True)
        ]


def _cut(
    completion: Completion, tokens: int, stop: Sequence[str], builder: PromptBuilder
) -> Completion:
    """The completion up to `tokens`, and up to the token that completes one of the `stop` texts."""
    ids, end, why = completion.token_ids, len(completion.token_ids), completion.stop
    if end > tokens:
        end, why = tokens, "length"

    def stopped(count: int) -> bool:
        return any(each in builder.decode(ids[:count]) for each in stop)

    if stop and stopped(end):
        end, why = bisect_left(range(end), True, lo=1, key=stopped), "stop"
    if end == len(ids) and why == completion.stop:
        return completion
    top = completion.top_ids
    return Completion(
        ids[:end],
        completion.logprobs[:end],
        why,
        None if top is None else top[:end],
        tuple((first, version) for first, version in completion.versions if first < end),
    )


def _played(prompt: Prompt, talk: Talk, episode: Episode) -> Played:
    turns, outcome = talk.turns, episode.outcome
    forgotten = sum(talk.forget(turn) for turn in episode.forgotten)
    samples = talk.samples
    counts = (turns, forgotten, 0, 0)
    if isinstance(talk, Conversations) and talk.strip is not None:
        counts = (turns, forgotten, talk.asked, talk.whole)
    if isinstance(outcome, Reward) and samples:
        return Played(samples, outcome, "", "", *counts, talk.text)
    if not isinstance(outcome, ScoringError):
        outcome = ScoringError(
            "nobody has read an answer" if forgotten else "no room for its first turn"
        )
    error = f"task {prompt.task.id} of {prompt.env}: {outcome}"
    return Played([], None, error, outcome.kind, *counts)


def _check_stripped(played: Sequence[Played], environments: Sequence[str]) -> None:
    """Raise UserError (exit code 4) if nothing could be left out of any request."""
    for name in dict.fromkeys(environments):
        own = [p for p, env in zip(played, environments, strict=True) if env == name]
        asked = sum(p.asked for p in own)
        if asked and sum(p.whole for p in own) == asked:
            raise UserError(
                f"none of {asked} requests of {name!r} has the part that the student is not to "
                "read, so there is nothing to distill",
                where="orchestrator.env",
                fix='with strip = "system" the program sends it in a system message; with strip = '
                '"context" orchestrator.teacher_model.context is in a message, letter for letter',
                exit_code=EXIT_HEALTH,
            )


def errors_of(played: Sequence[Played]) -> list[str]:
    return [p.error for p in played if not p.samples]


def metrics_of(played: Sequence[Played]) -> Metrics:
    """Turns of a conversation, and samples that began because the one before could not go on.

    Also the numbers of failures by their kind, of turns that nobody has read, and of requests that
    had nothing to leave out.
    """
    kinds = Counter(p.kind for p in played if p.kind)
    metrics = {f"env/errors/{kind}": float(count) for kind, count in kinds.items()}
    if any(p.asked for p in played):
        metrics["turns/unread"] = float(sum(p.forgotten for p in played))
        metrics["turns/unstripped"] = float(sum(p.whole for p in played))
    ended = [p for p in played if p.samples]
    if not ended:
        return metrics
    return metrics | {
        "turns/mean": sum(p.turns for p in ended) / len(ended),
        "turns/restarts": sum(len(p.samples) - 1 for p in ended) / len(ended),
    }
