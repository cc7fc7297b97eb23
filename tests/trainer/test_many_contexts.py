"""The teacher's pass with many contexts: what they share is read once, what is kept is bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.lab import NO_MISMATCH_LIMIT, SMALL_STEP, Lab, assert_same_gradients, make_lab
from support.paths import SOKOBAN

from minidistill.config import load_config
from minidistill.trainer import forward
from minidistill.trainer.forward import PrefixCache, prefix_states
from minidistill.types import Role, Rollout

COMMON, OTHER = tuple(range(20, 60)), tuple(range(30, 56))


def with_contexts(rollouts: list[Rollout], contexts: list[tuple[int, ...]]) -> list[Rollout]:
    """The rollouts with these contexts in turn, those of a prompt with the same one."""
    prompts = list(dict.fromkeys(id(r.prompt) for r in rollouts))
    made = {}
    for index, key in enumerate(prompts):
        prompt = next(r.prompt for r in rollouts if id(r.prompt) == key)
        ids = (*contexts[index % len(contexts)], *prompt.student_ids)
        made[key] = replace(prompt, teacher_ids=ids)
    return [replace(r, prompt=made[id(r.prompt)]) for r in rollouts]


def labs(*flags: str) -> tuple[Lab, Lab]:
    loaded = load_config([SOKOBAN, *SMALL_STEP, *NO_MISMATCH_LIMIT, *flags])
    plain, cached = make_lab(loaded, shares=False), make_lab(loaded)
    return plain, cached


@pytest.mark.parametrize("flags", [(), ("--model.attn", "eager")], ids=["shared", "padded"])
def test_contexts_of_one_step_are_read_once_and_change_no_gradient(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "MIN_SAVED", 1)
    plain, cached = labs(*flags)
    cached.rollouts = plain.rollouts = with_contexts(plain.rollouts, [COMMON, OTHER])
    cached.trainer.prefixes.contexts = [COMMON, OTHER]
    gradients, expected = cached.gradients(), plain.gradients()
    assert cached.trainer.prefixes.computed == 2
    assert_same_gradients(gradients, expected)


def test_a_thousand_contexts_with_a_common_beginning_cost_their_own_parts() -> None:
    _, lab = labs()
    lab.trainer.prefixes.contexts = [COMMON]
    rollouts, read = lab.rollouts, []
    original = lab.trainer.cost.count

    def count(tokens: object) -> None:
        read.append(tokens)
        original(tokens)  # type: ignore[arg-type]

    lab.trainer.cost.count = count  # type: ignore[method-assign, assignment]
    for step in range(5):
        # 200 numbers in two tokens for each step
        own = [(*COMMON, 60 + (n := step * 200 + i) // 32, 60 + n % 32) for i in range(200)]
        lab.rollouts = with_contexts(rollouts, own)
        read.clear()
        lab.gradients()
        teacher = [tokens for tokens in read if tokens.prefix]  # type: ignore[attr-defined]
        assert {tokens.prefix for tokens in teacher} == {COMMON}  # type: ignore[attr-defined]
        prompts = {r.prompt.teacher_ids for r in lab.rollouts}
        most = sum(len(ids) - len(COMMON) for ids in prompts)
        most += sum(len(r.completion.token_ids) for r in lab.rollouts)
        assert sum(tokens.ids_BL.numel() for tokens in teacher) <= most  # type: ignore[attr-defined]
    assert lab.trainer.prefixes.computed == 1
    assert list(lab.trainer.prefixes._kept) == [COMMON]


def test_groups_depend_on_the_prompts_alone_and_pay_off() -> None:
    policy = labs()[0].policy
    first, second = tuple(range(600)), (*range(300), *range(700, 900))
    cache = PrefixCache(policy, True, [first, second, first[:300]])
    prompts = [(*first, 1), (*second, 1), (*first, 2), (*first[:300], 5), (*second, 1)]
    teacher, common = Role.TEACHER, first[:300]
    # 2 × 300 tokens are saved for the first, 200 for the second, whose two prompts are equal
    assert cache.groups(prompts, common, teacher) == [(first, [0, 2]), (common, [1, 3, 4])]
    assert cache.groups(prompts[:2], common, teacher) == [(common, [0, 1])]
    assert cache.groups(prompts, (), teacher)[0] == (first, [0, 2])
    everything = [((), [0, 1, 2, 3, 4])]
    assert cache.groups(prompts, (), Role.STUDENT) == everything
    assert PrefixCache(policy, False, [first]).groups(prompts, (), teacher) == everything


def test_what_is_cached_does_not_depend_on_what_was_cached_before() -> None:
    policy = labs()[0].policy
    contexts = [(*COMMON, *range(60, 60 + i)) for i in range(1, 9)]
    cache = PrefixCache(policy, True, contexts)
    with torch.no_grad(), policy.running_as(Role.TEACHER), policy.inference():
        expected = [prefix_states(policy, context) for context in contexts]
        for order in (range(8), range(7, -1, -1), (3, 3, 0, 7, 3)):
            for index in order:
                for ours, own in zip(
                    cache.states(contexts[index], Role.TEACHER) or [], expected[index], strict=True
                ):
                    assert torch.equal(ours[0], own[0])
                    assert torch.equal(ours[1], own[1])
                assert len(cache._kept) <= cache.size
