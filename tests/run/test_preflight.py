"""Checks before the first step find what they are there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lab import Lab, make_lab

from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.run import preflight
from minidistill.tasks.lengths import check_lengths
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer import attention
from minidistill.trainer.policy import Policy
from minidistill.trainer.token_budget import TokenBudget

SMALL = ("--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8")
Configure = Callable[..., Any]


@pytest.fixture
def lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL), trained=False)


def check_model(lab: Lab) -> bool:
    prompts = [r.prompt for r in lab.rollouts[::4]]
    return preflight.check_model(lab.policy, prompts, TokenBudget(16384))


def test_a_sound_model_passes(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    assert check_model(lab) is True
    assert not caplog.messages


@pytest.fixture
def packed_lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL, "--model.attn", "varlen"), trained=False)


def test_a_sound_model_passes_packed(packed_lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    assert check_model(packed_lab) is True
    assert not caplog.messages


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_packed_attention_that_is_not_exact_is_noticed(
    packed_lab: Lab, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """As by a kernel that lets a sequence attend to the one before it."""
    right = attention.one_by_one
    monkeypatch.setattr(attention, "one_by_one", lambda *args: right(*args) + error)
    with pytest.raises(UserError, match="packed sequences have other distributions") as caught:
        check_model(packed_lab)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_trained_adapter_is_noticed(configure: Configure) -> None:
    with pytest.raises(UserError, match="with no context the KL") as caught:
        check_model(make_lab(configure(*SMALL), trained=True))
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_logits_that_are_not_the_heads_are_noticed(lab: Lab) -> None:
    head = lab.policy.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    with pytest.raises(UserError, match="after the LM head") as caught:
        check_model(lab)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_tokenizer_of_another_model_is_noticed(lab: Lab) -> None:
    lab.policy.tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    with pytest.raises(UserError, match="they do not match"):
        check_model(lab)


def test_a_wrong_prefix_cache_is_not_used(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = preflight.prefix_states

    def wrong(policy: Policy, prefix: tuple[int, ...]) -> Any:
        return [(keys + 1.0, values) for keys, values in right(policy, prefix)]

    monkeypatch.setattr(preflight, "prefix_states", wrong)
    assert check_model(lab) is False
    (message,) = caplog.messages
    assert "do not reproduce the model" in message
    assert "read again each time" in message


def test_lengths(lab: Lab, configure: Configure) -> None:
    config = configure(*SMALL).config
    prompts = [r.prompt for r in lab.rollouts]
    longest = max(len(p.teacher_ids) for p in prompts)
    tokens = config.orchestrator.sampling.max_tokens
    check_lengths(config, longest + tokens, prompts)
    with pytest.raises(UserError, match=f"{longest + tokens} tokens") as caught:
        check_lengths(config, longest + tokens - 1, prompts)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.fixture
def warnings_of(
    lab: Lab, configure: Configure, caplog: pytest.LogCaptureFixture
) -> Callable[..., list[str]]:
    """The warnings about the prompts of a configuration with these flags."""

    def warnings_of(*flags: str) -> list[str]:
        config = configure(*SMALL, *flags).config
        teacher = config.orchestrator.teacher_model
        builder = PromptBuilder(lab.policy.tokenizer, teacher.context, teacher.context_placement)
        prompts = [builder.build("x", lab.rollouts[0].prompt.task)]
        caplog.clear()
        preflight.check_prompts(config, builder, prompts)
        return list(caplog.messages)

    return warnings_of


def test_prompt_warnings(warnings_of: Callable[..., list[str]]) -> None:
    context = "--orchestrator.teacher_model.context"
    assert warnings_of() == []
    (boundary,) = warnings_of(context, "You are an expert")
    assert "'tS'" in boundary
    assert warnings_of(context, "You are an expert. ") == []
    (taus,) = warnings_of("--trainer.loss.teacher_tau", "1.0")
    assert "sharpened" in taus
    assert "q^2" in taus
    (taus,) = warnings_of("--trainer.loss.student_tau", "1.0")
    assert "flattened" in taus


def test_a_template_without_a_generation_prompt_is_refused(lab: Lab, configure: Configure) -> None:
    rollout = lab.rollouts[0]
    ids = rollout.prompt.teacher_ids
    damaged = replace(rollout.prompt, teacher_ids=(*ids, ids[-2]))
    with pytest.raises(UserError, match="teacher's prompt does not end"):
        preflight.check_prompts(configure(*SMALL).config, lab.builder, [damaged])
