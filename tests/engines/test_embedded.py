"""The embedded engine: what it samples, under which log-probs, and that neighbours don't matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import Lab, make_lab

from minidistill.engines.embedded import sample
from minidistill.seeding import stable_seed
from minidistill.types import Request, Role, SamplingParams


@pytest.fixture(scope="module")
def lab() -> Lab:
    from support.paths import SOKOBAN

    from minidistill.config import load_config

    flags = ("--orchestrator.batch_size", "16", "--orchestrator.env.0.args.num_train_examples", "8")
    return make_lab(load_config([SOKOBAN, *flags]))


def requests(lab: Lab, context: bool = False) -> list[Request]:
    views = [r.prompt.teacher_ids if context else r.prompt.student_ids for r in lab.rollouts]
    return [Request(view, 7 + i) for i, view in enumerate(views)]


def reference(
    lab: Lab,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    role: Role,
    temperature: float = 1.0,
) -> list[float]:
    """Log-probs from one plain forward pass of the whole sequence."""
    model = lab.policy.model
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        if role is Role.STUDENT:
            logits = model(input_ids=ids).logits
        else:
            with model.disable_adapter():
                logits = model(input_ids=ids).logits
    logp = (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(
    ("role", "context"),
    [(Role.STUDENT, False), (Role.TEACHER, True), (Role.STUDENT, True)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_models(
    lab: Lab, role: Role, context: bool, temperature: float
) -> None:
    asked = requests(lab, context)
    found = lab.engine.generate(asked, SamplingParams(9, temperature), role)
    for request, completion in zip(asked, found, strict=True):
        expected = reference(lab, request.prompt_ids, completion.token_ids, role, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=2e-5)


def test_scores_are_the_models(lab: Lab) -> None:
    prompts = [r.prompt.teacher_ids for r in lab.rollouts]
    completions = [r.completion.token_ids for r in lab.rollouts]
    for role in (Role.STUDENT, Role.TEACHER):
        found = lab.engine.score(prompts, completions, role, 0.8)
        for prompt, completion, logprobs in zip(prompts, completions, found, strict=True):
            expected = reference(lab, prompt, completion, role, 0.8)
            assert logprobs == pytest.approx(expected, abs=2e-5)


def test_a_request_draws_the_same_alone_and_in_any_company(lab: Lab) -> None:
    asked = requests(lab)
    together = lab.engine.generate(asked, SamplingParams(9), Role.STUDENT)
    backwards = lab.engine.generate(asked[::-1], SamplingParams(9), Role.STUDENT)
    assert [c.token_ids for c in backwards[::-1]] == [c.token_ids for c in together]
    for request, completion in list(zip(asked, together, strict=True))[:4]:
        alone = lab.engine.generate([request], SamplingParams(9), Role.STUDENT)
        assert alone[0].token_ids == completion.token_ids
    other = lab.engine.generate(
        [Request(r.prompt_ids, r.seed + 1000) for r in asked],
        SamplingParams(9), Role.STUDENT,
    )  # fmt: skip
    assert [c.token_ids for c in other] != [c.token_ids for c in together]


def test_greedy_is_transformers_greedy(lab: Lab) -> None:
    asked = requests(lab)[:6]
    found = lab.engine.generate(asked, SamplingParams(9, 0), Role.STUDENT)
    for request, completion in zip(asked, found, strict=True):
        ids = torch.tensor([list(request.prompt_ids)])
        theirs = lab.policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9
        )
        assert list(completion.token_ids) == theirs[0, ids.shape[1] :].tolist()


def test_stops_lengths_and_progress(lab: Lab) -> None:
    told: list[int] = []
    asked = requests(lab)
    found = lab.engine.generate(asked, SamplingParams(5), Role.STUDENT, advance=told.append)
    assert sum(told) == len(asked)
    eos = lab.policy.tokenizer.eos_token_id
    for completion in found:
        assert 1 <= len(completion.token_ids) <= 5
        assert eos not in completion.token_ids[:-1]
        assert (completion.stop == "eos") == (completion.token_ids[-1] == eos)
        assert completion.truncated == (completion.stop == "length")
    assert any(c.truncated for c in found), "no completion to tell truncation by"


def test_small_batches_give_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory bound splits a call; prompts of one group may then be read twice."""
    asked = requests(lab)
    whole = lab.engine.generate(asked, SamplingParams(9), Role.STUDENT)
    monkeypatch.setattr("minidistill.engines.embedded.EMBEDDED_CACHE_BYTES", 1_000_000)
    batches = lab.engine._batches(asked, range(len(asked)), 9)
    assert len(batches) > 2
    parts = lab.engine.generate(asked, SamplingParams(9), Role.STUDENT)
    assert [c.token_ids for c in parts] == [c.token_ids for c in whole]


def test_sampling_follows_the_distribution() -> None:
    """Chi-square over 40,000 draws, and tokens without mass are never drawn."""
    logits = torch.tensor([0.3, -1.0, float("-inf"), 2.0, 0.0, float("-inf")])
    draws = torch.tensor(np.random.default_rng(0).random(40_000))
    chosen, logp = sample(logits.expand(40_000, -1), 0.7, draws)
    p = (logits / 0.7).softmax(0).numpy()
    counts = np.bincount(chosen.numpy(), minlength=6)
    assert counts[2] == counts[5] == 0
    live = p > 0
    chi = float((((counts - 40_000 * p) ** 2)[live] / (40_000 * p[live])).sum())
    assert chi < 16.3  # 3 degrees of freedom, one in a thousand
    assert logp.exp().tolist() == pytest.approx(p[chosen.numpy()].tolist(), rel=1e-5)
    edges, _ = sample(logits.expand(2, -1), 1.0, torch.tensor([0.0, 1 - 1e-16]))
    assert edges.tolist() == [0, 4]


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(0, "train", 1, 2) == 18092050307847114677
    assert stable_seed(0, "train", 12) != stable_seed(0, "train", 1, 2)


def test_a_live_teacher_samples_with_the_adapter(configure: Callable[..., Any]) -> None:
    flags = ("--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8")
    live = make_lab(configure(*flags, "--orchestrator.teacher_model.update", "live"))
    asked = requests(live, context=True)
    found = live.engine.generate(asked, SamplingParams(6), Role.TEACHER)
    for request, completion in zip(asked, found, strict=True):
        expected = reference(live, request.prompt_ids, completion.token_ids, Role.STUDENT)
        assert completion.logprobs == pytest.approx(expected, abs=2e-5)
