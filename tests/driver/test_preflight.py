"""Checks before the first step find what they are there to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.lab import Lab, make_lab

from minidistill.driver import model_checks, preflight
from minidistill.engines.launch import EngineLauncher
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.evaluation.kl import drift_kl
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer import attention, forward
from minidistill.trainer.decoding import Decoding, in_place
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Role

SMALL = ("--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8")
Configure = Callable[..., Any]


@pytest.fixture
def lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL), trained=False)


def check_model(lab: Lab) -> bool:
    prompts = [r.prompt for r in lab.rollouts[::4]]
    return model_checks.check_model(lab.policy, prompts, TokenBudget(16384))


def test_a_sound_model_passes(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    assert check_model(lab) is True
    assert not caplog.messages


def test_a_model_without_a_padding_token_passes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = lab.policy.tokenizer
    monkeypatch.setattr(type(tokenizer), "pad_token_id", None, raising=False)
    assert tokenizer.pad_token_id is None
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
    right = attention.attend_in_blocks
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *args: right(*args) + error)
    with pytest.raises(UserError, match=r"packed sequences (have other|read each other)") as caught:
        check_model(packed_lab)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_trained_adapter_is_noticed(configure: Configure) -> None:
    with pytest.raises(UserError, match="with no context the KL") as caught:
        check_model(make_lab(configure(*SMALL), trained=True))
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_logits_that_are_not_the_heads_are_noticed(lab: Lab) -> None:
    head = lab.policy.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    with pytest.raises(UserError, match="not its last hidden states times the LM head") as caught:
        check_model(lab)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_model_that_cannot_be_sampled_from(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise AttributeError("no such state\nand more")

    monkeypatch.setattr("minidistill.engines.embedded.Decoding", fail)
    with pytest.raises(UserError, match="AttributeError: no such state\n") as caught:
        check_model(lab)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    prompts = [r.prompt for r in lab.rollouts[::4]]
    budget = TokenBudget(16384)
    with pytest.raises(
        UserError, match="the teacher is in the trainer and cannot be sampled"
    ) as caught:
        model_checks.check_model(lab.policy, prompts, budget, {Role.TEACHER})
    where = "orchestrator.eval, orchestrator.sample_from"
    assert (caught.value.where, caught.value.exit_code) == (where, EXIT_ENVIRONMENT)
    assert model_checks.check_model(lab.policy, prompts, budget, ())
    assert not lab.policy.can_sample
    assert "AttributeError: no such state" in caplog.text


@pytest.mark.parametrize(
    ("student", "teacher", "lora", "weights", "expected"),
    [
        (False, False, True, Weights.BASE, {Role.STUDENT, Role.TEACHER}),
        (False, True, True, Weights.OTHER, {Role.STUDENT}),
        (True, False, True, Weights.BASE, set()),
        (True, False, False, Weights.BASE, set()),  # equal to the student before training
        (True, False, False, Weights.STUDENT, set()),
        (True, False, False, Weights.EMA, {Role.TEACHER}),
        (True, False, True, Weights.OTHER, {Role.TEACHER}),
        (True, True, True, Weights.OTHER, set()),
    ],
)
def test_which_roles_the_trainers_model_samples(
    configure: Configure,
    student: bool,
    teacher: bool,
    lora: bool,
    weights: Weights,
    expected: set[Role],
) -> None:
    """`student` and `teacher` have engines of their own. Without evaluations no teacher samples."""
    policy: Any = SimpleNamespace(lora=lora, teacher_weights=weights, starts_as_base=True)
    without = ("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline")
    for flags, left in (((), expected), (without, expected - {Role.TEACHER})):
        config = configure(*SMALL, *flags).config
        launcher = EngineLauncher(config, cast(Any, None), Path())
        launcher.student = cast(Any, object()) if student else None
        launcher.teacher = cast(Any, object()) if teacher else None
        assert launcher.sampled_by(policy) == left


def test_the_trainers_model_samples_a_teacher_that_is_trained_on(configure: Configure) -> None:
    """Unless an engine has its weights, and not only those that are equal before training."""
    flags = "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline"
    config = configure(*SMALL, *flags, "--orchestrator.sample_from", "teacher").config
    for lora, weights, expected in (
        (True, Weights.BASE, set()),
        (False, Weights.STUDENT, set()),
        (False, Weights.BASE, {Role.TEACHER}),
        (True, Weights.OTHER, {Role.TEACHER}),
    ):
        policy: Any = SimpleNamespace(lora=lora, teacher_weights=weights, starts_as_base=True)
        launcher = EngineLauncher(config, cast(Any, None), Path())
        assert launcher.sampled_by(policy) == {Role.STUDENT, Role.TEACHER}
        launcher.student = cast(Any, object())
        assert launcher.sampled_by(policy) == expected


def test_there_is_no_drift_if_nothing_can_sample_the_base(configure: Configure) -> None:
    """The base is in the trainer alone: every weight is trained."""
    loaded = configure(*SMALL, "--no-trainer.model.lora")
    lab = make_lab(loaded, trained=False)
    lab.policy.can_sample = False
    engine: Any = object()
    assert lab.policy.holds(Role.BASE)
    assert drift_kl(loaded.config, lab.policy, engine, lab.builder, TokenBudget(4096)) is None


@pytest.mark.parametrize("rows", ["kept", "mixed up"])
def test_rows_of_a_cache_that_do_not_leave_are_noticed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """Prompts share a cache row with their copies, and later rows leave."""
    from minidistill.engines import embedded

    right = embedded.select_rows

    def wrong(cache: Any, index: torch.Tensor) -> None:
        right(cache, index.flip(0) if rows == "mixed up" else index.clamp(max=1))

    lab = make_lab(configure(*SMALL, "--model.attn", "sdpa"), trained=False)
    monkeypatch.setattr(embedded, "select_rows", wrong)
    with pytest.raises(UserError, match="kl/sampler_mismatch is"):
        check_model(lab)


@pytest.mark.parametrize("rows", ["kept", "mixed up"])
def test_rows_that_do_not_leave_in_place_are_noticed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """Rows leave one by one as they end."""
    right = Decoding.keep

    def wrong(decoding: Decoding, kept: list[int]) -> list[int]:
        if rows == "mixed up":
            return right(decoding, kept)[::-1]
        right(decoding, range(len(kept)))
        return in_place(kept)

    monkeypatch.setattr(Decoding, "keep", wrong)
    with pytest.raises(UserError, match="kl/sampler_mismatch is"):
        check_model(lab)


def test_a_tokenizer_of_another_model_is_noticed(lab: Lab) -> None:
    lab.policy.tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    with pytest.raises(UserError, match=r"do not match: .* among them \(<extra "):
        check_model(lab)


def test_a_wrong_prefix_cache_is_not_used(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = forward.prefix_states

    def wrong(policy: Policy, prefix: tuple[int, ...]) -> Any:
        return [(keys + 1.0, values) for keys, values in right(policy, prefix)]

    monkeypatch.setattr(forward, "prefix_states", wrong)
    assert check_model(lab) is False
    (message,) = caplog.messages
    assert "do not reproduce the model" in message
    assert "read again each time" in message


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
    assert "'ou are an expertSolve this puzzl'" in boundary
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
