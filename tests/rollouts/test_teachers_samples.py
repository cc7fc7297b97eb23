"""Learning from the teacher's samples: who samples, what each reads, and what is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agents import SECRET, agent, questions
from support.conversations import ECHO, conversation_ids
from support.lab import make_lab
from support.objective_reference import objective
from support.plain_forward import completion_logits

from minidistill.types import Request, Role, Rollout

Configure = Callable[..., Any]
FROM_TEACHER = ("--orchestrator.sample_from", "teacher")
LIVE = ("--orchestrator.teacher_model.update", "live")
SFT = (
    "--trainer.loss.estimator", "sft", "--trainer.loss.adv_tau", "0",
    "--trainer.loss.student_tau", "0", "--orchestrator.buffer.skip_verification",
)  # fmt: skip


@pytest.mark.parametrize("flags", [(), LIVE], ids=["frozen", "live"])
def test_the_completions_are_the_teachers(staged: Any, flags: tuple[str, ...]) -> None:
    """With its weights, after the prompt with the context; the student's adapter is not zero."""
    stage = staged(*FROM_TEACHER, *flags)
    rollouts, _ = stage.collect()
    drawn = stage.collector.draw(1)
    expected = stage.lab.engine.generate(
        [
            Request(prompt.teacher_ids, request.seed)
            for (prompt, _), request in zip(drawn.jobs, drawn.requests, strict=True)
        ],
        drawn.params,
        Role.TEACHER,
    )
    assert [r.completion for r in rollouts] == expected
    assert {role for _, _, role in stage.engine.calls} == {Role.TEACHER}
    others = stage.lab.engine.generate(drawn.requests, drawn.params, Role.STUDENT)
    assert (others == expected) == (flags == LIVE), "whose weights are the student's own"
    context = stage.lab.builder.encode(stage.loaded.config.orchestrator.teacher_model.context)
    text = stage.lab.builder.tokenizer.decode(context)
    for rollout in rollouts:
        student, teacher = (
            stage.lab.builder.tokenizer.decode(list(ids))
            for ids in (rollout.prompt.student_ids, rollout.prompt.teacher_ids)
        )
        assert text in teacher
        assert text.split()[0] not in student.split()
        assert rollout.reward is not None


def plain_loss(rollouts: list[Rollout], lab: Any, estimator: str) -> torch.Tensor:
    """One rollout at a time, with transformers' logits; the masks of the reference are off."""
    loss, total = torch.zeros(()), sum(len(r.completion.token_ids) for r in rollouts)
    for rollout in rollouts:
        after, ids = rollout.completion.sequence, torch.tensor(rollout.completion.token_ids)
        rows = list(rollout.completion.sampled_at)
        model = lab.policy.model
        with torch.no_grad(), model.disable_adapter():
            teacher_NV = completion_logits(model, rollout.prompt.teacher_ids, after)[rows]
        student_NV = completion_logits(model, rollout.prompt.student_ids, after)[rows]
        if estimator == "sft":
            logp_NV = torch.log_softmax(student_NV, -1)
            loss = loss - 0.5 * logp_NV[range(len(ids)), ids].sum() / total
            continue
        result = objective(
            student_NV,
            teacher_NV,
            ids,
            advantage_N=torch.full((len(ids),), rollout.advantage),
            sampler_logp_N=torch.tensor(rollout.completion.logprobs),
            estimator=estimator,
            top_k=8,
            token_mask_low=0.0,
            token_mask_high=float("inf"),
        )
        loss = loss + result.loss.sum() / total
    return loss


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k", "sft"])
@pytest.mark.parametrize("turns", [(), ECHO], ids=["single", "conversation"])
def test_the_student_learns_on_them_from_its_own_prompt(
    staged: Any, estimator: str, turns: tuple[str, ...]
) -> None:
    """The update's loss is that of a plain forward pass without the context, and without masks."""
    flags = ("--trainer.loss.estimator", estimator, "--trainer.loss.top_k", "8")
    flags += SFT if estimator == "sft" else ("--trainer.loss.kl_clip", "off")
    stage = staged(*FROM_TEACHER, *flags, *turns)
    rollouts, _ = stage.collect()
    assert any(r.completion.inserted for r in rollouts) == bool(turns)
    # the teacher solves all of them
    rollouts = [replace(r, advantage=0.5 - i % 2) for i, r in enumerate(rollouts)]
    expected = plain_loss(rollouts, stage.lab, estimator)
    parameters = dict(stage.lab.policy.parameters)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    stage.lab.rollouts = rollouts
    found = stage.lab.gradients()
    scale = max(float(g.abs().max()) for g in gradients)
    assert scale > 1e-3
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-5 * max(scale, 1.0))

    result = stage.lab.trainer.step(rollouts, 1, lambda count: None)
    metrics = result.metrics
    assert metrics["loss/total"] == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    assert 0 <= metrics["kl/sampler_mismatch"] < 1e-8, "the sampler is the trainer's teacher"
    pairs = zip(result.rollouts, result.tokens, strict=True)
    logs = [(torch.tensor(r.completion.logprobs), t.logp) for r, t in pairs]
    forward = torch.cat([sampled - logp for sampled, logp in logs]).mean()
    assert metrics["kl/forward"] == pytest.approx(float(forward), rel=1e-4)
    assert metrics["kl/forward"] > 0.1, "the student does not know the context"
    assert "ratio/masked_frac" not in metrics
    assert ("ratio/ess" in metrics) == ("combined_advantage" in metrics) == (estimator != "sft")
    assert metrics["teacher_kl"] > 0


def test_a_conversation_is_the_teachers_from_its_own_view(staged: Any) -> None:
    """Each request begins with the teacher's prompt and goes on as the sample does."""
    stage = staged(*FROM_TEACHER, *ECHO)
    rollouts, metrics = stage.collect()
    assert metrics["turns/mean"] > 1
    views = {
        (*rollout.prompt.teacher_ids, *conversation_ids(rollout)[len(rollout.prompt.student_ids) :])
        for rollout in rollouts
    }
    asked = [r for requests, _, role in stage.engine.calls for r in requests]
    assert {role for _, _, role in stage.engine.calls} == {Role.TEACHER}
    assert len(asked) > len(rollouts)
    for request in asked:
        length = len(request.prompt_ids)
        assert any(view[:length] == request.prompt_ids for view in views)


def test_a_program_is_answered_by_the_teacher(staged: Any, tmp_path: Path) -> None:
    """It sends the context itself, which is left out of what the student is trained on."""
    flags = agent(tmp_path, *questions(4, turns=2), strip="system")
    stage = staged(*flags, *FROM_TEACHER, "--orchestrator.rollouts_per_example", "2")
    rollouts, metrics = stage.collect()
    assert metrics["env/errors"] == 0
    decode = stage.lab.builder.tokenizer.decode
    asked = [r for requests, _, _ in stage.engine.calls for r in requests]
    assert {role for _, _, role in stage.engine.calls} == {Role.TEACHER}
    assert all(SECRET in decode(list(request.prompt_ids)) for request in asked)
    assert len(rollouts) == 8
    assert all(SECRET not in decode(conversation_ids(rollout)) for rollout in rollouts)


@pytest.mark.parametrize("estimator", ["sampled", "sft"])
def test_an_engine_need_not_score_what_its_teacher_has_sampled(staged: Any, estimator: str) -> None:
    """The sampler's log-probs are the teacher's; the trainer's own pass gives the same loss."""
    flags = ("--trainer.loss.estimator", estimator) + (SFT[2:] if estimator == "sft" else ())
    stage = staged(*FROM_TEACHER, *flags)
    by_trainer, _ = stage.collect()
    teacher = replace(stage.placement.teacher, scorer="engine")
    stage.collector = stage.collecting(teacher=teacher)
    stage.engine.score = None  # would fail
    rollouts, metrics = stage.collect()
    assert "perf/teacher_repeat_frac" not in metrics
    assert [replace(r, teacher=None) for r in rollouts] == by_trainer
    for rollout in rollouts:
        assert rollout.teacher is not None
        assert rollout.teacher.logprobs == rollout.completion.logprobs
    lab = make_lab(stage.loaded)  # the same weights
    ours = stage.lab.trainer.step(rollouts, 1, lambda count: None).metrics
    theirs = lab.trainer.step(by_trainer, 1, lambda count: None).metrics
    assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)
    assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-4)
    assert ours["teacher_kl"] == pytest.approx(ours["kl/forward"], rel=1e-6)
    assert ours["kl/forward"] == pytest.approx(theirs["kl/forward"], rel=1e-5)
    assert "kl/sampler_mismatch" not in ours
    assert theirs["kl/sampler_mismatch"] < 1e-8
