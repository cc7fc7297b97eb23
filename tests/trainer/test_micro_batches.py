"""Which rollouts are in one pass: full budgets, little padding, no tokens that are cached."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from support.lab import SMALL_STEP, make_lab

from minidistill.placement.attention import Layout
from minidistill.trainer.batching import split_by_tokens
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.micro_batches import MOST_PADDING, MicroBatches
from minidistill.types import Completion, Prompt, Rollout, Task

Configure = Callable[..., Any]


def rollout(student: int, context: int, completion: int, first: int = 5) -> Rollout:
    """A rollout with prompts and a completion of these lengths."""
    own = (first, *range(7, 6 + student))
    prompt = Prompt("", Task("", ()), "", "", own, (*range(1000, 1000 + context), *own))
    return Rollout(prompt, 0, Completion((9,) * completion, (-1.0,) * completion, "eos"), "")


def padded_tokens(lengths: list[int], group: list[int]) -> int:
    return len(group) * max(lengths[i] for i in group)


@pytest.mark.parametrize("budget", [50, 400, 10_000])
def test_padded_groups_have_little_padding(budget: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(10, 200) for _ in range(300)]
    groups = split_by_tokens(lengths, budget, most_padding=MOST_PADDING)
    assert sorted(i for group in groups for i in group) == list(range(300))
    for group in groups:
        tokens, padded = sum(lengths[i] for i in group), padded_tokens(lengths, group)
        assert padded <= budget or len(group) == 1
        assert tokens >= 0.95 * padded
    if budget == 10_000:  # as few as the spread of the lengths asks for: 10% from first to last
        assert len(groups) <= 35
        assert len(split_by_tokens(lengths, budget)) < len(groups)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_cached_context_is_in_no_pass(layout: Layout) -> None:
    rollouts = [rollout(10, 500, 20, first=i) for i in range(8)]
    batches = MicroBatches(120, RankGroup(), layout)
    assert batches.passes(rollouts, sharded=False, cached=500) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches.tokens(rollouts, cached=500) == 8 * 30
    assert len(batches.passes(rollouts, sharded=False)) == 8
    assert batches.tokens(rollouts) == 8 * 530


def test_a_prompt_is_counted_once_in_a_row_that_shares_it() -> None:
    rollouts = [rollout(10, 500, 20, first=i // 4) for i in range(8)]
    batches = MicroBatches(90, RankGroup(), Layout.SHARED)
    assert batches.passes(rollouts, sharded=False, cached=500) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("flags", [(), ("--no-trainer.packing",)])
def test_the_share_of_padding_is_a_metric(configure: Configure, flags: tuple[str, ...]) -> None:
    lab = make_lab(configure(*SMALL_STEP, *flags))
    share = lab.trainer.step(lab.rollouts, 1, lambda count: None).metrics["perf/padding_frac"]
    if not flags:
        assert share == 0
        return
    passes = lab.trainer.micro_batches.passes(lab.rollouts, sharded=False)
    students = [r.student_length for r in lab.rollouts]
    padded = sum(padded_tokens(students, rows) for rows in passes)
    assert len({*students}) > 1
    assert 0 < share <= 0.05
    # both views have nearly the same padding
    assert share == pytest.approx(1 - sum(students) / padded, abs=0.02)
