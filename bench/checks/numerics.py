"""Check 8: errors of bf16 in the 0.6B shape, and the embedded engine's speed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.checks.models import SMALL, Job, load, make_prompts, randomize_adapter, warnings
from bench.checks.report import Findings, Setting
from minidistill.driver.model_checks import TOLERANCE, check_model
from minidistill.placement.attention import Layout
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import hidden_states, prefix_states
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Prompt, Request, Role, SamplingParams
from minidistill_kernels import linear_logprob

PACKED_ERROR = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # relative L2 of the adapter's gradient


def check(setting: Setting, findings: Findings) -> None:
    length = setting.size(512, 48)
    job = load(setting, SMALL, "--seq_len", str(2 * length))
    policy = job.policy
    findings.figure("attention", policy.attention.text)
    findings.holds("sequences are packed without a mask", policy.attention.shares_prompts)
    prompts = make_prompts(policy, 8, context=length // 2, own=length // 2)
    with warnings() as texts:  # before the adapter is trained, as in a run
        shares = check_model(policy, prompts, TokenBudget())
    findings.figure("preflight's warnings", texts)
    findings.holds("preflight is silent and caches the context", shares and not texts)
    errors = prefix_errors(job, prompts)
    for name, error in errors.items():
        findings.figure(name, error)
    findings.at_most(
        "error of the cached context", errors["weighted error"], TOLERANCE[policy.dtype]
    )
    randomize_adapter(policy)
    padded, packed = (
        gradient(job, prompts, layout) for layout in (Layout.PADDED, job.policy.attention.layout)
    )
    error = float((packed - padded).norm() / padded.norm())
    findings.at_most("packed against padded gradient", error, PACKED_ERROR[policy.dtype])
    sampling(setting, findings, job)


@torch.no_grad()
def prefix_errors(job: Job, prompts: list[Prompt]) -> dict[str, float]:
    """The largest error of a log-prob after cached keys and values, in nats: as it is, and weighted
    by the token's probability as preflight does. Against a padded pass on all tokens."""
    policy = job.policy
    view, completions = [p.teacher_ids for p in prompts], [p.student_ids[-16:] for p in prompts]
    shared = len(prompts[0].teacher_ids) - len(prompts[0].student_ids)
    logp = []
    with policy.inference(), policy.running_as(Role.TEACHER):
        for prefix in ((), view[0][:shared]):
            layout = policy.attention.prefix_layout if prefix else Layout.PADDED
            tokens = collate(view, completions, pad_id=policy.pad_id, layout=layout, prefix=prefix)
            states = prefix_states(policy, prefix) if prefix else None
            hidden_NH = hidden_states(policy, tokens, states)
            logp.append(policy.logits(hidden_NH).float().log_softmax(-1))
    error = (logp[0] - logp[1]).abs()
    return {
        "largest error": float(error.max()),
        "weighted error": float((error * logp[0].exp()).max()),
        "largest logit": float(policy.logits(hidden_NH).abs().max()),
    }


def gradient(job: Job, prompts: list[Prompt], layout: Layout) -> Tensor:
    """The adapter's gradient of the mean log-prob of some tokens, flat, in fp32.

    The prompts have different lengths, so that padding matters.
    """
    policy = job.policy
    for _, parameter in policy.parameters:
        parameter.grad = None
    view = [p.teacher_ids[: len(p.teacher_ids) - 9 * i] for i, p in enumerate(prompts[:4])]
    completions = [p.student_ids[:16] for p in prompts[:4]]
    tokens = collate(view, completions, pad_id=policy.pad_id, layout=layout).to(policy.device)
    hidden_NH = hidden_states(policy, tokens)
    logp_N, _ = linear_logprob(hidden_NH, policy.head, tokens.targets_N)
    logp_N.mean().backward()
    found = [p.grad for _, p in policy.parameters]
    assert all(grad is not None for grad in found)
    return torch.cat([grad.flatten().float() for grad in found if grad is not None])


def sampling(setting: Setting, findings: Findings, job: Job) -> None:
    """Tokens per second of the embedded engine: groups of 4, nothing ends before the limit."""
    job.policy.eos_ids = frozenset()
    count, own, new = setting.size((128, 256, 96), (8, 16, 4))
    prompts = make_prompts(job.policy, count // 4, context=0, own=own, seed=2)
    requests = [
        Request(prompt.student_ids, 4 * index + sample)
        for index, prompt in enumerate(prompts)
        for sample in range(4)
    ]

    def call() -> None:
        completions = job.engine.generate(requests, SamplingParams(new), Role.STUDENT)
        assert all(len(c.token_ids) == new for c in completions)

    seconds = setting.seconds(call, 1)
    findings.figure("embedded: sequences", count)
    findings.figure("embedded: tokens/s", count * new / seconds)
    findings.figure("embedded: ms a token of all sequences", seconds / new * 1e3)
