"""Probes of a model on unusual prompts, and faults that only such prompts show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.lab import Lab, make_lab

from minidistill.driver import probes
from minidistill.driver.model_checks import check_model
from minidistill.driver.probes import probe_ids, sampling_error
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.errors import UserError
from minidistill.trainer import attention
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Role

SMALL = ("--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8")
Configure = Callable[..., Any]


@pytest.fixture
def lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL), trained=False)


def check(lab: Lab, students: Sequence[tuple[int, ...]] = ()) -> bool:
    """Check the model on the lab's prompts, with these in place of the student's."""
    prompts = [r.prompt for r in lab.rollouts[::4]]
    if students:
        prompts = [replace(prompts[0], student_ids=ids) for ids in students]
    return check_model(lab.policy, prompts, TokenBudget(16384))


@pytest.mark.parametrize("flags", [(), ("--model.attn", "varlen")], ids=["padded", "packed"])
def test_prompts_of_one_token(
    configure: Configure, flags: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    lab = make_lab(configure(*SMALL, *flags), trained=False)
    check(lab, [(9,), (40,)])
    check(lab, [(9,)])
    assert not caplog.messages


def test_padding_is_probed_whatever_the_lengths_of_the_prompts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that reads padding differs only where prompts of a batch have different lengths."""
    ids = lab.rollouts[0].prompt.student_ids
    right = EmbeddedEngine._forward

    def reads_padding(engine: Any, ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return right(engine, ids, None, *args, **kwargs)

    monkeypatch.setattr(EmbeddedEngine, "_forward", reads_padding)
    for students in ([ids, (*ids, 9)], [ids, ids[:-1]], [ids]):
        lab.policy.pads_prompts = True
        check(lab, students)
        assert not lab.policy.pads_prompts
    assert "prompts of different lengths are sampled from one after the other" in caplog.text


@pytest.mark.parametrize(
    ("tokens", "window", "probed"),
    [
        (1, None, 8), (100, None, 100), (5000, None, 256), (5000, 16, 256), (5000, 1024, 1032),
        (900, 1024, 900), (5000, 4096, 256),
    ],
)  # fmt: skip
def test_the_length_of_a_probe(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tokens: int, window: int | None, probed: int
) -> None:
    """It is bounded, but goes beyond a window."""
    monkeypatch.setattr(lab.policy.config, "sliding_window", window, raising=False)
    prompt = tuple(range(tokens))
    ids = probe_ids(lab.policy, prompt)
    assert len(ids) == probed
    assert ids[:tokens] == prompt[:probed]


def test_sampling_from_a_long_prompt_reads_a_part(lab: Lab) -> None:
    widths: list[int] = []

    def record(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        widths.append(inputs["input_ids"].shape[1])

    hook = lab.policy.student.register_forward_pre_hook(record, with_kwargs=True)
    ids = lab.rollouts[0].prompt.student_ids
    with torch.no_grad():
        error = sampling_error(lab.policy, [ids * 20], Role.STUDENT, shares=True)
    hook.remove()
    assert len(ids * 20) > 1000
    assert error < 1e-6
    assert 256 < max(widths) < 270, "a prompt and what is sampled from it"


@torch.no_grad()
def test_a_sample_is_read_once_for_all_its_beginnings(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beginning that is not the same is read by itself, and has the error that it has."""
    right, read = probes.own_logprobs, []
    monkeypatch.setattr(probes, "own_logprobs", lambda *args: read.append(args[2]) or right(*args))
    prompts = [r.prompt.student_ids for r in lab.rollouts[::4]]
    assert sampling_error(lab.policy, prompts, Role.STUDENT, shares=True) < 1e-6
    assert len(read) == 8
    generate = EmbeddedEngine.generate

    def wrong_at_an_end(engine: Any, *args: Any) -> Any:
        completions = generate(engine, *args)
        if engine.policy.eos_ids:
            first = completions[0]
            ids = (first.token_ids[0] + 1, *first.token_ids[1:])
            completions[0] = replace(first, token_ids=ids)
        return completions

    monkeypatch.setattr(EmbeddedEngine, "generate", wrong_at_an_end)
    assert sampling_error(lab.policy, prompts, Role.STUDENT, shares=True) > 1e-3
    assert len(read) == 8 + 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_leak_between_packed_sequences_is_noticed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    flags = ("--model.attn", "varlen", "--model.dtype", dtype)
    lab = make_lab(configure(*SMALL, *flags), trained=False)
    right = attention.attend_in_blocks

    def leaks(query: Any, key: Any, value: Any, *more: Any) -> torch.Tensor:
        return right(query, key, value, *more) + 0.003 * value.mean()

    monkeypatch.setattr(attention, "attend_in_blocks", leaks)
    with pytest.raises(UserError, match="packed sequences read each other"):
        check(lab)


def test_log_probs_count_as_much_as_their_probability(lab: Lab) -> None:
    """What is never sampled may differ, and what is may not."""
    head = lab.policy.student.lm_head

    def change(logits: torch.Tensor, likely: bool) -> torch.Tensor:
        top = logits.amax(-1, keepdim=True)
        return torch.where(logits == top if likely else logits < top - 16, logits - 0.1, logits)

    hook = head.register_forward_hook(lambda module, args, out: change(out, likely=False))
    assert check(lab)
    hook.remove()
    head.register_forward_hook(lambda module, args, out: change(out, likely=True))
    with pytest.raises(UserError, match="the log-probs of likely tokens differ"):
        check(lab)
