"""The training step: its gradient against references, its metrics, teachers and health stops."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import NO_MISMATCH_LIMIT, SMALL_STEP, Lab, make_lab
from support.paths import SOKOBAN
from support.plain_forward import completion_logits, completion_logprobs, step_loss

from minidistill.config import load_config
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.trainer import checkpoint
from minidistill.trainer.optim import learning_rate
from minidistill.trainer.policy import Weights
from minidistill.types import Role

Configure = Callable[..., Any]


@pytest.fixture(scope="module")
def plain() -> Lab:
    return make_lab(load_config([SOKOBAN, *SMALL_STEP]))


def assert_same_gradients(ours: Lab, reference: Lab) -> None:
    gradients, expected = ours.gradients(), reference.gradients()
    assert gradients.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "the reference has no gradient to compare"
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=2e-6 * max(scale, 1.0)
        )


@pytest.mark.parametrize(
    "flags",
    [
        ("--trainer.micro_batch_tokens", "1"),
        ("--trainer.micro_batch_tokens", "300"),
        ("--trainer.packing",),
        ("--trainer.packing", "--model.attn", "sdpa"),
        ("--model.attn", "varlen", "--trainer.model.ac.freq", "1"),
        ("--trainer.packing", "--trainer.micro_batch_tokens", "500"),
        ("--trainer.model.ac.freq", "1"),
        ("--trainer.model.ac.freq", "3"),
        ("--model.attn", "eager"),
    ],
    ids=" ".join,
)
def test_the_gradient_does_not_depend_on_micro_batches(
    plain: Lab, configure: Configure, flags: tuple[str, ...]
) -> None:
    lab = make_lab(configure(*SMALL_STEP, *flags))
    lab.rollouts = plain.rollouts
    assert_same_gradients(lab, plain)


def test_the_cached_context_gives_the_same_gradient(plain: Lab, configure: Configure) -> None:
    lab = make_lab(configure(*SMALL_STEP), shares=False)
    lab.rollouts = plain.rollouts
    views = [r.prompt.teacher_ids for r in plain.rollouts]
    assert plain.trainer.prefixes.common(views, Role.TEACHER), "the prompts share no prefix"
    assert_same_gradients(lab, plain)


def test_the_context_is_prefilled_once_a_run(configure: Configure) -> None:
    lab = make_lab(configure(*SMALL_STEP, *NO_MISMATCH_LIMIT))
    for step in (1, 2, 3):
        lab.trainer.step(lab.rollouts, step, lambda count: None)
    assert lab.trainer.prefixes.computed == 1


def test_rollouts_of_stale_weights_stop_the_run(configure: Configure) -> None:
    """As after a failed sync: the second step gets rollouts sampled before the first."""
    lab = make_lab(configure(*SMALL_STEP))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    before = [parameter.clone() for _, parameter in lab.policy.parameters]
    with pytest.raises(UserError, match="kl/sampler_mismatch") as caught:
        lab.trainer.step(lab.rollouts, 2, lambda count: None)
    assert caught.value.exit_code == EXIT_HEALTH
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, lab.policy.parameters, strict=True))


@pytest.mark.parametrize(
    ("flags", "limit"),
    [((), 1e-6), (("0.5",), 0.5), (("off",), math.inf), (("auto", "dropout"), math.inf)],
)
def test_the_limit_of_the_sampler_mismatch(
    configure: Configure, flags: tuple[str, ...], limit: float
) -> None:
    limit_flags = ("--trainer.loss.max_sampler_mismatch", *flags[:1]) if flags else ()
    dropout = ("--trainer.model.lora.dropout", "0.1") if "dropout" in flags else ()
    assert make_lab(configure(*SMALL_STEP, *limit_flags, *dropout)).trainer.max_mismatch == limit


@pytest.mark.parametrize("estimator", ["full", "sampled", "top_k"])
def test_loss_and_gradient_equal_plain_torch(configure: Configure, estimator: str) -> None:
    """Against transformers' logits and autograd, one rollout at a time, without the kernels."""
    flags = (*SMALL_STEP, "--trainer.loss.estimator", estimator, "--trainer.loss.top_k", "4")
    lab = make_lab(configure(*flags, "--trainer.loss.kl_clip", "off"))
    model = lab.policy.model

    def teacher_logits(prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
        with model.disable_adapter():
            return completion_logits(model, prompt, completion)

    loss = step_loss(lab.rollouts, model, teacher_logits, estimator=estimator, top_k=4)
    parameters = dict(lab.policy.parameters)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    gradients = lab.gradients()
    scale = max(float(g.abs().max()) for g in expected)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            gradients[name], gradient, rtol=2e-3, atol=1e-5 * max(scale, 1.0)
        )
    metrics = lab.trainer.step(lab.rollouts, 1, lambda count: None).metrics
    assert metrics["loss/total"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)


def test_metrics_have_the_documented_signs_and_values(configure: Configure) -> None:
    lab = make_lab(configure(*SMALL_STEP))
    result = lab.trainer.step(lab.rollouts, 1, lambda count: None)
    metrics = result.metrics
    kl = [k for tokens in result.tokens for k in tokens.kl.tolist()]
    gaps = [
        0.5 * r.advantage + 0.5 * t - 0.5 * s
        for r, tokens in zip(lab.rollouts, result.tokens, strict=True)
        for s, t in zip(tokens.logp.tolist(), tokens.teacher_logp.tolist(), strict=True)
    ]
    assert metrics["teacher_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert min(kl) > -1e-6
    assert metrics["combined_advantage"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(metrics["loss/policy"] + metrics["loss/kl"])
    assert metrics["kl/sampler_mismatch"] < 1e-8, "the engine runs the trainer's weights"
    rewards = [r.reward.value for r in lab.rollouts if r.reward]
    assert metrics["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["ratio/ess"] == pytest.approx(1.0, abs=1e-6)
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    assert 0.5 * process_peak < metrics["perf/peak_memory_gib/trainer"] <= process_peak


def test_without_a_context_there_is_no_gradient(configure: Configure) -> None:
    """Teacher and student see the same prompt and are the same model before the first step."""
    lab = make_lab(configure(*SMALL_STEP, "--trainer.loss.adv_tau", "0"), trained=False)
    same = [
        replace(r, prompt=replace(r.prompt, teacher_ids=r.prompt.student_ids)) for r in lab.rollouts
    ]
    lab.rollouts = same
    assert max(float(g.abs().max()) for g in lab.gradients().values()) < 1e-5
    assert lab.trainer.step(same, 1, lambda count: None).metrics["teacher_kl"] < 1e-6


def test_a_nan_loss_stops_the_run_and_keeps_the_weights(
    configure: Configure,
) -> None:
    lab = make_lab(configure(*SMALL_STEP))
    before = {n: p.detach().clone() for n, p in lab.policy.parameters}
    named = lab.policy.model.named_parameters()
    norm = next(p for n, p in named if n.endswith("model.norm.weight"))
    norm.data[0] = float("nan")
    with pytest.raises(UserError) as caught:
        lab.trainer.step(lab.rollouts, 7, lambda count: None)
    assert caught.value.exit_code == EXIT_HEALTH
    assert "step 7" in caught.value.what
    for name, parameter in lab.policy.parameters:
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_saved_adapter_loads_with_peft(configure: Configure, tmp_path: Path) -> None:
    """peft and transformers compute the same log-probs from the saved files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from minidistill.models.registry import resolve

    lab = make_lab(configure(*SMALL_STEP))
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    folder = checkpoint.save_model(lab.policy, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(resolve("tiny-sokoban"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    prompts = [r.prompt.student_ids for r in lab.rollouts]
    completions = [r.completion.token_ids for r in lab.rollouts]
    ours = lab.engine.score(prompts, completions, Role.STUDENT)
    for prompt, completion, logprobs in zip(prompts, completions, ours, strict=True):
        expected = completion_logprobs(theirs, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-5)


def test_live_and_averaged_teachers(configure: Configure) -> None:
    """live: the student's weights; ema: their moving average."""
    live = make_lab(
        configure(*SMALL_STEP, *NO_MISMATCH_LIMIT, "--orchestrator.teacher_model.update", "live")
    )
    assert live.policy.teacher_weights is Weights.STUDENT
    flags = ("--orchestrator.teacher_model.update", "ema", "--orchestrator.teacher_model.ema_decay")
    lab = make_lab(configure(*SMALL_STEP, *NO_MISMATCH_LIMIT, *flags, "0.75"))
    named = dict(lab.policy.model.named_parameters())
    student, ema = f".{Weights.STUDENT.value}.", f".{Weights.EMA.value}."
    pairs = [(p, named[n.replace(student, ema)]) for n, p in lab.policy.parameters]
    before = [(average.clone(), student.clone()) for student, average in pairs]
    lab.trainer.step(lab.rollouts, 1, lambda count: None)
    moved = False
    for (student, average), (old, start) in zip(pairs, before, strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * student)
        moved |= not torch.equal(student, start)
        assert not average.requires_grad
    assert moved
    steps = [one.trainer.step(live.rollouts, 1, lambda count: None) for one in (live, lab)]
    kl, other = (step.metrics["teacher_kl"] for step in steps)
    assert kl != pytest.approx(other, rel=1e-3)


def test_learning_rates(configure: Configure) -> None:
    config = configure("--max_steps", "110", "--trainer.optim.lr", "0.1").config
    assert learning_rate(config, 1) == pytest.approx(0.01)
    assert learning_rate(config, 10) == pytest.approx(0.1)
    assert learning_rate(config, 11) == pytest.approx(0.1)
    assert learning_rate(config, 61) == pytest.approx(0.05)
    assert 0 < learning_rate(config, 110) < 1e-4
    linear = configure(
        "--trainer.scheduler.type", "linear", "--trainer.scheduler.warmup_steps", "0",
        "--trainer.scheduler.decay_steps", "4", "--trainer.scheduler.min_lr", "0.02",
        "--trainer.optim.lr", "0.1",
    ).config  # fmt: skip
    rates = [learning_rate(linear, step) for step in (1, 2, 3, 4, 5, 50)]
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])


@pytest.mark.parametrize(("flags", "rate"), [((), 5e-4), (("--no-trainer.model.lora",), 5e-5)])
def test_the_automatic_learning_rate_depends_on_what_is_trained(
    flags: tuple[str, ...], rate: float, configure: Configure
) -> None:
    warm_up = ("--trainer.scheduler.warmup_steps", "2", "--trainer.optim.lr", "auto")
    config = configure(*warm_up, *flags).config
    assert [learning_rate(config, step) for step in (1, 2, 3)] == [rate / 2, rate, rate]
