"""Conversations of multi-turn environments with an engine: a step's, or those of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minidistill.engines.base import Engine
from minidistill.engines.checks import check_completions, named
from minidistill.envs.episodes import Episode, EpisodeRounds
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.envs.outcomes import Outcome, ScoringError
from minidistill.errors import UserError
from minidistill.tasks.conversation import Conversation, Sample
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Advance, Metrics, Prompt, Request, Reward, Role, SamplingParams, Turn


@dataclass(frozen=True, slots=True)
class Played:
    """A conversation that has ended."""

    samples: list[Sample] = field(default_factory=list)
    """Without any, it failed."""
    reward: Reward | None = None
    error: str = ""
    turns: int = 0
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
        conversations = [Conversation(self.builder, prompt) for prompt, _ in jobs]
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
                rows = [
                    numbers[episode]
                    for episode in waiting
                    if self._asks(rounds, episode, conversations[numbers[episode]])
                ]
                for row, turn in self._answers(engine, jobs, conversations, rows):
                    rounds.answer(episodes[row], turn)
                ended, before = sum(e.outcome is not None for e in episodes), ended
                advance(ended - before)
        finally:
            rounds.close()
        advance(len(jobs) - ended)
        pairs = zip(jobs, conversations, episodes, strict=True)
        return [_played(prompt, talk, episode.outcome) for (prompt, _), talk, episode in pairs]

    def _asks(self, rounds: EpisodeRounds, episode: Episode, conversation: Conversation) -> bool:
        """Whether the engine is to sample the episode's next turn."""
        if not conversation.full:
            assert episode.asked is not None
            try:
                conversation.ask(episode.asked)
            except UserError as error:  # messages that the chat template cannot take
                rounds.fail(episode, error.what)
                return False
            conversation.full = conversation.length() + self.params.max_tokens > self.max_length
        if conversation.full:
            rounds.answer(episode, Turn("", truncated=True))
        return not conversation.full

    def _answers(
        self,
        engine: Engine,
        jobs: Sequence[tuple[Prompt, int]],
        conversations: Sequence[Conversation],
        rows: Sequence[int],
    ) -> list[tuple[int, Turn]]:
        """The next turns of these conversations."""
        if not rows:
            return []
        asking = [conversations[row] for row in rows]
        requests = [
            Request(
                conversation.ids(self.role, context=self.context),
                self.seed(row, conversation.turns),
            )
            for row, conversation in zip(rows, asking, strict=True)
        ]
        completions = engine.generate(requests, self.params, self.role)
        name = named([jobs[row] for row in rows])
        check_completions(engine, completions, len(rows), self.params, name)
        turns = [c.take(completion) for c, completion in zip(asking, completions, strict=True)]
        return list(zip(rows, turns, strict=True))


def _played(prompt: Prompt, conversation: Conversation, outcome: Outcome | None) -> Played:
    samples = conversation.samples
    if isinstance(outcome, Reward) and samples:
        return Played(samples, outcome, turns=conversation.turns, text=conversation.text)
    why: object = outcome if isinstance(outcome, ScoringError) else "no room for its first turn"
    return Played(error=f"task {prompt.task.id} of {prompt.env}: {why}")


def errors_of(played: Sequence[Played]) -> list[str]:
    return [p.error for p in played if not p.samples]


def metrics_of(played: Sequence[Played]) -> Metrics:
    """Turns of a conversation, and samples that began because the one before could not go on."""
    whole = [p for p in played if p.samples]
    if not whole:
        return {}
    return {
        "turns/mean": sum(p.turns for p in whole) / len(whole),
        "turns/restarts": sum(len(p.samples) - 1 for p in whole) / len(whole),
    }
