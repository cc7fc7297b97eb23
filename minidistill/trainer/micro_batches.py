"""A step's micro-batches: which rollouts share one, and what happens on OOM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.placement.attention import Layout
from minidistill.trainer.batching import (
    RowPart,
    share_out,
    share_out_groups,
    split_by_tokens,
    split_groups,
)
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.types import Rollout

logger = logging.getLogger(__name__)

MOST_PADDING = 0.05
"""Of a padded micro-batch. Sequences of other lengths have a micro-batch of their own."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """An attempt at a step in which a micro-batch did not fit in a rank's memory."""

    message: str
    tokens: int
    """Of the rank's rollouts in this step."""
    longest: int
    """The tokens of the longest of them."""
    single_sequences: bool
    """Every micro-batch of the rank was one sequence."""


class MicroBatches:
    """Divides a step's rollouts among ranks and micro-batches of at most `budget` tokens.

    On OOM the budget is halved for the rest of the run.
    """

    def __init__(self, budget: int, rank_group: RankGroup, layout: Layout) -> None:
        self.budget, self.layout, self.rank_group = budget, layout, rank_group

    def passes(
        self, rollouts: Sequence[Rollout], *, sharded: bool, cached: int = 0
    ) -> list[list[int]]:
        """The rollouts of each of this rank's micro-batches, by their index.

        With `sharded` weights every rank runs the same number of passes; some may be empty. The
        first `cached` tokens of the teacher's prompts are in no pass.
        """
        ranks, passes = self.rank_group.size, []
        parts = [_row_part(rollout, cached) for rollout in rollouts]
        lengths = [part.prompt + part.completion for part in parts]
        shared = self.layout is Layout.SHARED
        for share in share_out_groups(parts, ranks) if shared else share_out(lengths, ranks):
            if shared:
                groups = split_groups([parts[i] for i in share], self.budget)
            else:
                packed = self.layout is Layout.PACKED
                rows = [lengths[i] for i in share]
                groups = split_by_tokens(rows, self.budget, packed, MOST_PADDING)
            passes.append([[share[i] for i in group] for group in groups])
        if sharded:
            most = max(map(len, passes))
            passes = [groups + [[]] * (most - len(groups)) for groups in passes]
        return passes[self.rank_group.rank]

    def tokens(self, rollouts: Sequence[Rollout], cached: int = 0) -> int:
        """The tokens of one micro-batch of all these rollouts, without padding."""
        parts = [_row_part(rollout, cached) for rollout in rollouts]
        completions = sum(part.completion for part in parts)
        if self.layout is Layout.SHARED:
            return completions + sum({part.group: part.prompt for part in parts}.values())
        return completions + sum(part.prompt for part in parts)

    def shrink(self, failures: dict[int, OutOfMemory], *, sharded: bool) -> None:
        """Halve the budget, for the rank with the least memory.

        Raises UserError (exit code 3) if a rank could not hold a single sequence.
        """
        for failure in failures.values():
            if failure.single_sequences:
                raise sequence_too_long(failure.longest, failure.message)
        # start from what was in use: a much larger budget would have to be halved several times
        rank, worst = min(failures.items(), key=lambda item: item[1].tokens)
        self.budget = min(self.budget, worst.tokens) // 2
        if sharded and self.rank_group.rank:
            return  # the driver warns for all
        where = f" on rank {rank}" if rank != self.rank_group.rank else ""
        logger.warning(
            f"out of memory{where} ({worst.message}): "
            f"trainer.micro_batch_tokens is {self.budget} from here on"
        )


def _row_part(rollout: Rollout, cached: int) -> RowPart:
    """A rollout's tokens in the pass of the role that reads more of its prompt."""
    prompt, tokens = rollout.prompt, len(rollout.completion.sequence)
    views = prompt.student_ids, prompt.teacher_ids
    student, teacher = map(len, views)
    longest = student if rollout.teacher is not None else max(student, teacher - cached)
    return RowPart(views, longest, tokens)


def sequence_too_long(tokens: int, message: str) -> UserError:
    """The error (exit code 3) for a sequence that does not fit in memory by itself."""
    return UserError(
        f"one sequence of {tokens} tokens does not fit in memory: {message}",
        where="trainer.micro_batch_tokens",
        fix="set trainer.model.ac.freq = 1, shorten the context or "
        "orchestrator.sampling.max_tokens, or train on more GPUs",
        exit_code=EXIT_ENVIRONMENT,
    )
