"""The embedded engine: its samples, their log-probs, and independence of other requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import Lab, make_lab
from support.paths import SOKOBAN
from support.plain_forward import completion_logprobs

from minidistill.config import load_config
from minidistill.engines.embedded import EmbeddedEngine, cache_bytes
from minidistill.engines.sampler import Sampler
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Request, Role, SamplingParams


@pytest.fixture(scope="module")
def lab() -> Lab:
    flags = ("--orchestrator.batch_size", "16", "--orchestrator.env.0.args.num_train_examples", "8")
    return make_lab(load_config([SOKOBAN, *flags]))


def make_requests(lab: Lab, *, context: bool = False) -> list[Request]:
    """Requests of the student's prompts, or with `context` of the teacher's."""
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
    with nullcontext() if role is Role.STUDENT else model.disable_adapter():
        return completion_logprobs(model, prompt, completion, temperature).tolist()


@pytest.mark.parametrize(
    ("role", "context"),
    [(Role.STUDENT, False), (Role.TEACHER, True), (Role.STUDENT, True)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_models(
    lab: Lab, role: Role, context: bool, temperature: float
) -> None:
    requests = make_requests(lab, context=context)
    completions = lab.engine.generate(requests, SamplingParams(9, temperature), role)
    for request, completion in zip(requests, completions, strict=True):
        expected = reference(lab, request.prompt_ids, completion.token_ids, role, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=5e-5)


def test_scores_are_the_models(lab: Lab) -> None:
    prompts = [r.prompt.teacher_ids for r in lab.rollouts]
    completions = [r.completion.token_ids for r in lab.rollouts]
    for role in (Role.STUDENT, Role.TEACHER):
        scores = lab.engine.score(prompts, completions, role, 0.8)
        for prompt, completion, logprobs in zip(prompts, completions, scores, strict=True):
            expected = reference(lab, prompt, completion, role, 0.8)
            assert logprobs == pytest.approx(expected, abs=2e-5)


def test_samples_do_not_depend_on_other_requests(lab: Lab) -> None:
    requests = make_requests(lab)
    together = lab.engine.generate(requests, SamplingParams(9), Role.STUDENT)
    backwards = lab.engine.generate(requests[::-1], SamplingParams(9), Role.STUDENT)
    assert [c.token_ids for c in backwards[::-1]] == [c.token_ids for c in together]
    for request, completion in list(zip(requests, together, strict=True))[:4]:
        alone = lab.engine.generate([request], SamplingParams(9), Role.STUDENT)
        assert alone[0].token_ids == completion.token_ids
    other = lab.engine.generate(
        [Request(r.prompt_ids, r.seed + 1000) for r in requests],
        SamplingParams(9), Role.STUDENT,
    )  # fmt: skip
    assert [c.token_ids for c in other] != [c.token_ids for c in together]


def test_greedy_decoding_equals_transformers(lab: Lab) -> None:
    requests = make_requests(lab)[:6]
    completions = lab.engine.generate(requests, SamplingParams(9, 0), Role.STUDENT)
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([list(request.prompt_ids)])
        theirs = lab.policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9
        )
        assert list(completion.token_ids) == theirs[0, ids.shape[1] :].tolist()


def test_stops_lengths_and_progress(lab: Lab) -> None:
    progress: list[int] = []
    requests = make_requests(lab)
    completions = lab.engine.generate(
        requests, SamplingParams(5), Role.STUDENT, advance=progress.append
    )
    assert sum(progress) == len(requests)
    eos = lab.policy.tokenizer.eos_token_id
    for completion in completions:
        assert 1 <= len(completion.token_ids) <= 5
        assert eos not in completion.token_ids[:-1]
        assert (completion.stop == "eos") == (completion.token_ids[-1] == eos)
        assert completion.truncated == (completion.stop == "length")
    assert any(c.truncated for c in completions), "no completion is truncated"


def test_small_batches_give_the_same_samples(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on the cache's memory splits a call into batches."""
    requests, params = make_requests(lab), SamplingParams(9)
    one_batch = lab.engine.generate(requests, params, Role.STUDENT)
    monkeypatch.setattr("minidistill.engines.embedded.EMBEDDED_CACHE_BYTES", 1_000_000)
    steps: list[int] = []  # one for each decoding step of a batch
    batched = lab.engine.generate(requests, params, Role.STUDENT, advance=steps.append)
    assert len(steps) > 2 * params.max_tokens, "there are at most two batches"
    assert [c.token_ids for c in batched] == [c.token_ids for c in one_batch]


def test_rows_that_leave_late_get_the_same_samples(lab: Lab) -> None:
    """On a GPU finished rows stay in the batch until the host looks at it."""
    requests, params = make_requests(lab, context=True), SamplingParams(13)
    every_step = lab.engine.generate(requests, params, Role.TEACHER)
    late, progress = EmbeddedEngine(lab.policy, lab.trainer.prefixes), []
    late.steps_per_check = 5
    completions = late.generate(requests, params, Role.TEACHER, advance=progress.append)
    assert len({len(c.token_ids) for c in every_step}) > 2, "all rows end at the same step"
    for completion, expected in zip(completions, every_step, strict=True):
        assert (completion.token_ids, completion.stop) == (expected.token_ids, expected.stop)
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
    assert len(progress) <= 3
    assert sum(progress) == len(requests)


@pytest.mark.parametrize("count", [2, 12])
def test_the_host_reads_the_device_once_in_several_steps(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Whatever the number of sequences, whose prompts differ in length."""
    engine = EmbeddedEngine(lab.policy, lab.trainer.prefixes)
    engine.steps_per_check = 4
    monkeypatch.setattr(lab.policy, "eos_ids", frozenset())
    requests = [
        Request(request.prompt_ids[i % 3 :], request.seed)
        for i, request in enumerate(make_requests(lab)[:count])
    ]
    reads: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any) -> Any:
            reads.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__"):
        watch(name)
    engine.generate(requests, SamplingParams(4), Role.STUDENT)
    short = len(reads)
    reads.clear()
    engine.generate(requests, SamplingParams(24), Role.STUDENT)
    assert reads.count("tolist") == 6
    assert len(reads) - short == 5


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_stop_the_run(configure: Any, temperature: float) -> None:
    lab = make_lab(configure("--orchestrator.batch_size", "8"))
    requests = make_requests(lab)
    named = lab.policy.model.named_parameters()
    next(p for n, p in named if n.endswith("model.norm.weight")).data[0] = float("nan")
    with pytest.raises(UserError, match="not finite") as caught:
        lab.engine.generate(requests, SamplingParams(5, temperature), Role.STUDENT)
    assert caught.value.exit_code == EXIT_HEALTH


def test_the_cache_is_sized_by_the_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 << 30)
    assert cache_bytes(torch.device("cuda", 0)) == 30 << 30  # half of what is free or only cached
    assert cache_bytes(torch.device("cpu")) == 2 << 30


def test_sampling_follows_the_distribution() -> None:
    """Chi-square over 40,000 draws; tokens of probability zero are never drawn."""
    logits = torch.tensor([0.3, -1.0, float("-inf"), 2.0, 0.0, float("-inf")])
    draws = torch.tensor(np.random.default_rng(0).random(40_000))
    chosen, logp = Sampler(0.7)(logits.expand(40_000, -1), draws)
    p = (logits / 0.7).softmax(0).numpy()
    counts = np.bincount(chosen.numpy(), minlength=6)
    assert counts[2] == counts[5] == 0
    live = p > 0
    chi = float((((counts - 40_000 * p) ** 2)[live] / (40_000 * p[live])).sum())
    assert chi < 16.3  # 3 degrees of freedom, one in a thousand
    assert logp.exp().tolist() == pytest.approx(p[chosen.numpy()].tolist(), rel=1e-5)
    edges, _ = Sampler(1.0)(logits.expand(2, -1), torch.tensor([0.0, 1 - 1e-16]))
    assert edges.tolist() == [0, 4]


def test_a_live_teacher_samples_with_the_adapter(configure: Callable[..., Any]) -> None:
    flags = ("--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8")
    live = make_lab(configure(*flags, "--orchestrator.teacher_model.update", "live"))
    requests = make_requests(live, context=True)
    completions = live.engine.generate(requests, SamplingParams(6), Role.TEACHER)
    for request, completion in zip(requests, completions, strict=True):
        expected = reference(live, request.prompt_ids, completion.token_ids, Role.STUDENT)
        assert completion.logprobs == pytest.approx(expected, abs=2e-5)
